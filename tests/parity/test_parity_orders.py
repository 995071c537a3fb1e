"""Ranks, masks and pass counts of our orders against those read off the official decoders."""

import pytest
import torch
from official import Case, cases

from vistok.decoding import Order

UNCOMPARED = {}


def square(side):
    return (side, side)


SPELLINGS = {
    "nar": lambda side: ("nar", square(side)),
    "video": lambda shape: ("nar", tuple(shape)),
    "par": lambda side, regions: (f"par({regions})", square(side)),
    "var": lambda sides: ("next_scale", tuple(map(square, sides))),
    "zipar": lambda side, window: (f"zipar({window})", square(side)),
}


def ranks(plan):
    """The pass, from 1, in which each position is produced."""
    rank = torch.zeros(sum(len(fed.predict) for fed in plan.passes), dtype=torch.long)
    for t, fed in enumerate(plan.passes):
        rank[fed.predict] = t + 1
    return rank


@pytest.mark.parametrize("folder", cases("orders"))
def test_orders(folder):
    case = Case(folder)
    for name, entry in case.config.items():
        spelling, shape = SPELLINGS[entry["order"]](*entry["args"])
        plan = Order(spelling)(shape)
        rank = ranks(plan)
        case.compare(f"{name}.passes", torch.tensor([len(plan)]))
        case.compare(f"{name}.rank", rank if entry["order"] == "var" else rank.view(shape))
        fed = torch.tensor([len(p.tokens) for p in plan.passes])
        case.compare(f"{name}.max_rows_fed", fed.max())
        order = torch.cat([p.predict for p in plan.passes])
        case.compare(f"{name}.sequence_to_cell", order)

        # By the rule f(k) <= f(q), tokens that no pass feeds included: f is the rank plus one.
        if entry["order"] == "par":
            regions = entry["args"][1]
            start = torch.full((regions - 1,), regions + 1)
            f = torch.cat([rank[order][:regions] + 1, start, rank[order][regions:] + 1])
        else:
            f = rank + 1
        if entry["order"] != "var":  # whose first scale is fed as the condition
            f = torch.cat([torch.ones(1, dtype=torch.long), f])
        case.compare(f"{name}.mask", f[None, :] <= f[:, None])
    case.finish(UNCOMPARED)

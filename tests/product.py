"""The product: every exported tokenizer under every exported generator, with every head and plan.

    python tests/product.py --output docs/pairs.md

In tiny form, each combination trains two steps and samples images, or says in one line why it
cannot; the page is the table of both. What vistok exports and `tiny` has no form of is an error.
"""

import argparse
import inspect
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any, get_args

import torch
from tiny import GENERATORS, HEADS, PLANS, QUANTIZERS, SIZES, TOKENIZERS
from torch import Tensor, nn

import vistok
from vistok import ImagePipeline, TokenSpec
from vistok.decoding import Decoding, Order, Schedule, orders
from vistok.errors import IncompatibleTokensError, UserError
from vistok.generators import Generator
from vistok.heads import Head
from vistok.models import constructor_parameters
from vistok.tokenizers import Tokenizer

ORDERS = [name for name, make in orders.ORDERS.items() if make.__module__ == orders.__name__]
CLASSES, LABELS = ["a", "b", "c"], torch.tensor([0, 2])
DECODING = Decoding(guidance=Schedule(2), steps=Schedule(3))


@dataclass(frozen=True)
class Outcome:
    """What came of a combination: a `refusal`, or none where it trained and sampled. Refused tokens
    have no plan, and where a tokenizer refuses its quantizer, there are no tokens."""

    tokenizer: str
    quantizer: str
    tokens: TokenSpec | None = None
    generator: str = ""
    head: str = ""
    plan: str = ""
    refusal: str = ""

    @property
    def works(self) -> bool:
        return bool(self.plan) and not self.refusal

    @property
    def pair(self) -> tuple[str, ...]:
        return self.tokenizer, self.quantizer, self.generator


def exported(kind: type) -> list[type]:
    """Return vistok's classes of a kind, without the kind itself."""
    found = (getattr(vistok, name) for name in vistok.__all__)
    return [c for c in found if inspect.isclass(c) and issubclass(c, kind) and c is not kind]


def families() -> list[type[Generator]]:
    return sorted(exported(Generator), key=list(GENERATORS).index)


def fitting(make: Callable[[], Any], refused: type[UserError] = UserError) -> tuple[Any, str]:
    """Return what is made and no refusal, or None and the refusal."""
    try:
        return make(), ""
    except refused as error:
        return None, str(error)


def learn(model: nn.Module, loss: Callable[[], Tensor]) -> None:
    """Take two steps; raise `AssertionError` unless losses are finite and weights change."""
    weights = [p for p in model.train().parameters() if p.requires_grad]
    before = [p.detach().clone() for p in weights]
    adam = torch.optim.Adam(weights, 1e-3)
    for _ in range(2):
        adam.zero_grad()
        found = loss()
        assert found.isfinite(), f"{type(model).__name__} has a loss of {found.item()}"
        found.backward()
        adam.step()
    assert not all(map(torch.equal, before, weights)), f"{type(model).__name__} does not change"
    model.eval()


def tokenizer(name: str, quantizer: str) -> Tokenizer:
    torch.manual_seed(0)
    return TOKENIZERS[name](QUANTIZERS[quantizer]())


def train_tokenizer(model: Tokenizer) -> None:
    images = torch.rand(2, *model.input_shape)

    def loss() -> Tensor:
        output = model(images)
        pixels = output.reconstruction
        compared = 0 if pixels is None else (pixels - images).square().mean()
        return sum(output.losses.values(), compared)

    learn(model, loss)
    model.requires_grad_(False)


@cache
def tokenizers() -> list[tuple[Tokenizer | None, Outcome]]:
    """Return each tokenizer with each quantizer, trained, and what is known of its tokens; None
    with the refusal of a quantizer that it does not take."""
    found = []
    for names in product(TOKENIZERS, QUANTIZERS):
        model, refusal = fitting(partial(tokenizer, *names))
        if model:
            train_tokenizer(model)
        found.append((model, Outcome(*names, model and model.spec, refusal=refusal)))
    return found


def heads(family: type[Generator]) -> Iterator[dict[str, Head]]:
    """Yield the arguments that give a family each head that it takes; none for its own."""
    parameter = constructor_parameters(family).get("head")
    if parameter is None:
        yield {}
        return
    for kind in exported(Head):
        if issubclass(kind, get_args(parameter.annotation)):
            yield {"head": kind(**HEADS[kind])}


def generator(family: type[Generator], frozen: Tokenizer, **arguments) -> Generator:
    torch.manual_seed(0)
    model = family(frozen.spec, CLASSES, **SIZES | GENERATORS[family] | arguments)
    model.take_codes(frozen)
    return model


def train_generator(model: Generator, frozen: Tokenizer) -> None:
    statistics = frozen.statistics(torch.rand(2, *frozen.input_shape))
    learn(model, lambda: model(frozen.draw(statistics), LABELS).loss)


def sample(frozen: Tokenizer, model: Generator, plan: str) -> None:
    """Sample by a plan that fits; raise `AssertionError` unless that makes images."""
    decoding = DECODING.changed(plan=Order(plan))
    images = ImagePipeline(frozen, model).sample(LABELS, 0, range(len(LABELS)), decoding)
    assert images.shape == (len(LABELS), *frozen.input_shape)
    assert images.isfinite().all() and images.min() >= 0 and images.max() <= 1


def by_plan(frozen: Tokenizer, made: Outcome, family: type[Generator], **head: Head):
    """Yield what comes of a family with a head under a tokenizer, by each plan: of one model or,
    for orders that have to be learned, of one for each."""
    names = {"generator": family.__name__, "head": "".join(type(h).__name__ for h in head.values())}
    make = partial(generator, family, frozen, **head)
    model, refusal = fitting(make, IncompatibleTokensError)
    if model is None:
        yield replace(made, **names, refusal=refusal)
        return
    train_generator(model, frozen)
    names["head"] = type(model.head).__name__
    for plan in (spelling for order in ORDERS for spelling in PLANS[order]):
        used = model
        _, refusal = fitting(partial(model.plan, Order(plan)))
        if refusal and "order" in constructor_parameters(family):
            used, _ = fitting(partial(make, order=plan))
            if used is not None:
                train_generator(used, frozen)
                refusal = ""
        if not refusal:
            sample(frozen, used, plan)
        yield replace(made, **names, plan=plan, refusal=refusal)


@cache
def outcomes(family: type[Generator]) -> list[Outcome]:
    """Return what comes of a family under every tokenizer, with every head and plan."""
    return [
        outcome
        for frozen, made in tokenizers()
        for head in (heads(family) if frozen else ())
        for outcome in by_plan(frozen, made, family, **head)
    ]


PAGE = """\
# Any tokenizer under any generator

Every tokenizer, generator and head that vistok exports and every order of decoding is here, in tiny
form: the tokenizer trains two steps, the generator two steps on its tokens, and each plan samples
images. What does not fit raises an error of one line, which stands [below](#refusals).
`python tests/product.py --output docs/pairs.md` writes this page, and the test suite checks that it
is current.

Of {total} pairs of a tokenizer's tokens and a generator, {working} work; the others are refused
before any work.

## Tokens and generators

A cell names the orders by which a pair decodes. Those with a star take a generator that was trained
in them, the others do not: `LlamaGen` decodes by `zipar` what it learned in raster order. A pair
that does not fit has the number of its [refusal](#refusals). What tokens a tokenizer makes is up to
its quantizer, of which one stands for all that make such tokens.

{pairs}

## Generators, heads and plans

The same by head, over all tokens; an order may need a grid, see above. Every plan of this table was
tried with every generator: what a row does not name is refused.

{plans}

## Refusals

`GENERATOR`, `TOKENS` and `QUANTIZER` are those of the pair, `PLAN` is the plan asked for. Commands
print these messages and end.

Of tokens and heads, an `IncompatibleTokensError`:

{of_tokens}

Of plans, a `UserError`:

{of_plans}

Of quantizers, a `UserError`:

{of_quantizers}

## What is not multiplied

Generators here are class-conditional. With captions or prompts, `LlamaGen`, `PAR`, `NAR` and
`NextScaleLlama` differ in their first rows alone, and take the same tokens and plans. A tokenizer
that decodes with captions (`TiTok` with `text_length`) needs a class-conditional generator.
"""


def words(tokens: TokenSpec) -> str:
    """Return what tells apart tokens that generators may or may not take."""
    places = {1: "sequence", 2: "grid", 3: "video"}
    place = "scales" if tokens.is_scales else places[len(tokens.shape)]
    if tokens.kind == "factorised":
        return f"{place} of {'levels' if tokens.values else 'several ids'}"
    return f"{place} of {tokens.kind}"


def template(outcome: Outcome) -> str:
    """Return a refusal without what differs from pair to pair."""
    text, tokens = outcome.refusal, outcome.tokens
    if tokens is None:
        return re.sub(rf"\b{outcome.quantizer.split()[0]}\b(?!:)", "QUANTIZER", text)
    for spec in (tokens, replace(tokens, ordered=False)):
        text = text.replace(str(spec), "TOKENS")
    text = re.sub(f"not {'x'.join(map(str, tokens.shape))}$", "not TOKENS", text)
    if outcome.plan:
        return text.replace(f"not by {outcome.plan}", "not by PLAN")
    return re.sub(rf"^{outcome.generator}\b", "GENERATOR", text)


def unique(texts: Iterable[str]) -> list[str]:
    return [text for text in dict.fromkeys(texts) if text]


def table(*rows: Iterable[str]) -> str:
    """Return a table of Markdown, of which the first row is the head."""
    cells = [list(row) for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], "|---" * len(cells[0]) + "|", *lines[1:]])


def page() -> str:
    """Return the page of all outcomes."""
    every = [outcome for family in families() for outcome in outcomes(family)]
    refusals = unique(template(o) for o in every if not o.plan)

    def cell(found: list[Outcome], name_of: Callable[[Order], str]) -> str:
        """Return the orders that work, with a star where the generator has to be trained in them,
        or the numbers of the reasons why none does."""
        works = []
        for outcome in found:
            if outcome.works:
                order, family = Order(outcome.plan), getattr(vistok, outcome.generator)
                works.append(name_of(order) + "*" * (order.name in family.learned))
        reasons = sorted({1 + refusals.index(template(o)) for o in found if not o.plan})
        return ", ".join(unique(works)) or f"– {', '.join(map(str, reasons))}"

    pairs, plans = defaultdict(list), defaultdict(list)
    names = [family.__name__ for family in families()]
    for made in (made for _, made in tokenizers() if made.tokens):
        own = [[o for o in every if o.pair == replace(made, generator=n).pair] for n in names]
        cells = (cell(found, lambda order: order.name) for found in own)
        pairs[words(made.tokens), made.quantizer, *cells].append(made.tokenizer.partition(",")[0])
    for name, head in dict.fromkeys((o.generator, o.head) for o in every if o.head):
        own = [o for o in every if (o.generator, o.head) == (name, head)]
        plans[name, cell(own, str)].append(head)
    return PAGE.format(
        working=len({o.pair for o in every if o.works}),
        total=len({o.pair for o in every}),
        pairs=table(
            ("tokens", "quantizer", "tokenizers", *names),
            *((*row[:2], ", ".join(unique(made)), *row[2:]) for row, made in pairs.items()),
        ),
        plans=table(
            ("generator", "heads", "plans"),
            *((name, ", ".join(heads), works) for (name, works), heads in plans.items()),
        ),
        of_tokens="\n".join(f"{i}. `{text}`" for i, text in enumerate(refusals, 1)),
        of_plans=listed(template(o) for o in every if o.plan and o.refusal),
        of_quantizers=listed(template(made) for _, made in tokenizers() if not made.tokens),
    )


def listed(texts: Iterable[str]) -> str:
    return "\n".join(f"- `{text}`" for text in unique(texts))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="page to write")
    parser.parse_args().output.write_text(page(), encoding="utf-8")

"""Orders: pure functions of the token shape that make plans.

N is the number of positions, h x w a grid, T the number of condition rows, which are causal among
themselves. Rows of one pass share a rank and see each other; later ranks see earlier ones.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import lru_cache, wraps
from itertools import accumulate, pairwise, product

import torch

from vistok.decoding.plans import MaskedPlan, Pass, Plan, RandomPlan
from vistok.decoding.spelling import read_call
from vistok.errors import UserError
from vistok.tokens import Shape

ORDERS: dict[str, Callable[..., Plan | MaskedPlan]] = {}


def order(trained: str | None = None):
    """Make an order known by the name of the function below, which makes its plan from (shape,
    condition rows, arguments...). `trained` is the order of the models that it decodes, where that
    is another.

    Plans are kept, for sampling and training ask for the same ones again; so they are made alike
    whatever the mode or the default device of the first call. Raises `UserError` for a name that
    another function has.
    """

    def known(make: Callable[..., Plan | MaskedPlan]):
        @lru_cache(maxsize=64)
        @wraps(make)
        def plan(*arguments):
            with torch.inference_mode(False), torch.device("cpu"):
                return make(*arguments)

        plan.trained = trained or make.__name__
        before = ORDERS.get(make.__name__, plan)
        # A notebook's cell that runs again makes its order anew.
        if (before.__module__, before.__qualname__) != (plan.__module__, plan.__qualname__):
            raise UserError(f"order '{make.__name__}' is that of {before.__module__}: rename yours")
        ORDERS[make.__name__] = plan
        return plan

    return known


class Order:
    """An order of decoding by its spelling, alike in Python, configs and on the command line:

    - `raster`: row by row, one token a pass, N passes (LlamaGen; sequences of 1D tokenizers);
    - `diagonal`: along the anti-diagonals in zig-zag, one token a pass, N passes (DAR);
      `diagonal(flip)` takes the other turn first;
    - `random(7)`: by the permutation of that seed, one token a pass, N passes;
    - `par(4)`: regions in parallel, n + N/n - 1 passes for n regions (PAR);
    - `nar`: all neighbours of what is known, h + w - 1 passes, t + h + w - 2 for video (NAR);
    - `zipar(16)`: for models trained in raster order, each row behind the one above by a window s,
      2w + (h - 2)s passes; `zipar(16,masked)` hides slots not yet written, `zipar(16,adaptive)`
      starts rows when they are ready, image by image (ZipAR);
    - `maskgit(8)`: for masked models, in 8 passes over all positions, of which the most confident
      stay; `maskgit(8,cosine)` leaves as many masked as the cosine says, by default the arccosine,
      or `linear`, `square`, `cubic`, `sqrt` (MaskGIT);
    - `mar(64)`: for masked models, in 64 passes over random sets of positions, each image its own,
      that grow as the cosine says (MAR);
    - `cells(8)`: by squares of 8 x 8 positions, one after another: `cells(1)` by single positions,
      the whole grid as one; `subsamples(4)`: by combs of every fourth position of both axes;
      `scales(1,2,4,8,16)`: by averages of the grid of so many positions a side, up to itself, each
      entity jointly (xAR, FlowAR);
    - `next_scale`: for tokens of scales, one scale a pass (VAR); `next_scale(2)` predicts each but
      the first twice again, given its own tokens of the time before (TokenFlow).

    `order(shape)` returns the plan. Raises `UserError` for any other spelling, and for a shape that
    does not fit.
    """

    def __init__(self, spelling: "str | Order"):
        text = str(spelling)
        self.name, self.arguments = read_call(text, "order", ORDERS)
        taken = list(inspect.signature(ORDERS[self.name]).parameters.values())[2:]
        required = sum(p.default is p.empty for p in taken)
        if taken and taken[-1].kind is inspect.Parameter.VAR_POSITIONAL:
            taken += taken[-1:] * (len(self.arguments) - len(taken))
        if not required <= len(self.arguments) <= len(taken):
            names = ", ".join(p.name for p in taken) or "nothing"
            raise UserError(f"order '{text}': {self.name} takes {names} in brackets")
        for i, (argument, parameter) in enumerate(zip(self.arguments, taken, strict=False)):
            if parameter.annotation is int:
                try:
                    self.arguments[i] = int(argument)
                except ValueError:
                    raise UserError(
                        f"order '{text}': {parameter.name} must be a whole number"
                    ) from None

    def __call__(self, shape: Shape, condition_rows: int = 1) -> Plan | MaskedPlan:
        return ORDERS[self.name](tuple(shape), condition_rows, *self.arguments)

    @property
    def trained(self) -> str:
        """The name of the order in which the models are trained that it decodes."""
        return ORDERS[self.name].trained

    @property
    def adaptive_window(self) -> int | None:
        """The least window of `zipar(s,adaptive)`, whose plan is but what it takes at most; None
        for all other orders."""
        if self.name == "zipar" and self.arguments[1:] == ["adaptive"]:
            return self.arguments[0]
        return None

    def __str__(self) -> str:
        inside = ",".join(map(str, self.arguments))
        return f"{self.name}({inside})" if inside else self.name

    __repr__ = __str__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Order) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))


@order()
def raster(shape: tuple[int, ...], condition_rows: int = 1) -> Plan:
    """The positions as they are numbered."""
    return _along("raster", shape, condition_rows, range(math.prod(shape)))


@order()
def diagonal(shape: tuple[int, ...], condition_rows: int = 1, flip: str = "") -> Plan:
    """DAR's path (Xu et al., 2025, arXiv:2503.11129): anti-diagonals in turn upwards and downwards,
    so that each cell touches the one before."""
    if flip not in ("", "flip"):
        raise UserError(f"order 'diagonal({flip})': takes 'flip' or nothing in brackets")
    height, width = _grid(shape, "diagonal")
    path = []
    for d in range(height + width - 1):
        rows = range(max(0, d - width + 1), min(height, d + 1))
        downwards = (d % 2 == 1) != bool(flip)
        path += [r * width + d - r for r in (rows if downwards else reversed(rows))]
    return _along("diagonal", shape, condition_rows, path)


@order()
def random(shape: tuple[int, ...], condition_rows: int = 1, seed: int = 0) -> Plan:
    """One permutation for all images."""
    generator = torch.Generator().manual_seed(seed)
    path = torch.randperm(math.prod(shape), generator=generator).tolist()
    return _along("random", shape, condition_rows, path)


@order()
def par(shape: tuple[int, ...], condition_rows: int = 1, regions: int = 4) -> Plan:
    """PAR (Wang et al., 2024, arXiv:2412.15119): the first cell of each of n square-many regions
    one by one, then one cell of every region at once, cells and regions in raster order. n - 1
    learned placeholders stand beside the last first cell where prediction turns from the next token
    to the next group. The regions of a video span all frames.
    """
    side = math.isqrt(regions)
    if side * side != regions or side == 0 or len(shape) < 2 or any(n % side for n in shape[-2:]):
        raise UserError(
            f"order 'par({regions})': needs a square number of regions that divide a grid evenly, "
            f"not {'x'.join(map(str, shape))}"
        )
    # (..., side, h/side, side, w/side) -> cells x regions
    grid = torch.arange(math.prod(shape)).view(-1, side, shape[-2] // side, side, shape[-1] // side)
    groups = grid.permute(0, 2, 4, 1, 3).reshape(-1, regions).tolist()
    first, prefix = groups[0], list(range(condition_rows))
    passes = [_next_token(prefix, [], 0, first[0])]
    rank = condition_rows
    for before, after in pairwise(first):
        passes.append(_next_token([], [before], rank, after))
        rank += 1
    for index, (before, after) in enumerate(pairwise(groups)):
        fed = (
            {"tokens": before[-1:], "placeholders": range(regions - 1)}
            if index == 0
            else {"tokens": before}
        )
        passes.append(Pass.of([rank] * regions, after, [[i] for i in range(regions)], **fed))
        rank += 1
    return Plan("par", shape, tuple(passes))


@order()
def nar(shape: tuple[int, ...], condition_rows: int = 1) -> Plan:
    """NAR (He et al., 2025, arXiv:2503.10696): all positions of equal distance to the first at
    once. One head for each axis predicts the next position along it, the last axis first (right,
    below, next frame); a position with several known neighbours takes the mean.
    """
    axes = len(shape)
    strides = [math.prod(shape[a + 1 :]) for a in range(axes)]
    planes = [[] for _ in range(sum(shape) - axes + 1)]
    for index, cell in enumerate(product(*map(range, shape))):
        planes[sum(cell)].append((index, cell))
    passes = [
        Pass.of(
            rank=range(condition_rows),
            condition=range(condition_rows),
            predict=[0],
            source=[[condition_rows - 1] * axes],
            head=[list(range(axes))],
            weight=[[1 / axes] * axes],
        )
    ]
    for distance, (before, after) in enumerate(pairwise(planes)):
        row_of = {index: row for row, (index, _) in enumerate(before)}
        source, head, weight = [], [], []
        for index, cell in after:
            known = [a for a in reversed(range(axes)) if cell[a] > 0]
            idle = [0] * (axes - len(known))
            source.append([row_of[index - strides[a]] for a in known] + idle)
            head.append([axes - 1 - a for a in known] + idle)
            weight.append([1 / len(known)] * len(known) + [0.0] * len(idle))
        passes.append(
            Pass.of(
                rank=[condition_rows + distance] * len(before),
                tokens=[index for index, _ in before],
                predict=[index for index, _ in after],
                source=source,
                head=head,
                weight=weight,
            )
        )
    return Plan("nar", shape, tuple(passes))


@order(trained="raster")
def zipar(
    shape: tuple[int, ...], condition_rows: int = 1, window: int = 16, rule: str = ""
) -> Plan:
    """ZipAR (He et al., 2024, arXiv:2412.04062): rows of a raster-trained model side by side. Row 0
    comes first, row 1 follows it, each further row starts `window` passes after the one above.

    A row that starts knows no end of the row above: the newest token of the row two above stands in
    for it, in its slot, until the true one is known and fed. As in the released code, slots of the
    rows above that are not yet written hold zeros and are attended to, unless `masked`. Windows of
    the grid's width and more, and below 1, are raster order.
    """
    height, width = _grid(shape, "zipar")
    if rule not in ("", "masked", "adaptive"):
        raise UserError(f"order 'zipar({window},{rule})': takes masked, adaptive or nothing there")
    first_rows = raster(shape, condition_rows)
    if not 1 <= window < width or height == 1 or rule == "adaptive":
        return first_rows
    passes = list(first_rows.passes[:width])
    written = torch.zeros(condition_rows + height * width, dtype=torch.bool)
    written[: condition_rows + width - 1] = True
    for time in range((height - 2) * window + width):
        tokens, cells, predict = [], [], []
        for row in range(1, height):
            column = time - (row - 1) * window
            before = row * width + column - 1  # the cell to the left, or the end of the row above
            if column == width and row < height - 1:
                tokens.append(before)  # fed for the rows below alone
                cells.append(before)
            if 0 <= column < width:
                stands_in = column == 0 and row > 1
                newest = width - 1 if row == 2 else (row - 2) * width + min(2 * window, width) - 1
                tokens.append(newest if stands_in else before)
                cells.append(before)
                predict.append(before + 1)
        rank = len(passes) + condition_rows - 1
        source = range(len(tokens) - len(predict), len(tokens))
        fed = in_slots(condition_rows, rank, tokens, cells, predict, source)
        if rule == "masked":
            written[fed.slots] = True
            fed = replace(fed, sees=fed.sees & written[: fed.sees.shape[1]])
        passes.append(fed)
    return Plan("zipar", shape, tuple(passes))


def in_slots(
    condition_rows: int,
    rank: int,
    tokens: Sequence[int],
    cells: Sequence[int],
    predict: Sequence[int],
    source: Iterable[int],
) -> Pass:
    """A pass whose rows lie in the slots of their cells and see all slots up to their own."""
    slots = condition_rows + torch.tensor(cells)
    fed = Pass.of(
        rank=[rank] * len(tokens),
        tokens=tokens,
        cells=cells,
        predict=predict,
        source=[[row] for row in source],
    )
    return replace(fed, slots=slots, sees=torch.arange(int(slots.max()) + 1) <= slots[:, None])


# The share of tokens still masked when the fraction r of the passes is over.
MASKED_SHARES = {
    "arccos": lambda r: math.acos(r) * 2 / math.pi,
    "cosine": lambda r: math.cos(math.pi * r / 2),
    "linear": lambda r: 1 - r,
    "square": lambda r: 1 - r**2,
    "cubic": lambda r: 1 - r**3,
    "sqrt": lambda r: 1 - math.sqrt(r),
}


@order()
def maskgit(
    shape: tuple[int, ...], condition_rows: int = 1, steps: int = 8, schedule: str = "arccos"
) -> MaskedPlan:
    """MaskGIT (Chang et al., 2022, arXiv:2202.04200): every pass but the last leaves at least one
    token masked, and fewer than the one before while there are more than one."""
    if steps < 1 or schedule not in MASKED_SHARES:
        raise UserError(
            f"order 'maskgit({steps},{schedule})': takes passes, at least 1, and one of "
            f"{', '.join(MASKED_SHARES)}"
        )
    n = math.prod(shape)
    masked = [n]
    for step in range(1, steps):
        share = MASKED_SHARES[schedule](step / steps)
        masked.append(max(1, min(masked[-1] - 1, math.floor(n * share))))
    return MaskedPlan("maskgit", shape, tuple(masked))


@order()
def mar(shape: tuple[int, ...], condition_rows: int = 1, steps: int = 64) -> RandomPlan:
    """MAR (Li et al., 2024, arXiv:2406.11838): of N positions, N cos(pi/2 r) are left when the
    fraction r of the passes is over, and every pass decodes at least one."""
    if steps < 1:
        raise UserError(f"order 'mar({steps})': takes passes, at least 1")
    n = math.prod(shape)
    steps = min(steps, n)
    masked = [n]
    for step in range(1, steps):
        left = math.floor(n * math.cos(math.pi / 2 * step / steps))
        masked.append(max(1, min(masked[-1] - 1, left)))
    return RandomPlan("mar", shape, tuple(masked))


@order()
def cells(shape: tuple[int, ...], condition_rows: int = 1, side: int = 8) -> Plan:
    """xAR (Ren et al., 2025, arXiv:2502.20388): squares of `side` positions in raster order, as are
    the positions inside."""
    height, width = _grid(shape, "cells")
    if side < 1 or height % side or width % side:
        raise UserError(f"order 'cells({side})': must divide a grid of {height}x{width} evenly")
    grid = torch.arange(height * width).view(height // side, side, width // side, side)
    return _entities("cells", shape, grid.transpose(1, 2).reshape(-1, side * side).tolist())


@order()
def subsamples(shape: tuple[int, ...], condition_rows: int = 1, stride: int = 4) -> Plan:
    """xAR's combs: all positions whose row and column leave the same rests, in raster order of the
    rests."""
    height, width = _grid(shape, "subsamples")
    if stride < 1 or height % stride or width % stride:
        raise UserError(
            f"order 'subsamples({stride})': must divide a grid of {height}x{width} evenly"
        )
    grid = torch.arange(height * width).view(height // stride, stride, width // stride, stride)
    combs = grid.permute(1, 3, 0, 2).reshape(stride * stride, -1)
    return _entities("subsamples", shape, combs.tolist())


@order()
def scales(shape: tuple[int, ...], condition_rows: int = 1, *sides: int) -> Plan:
    """The scales of VAR (Tian et al., 2024, arXiv:2404.02905), FlowAR and xAR: square grids of so
    many positions a side, one after another in one sequence, the last as large as `shape`."""
    height, width = _grid(shape, "scales")
    rising = all(before < after for before, after in pairwise((0, *sides)))
    if not sides or not rising or (sides[-1],) * 2 != (height, width):
        raise UserError(
            f"order 'scales({','.join(map(str, sides))})': takes rising sides of squares, of which "
            f"the last is the grid of {height}x{width}"
        )
    sets = _consecutive([side * side for side in sides])
    return _entities("scales", tuple((side, side) for side in sides), sets)


@order()
def next_scale(shape: Shape, condition_rows: int = 1, corrections: int = 0) -> Plan:
    """VAR (Tian et al., 2024, arXiv:2404.02905), whose tokens are those of all scales; corrections
    are TokenFlow's (Qu et al., 2024, arXiv:2412.03069, section 3.3)."""
    if corrections < 0 or not isinstance(shape[0], tuple):
        found = "x".join(map(str, shape))
        raise UserError(
            f"order 'next_scale({corrections})': takes corrections, 0 or more, and needs tokens of "
            f"scales, not {found}"
        )
    passes = []
    for fed in _entities("next_scale", shape, _consecutive([h * w for h, w in shape])).passes:
        passes.append(fed)
        if len(fed.tokens):
            own = fed.predict.tolist()
            rows = [[len(own) + row] for row in range(len(own))]
            passes += [
                Pass.of(fed.rank[:1] * len(own), own, rows, tokens=own, correction=number)
                for number in range(1, corrections + 1)
            ]
    return Plan("next_scale", shape, tuple(passes), by_pass=True)


def _entities(name: str, shape: Shape, sets: Sequence[list[int]]) -> Plan:
    """One set of positions a pass, fed the set before; the rows to be predicted follow those fed,
    and each predicts itself."""
    passes = []
    for t, (before, now) in enumerate(pairwise([[], *sets])):
        rows = [[len(before) + row] for row in range(len(now))]
        passes.append(Pass.of([t] * len(before), now, rows, tokens=before))
    return Plan(name, shape, tuple(passes), by_pass=True)


def _consecutive(sizes: Sequence[int]) -> list[list[int]]:
    """Return the first positions, those that follow, and so on, so many each."""
    ends = accumulate(sizes, initial=0)
    return [list(range(begin, end)) for begin, end in pairwise(ends)]


def _next_token(condition: list[int], fed: list[int], rank: int, predict: int) -> Pass:
    """A pass whose last row predicts one position."""
    rows = len(condition) + len(fed)
    return Pass.of(
        rank=range(rank, rank + rows),
        condition=condition,
        tokens=fed,
        predict=[predict],
        source=[[rows - 1]],
    )


def _along(name: str, shape: tuple[int, ...], condition_rows: int, path) -> Plan:
    """One token a pass, each predicted from the one before."""
    path = list(path)
    first = _next_token(list(range(condition_rows)), [], 0, path[0])
    rest = [
        _next_token([], [before], condition_rows + t, after)
        for t, (before, after) in enumerate(pairwise(path))
    ]
    return Plan(name, shape, (first, *rest))


def _grid(shape: tuple[int, ...], order: str) -> tuple[int, int]:
    if len(shape) != 2:
        raise UserError(f"order '{order}': needs a grid (h, w), not {'x'.join(map(str, shape))}")
    return shape

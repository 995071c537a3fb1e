"""The report of a comparison: one HTML page, a CSV, the table in Markdown, two plots of quality."""

import base64
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2

from vistok.curves import write_table
from vistok.files import replaced
from vistok.metrics import Protocol
from vistok.speed import table

if TYPE_CHECKING:  # half a second that only plots need wait for
    from matplotlib.axes import Axes

PAGE, TABLE, MARKDOWN, PICTURES = "report.html", "report.csv", "report.md", "pictures"
PLOTS = {"quality-passes.png": "passes", "quality-tokens.png": "tokens"}


@dataclass(frozen=True)
class Line:
    """What the report says of one row.

    Args:
        system: name of the row
        tokenizer: class of the tokenizer, and what it makes of an image
        generator: class of the generator
        decoding: order and schedules
        tokenizer_parameters: weights of the tokenizer
        generator_parameters: weights of the generator
        tokens: of an image
        bytes: of an image's tokens; none for latents
        passes: of the generator for an image
        evaluations: calls, one after another, of the networks that draw an image's tokens
        images_per_second: of tokens, without the tokenizer's decoder
        psnr: of reconstructions, dB
        rfid: of reconstructions
        fid: of samples
        inception_score: of samples, if the features are of a network that tells classes
        note: a word on what this is
    """

    system: str
    tokenizer: str
    generator: str
    decoding: str
    tokenizer_parameters: int
    generator_parameters: int
    tokens: int
    bytes: float | None
    passes: int
    evaluations: int
    images_per_second: float
    psnr: float
    rfid: float
    fid: float
    inception_score: float | None
    note: str = ""


# Column, its heading, how its numbers are shown, and which end is the better one, if any.
COLUMNS = {
    "rfid": ("rFID", "{:.1f}", min),
    "psnr": ("PSNR, dB", "{:.1f}", max),
    "fid": ("FID", "{:.1f}", min),
    "inception_score": ("IS", "{:.2f}", max),
    "tokens": ("tokens", "{:,}", None),
    "bytes": ("bytes", "{:g}", None),
    "passes": ("passes", "{:,}", None),
    "evaluations": ("network calls", "{:,}", None),
    "images_per_second": ("images/s", "{:.3g}", max),
    "tokenizer_parameters": ("weights of the tokenizer", "{:,}", None),
    "generator_parameters": ("of the generator", "{:,}", None),
}


@dataclass(frozen=True)
class Heading:
    """What stands above the numbers: the title, the budget and the protocols in words, the device
    that rates are of, and the spec that made it all."""

    title: str
    budget: str
    protocols: dict[str, Protocol]
    rates: str
    spec: str


def write_report(folder: Path, heading: Heading, lines: Sequence[Line]) -> None:
    """Write the table, the plots and the page, which holds the pictures of `folder`/pictures:
    reconstructions, and a strip of samples for each line."""
    write_table(folder / TABLE, [asdict(line) for line in lines])
    write_markdown(folder / MARKDOWN, lines)
    for name, against in PLOTS.items():
        plot(folder / name, lines, against)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vistok.compare", "."), autoescape=True, trim_blocks=True
    )
    page = environment.get_template(PAGE).render(
        heading=heading,
        protocols={name: asdict(protocol) for name, protocol in heading.protocols.items()},
        columns=[COLUMNS[name][0] for name in columns(lines)],
        rows=[(line, cells(line, lines)) for line in lines],
        plots=[embedded(folder / name) for name in PLOTS],
        pictures=[
            (file.stem, embedded(file))
            for name in ("reconstructions", "samples")
            if (file := folder / PICTURES / f"{name}.png").exists()
        ],
    )
    with replaced(folder / PAGE) as aside:
        aside.write_text(page, encoding="utf-8")


def columns(lines: Sequence[Line]) -> list[str]:
    """Return the columns of which any line knows something."""
    return [name for name in COLUMNS if any(getattr(each, name) is not None for each in lines)]


def cells(line: Line, lines: Sequence[Line]) -> list[tuple[str, bool]]:
    """Return what each column shows of a line, and whether it is the best of its column."""
    shown = []
    for name in columns(lines):
        _, form, better = COLUMNS[name]
        value, known = getattr(line, name), [getattr(each, name) for each in lines]
        best = better is not None and value == better(known)
        shown.append(("" if value is None else form.format(value), best))
    return shown


def write_markdown(file: Path, lines: Sequence[Line]) -> None:
    """Write the table for a README, the best of each column in bold."""
    titles = [COLUMNS[name][0] for name in columns(lines)]
    rows = []
    for line in lines:
        shown = (f"**{text}**" if best else text for text, best in cells(line, lines))
        rows.append({"system": line.system, **dict(zip(titles, shown, strict=True))})
    with replaced(file) as aside:
        aside.write_text(table(rows) + "\n", encoding="utf-8")


def plot(file: Path, lines: Sequence[Line], against: str) -> None:
    """Draw FID over the passes or the tokens of an image, for tokens beside what the tokenizer
    alone costs."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for line in lines:
        x = getattr(line, against)
        dots = axes.scatter([x], [line.fid], s=28)
        if against == "tokens":
            colour = dots.get_facecolor()
            axes.scatter([x], [line.rfid], s=28, facecolors="none", edgecolors=colour)
            axes.vlines([x], line.rfid, line.fid, colors=colour, linewidth=0.6, alpha=0.6)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.margins(x=0.15)
    label(axes, {line.system: (getattr(line, against), line.fid) for line in lines})
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel({"passes": "passes an image", "tokens": "tokens an image"}[against])
    axes.set_ylabel("FID of samples" + (", rFID (hollow)" if against == "tokens" else ""))
    axes.grid(alpha=0.3)
    with replaced(file) as aside:
        figure.savefig(aside, format="png", dpi=120)


def label(axes: "Axes", dots: dict[str, tuple[float, float]]) -> None:
    """Write names to the right of dots, those of one column one above another."""
    height = 10  # of a line of text, in points
    to_points = 72 / axes.figure.dpi
    top: dict[float, float] = {}  # of the last name in each column
    for name, (x, y) in sorted(dots.items(), key=lambda dot: dot[1][1]):
        at = axes.transData.transform((x, y))[1] * to_points
        shift = max(0, top.get(x, at) - at)
        top[x] = at + shift + height
        axes.annotate(name, (x, y), (6, shift - 3), textcoords="offset points", fontsize=8)


def embedded(file: Path) -> str:
    """Return a picture as a URL that holds it, so that the page is one file."""
    return f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"

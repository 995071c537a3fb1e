"""The page, the table and the plots of a comparison."""

import csv
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from PIL import Image

from vistok.compare.report import COLUMNS, Heading, Line, cells, columns, write_report
from vistok.metrics import Protocol

LINE = Line(
    system="PAR",
    tokenizer="ConvTokenizer, 8x8 ids of 4096",
    generator="PAR, CategoricalHead",
    decoding="par(4)",
    tokenizer_parameters=1_234_567,
    generator_parameters=89,
    tokens=64,
    bytes=96,
    passes=19,
    evaluations=19,
    images_per_second=101.7,
    psnr=23.4,
    rfid=5.25,
    fid=30.3,
    inception_score=None,
)
LINES = [
    LINE,
    replace(LINE, system="<b>xAR & co</b>", fid=18.0, bytes=None, psnr=20.0, images_per_second=3.0),
]
PROTOCOL = Protocol("generation", 432, "sampled", "balanced", "emoji", "random", "IS in 10 splits")
HEADING = Heading("Two <systems>", "48,000 images", {"samples": PROTOCOL}, "on a CPU", "title: a")


class Page(HTMLParser):
    """The text of each cell, and of all."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.images, self.text, self.open = [], [], "", 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "img":
            self.images.append(dict(attributes)["src"])
        self.open += tag not in ("meta", "img", "br")

    def handle_endtag(self, tag):
        self.open -= 1

    def handle_data(self, data):
        self.text += data
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "pictures" / "samples.png")
    write_report(tmp_path, HEADING, LINES)
    return tmp_path


def test_the_page_is_one_file_that_says_all(folder):
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert page.open == 0, "a tag is not closed"
    header, *rows = page.rows
    shown = columns(LINES)
    assert header == ["system", *(COLUMNS[name][0] for name in shown)]
    assert "IS" not in header, "nothing is known of it"
    assert "<b>xAR & co</b>" in rows[1][0], "names are text, not markup"
    assert rows[0][1 + shown.index("tokenizer_parameters")] == "1,234,567"
    assert rows[1][1 + shown.index("bytes")] == ""
    assert len(page.images) == 3 and all(u.startswith("data:image/png") for u in page.images)
    assert (
        "48,000 images" in page.text and "IS in 10 splits" in page.text and "title: a" in page.text
    )
    assert "http" not in text, "the page reads nothing from elsewhere"


def test_the_table_holds_the_numbers_in_full(folder):
    with (folder / "report.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["system"] for row in rows] == [line.system for line in LINES]
    assert float(rows[0]["rfid"]) == LINE.rfid and rows[1]["bytes"] == ""


def test_the_table_in_markdown_is_that_of_the_page(folder):
    lines = (folder / "report.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len({len(row) for row in rows}) == 1 and len(rows) == 2 + len(LINES)
    for row, line in zip(rows[2:], LINES, strict=True):
        shown = [f"**{text}**" if best else text for text, best in cells(line, LINES)]
        assert row == [line.system, *shown]


def best_of(line):
    shown = zip(columns(LINES), cells(line, LINES), strict=True)
    return {name for name, (_, is_best) in shown if is_best}


def test_the_best_of_a_column_is_marked():
    best = best_of(LINES[1])
    assert best == {"fid", "rfid"}  # the last is equal
    best = best_of(LINES[0])
    assert best == {"psnr", "images_per_second", "rfid"}


@pytest.mark.parametrize("name", ["quality-passes.png", "quality-tokens.png"])
def test_plots_are_drawn(folder, name):
    picture = Image.open(folder / name).convert("RGB")
    assert min(picture.size) > 300 and len(picture.getcolors(1 << 24)) > 10

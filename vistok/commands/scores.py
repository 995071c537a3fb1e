"""vistok scores: the results in a metrics file, as one table.

vistok scores --results runs/quickstart/metrics.json
"""

from vistok.errors import UserError
from vistok.metrics import Result, read_results


def main(results: str) -> None:
    """Print a table of all results that evaluations wrote into a file.

    Args:
        results: JSON file of results
    """
    found = read_results(results)
    if not found:
        raise UserError(f"--results {results}: holds none; make them by `vistok evaluate`")
    print(table(found))
    for note in dict.fromkeys(note for result in found.values() for note in result.notes):
        print(f"note: {note}")


def table(results: dict[str, Result]) -> str:
    """Return a Markdown table with a row for each score of each result."""
    rows = [
        (name, score, f"{value:.4g}", str(result.protocol.count), result.protocol.reference)
        for name, result in results.items()
        for score, value in result.scores.items()
    ]
    rows = [("result", "score", "value", "images", "against"), *rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])

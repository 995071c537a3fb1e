"""The benchmark beside another package, in whose place a plain search stands here."""

import sys
from types import SimpleNamespace

import torch
from commands import run

SIZES = ("--codes", 30, "--dim", 4, "--tokens", "[5, 7]", "--repeats", 1)


class PlainSearch(torch.nn.Module):
    def __init__(self, dim, codebook_size, use_cosine_sim, rotation_trick):
        super().__init__()
        self._codebook = SimpleNamespace(embed=torch.zeros(1, codebook_size, dim))

    def forward(self, latents):
        (codes,) = self._codebook.embed
        return None, torch.cdist(latents, codes).argmin(-1), None


def test_the_command_prints_a_row_for_each_number_of_tokens(capfd, monkeypatch):
    package = SimpleNamespace(VectorQuantize=PlainSearch)
    monkeypatch.setitem(sys.modules, "vector_quantize_pytorch", package)
    code, out, err = run(capfd, "benchmarks/lookup.py", *SIZES)
    assert code == 0, err
    header, _, *rows = [line.strip("| ").split(" | ") for line in out.splitlines() if "|" in line]
    assert [row[:2] for row in rows] == [
        [distance, str(tokens)] for distance in ("Euclid", "cosine") for tokens in (5, 7)
    ]
    assert all(len(row) == len(header) for row in rows)
    assert [row[-1] for row in rows[:2]] == ["100.000%"] * 2


def test_without_the_package_it_says_how_to_get_it(capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "vector_quantize_pytorch", None)
    code, _, err = run(capfd, "benchmarks/lookup.py", *SIZES)
    assert code == 2 and err.count("\n") == 1
    assert err.startswith("error: ") and "pip install vector-quantize-pytorch" in err

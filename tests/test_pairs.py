"""The product of tokenizers, generators, heads and plans, and the page that shows it."""

from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from product import ORDERS, Outcome, exported, families, outcomes, page, tokenizers

from vistok.decoding import Order
from vistok.generators import Generator
from vistok.heads import Head
from vistok.tokenizers import Tokenizer
from vistok.tokens import Kind, TokenSpec

PAGE = Path(__file__).parent.parent / "docs" / "pairs.md"


def works() -> list[Outcome]:
    return [outcome for family in families() for outcome in outcomes(family) if outcome.works]


@pytest.mark.parametrize("family", families(), ids=lambda family: family.__name__)
def test_every_combination_works_or_says_why(family):
    """What works was trained and sampled on the way here."""
    for found in outcomes(family):
        if found.works:
            continue
        assert "\n" not in found.refusal
        if found.plan:
            assert f"{family.__name__} of {found.tokens} decodes by " in found.refusal
            assert f", not by {found.plan}" in found.refusal
        else:
            assert found.refusal.startswith((family.__name__, found.head))
            assert unordered(found.tokens) in found.refusal.replace("ordered ", "")


def unordered(tokens: TokenSpec) -> str:
    """Return the tokens as heads name them, to which it makes no difference."""
    return str(replace(tokens, ordered=False))


def test_everything_exported_takes_part():
    names = {found.tokenizer.partition(",")[0] for found in works()}
    assert names == {kind.__name__ for kind in exported(Tokenizer)}
    assert {found.generator for found in works()} == {kind.__name__ for kind in exported(Generator)}
    assert {found.head for found in works()} >= {kind.__name__ for kind in exported(Head)}
    assert {Order(found.plan).name for found in works()} == set(ORDERS)
    made = {found.tokens for _, found in tokenizers() if found.tokens}
    assert {tokens.kind for tokens in made} == set(get_args(Kind))


def test_the_page_is_current():
    current = "python tests/product.py --output docs/pairs.md"
    assert PAGE.read_text(encoding="utf-8") == page(), f"docs/pairs.md is of another day: {current}"

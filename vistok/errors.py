"""Errors are part of the interface: one line says what is wrong, where, and what would be right."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in the input. The commands print it as one line and exit with code 2."""


class IncompatibleTokensError(UserError):
    """A tokenizer and a generator that cannot work together."""


class CheckpointError(UserError):
    """A saved model that is missing, broken, or of another kind."""


def suggestion(name: str, choices: Iterable[str]) -> str:
    """Return `" (did you mean 'x'?)"` for the choice nearest to `name`, or an empty string."""
    nearest = difflib.get_close_matches(name, list(choices), n=1)
    return f" (did you mean '{nearest[0]}'?)" if nearest else ""

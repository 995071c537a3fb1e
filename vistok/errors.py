"""Errors are part of the interface: one line says what is wrong, where, and what would be right."""

import difflib
import re
import sys
from collections.abc import Iterable
from typing import NoReturn


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


def fail(message: str) -> NoReturn:
    """End the program with a mistake in its input: one line, exit code 2."""
    print("error:", re.sub(r"\s*\n\s*", " ", message.strip()), file=sys.stderr)
    sys.exit(2)

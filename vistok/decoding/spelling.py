"""How schedules and orders are spelt in configs and on the command line: `name(1,2)`."""

import re
from collections.abc import Iterable

from vistok.errors import UserError, suggestion


def read_call(text: str, what: str, names: Iterable[str]) -> tuple[str, list[str]]:
    """Split `name(a,b)` into its name and arguments; a bare name has none. Raises `UserError`,
    which calls the thing `what`, for another form or a name that is not among `names`."""
    match = re.fullmatch(r"\s*([a-z][a-z_0-9]*)\s*(?:\(([^()]*)\))?\s*", text)
    if not match:
        raise UserError(f"{what} '{text}' has not the form 'name' or 'name(1,2)'")
    name, inside = match.groups()
    if name not in names:
        raise UserError(
            f"{what} '{text}': {name} is none of {', '.join(names)}{suggestion(name, names)}"
        )
    return name, [part.strip() for part in inside.split(",")] if inside else []

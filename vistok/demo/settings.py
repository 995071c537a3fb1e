"""What the fields of the page say as settings of decoding, and settings as the fields show them."""

from collections.abc import Mapping

from vistok.decoding import Corrected, Decoding, Order, Schedule
from vistok.errors import UserError
from vistok.generators import Generator

TYPES = {
    "plan": Order,
    "guidance": Schedule,
    "temperature": Schedule,
    "top_k": Corrected,
    "steps": Schedule,
}

# What stands for a family of orders in the list, by its spelling in `Generator.orders`.
FAMILIES = {
    "mar(steps)": ("mar(8)", "mar(16)", "mar(32)"),
    "maskgit(steps,schedule)": ("maskgit(4)", "maskgit(16)", "maskgit(8,cosine)"),
    "random(seed)": ("random(0)", "random(1)"),
    "next_scale(corrections)": ("next_scale(1)", "next_scale(2)"),
}


def read_settings(decoding: Decoding, fields: Mapping[str, str | None]) -> Decoding:
    """Return settings with those changed whose fields are not empty; raise `UserError` for a
    spelling that is wrong."""
    texts = {name: str(text or "").strip() for name, text in fields.items()}
    return decoding.changed(**{name: TYPES[name](text) for name, text in texts.items() if text})


def spelt(setting: Schedule | Corrected | None) -> str:
    """Return a schedule as one would write it; nothing for that of the head itself."""
    if setting is None:
        return ""
    if isinstance(setting, Corrected):
        return "/".join(spelt(schedule) for schedule in setting.schedules)
    return f"{setting.numbers[0]:g}" if setting.form == "constant" else str(setting)


def plan_choices(generator: Generator, own: Order | None = None) -> list[str]:
    """Return orders that fit, the checkpoint's `own` first, with some of each family."""
    choices = [] if own is None else [str(own)]
    for order in generator.orders:
        if order == "zipar(s)":
            width = generator.spec.shape[1]
            windows = [window for window in (width // 2, width // 4, 1) if window]
            choices += [f"zipar({window})" for window in windows]
            choices.append(f"zipar({windows[0]},adaptive)")
        else:
            choices += FAMILIES.get(order, (order,))
    return list(dict.fromkeys(choices))


def whole(value: float | None, name: str, least: int, most: int) -> int:
    """Return the number of a field; raise `UserError` unless it is whole and between the two."""
    if value is None or value != int(value) or not least <= value <= most:
        raise UserError(f"{name} {'is empty' if value is None else value}: {least} to {most} fit")
    return int(value)

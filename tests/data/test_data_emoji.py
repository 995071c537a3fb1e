from collections import Counter, defaultdict

import pytest

from vistok.data import Emoji
from vistok.data.emoji import CATEGORIES, base_of, describe
from vistok.errors import UserError


@pytest.fixture(scope="module")
def everything() -> Emoji:
    return Emoji("all")


def test_the_set_is_whole(everything):
    assert len(everything) == 4009
    counts = Counter(everything.labels().tolist())
    assert everything.class_names == CATEGORIES and everything.num_classes == 9
    assert sorted(counts) == list(range(9)) and min(counts.values()) >= 80
    assert all(caption == caption.lower() and caption for caption in everything.captions)


def test_the_split_covers_all_once_and_keeps_variants_together(everything):
    train, held_out = Emoji("train"), Emoji("held-out")
    assert sorted(train.keys + held_out.keys) == everything.keys
    assert not {base_of(k) for k in train.keys} & {base_of(k) for k in held_out.keys}
    totals = Counter(everything.labels().tolist())
    for label, count in Counter(held_out.labels().tolist()).items():
        assert 0.08 < count / totals[label] < 0.12


def test_equal_pictures_share_a_base(everything):
    bases = defaultdict(set)
    for index, key in enumerate(everything.keys):
        bases[everything[index].image.tobytes()].add(base_of(key))
    assert len(bases) < len(everything)
    assert all(len(names) == 1 for names in bases.values())


@pytest.mark.parametrize(
    ("variant", "other"),
    [
        ("1f44d", "1f44d-1f3ff"),  # skin tone
        ("1f468-200d-1f33e", "1f469-1f3fd-200d-1f33e"),  # man and woman of one trade
        ("1f3c3-200d-2640-fe0f", "1f3c3-1f3fb-200d-2642-fe0f-200d-27a1-fe0f"),  # direction
        ("1f469", "1f9d1-200d-1f9b0"),  # hair
        ("1f408", "1f408-200d-2b1b"),  # colour
        ("1f46d", "1f9d1-1f3fb-200d-1f91d-200d-1f9d1-1f3ff"),  # couples
        ("1f385-1f3fb", "1f936"),
        ("1f1fa-1f1f8", "1f1fa-1f1f2"),  # one design, two territories
    ],
)
def test_variants_have_one_base(variant, other):
    assert base_of(variant) == base_of(other)


@pytest.mark.parametrize(
    ("key", "other"),
    [
        ("1f1e9-1f1ea", "1f1eb-1f1f7"),  # two flags
        ("1f9d1-200d-1f33e", "1f9d1-200d-1f373"),  # two trades
        ("1f3f3-fe0f", "1f3f3-fe0f-200d-1f308"),
        ("1f3fb", "1f3ff"),  # swatches
    ],
)
def test_different_emoji_have_different_bases(key, other):
    assert base_of(key) != base_of(other)


@pytest.mark.parametrize(
    ("key", "caption", "category"),
    [
        ("1f9d1-1f3fd-200d-1f33e", "farmer, medium skin tone", "People & Body"),
        ("1fa89", "harp", "Objects"),
        ("1f1e6", "regional indicator symbol letter a", "Symbols"),
        ("23-20e3", "hash key", "Symbols"),
        (
            "1f468-1f3fb-200d-1f430-200d-1f468-1f3ff",
            "people with bunny ears, light skin tone and dark skin tone",
            "People & Body",
        ),
    ],
)
def test_captions_and_categories(key, caption, category):
    assert describe(key) == (caption, category)


def test_backgrounds():
    white, alpha = Emoji("held-out")[0], Emoji("held-out", background="alpha")[0]
    assert (white.image.mode, alpha.image.mode) == ("RGB", "RGBA")
    assert alpha.image.getpixel((0, 0))[3] == 0
    assert white.image.getpixel((0, 0)) == (255, 255, 255)
    assert white.key == alpha.key


def test_wrong_arguments():
    with pytest.raises(UserError, match="'validation' is none of train, held-out, all"):
        Emoji(split="validation")
    with pytest.raises(UserError, match="'black' is none of white, alpha"):
        Emoji(background="black")

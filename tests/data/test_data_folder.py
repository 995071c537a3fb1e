import os
import shutil

import pytest
from PIL import Image

from vistok.data import ImageFolder
from vistok.data.sources import BrokenSampleError
from vistok.errors import UserError

KEYS = ["a/0.png", "a/1.jpg", "a/deeper/2.PNG", "b/3.webp", "b/4.png"]


def keys(source: ImageFolder) -> list[str]:
    return [source[i].key for i in range(len(source))]


def test_directories_are_classes(folder):
    (folder / "a" / "notes.txt").write_text("no picture")
    (folder / "a" / ".hidden.png").write_bytes(b"")
    source = ImageFolder(folder)
    assert source.class_names == ("a", "b")
    assert keys(source) == KEYS
    assert source.labels().tolist() == [0, 0, 0, 1, 1]
    assert [source[i].label for i in range(5)] == [0, 0, 0, 1, 1]
    assert source[3].caption == "b" and source[3].image.size == (20, 16)
    assert source[-1].key == "b/4.png"
    with pytest.raises(IndexError):
        source[5]


def test_pictures_without_classes_are_one_class(folder):
    source = ImageFolder(folder / "b")
    assert source.class_names == ("b",)
    assert keys(source) == ["3.webp", "4.png"]
    assert source.labels().tolist() == [0, 0]


def test_the_index_is_read_while_it_is_current(folder, monkeypatch):
    first = keys(ImageFolder(folder))
    with monkeypatch.context() as patch:
        patch.setattr(ImageFolder, "_walk", None)
        assert keys(ImageFolder(folder)) == first
    shutil.copy(folder / "b" / "4.png", folder / "b" / "5.png")
    assert keys(ImageFolder(folder)) == [*first, "b/5.png"]
    (folder / "a" / "deeper" / "2.PNG").unlink()
    assert len(ImageFolder(folder)) == 5
    shutil.copytree(folder / "b", folder / "aa")
    assert ImageFolder(folder).class_names == ("a", "aa", "b")
    shutil.rmtree(folder / "aa")
    assert ImageFolder(folder).class_names == ("a", "b")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        "[1]",
        "\x00",
        '{"format": 99, "directories": {}}',
        '{"format": 1, "directories": {}}',
        '{"format": 1, "directories": ["."]}',
        '{"format": 1, "directories": {".": 7}}',
    ],
)
def test_a_foreign_index_is_replaced(folder, content):
    ImageFolder(folder)
    (index,) = folder.parent.glob(".pictures.index.json")
    index.write_text(content)
    assert keys(ImageFolder(folder)) == KEYS
    assert '"format": 1' in index.read_text()


def test_indices_in_a_directory_of_their_own(folder, tmp_path):
    place = tmp_path / "indices" / "here"
    ImageFolder(folder, index=place)
    ImageFolder(folder / "a", index=place)
    assert len(list(place.iterdir())) == 2
    assert not list(folder.parent.glob(".*"))


def test_an_index_that_cannot_be_written_is_done_without(folder, caplog):
    caplog.set_level("INFO")
    blocked = folder / "a" / "0.png" / "below-a-file"
    assert keys(ImageFolder(folder, index=blocked)) == KEYS
    assert "index kept in memory only" in caplog.text


def test_what_has_no_picture_is_an_error(tmp_path):
    with pytest.raises(UserError, match="nowhere: does not exist"):
        ImageFolder(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: is not a directory"):
        ImageFolder(tmp_path / "file")
    (tmp_path / "empty" / "class").mkdir(parents=True)
    with pytest.raises(UserError, match="no picture"):
        ImageFolder(tmp_path / "empty")


def test_an_empty_class_keeps_its_number(folder, caplog):
    (folder / "aa").mkdir()
    Image.new("RGB", (4, 4)).save(folder / "grid.png")
    source = ImageFolder(folder)
    assert source.class_names == ("a", "aa", "b")
    assert source.labels().tolist() == [0, 0, 0, 2, 2]
    assert "classes without pictures: aa" in caplog.text
    assert "1 pictures beside the classes" in caplog.text


def test_links_are_followed_but_not_in_circles(folder, caplog):
    (folder / "c").symlink_to(folder / "b", target_is_directory=True)
    (folder / "b" / "up").symlink_to(folder, target_is_directory=True)
    source = ImageFolder(folder)
    assert source.class_names == ("a", "b", "c")
    assert [key for key in keys(source) if key.startswith("c")] == ["c/3.webp", "c/4.png"]
    assert "not followed" in caplog.text


def test_strange_names(folder):
    shutil.copy(folder / "b" / "4.png", folder / "b" / ("é" * 100 + ".png"))
    (folder / "b" / "directory.jpg").mkdir()
    undecodable = os.fsencode(folder / "b") + b"/\xff\xfe.png"
    shutil.copy(folder / "b" / "4.png", undecodable)
    for _ in range(2):  # listed, then from the index
        source = ImageFolder(folder)
        assert len(source) == 7 and all(source[i].image for i in range(7))


def test_every_broken_file_is_named(faulty_folder, broken_names):
    source = ImageFolder(faulty_folder)
    errors = {}
    for index in range(len(source)):
        try:
            source[index]
        except BrokenSampleError as error:
            errors[str(error).split(":")[0].split("/")[-1]] = str(error)
    assert set(errors) == broken_names
    assert all("\n" not in message and len(message) < 400 for message in errors.values())
    assert "not a picture of a known format" in errors["page.jpg"]
    assert "not a picture of a known format" in errors["postscript.png"]
    assert "9000 x 9000 is more than" in errors["large.png"]
    assert "20000 x 1 is longer than" in errors["strip.png"]
    assert "32-bit" in errors["float.tiff"]

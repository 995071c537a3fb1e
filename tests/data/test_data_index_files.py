"""Index files are written by every process that finds none, at the same time."""

import threading

import pytest

from vistok.data import ImageFolder
from vistok.files import replaced


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "file"
    with replaced(path) as first:
        first.write_text("first")
        with replaced(path) as second:
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_failed_writer_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(RuntimeError), replaced(path) as aside:
        aside.write_text("half")
        raise RuntimeError
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_processes_that_index_one_folder_together(folder, caplog):
    caplog.set_level("INFO")
    start, lengths = threading.Barrier(8), []

    def open_folder():
        start.wait()
        lengths.append(len(ImageFolder(folder)))

    threads = [threading.Thread(target=open_folder) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lengths == [5] * 8
    assert "kept in memory" not in caplog.text

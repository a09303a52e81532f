"""Publishing: the old state or the new one, and nothing left behind."""

import pytest

from remix_cli.errors import BusyError, StorageError
from remix_cli.storage import lock_folder, publish_folder, write_text


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_failure_while_filling_leaves_the_old_folder_and_no_scratch(tmp_path):
    target = tmp_path / "out"
    with publish_folder(target) as scratch:
        (scratch / "a").write_text("old")

    def fail():
        with publish_folder(target) as scratch:
            (scratch / "a").write_text("new")
            assert (target / "a").read_text() == "old"
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (target / "a").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_publishing_replaces_the_whole_folder(tmp_path):
    target = tmp_path / "out"
    for content in ("a", "b"):
        with publish_folder(target) as scratch:
            (scratch / content).write_text(content)
    assert names(target) == ["b"]
    assert names(tmp_path) == ["out"]


def test_text_is_replaced_by_a_rename_so_that_an_open_reader_keeps_the_old_file(tmp_path):
    path = tmp_path / "f.txt"
    write_text(path, "old")
    with path.open() as reader:
        write_text(path, "new")
        assert reader.read() == "old"
    assert path.read_text() == "new"
    assert names(tmp_path) == ["f.txt"]


def test_an_output_below_a_file_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="cannot write"), publish_folder(tmp_path / "file" / "out"):
        pass
    with pytest.raises(StorageError):
        write_text(tmp_path / "file" / "x.txt", "text")
    with pytest.raises(StorageError), lock_folder(tmp_path / "file"):
        pass


def test_the_lock_is_free_again_after_its_holder(tmp_path):
    with lock_folder(tmp_path), pytest.raises(BusyError), lock_folder(tmp_path):
        pass
    with lock_folder(tmp_path):
        pass

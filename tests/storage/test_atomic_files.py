"""Files are written whole or not at all."""

import pytest

from hesscurv.storage.atomic_files import write_atomically


def test_a_failed_write_leaves_the_old_file_and_no_part(tmp_path):
    path = tmp_path / "result"
    write_atomically(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half of the new")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["result"]


def test_a_written_file_replaces_the_old_one(tmp_path):
    path = tmp_path / "result"
    for content in (b"old", b"new"):
        write_atomically(path, lambda file, content=content: file.write(content))
    assert path.read_bytes() == b"new"


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="existing folder"):
        write_atomically(tmp_path / "none" / "result", lambda file: None)

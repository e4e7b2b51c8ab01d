"""Files are written whole or not at all, through links, with their mode, and to devices."""

import errno
import os
import resource
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from support.forks import run_source

from hesscurv.storage.atomic_files import create_atomically, write_atomically
from hesscurv.storage.destinations import as_file_name, follow_links, require_regular_file
from hesscurv.storage.mapped_files import DiskFullError


def write(path, content=b"new"):
    write_atomically(path, lambda file: file.write(content))


def mode_of(path):
    return stat.S_IMODE(os.stat(path).st_mode)


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


def test_a_link_stays_a_link_and_what_it_names_is_written(tmp_path):
    (tmp_path / "runs").mkdir()
    target, link, second = (tmp_path / name for name in ("runs/a", "latest", "runs/second"))
    target.write_bytes(b"old")
    link.symlink_to("runs/second")  # relative, and a link to a link
    second.symlink_to("a")
    write(link)
    assert link.is_symlink()
    assert second.is_symlink()
    assert target.read_bytes() == b"new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "runs"]
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["a", "second"]


def test_a_link_to_nothing_makes_what_it_names(tmp_path):
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "new")
    write(link)
    assert link.is_symlink()
    assert (tmp_path / "new").read_bytes() == b"new"
    link.unlink()
    link.symlink_to(tmp_path / "none" / "new")
    with pytest.raises(FileNotFoundError, match="existing folder"):
        write(link)


def test_links_in_a_circle_are_an_error(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(OSError, match="a") as raised:
        write(tmp_path / "a")
    assert raised.value.errno == errno.ELOOP


def test_all_names_of_a_file_show_the_new_content(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for old in (b"long, and to be cut" * 1000, b"s"):
        one.write_bytes(old)
        two.unlink(missing_ok=True)
        os.link(one, two)
        write(one, b"new" * 100)
        assert two.read_bytes() == b"new" * 100
        assert os.path.samefile(one, two)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o755])
def test_a_file_keeps_its_mode(tmp_path, mode):
    path = tmp_path / "result"
    path.write_bytes(b"old")
    path.chmod(mode)
    write(path)
    assert mode_of(path) == mode


def test_a_file_that_few_may_read_is_never_open_to_more(tmp_path):
    path, seen = tmp_path / "secret", []
    path.write_bytes(b"old")
    path.chmod(0o600)
    write_atomically(path, lambda _: seen.extend(map(mode_of, tmp_path.iterdir())))
    assert seen == [0o600, 0o600]


def test_a_new_file_follows_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write(tmp_path / "result")
    finally:
        os.umask(before)
    assert mode_of(tmp_path / "result") == 0o640


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root gives away")
def test_a_file_keeps_its_owner(tmp_path):
    path = tmp_path / "result"
    path.write_bytes(b"old")
    os.chown(path, 1234, 2345)
    write(path)
    assert (path.stat().st_uid, path.stat().st_gid) == (1234, 2345)


def test_an_owner_that_cannot_be_kept_is_no_error(tmp_path, monkeypatch):
    path = tmp_path / "result"
    path.write_bytes(b"old")
    path.chmod(0o4755)
    made = os.stat(path)

    def refuse(*_):
        raise PermissionError(errno.EPERM, "not permitted")

    monkeypatch.setattr(os, "fchown", refuse)
    real = os.fstat

    def of_somebody_else(handle):
        values = list(real(handle))
        values[4] = made.st_uid + 1
        return os.stat_result(values)

    monkeypatch.setattr(os, "fstat", of_somebody_else)
    write(path)
    assert path.read_bytes() == b"new"
    assert mode_of(path) == 0o755  # it must not run as its new owner


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(IsADirectoryError, match="got the folder"):
        write(tmp_path)


def test_a_file_that_must_not_be_written_is_left(tmp_path, monkeypatch):
    path = tmp_path / "result"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "access", lambda *_, **__: False)  # root may write to anything
    with pytest.raises(PermissionError, match="may be written to"):
        write(path)
    assert path.read_bytes() == b"old"


def test_a_folder_that_takes_no_files_is_named(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EACCES, "denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(PermissionError, match=f"{tmp_path.name}.*stays whole.*another folder"):
        write(tmp_path / "result")


def test_a_device_is_written_to():
    write(os.devnull)
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_device_that_is_full_is_an_error():
    with pytest.raises(DiskFullError, match="No space left"):
        write("/dev/full")
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


def test_a_fifo_is_written_to(tmp_path):
    path, got = tmp_path / "pipe", []
    os.mkfifo(path)
    reader = threading.Thread(target=lambda: got.append(path.read_bytes()))
    reader.start()
    write(path, b"x" * 200_000)
    reader.join(10)
    assert got == [b"x" * 200_000]
    assert stat.S_ISFIFO(path.stat().st_mode)


PRINT = """
import sys
from hesscurv.storage.atomic_files import write_atomically
print("before", flush=True)
write_atomically("/dev/stdout", lambda file: file.write(b"content\\n"))
print("after")
"""


@pytest.mark.skipif(not os.path.exists("/dev/stdout"), reason="needs /dev/stdout")
def test_standard_output_is_written_to_where_it_stands(tmp_path):
    expected = "before\ncontent\nafter\n"
    assert run_source(PRINT, cwd=tmp_path) == expected  # a file
    piped = subprocess.run(
        [sys.executable, "-c", PRINT],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        check=True,
        text=True,
    )
    assert piped.stdout == expected
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("links", [1, 2])
def test_a_full_disk_leaves_the_old_file(tmp_path, links):
    path = tmp_path / "result"
    write(path, b"old")
    if links == 2:
        os.link(path, tmp_path / "twin")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(DiskFullError, match="was not written and what was there before"):
            write(path, bytes(300_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == links


def test_no_room_for_the_copy_leaves_a_file_of_two_names(tmp_path, monkeypatch):
    path, twin = tmp_path / "one", tmp_path / "two"
    path.write_bytes(b"old")
    os.link(path, twin)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DiskFullError):
        write(path, b"longer than before")
    assert twin.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_file_that_cannot_be_replaced_is_rewritten(tmp_path, monkeypatch):
    def busy(*_):
        raise OSError(errno.EBUSY, "Device or resource busy")  # of a file mounted by itself

    path = tmp_path / "result"
    path.write_bytes(b"old and long")
    monkeypatch.setattr(os, "replace", busy)
    write(path)
    assert path.read_bytes() == b"new"
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(OSError, match="busy"):
        write(tmp_path / "other")


def test_the_longest_name_there_is(tmp_path):
    for name in ("n" * 255, "名" * 85):
        write(tmp_path / name)
        assert (tmp_path / name).read_bytes() == b"new"
    with pytest.raises(OSError, match="too long"):
        write(tmp_path / ("n" * 256))


def test_writers_at_once_leave_one_whole_file(tmp_path):
    path = tmp_path / "result"
    contents = [bytes([i]) * 100_000 for i in range(8)]
    threads = [threading.Thread(target=write, args=(path, content)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in contents
    assert [p.name for p in tmp_path.iterdir()] == ["result"]


def test_creating_keeps_what_is_there_also_behind_a_link(tmp_path):
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "first")
    create_atomically(link, b"first")
    create_atomically(link, b"second")
    assert (tmp_path / "first").read_bytes() == b"first"
    assert link.is_symlink()


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path(os.devnull)):
        with pytest.raises(ValueError, match="got a device, FIFO or socket"):
            require_regular_file(path, "a table")
    with pytest.raises(IsADirectoryError, match="expected a table, got the folder"):
        require_regular_file(tmp_path, "a table")
    with pytest.raises(FileNotFoundError, match="expected a table, found none"):
        require_regular_file(tmp_path / "none", "a table")


def test_names_of_open_files_are_not_followed():
    assert follow_links("/dev/fd/0") == Path("/dev/fd/0")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("curvature", "curvature"),
        ("a/b", "a-b"),
        ("../up", "-up"),
        ("..", "-"),
        ("", "-"),
        ("a\0\nb:c", "a--b-c"),
        ("层 $x", "层 $x"),
        ("é" * 300, "é" * 100),
    ],
)
def test_any_name_gives_a_files_name(name, expected):
    assert as_file_name(name) == expected

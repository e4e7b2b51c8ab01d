"""A stored file is read as it was written, or refused: damaged, cut short, foreign, too large."""

import hashlib
import io
import json
import os
import struct
import zipfile
from collections import OrderedDict, namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch

from hesscurv.storage.checked_archives import read_archive, write_archive
from hesscurv.storage.checked_files import read_checked, write_checked
from hesscurv.storage.json_files import read_json, write_json
from hesscurv.storage.tensor_archives import as_plain, load_archive, save_archive

DATA = {"a": torch.arange(6.0).view(2, 3), "b": [1, 2.5, None, "text"], "c": {"d": True}}
PLAIN = {"way": "batched", "seconds": {"1": 0.25}}


def read_whole_archive(path):
    data, lost = read_archive(path, "a file of tensors")
    if lost:
        raise ValueError(f"{path}: its checksum is missing")
    return data


KINDS = {
    "archive": (lambda path: write_archive(path, DATA), read_whole_archive),
    "checked": (lambda path: write_checked(path, DATA), read_checked),
    "json": (lambda path: write_json(path, PLAIN), read_json),
}


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return a == b


@pytest.fixture(params=KINDS)
def stored(request, tmp_path):
    write, read = KINDS[request.param]
    path = tmp_path / "file"
    write(path)
    return path, read


def refused_or_same(path, read, content, expected):
    """Whether a changed file was refused; if it was not, what it holds is what was written."""
    path.write_bytes(content)
    try:
        found = read(path)
    except ValueError:
        return True
    assert same(found, expected)
    return False


def test_what_was_written_is_read(stored):
    path, read = stored
    assert same(read(path), PLAIN if read is read_json else DATA)


@pytest.mark.parametrize("bit", [0x01, 0x40])
def test_a_flip_of_any_byte_is_found(stored, bit):
    path, read = stored
    content, expected = path.read_bytes(), read(path)
    let_through = 0
    for at in range(0, len(content), 1 if len(content) < 1000 else 3):
        changed = bytearray(content)
        changed[at] ^= bit
        let_through += not refused_or_same(path, read, bytes(changed), expected)
    assert let_through == 0 or read is read_json  # where a flip may hit the space after a comma


def test_a_cut_at_any_length_is_found(stored):
    path, read = stored
    content = path.read_bytes()
    for length in range(0, len(content), 5):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=str(path)):
            read(path)
    path.write_bytes(content + b"more")
    with pytest.raises(ValueError, match=str(path)):
        read(path)


FOREIGN = {
    "nothing": b"",
    "text": b"hello\nworld\n",
    "zeros": bytes(10_000),
    "noise": hashlib.sha256(b"noise").digest() * 40,
    "zip": b"PK\x05\x06" + bytes(18),
    "pickle": b"\x80\x04\x95",
    "list": b"[1, 2]",
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_file_is_refused(stored, name):
    path, read = stored
    path.write_bytes(FOREIGN[name])
    with pytest.raises(ValueError, match=str(path)):
        read(path)


def test_what_is_no_file_is_refused(stored, tmp_path):
    _, read = stored
    os.mkfifo(tmp_path / "pipe")  # it would wait for a writer
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(ValueError, match="device, FIFO or socket"):
            read(path)
    with pytest.raises(IsADirectoryError):
        read(tmp_path)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none")


def test_torch_reads_a_checked_archive_too(tmp_path):
    write_archive(tmp_path / "file", DATA)
    assert same(torch.load(tmp_path / "file", weights_only=True)["a"], DATA["a"])
    with zipfile.ZipFile(tmp_path / "file") as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"hesscurv sha256 ")


def test_an_archive_of_torch_has_each_part_compared(tmp_path):
    torch.save(DATA, tmp_path / "file")
    content = (tmp_path / "file").read_bytes()
    assert same(read_whole_archive(tmp_path / "file"), DATA)
    at = content.index(DATA["a"].numpy().tobytes())
    changed = bytearray(content)
    changed[at + 5] ^= 1
    (tmp_path / "file").write_bytes(changed)
    with pytest.raises(ValueError, match="Bad CRC-32"):
        read_whole_archive(tmp_path / "file")


def test_a_lost_checksum_is_told(tmp_path):
    write_archive(tmp_path / "file", DATA)
    content = (tmp_path / "file").read_bytes()
    (tmp_path / "file").write_bytes(content[:-80] + bytes(80))
    assert read_archive(tmp_path / "file", "a file")[1]


def forged(data):
    """An archive of ours in all but what it holds."""
    buffer = io.BytesIO()
    torch.save(data, buffer)
    return buffer.getvalue()


def test_a_tensor_that_the_file_cannot_hold_is_refused():
    small = torch.zeros(1)
    for tensor in (small.expand(10**12), small.as_strided((10**9, 10**9), (0, 0))):
        content = forged({"a": tensor})
        with pytest.raises(ValueError, match="cannot hold"):
            load_archive(io.BytesIO(content), len(content))


def test_a_part_that_claims_more_than_the_file_is_refused():
    content = bytearray(forged({"a": torch.ones(3)}))
    at = content.rindex(b"PK\x01\x02", 0, content.rindex(b"archive/data/0"))
    for size in (2**32 - 2, 2**31):
        content[at + 20 : at + 28] = struct.pack("<II", size, size)
        with pytest.raises(ValueError, match="larger than its"):
            load_archive(io.BytesIO(bytes(content)), len(content), compare_members=False)


def test_a_part_that_is_packed_is_refused():
    packed = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(forged({"a": torch.zeros(10**6)}))) as source,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(ValueError, match="larger than its"):
        load_archive(packed, packed.getbuffer().nbytes)


def test_numbers_of_numpy_become_pythons(tmp_path):
    given = {
        "f": np.float64(0.5),
        "g": np.float32(0.25),
        "i": np.int64(3),
        "b": np.bool_(True),
        "s": np.str_("name"),
        np.int32(4): OrderedDict(x=(1, np.int8(2))),
    }
    expected = {"f": 0.5, "g": 0.25, "i": 3, "b": True, "s": "name", 4: {"x": (1, 2)}}
    write_checked(tmp_path / "file", given)
    assert read_checked(tmp_path / "file") == expected
    pair = namedtuple("pair", "a b")(1, np.float64(2.0))
    assert type(as_plain(pair)) is tuple
    assert type(as_plain(np.float64(1.0))) is float


@pytest.mark.parametrize("value", [Path("x"), np.zeros(3), object(), np.longdouble(1), {1: [len]}])
def test_what_could_not_be_read_is_not_written(tmp_path, value):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    for write in (write_checked, write_archive):
        with pytest.raises(TypeError, match=r"as data\['info'\].*convert it"):
            write(path, {"info": value})
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_an_error_of_the_disk_comes_out_as_it_is():
    class Full(io.BytesIO):
        def write(self, data):
            if self.tell() + len(data) > 700:
                raise OSError(28, "No space left on device")
            return super().write(data)

    with pytest.raises(OSError, match="No space left"):  # and not torch's RuntimeError
        save_archive({"a": torch.zeros(1000)}, Full())


def test_json_keeps_plain_values(tmp_path):
    write_json(tmp_path / "file", {"seconds": {1: 0.1}, "t": (1, 2)})
    assert read_json(tmp_path / "file") == {"seconds": {"1": 0.1}, "t": [1, 2]}
    data = json.loads((tmp_path / "file").read_text())
    (tmp_path / "file").write_text(json.dumps({**data, "t": [1, 3]}))
    with pytest.raises(ValueError, match="checksum does not fit"):
        read_json(tmp_path / "file")

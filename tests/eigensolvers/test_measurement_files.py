"""Files of measurements that are damaged, foreign or cut off are found, and a full disk too."""

import json
import os
import re
import resource
import shutil
import time

import numpy as np
import pytest
import torch
from measured import assert_same, filled, whole
from planted import PlainOperator, indefinite, planted

from hesscurv import assemble, measure, missing


def test_a_flipped_byte_is_found_or_without_meaning(folder):
    H = planted(indefinite(30), 30)
    files = filled(H, folder, outer=10, inner=20, block_size=5)
    expected = assemble(folder)
    path, messages = files[0], []
    content = path.read_bytes()
    positions = range(0, len(content), 7)
    for position in positions:
        damaged = bytearray(content)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        try:
            pairs = assemble(folder)
        except ValueError as error:  # none of zipfile's or NumPy's own
            messages.append(str(error))
        else:
            assert_same(pairs, expected)
    for message in messages:
        assert re.search(r"0005\.npz (is damaged|holds other)", message)
        assert "delete it and run measure(H, 10," in message
    # Numbers are 2000 of 3100 bytes, and most of the rest is names and sizes.
    assert len(messages) > 0.8 * len(positions)
    # A run again measures the damaged chunk, and no other.
    path.write_bytes(content[:-1500] + b"?" + content[-1499:])
    before = H.num_matvecs
    assert filled(H, folder, outer=10, inner=20, block_size=5) == files
    assert H.num_matvecs == before + 5
    assert_same(assemble(folder), expected)


def test_a_cut_off_file_is_found_and_measured_again(folder):
    H = planted(indefinite(100), 100)
    path = filled(H, folder)[2]
    expected, content = assemble(folder), path.read_bytes()
    for length in (0, 1, 40, len(content) // 2, len(content) - 30, len(content) - 1):
        path.write_bytes(content[:length])
        assert missing(folder) == [(8, 12)]
        with pytest.raises(ValueError, match=r"0000012\.npz is damaged .* start=8, stop=12"):
            assemble(folder)
    before = H.num_matvecs
    measure(H, 10, folder, block_size=4)
    assert H.num_matvecs == before + 4
    assert_same(assemble(folder), expected)


def test_a_file_of_other_measurements_is_refused(folder):
    H = planted(indefinite(100), 100)
    files = filled(H, folder)
    others = filled(H, folder.with_name("other"), generator=torch.Generator().manual_seed(1))
    expected, before = assemble(folder), H.num_matvecs
    for source, target in [(others[3], files[3]), (files[4], files[3])]:
        kept = target.read_bytes()
        shutil.copy(source, target)
        for refused in (
            lambda: assemble(folder),
            lambda: missing(folder),
            lambda: measure(H, 10, folder, block_size=4),
        ):
            with pytest.raises(ValueError, match=r"0000016\.npz holds other measurements"):
                refused()
        assert target.read_bytes() == source.read_bytes()  # not ours to remove
        target.write_bytes(kept)
    assert H.num_matvecs == before
    assert_same(assemble(folder), expected)


def test_numbers_of_another_shape_or_dtype_are_refused(folder):
    path = filled(planted(indefinite(100), 100), folder)[2]
    with np.load(path, allow_pickle=False) as archive:
        arrays = dict(archive)
    for vectors in (arrays["vectors"].T.copy(), arrays["vectors"].view("<i8")):
        np.savez(path, **{**arrays, "vectors": vectors})
        with pytest.raises(ValueError, match=r"0000012\.npz is damaged \(expected vectors"):
            assemble(folder)


def test_a_disk_without_hard_links_will_do(folder, monkeypatch):
    def refuse(*_):
        raise PermissionError("operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    H = planted(indefinite(100), 100)
    filled(H, folder)
    assert (folder / "manifest.json").exists()
    assert len(list(folder.iterdir())) == 11  # with the 10 chunks
    assert_same(assemble(folder), whole(H, 10, block_size=4))


def test_a_manifest_that_is_damaged_or_changed_is_refused(folder):
    H = planted(indefinite(100), 100)
    filled(H, folder)
    path = folder / "manifest.json"
    text = path.read_text()
    data = json.loads(text)
    for content, message in [
        (text[:-10], "manifest.json is damaged; delete it"),
        ("[1]", "manifest.json is damaged; delete it"),
        (json.dumps({**data, "surplus": 1}), "manifest.json is damaged; delete it"),
        (json.dumps({**data, "format": "other"}), "manifest.json is damaged; delete it"),
        (json.dumps({**data, "version": 2}), "expected format version 1, got 2"),
        (json.dumps({**data, "psi_seed": 5}), "holds other measurements"),
    ]:
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            assemble(folder)
    # Without it nothing can be assembled; the same call writes it again, and the rest is there.
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"expected a folder with the manifest\.json"):
        assemble(folder)
    filled(H, folder)
    assert path.read_text() == text
    assert H.num_matvecs == 40


def test_a_plan_that_does_not_fit_on_the_disk_is_refused(folder, monkeypatch):
    H = planted(indefinite(100), 100)
    # 20 vectors of 100 doubles, 40 x 40 doubles, and up to 4096 bytes for each of 10 files.
    needed = 20 * 100 * 8 + 40 * 40 * 8 + 10 * 4096
    usage = shutil.disk_usage(folder.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    with pytest.raises(OSError, match=r"take 69\.8 KB .* and 69\.8 KB are free") as raised:
        measure(H, 10, folder, 0, 4, block_size=4)
    assert raised.value.errno == 28
    assert H.num_matvecs == 0
    assert not folder.exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
    assert measure(H, 10, folder, 0, 4, block_size=4) == [(4, 40)]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=50_000))
    with pytest.raises(OSError, match="are free"):  # less is missing now, but still too much
        measure(H, 10, folder, 4, 8, block_size=4)
    assert H.num_matvecs == 4
    used = sum(path.stat().st_size for path in folder.glob("*.npz"))
    assert used <= 4 * 100 * 8 + 4 * 40 * 8 + 4096


@pytest.mark.parametrize("limit", [100, 2500, 5400])  # in the first member, the last, the directory
def test_a_full_disk_leaves_whole_files(limit, folder):
    H = planted(indefinite(100), 100)
    measure(H, 10, folder, 0, 8, block_size=4)
    files = sorted(folder.iterdir())
    assert files[1].stat().st_size > 5400
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError, match=r"could not write measurements 8 to 12 .*run the same"):
            measure(H, 10, folder, block_size=4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(folder.iterdir()) == files
    assert missing(folder) == [(8, 40)]
    measure(H, 10, folder, block_size=4)
    assert_same(assemble(folder), whole(H, 10, block_size=4))


def test_leftovers_of_killed_jobs_are_ignored_and_removed_when_old(folder):
    H = planted(indefinite(100), 100)
    measure(H, 10, folder, 0, 4, block_size=4)
    old, new = (folder / f".measurements_0000004_0000008.npz.{name}" for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"half of a file")
    os.utime(old, (time.time() - 4000,) * 2)
    assert missing(folder) == [(4, 40)]
    measure(H, 10, folder, block_size=4)
    assert not old.exists()
    assert new.exists()  # its job may still be writing
    os.utime(new, (time.time() - 4000,) * 2)
    assemble(folder)
    assert not new.exists()


def test_products_that_are_not_finite_are_not_written(folder):
    matrix = torch.eye(30, dtype=torch.float64)
    matrix[3, 3] = float("nan")
    with pytest.raises(ValueError, match="have NaN or inf"):
        measure(PlainOperator(matrix), 3, folder)
    assert list(folder.glob("*.npz")) == []


def rewritten(folder, **changes):
    """Change a manifest as one that has no checksum, from before there was one."""
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    data.pop("checksum", None)
    path.write_text(json.dumps({**data, **changes}))


@pytest.mark.parametrize(
    "changes",
    [
        {"dim": 10**18},
        {"dim": -100},
        {"inner": 10**12, "dim": 10**13},
        {"outer": 10**9},
        {"outer": 0},
        {"k": -1},
        {"k": 1.5},
        {"k": True},
        {"chunk": 0},
        {"chunk": -4},
        {"seed": "0"},
        {"dtype": "torch.int8"},
        {"dtype": ["torch.float64"]},
        {"measurements": "others"},
        {"measurements": {}},
        {"operator": 3},
        {"layout": {"names": ["w"], "shapes": [[10**9]]}},
        {"layout": {"names": ["w"]}},
        {"layout": 7},
    ],
)
def test_sizes_that_cannot_be_are_refused_unread(folder, changes):
    filled(planted(indefinite(100), 100), folder)
    rewritten(folder, **changes)
    for refused in (lambda: assemble(folder), lambda: missing(folder)):
        with pytest.raises(ValueError, match=r"manifest\.json is damaged; delete it"):
            refused()


def test_sizes_that_the_files_cannot_hold_take_no_memory(folder):
    filled(planted(indefinite(100), 100), folder)
    rewritten(folder, dim=2**52)
    with pytest.raises(ValueError, match=r"expected at least 1\.44e\+05 TB, got .*delete it"):
        assemble(folder)


def test_a_folder_from_before_there_was_a_checksum_is_assembled(folder):
    filled(planted(indefinite(100), 100), folder)
    expected = assemble(folder)
    rewritten(folder)
    assert_same(assemble(folder), expected)


def test_a_flip_of_any_byte_of_the_manifest_is_found(folder):
    filled(planted(indefinite(100), 100), folder)
    path, expected = folder / "manifest.json", assemble(folder)
    content = path.read_bytes()
    for at in range(0, len(content), 2):
        changed = bytearray(content)
        changed[at] ^= 0x01  # makes no white space of white space
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=r"manifest\.json"):
            assemble(folder)
    path.write_bytes(content)
    assert_same(assemble(folder), expected)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[" * 10**5, b"null", b"{}", bytes(99)])
def test_a_foreign_manifest_is_refused(folder, content):
    filled(planted(indefinite(100), 100), folder)
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"manifest\.json is damaged; delete it"):
        assemble(folder)


def test_a_flip_of_any_byte_of_a_chunk_is_found_or_changes_nothing(folder):
    path = filled(planted(indefinite(100), 100), folder)[1]
    expected, content, refused = assemble(folder), path.read_bytes(), 0
    for at in range(0, len(content), 29):
        changed = bytearray(content)
        changed[at] ^= 0x40
        path.write_bytes(changed)
        try:
            found = assemble(folder)
        except ValueError:
            refused += 1
        else:  # a time, say
            assert_same(found, expected)
    assert refused > 0.9 * len(content) / 29

"""Eigenpairs: consistent, truncated, saved and loaded without pickle and without half files."""

import os
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

import hesscurv
from hesscurv import Eigenpairs
from hesscurv.operators import ParameterLayout


def make(k=3, dim=6, **kwargs):
    g = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(dim, k, generator=g)).Q
    return Eigenpairs(
        eigenvalues=torch.arange(k, 0, -1.0),
        eigenvectors=Q,
        residuals=torch.full((k,), 1e-3),
        converged=torch.ones(k, dtype=torch.bool),
        num_matvecs=17,
        method="block_krylov",
        **kwargs,
    )


LAYOUT = ParameterLayout(("a.weight", "a.bias"), ((2, 2), (2,)))


def test_saved_pairs_come_back_bit_for_bit(tmp_path):
    pairs = make(layout=LAYOUT, info={"tol": 1e-3, "block_size": 4})
    pairs.save(tmp_path / "pairs.pt")
    back = Eigenpairs.load(tmp_path / "pairs.pt")
    for name in ("eigenvalues", "eigenvectors", "residuals", "converged"):
        assert torch.equal(getattr(pairs, name), getattr(back, name))
    assert (back.num_matvecs, back.method, back.layout, back.info) == (
        17,
        "block_krylov",
        LAYOUT,
        {"tol": 1e-3, "block_size": 4},
    )


def test_solved_pairs_come_back_bit_for_bit(tmp_path):
    pairs = hesscurv.eigsh(torch.diag(torch.linspace(3, 0, 50)), 4)
    pairs.save(tmp_path / "pairs.pt")
    back = Eigenpairs.load(str(tmp_path / "pairs.pt"))
    assert torch.equal(pairs.eigenvectors, back.eigenvectors)
    assert back.info == pairs.info


def test_a_truncated_views_file_holds_its_own_pairs_alone(tmp_path):
    pairs = make(k=4, dim=20_000)
    pairs.truncate(1).save(tmp_path / "one.pt")
    pairs.save(tmp_path / "four.pt")
    assert os.path.getsize(tmp_path / "one.pt") < 0.3 * os.path.getsize(tmp_path / "four.pt")


def test_the_file_is_readable_with_weights_only(tmp_path):
    make(layout=LAYOUT).save(tmp_path / "pairs.pt")
    assert "eigenvalues" in torch.load(tmp_path / "pairs.pt", weights_only=True)


def test_a_failed_save_keeps_the_old_file_and_leaves_no_part(tmp_path, monkeypatch):
    path = tmp_path / "pairs.pt"
    make(k=2).save(path)
    before = path.read_bytes()

    def full(data, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        make(k=3).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["pairs.pt"]


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="existing folder"):
        make().save(tmp_path / "none" / "pairs.pt")


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Eigenpairs.save"):
        Eigenpairs.load(tmp_path / "pairs.pt")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_cut_off_file_is_refused(tmp_path, share):
    path = tmp_path / "pairs.pt"
    make(dim=1000).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match="damaged"):
        Eigenpairs.load(path)


def test_another_kind_of_file_is_refused(tmp_path):
    torch.save({"weight": torch.ones(3)}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="another kind"):
        Eigenpairs.load(tmp_path / "model.pt")


def test_a_newer_version_is_refused(tmp_path):
    make().save(tmp_path / "pairs.pt")
    data = torch.load(tmp_path / "pairs.pt", weights_only=True)
    torch.save({**data, "version": 99}, tmp_path / "pairs.pt")
    with pytest.raises(ValueError, match="version 1, got 99"):
        Eigenpairs.load(tmp_path / "pairs.pt")


def test_a_file_without_a_part_is_refused(tmp_path):
    make().save(tmp_path / "pairs.pt")
    data = torch.load(tmp_path / "pairs.pt", weights_only=True)
    del data["residuals"]
    torch.save(data, tmp_path / "pairs.pt")
    with pytest.raises(ValueError, match="damaged"):
        Eigenpairs.load(tmp_path / "pairs.pt")


def equal(a, b):
    names = ("eigenvalues", "eigenvectors", "residuals", "converged")
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in names) and a.info == b.info


@pytest.mark.parametrize("bit", [0x01, 0x40])
def test_a_flip_of_any_byte_is_found(tmp_path, bit):
    path = tmp_path / "pairs.pt"
    make(layout=LAYOUT, info={"tol": 1e-3}).save(path)
    content = path.read_bytes()
    for at in range(0, len(content), 7):
        changed = bytearray(content)
        changed[at] ^= bit
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=r"pairs\.pt is damaged.*save it again"):
            Eigenpairs.load(path)


def old_file(pairs, path):
    """Write pairs as it was done before there were checksums."""
    pairs.save(path)
    data = torch.load(path, weights_only=True)
    del data["checksum"]
    torch.save(data, path)


def test_a_file_without_a_checksum_is_read_and_compared_part_by_part(tmp_path):
    path, pairs = tmp_path / "pairs.pt", make(layout=LAYOUT, info={"tol": 1e-3})
    old_file(pairs, path)
    assert equal(Eigenpairs.load(path), pairs)
    content, refused = path.read_bytes(), 0
    for at in range(0, len(content), 7):
        changed = bytearray(content)
        changed[at] ^= 0x40
        path.write_bytes(changed)
        try:  # what is not compared, such as times and padding, changes nothing
            assert equal(Eigenpairs.load(path), pairs)
        except ValueError:
            refused += 1
    assert refused > 100


def test_a_checksum_that_was_lost_is_an_error(tmp_path):
    path = tmp_path / "pairs.pt"
    make().save(path)
    torch.save(torch.load(path, weights_only=True), path)
    with pytest.raises(ValueError, match="checksum is missing"):
        Eigenpairs.load(path)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("eigenvectors_kD", torch.zeros(1).expand(3, 10**12)),
        ("eigenvectors_kD", torch.zeros(3, 5)),
        ("eigenvalues", torch.zeros(3, dtype=torch.int64)),
        ("converged", torch.zeros(3)),
        ("residuals", "none"),
        ("num_matvecs", "many"),
        ("info", [1]),
        ("layout", {"names": ["a"], "shapes": [[-2, -3]]}),
        ("layout", {"names": ["a"], "shapes": [[10**30]]}),
        ("layout", {"names": ["a"]}),
        ("layout", 3),
    ],
)
def test_sizes_and_kinds_that_cannot_be_are_refused(tmp_path, part, value):
    path = tmp_path / "pairs.pt"
    old_file(make(layout=LAYOUT), path)
    torch.save({**torch.load(path, weights_only=True), part: value}, path)
    with pytest.raises(ValueError, match="damaged"):
        Eigenpairs.load(path)


def test_a_folder_or_device_is_no_file_of_pairs(tmp_path):
    with pytest.raises(IsADirectoryError, match="got the folder"):
        Eigenpairs.load(tmp_path)
    with pytest.raises(ValueError, match=r"device.*save it again"):
        Eigenpairs.load(os.devnull)


def test_a_device_that_is_not_there_is_not_taken_for_damage(tmp_path):
    make().save(tmp_path / "pairs.pt")
    with pytest.raises(RuntimeError, match="nowhere"):
        Eigenpairs.load(tmp_path / "pairs.pt", map_location="nowhere")


def test_info_that_could_not_be_read_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError, match=r"\['info'\]\['path'\], which could not be read"):
        make(info={"path": tmp_path}).save(tmp_path / "pairs.pt")
    assert not list(tmp_path.iterdir())


def test_a_link_keeps_its_mode_and_its_pairs(tmp_path):
    target, link = tmp_path / "a.pt", tmp_path / "latest.pt"
    make(k=3).save(target)
    target.chmod(0o600)
    link.symlink_to(target)
    make(k=2).save(link)
    assert link.is_symlink()
    assert len(Eigenpairs.load(target)) == len(Eigenpairs.load(link)) == 2
    assert target.stat().st_mode & 0o777 == 0o600


def test_pairs_go_through_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    pairs, got = make(dim=40_000), []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    pairs.save(tmp_path / "pipe")
    reader.join(10)
    (tmp_path / "pairs.pt").write_bytes(got[0])
    assert equal(Eigenpairs.load(tmp_path / "pairs.pt"), pairs)


def columns(pairs, index):
    return pairs.eigenvectors[:, torch.tensor(index, dtype=torch.int64)]


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        (slice(None, 3), [0, 1, 2]),
        (slice(1, None, 2), [1, 3, 5]),
        (slice(-2, None), [4, 5]),
        (slice(None, None, -1), [5, 4, 3, 2, 1, 0]),
        (slice(4, 1, -2), [4, 2]),
        (slice(3, 3), []),
        (2, [2]),
        (-1, [5]),
        (np.int64(1), [1]),
        (torch.tensor(3), [3]),
        ([4, 0, 0], [4, 0, 0]),
        ([-1, 1], [5, 1]),
        ([], []),
        (np.array([2, 3]), [2, 3]),
        (range(2), [0, 1]),
        (torch.tensor([5, 1]), [5, 1]),
        ([True, False, True, False, False, False], [0, 2]),
        (torch.arange(6) > 3, [4, 5]),
    ],
)
def test_a_selection_has_all_parts_of_its_pairs(index, expected):
    pairs = make(k=6, dim=9, info={"tol": 1e-3})
    pairs = replace(pairs, residuals=torch.arange(6.0), converged=torch.arange(6) % 2 == 0)
    part = pairs[index]
    assert len(part) == len(expected)
    assert torch.equal(part.eigenvectors, columns(pairs, expected))
    assert part.eigenvalues.tolist() == [6.0 - i for i in expected]
    assert part.residuals.tolist() == expected
    assert part.converged.tolist() == [i % 2 == 0 for i in expected]
    assert (part.num_matvecs, part.method, part.info) == (17, "block_krylov", {"tol": 1e-3})
    assert repr(part)


def test_a_slice_and_a_single_pair_are_views():
    pairs = make()
    for part in (pairs[:2], pairs[0], next(iter(pairs))):
        assert part.eigenvectors.data_ptr() == pairs.eigenvectors.data_ptr()


def test_pairs_are_iterated_one_by_one():
    pairs = make(k=6, dim=9)
    assert [len(pair) for pair in pairs] == [1] * 6
    assert torch.equal(torch.cat([pair.eigenvalues for pair in pairs]), pairs.eigenvalues)
    assert torch.equal(torch.cat([pair.eigenvectors for pair in pairs], 1), pairs.eigenvectors)
    assert hesscurv.overlap(pairs[:2], pairs[:2]) == pytest.approx(1.0, abs=1e-6)  # float32


@pytest.mark.parametrize("index", [3, -4, [0, 3], [True, False], torch.ones(4).bool()])
def test_an_index_out_of_range_is_an_index_error(index):
    with pytest.raises(IndexError, match="expected"):
        make()[index]


@pytest.mark.parametrize("index", ["a", 1.5, (0, 1), None, [0.5], [[0]], True, {"a": 1}])
def test_an_index_of_another_kind_is_a_type_error(index):
    with pytest.raises(TypeError, match="expected a number, a slice, a mask"):
        make()[index]


def test_a_selection_is_saved_by_itself(tmp_path):
    pairs = make(k=6, dim=9)
    pairs[[4, 1]].save(tmp_path / "pairs.pt")
    assert equal(Eigenpairs.load(tmp_path / "pairs.pt"), pairs[[4, 1]])


def test_truncate_keeps_the_first_pairs_as_views():
    pairs = make()
    part = pairs.truncate(2)
    assert len(part) == 2
    assert part.eigenvectors.data_ptr() == pairs.eigenvectors.data_ptr()
    assert torch.equal(part.eigenvalues, pairs.eigenvalues[:2])


@pytest.mark.parametrize("k", [0, 4])
def test_truncate_refuses_a_number_out_of_range(k):
    with pytest.raises(ValueError, match="1 <= k <= 3"):
        make().truncate(k)


def test_to_converts_all_but_the_flags():
    pairs = make().to(torch.float64)
    assert pairs.eigenvectors.dtype == pairs.residuals.dtype == torch.float64
    assert pairs.converged.dtype == torch.bool


def test_repr_tells_sizes_convergence_and_cost():
    text = repr(make())
    for part in ("k=3", "D=6", "converged=3/3", "num_matvecs=17", "block_krylov"):
        assert part in text


def test_parts_that_do_not_fit_are_refused():
    pairs = make()
    with pytest.raises(ValueError, match=r"eigenvalues \(k,\) and eigenvectors \(D, k\)"):
        Eigenpairs(torch.ones(2), pairs.eigenvectors, torch.ones(2), torch.ones(2).bool(), 1)
    with pytest.raises(ValueError, match=r"residuals of shape \(3,\)"):
        Eigenpairs(pairs.eigenvalues, pairs.eigenvectors, torch.ones(2), torch.ones(3).bool(), 1)
    with pytest.raises(ValueError, match="layout of 6 entries"):
        make(layout=ParameterLayout(("w",), ((5,),)))

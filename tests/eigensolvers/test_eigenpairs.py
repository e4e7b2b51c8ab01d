"""Eigenpairs: consistent, truncated, saved and loaded without pickle and without half files."""

import os

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

"""The pretended device refuses, counts and computes as CUDA does, and its process is robust."""

import pytest
import torch
from devices import device_programs as programs
from support.pretended_cuda import build as building
from support.pretended_cuda.build import CannotBuild, build
from support.pretended_cuda.child import PretendedError


def test_mixtures_are_refused(pretended):
    said = pretended.run(programs.mixtures)
    for what in ("tensor of the CPU", "other device"):
        assert "Expected all tensors to be on the same device" in said[what]
    assert "Expected a 'cuda' device type for generator" in said["generator of the CPU"]
    assert said["number of the CPU"] == said["indices of the CPU"] == ""


def test_waits_and_copies_are_counted(pretended):
    # Waits, reads of numbers, operations that wait, bytes from the host and to it.
    assert pretended.run(programs.counts) == {
        "launch": (0, 0, 0, 0, 0),
        "view": (0, 0, 0, 0, 0),
        "item": (1, 1, 0, 0, 0),
        "to host": (1, 0, 0, 0, 128),
        "from host": (1, 0, 0, 8, 0),
        "from host by turns": (0, 0, 0, 8, 0),
        "mask": (1, 0, 1, 0, 0),
        "eigh": (1, 0, 1, 0, 0),
        "synchronize": (1, 0, 0, 0, 0),
    }


def test_memory_is_counted_and_limited(pretended):
    found = pretended.run(programs.memory)
    assert found["bytes"] == (4000, 0)
    assert found["peak"] == 4000
    assert found["uninitialised is NaN"]
    assert found["refused"].startswith("OutOfMemoryError: CUDA out of memory")
    assert found["free"] == (1000, True)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_fused_recurrent_cells_are_those_of_the_cpu(pretended, kind):
    there, here = pretended.run(programs.recurrent, kind, "cuda"), programs.recurrent(kind, "cpu")
    for name in ("out", "slopes", "second"):
        # Float64; the same sums in another order.
        torch.testing.assert_close(there[name], here[name], rtol=1e-10, atol=1e-12)
    assert f"_thnn_fused_{kind.lower()}_cell" in there["forward"]
    assert here["forward"] == ""


def test_random_states_are_the_devices_own(pretended):
    assert all(pretended.run(programs.random_numbers).values())


def test_waits_can_be_refused(pretended):
    fine, refused, total = pretended.run(programs.refused_waits)
    assert fine == ""
    assert all("called a synchronizing CUDA operation" in said for said in refused)
    assert total == 3


def test_the_process_outlives_errors_and_is_replaced_when_it_ends(pretended):
    with pytest.raises(PretendedError, match='KeyError: "a program\'s own"'):
        pretended.run(programs.raises)
    with pytest.raises(PretendedError, match="exit code 3"):
        pretended.run(programs.ends)
    assert pretended.run(programs.returns, [1, "two"]) == [1, "two"]


@pytest.mark.slow
def test_a_late_program_is_ended(pretended):
    pretended.run(programs.returns, None)
    with pytest.raises(PretendedError, match=r"after 0\.5 s"):
        pretended.run(programs.sleeps, timeout=0.5)
    assert pretended.run(programs.returns, 1) == 1


def test_a_missing_compiler_is_a_reason_to_skip(monkeypatch):
    monkeypatch.setattr(building.sys, "platform", "linux")
    monkeypatch.setattr(building.torch.backends.cuda, "is_built", lambda: False)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(CannotBuild, match="no-such-compiler, not found"):
        build()


def test_a_source_that_does_not_compile_is_a_reason_to_skip(monkeypatch, tmp_path, pretended):
    source = tmp_path / "device.cpp"
    source.write_text("#error it is of another torch\n")
    monkeypatch.setattr(building, "SOURCE", source)
    monkeypatch.setattr(building, "cache_folder", lambda: tmp_path)
    with pytest.raises(CannotBuild, match="it is of another torch"):
        build()
    assert {path.name for path in tmp_path.iterdir()} == {"device.cpp", "lock"}


def test_another_system_is_a_reason_to_skip(monkeypatch):
    monkeypatch.setattr(building.sys, "platform", "darwin")
    with pytest.raises(CannotBuild, match="needs Linux"):
        build()

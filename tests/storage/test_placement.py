"""Where a basis goes by itself, what is refused, and what the files are."""

import logging
import math
import os
import resource

import pytest
import torch
from support.forks import run_source

from hesscurv.linalg.device_memory import device_memory, free_memory
from hesscurv.storage import pinned_memory, placement
from hesscurv.storage.mapped_files import DiskFullError, mapped_tensor
from hesscurv.storage.pinned_memory import pinned_if_possible
from hesscurv.storage.placement import choose_placement

CPU = torch.device("cpu")
DIM = 1000
BYTES = 4 * DIM  # of a float32 vector


def choose(storage=None, storage_dtype=None, **options):
    options = {
        "dim": DIM,
        "dtype": torch.float32,
        "device": CPU,
        "least": 50,
        "wanted": 100,
        "rounding_allowed": True,
        **options,
    }
    return choose_placement(storage, storage_dtype, **options)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Set what is free, in float32 vectors: host memory, GPU memory, disk."""

    def set_free(host=0, gpu=0, disk=0):
        def free(kind, folder, device):
            on_gpu = kind == "device" and device.type == "cuda"
            return BYTES * {"disk": disk}.get(kind, gpu if on_gpu else host)

        monkeypatch.setattr(placement, "_free", free)
        monkeypatch.setattr(placement, "_is_memory", lambda folder: False)
        monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))

    return set_free


@pytest.mark.parametrize(
    ("free", "kind", "dtype", "capacity"),
    [
        # All that is wanted, in memory.
        ({"host": 1000, "disk": 1000}, "device", torch.float32, 100),
        # Three quarters in memory are better than all of it on a disk.
        ({"host": 80, "disk": 1000}, "device", torch.float32, 80),
        # Half the bytes before a disk.
        ({"host": 60, "disk": 1000}, "device", torch.float16, 100),
        ({"host": 20, "disk": 1000}, "disk", torch.float32, 100),
        # Nowhere three quarters: the first that holds enough at all.
        ({"host": 55, "disk": 20}, "device", torch.float16, 100),
        ({"host": 27, "disk": 20}, "device", torch.float16, 54),
    ],
)
def test_the_first_place_with_room_is_taken(machine, free, kind, dtype, capacity):
    machine(**free)
    chosen = choose()
    assert (chosen.kind, chosen.dtype, chosen.capacity) == (kind, dtype, capacity)


def test_a_small_tolerance_is_not_given_to_half_precision(machine):
    machine(host=60, disk=1000)
    chosen = choose(rounding_allowed=False)
    assert (chosen.kind, chosen.dtype) == ("disk", torch.float32)


@pytest.mark.parametrize(
    ("free", "kind", "dtype"),
    [
        ({"gpu": 1000, "host": 1000}, "device", torch.float32),
        ({"gpu": 60, "host": 1000}, "device", torch.float16),
        ({"gpu": 10, "host": 1000}, "cpu", torch.float32),
        ({"gpu": 10, "host": 10, "disk": 1000}, "disk", torch.float32),
    ],
)
def test_a_gpu_comes_before_the_host_and_the_host_before_the_disk(machine, free, kind, dtype):
    machine(**free)
    chosen = choose(device=torch.device("cuda"))
    assert (chosen.kind, chosen.dtype) == (kind, dtype)


def test_what_fits_nowhere_is_refused_with_sizes_and_remedies(machine):
    machine(host=20, disk=20)
    with pytest.raises(ValueError, match="at least 50 vectors of 1,000 entries") as refusal:
        choose(rounding_allowed=False)
    told = str(refusal.value)
    for part in ("0.0002 GB needed", "8e-05 GB available", "lower k", "float16", "storage="):
        assert part in told


def test_what_was_asked_for_is_not_replaced(machine, tmp_path):
    machine(host=20, disk=1000)
    with pytest.raises(ValueError, match="fits nowhere"):
        choose("device", torch.float32)
    assert choose(tmp_path / "new").folder == tmp_path / "new"
    assert choose(tmp_path, torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="at least 200 vectors"):
        choose("cpu", least=200, wanted=200)


def test_the_host_has_two_names(machine):
    machine(host=1000, gpu=1000)
    for device, kind in ((torch.device("cuda"), "cpu"), (CPU, "device")):
        places = [choose(name, device=device) for name in ("host", "cpu")]
        assert places[0] == places[1]
        assert places[0].kind == kind
        assert not places[0].chosen


@pytest.mark.parametrize("storage", ["cuda", "gpu", "ram", "disk"])
def test_what_looks_like_no_folder_is_refused(storage):
    with pytest.raises(ValueError, match=rf"'host', 'device', 'cpu' .* say './{storage}'"):
        choose(storage)


@pytest.fixture
def pins(monkeypatch):
    """Pretend that so many bytes are free, and note which tensors are to be pinned."""
    noted = []

    def noting(shape, *, dtype, device, pin_memory=False):
        noted.append(pin_memory)
        return torch.zeros(shape, dtype=dtype, device=device)

    def set_free(nbytes):
        noted.clear()
        monkeypatch.setattr(pinned_memory, "free_memory", lambda device: nbytes)
        return noted

    monkeypatch.setattr(pinned_memory.torch, "empty", noting)
    return set_free


@pytest.mark.parametrize(
    ("rows", "beside", "sharing", "needed"),
    [
        (8, 0, 1, 32 * 1024),  # 32,000 bytes, rounded up to a power of two
        (9, 0, 1, 64 * 1024),
        (8, 1000, 1, 32 * 1024 + 1000),
        (8, 1000, 3, 3 * (32 * 1024 + 1000)),
    ],
)
def test_as_much_is_pinned_as_leaves_room_for_the_rest(pins, caplog, rows, beside, sharing, needed):
    def allocate():
        return pinned_if_possible((rows, DIM), torch.float32, beside=beside, sharing=sharing).shape

    with caplog.at_level(logging.DEBUG, "hesscurv"):
        noted = pins(math.ceil(needed / 0.9) + 1)
        assert allocate() == (rows, DIM)
        assert (noted, caplog.records) == ([True], [])
        noted = pins(int(needed / 0.9) - 10)
        assert allocate() == (rows, DIM)
    assert noted == [False]
    assert [record.levelname for record in caplog.records] == ["DEBUG"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine that cannot pin memory")
def test_where_nothing_can_be_pinned_memory_is_pageable(caplog):
    with caplog.at_level(logging.DEBUG, "hesscurv"):
        assert not pinned_if_possible((2, 3), torch.float32).is_pinned()
    assert "not pinned" in caplog.text


def test_the_slabs_for_a_gpu_leave_room_for_the_rest_of_the_plan(monkeypatch):
    asked = []

    def noting(shape, dtype, **options):
        asked.append((shape, options))
        return torch.zeros(shape, dtype=dtype)

    monkeypatch.setattr(placement, "pinned_if_possible", noting)
    place = placement.Placement("cpu", torch.float16, torch.device("cuda"), 10, DIM, sharing=2)
    place.allocate(4)
    assert asked == [((4, DIM), {"beside": 6 * DIM * 2, "sharing": 2})]
    placement.Placement("cpu", torch.float32, CPU, 10, DIM).allocate(4)
    placement.Placement("device", torch.float32, CPU, 10, DIM).allocate(4)
    assert len(asked) == 1


def test_what_products_take_is_left_free(machine):
    machine(host=120, disk=1000)
    assert choose(reserved=20 * BYTES).capacity == 100
    assert choose(reserved=40 * BYTES).capacity == 80
    assert choose(reserved=200 * BYTES).kind == "disk"


def test_processes_share_the_memory_of_their_machine(machine):
    machine(host=100)
    assert choose(sharing=1).capacity == 100
    assert (choose(sharing=2).dtype, choose(sharing=2).capacity) == (torch.float16, 100)


@pytest.mark.parametrize("storage", [3, torch.device("cpu"), ["folder"]])
def test_storage_of_another_kind_is_refused(storage):
    with pytest.raises(TypeError, match="'device', 'cpu' or a folder"):
        choose(storage)


@pytest.mark.parametrize(
    ("dtype", "error"),
    [("float16", TypeError), (torch.float64, ValueError), (torch.int8, ValueError)],
)
def test_a_storage_dtype_that_is_none_is_refused(dtype, error):
    with pytest.raises(error, match="expected storage_dtype"):
        choose("cpu", dtype)


def test_a_mapped_tensor_holds_what_is_written_and_leaves_no_name(tmp_path):
    block = mapped_tensor(tmp_path, (7, 1000), torch.float32)
    values = torch.arange(7000.0).view(7, 1000)
    block.copy_(values)
    assert torch.equal(block, values)
    assert list(tmp_path.iterdir()) == []
    assert mapped_tensor(tmp_path, (0, 5), torch.float32).shape == (0, 5)


def test_a_mapped_tensor_takes_its_room_at_once_or_is_refused(tmp_path):
    # A limit on the size of files refuses as a full disk does.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(DiskFullError, match=r"the disk is full: 0\.004 GB .*storage_dtype"):
            mapped_tensor(tmp_path, (1000, 1000), torch.float32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_mapped_memory_is_no_memory_of_the_process(tmp_path):
    code = """if True:
        import sys, torch
        from pathlib import Path
        from hesscurv.storage.mapped_files import mapped_tensor
        def anonymous():
            for line in open("/proc/self/status"):
                if line.startswith("RssAnon"):
                    return int(line.split()[1]) * 1024
        before = anonymous()
        block = mapped_tensor(Path(sys.argv[1]), (50, 1_000_000), torch.float32)
        block.fill_(1.0)
        print(anonymous() - before)
    """
    if not os.path.exists("/proc/self/status"):
        pytest.skip("needs /proc")
    assert int(run_source(code, tmp_path, cwd=tmp_path)) < 20e6  # of 200 MB


def test_free_memory_is_a_part_of_the_memory():
    assert 0 < free_memory(CPU) <= device_memory(CPU)

"""A basis in pinned memory is that of the device, though its copies come as late as they may.

The pretended device holds back every copy of another stream until somebody waits for it, and
refuses those that are not of contiguous pinned memory in one dtype, for which CUDA would wait.
"""

import pytest
import torch
from devices import transfer_programs as programs

# Float64 sums of some hundred terms of size 1 in another order: the CPU, which plays the device,
# takes other kernels for a chunk of its own than for a part of a slab.
ROUNDING = 1e-13


def test_copies_of_another_stream_are_late(pretended):
    before, after = pretended.run(programs.late)
    assert torch.equal(before, torch.zeros(3, 4))
    assert torch.equal(after, 2 * torch.ones(3, 4))  # the source as it was by then


def test_copies_that_would_wait_are_refused(pretended):
    said = pretended.run(programs.indirect)
    assert said.pop("direct") == ""
    assert all("AssertionError" in why for why in said.values())


@pytest.mark.parametrize("stored", [torch.float64, torch.float16])
def test_chunks_are_fetched_whole_without_a_wait(pretended, stored):
    waits, same = pretended.run(programs.fetched, torch.float64, stored)
    assert waits == 0
    assert len(same) == 6
    assert all(same)


def test_chunks_are_fetched_one_at_a_time_where_two_do_not_fit(pretended):
    assert pretended.run(programs.fetched_in_little_memory) == [True, True]


# What a rotation rounds to half precision may fall to the other side: 2^-10 of entries up to 5.
@pytest.mark.parametrize(("stored", "rounding"), [(torch.float64, ROUNDING), (torch.float16, 5e-3)])
def test_every_reader_sees_what_was_appended_and_turned(pretended, stored, rounding):
    found = pretended.run(programs.steps, stored)
    exact = list(found)[: list(found).index("turned")]
    assert len(exact) == 5
    assert len(found) == 11
    for name, gap in found.items():
        assert gap <= (0 if name in exact else rounding), (name, gap)


@pytest.mark.parametrize("stored", [torch.float64, torch.float16])
def test_projections_are_those_of_the_device_and_wait_no_more(pretended, stored):
    gaps, more_waits = pretended.run(programs.projections, stored)
    assert max(gaps) <= ROUNDING
    assert more_waits == 0


@pytest.mark.parametrize("options", [{}, {"max_basis": 30, "block_size": 5, "verify": False}])
def test_pairs_are_those_of_the_device(pretended, options):
    near = pretended.run(programs.solve, "device", options)
    far = pretended.run(programs.solve, "host", options)
    plain = pretended.run(programs.solve_in_turns, "cpu", options)
    assert far["storage"] == "cpu"
    assert (far["pinned"], plain["pinned"]) == (True, False)
    for found in (far, plain):
        torch.testing.assert_close(found["values"], near["values"], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(found["chunked"], near["values"], rtol=1e-12, atol=1e-14)
        assert found["products"] == near["products"]
        assert found["residual"] < 1e-8 * float(near["values"].abs().max())
    # In pageable memory, the host waits for each chunk and stored block. Here, once before slabs
    # are read, and a few times for a rotation, of which there is one in a restart and one in most
    # blocks of so small a problem.
    assert far["waits"] < plain["waits"]
    assert far["waits"] <= near["waits"] + 3 * far["blocks"] + 6 * far["restarts"] + 10


@pytest.mark.parametrize("storage", ["host", "device"])
def test_a_stopped_solve_goes_on_with_the_same_bits(pretended, storage):
    assert all(pretended.run(programs.resumed, storage).values())


def test_memory_that_cannot_be_pinned_is_pageable_and_said_so_quietly(pretended):
    said, same = pretended.run(programs.refused_pinning)
    assert same
    assert {level for level, _ in said} == {"DEBUG"}
    assert "not pinned: CUDA error: out of memory" in said[0][1]


def test_slabs_may_be_pinned_in_part(pretended):
    pinned, same, gap = pretended.run(programs.pinned_half_way)
    assert pinned[0]
    assert not all(pinned)
    assert same
    assert gap <= ROUNDING

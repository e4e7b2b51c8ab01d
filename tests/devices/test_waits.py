"""The host waits for a CUDA device, and launches kernels, no more often than these bounds say.

A wait empties the device's queue; between two waits the host can be ahead of it. The bounds are
what the algorithms need at present, exact where they are a constant.
"""

import pytest
from devices import wait_programs as programs


def assert_waits(pretended, most, program, *args):
    """Run a program; `most` waits, or a function of what it found, are allowed."""
    found = pretended.run(program, *args)
    most = most(found) if callable(most) else most
    if found["waits"] > most:
        sites = pretended.run(programs.located, program.__name__, *args)
        pytest.fail("\n".join([f"{found['waits']} waits, expected {most} at most", *sites]))
    return found


@pytest.mark.parametrize("case", ["mlp", "conv_bn"])
@pytest.mark.parametrize("way", ["retained", "batched"])
@pytest.mark.parametrize("kind", ["hessian", "ggn", "fisher"])
def test_a_block_of_products_waits_twice(pretended, kind, way, case):
    # Has a weight changed; is all that went in and came out finite. Whatever the number of
    # batches (both cases have two) and vectors, and with buffers (conv_bn) as without.
    assert_waits(pretended, 2, programs.product, kind, case, way)


@pytest.mark.parametrize(("k", "dim"), [(4, 6), (20, 12)])
def test_eigsh_waits_once_a_block(pretended, k, dim):
    # One, for sizes, projections and Gram matrix together; more where a block is ill conditioned.
    # Before and after the blocks, some for the pairs.
    found = assert_waits(pretended, lambda found: found["blocks"] + 20, programs.solve, k, dim)
    assert found["blocks"] >= 10


def test_a_density_waits_twice_a_step(pretended):
    # The products' entries and a step's coefficients; and before the steps, twice for the probes.
    assert_waits(pretended, lambda found: 2 * found["blocks"] + 10, programs.density)


@pytest.mark.parametrize("mode", ["update", "gradient"])
@pytest.mark.parametrize("base", ["sgd", "adam"])
def test_a_step_between_refreshes_never_waits(pretended, base, mode):
    found = pretended.run(programs.optimizer_step, base, mode)
    assert found["waits"] == found["copies"] == 0


@pytest.mark.parametrize(("mode", "launches"), [("update", 8), ("gradient", 6)])
@pytest.mark.parametrize("base", ["sgd", "adam"])
def test_a_step_between_refreshes_launches_the_same_few_kernels(pretended, base, mode, launches):
    # The vector, two products with the basis, the guard, and a subtraction before and after.
    for hidden in (1, 29):
        assert 5 <= pretended.run(programs.added_launches, base, mode, hidden) <= launches


def test_a_monitor_that_is_not_due_never_waits(pretended):
    found = pretended.run(programs.monitor_step, False)
    assert found["waits"] == found["launches"] == 0


def test_a_measurement_of_the_monitor_waits_a_bounded_number_of_times(pretended):
    assert_waits(pretended, 44, programs.monitor_step, True)


def test_the_collector_of_sites_sees_reads_alone(pretended):
    counts, names = pretended.run(programs.sites_of_a_product)
    assert counts == [1, 1]
    assert sorted(names) == ["_local_scalar_dense", "_to_copy"]

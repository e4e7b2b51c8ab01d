"""Operators over 2 and 4 gloo ranks: the same products as one process, and no rank left waiting."""

import copy

import pytest
import torch
from distributed import rank_programs as programs
from support.worlds import SHARDS_ON_CPUS, WorldError, run_world, told
from torch import nn

import hesscurv
from hesscurv.distributed import Communicator
from hesscurv.distributed.checksums import checksum
from hesscurv.operators.matrix_operators import DenseOperator

PROGRAMS = ("communicate", "disagree", "multiply", "wrap_ddp", *(["shard"] * SHARDS_ON_CPUS))
KINDS = programs.KINDS
DIM = 122
# Products in float64 that are summed in another order: some 1e-16 each, with room for the norm.
EXACT = 1e-13


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def world(request, tmp_path_factory):
    """What each rank of a world says, by program."""
    return run_world(programs.run_all, request.param, tmp_path_factory.mktemp("world"), *PROGRAMS)


def gap(got, expected):
    return float((got - expected).norm() / expected.norm())


def one_process(kind="hessian", model=None, data=None, columns=3, **options):
    data = programs.batches() if data is None else data
    H = KINDS[kind](model or programs.net(), programs.TASK, data, **options)
    return H @ programs.vectors(H.shape[0], columns)


# -- products ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_one_process(world, kind):
    expected = one_process(kind)
    for rank in told(world, "multiply"):
        assert gap(rank[kind], expected) < EXACT
        assert gap(rank[f"{kind}, a vector"], expected[:, 0]) < EXACT
        assert rank[f"{kind}, weight"] == 28
        assert rank[f"{kind}, count"] == 7


@pytest.mark.parametrize("kind", KINDS)
def test_every_rank_gets_the_same_bits(world, kind):
    first, *others = told(world, "multiply")
    assert all(torch.equal(rank[kind], first[kind]) for rank in others)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_products_are_rows_of_the_whole(world, kind):
    rows = torch.cat([rank[f"{kind}, rows"] for rank in told(world, "multiply")])
    assert gap(rows, one_process(kind)) < EXACT


def test_changes_on_one_rank_reach_all(world):
    model, data = programs.net(), programs.batches()
    with torch.no_grad():
        model[0].weight.mul_(2)
    stepped = one_process(model=model)
    data[0][0].mul_(2)
    written = one_process(model=model, data=data)
    more = one_process(model=model, data=[*data, programs.batches()[1]])
    for rank in told(world, "multiply"):
        assert gap(rank["after a step"], stepped) < EXACT
        assert gap(rank["after new data"], written) < EXACT
        assert gap(rank["after more data"], more) < EXACT
        assert gap(rank["calibrated"], more) < EXACT
        assert rank["more weight"] == 29


def test_ranks_may_have_no_data(world):
    for rank in told(world, "multiply"):
        assert gap(rank["empty ranks"], one_process()) < EXACT


def test_a_named_group_is_used_in_place_of_all(world):
    for rank in told(world, "multiply"):
        assert gap(rank["alone"], one_process()) < EXACT
        assert rank["alone, size"] == 1


def test_closures_count_alike(world):
    expected = one_process(data=programs.batches((4,) * len(world)))
    for rank in told(world, "multiply"):
        assert gap(rank["closures"], expected) < EXACT


def test_numbers_that_decide_are_the_same_on_all_ranks(world):
    first, *others = told(world, "multiply")
    assert first["seconds"] > 0
    assert first["fingerprint"]["batches"].count(",") == len(world) - 1
    for rank in others:
        assert rank["seconds"] == first["seconds"]
        assert rank["fingerprint"] == first["fingerprint"]


# -- wrapped models ---------------------------------------------------------------------------


def test_a_model_in_ddp_has_the_products_of_the_model(world):
    first = told(world, "wrap_ddp")[0]
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()
    model.load_state_dict(first["state"])
    expected = one_process(model=model)  # with the batch statistics of rank 0, as in its forward
    for rank in told(world, "wrap_ddp"):
        assert gap(rank["after"], expected) < EXACT
    assert gap(first["before"], expected) > 1e-3


def test_ranks_whose_batch_statistics_differ_keep_their_own(world):
    first, *others = told(world, "wrap_ddp")
    for rank in others:
        assert not torch.equal(rank["state"]["1.running_mean"], first["state"]["1.running_mean"])


def sharded_model(values):
    """The model that the ranks have sharded, with the given values of its parameters."""
    model = programs.net()
    with torch.no_grad():
        for p, value in zip(model.parameters(), values, strict=True):
            p.copy_(value)
    model[2].bias.requires_grad_(False)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_a_sharded_model_has_the_products_of_the_whole(world, kind):
    for rank in told(world, "shard"):
        expected = one_process(kind, sharded_model(rank["trained"]))
        assert gap(rank[kind], expected) < EXACT


def test_a_sharded_model_may_be_in_any_state(world):
    original = list(programs.net().parameters())
    for rank in told(world, "shard"):
        assert gap(rank["before training"], one_process(model=sharded_model(original))) < EXACT
        trained = one_process(model=sharded_model(rank["trained"]))
        assert gap(rank["after training"], trained) < EXACT
        assert gap(rank["in between"], trained) < EXACT
        assert gap(rank["left gathered"], rank["left gathered, expected"]) < EXACT
        again = one_process(model=sharded_model(rank["trained again"]))
        assert gap(rank["all"], again) < EXACT
    rows = torch.cat([rank["rows"] for rank in told(world, "shard")])
    assert gap(rows, again) < EXACT


def test_a_sharded_model_trains_as_without_products(world):
    for rank in told(world, "shard"):
        assert rank["sharded"]
        for when in ("trained", "trained again"):
            for got, expected in zip(rank[when], rank[f"{when} without"], strict=True):
                assert torch.equal(got, expected)


def test_a_sharded_model_needs_all_who_hold_its_shards(world):
    for rank in told(world, "shard"):
        kind, message, _ = rank["too few"]
        assert kind == "ValueError"
        assert f"expected all {len(world)} ranks that hold shards" in message


def test_a_sharded_model_has_the_layout_of_the_whole(world):
    model = sharded_model(list(programs.net().parameters()))
    H = hesscurv.HessianOperator(model, programs.TASK, programs.batches())
    assert all(rank["layout"] == H.layout.to_dict() for rank in told(world, "shard"))


# -- failures ---------------------------------------------------------------------------------

SAME_ON_ALL = {
    "agree": ("ValueError", "same number, got 0 on rank", "be of one mind"),
    "other steps": ("DistributedError", "another on rank", "one thing on rank"),
    "other weights": ("ValueError", "same weights", "broadcast them"),
    "other buffers": ("ValueError", "same frozen parameters and buffers", "batch statistics"),
    "later weights": ("ValueError", "same weights", "broadcast them"),
    "never agreed": ("ValueError", "same weights", "broadcast them"),
    "other kind": ("ValueError", "'HessianOperator' on rank", "'GGNOperator' on rank"),
    "other parameters": ("ValueError", "got 122 on rank", "42 on rank"),
    "other mode": ("ValueError", "False on rank", "True on rank"),
    "no data": ("ValueError", "positive total weight"),
    "other vectors": ("ValueError", "same vectors to multiply", "same seed"),
    "other width": ("DistributedError", "with 3 vectors on rank", "with 2 vectors on rank"),
}
ONE_FAILS = {
    "fail": ("ZeroDivisionError", "one rank alone"),
    "nested": ("ZeroDivisionError", "one rank alone"),
    "bad argument": ("ValueError", "expected way"),
    "bad batch": ("NonFiniteLossError", "got nan on batch 0"),
    "bad batch later": ("NonFiniteLossError", "finite loss"),
    "bad product": ("NonFiniteLossError", "finite loss"),
    "nan operand": ("ValueError", "NaN or inf"),
    "wrong shape": ("ValueError", "expected shape (122,)"),
    "wrong rows": ("ValueError", "expected shape"),
}


@pytest.mark.parametrize("case", SAME_ON_ALL)
def test_ranks_that_disagree_all_raise_the_same(world, case):
    kind, *parts = SAME_ON_ALL[case]
    said = [rank[case] for rank in told(world, "disagree")]
    assert {(k, message) for k, message, _ in said} == {(kind, said[0][1])}
    assert all(part in said[0][1] for part in parts), said[0][1]


@pytest.mark.parametrize("case", ONE_FAILS)
def test_a_rank_that_raises_is_named_on_the_others_at_once(world, case):
    kind, part = ONE_FAILS[case]
    *others, last = [rank[case] for rank in told(world, "disagree")]
    assert last[0] == kind
    assert part in last[1]
    for other_kind, message, seconds in others:
        assert other_kind == "DistributedError"
        assert f"rank {len(others)} failed while rank" in message
        assert f"{kind}: " in message
        assert part in message
        assert seconds < 5  # the timeout of the group is 10


def test_the_group_goes_on_after_an_error(world):
    assert all(gap(rank["after"], one_process()) < EXACT for rank in told(world, "disagree"))


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_rank_that_dies_ends_the_others_within_the_timeout(tmp_path, size):
    *others, last = run_world(programs.lose_a_rank, size, tmp_path, may_die=(size - 1,))
    assert last is None
    for kind, message, seconds in others:
        assert kind == "DistributedError"
        assert "got no answer from the other ranks" in message
        assert seconds < 15  # 10 of them the timeout


@pytest.mark.slow
def test_a_rank_that_is_late_ends_the_others_at_the_timeout(tmp_path):
    others = run_world(programs.one_is_late, 2, tmp_path, collective_timeout=2.0)[:-1]
    for kind, message, seconds in others:
        assert kind == "DistributedError"
        assert "longer timeout" in message
        assert seconds < 4


def test_a_world_shows_the_traceback_of_a_rank_that_raises(tmp_path):
    with pytest.raises(WorldError, match="no program of this name") as caught:
        run_world(programs.refuse, 2, tmp_path)
    assert set(caught.value.by_rank) == {0, 1}


# -- the communicator -------------------------------------------------------------------------


def test_every_collective_does_what_it_says(world):
    size = len(world)
    full = torch.arange(22.0, dtype=torch.float64).reshape(2, 11)
    at = 0
    for number, rank in enumerate(told(world, "communicate")):
        start, stop = rank["rows"]
        assert (rank["rank"], rank["size"], start) == (number, size, at)
        assert stop - start in (11 // size, 11 // size + 1)
        assert torch.equal(rank["gathered"], full)
        assert torch.equal(rank["reduced"], full[:, start:stop] * size * (size + 1) / 2)
        assert torch.equal(rank["sum"], torch.full((3, 2), size * (size - 1) / 2))
        assert torch.equal(rank["half"], torch.full((3,), float(size), dtype=torch.float64))
        assert float(rank["max"]) == size - 1
        assert torch.equal(rank["broadcast"], torch.ones(3))
        assert rank["texts"] == ["é" * r for r in range(size)]
        assert rank["notes"] == [r - 1 for r in range(size)]
        assert gap(rank["dense"], (full.mT @ (full @ full.mT))[start:stop]) < EXACT
        assert torch.equal(rank["fewer rows than ranks"], torch.ones(1, 1))
        at = stop
    assert at == 11


def test_a_single_process_sends_nothing():
    comm, tensor = Communicator.of(), torch.randn(3, 5)
    assert (comm.rank, comm.size, comm.rows(5)) == (0, 1, (0, 5))
    for got in (comm.sum_(tensor), comm.max_(tensor), comm.broadcast_(tensor)):
        assert got is tensor
    assert comm.gather_rows(tensor, 5) is tensor
    assert comm.reduce_rows(tensor) is tensor
    assert comm.gather_texts("a") == ["a"]
    with comm.together("a step") as step:
        step.note = 3
    assert step.notes == [3]
    comm.agree(1, "number")
    comm.barrier()
    with pytest.raises(ZeroDivisionError), comm.together("a step"):
        raise ZeroDivisionError


def test_no_group_is_refused_for_what_it_is():
    with pytest.raises(TypeError, match=r"expected a torch\.distributed process group"):
        Communicator.of("gloo")
    with pytest.raises(TypeError, match="process group or None, got int"):
        hesscurv.HessianOperator(programs.net(), programs.TASK, programs.batches(), process_group=3)


def test_the_older_fsdp_is_refused():
    flat = type("FullyShardedDataParallel", (nn.Sequential,), {})(programs.net())
    with pytest.raises(ValueError, match="fully_shard instead"):
        hesscurv.HessianOperator(flat, programs.TASK, programs.batches())


def test_rows_of_one_process_are_the_whole_product():
    matrix = torch.diag(torch.arange(4.0))
    assert torch.equal(DenseOperator(matrix).product_rows(torch.eye(4)), matrix)
    H = hesscurv.HessianOperator(programs.net(), programs.TASK, programs.batches())
    assert torch.equal(H.product_rows(programs.vectors(DIM)), H @ programs.vectors(DIM))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64])
def test_checksums_see_every_bit_and_place(dtype):
    tensor = torch.randn(7, 3).to(dtype)
    other = copy.deepcopy(tensor)
    assert checksum([tensor]) == checksum([other]) == checksum([tensor.mT.contiguous().mT])
    other[2, 1] *= 1 + 2 * torch.finfo(dtype).eps
    assert checksum([tensor]) != checksum([other])
    assert checksum([tensor]) != checksum([tensor.flip(0)])
    assert checksum([tensor[:3], tensor[3:]]) != checksum([tensor])


def test_checksums_take_what_models_hold():
    held = [
        torch.tensor(3),
        torch.zeros(0),
        torch.tensor([True, False]),
        torch.zeros(3).to_sparse(),
        torch.zeros(2, dtype=torch.complex128),
    ]
    assert checksum(held) != checksum([*held[:2], ~held[2], *held[3:]])

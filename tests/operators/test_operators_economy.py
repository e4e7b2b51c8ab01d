"""Products do no work twice, stay within their memory, and go on when it runs out."""

import json
import logging

import cases
import pytest
import torch
from support.replaced_ways import replace_way
from torch import nn
from torch.utils.data import DataLoader, Dataset

import hesscurv
from hesscurv import EmpiricalFisherOperator, GGNOperator, HessianOperator
from hesscurv.operators.local_product import LocalProduct
from hesscurv.operators.timing import calibration
from hesscurv.operators.timing.way_timing import WayTiming
from hesscurv.operators.ways import retained as ways

KINDS = {"hessian": HessianOperator, "ggn": GGNOperator, "fisher": EmpiricalFisherOperator}
TASK = hesscurv.supervised(nn.CrossEntropyLoss())


def net():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def data(*sizes):
    return [(torch.randn(n, 4, dtype=torch.float64), torch.arange(n) % 3) for n in sizes]


def count_forwards(model):
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    return calls


# -- nothing twice ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["retained", "batched", "linearized_batched"])
def test_the_model_runs_once_a_batch_for_all_vectors_and_products(kind, way):
    model = net()
    H = KINDS[kind](model, TASK, data(6, 6, 4), way=way)
    v = torch.randn(H.shape[0], 20, dtype=torch.float64)
    H @ v  # sets up, and compares the way with the reference
    calls = count_forwards(model)
    for _ in range(3):
        H @ v
        H @ v[:, 0]
    assert calls == []


def test_where_graphs_are_not_kept_the_model_runs_once_a_block():
    model = net()
    H = HessianOperator(model, TASK, data(40, 40), way="retained", memory_budget=20_000)
    assert not H.memory_plan.keep_graphs
    calls = count_forwards(model)
    H @ torch.randn(H.shape[0], 7, dtype=torch.float64)
    cuts = -(-40 // H.memory_plan.max_samples)
    assert len(calls) == 2 * cuts


class Counting(Dataset):
    def __init__(self):
        self.reads = 0

    def __len__(self):
        return 10

    def __getitem__(self, index):
        self.reads += 1
        g = torch.Generator().manual_seed(index)
        return torch.randn(4, dtype=torch.float64, generator=g), index % 3


def test_data_that_fit_are_read_once():
    dataset = Counting()
    H = HessianOperator(net(), TASK, DataLoader(dataset, batch_size=4))
    for _ in range(3):
        H @ torch.randn(H.shape[0], 5, dtype=torch.float64)
    assert dataset.reads == 10


def test_data_that_do_not_fit_are_read_once_a_block_and_not_once_a_vector():
    dataset = Counting()
    H = HessianOperator(
        net(), TASK, DataLoader(dataset, batch_size=5), way="retained", memory_budget=1000
    )
    dataset.reads = 0
    H @ torch.randn(H.shape[0], 9, dtype=torch.float64)
    assert dataset.reads == 10


# -- memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [2_000, 20_000, 200_000])
@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_and_chunks_give_the_same_product(kind, budget):
    model, batches = net(), data(50, 50, 21)
    whole = KINDS[kind](model, TASK, batches)
    cut = KINDS[kind](model, TASK, batches, memory_budget=budget)
    V = torch.randn(whole.shape[0], 11, dtype=torch.float64)
    torch.testing.assert_close(cut @ V, whole @ V, rtol=1e-10, atol=1e-13)


def test_a_smaller_budget_means_fewer_samples_and_vectors_at_once():
    plans = [
        HessianOperator(net(), TASK, data(64), memory_budget=b).memory_plan
        for b in (20_000, 200_000, 20_000_000)
    ]
    assert plans[0].max_samples < plans[2].max_samples == 64
    assert plans[0].max_vectors <= plans[1].max_vectors < plans[2].max_vectors


def test_what_couples_samples_is_not_cut():
    problem = cases.build("conv_bn_train")
    whole = problem.operator(HessianOperator)
    small = problem.operator(HessianOperator, memory_budget=1000)
    v = torch.randn(whole.shape[0], dtype=torch.float64)
    torch.testing.assert_close(small @ v, whole @ v, rtol=1e-10, atol=1e-13)


def out_of_memory_above(limit, monkeypatch):
    """Fail as a GPU does for more than `limit` vectors at once."""
    prepare = LocalProduct.prepare
    widths = []

    def limited(self, batch, way):
        apply = prepare(self, batch, way)

        def run(block):
            widths.append(len(block[0]))
            if len(block[0]) > limit:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return apply(block)

        return run

    monkeypatch.setattr(LocalProduct, "prepare", limited)
    return widths


def test_out_of_memory_halves_the_vectors_at_once_and_goes_on(monkeypatch, caplog):
    model, batches = net(), data(6, 4)
    expected = HessianOperator(model, TASK, batches).to_dense()
    H = HessianOperator(model, TASK, batches, way="batched", check=False)
    widths = out_of_memory_above(5, monkeypatch)
    with caplog.at_level(logging.WARNING):
        got = H @ torch.eye(H.shape[0], dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-13)
    assert H.memory_plan.max_vectors <= 5
    assert widths[:3] == [43, 21, 10]
    assert "out of memory: going on with" in caplog.text


def out_of_memory_for_samples(limit, monkeypatch):
    prepare = LocalProduct.prepare

    def limited(self, batch, way):
        if len(batch[0]) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return prepare(self, batch, way)

    monkeypatch.setattr(LocalProduct, "prepare", limited)


def test_out_of_memory_for_one_vector_cuts_the_batches(monkeypatch, caplog):
    model, batches = net(), data(16, 10)
    expected = HessianOperator(model, TASK, batches).to_dense()
    H = HessianOperator(model, TASK, batches, way="retained", check=False)
    out_of_memory_for_samples(5, monkeypatch)
    with caplog.at_level(logging.WARNING):
        got = H.to_dense()
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-13)
    assert H.memory_plan.max_samples <= 5


def test_out_of_memory_where_nothing_can_be_cut_is_a_clear_error(monkeypatch):
    H = HessianOperator(net(), TASK, data(16), way="retained", check=False)
    out_of_memory_for_samples(0, monkeypatch)
    with pytest.raises(torch.OutOfMemoryError, match=r"one sample; use smaller batches"):
        H @ torch.ones(H.shape[0], dtype=torch.float64)


# -- choosing the way -------------------------------------------------------------------------


@pytest.fixture
def remembering(tmp_path, monkeypatch):
    monkeypatch.setenv("HESSCURV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(calibration, "_REMEMBERED", {})
    return tmp_path / "cache"


def test_a_wrong_way_is_left_out(monkeypatch, caplog):
    def wrong(loss, params):
        apply = ways.hessian_batched(loss, params)
        return lambda block: tuple(None if p is None else 1.01 * p for p in apply(block))

    replace_way(monkeypatch, "vmapped", wrong)
    monkeypatch.setattr(calibration, "_REMEMBERED", {})
    H = HessianOperator(net(), TASK, data(6))
    with caplog.at_level(logging.WARNING):
        # So many products that there is time to measure it, however slow the machine is now.
        assert "vmapped" not in H.calibrate(10**6).seconds
    assert "disagrees" in caplog.text
    wanted = HessianOperator(net(), TASK, data(6), way="vmapped")
    with pytest.raises(ValueError, match="gives other products than 'retained'"):
        wanted @ torch.ones(wanted.shape[0], dtype=torch.float64)


def test_a_way_that_fails_is_left_out(monkeypatch):
    def failing(loss, params):
        raise NotImplementedError("no rule")

    replace_way(monkeypatch, "batched", failing)
    monkeypatch.setattr(calibration, "_REMEMBERED", {})
    assert "batched" not in HessianOperator(net(), TASK, data(6)).calibrate().seconds


def test_the_choice_is_remembered_in_a_file(remembering, monkeypatch):
    first = HessianOperator(net(), TASK, data(6)).calibrate()
    assert len(list(remembering.iterdir())) == 1
    monkeypatch.setattr(calibration, "_REMEMBERED", {})  # another process
    monkeypatch.setattr(calibration, "WayTiming", None)  # nothing is measured
    assert HessianOperator(net(), TASK, data(6)).calibrate() == first


def test_another_shape_is_measured_anew(remembering):
    HessianOperator(net(), TASK, data(6)).calibrate()
    HessianOperator(net(), TASK, data(7)).calibrate()
    assert len(list(remembering.iterdir())) == 2


@pytest.mark.parametrize("content", ["", "{", "[]", '{"seconds": {"magic": {"1": 0.1}}}', "null"])
def test_a_damaged_file_is_measured_over(remembering, monkeypatch, content):
    HessianOperator(net(), TASK, data(6)).calibrate()
    (path,) = remembering.iterdir()
    path.write_text(content)
    monkeypatch.setattr(calibration, "_REMEMBERED", {})
    assert "retained" in HessianOperator(net(), TASK, data(6)).calibrate().seconds
    assert "seconds" in json.loads(path.read_text())


@pytest.mark.parametrize("setting", ["off", "0", "none", "OFF"])
def test_nothing_is_written_where_remembering_is_off(setting, tmp_path, monkeypatch):
    monkeypatch.setenv("HESSCURV_CACHE", setting)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(calibration, "_REMEMBERED", {})
    monkeypatch.chdir(tmp_path)
    HessianOperator(net(), TASK, data(6)).calibrate()
    assert list(tmp_path.iterdir()) == []


def test_the_users_cache_folder_is_the_default_place(tmp_path, monkeypatch):
    monkeypatch.delenv("HESSCURV_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(calibration, "_REMEMBERED", {})
    HessianOperator(net(), TASK, data(6)).calibrate()
    (path,) = (tmp_path / "hesscurv").iterdir()
    assert path.name.startswith("calibration-")
    assert path.suffix == ".json"


def test_a_calibration_that_was_changed_is_measured_again(tmp_path, monkeypatch):
    monkeypatch.setenv("HESSCURV_CACHE", str(tmp_path))
    monkeypatch.setattr(calibration, "_REMEMBERED", {})
    H = HessianOperator(net(), TASK, data(6))
    H.calibrate()
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    stored = json.loads(content)
    way = next(iter(stored["seconds"]))
    stored["seconds"][way] = dict.fromkeys(stored["seconds"][way], 1e-9)
    for damaged in (json.dumps(stored).encode(), content[:-5], b"", b"\xff", b"[" * 10**5):
        path.write_bytes(damaged)
        calibration.forget()
        found = HessianOperator(net(), TASK, data(6)).calibrate()
        assert min(found.seconds[way].values()) > 1e-9
        assert path.read_bytes() != damaged  # written again


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("HESSCURV_CACHE", str(tmp_path / "file" / "below"))
    monkeypatch.setattr(calibration, "_REMEMBERED", {})
    assert HessianOperator(net(), TASK, data(6)).calibrate().seconds


def test_the_fastest_way_is_chosen_for_the_width_and_the_number_of_products():
    measured = calibration.Calibration(
        seconds={"retained": {1: 1.0}, "batched": {4: 2.0, 16: 0.5}, "linearized": {1: 0.4}},
        setup={"retained": 0.0, "batched": 0.0, "linearized": 100.0},
        kept=True,
    )
    assert measured.choose(8, expected=10) == ("retained", 1)
    assert measured.choose(32, expected=10) == ("batched", 16)
    assert measured.choose(32, expected=10_000) == ("linearized", 1)
    passing = calibration.Calibration(measured.seconds, measured.setup, kept=False)
    assert passing.choose(32, expected=10_000) == ("batched", 16)


def test_a_long_set_up_is_tried_where_the_products_to_come_are_worth_it():
    H = HessianOperator(net(), TASK, data(6))
    few, many = (WayTiming(H.products.local, data(6)[0], expected) for expected in (30, 10**7))
    assert "retained" in few.seconds
    assert not {"linearized", "linearized_batched"} & set(few.seconds)
    traced = {"linearized", "linearized_batched"}
    assert traced <= set(many.seconds)
    assert all(many.setup[way] > few.setup["retained"] for way in traced)


def test_adopted_settings_decide_without_measuring(monkeypatch):
    model, batches = net(), data(8, 8)
    first, second = (HessianOperator(model, TASK, batches) for _ in range(2))
    first.expect(300)
    first.calibrate(300)
    settings = json.loads(json.dumps(first.settings()))
    monkeypatch.setattr(
        "hesscurv.operators.timing.way_choice.calibrate", lambda *_: pytest.fail("measured again")
    )
    second.adopt(settings)
    widths = (1, 4, 16)
    assert [second.choice(b) for b in widths] == [first.choice(b) for b in widths]
    V = torch.randn(first.shape[0], 16, dtype=torch.float64)
    assert torch.equal(second @ V, first @ V)


def test_what_a_solver_expects_decides_and_not_what_was_computed_before(remembering):
    new, used = (HessianOperator(net(), TASK, data(6)) for _ in range(2))
    used @ torch.ones(used.shape[0], 200, dtype=torch.float64)
    for H in (new, used):
        H.expect(20)  # too few to measure anything for
        H @ torch.ones(H.shape[0], 4, dtype=torch.float64)
        assert H.choice(4) == ("retained", 4)
        assert H.seconds_per_vector(4) == 0
    for H in (new, used):
        H.expect(1000)
        H @ torch.ones(H.shape[0], 4, dtype=torch.float64)
    assert new.choice(16) == used.choice(16)
    assert new.seconds_per_vector(16) == used.seconds_per_vector(16) > 0


# -- algebra ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_linear_symmetric_and_counted(kind):
    H = KINDS[kind](net(), TASK, data(6, 5))
    V = torch.randn(H.shape[0], 3, dtype=torch.float64)
    out = H @ V
    assert H.num_matvecs == 3
    torch.testing.assert_close(H @ V[:, 0], out[:, 0], rtol=1e-10, atol=1e-13)
    assert H.num_matvecs == 4
    mix = torch.randn(3, dtype=torch.float64)
    torch.testing.assert_close(H @ (V @ mix), out @ mix, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(V.mT @ H, out.mT, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(V.mT @ out, (V.mT @ out).mT, rtol=1e-10, atol=1e-13)
    assert (H @ V[:, :0]).shape == (H.shape[0], 0)


def test_strides_and_gradients_of_the_operand_do_not_matter():
    H = HessianOperator(net(), TASK, data(6))
    V = torch.randn(5, H.shape[0], dtype=torch.float64, requires_grad=True)
    out = H @ V.mT
    assert not out.requires_grad
    torch.testing.assert_close(out[:, ::2], H @ V.detach().mT[:, ::2], rtol=1e-10, atol=1e-13)


def test_more_vectors_than_parameters_are_fine():
    H = HessianOperator(net(), TASK, data(6))
    V = torch.randn(H.shape[0], 2 * H.shape[0], dtype=torch.float64)
    torch.testing.assert_close(H @ V, H.to_dense() @ V, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["ggn", "fisher"])
def test_ggn_and_fisher_are_positive_semidefinite_of_low_rank(kind):
    H = KINDS[kind](net(), TASK, data(3, 2))
    values = torch.linalg.eigvalsh(H.to_dense())
    assert values[0] > -1e-14 * values[-1]
    rank = int((values > 1e-12 * values[-1]).sum())
    assert rank == (5 if kind == "fisher" else 5 * 2)  # samples (x outputs less one: softmax)


def test_scipy_sees_a_linear_operator():
    linalg = pytest.importorskip("scipy.sparse.linalg")
    H = HessianOperator(net(), TASK, data(6))
    theirs = linalg.eigsh(H.to_scipy(), k=3, which="LM", return_eigenvectors=False)
    ours = torch.linalg.eigvalsh(H.to_dense())
    top = ours[ours.abs().argsort(descending=True)[:3]].sort().values
    torch.testing.assert_close(torch.from_numpy(theirs).sort().values, top)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["conv_bn", "transformer", "lstm"])
def test_a_gpu_gives_the_same_products(name, kind):
    problem = cases.build(name)
    expected = problem.operator(KINDS[kind]).to_dense()
    problem.model.cuda()
    H = problem.operator(KINDS[kind])
    assert H.device.type == "cuda"
    torch.testing.assert_close(H.to_dense().cpu(), expected, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="device cuda"):
        H @ torch.ones(H.shape[0], dtype=torch.float64)

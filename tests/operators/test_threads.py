"""Several threads that measure at once leave the process as they found it."""

import threading

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hesscurv
from hesscurv.linalg.process_settings import SharedSetting

TASK = hesscurv.supervised(nn.CrossEntropyLoss())


def settings():
    import torch._dynamo.eval_frame as frame

    return (
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.enabled,
        frame._stance.stance,
    )


def net():
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


def in_threads(work, arguments):
    errors = []

    def run(*args):
        try:
            work(*args)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=args) for args in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


def measure(model, batches, times=4):
    for _ in range(times):
        hesscurv.eigsh(hesscurv.HessianOperator(model, TASK, batches), k=5)


@pytest.fixture(params=["highest", "medium"])
def matmul_precision(request):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("shared", [False, True], ids=["own models", "one model"])
def test_settings_and_random_state_are_as_before(shared, matmul_precision):
    torch.manual_seed(0)
    batches = [(torch.randn(20, 5), torch.arange(20) % 3)]
    models = [net()] * 3 if shared else [net() for _ in range(3)]
    measure(models[0], batches, 1)  # loads what is loaded once
    before, random = settings(), torch.get_rng_state()
    modes = [[m.training for m in model.modules()] for model in models]
    in_threads(measure, [(model, batches) for model in models])
    assert settings() == before
    assert torch.equal(torch.get_rng_state(), random)
    assert [[m.training for m in model.modules()] for model in models] == modes


def test_shuffled_loaders_give_each_thread_the_same_batches_in_every_pass():
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(40, 5), torch.arange(40) % 3)

    def work(model):
        loader = DataLoader(data, batch_size=8, shuffle=True)
        # So little memory that batches are read again in every pass, and a pass that differs from
        # the first is an error.
        operator = hesscurv.HessianOperator(model, TASK, loader, memory_budget=3000)
        for _ in range(6):
            operator @ torch.ones(operator.shape[0])

    models = [net() for _ in range(3)]
    random = torch.get_rng_state()
    in_threads(work, [(model,) for model in models])
    assert torch.equal(torch.get_rng_state(), random)


def test_threads_get_the_eigenvalues_that_one_gets_alone():
    torch.manual_seed(0)
    batches = [(torch.randn(20, 5), torch.arange(20) % 3)]
    models = [net() for _ in range(3)]
    expected, got = {}, {}

    def work(i, into):
        operator = hesscurv.HessianOperator(models[i], TASK, batches, way="retained")
        into[i] = hesscurv.eigsh(operator, k=4).eigenvalues

    for i in range(3):
        work(i, expected)
    in_threads(work, [(i, got) for i in range(3)])
    assert all(torch.equal(got[i], expected[i]) for i in range(3))


def test_a_setting_is_put_back_by_the_last_to_leave():
    value = ["before"]

    class Change:
        def __enter__(self):
            self.found, value[0] = value[0], "inside"

        def __exit__(self, *_):
            value[0] = self.found

    setting = SharedSetting(Change)
    first, second = setting.held(), setting.held()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert value[0] == "inside"
    second.__exit__(None, None, None)
    assert value[0] == "before"

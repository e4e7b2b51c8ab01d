import torch
from support.pretended_cuda import torch_cuda
from support.pretended_cuda.wait_sites import WaitSites
from torch import nn

import hesscurv

task = hesscurv.supervised(nn.CrossEntropyLoss())


def net():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).cuda()


def data(n=1):
    return [(torch.randn(8, 6).cuda(), torch.randint(3, (8,)).cuda()) for _ in range(n)]


def measured(fn, n=1):
    torch_cuda.reset()
    fn()
    c = torch_cuda.counts()
    s = f"waits={c.waits} item={c.item_reads} h2d={c.host_to_device} d2h={c.device_to_host} ops={c.waiting_operations} sync={c.synchronizations} launches={c.launches}"
    with WaitSites() as w:
        fn()
    return s + "".join(f"\n    {v} {k}" for k, v in w.sites.most_common(12))


def products():
    out = {}
    for kind in (hesscurv.HessianOperator, hesscurv.GGNOperator, hesscurv.EmpiricalFisherOperator):
        for nb in (1, 3):
            b = data(nb)
            m = net()
            for way in (
                ("retained", "batched") if kind is not hesscurv.HessianOperator else kind.ways
            ):
                try:
                    H = kind(m, task, b, way=way)
                    V = torch.randn(H.shape[0], 16, device="cuda")
                    H @ V
                    out[f"{kind.__name__} {nb} {way}"] = (
                        measured(lambda: H @ V)
                        if nb == 1 and way in ("retained", "batched")
                        else measured(lambda: H @ V).splitlines()[0]
                    )
                except Exception as e:
                    out[f"{kind.__name__} {nb} {way}"] = f"{type(e).__name__} {str(e)[:300]}"
    return out


def solves():
    b = data(1)
    m = net()
    out = {}
    H = hesscurv.HessianOperator(m, task, b, way="retained")
    for method in ("block_krylov", "single_pass", "rayleigh_ritz"):

        def go():
            kw = {} if method != "rayleigh_ritz" else {"initial": hesscurv.eigsh(H, 4)}
            return hesscurv.eigsh(H, 4, method=method, **kw)

        try:
            go()
            r = go()
            out[method + " info"] = str(r.num_matvecs) + str(r.info)[:300]
            out[method] = measured(go)
        except Exception:
            import traceback

            out[method] = traceback.format_exc()[-1500:]
    return out


def optimizer():
    m = net()
    b = data(1)
    out = {}
    for mode in ("update", "gradient"):
        for base in ("sgd", "adam"):
            torch.manual_seed(0)
            m = net()
            o = (
                torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9)
                if base == "sgd"
                else torch.optim.AdamW(m.parameters(), lr=0.01)
            )
            P = hesscurv.optim.PreconditionedOptimizer(
                o, m, task, b, rank=4, refresh_every=1000, mode=mode
            )

            def step():
                P.zero_grad()
                task(m, b[0]).backward()
                P.step()

            step()
            step()
            out[mode + base] = measured(step)
    return out


def monitor():
    m = net()
    b = data(1)
    out = {}
    M = hesscurv.hooks.CurvatureMonitor(m, task, b, k=4)
    M.step(0)
    M.step(1)
    i = [2]

    def step():
        M.step(i[0])
        i[0] += 1

    out["monitor"] = measured(step)
    return out

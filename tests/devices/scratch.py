import torch
from torch import nn
from support.pretended_cuda import torch_cuda
def basic():
    import io
    x = torch.randn(3, 4, device="cuda"); out = {"dev": str(x.device), "x": x}
    def err(f):
        try: f(); return None
        except Exception as e: return f"{type(e).__name__}: {str(e)[:120]}"
    out["mixed"] = err(lambda: x + torch.ones(4))
    out["mixed2"] = err(lambda: x + torch.ones(4, device="cuda:1"))
    out["gen"] = err(lambda: torch.randn(3, generator=torch.Generator(), device="cuda"))
    torch_cuda.reset()
    out["repr"] = repr(x)
    c = torch.view_as_real(torch.ones(3, dtype=torch.complex64, device="cuda")); out["vr"] = str(c._base is not None)
    lstm = nn.LSTM(3, 5, batch_first=True).cuda(); X = torch.randn(2, 4, 3, device="cuda")
    out["lstm"] = err(lambda: lstm(X)[0].sum().backward())
    out["fwd"] = err(lambda: torch.func.jvp(lambda v: lstm(v)[0].sum(), (X,), (X,)))
    q = torch.randn(2, 2, 5, 4, device="cuda", requires_grad=True)
    out["sdpa"] = err(lambda: nn.functional.scaled_dot_product_attention(q, q, q).sum().backward())
    dw = nn.Conv2d(4, 4, 3, groups=4).cuda()
    out["dw"] = err(lambda: dw(torch.randn(1, 4, 6, 6, device="cuda")).sum().backward())
    f = io.BytesIO(); torch.save({"x": x}, f); f.seek(0)
    out["load"] = err(lambda: torch.load(f, map_location="cuda:1", weights_only=True)["x"].device); f.seek(0)
    out["loaddev"] = err(lambda: str(torch.load(f, weights_only=True)["x"].device) == "cuda:0" or 1/0)
    with torch_cuda.waits_refused():
        out["refused"] = err(lambda: x.sum().item())
    torch_cuda.set_limit(torch_cuda.counts().used_bytes + 10000)
    out["oom"] = err(lambda: torch.empty(10000, device="cuda")); torch_cuda.set_limit(None)
    with torch.random.fork_rng(devices=[0, 1]): a = torch.randn(3, device="cuda")
    out["fork"] = bool((a == torch.randn(3, device="cuda")).all())
    out["nan"] = torch.empty(2, device="cuda")
    c = torch_cuda.counts()
    out["counts"] = str(c)
    out["acc"] = str(torch.accelerator.current_accelerator()) if hasattr(torch, "accelerator") else ""
    return out

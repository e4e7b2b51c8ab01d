"""Small optimizers of the kinds that third parties offer: around others, with two passes a step."""

from __future__ import annotations

from collections import defaultdict

import torch


class Lookahead(torch.optim.Optimizer):
    """Slow weights beside the model's, a state dict of its own form (as in pytorch-optimizer)."""

    def __init__(self, optimizer, k=2, alpha=0.5):
        self.optimizer, self.k, self.alpha = optimizer, k, alpha
        self.state = defaultdict(dict)
        self.defaults = optimizer.defaults
        for group in self.param_groups:
            self._begin(group)

    def _begin(self, group):
        group["counter"] = 0
        for p in group["params"]:
            self.state[p]["slow_params"] = p.detach().clone()

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, group):
        self.optimizer.add_param_group(group)
        self._begin(self.param_groups[-1])

    @torch.no_grad()
    def step(self, closure=None):
        loss = self.optimizer.step(closure)
        for group in self.param_groups:
            group["counter"] += 1
            if group["counter"] % self.k == 0:
                for p in group["params"]:
                    slow = self.state[p]["slow_params"]
                    slow.lerp_(p, self.alpha)
                    p.copy_(slow)
        return loss

    def state_dict(self):
        slow = [self.state[p]["slow_params"] for g in self.param_groups for p in g["params"]]
        return {"slow": slow, "base_optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state_dict):
        self.optimizer.load_state_dict(state_dict["base_optimizer"])
        parameters = [p for g in self.param_groups for p in g["params"]]
        for p, slow in zip(parameters, state_dict["slow"], strict=True):
            self.state[p]["slow_params"] = slow.clone()


class ScheduleFree:
    """No torch optimizer by class; gradients at y, an average x, `train` and `eval` between them.

    As `schedulefree.ScheduleFreeWrapper`; the model holds y in training and x in evaluation.
    """

    def __init__(self, base, beta=0.9):
        self.base, self.beta, self.training = base, beta, False
        for group in base.param_groups:
            group["k"] = 0

    param_groups = property(lambda self: self.base.param_groups)
    state = property(lambda self: self.base.state)

    def zero_grad(self, set_to_none=True):
        self.base.zero_grad(set_to_none)

    def add_param_group(self, group):
        self.base.add_param_group(group)

    def state_dict(self):
        return self.base.state_dict()

    def load_state_dict(self, state_dict):
        self.base.load_state_dict(state_dict)

    @torch.no_grad()
    def _move(self, training, weight):
        if self.training != training:
            for p in (p for g in self.param_groups for p in g["params"]):
                if "z" in self.state[p]:
                    p.lerp_(self.state[p]["z"], weight)
        self.training = training

    def train(self):
        self._move(True, 1 - self.beta)

    def eval(self):
        self._move(False, 1 - 1 / self.beta)

    @torch.no_grad()
    def step(self, closure=None):
        assert self.training, "call train() before step()"
        loss = None if closure is None else torch.enable_grad()(closure)()
        averages = {}
        for group in self.param_groups:
            group["k"] += 1
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.detach().clone())
                averages[p] = p.lerp(z, 1 - 1 / self.beta)
                p.copy_(z)
        self.base.step()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["z"].copy_(p)
                x = averages[p].lerp_(p, 1 / group["k"])
                p.copy_(x.lerp(self.state[p]["z"], 1 - self.beta))
        return loss


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation: a gradient elsewhere than at the weights, in two steps."""

    def __init__(self, params, base, rho=0.05, **options):
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups
        self.state = self.base_optimizer.state

    @torch.no_grad()
    def first_step(self, zero_grad=False):
        pairs = [(p, g) for g in self.param_groups for p in g["params"]]
        norm = torch.stack([p.grad.norm() for p, _ in pairs]).norm()
        for p, group in pairs:
            self.state[p]["old_p"] = p.detach().clone()
            p.add_(p.grad, alpha=group["rho"] / float(norm))
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad=False):
        for p in (p for g in self.param_groups for p in g["params"]):
            p.copy_(self.state[p].pop("old_p"))
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, closure=None):
        if closure is None:
            raise RuntimeError("SAM needs a closure")
        self.first_step(zero_grad=True)
        loss = torch.enable_grad()(closure)()
        self.second_step()
        return loss

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.base_optimizer.param_groups = self.param_groups
        self.base_optimizer.state = self.state


class LowRankAdam(torch.optim.Optimizer):
    """Projects the gradients of groups that have a `rank`, as GaLore does, and steps by them."""

    def __init__(self, params, lr=0.01):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                update = p.grad
                if "rank" in group:
                    U, S, V = torch.linalg.svd(update, full_matrices=False)
                    r = group["rank"]
                    update = (U[:, :r] * S[:r]) @ V[:r]
                p.sub_(update, alpha=group["lr"])


class StepByLoss(torch.optim.Optimizer):
    """A step of Polyak's length, loss / ||g||^2: needs the loss, by a closure."""

    def __init__(self, params, most=1.0):
        super().__init__(params, {"most": most})

    @torch.no_grad()
    def step(self, closure):
        loss = torch.enable_grad()(closure)()
        parameters = [p for g in self.param_groups for p in g["params"]]
        square = sum(float(p.grad.square().sum()) for p in parameters)
        for p in parameters:
            p.sub_(p.grad, alpha=min(self.defaults["most"], float(loss.detach()) / square))
        return loss

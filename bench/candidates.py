"""Changes of the recipe that were tried, each alone. A run with one of them, with train.py's arguments:

    python bench/candidates.py normuon config/quickstart.py

The one thing to know: a change is made in this process, to train.py and onecard/optim.py, and not saved in checkpoints,
so a run with a change cannot be resumed. bench/scaling.py compares them; docs/recipe.md has what came of it.
"""

import math
import sys

import torch
import torch.nn.functional as F
from common import ROOT  # noqa: F401  (so that train.py is found)

import train
from configurator import run_script
from model import GPT, Context
from onecard import optim
from onecard.optim import Muon

SEPARATOR = 256  # the id that follows the bytes


def with_optimizers(change):
    """change(config, Muon, AdamW) is called when both have been made."""
    make = optim.configure_optimizers

    def changed(model, config, *rest):
        muon, adamw = make(model, config, *rest)
        change(config, muon, adamw)
        return [muon, adamw]

    optim.configure_optimizers = changed


def before_steps(optimizer, action):
    """action(number of the step) before each step of an optimizer."""
    steps = iter(range(10**9))
    optimizer.register_step_pre_hook(lambda *_: action(next(steps)))


def rate(group, factor):
    """Another rate for a group of AdamW: 0 the embedding, which is the head too; 1 the vectors."""

    def change(config, muon, adamw):
        def scale(step):
            adamw.param_groups[group]["lr"] *= factor  # train.py sets it before each step

        before_steps(adamw, scale)

    with_optimizers(change)


def weight_decay(value):
    """Another decay of the matrices in blocks."""

    def change(config, muon, adamw):
        muon.param_groups[0]["weight_decay"] = value

    with_optimizers(change)


def apply_update(change):
    """change(muon, params, stacked updates, state of each, lr) -> the updates, for all matrices of one shape."""
    orthogonalize = Muon.orthogonalize
    step_together = Muon.step_together

    def changed_step(self, params, group):
        self.now = params, group["lr"]
        step_together(self, params, group)

    def changed(self, matrices):
        params, lr = self.now
        return change(self, params, orthogonalize(self, matrices).float(), [self.state[p] for p in params], lr)

    Muon.step_together, Muon.orthogonalize = changed_step, changed


def cautious():
    """Weight decay only where it has the sign of the update (Chen et al. 2025, arXiv 2510.12402); of matrices."""
    with_optimizers(lambda config, muon, adamw: muon.param_groups[0].update(weight_decay=0.0))

    def change(muon, params, updates, states, lr):
        for p, update in zip(params, updates, strict=True):
            p.sub_(p * (p * update > 0), alpha=0.1 * lr)
        return updates

    apply_update(change)


def normuon():
    """Rows divided by their running RMS, the whole as large as before (Li et al. 2025, arXiv 2510.05491).

    Went into onecard/optim.py, where the running mean starts at zero; here it starts at the first squares.
    """

    def change(muon, params, updates, states, lr):
        for update, state in zip(updates, states, strict=True):
            square = update.square().mean(dim=1, keepdim=True)
            state["rows"] = state["rows"].lerp(square, 0.05) if "rows" in state else square
            before = update.norm()
            update.div_(state["rows"].sqrt() + 1e-8)
            update.mul_(before / update.norm().clamp(min=1e-7))  # zeros at first, below branches that start at zero
        return updates

    apply_update(change)


def muonh():
    """Matrices in blocks keep the norm that they have at first, without weight decay; at first they are normal with a
    standard deviation of 0.5 / sqrt(rows of inputs), those that end a branch too."""
    norms = {}
    step_together = Muon.step_together

    def change(config, muon, adamw):
        muon.param_groups[0]["weight_decay"] = 0.0
        for p in muon.param_groups[0]["params"]:
            torch.nn.init.normal_(p, std=0.5 / math.sqrt(p.shape[1]))
            norms[p] = p.detach().norm()

    def changed_step(self, params, group):
        step_together(self, params, group)
        for p in params:
            p.mul_(norms.get(p, p.norm()) / p.norm())  # plan.py times an optimizer of its own

    with_optimizers(change)
    Muon.step_together = changed_step


def cooldown(share, power):
    """The peak, then (what is left)^power over the last `share` of the steps."""

    def learning_rate(step, config):
        left = (config.max_iters - step) / config.max_iters
        warm = min(1, (step + 1) / (config.warmup_iters + 1))
        return config.learning_rate * warm * min(1, left / share) ** power

    train.learning_rate = learning_rate


def ema(share, blend):
    """At the end, weights are blended with their mean over about the last `share` of the steps."""

    def change(config, muon, adamw):
        params = [p for o in (muon, adamw) for group in o.param_groups for p in group["params"]]
        horizon, means, steps = share * config.max_iters, [], iter(range(1, 10**9))

        @torch.no_grad()
        def after(*_):
            step = next(steps)
            if not means and step > config.max_iters - 3 * horizon:
                means.extend(p.detach().clone() for p in params)
            elif means:
                torch._foreach_lerp_(means, params, 1 / horizon)
            if step == config.max_iters:
                torch._foreach_lerp_(params, means, blend)

        adamw.register_step_post_hook(after)

    with_optimizers(change)


def momentum(first, share):
    """Muon's momentum rises from `first` to 0.95 over the first `share` of the steps."""

    def change(config, muon, adamw):
        def warm(step):
            muon.param_groups[0]["momentum"] = first + (0.95 - first) * min(1, step / (share * config.max_iters))

        before_steps(muon, warm)

    with_optimizers(change)


def documents():
    """Attention that does not cross documents, in training and in evaluation. A boolean mask: slow."""
    hidden, attend, mask = GPT.hidden, Context.attend, [None]

    def changed_hidden(self, idx, *rest, **keys):
        document = (idx == SEPARATOR).cumsum(1)  # (B, T)
        columns = torch.arange(idx.shape[1], device=idx.device)
        causal = columns <= columns[:, None]
        mask[0] = (document[:, None, :] == document[:, :, None]) & causal  # (B, T, T)
        return hidden(self, idx, *rest, **keys)

    def changed_attend(self, q, k, v, layer, dropout):
        if self.cache is not None:
            return attend(self, q, k, v, layer, dropout)
        return F.scaled_dot_product_attention(q, k, v, mask[0][:, None]).transpose(1, 2).flatten(2)

    GPT.hidden, Context.attend = changed_hidden, changed_attend


def growing_batch():
    """Called with half of the tokens in a step and twice as many steps: from half of the run on, two steps are one."""
    clip, zero_grad, waiting, steps = torch.nn.utils.clip_grad_norm_, GPT.zero_grad, [False], iter(range(10**9))
    half = [0]

    def change(config, muon, adamw):
        half[0] = config.max_iters // 4 * 2
        for optimizer in (muon, adamw):
            optimizer.step = unless_waiting(optimizer.step)

    def unless_waiting(step):
        return lambda: None if waiting[0] else step()

    def changed_clip(parameters, max_norm):  # train.py calls it before the optimizers
        parameters, step = list(parameters), next(steps)
        waiting[0] = step >= half[0] and step % 2 == 0
        if step >= half[0] and not waiting[0]:
            for p in parameters:
                p.grad *= 0.5  # the mean of two
        return clip(parameters, math.inf if waiting[0] else max_norm)

    def changed_zero_grad(self, set_to_none=True):
        if not waiting[0]:
            zero_grad(self, set_to_none)

    with_optimizers(change)
    torch.nn.utils.clip_grad_norm_, GPT.zero_grad = changed_clip, changed_zero_grad


CANDIDATES = {
    "embedding_x2": lambda: rate(0, 2),
    "embedding_half": lambda: rate(0, 0.5),
    "vectors_x2": lambda: rate(1, 2),
    "vectors_half": lambda: rate(1, 0.5),
    "no_decay": lambda: weight_decay(0.0),
    "cautious": cautious,
    "normuon": normuon,
    "muonh": muonh,
    "cooldown": lambda: cooldown(0.7, 1.2),
    "ema": lambda: ema(0.05, 0.5),
    "momentum": lambda: momentum(0.85, 0.1),
    "documents": documents,
    "growing_batch": growing_batch,
}

SHORTER_STEPS = ("growing_batch",)  # called with half of the tokens in a step

if __name__ == "__main__":
    CANDIDATES[sys.argv.pop(1)]()
    run_script(train.main)

"""The optimizers: which tensor goes to AdamW, which to Muon, and their state in a checkpoint.

    optimizers = configure_optimizers(model, config, device_type="cuda")   # [AdamW], or [Muon, AdamW]

With two optimizers a step is both or neither: train.py unscales both, checks the gradients, then steps both.
"""

import math

import torch
import torch.distributed as dist

from model import GPT, ModelError

SAVED_NAMES = ("muon", "optimizer")  # keys of their states in a checkpoint; "optimizer" is AdamW, as in nanoGPT
NEWTON_SCHULZ = 5 * [(3.4445, -4.7750, 2.0315)]  # coefficients of Jordan's quintic iterations
ROWS_DECAY = 0.95  # of NorMuon's running mean of squares
STACK_ON_CPU = 192  # with a smaller side above this, matrices are faster one by one on a CPU


def configure_optimizers(
    model: GPT, config, device_type: str, rank: int = 0, world_size: int = 1
) -> list[torch.optim.Optimizer]:
    """[AdamW] (Loshchilov & Hutter 2019), or [Muon, AdamW] with config.optimizer "muon" or "normuon".

    config has optimizer, learning_rate, weight_decay, beta1, beta2. Matrices and embeddings decay,
    vectors do not. Muon takes the matrices inside the blocks, with AdamW's learning rate, and shares its work among
    world_size processes.
    Raises ModelError for Muon with a network that it does not fit.
    """
    has_muon = config.optimizer != "adamw"
    if has_muon and model.config.arch == "gpt2":
        raise ModelError(
            f"optimizer={config.optimizer!r} needs arch='qwen3': GPT-2 keeps query, key and value in one matrix, and "
            "Muon would orthogonalise them together"
        )
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]  # a tied tensor comes once
    is_muons = {name: has_muon and p.dim() == 2 and ".h." in name for name, p in named}
    matrices = [p for name, p in named if is_muons[name]]
    rest = [p for name, p in named if not is_muons[name]]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    betas, fused = (config.beta1, config.beta2), device_type in ("cuda", "mps", "cpu")
    adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=fused)
    if not matrices:
        return [adamw]
    stack_up_to = STACK_ON_CPU if device_type == "cpu" else math.inf
    even_rows = config.optimizer == "normuon"
    return [Muon(matrices, config.learning_rate, config.weight_decay, stack_up_to, rank, world_size, even_rows), adamw]


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum (Jordan et al. 2024), as large as AdamW's updates (Liu et al. 2025, arXiv 2502.16982).

    The same steps as torch.optim.Muon with adjust_lr_fn="match_rms_adamw", which does one matrix after the other. Here
    matrices of one shape are stacked and done by batched products, if their smaller side is at most `stack_up_to`. Of
    several processes each does a share of the matrices and sends it to the others.

    With even_rows it is NorMuon (Li et al. 2025, arXiv 2510.05491): the rows of an update are divided by the root of
    their running mean square, and the whole is as large as before.
    """

    def __init__(
        self, params, lr: float, weight_decay: float, stack_up_to: float, rank=0, world_size=1, even_rows=False
    ):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=0.95))
        self.stack_up_to, self.rank, self.world_size, self.even_rows = stack_up_to, rank, world_size, even_rows

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None, "Muon computes no gradients itself"
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for shape, params in by_shape.items():
                together = len(params) if min(shape) <= self.stack_up_to else self.world_size
                for first in range(0, len(params), together):
                    self.step_together(params[first : first + together], group)

    def step_together(self, params, group):
        """One step of matrices of one shape."""
        lr, momentum = group["lr"], group["momentum"]
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            if self.even_rows and "row_squares" not in self.state[p]:
                self.state[p]["row_squares"] = torch.zeros_like(p[:, :1])
        grads, buffers = [p.grad for p in params], [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        updates = self.orthogonalize(torch._foreach_lerp(grads, buffers, momentum))  # Nesterov's look ahead
        updates = updates.to(params[0].dtype, memory_format=torch.contiguous_format)  # so the sum is one kernel
        if self.even_rows:
            updates = self.with_even_rows(updates, [self.state[p]["row_squares"] for p in params])
        rms = 0.2 * math.sqrt(max(params[0].shape))  # 0.2 is about the RMS of AdamW's updates (Liu et al., eq. 4)
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_add_(params, list(updates), alpha=-lr * rms)

    @staticmethod
    def with_even_rows(updates, squares):
        """updates (N, rows, columns) -> the same divided by the roots of the rows' squares, N of (rows, 1)."""
        torch._foreach_lerp_(squares, list(updates.square().mean(-1, keepdim=True)), 1 - ROWS_DECAY)
        even = updates / (torch.stack(squares).sqrt() + 1e-8)
        scale = updates.norm(dim=(-2, -1), keepdim=True) / even.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
        return even * scale

    def orthogonalize(self, matrices):
        """Matrices of one shape -> (N, rows, columns) of bfloat16. This process computes a share of them."""
        if self.world_size == 1:
            return newton_schulz(matrices)
        share = math.ceil(len(matrices) / self.world_size)
        mine = matrices[self.rank * share : (self.rank + 1) * share]
        sent = matrices[0].new_zeros((share, *matrices[0].shape), dtype=torch.bfloat16)
        if mine:  # the last processes may have fewer, or none
            sent[: len(mine)] = newton_schulz(mine)
        shares = [torch.empty_like(sent) for _ in range(self.world_size)]
        dist.all_gather(shares, sent)
        return torch.cat(shares)[: len(matrices)]


def newton_schulz(matrices: list[torch.Tensor]) -> torch.Tensor:
    """Matrices of one shape -> (N, rows, columns), with singular values near 1, in bfloat16: Jordan's iteration."""
    one = len(matrices) == 1  # a CPU multiplies matrices faster than stacks of one
    x, add_product = (matrices[0], torch.addmm) if one else (torch.stack(matrices), torch.baddbmm)
    tall = x.shape[-2] > x.shape[-1]
    x = x.bfloat16().mT if tall else x.bfloat16()  # the smaller side first: a smaller Gram matrix
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # singular values of at most 1
    for a, b, c in NEWTON_SCHULZ:
        gram = x @ x.mT
        gram = add_product(gram, gram, gram, beta=b, alpha=c)
        x = add_product(x, gram, x, beta=a)
    x = x.mT if tall else x
    return x[None] if one else x


def state_dicts(optimizers: list[torch.optim.Optimizer]) -> dict[str, dict]:
    """Their states by the names that they have in a checkpoint."""
    names = SAVED_NAMES[-len(optimizers) :]
    return {name: optimizer.state_dict() for name, optimizer in zip(names, optimizers, strict=True)}


def load_state_dicts(optimizers: list[torch.optim.Optimizer], saved: dict) -> None:
    """Loads the states of a checkpoint. Betas, weight decay and the like stay as they were configured for this run."""
    states = [saved[name] for name in SAVED_NAMES if name in saved]
    for optimizer, state in zip(optimizers, states, strict=True):
        configured = optimizer.state_dict()["param_groups"]
        pairs = zip(configured, state["param_groups"], strict=True)
        groups = [ours | {key: theirs[key] for key in ("params", "lr")} for ours, theirs in pairs]
        optimizer.load_state_dict({"state": state["state"], "param_groups": groups})


def take_moments(optimizers: list[torch.optim.Optimizer], state: dict, print0) -> None:
    """Lets AdamW go on with the moments of nanoGPT's, {number of a parameter: its state}: theirs is our order.

    Learned positions that a smaller block_size cut off lose theirs. Says so where another network or Muon cannot.
    """
    params = [p for group in optimizers[-1].param_groups for p in group["params"]]
    cut = {
        i: {name: value[: len(p)] if value.dim() else value for name, value in state[i].items()}
        for i, p in enumerate(params)
        if i in state
    }
    if len(optimizers) == 2 or [s["exp_avg"].shape for s in cut.values()] != [p.shape for p in params]:
        print0("the state of AdamW that came with the weights does not fit this run: it starts without")
        return
    optimizers[0].load_state_dict({"state": cut, "param_groups": optimizers[0].state_dict()["param_groups"]})
    print0("AdamW goes on with the state that came with the weights")

"""The optimizers: which tensor goes to AdamW, which to Muon, and their state in a checkpoint.

    optimizers = configure_optimizers(model, config, device_type="cuda")   # [AdamW], or [Muon, AdamW]

With two optimizers a step is both or neither: train.py unscales both, checks the gradients, then steps both.
"""

import torch

from model import GPT, ModelError

SAVED_NAMES = ("muon", "optimizer")  # keys of their states in a checkpoint; "optimizer" is AdamW, as in nanoGPT


def configure_optimizers(model: GPT, config, device_type: str) -> list[torch.optim.Optimizer]:
    """[AdamW] (Loshchilov & Hutter 2019), or [Muon, AdamW] with config.optimizer="muon".

    config has optimizer, learning_rate, weight_decay, beta1, beta2. Matrices and embeddings decay, vectors do not. Muon
    (Jordan et al. 2024) takes the matrices inside the blocks, with AdamW's learning rate (match_rms_adamw: Liu et al.
    2025, arXiv 2502.16982). Raises ModelError for Muon with a network that it does not fit.
    """
    if config.optimizer == "muon" and model.config.arch == "gpt2":
        raise ModelError(
            "optimizer='muon' needs arch='qwen3': GPT-2 keeps query, key and value in one matrix, and Muon would "
            "orthogonalise them together"
        )
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]  # a tied tensor comes once
    is_muons = {name: config.optimizer == "muon" and p.dim() == 2 and ".h." in name for name, p in named}
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
    settings = dict(lr=config.learning_rate, weight_decay=config.weight_decay, momentum=0.95)
    return [torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **settings), adamw]


def state_dicts(optimizers: list[torch.optim.Optimizer]) -> dict[str, dict]:
    """Their states by the names that they have in a checkpoint."""
    names = SAVED_NAMES[-len(optimizers) :]
    return {name: optimizer.state_dict() for name, optimizer in zip(names, optimizers, strict=True)}


def load_state_dicts(optimizers: list[torch.optim.Optimizer], saved: dict) -> None:
    """Loads the states of a checkpoint. Betas and weight decay stay as they were configured for this run."""
    states = [saved[name] for name in SAVED_NAMES if name in saved]
    for optimizer, state in zip(optimizers, states, strict=True):
        configured = [
            {k: v for k, v in group.items() if k in ("betas", "weight_decay")} for group in optimizer.param_groups
        ]
        optimizer.load_state_dict(state)
        for group, values in zip(optimizer.param_groups, configured, strict=True):
            group.update(values)

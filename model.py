"""The network: GPT-2 with nanoGPT's parameter names, or the shape of Qwen3; and its loss.

    model = GPT(GPTConfig(n_layer=12, n_head=6, n_embd=384, bias=False))
    loss = model(inputs, targets)

Two networks share one trunk. gpt2 is what nanoGPT trains. qwen3 has the exact shape of transformers' Qwen3, so other
programs can run its weights. This file is the only place for a formula of the network: plan.py asks it.
Letters in shapes: B batch, T time, C channels (n_embd), H heads, D head size, V vocabulary, L layers.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from onecard import UserError

GPT2_IDS = 50257  # ids of GPT-2's tokenizer
IGNORE = -100  # a target with this value does not count, as in torch's cross entropy
ROPE_THETA = 10_000.0  # base of the rotary frequencies; enough for contexts of a few thousand tokens
NORM_EPS = 1e-6  # epsilon of RMSNorm, as in Qwen3
CHUNK_LOGITS = 2**27  # logits computed at a time: fewer would leave a card idle
CPU_CHUNK_LOGITS = 2**26  # more would be slower on a CPU


class ModelError(UserError):
    """An impossible network: the message names the key, the value, the reason and the remedy."""


@dataclass(frozen=True)
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304  # 50257 rounded up to a multiple of 64, which matrix units prefer
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in linear layers and LayerNorms, as in GPT-2
    gelu: str = "tanh"  # "tanh": GPT-2's approximation; "none": the exact form, which nanoGPT uses
    arch: str = "gpt2"  # "gpt2" or "qwen3"; qwen3 has neither biases nor GELU

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise ModelError(f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}; change one of them")
        if self.gelu not in ("tanh", "none"):
            raise ModelError(f"gelu={self.gelu!r} is unknown; use 'tanh' (GPT-2's form) or 'none' (exact)")
        if self.arch not in ("gpt2", "qwen3"):
            raise ModelError(f"arch={self.arch!r} is unknown; use 'gpt2' or 'qwen3'")
        if self.arch == "qwen3" and (self.bias or self.n_embd // self.n_head % 2):
            raise ModelError("arch='qwen3' has no biases and needs an even head size: set bias=False, change n_head")

    @property
    def n_inner(self) -> int:
        """Width inside the MLP. qwen3 has three matrices of 8/3 C, as many parameters as GPT-2's two of 4 C."""
        return 4 * self.n_embd if self.arch == "gpt2" else 64 * math.ceil(8 * self.n_embd / 3 / 64)


@dataclass
class Context:
    """What the attention of all layers shares: the mask, the rotary angles, the cache."""

    mask: torch.Tensor | None = None  # (B or 1, 1, T, all columns), True where attention is allowed; None: causal
    angles: tuple | None = None  # cos and sin, (B or 1, 1, T, D) each; for qwen3
    cache: Any = None  # generation.Cache
    column: torch.Tensor | None = None  # see Cache.append

    def attend(self, q, k, v, layer, dropout):
        """q, k, v (B, H, T, D) -> (B, T, C)."""
        if self.cache is not None:
            k, v = self.cache.append(layer, k, v, self.column)
        causal = self.mask is None and q.shape[2] > 1  # a single query attends to every column
        y = F.scaled_dot_product_attention(q, k, v, self.mask, dropout_p=dropout, is_causal=causal)  # (B, H, T, D)
        return y.transpose(1, 2).flatten(2)


class GPT2Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.n_head, self.dropout, self.layer = config.n_head, config.dropout, layer
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, context):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # (B, H, T, D)
        y = context.attend(q, k, v, self.layer, self.dropout if self.training else 0.0)
        return self.resid_dropout(self.c_proj(y))


class GPT2MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gelu = config.gelu
        self.c_fc = nn.Linear(config.n_embd, config.n_inner, bias=config.bias)
        self.c_proj = nn.Linear(config.n_inner, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate=self.gelu)))


class Qwen3Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        C, D = config.n_embd, config.n_embd // config.n_head
        self.n_head, self.dropout, self.layer = config.n_head, config.dropout, layer
        self.q, self.k, self.v = (nn.Linear(C, C, bias=False) for _ in range(3))  # separate, as Muon needs them
        self.q_norm, self.k_norm = nn.RMSNorm(D, eps=NORM_EPS), nn.RMSNorm(D, eps=NORM_EPS)
        self.c_proj = nn.Linear(C, C, bias=False)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, context):
        q, k, v = (linear(x).unflatten(2, (self.n_head, -1)) for linear in (self.q, self.k, self.v))  # (B, T, H, D)
        q, k = q.to(self.q_norm.weight.dtype), k.to(self.k_norm.weight.dtype)  # float32 in training
        q, k = self.q_norm(q), self.k_norm(k)  # before the transpose: a card's kernel copies what is not contiguous
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
        q, k = rotate(q, context.angles), rotate(k, context.angles)
        q, k = q.to(v.dtype), k.to(v.dtype)  # (B, H, T, D)
        y = context.attend(q, k, v, self.layer, self.dropout if self.training else 0.0)
        return self.resid_dropout(self.c_proj(y))


def rotate(x, angles):
    """Rotary positions (Su et al. 2021, arXiv 2104.09864): rotates x (B, H, T, D), pairing channel i with i + D / 2."""
    cos, sin = angles
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class Qwen3MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_gate = nn.Linear(config.n_embd, config.n_inner, bias=False)
        self.c_fc = nn.Linear(config.n_embd, config.n_inner, bias=False)
        self.c_proj = nn.Linear(config.n_inner, config.n_embd, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(F.silu(self.c_gate(x)) * self.c_fc(x)))


def norm(config):
    """LayerNorm for gpt2, RMSNorm for qwen3."""
    if config.arch == "gpt2":
        return nn.LayerNorm(config.n_embd, bias=config.bias)
    return nn.RMSNorm(config.n_embd, eps=NORM_EPS)


class Block(nn.Module):
    """Attention and MLP, each added to the residual stream: GPT-2's (Radford et al. 2019) or Qwen3's (Yang et al. 2025,
    arXiv 2505.09388: QK norm, rotary positions, gated MLP)."""

    def __init__(self, config, layer):
        super().__init__()
        gpt2 = config.arch == "gpt2"
        self.ln_1 = norm(config)
        self.attn = GPT2Attention(config, layer) if gpt2 else Qwen3Attention(config, layer)
        self.ln_2 = norm(config)
        self.mlp = GPT2MLP(config) if gpt2 else Qwen3MLP(config)

    def forward(self, x, context):
        x = x + self.attn(self.ln_1(x), context)
        return x + self.mlp(self.ln_2(x))


# ---- the loss, without ever holding all logits


def chunk_rows(rows: int, V: int, device_type: str) -> int:
    """How many of `rows` rows of V logits to compute at a time. All chunks but the last have equal size."""
    chunks = math.ceil(rows * V / (CPU_CHUNK_LOGITS if device_type == "cpu" else CHUNK_LOGITS))
    return math.ceil(rows / chunks)


def token_losses(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, rows: int) -> torch.Tensor:
    """x (N, C), weight (V, C), targets (N,) -> cross entropy (N,) in float32, 0 where the target is -100."""
    losses = []
    for h, t in zip(x.split(rows), targets.split(rows), strict=True):
        losses.append(F.cross_entropy(F.linear(h, weight).float(), t, reduction="none", ignore_index=IGNORE))
    return torch.cat(losses)


def logit_gradients(h, w, t, counted):
    """Sum of the losses of one chunk, and its gradient by the logits: softmax minus one-hot (rows, V), in h's dtype.

    h (rows, C), w (V, C), targets t (rows, 1) and counted (rows, 1): 1 for a target that counts, else 0.
    """
    logp = torch.log_softmax(h @ w.t(), dim=1, dtype=torch.float32)  # (rows, V)
    loss = -(logp.gather(1, t) * counted).sum()
    if torch.compiler.is_compiling():  # one kernel, which writes no softmax in float32; eager would hold the mask too
        return loss, (logp.exp() - (torch.arange(len(w), device=w.device) == t).float()).to(h.dtype)
    return loss, logp.exp_().scatter_add_(1, t, torch.full_like(counted, -1.0)).to(h.dtype)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross entropy of a linear head: x (N, C), weight (V, C), targets (N,) -> float32 scalar.

    Forward computes both gradients chunk by chunk (the idea of Liger Kernel, Hsu et al. 2024, arXiv 2410.10989). They
    are kept without the factor 1 / N, the weight's in float32: in float16, 1 / N would round most of softmax to zero.
    Backward multiplies by 1 / N and by GradScaler's factor.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, dtype, rows):
        inputs, w = x.to(dtype), weight.to(dtype)
        counted = (targets != IGNORE).float()[:, None]  # (N, 1)
        loss = torch.zeros((), device=x.device)
        grad_x, grad_weight = [], torch.zeros_like(weight, dtype=torch.float32)
        for h, t, n in zip(inputs.split(rows), targets.split(rows), counted.split(rows), strict=True):
            chunk_loss, g = logit_gradients(h, w, t.clamp(min=0)[:, None], n)
            loss += chunk_loss
            grad_x.append((g @ w) * n.to(dtype))
            grad_weight += g.t() @ (h * n.to(dtype))
            del g  # before the next logits are made
        count = counted.sum()
        ctx.save_for_backward(torch.cat(grad_x), grad_weight, count.clamp(min=1))  # no target counts: zeros
        ctx.dtypes = x.dtype, weight.dtype
        return loss / count

    @staticmethod
    def backward(ctx, grad_loss):
        grad_x, grad_weight, count = ctx.saved_tensors
        factor = grad_loss / count
        x_dtype, weight_dtype = ctx.dtypes
        return (grad_x.float() * factor).to(x_dtype), (grad_weight * factor).to(weight_dtype), None, None, None


class GPT(nn.Module):
    """A decoder whose output head is the embedding (tied); learned positions for gpt2, rotary ones for qwen3."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.n_ids = min(config.vocab_size, GPT2_IDS)  # the tokenizer's ids; rows past them are padding, never sampled
        self.activation_checkpointing = False  # True: keep only the input of each block, compute the rest again
        self.plan_for: str | None = None  # a device type: plan.py traces a step as that device would run it
        parts: dict[str, nn.Module] = {"wte": nn.Embedding(config.vocab_size, config.n_embd)}
        if config.arch == "gpt2":
            parts["wpe"] = nn.Embedding(config.block_size, config.n_embd)
        parts["drop"] = nn.Dropout(config.dropout)
        parts["h"] = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.transformer = nn.ModuleDict(parts | {"ln_f": norm(config)})
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        self.init_weights()

    def init_weights(self) -> None:
        """gpt2: normal with std 0.02, less where 2 x n_layer branches add up in the residual stream (GPT-2's paper).

        qwen3: branches start at zero, so at first the embedding of a token is all that reaches the tied head. With std
        0.02 the token would predict itself with a logit of 0.02 C; with 0.005 the first loss is close to ln V.
        """
        config = self.config
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                std = 0.02 / math.sqrt(2 * config.n_layer) if config.arch == "gpt2" else 0.0
                nn.init.normal_(parameter, std=std)
        if config.arch == "qwen3":
            nn.init.normal_(self.transformer.wte.weight, std=0.005)

    # ---- forward

    def hidden(self, idx: torch.Tensor, cache=None, pads=None, column=None) -> torch.Tensor:
        """idx (B, T) of int64 -> the input of the output head, (B, T, C).

        With a cache (generation.Cache), the T columns follow the cache.filled columns in it and are added to it. pads
        (B,) of int64: the number of padding columns on the left of each sequence, which are masked; positions count
        from the first real token. All columns together are at most block_size. column (1,) of int64: the single new
        column as a tensor; the caller counts cache.filled. No Python number changes: a compiled step is compiled once.
        """
        first = cache.filled if cache is not None and column is None else 0
        T = idx.shape[1]
        if first + T > self.config.block_size:
            raise ModelError(f"{first + T} tokens are more than block_size={self.config.block_size}: shorten the input")
        columns = torch.arange(first, first + T, device=idx.device) if column is None else column
        total = first + T if column is None else cache.keys.shape[3]
        positions = columns if pads is None else (columns - pads[:, None]).clamp(min=0)  # (T,) or (B, T)
        plain = pads is None and (first == 0 or T == 1) and column is None  # the causal mask, or none, is enough
        mask = None if plain else self.attention_mask(columns, total, pads)
        context = Context(mask, None, cache, column)
        x = self.transformer.wte(idx)  # (B, T, C)
        if self.config.arch == "gpt2":
            x = x + self.transformer.wpe(positions)
        else:
            context.angles = self.rotary_angles(positions)
        x = self.transformer.drop(x)
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        for block in self.transformer.h:
            x = checkpoint(block, x, context, use_reentrant=False) if recompute else block(x, context)
        if cache is not None and column is None:
            cache.filled += T
        return self.transformer.ln_f(x)

    @staticmethod
    def attention_mask(columns, total, pads):
        """The mask (B or 1, 1, T, total) of the new columns."""
        keys = torch.arange(total, device=columns.device)
        mask = keys <= columns[:, None]  # (T, total)
        if pads is not None:  # a padding column attends to itself, so that its softmax is finite
            mask = mask & (keys >= pads[:, None, None]) | (keys == columns[:, None])  # (B, T, total)
        return mask.view(-1, 1, len(columns), total)

    def rotary_angles(self, positions):
        """positions (T,) or (B, T) -> cos and sin, (1 or B, 1, T, D) each, in float32."""
        D = self.config.n_embd // self.config.n_head
        turns = ROPE_THETA ** (-torch.arange(0, D, 2, device=positions.device, dtype=torch.float32) / D)
        angles = positions[..., None].float() * turns  # (T, D / 2) or (B, T, D / 2)
        angles = torch.cat((angles, angles), dim=-1).view(-1, 1, positions.shape[-1], D)
        return angles.cos(), angles.sin()

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., C) -> logits (..., n_ids) of the tokenizer's ids, in float32 or wider, without padding rows."""
        logits = self.lm_head(x)[..., : self.n_ids]
        return logits if logits.dtype == torch.float64 else logits.float()

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None, reduction: str = "mean") -> torch.Tensor:
        """idx (B, T) of int64 -> logits (B, T, V); with targets (B, T) the cross entropy in nats instead.

        The loss is float32: the mean over the targets, or (B, T) with reduction="none". Targets of -100 do not count.
        At most one chunk of logits exists at a time.
        """
        x = self.hidden(idx)  # (B, T, C)
        if targets is None:
            return self.lm_head(x)
        x, flat, weight = x.flatten(0, 1), targets.flatten(), self.lm_head.weight
        rows = chunk_rows(len(x), len(weight), self.plan_for or x.device.type)
        if reduction == "none":
            return token_losses(x, weight, flat, rows).view_as(targets)
        if not torch.is_grad_enabled():
            return token_losses(x, weight, flat, rows).sum() / (flat != IGNORE).sum()
        device = x.device.type
        autocast = device != "meta" and torch.is_autocast_enabled(device)  # (meta has no autocast; one graph in Dynamo)
        dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
        return ChunkedCrossEntropy.apply(x, weight, flat, dtype, rows)

    # ---- sizes

    def parameter_counts(self) -> dict[str, int]:
        """Trained numbers by place: embedding (also the head), positions, blocks (with the last norm), and total."""
        total = sum(p.numel() for p in self.parameters())  # the tied tensor counts once
        embedding = self.transformer.wte.weight.numel()
        positions = self.transformer.wpe.weight.numel() if self.config.arch == "gpt2" else 0
        blocks = total - embedding - positions
        return dict(embedding=embedding, positions=positions, blocks=blocks, total=total)

    def num_params(self, positions: bool = True) -> int:
        """Number of trained numbers. Papers often leave the position embedding out."""
        counts = self.parameter_counts()
        return counts["total"] - (0 if positions else counts["positions"])

    def flops_per_token(self, T: int | None = None) -> int:
        """Floating-point operations of forward and backward for one token in a sequence of T (default block_size).

        Counted as in PaLM (Chowdhery et al. 2022, appendix B): 6 for each parameter that is multiplied (positions are
        only added; the tied embedding counts once, as head), and 12 x n_layer x C x T for the two products of
        attention, with no discount for the causal mask. Norms, softmax and recomputation are not counted.
        """
        c = self.config
        return 6 * self.num_params(positions=False) + 12 * c.n_layer * c.n_embd * (T or c.block_size)

"""The network: GPT-2's, with nanoGPT's parameter names, or Qwen3's shape; its loss, its cache, its optimizers.

    model = GPT(GPTConfig(n_layer=12, n_head=6, n_embd=384, bias=False))
    loss = model(inputs, targets)

Two small blocks, one trunk. GPT2Block is what nanoGPT trains; Qwen3Block is the newer recipe, in exactly the shape of
transformers' Qwen3, so that other programs run its weights.
One vocabulary of letters: B batch, T time, C channels (n_embd), H heads, D head size, V vocabulary, L layers.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

GPT2_IDS = 50257  # what GPT-2's tokenizer knows; the rows of the embedding past it are padding, never sampled
IGNORE = -100  # a target that does not count, as in torch's own cross entropy
ROPE_THETA = 10_000.0  # slowest rotation: 2 pi x 10,000 tokens, ample for contexts of a few thousand
NORM_EPS = 1e-6  # of RMSNorm, as in Qwen3
CACHED_ROWS = 64  # of float32 logits: 13 MB with GPT-2's vocabulary


class ModelError(ValueError):
    """A network that cannot be: which key, which value, why, what to do."""


@dataclass(frozen=True)
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304  # 50257 padded up to a multiple of 64, the tile of the matrix units
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in the linear layers and LayerNorms, as in GPT-2
    gelu: str = "tanh"  # "tanh": GPT-2's approximation; "none": exact, which nanoGPT's checkpoints were trained with
    arch: str = "gpt2"  # or "qwen3", which has neither biases nor GELU

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise ModelError(f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}; change one of them")
        if self.gelu not in ("tanh", "none"):
            raise ModelError(f"gelu={self.gelu!r} is not known; it is 'tanh' (GPT-2's) or 'none' (exact)")
        if self.arch not in ("gpt2", "qwen3"):
            raise ModelError(f"arch={self.arch!r} is not known; it is 'gpt2' or 'qwen3'")
        if self.arch == "qwen3" and (self.bias or self.n_embd // self.n_head % 2):
            raise ModelError("arch='qwen3' has no biases and heads of an even size: set bias=False and n_head to fit")

    @property
    def n_inner(self):
        """Width inside the MLP. qwen3: three matrices of 8/3 C, as many parameters as GPT-2's two of 4 C."""
        return 4 * self.n_embd if self.arch == "gpt2" else 64 * math.ceil(8 * self.n_embd / 3 / 64)


class Cache:
    """Keys and values of the tokens so far, (L, B, H, T, D) each, preallocated; `filled` columns of T are in use."""

    def __init__(self, keys, values):
        self.keys, self.values, self.filled = keys, values, 0

    def append(self, layer, k, v):
        """Stores k and v (B, H, T, D) of new columns -> those of all columns so far. hidden() moves `filled` on."""
        end = self.filled + k.shape[2]
        self.keys[layer, :, :, self.filled : end] = k
        self.values[layer, :, :, self.filled : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


@dataclass
class Context:
    """What the attention of all layers shares: who may see whom, rotary angles, the cache."""

    mask: torch.Tensor | None = None  # (B or 1, 1, T, all columns), True where attention is allowed; None: causal
    angles: tuple | None = None  # cos and sin (B or 1, 1, T, D) of qwen3
    cache: Cache | None = None

    def attend(self, q, k, v, layer, dropout):
        """q, k, v (B, H, T, D) -> (B, T, C)."""
        if self.cache is not None:
            k, v = self.cache.append(layer, k, v)
        causal = self.mask is None and q.shape[2] > 1  # a single query sees all that there is
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


class GPT2Block(nn.Module):
    """Radford et al. 2019: LayerNorm before attention and MLP, GELU."""

    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = GPT2Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = GPT2MLP(config)

    def forward(self, x, context):
        x = x + self.attn(self.ln_1(x), context)
        return x + self.mlp(self.ln_2(x))


class Qwen3Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        C, D = config.n_embd, config.n_embd // config.n_head
        self.n_head, self.dropout, self.layer = config.n_head, config.dropout, layer
        self.q, self.k, self.v = (nn.Linear(C, C, bias=False) for _ in range(3))  # apart: Muon takes one matrix each
        self.q_norm, self.k_norm = nn.RMSNorm(D, eps=NORM_EPS), nn.RMSNorm(D, eps=NORM_EPS)
        self.c_proj = nn.Linear(C, C, bias=False)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, context):
        q, k, v = (linear(x).unflatten(2, (self.n_head, -1)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        q, k = rotate(self.q_norm(q.float()), context.angles), rotate(self.k_norm(k.float()), context.angles)
        q, k = q.to(v.dtype), k.to(v.dtype)  # (B, H, T, D)
        y = context.attend(q, k, v, self.layer, self.dropout if self.training else 0.0)
        return self.resid_dropout(self.c_proj(y))


def rotate(x, angles):
    """Rotary positions (Su et al. 2021, arXiv 2104.09864): x (B, H, T, D) turned by cos and sin, halves as pairs."""
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


class Qwen3Block(nn.Module):
    """Qwen3 (Yang et al. 2025, arXiv 2505.09388): RMSNorm, normalised queries and keys, rotary positions, gated MLP."""

    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.RMSNorm(config.n_embd, eps=NORM_EPS)
        self.attn = Qwen3Attention(config, layer)
        self.ln_2 = nn.RMSNorm(config.n_embd, eps=NORM_EPS)
        self.mlp = Qwen3MLP(config)

    def forward(self, x, context):
        x = x + self.attn(self.ln_1(x), context)
        return x + self.mlp(self.ln_2(x))


def chunk_rows(rows, V, device_type):
    """How many rows of logits are made at a time: on a card as few as keep it busy, on a CPU as few as make the sum
    over chunks of the head's gradient cheap. Chunks are of equal size, but for the last."""
    logits = 2**26 if device_type == "cpu" else 2**27
    chunks = math.ceil(rows * V / logits)
    return math.ceil(rows / chunks)


def token_losses(x, weight, targets):
    """x (N, C), weight (V, C), targets (N,) -> cross entropy (N,) in float32, 0 where the target is -100."""
    losses = []
    for h, t in zip(*(z.split(chunk_rows(len(x), len(weight), x.device.type)) for z in (x, targets)), strict=True):
        losses.append(F.cross_entropy(F.linear(h, weight).float(), t, reduction="none", ignore_index=IGNORE))
    return torch.cat(losses)


def logit_gradients(h, w, t, n):
    """h (rows, C), w (V, C), targets t and their counts n (rows, 1) -> the sum of their losses in float32, and softmax
    minus one-hot (rows, V) in h's dtype.

    A CPU makes 16-bit ones in pieces whose float32 logits stay in its cache: a fifth less time for the head.
    """
    pieces = h.device.type == "cpu" and h.dtype != torch.float32 and not torch.compiler.is_compiling()
    if pieces and len(h) > CACHED_ROWS:
        losses, g = [], torch.empty(len(h), len(w), dtype=h.dtype)
        for out, *piece in zip(*(z.split(CACHED_ROWS) for z in (g, h, t, n)), strict=True):
            loss, out[:] = logit_gradients(piece[0], w, *piece[1:])
            losses.append(loss)
        return torch.stack(losses).sum(), g
    logp = torch.log_softmax(h @ w.t(), dim=1, dtype=torch.float32)  # (rows, V)
    loss = -(logp.gather(1, t) * n).sum()
    return loss, logp.exp_().scatter_add_(1, t, torch.full_like(n, -1.0)).to(h.dtype)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross entropy of a linear head, x (N, C) and weight (V, C) and targets (N,) -> float32 scalar, in chunks.

    Forward already computes both gradients, chunk by chunk: softmax minus one-hot, in `dtype`, times weight or x. They
    are kept without the factor 1 / N, the weight's in float32: with it most of softmax would be zero in float16.
    GradScaler's factor and 1 / N come in backward. (The idea of computing them in forward is that of Liger Kernel,
    Hsu et al. 2024, arXiv 2410.10989.)
    """

    @staticmethod
    def forward(ctx, x, weight, targets, dtype):
        inputs, w = x.to(dtype), weight.to(dtype)
        counts = (targets != IGNORE).float()[:, None]  # (N, 1)
        rows = chunk_rows(len(x), len(weight), x.device.type)
        loss = torch.zeros((), device=x.device)
        grad_x, grad_weight = [], torch.zeros_like(weight, dtype=torch.float32)
        for h, t, n in zip(inputs.split(rows), targets.split(rows), counts.split(rows), strict=True):
            chunk_loss, g = logit_gradients(h, w, t.clamp(min=0)[:, None], n)
            loss += chunk_loss
            grad_x.append((g @ w) * n.to(dtype))
            grad_weight += g.t() @ (h * n.to(dtype))
        count = counts.sum()
        ctx.save_for_backward(torch.cat(grad_x), grad_weight, count)
        ctx.dtypes = x.dtype, weight.dtype
        return loss / count

    @staticmethod
    def backward(ctx, grad_loss):
        grad_x, grad_weight, count = ctx.saved_tensors
        factor = grad_loss / count
        x_dtype, weight_dtype = ctx.dtypes
        return (grad_x.float() * factor).to(x_dtype), (grad_weight * factor).to(weight_dtype), None, None


class GPT(nn.Module):
    """A decoder with its output head tied to the embedding; learned positions for gpt2, rotary ones for qwen3."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False  # True: keep a block's input only, compute the rest again in backward
        gpt2 = config.arch == "gpt2"
        parts = dict(wte=nn.Embedding(config.vocab_size, config.n_embd))
        if gpt2:
            parts |= dict(wpe=nn.Embedding(config.block_size, config.n_embd))
        parts |= dict(drop=nn.Dropout(config.dropout))
        block = GPT2Block if gpt2 else Qwen3Block
        parts |= dict(h=nn.ModuleList(block(config, layer) for layer in range(config.n_layer)))
        norm = nn.LayerNorm(config.n_embd, bias=config.bias) if gpt2 else nn.RMSNorm(config.n_embd, eps=NORM_EPS)
        self.transformer = nn.ModuleDict(parts | dict(ln_f=norm))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        self.init_weights()

    def init_weights(self):
        """gpt2: normal, 0.02, and smaller where 2 x n_layer branches add up in the residual stream (GPT-2's paper).

        qwen3: branches begin at zero. Then a token's embedding reaches the tied head alone, and with 0.02 it would
        predict itself with a logit of 0.02 C; with 0.005 the first loss is that of even odds.
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

    def new_cache(self, batch, length):
        """-> an empty Cache for `batch` sequences of up to `length` tokens (at most block_size)."""
        c, weight = self.config, self.transformer.wte.weight
        shape = (c.n_layer, batch, c.n_head, length, c.n_embd // c.n_head)
        return Cache(*(torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in range(2)))

    def hidden(self, idx, cache=None, pads=None):
        """idx (B, T) of int64 -> what the output head reads, (B, T, C).

        With a cache the T columns go behind the cache.filled columns that it holds, and are added to it. pads (B,) of
        int64: so many columns on the left of a sequence are padding, which nobody sees; a token's position is its
        column less the pads. All columns together are at most block_size.
        """
        first = cache.filled if cache is not None else 0
        T = idx.shape[1]
        if first + T > self.config.block_size:
            raise ModelError(f"{first + T} tokens are more than block_size={self.config.block_size}; cut them")
        columns = torch.arange(first, first + T, device=idx.device)
        positions = columns if pads is None else (columns - pads[:, None]).clamp(min=0)  # (T,) or (B, T)
        context = Context(self.visible(columns, first + T, pads), None, cache)
        x = self.transformer.wte(idx)  # (B, T, C)
        if self.config.arch == "gpt2":
            x = x + self.transformer.wpe(positions)
        else:
            context.angles = self.rotary_angles(positions)
        x = self.transformer.drop(x)
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        for block in self.transformer.h:
            x = checkpoint(block, x, context, use_reentrant=False) if recompute else block(x, context)
        if cache is not None:
            cache.filled += T
        return self.transformer.ln_f(x)

    @staticmethod
    def visible(columns, total, pads):
        """-> the attention mask (B or 1, 1, T, total) of new columns, or None where plain causality says the same."""
        if pads is None and (total == len(columns) or len(columns) == 1):
            return None
        keys = torch.arange(total, device=columns.device)
        mask = keys <= columns[:, None]  # (T, total)
        if pads is not None:  # a padding column sees itself, so that its softmax is a number
            mask = mask & (keys >= pads[:, None, None]) | (keys == columns[:, None])  # (B, T, total)
        return mask.view(-1, 1, len(columns), total)

    def rotary_angles(self, positions):
        """positions (T,) or (B, T) -> cos and sin, (1 or B, 1, T, D), in float32."""
        D = self.config.n_embd // self.config.n_head
        turns = ROPE_THETA ** (-torch.arange(0, D, 2, device=positions.device, dtype=torch.float32) / D)
        angles = positions[..., None].float() * turns  # (T, D / 2) or (B, T, D / 2)
        angles = torch.cat((angles, angles), dim=-1).view(-1, 1, positions.shape[-1], D)
        return angles.cos(), angles.sin()

    def head(self, x):
        """x (..., C) -> logits (..., V) in float32 (or wider) of the ids that the tokenizer knows: no padding rows."""
        logits = self.lm_head(x)[..., :GPT2_IDS]
        return logits if logits.dtype == torch.float64 else logits.float()

    def forward(self, idx, targets=None, reduction="mean"):
        """idx (B, T) of int64 -> logits (B, T, V); with targets (B, T) the cross entropy in nats instead.

        The loss is float32: a scalar, the mean over the targets, or (B, T) with reduction="none". Targets of -100 do
        not count. At most one chunk of logits exists at a time.
        """
        x = self.hidden(idx)  # (B, T, C)
        if targets is None:
            return self.lm_head(x)
        x, flat = x.flatten(0, 1), targets.flatten()
        if reduction == "none":
            return token_losses(x, self.lm_head.weight, flat).view_as(targets)
        if not torch.is_grad_enabled():
            return token_losses(x, self.lm_head.weight, flat).sum() / (flat != IGNORE).sum()
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        return ChunkedCrossEntropy.apply(x, self.lm_head.weight, flat, dtype)

    def num_params(self, positions=True):
        """Number of trained numbers; the tied embedding counts once. Papers often leave the positions out."""
        n = sum(p.numel() for p in self.parameters())
        if not positions and self.config.arch == "gpt2":
            n -= self.transformer.wpe.weight.numel()
        return n

    def flops_per_token(self, T=None):
        """Floating-point operations of forward and backward for one token in a sequence of T (default block_size).

        Counted as PaLM does (Chowdhery et al. 2022, appendix B): 6 for each parameter that is multiplied (positions
        are only added, the tied embedding counts once: as head), and 12 x n_layer x C x T for attention's two
        products, without a rebate for the causal mask. Norms, softmax and recomputation are not counted.
        """
        c = self.config
        return 6 * self.num_params(positions=False) + 12 * c.n_layer * c.n_embd * (T or c.block_size)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type, optimizer="adamw"):
        """-> list of optimizers: AdamW (Loshchilov & Hutter 2019), and with optimizer="muon" Muon before it.

        Matrices and embeddings decay, vectors do not. Muon (Jordan et al. 2024) takes the 2-D weights inside the
        blocks, at AdamW's own rate (match_rms_adamw: Liu et al. 2025, arXiv 2502.16982). Groups keep the order of
        named_parameters, so that a resumed optimizer meets the same tensors.
        """
        if optimizer == "muon" and self.config.arch == "gpt2":
            raise ModelError(
                "optimizer='muon' needs arch='qwen3': GPT-2's query, key and value are one matrix, and Muon would "
                "orthogonalise them together"
            )
        trained = [
            (name, p) for name, p in self.named_parameters() if p.requires_grad
        ]  # a tied tensor stands here once
        muon = [p for name, p in trained if optimizer == "muon" and p.dim() == 2 and ".h." in name]
        taken = {id(p) for p in muon}
        rest = [p for _, p in trained if id(p) not in taken]
        groups = [
            dict(params=[p for p in rest if p.dim() >= 2], weight_decay=weight_decay),
            dict(params=[p for p in rest if p.dim() < 2], weight_decay=0.0),
        ]
        groups = [group for group in groups if group["params"]]
        fused = device_type in ("cuda", "mps", "cpu")
        adamw = torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)
        if not muon:
            return [adamw]
        rms = dict(adjust_lr_fn="match_rms_adamw")
        return [torch.optim.Muon(muon, lr=learning_rate, weight_decay=weight_decay, momentum=0.95, **rms), adamw]

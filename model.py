"""The network: GPT-2's, with nanoGPT's parameter names; its loss, its optimizer groups, its generation.

    model = GPT(GPTConfig(n_layer=12, n_head=12, n_embd=384, bias=False))
    loss = model(inputs, targets)

One vocabulary of letters: B batch, T time, C channels (n_embd), H heads, D head size, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

GPT2_IDS = 50257  # what GPT-2's tokenizer knows; the rows of the embedding past it are padding, never sampled
IGNORE = -100  # a target that does not count, as in torch's own cross entropy


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

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise ModelError(f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}; change one of them")
        if self.gelu not in ("tanh", "none"):
            raise ModelError(f"gelu={self.gelu!r} is not known; it is 'tanh' (GPT-2's) or 'none' (exact)")


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # (B, H, T, D)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gelu = config.gelu
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate=self.gelu)))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
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
            t = t.clamp(min=0)[:, None]
            logp = torch.log_softmax(h @ w.t(), dim=1, dtype=torch.float32)  # (rows, V)
            loss -= (logp.gather(1, t) * n).sum()
            g = logp.exp_().scatter_add_(1, t, torch.full_like(n, -1.0)).to(dtype)  # softmax minus one-hot
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
    """GPT-2's decoder (Radford et al. 2019): pre-LayerNorm, learned positions, output head tied to the embedding."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False  # True: keep a block's input only, compute the rest again in backward
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                wpe=nn.Embedding(config.block_size, config.n_embd),
                drop=nn.Dropout(config.dropout),
                h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
            )
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        self.apply(self._init_weights)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):  # 2 x n_layer branches add up in the residual stream
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))

    @staticmethod
    def _init_weights(module):
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def hidden(self, idx):
        """idx (B, T) of int64, T <= block_size -> what the output head reads, (B, T, C)."""
        T = idx.shape[1]
        if T > self.config.block_size:
            raise ModelError(f"a sequence of {T} tokens is longer than block_size={self.config.block_size}; cut it")
        x = self.transformer.wte(idx) + self.transformer.wpe.weight[:T]  # (B, T, C)
        x = self.transformer.drop(x)
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        for block in self.transformer.h:
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        return self.transformer.ln_f(x)

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
        return n if positions else n - self.transformer.wpe.weight.numel()

    def flops_per_token(self, T=None):
        """Floating-point operations of forward and backward for one token in a sequence of T (default block_size).

        Counted as PaLM does (Chowdhery et al. 2022, appendix B): 6 for each parameter that is multiplied (positions
        are only added, the tied embedding counts once: as head), and 12 x n_layer x C x T for attention's two
        products, without a rebate for the causal mask. Norms, softmax and recomputation are not counted.
        """
        c = self.config
        return 6 * self.num_params(positions=False) + 12 * c.n_layer * c.n_embd * (T or c.block_size)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        """AdamW (Loshchilov & Hutter 2019) in two groups: matrices and embeddings decay, vectors do not.

        Groups keep the order of named_parameters, so that a resumed optimizer meets the same tensors.
        """
        trained = [p for p in self.parameters() if p.requires_grad]  # a tied tensor stands here once
        groups = [
            dict(params=[p for p in trained if p.dim() >= 2], weight_decay=weight_decay),
            dict(params=[p for p in trained if p.dim() < 2], weight_decay=0.0),
        ]
        groups = [group for group in groups if group["params"]]
        fused = device_type in ("cuda", "mps", "cpu")
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=0, stop_id=None, generator=None):
        """idx (1, T), T >= 1 -> idx with up to max_new_tokens ids behind it; ends early after stop_id.

        temperature 0 takes the likeliest id; top_k > 0 draws among the k likeliest only. The context is the last
        block_size ids. Ids past GPT-2's 50257 are padding and are never drawn.
        """
        for _ in range(max_new_tokens):
            hidden = self.hidden(idx[:, -self.config.block_size :])
            logits = self.lm_head(hidden[:, -1]).float()[:, :GPT2_IDS]  # (1, V)
            if temperature == 0:
                next_id = logits.argmax(-1, keepdim=True)
            else:
                logits = logits / temperature
                if top_k:
                    kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                    logits = logits.masked_fill(logits < kth, -math.inf)
                next_id = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            idx = torch.cat((idx, next_id), dim=1)
            if stop_id is not None and next_id.item() == stop_id:
                break
        return idx

"""Generates text with a network, token by token, and measures the loss of a given text.

    for new_ids in stream(model, [prompt], max_new_tokens=100, temperature=0.8, seeds=[1]): ...
    rows = generate(model, [prompt, another], max_new_tokens=100, stop_id=50256)
    loss = score(model, ids, prefix_id=50256).mean()

The one thing to know: what the network reads of a long sequence depends on its length alone (see `window_start`), so
a text is the same alone and in a batch. Letters in shapes are those of model.py.
"""

import math
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

from model import GPT, IGNORE
from onecard import UserError

COLUMNS = 256  # a compiled step's cache has a multiple of so many: few shapes, each compiled once


def logits_to_probs(
    logits: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> torch.Tensor:
    """Logits (B, V) -> probabilities (B, V) in float64, for a temperature above 0. Removed ids get 0.

    The filters run in transformers' order: the k likeliest ids (and ties), then `keep_top_p`, then `min_p`.
    """
    logits = (logits.cpu() if logits.device.type == "mps" else logits).double()  # mps has no float64
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # at most 0: no temperature overflows exp
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p < 1:
        logits = keep_top_p(logits, top_p)
    if min_p:  # ids at least min_p times as likely as the likeliest (Nguyen et al. 2024, arXiv 2407.01082)
        probs = logits.softmax(-1)
        logits = logits.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), -math.inf)
    return logits.softmax(-1)


def keep_top_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Keeps the fewest likeliest ids whose probabilities sum to p or more (Holtzman et al. 2020), and their ties."""
    probs, V = logits.softmax(-1), logits.shape[-1]
    descending = probs.topk(min(2048, V)).values  # mostly enough, and much faster than sorting all
    if descending.sum(-1).min() < p:
        descending = probs.topk(V).values
    likelier = descending.cumsum(-1) - descending  # the summed probability of all likelier ids
    kept = (likelier < p).sum(-1, keepdim=True).clamp(min=1)  # (B, 1)
    return logits.masked_fill(probs < descending.gather(1, kept - 1), -math.inf)


def sample(probs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """probs (B, V), uniform (B,) in [0, 1) -> ids (B,): the first whose cumulative probability exceeds the number."""
    sums = probs.cumsum(-1)  # in the order of ids: if sorted by likelihood, a rounding error could swap neighbours
    bound = uniform[:, None] * (1 - 2**-50) * sums[:, -1:]  # below the last sum, so no id of probability 0 is drawn
    return torch.searchsorted(sums, bound, right=True)[:, 0]


def next_ids(logits: torch.Tensor, generators: list[torch.Generator], temperature: float = 1.0, **filters) -> list[int]:
    """Logits (B, V) -> B ids: the likeliest at temperature 0, else sampled with one number from each generator."""
    finite = logits.sum().isfinite()  # looked at last, so that a step waits for the device once
    if temperature == 0:
        ids = logits.argmax(-1).tolist()
    else:
        probs = logits_to_probs(logits, temperature, **filters)
        uniform = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in generators])
        ids = sample(probs, uniform.to(probs.device)).tolist()
    if not finite:
        raise UserError("the logits are not finite: too large for this dtype (try float32), or a broken network")
    return ids


def window_start(length: int, block_size: int) -> int:
    """How many ids at the beginning of a sequence of `length` ids the network does not read.

    A window grows to block_size ids, is cut to its last block_size // 2 ids, and grows again. A cut gives all ids new
    positions, so all are computed again: here once in about block_size / 2 tokens, in nanoGPT at every token.
    """
    if length <= block_size:
        return 0
    period = block_size - max(1, block_size // 2) + 1
    return math.ceil((length - block_size) / period) * period


class Cache:
    """Keys and values of the tokens so far, (L, B, H, T, D) each, preallocated; the first `filled` columns count."""

    def __init__(self, model: GPT, batch: int, length: int):
        """Empty, for `batch` sequences of up to `length` tokens (at most block_size)."""
        c, weight = model.config, model.lm_head.weight
        shape = (c.n_layer, batch, c.n_head, length, c.n_embd // c.n_head)
        self.keys, self.values = (torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in range(2))
        self.filled = 0

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor, column=None) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores k and v (B, H, T, D) of the new columns and returns those of all columns. GPT.hidden sets `filled`.

        column (1,): the new column as a tensor. Then all columns are returned: the same shapes at each step.
        """
        if column is not None:
            self.keys[layer].index_copy_(2, column, k)
            self.values[layer].index_copy_(2, column, v)
            return self.keys[layer], self.values[layer]
        end = self.filled + k.shape[2]
        self.keys[layer, :, :, self.filled : end] = k
        self.values[layer, :, :, self.filled : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


@dataclass
class DecodeState:
    """What the network has read: row r of the cache holds sequence rows[r], after pads[r] columns of padding."""

    cache: Cache
    rows: list[int]
    pads: torch.Tensor | None  # (B,), or None if no row is padded


def prefill(model, sequences, alive, length):
    """Reads the whole windows of the sequences `alive`. Returns a DecodeState, whose cache has so many columns, or as
    many as the windows need, and the logits (B, V) of the next ids."""
    block_size, device = model.config.block_size, model.lm_head.weight.device
    windows = [sequences[i][window_start(len(sequences[i]), block_size) :] for i in alive]
    longest = max(map(len, windows))
    padding = [longest - len(window) for window in windows]
    idx = torch.tensor([[0] * n + window for n, window in zip(padding, windows, strict=True)], device=device)  # (B, T)
    pads = torch.tensor(padding, device=device) if any(padding) else None
    cache = Cache(model, len(alive), max(longest, min(block_size, length)))
    return DecodeState(cache, alive, pads), model.head(model.hidden(idx, cache, pads)[:, -1])


def decode_one_token(model, sequences, alive, state, compiled_step):
    """Reads the last id of each sequence in the state. Returns the logits of the next ids of those `alive` (B, V)."""
    device = model.lm_head.weight.device
    idx = torch.tensor([sequences[i][-1:] for i in state.rows], device=device)  # (B, 1)
    if compiled_step:
        column = torch.full((1,), state.cache.filled, device=device)
        state.cache.filled += 1
        try:
            logits = compiled_step(model, idx, state.cache, state.pads, column)
        except torch._dynamo.exc.TorchDynamoException as error:  # a compiler is missing, for example
            raise UserError(f"compile failed: {str(error).splitlines()[0]}; leave out --compile") from error
    else:
        logits = step_logits(model, idx, state.cache, state.pads)
    return logits if alive == state.rows else logits[[state.rows.index(i) for i in alive]]


def step_logits(model, idx, cache, pads, column=None):
    return model.head(model.hidden(idx, cache, pads, column)[:, -1])  # (B, V)


@torch.no_grad()
def stream(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    seeds: Sequence[int] | None = None,
    stop_id: int | None = None,
    ended: set[int] | None = None,
    use_cache: bool = True,
    compile: bool = False,
    **sampling,
) -> Iterator[dict[int, int]]:
    """Yields the new ids of each step, {number of the prompt: id}, without those of sequences that have ended.

    A sequence ends after stop_id, or when the caller adds its number to `ended`. The seed of a sequence and its prompt
    (at least one id) decide its text, whatever else is in the batch, except for ties in low precision; seeds=None:
    another text each time. use_cache=False: read the whole window at each step. compile: torch.compile the step, which
    pays for long texts; on a card it becomes one CUDA graph. sampling: see `logits_to_probs`.
    """
    sequences = [list(prompt) for prompt in prompts]
    ended = set() if ended is None else ended
    seeds = [secrets.randbits(63) for _ in prompts] if seeds is None else seeds
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    state = None
    compiled_step = torch.compile(step_logits, dynamic=False, mode="reduce-overhead") if compile else None
    for step in range(max_new_tokens):
        alive = [i for i in range(len(sequences)) if i not in ended]
        if not alive:
            return
        idle = state is not None and 2 * len(alive) <= len(state.rows) and not compile  # half of it; or compiled again
        if state is None or state.cache.filled == state.cache.keys.shape[3] or idle:
            state = None  # free the cache before the next one is allocated
            longest = max(len(sequences[i]) for i in alive) + max_new_tokens - step
            length = COLUMNS * math.ceil(longest / COLUMNS) if compile else longest
            state, logits = prefill(model, sequences, alive, length if use_cache else 0)
        else:
            logits = decode_one_token(model, sequences, alive, state, compiled_step)
        ids = next_ids(logits, [generators[i] for i in alive], **sampling)
        for i, id in zip(alive, ids, strict=True):
            sequences[i].append(id)
            if id == stop_id:
                ended.add(i)
        yield dict(zip(alive, ids, strict=True))


def generate(model: GPT, prompts: Sequence[Sequence[int]], max_new_tokens: int, **options) -> list[list[int]]:
    """Like `stream`, but returns the ids at the end: each prompt, followed by its new ids."""
    sequences = [list(prompt) for prompt in prompts]
    for new_ids in stream(model, prompts, max_new_tokens, **options):
        for i, id in new_ids.items():
            sequences[i].append(id)
    return sequences


@torch.no_grad()
def score(model: GPT, ids, prefix_id: int, stride: int = 0, batch_size: int = 1) -> torch.Tensor:
    """ids (n,) of a text -> the loss of each in nats, (n,) in float64. Raises UserError.

    Windows as in lm-evaluation-harness's rolling log-likelihood: the first predicts block_size ids, each later one the
    next `stride` (at most block_size, which 0 stands for) with all context that fits. But prefix_id begins every
    window, not only the first.
    """
    block_size, device = model.config.block_size, model.lm_head.weight.device
    tokens, losses = torch.as_tensor(ids, dtype=torch.int64), []
    if len(tokens) == 0:
        raise UserError("an empty text has no loss; give a text")
    stride = min(stride or block_size, block_size)
    T = min(block_size, len(tokens))  # the length of every window
    ends = [*range(block_size, len(tokens), stride), len(tokens)]
    windows = torch.tensor([[0, *ends[:-1]], ends]).t()  # each row: first and end of the tokens that are predicted
    for batch in tqdm(windows.split(batch_size), desc="scoring", delay=5, leave=False, disable=None):
        first, end = batch.split(1, dim=1)  # (B, 1) each
        positions = end - T + torch.arange(T)  # (B, T)
        targets = tokens[positions]
        inputs = torch.cat((torch.full_like(first, prefix_id), targets[:, :-1]), dim=1)
        targets = targets.masked_fill(positions < first, IGNORE)
        loss = model(inputs.to(device), targets.to(device), reduction="none").double().cpu()  # (B, T)
        losses.append(loss[positions >= first])
    return torch.cat(losses)

"""Text from a network, one token after the other, and the loss of a text that is given.

    for ids in stream(model, [prompt], max_new_tokens=100, temperature=0.8, seeds=[1]): ...
    texts = generate(model, [prompt, another], max_new_tokens=100, stop_id=50256)
    loss = score(model, ids, prefix_id=50256).mean()

The one thing to know: what the network reads of a long sequence is a function of the sequence's length alone (see
`window_start`), so that a text is the same with and without the cache, alone and in a batch.
"""

import math

import torch
from tqdm import tqdm

IGNORE = -100  # the target that model.forward does not count


class GenerationError(ValueError):
    """Text that cannot be made or scored: why, what to do."""


# ---- from logits to a token. (B, V) in, (B, V) out, in float64; each step as transformers' *LogitsWarper has it, in
# ---- the same order: temperature, top-k, top-p, min-p. Whatever the steps, the likeliest token stays.


def scale(logits, temperature):
    """logits / temperature, less the largest: softmax is the same, and no temperature is so small as to overflow."""
    return (logits - logits.amax(-1, keepdim=True)) / temperature


def keep_top_k(logits, k):
    """Only what is at least as likely as the k-th likeliest stays (more than k tokens, if there are ties)."""
    kth = logits.topk(min(k, logits.shape[-1])).values[:, -1:]
    return logits.masked_fill(logits < kth, -math.inf)


def keep_top_p(logits, p):
    """Only the fewest likeliest tokens whose probabilities add up to p or more stay (Holtzman et al. 2020), and those
    that are as likely as the last of them: transformers drops some of these, as its sort happens to place them."""
    share = logits.softmax(-1)
    for k in (min(2048, share.shape[-1]), share.shape[-1]):  # they are few, mostly: to sort all takes long
        descending = share.topk(k).values
        if descending.sum(-1).min() >= p:
            break
    kept = (descending.cumsum(-1) - descending < p).sum(-1, keepdim=True)  # those before whom p is not reached
    return logits.masked_fill(share < descending.gather(1, (kept - 1).clamp(min=0)), -math.inf)


def keep_min_p(logits, share):
    """Only what is at least `share` times as likely as the likeliest stays (Nguyen et al. 2024, arXiv 2407.01082)."""
    p = logits.softmax(-1)
    return logits.masked_fill(p < share * p.amax(-1, keepdim=True), -math.inf)


def probabilities(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """logits (B, V) -> probabilities (B, V) in float64; temperature > 0; top_k=0, top_p=1, min_p=0 keep all."""
    logits = scale((logits.cpu() if logits.device.type == "mps" else logits).double(), temperature)  # mps: no float64
    if top_k:
        logits = keep_top_k(logits, top_k)
    if top_p < 1:
        logits = keep_top_p(logits, top_p)
    if min_p:
        logits = keep_min_p(logits, min_p)
    return logits.softmax(-1)


def draw(p, uniform):
    """p (B, V), uniform (B,) in [0, 1) -> ids (B,): where the cumulative sum, in the order of ids, passes the draw.

    In that order rounding errors of the logits hardly move any bound; sorted by likelihood they would swap neighbours.
    """
    sums = p.cumsum(-1)  # (B, V)
    reach = uniform[:, None] * (1 - 2**-50) * sums[:, -1:]  # below the last sum: an id of probability 0 is never drawn
    return torch.searchsorted(sums, reach, right=True)[:, 0]


def choose(logits, generators, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """logits (B, V) -> list of B ids: the likeliest at temperature 0, else by one uniform draw from each generator."""
    if temperature == 0:
        ids = logits.argmax(-1)
    else:
        p = probabilities(logits, temperature, top_k, top_p, min_p)
        uniform = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in generators])
        ids = draw(p, uniform.to(p.device))
    finite = logits.sum(-1).isfinite().to(ids.device)
    ids = ids.where(finite, -1).tolist()  # the one wait for the device in a step
    if -1 in ids:
        raise GenerationError("the logits are not finite: too large for this dtype (try float32), or a broken network")
    return ids


# ---- token after token


def window_start(length, block_size):
    """How many ids at the beginning of a sequence of `length` ids the network no longer reads.

    It reads all of up to block_size ids. A window that would outgrow that is cut to its last block_size // 2 ids, whose
    positions then begin at 0 again, and grows anew. nanoGPT drops one id for every new one: then each position changes
    at each step, and all has to be computed again for each token; here it is once in about block_size / 2 tokens.
    """
    if length <= block_size:
        return 0
    period = block_size - max(1, block_size // 2) + 1
    return math.ceil((length - block_size) / period) * period


def left_padded(rows, device):
    """[[id]] -> idx (B, T) of int64, and the number of columns (B,) that pad each on the left, None if none does."""
    longest = max(map(len, rows))
    idx = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)
    pads = [longest - len(row) for row in rows]
    return idx, torch.tensor(pads, device=device) if any(pads) else None


class Reader:
    """Reads sequences that grow by a token at a time: into a cache, and anew where that is full, or half of it idle."""

    def __init__(self, model, use_cache):
        self.model, self.use_cache = model, use_cache
        self.cache, self.pads, self.rows, self.room = None, None, [], 0  # rows: the numbers of the sequences in it

    def read(self, sequences, alive, to_come):
        """-> what the head reads behind the last id of each of the sequences `alive`, (B, C)."""
        embedding, block_size = self.model.transformer.wte.weight, self.model.config.block_size
        if self.cache is None or self.cache.filled == self.room or 2 * len(alive) <= len(self.rows):
            self.rows, self.cache = alive, None  # the memory of the old one is free before the new one takes its own
            windows = [sequences[i][window_start(len(sequences[i]), block_size) :] for i in alive]
            idx, self.pads = left_padded(windows, embedding.device)
            self.room = min(block_size, idx.shape[1] + to_come)
            self.cache = self.model.new_cache(len(alive), self.room) if self.use_cache else None
        else:
            idx = torch.tensor([sequences[i][-1:] for i in self.rows], device=embedding.device)
        last = self.model.hidden(idx, self.cache, self.pads)[:, -1]
        return last if alive == self.rows else last[[self.rows.index(i) for i in alive]]


@torch.no_grad()
def stream(model, prompts, max_new_tokens, seeds=None, stop_id=None, use_cache=True, ended=None, **sampling):
    """Yields, a step at a time, the new id of each sequence: [int, or None for one that has ended].

    prompts: lists of ids, of any lengths from 1 on. A sequence ends behind stop_id, behind max_new_tokens, or when the
    caller has put its number into the set `ended`. sampling: temperature, top_k, top_p, min_p (see `choose`). seeds: an
    int for each sequence, which together with its prompt decides its text, whatever else is in the batch (but for ties
    in low precision); None: another text each time.
    """
    if not all(map(len, prompts)):
        raise GenerationError("a prompt without any token cannot be continued; begin it with <|endoftext|>")
    sequences, ended = [list(prompt) for prompt in prompts], set() if ended is None else ended
    generators = [torch.Generator() for _ in prompts]
    for i, generator in enumerate(generators):
        generator.manual_seed(seeds[i]) if seeds is not None else generator.seed()
    reader = Reader(model, use_cache)
    for step in range(max_new_tokens):
        alive = [i for i in range(len(sequences)) if i not in ended]
        if not alive:
            return
        logits = model.head(reader.read(sequences, alive, max_new_tokens - step))
        new = dict(zip(alive, choose(logits, [generators[i] for i in alive], **sampling), strict=True))
        for i, id in new.items():
            sequences[i].append(id)
        ended |= {i for i, id in new.items() if id == stop_id}
        yield [new.get(i) for i in range(len(sequences))]


def generate(model, prompts, max_new_tokens, **options):
    """As `stream`, all at once -> [[id]]: each prompt and what was made behind it."""
    sequences = [list(prompt) for prompt in prompts]
    for ids in stream(model, prompts, max_new_tokens, **options):
        for sequence, id in zip(sequences, ids, strict=True):
            if id is not None:
                sequence.append(id)
    return sequences


def sample_texts(model, tokenizer, n=3, max_new_tokens=100, temperature=0.8, top_k=200, seed=1337):
    """-> n texts that begin as documents do: what a run shows of itself. The same seeds each time, so that one sees the
    same beginning grow better. Training notices nothing: no shared random generator is used, and its mode is restored.
    """
    training = model.training
    model.eval()
    try:
        options = dict(temperature=temperature, top_k=top_k, stop_id=tokenizer.eot)
        rows = generate(model, [[tokenizer.eot]] * n, max_new_tokens, seeds=range(seed, seed + n), **options)
    finally:
        model.train(training)
    return [tokenizer.decode([id for id in row if id != tokenizer.eot]) for row in rows]


# ---- the loss of a text


def score_windows(n, block_size, stride):
    """[(begin, first, end)]: ids[first:end] are predicted, from <|endoftext|> and ids[begin : end - 1].

    Each of n ids is predicted once. The first window predicts block_size ids, each later one the next `stride`, on
    all the context that fits, the last one the rest. With stride = block_size windows are disjoint but for the last.
    """
    end = min(n, block_size)
    windows = [(0, 0, end)]
    while end < n:
        first, end = end, min(n, end + stride)
        windows.append((end - block_size, first, end))
    return windows


@torch.no_grad()
def score(model, ids, prefix_id, stride=0, batch_size=1):
    """ids (n,) of a text -> the loss of each, in nats, (n,) in float64.

    Windows are those of lm-evaluation-harness's rolling log-likelihood (stride 0: block_size; a smaller stride gives
    each id at least block_size - stride ids of context), but for one id: each window is led by prefix_id, as each
    document in training was, where the harness leads only the first by it and the others by the id before them.
    """
    block_size, device = model.config.block_size, model.transformer.wte.weight.device
    ids = torch.as_tensor(ids, dtype=torch.int64)
    if len(ids) == 0:
        raise GenerationError("an empty text has no loss")
    if not 0 <= stride <= block_size:
        raise GenerationError(f"stride={stride} is not 1 to block_size={block_size}, or 0, which is block_size")
    windows, losses = score_windows(len(ids), block_size, stride or block_size), []
    for i in tqdm(range(0, len(windows), batch_size), desc="scoring", delay=5, leave=False, disable=None):
        targets = torch.stack([ids[begin:end] for begin, _, end in windows[i : i + batch_size]])  # (B, T)
        inputs = torch.cat((torch.full_like(targets[:, :1], prefix_id), targets[:, :-1]), dim=1)
        counts = torch.tensor([[end - first] for _, first, end in windows[i : i + batch_size]])
        counted = torch.arange(targets.shape[1]) >= targets.shape[1] - counts
        targets = targets.masked_fill(~counted, IGNORE)
        loss = model(inputs.to(device), targets.to(device), reduction="none").double().cpu()
        losses.append(loss[counted])
    return torch.cat(losses)

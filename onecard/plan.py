"""What a run will cost and should reach, as pure numbers: memory, hours, loss, the forecast of its end; the GPU table.

train.py shows it at its start (alone with --plan_only=True), report.py sets it beside what came:

    lines = plan.lines(plan.plan(config, train_tokens=10**10, val_tokens=10**7, card="RTX 4070"))

`config` is train.py's, or anything with the same attributes. The one thing to know: where no figure carries a
prediction there is none, and the reason is said instead. No torch here, and nothing of ours.
"""

import math
from types import SimpleNamespace

GiB = 2**30
# Dense 16-bit matrix products with 32-bit accumulation, in TFLOPS; the number of multiprocessors (SMs), which tells
# apart two cards of one name; memory in GiB (the smaller where a card is sold with two sizes). GeForce: the vendor's
# architecture whitepapers (GA102 2020, Ada 2022, Blackwell 2025) and, for cards they leave out, their rule: SMs x 512
# FLOP a clock x boost clock. Others: vendor's datasheets.
CARDS = {
    "RTX 3060": (28, 25.5, 12),
    "RTX 3060 Ti": (38, 32.4, 8),
    "RTX 3070": (46, 40.6, 8),
    "RTX 3070 Ti": (48, 43.5, 8),
    "RTX 3080": (68, 59.5, 10),
    "RTX 3080 Ti": (80, 68.2, 12),
    "RTX 3090": (82, 71.0, 24),
    "RTX 3090 Ti": (84, 80.0, 24),
    "RTX 4060": (24, 30.2, 8),
    "RTX 4060 Ti": (34, 44.1, 8),
    "RTX 4070": (46, 58.3, 12),
    "RTX 4070 SUPER": (56, 71.0, 12),
    "RTX 4070 Ti": (60, 80.2, 12),
    "RTX 4070 Ti SUPER": (66, 88.2, 16),
    "RTX 4080": (76, 97.5, 16),
    "RTX 4080 SUPER": (80, 104.4, 16),
    "RTX 4090": (128, 165.2, 24),
    "RTX 5060": (30, 38.4, 8),
    "RTX 5060 Ti": (36, 47.4, 8),
    "RTX 5070": (48, 61.7, 12),
    "RTX 5070 Ti": (70, 87.9, 16),
    "RTX 5080": (84, 112.6, 16),
    "RTX 5090": (170, 209.5, 32),
    "A10": (72, 125.0, 24),
    "A100": (108, 312.0, 40),
    "H100": (132, 989.0, 80),  # SXM; the PCIe card has 114 SMs
    "H200": (132, 989.0, 141),
    "L4": (58, 121.0, 24),
    "L40S": (142, 362.0, 48),
}
FORM_FACTORS = ("SXM4", "PCIE", "PCIe", "HBM3", "40GB", "80GB", "24GB", "16GB", "12GB", "8GB")
DESKTOP = 11.2 / 12  # of a card's memory can be used where a desktop has some of it


def card(name):
    """(SMs, TFLOPS, GiB) of a card by its driver's name ("NVIDIA GeForce RTX 4070") or a short one ("4070"), or None.

    The whole name has to fit, so that a "RTX 4070 Laptop GPU" is not taken for a RTX 4070.
    """
    words = " ".join(w for w in name.replace("-", " ").split() if w not in ("NVIDIA", "GeForce", *FORM_FACTORS))
    known = {key.lower(): row for key, row in CARDS.items()}
    return known.get(words.lower()) or known.get(f"rtx {words.lower()}")


def peak_flops(name, sms=None):
    """FLOP/s of a card by its name and, if given, its number of multiprocessors; None if no row of the table fits
    both: an unknown card has no MFU, never a wrong one."""
    row = card(name)
    return row[1] * 1e12 if row and sms in (None, row[0]) else None


def learning_rate(step, config):
    """The rate of the step that follows `step` steps: linear warm-up, then the schedule, min_lr at its end and after.

    config.lr_schedule: "cosine", "linear", or "wsd" (warm-up, stable, decay: the rate stays at its peak until the
    linear decay of the last `decay_iters` steps, Hu et al. 2024, arXiv 2404.06395).
    """
    peak, floor = config.learning_rate, config.min_lr
    if not config.decay_lr:
        return peak
    if step < config.warmup_iters:
        return peak * (step + 1) / (config.warmup_iters + 1)
    end = config.lr_decay_iters or config.max_iters
    if step >= end:
        return floor
    if config.lr_schedule == "wsd":
        return floor + (peak - floor) * min(1.0, (end - step) / (end - decay_start(config)))
    share = (step - config.warmup_iters) / (end - config.warmup_iters)
    if config.lr_schedule == "linear":
        return floor + (peak - floor) * (1 - share)
    return floor + 0.5 * (1 + math.cos(math.pi * share)) * (peak - floor)


def decay_start(config):
    """The step at which the decay of a "wsd" schedule begins: a fifth of the run before its end, if not given."""
    end = config.lr_decay_iters or config.max_iters
    return end - (config.decay_iters or max(1, end // 5))


def rates(config):
    """The learning rate of every step of a run: list of max_iters."""
    return [learning_rate(step, config) for step in range(config.max_iters)]


# ---- the network, and its memory


def parameters(config):
    """Trained numbers by place, as model.py makes them: embedding (which is the head too), positions, blocks with the
    last norm, and their total."""
    C, D, V = config.n_embd, config.n_embd // config.n_head, config.vocab_size
    if config.arch == "qwen3":
        block, norms, positions = 4 * C * C + 3 * C * inner_width(config) + 2 * D, 2 * C, 0
    else:
        block, norms, positions = 12 * C * C + 9 * C * config.bias, 2 * C * (1 + config.bias), config.block_size * C
    blocks = config.n_layer * (block + norms) + norms // 2
    return dict(embedding=V * C, positions=positions, blocks=blocks, total=V * C + positions + blocks)


def inner_width(config):
    return 4 * config.n_embd if config.arch == "gpt2" else 64 * math.ceil(8 * config.n_embd / 3 / 64)


def flops_per_token(config):
    """Forward and backward, counted as PaLM does (Chowdhery et al. 2022, appendix B): 6 for each parameter that is
    multiplied, 12 x n_layer x C x T for attention, without a rebate for the causal mask."""
    p = parameters(config)
    return 6 * (p["total"] - p["positions"]) + 12 * config.n_layer * config.n_embd * config.block_size


def step_tokens(config):
    return config.tokens_per_step or config.gradient_accumulation_steps * config.batch_size * config.block_size


# Bytes that a block keeps for backward, for each token and channel, and for each column inside its MLP, with 16-bit
# products and with 32-bit ones. Counted with torch.autograd.graph.saved_tensors_hooks (torch 2.13, no dropout); the
# compiler keeps the same of GPT-2's block and computes half of the other's again.
KEPT = {
    ("gpt2", False): (20, 4, 32, 8),
    ("gpt2", True): (20, 4, 32, 8),
    ("qwen3", False): (52, 8, 60, 16),
    ("qwen3", True): (21, 8, 33, 16),
}
MOST_TOKENS = 2**15  # of a micro batch; more at a time are not faster
CHUNK_LOGITS = {"cpu": 2**26, "cuda": 2**27}  # as model.chunk_rows has it
PROCESS = 330 * 2**20  # a CPU process that has imported torch and runs it
COMPILER = 100 * 2**20  # and torch's compiler


def memory(config, device_type="cuda", wide=False):
    """Bytes at the peak of a training step, by what holds them; on a card those of torch's allocator, on a CPU those of
    the whole process. None where the micro batch is not known yet (batch_size=0).

    wide: matrix products in float32. Weights, gradients, AdamW's moments in float32: 16 bytes a parameter (Muon has one
    moment). Measured on CPUs (bench/plan_memory.py); on a card it has not been measured.
    """
    if not config.batch_size:
        return None
    p, C, V, tokens = parameters(config), config.n_embd, config.vocab_size, config.batch_size * config.block_size
    matrices = p["blocks"] if config.optimizer == "muon" else 0
    layers, layer = config.n_layer, layer_bytes(config, device_type, wide)
    blocks = tokens * (layers * 4 * C + layer if config.activation_checkpointing else layers * layer)
    chunks = math.ceil(tokens * V / CHUNK_LOGITS[device_type])
    chunk = math.ceil(tokens / chunks) * V  # logits
    held = 8 if config.compile else 12 if wide or device_type != "cpu" else 2  # bytes a logit, model.logit_gradients
    loss = chunk * held + (4 if wide else 6) * V * C
    accumulated = config.gradient_accumulation_steps > 1 or config.tokens_per_step > tokens
    backward = 4 * p["total"] * (not accumulated) + 8 * V * C + 28 * C * tokens
    activations = blocks + (20 if wide else 14) * C * tokens
    evaluation = 8 * chunk - activations  # which keeps none, but float32 logits and their log-softmax
    parts = dict(
        weights=4 * p["total"],
        moments=8 * p["total"] - 4 * matrices,
        gradients=4 * p["total"] * accumulated,
        copies=0 if wide else 2 * p["total"],
        activations=activations,
        loss=max(loss, backward, evaluation),
    )
    if device_type == "cpu":
        parts["process"] = PROCESS + COMPILER * config.compile
        parts["heap"] = 0.4 * blocks * (not wide and not config.compile)  # holes that passing 16-bit copies leave in it
        parts["checkpoint"] = parts["weights"] + parts["moments"]  # the copy that is written while training goes on
    return parts


def layer_bytes(config, device_type, wide):
    """What a block keeps of each token for backward."""
    C, kept = config.n_embd, KEPT[config.arch, bool(config.compile)]
    layer = C * kept[2 * wide] + inner_width(config) * kept[2 * wide + 1]
    if config.dropout:  # masks; and a CPU has no fused attention with dropout: it keeps B x H x T x T scores
        layer += 2 * C
        if device_type == "cpu":
            layer += 6 * C + config.n_head * config.block_size * (5 + 4 * wide if config.compile else 12)
    return layer


def batch_that_fits(config, free, device_type="cuda", wide=False):
    """-> (the largest micro batch, of those that divide the step and are no larger than the config's, whose peak is
    within `free` bytes; its peak), or (0, 0) where there is none."""
    sequences, keys = step_tokens(config) // config.block_size, vars(config) | dict(tokens_per_step=step_tokens(config))
    for size in range(min(sequences, config.batch_size or max(1, MOST_TOKENS // config.block_size)), 0, -1):
        if sequences % size == 0:
            peak = sum(memory(SimpleNamespace(**keys | dict(batch_size=size)), device_type, wide).values())
            if peak <= free:
                return size, peak
    return 0, 0


# ---- the loss to expect

E, A, B, ALPHA, BETA = 1.69, 406.4, 410.7, 0.34, 0.28  # Hoffmann et al. 2022, arXiv 2203.15556
ANCHOR = (124_475_904, 10.26e9, 3.2722)  # GPT-2 with AdamW on FineWeb by llm.c: parameters, tokens, val loss
BAND = 0.08  # so far the law is trusted
MULTIPLIER = {("gpt2", "adamw"): 1.0}  # what a token is worth in tokens of GPT-2's recipe, by network and optimizer


def law(parameters, tokens):
    """L(N, D) = E + A / N^0.34 + B / D^0.28 (Hoffmann et al. 2022), shifted to meet the anchor: nats a GPT-2 token of
    FineWeb after a finished schedule, N all parameters."""

    def loss(n, d):
        return E + A / n**ALPHA + B / d**BETA

    return loss(parameters, tokens) + ANCHOR[2] - loss(*ANCHOR[:2])


def best_size(parameters, tokens):
    """(N, D) with the lowest loss by the law at the FLOPs of 6 x parameters x tokens."""
    product = parameters * tokens
    n = (ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA)) * product ** (BETA / (ALPHA + BETA))
    return n, product / n


def expected_loss(config, epochs=None):
    """-> (loss, None), or (None, the reason why there is no expectation): val loss on FineWeb, trusted to BAND."""
    n, tokens = parameters(config)["total"], step_tokens(config) * config.max_iters
    multiplier = MULTIPLIER.get((config.arch, config.optimizer))
    end = config.lr_decay_iters or config.max_iters
    if config.init_from not in ("scratch", "resume", "auto"):
        reason = f"the law is of networks that begin at random, not with the weights of {config.init_from}"
    elif multiplier is None:
        reason = f"the law is of GPT-2's network with AdamW, not of {config.arch} with {config.optimizer}"
    elif not 50257 <= config.vocab_size <= 51200:
        reason = f"the law is of GPT-2's tokens, not of a vocabulary of {config.vocab_size:,}"
    elif not 2e7 <= n <= 1.6e9:
        reason = f"the law was not held against networks of {n / 1e6:,.0f}M parameters"
    elif not 5e8 <= tokens <= 5e11:
        reason = f"the law was not held against runs of {tokens / 1e6:,.1f}M tokens"
    elif (epochs or 0) > 4.05:
        reason = "the law is of fresh tokens; past 4 epochs a repeated one is worth less"
    elif not config.decay_lr or end > 1.05 * config.max_iters or config.min_lr > 0.3 * config.learning_rate:
        reason = "the law is of finished schedules; here the learning rate is still high at max_iters"
    else:
        return law(n, tokens * multiplier), None
    return None, reason


# ---- the whole plan

NOISE = 0.4  # standard deviation of the loss of one window of 1,024 tokens: 16 of them scatter by 0.1 (both anchors)


def plan(config, train_tokens=None, val_tokens=None, eval_tokens=10_485_760, device="cpu", sms=None, world_size=1,
         wide=False, free_bytes=None, holders="", disk_free=None):  # fmt: skip
    """-> dict of all that can be known of a run beforehand; None where it cannot.

    train_tokens, val_tokens: on disk; eval_tokens: of each split in an evaluation; device: "cpu", or the name of a card
    with `sms` multiprocessors; wide: products in float32; free_bytes: of the card, holders: who has the rest of it.
    """
    p, known, step = parameters(config), card(device), step_tokens(config)
    tokens, evaluated = step * config.max_iters, min(eval_tokens, val_tokens or eval_tokens)
    found = dict(parameters=p, step_tokens=step, tokens=tokens, train_tokens=train_tokens, val_tokens=val_tokens)
    found |= dict(tokens_per_parameter=tokens / (p["total"] - p["positions"]), flops=tokens * flops_per_token(config))
    found |= dict(epochs=tokens / train_tokens if train_tokens else None, device=device, holders=holders)
    found |= dict(memory=memory(config, "cpu" if device == "cpu" else "cuda", wide), disk_free=disk_free)
    found |= dict(free_bytes=free_bytes or (DESKTOP * known[2] * GiB if known else None), wide=wide)
    found |= dict(held_bytes=known[2] * GiB - free_bytes if known and free_bytes else 0)
    kept = config.max_iters // config.keep_every if config.keep_every else 0
    found |= dict(disk_need=(12 * p["total"] + 2**20) * (5 + kept))  # as checkpoint.check_room has it
    found |= dict(eval_tokens=evaluated, eval_error=NOISE / math.sqrt(evaluated / 1024))
    found |= dict(hours=None, peak=peak_flops(device, sms))
    if found["peak"] and config.compile and not wide:  # an evaluation is forward only, a third, of two splits
        evaluations = config.max_iters // config.eval_interval + 1
        flops = found["flops"] + evaluations * 2 / 3 * evaluated * flops_per_token(config)
        found["utilisation"] = utilisation(config, found["peak"])
        found["hours"] = flops / (found["peak"] * found["utilisation"] * world_size) / 3600
    found["loss"], found["no_loss"] = expected_loss(config, found["epochs"])
    return found | dict(warnings=list(warnings(config, found)))


def utilisation(config, flops):
    """Share of the peak of `flops` FLOP/s that training reaches, compiled and in 16 bits.

    On an RTX 4070 69% at width 384 and 82% at 768, as the two anchors had; a line in the logarithm of the width between
    and beside them. Faster cards have less bandwidth for each FLOP/s: the share falls with the fourth root of the peak,
    to 40% on an H100, where llm.c's run had 41% (10.26B tokens in 45 minutes on eight, says modded-nanogpt's README).
    """
    share = min(0.82, max(0.5, 0.69 + 0.13 * math.log2(config.n_embd / 384)))
    return share * min(1.0, (CARDS["RTX 4070"][1] * 1e12 / flops) ** 0.25)


def hours_left(config, step, seconds_per_step, eval_seconds=0.0):
    """From the speed that was measured: the steps that are left, and their evaluations."""
    evaluations = config.max_iters // config.eval_interval - step // config.eval_interval
    return ((config.max_iters - step) * seconds_per_step + evaluations * eval_seconds) / 3600


def warnings(config, found):
    """A line for each choice in the config that costs something, with what to change."""
    c, epochs = config, found["epochs"] or 0
    yield from room_warnings(config, found)
    yield from data_warnings(found)
    if advice := size_advice(found):
        yield f"network far from the best for these tokens: {advice}"
    if c.decay_lr and c.warmup_iters > 0.1 * c.max_iters and c.max_iters >= 100:
        yield f"warm-up of {c.warmup_iters:,} in {c.max_iters:,} steps: --warmup_iters={c.max_iters // 50} is enough"
    if c.decay_lr and c.min_lr > 0.101 * c.learning_rate:
        yield f"min_lr={c.min_lr:g}, above a tenth of the peak, leaves noise; --min_lr={c.learning_rate / 10:g} or less"
    if c.n_embd < 64 * c.n_head and c.n_embd >= 128:
        fits = f"; --n_head={c.n_embd // 64}" if c.n_embd % 64 == 0 else ""
        yield f"heads of {c.n_embd // c.n_head}: 64 or 128 learn better and run faster{fits}"
    if c.dropout and 0 < epochs <= 4:
        why = "nothing is learned by heart so early, it costs loss, memory and time"
        yield f"dropout={c.dropout:g} in {epochs:.2f} epochs: {why}; --dropout=0"
    if c.dtype == "float16" and card(found["device"]):  # all of the table have bfloat16
        why = "float16 has three bits more, a reason only where the gradients are tame"
        yield f"float16 skips steps to find its scale; --dtype=bfloat16 is as fast on this card and needs none ({why})"
    critical = 2.1e8 / found["loss"] ** (1 / 0.21) if found["loss"] else math.inf  # Kaplan et al. 2020, eq. 5.3
    if found["step_tokens"] > 2 * critical:
        why = f"past {critical:,.0f} more bring little (Kaplan et al. 2020)"
        yield f"{found['step_tokens']:,} tokens a step: {why}; halve them and double max_iters"


def room_warnings(config, found):
    """Of memory and disk that will not do."""
    need, free, held = sum((found["memory"] or {}).values()), found["free_bytes"], found["held_bytes"]
    if free and need > free:
        size, peak = batch_that_fits(config, free, wide=found["wide"])
        steps = f" --gradient_accumulation_steps={found['step_tokens'] // (size or 1) // config.block_size}"
        change = f"--batch_size={size}{steps * (not config.tokens_per_step)} needs {peak / GiB:.1f} for the same run"
        change = change if size else "--activation_checkpointing=True, or a smaller network"
        ending = f"; or end what holds {held / GiB:.1f}" if held > 0.1 * free else ""
        yield f"memory: {need / GiB:.1f} GiB needed, {free / GiB:.1f} free: {change}{ending}"
    if found["disk_free"] and found["disk_need"] > found["disk_free"]:
        need, free = (f"{found[name] / 1e9:.1f} GB" for name in ("disk_need", "disk_free"))
        yield f"disk: checkpoints take {need} at their most, {free} are free: make room, or another --out_dir"


def data_warnings(found):
    """Of too little text, to train on or to evaluate with."""
    train, val, epochs = found["train_tokens"], found["val_tokens"], found["epochs"] or 0
    if val is not None and val < 100_000:
        share = 100_000 / (train + val) if train else 1
        change = f"--val_fraction={math.ceil(100 * share) / 100:g}" if share <= 0.2 else "more text"
        error = f"a val loss errs by {found['eval_error']:.2f} or more"
        yield f"val split of {val:,} tokens: {error}; prepare with {change}"
    if epochs > 4:
        yield f"{times(epochs)} epochs: past 4 a repeated token teaches little; prepare more text, or fewer max_iters"


def size_advice(found):
    """What to grow or shrink, by the law where it holds, else by the ratio of tokens and parameters; or nothing."""
    size, tokens, ratio = found["parameters"]["total"], found["tokens"], found["tokens_per_parameter"]
    if not found["loss"]:
        far = tokens > 1e7 and not 1 <= ratio <= 1000  # fewer tokens are a try
        return f"{ratio:.2g} a parameter, about 20 are" if far else ""
    n, d = best_size(size, tokens)
    gain = law(size, tokens) - law(n, d)
    text = f"{n / 1e6:.0f}M parameters on {d / 1e9:.2f}B tokens would end {gain:.2f} lower with the same FLOPs"
    return text if gain > 0.05 else ""


def times(number):
    return f"{number:.2f}" if number < 100 else f"{number:,.0f}"


def lines(found, config):
    """The plan for people: a line each."""
    p = found["parameters"]
    blocks = f"{p['embedding'] / 1e6:.2f}M embedding, {p['blocks'] / 1e6:.2f}M in {config.n_layer} blocks"
    yield f"model   {(p['total'] - p['positions']) / 1e6:.2f}M parameters without positions: {blocks}"
    yield f"run     {config.max_iters:,} steps of {found['step_tokens']:,} tokens are {found['tokens']:,} tokens, " + (
        f"{found['tokens_per_parameter']:.3g} a parameter (compute-optimal: about 20)"
    )
    if found["train_tokens"]:
        yield f"data    {found['train_tokens']:,} tokens to train on: {times(found['epochs'])} epochs"
        yield f"val     {found['val_tokens']:,} tokens, {found['eval_tokens']:,} of them in an evaluation: " + (
            f"standard error about {found['eval_error']:.4f}"
        )
    yield from memory_lines(found, config)
    work = f"{found['flops']:.2e} FLOP"
    if found["hours"]:
        rate = f"{found['utilisation']:.0%} of its peak of {found['peak'] / 1e12:.0f} TFLOPS"
        yield f"time    about {found['hours']:.1f} h: {work} on {found['device']} at {rate}; the log has measured hours"
    else:
        yield f"time    {work}; the hours are in each log line, from the speed that is measured"
    if found["disk_free"]:
        yield f"disk    {found['disk_need'] / 1e9:.2f} GB for checkpoints, {found['disk_free'] / 1e9:,.1f} GB are free"
    expected = (
        f"{found['loss'] or 0:.2f} +- {BAND} expected for val at the end, on FineWeb (law of Hoffmann et al. 2022)"
    )
    yield f"loss    {expected if found['loss'] else 'no expectation: ' + found['no_loss']}"
    yield from (f"WARNING {text}" for text in found["warnings"])


def memory_lines(found, config):
    free, held = found["free_bytes"], found["held_bytes"]
    where = f"of {free / GiB:.1f} GiB free on {found['device']}" if free else "of this process"
    if found["memory"]:
        need = sum(found["memory"].values())
        yield f"memory  {need / GiB:.2f} GiB at the peak {where}, predicted:"
        parts = (f"{name} {n / GiB:.2f}" for name, n in found["memory"].items() if n > 0.005 * need)
        yield f"        {', '.join(parts)}"
    else:
        size, peak = batch_that_fits(config, free, wide=found["wide"]) if free else (0, 0)
        fits = f"about {size} fit, with {peak / GiB:.1f} {where}; " if size else ""
        yield f"memory  batch_size=0: {fits}the largest micro batch that fits is found at the start"
    if held > 0.1 * (free or 0):
        who = found["holders"] or "by whom the driver does not say"
        yield f"        {held / GiB:.1f} GiB are held by others, the desktop included: {who}"

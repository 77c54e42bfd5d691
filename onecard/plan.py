"""What a run will need, cost and reach, before it starts: memory, hours, expected loss, warnings.

train.py shows it at its start, and alone with --plan_only=True; report.py sets it beside what came:

    found = plan.plan(config, rates, train_tokens=10**10, val_tokens=10**7, device="RTX 4070")
    print("\n".join(plan.lines(found, config)))

`config` is a train.TrainConfig, `rates` the learning rate of every step. Every size is asked of the network itself
(model.py), built without memory on the meta device. Where no figure supports a prediction there is none, and the
reason is given instead.
"""

import math
import time
from dataclasses import replace

import torch

from model import GPT, GPTConfig
from onecard.cards import card
from onecard.memory import batch_sizes_that_fit, trace_memory
from onecard.optim import configure_optimizers

GiB = 2**30
DESKTOP = 11.2 / 12  # share of a card's memory that is free where a desktop uses the rest


def network(config) -> GPT:
    """The network of a config on the meta device: it has all sizes and no memory."""
    with torch.device("meta"):
        return GPT(GPTConfig(**config.model_args()))


# ---- the loss to expect

E, A, B, ALPHA, BETA = 1.69, 406.4, 410.7, 0.34, 0.28  # Hoffmann et al. 2022, arXiv 2203.15556
ANCHOR = (124_475_904, 10.26e9, 3.2722)  # GPT-2 with AdamW on FineWeb by llm.c: parameters, tokens, val loss
BAND = 0.08  # error of the law, in nats
MULTIPLIER = {("gpt2", "adamw"): 1.0}  # tokens of GPT-2's recipe that one token is worth, by network and optimizer


def law(parameters: float, tokens: float) -> float:
    """L(N, D) = E + A / N^0.34 + B / D^0.28 (Hoffmann et al. 2022), shifted to meet the anchor.

    The loss in nats per GPT-2 token of FineWeb after a finished schedule; N counts all parameters.
    """

    def loss(n, d):
        return E + A / n**ALPHA + B / d**BETA

    return loss(parameters, tokens) + ANCHOR[2] - loss(*ANCHOR[:2])


def best_size(parameters: float, tokens: float) -> tuple[float, float]:
    """(N, D) with the lowest loss by the law for the same FLOPs, which are taken as 6 x parameters x tokens."""
    product = parameters * tokens
    n = (ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA)) * product ** (BETA / (ALPHA + BETA))
    return n, product / n


def usual_rate(parameters: float) -> float:
    """The learning rate that suits AdamW and GPT-2's network with so many parameters in blocks (Kaplan 2020, D.6)."""
    return 0.003239 - 0.0001395 * math.log(parameters)


def critical_batch(loss: float) -> float:
    """Tokens of a step above which more help little (Kaplan et al. 2020, eq. 5.3); at twice this they cost compute."""
    return 2.1e8 / loss ** (1 / 0.21)


def expected_loss(config, rates, epochs: float | None = None) -> tuple[float | None, str | None]:
    """(val loss on FineWeb at the end of the run, None), or (None, the reason why there is no expectation)."""
    model, tokens = network(config), config.step_tokens * config.max_iters
    counts, vocab_size = model.parameter_counts(), model.config.vocab_size
    n, usual = counts["total"], usual_rate(counts["blocks"])
    multiplier = MULTIPLIER.get((config.arch, config.optimizer))
    end = config.lr_decay_iters or config.max_iters
    if config.init_from not in ("scratch", "resume", "auto"):
        reason = f"the scaling law holds for random initial weights, not for those of {config.init_from}"
    elif multiplier is None:
        reason = f"the scaling law is for GPT-2's network with AdamW, not for {config.arch} with {config.optimizer}"
    elif not 50257 <= vocab_size <= 51200:
        reason = f"the scaling law is for GPT-2's tokens, not for a vocabulary of {vocab_size:,}"
    elif not 2e7 <= n <= 1.6e9:
        reason = f"the scaling law is not validated for {n / 1e6:,.0f}M parameters"
    elif not 5e8 <= tokens <= 5e11:
        reason = f"the scaling law is not validated for {tokens / 1e6:,.1f}M tokens"
    elif (epochs or 0) > 4.05:
        reason = "the scaling law is for new tokens; beyond 4 epochs a repeated token is worth less"
    elif config.decay_lr and config.warmup_iters > 0.2 * config.max_iters:
        reason = f"the scaling law is for a short warm-up, not for one of {config.warmup_iters:,} steps"
    elif end > 1.05 * config.max_iters or rates[-1] > 0.3 * max(rates):
        reason = "the scaling law is for finished schedules; here the learning rate is still high at max_iters"
    elif not usual / 5 <= config.learning_rate <= 5 * usual:
        reason = f"the scaling law is for a good learning rate, about {usual:.1g}, not {config.learning_rate:g}"
    else:
        return law(n, tokens * multiplier), None
    return None, reason


# ---- the whole plan

SMALL = 3e7  # parameters: on a CPU, memory is no limit for a smaller network
MEASURED_ON = 58.3e12  # FLOP/s: the peak of the RTX 4070, on which the shares of the peak were measured
NOISE = 0.4  # standard deviation of the loss of one window of 1,024 tokens: 16 of them scatter by 0.1 (both anchors)


def plan(
    config,
    rates,
    train_tokens: int | None = None,
    val_tokens: int | None = None,
    eval_tokens: int = 10_485_760,
    device: str = "cpu",
    sms: int | None = None,
    world_size: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    free_bytes: int | None = None,
    total_bytes: int | None = None,
    gpu_processes: str = "",
    disk_free: int | None = None,
    trace: bool | None = None,
) -> dict:
    """All that can be known of a run beforehand; None where it cannot.

    train_tokens, val_tokens: in the dataset; eval_tokens: of each split in an evaluation; device: "cpu", or the name
    of a card with `sms` multiprocessors; dtype: of the matrix products; free_bytes, total_bytes: of the card's
    memory; gpu_processes: the other processes on it; trace: predict the memory of a step, which takes a few seconds;
    None: not for a small network on a CPU, whose speed is measured instead.
    """
    model, known = network(config), card(device, sms, total_bytes)
    counts, flops_per_token = model.parameter_counts(), model.flops_per_token()
    tokens, eval_tokens = config.step_tokens * config.max_iters, min(eval_tokens, val_tokens or eval_tokens)
    small_on_cpu = device == "cpu" and counts["total"] <= SMALL
    measure, trace = trace is None and small_on_cpu, not small_on_cpu if trace is None else trace
    memory = trace_memory(config, "cpu" if device == "cpu" else "cuda", dtype) if trace and config.batch_size else None
    kept = config.max_iters // config.keep_every if config.keep_every else 0
    found = {
        "parameters": counts,
        "tokens": tokens,
        "tokens_per_parameter": tokens / (counts["total"] - counts["positions"]),
        "flops": tokens * flops_per_token,
        "train_tokens": train_tokens,
        "val_tokens": val_tokens,
        "epochs": tokens / train_tokens if train_tokens else None,
        "eval_tokens": eval_tokens,
        "eval_error": NOISE / math.sqrt(eval_tokens / 1024),
        "device": device,
        "dtype": dtype,
        "memory": memory,
        "card": known,
        "free_bytes": free_bytes or (DESKTOP * known.gib * GiB if known else None),
        "used_bytes": total_bytes - free_bytes if total_bytes and free_bytes else 0,
        "gpu_processes": gpu_processes,
        "disk_need": checkpoint_bytes(counts["total"], kept),
        "disk_free": disk_free,
        "peak": known.tflops * 1e12 if known else None,
        "hours": None,
    }
    evaluations = config.max_iters // config.eval_interval + 1
    evaluated = evaluations * 2 / 3 * eval_tokens  # two splits; a forward pass is a third of a step
    found["eval_share"] = evaluated / (tokens + evaluated) if tokens else 0.0
    if found["peak"] and config.compile and dtype != torch.float32:
        found["utilisation"] = utilisation(config.n_embd, found["peak"])
        speed = found["peak"] * found["utilisation"] * world_size  # FLOP/s
        found["hours"] = (tokens + evaluated) * flops_per_token / speed / 3600
    elif measure and config.batch_size:
        micro_batch, update = measured_seconds(config, dtype)
        micro_batches = (tokens + evaluated) / (config.batch_size * config.block_size)
        found["hours"] = (micro_batches * micro_batch / world_size + config.max_iters * update) / 3600
    found["loss"], found["no_loss"] = expected_loss(config, rates, found["epochs"])
    found["warnings"] = list(warnings(config, found))
    return found


def checkpoint_bytes(parameters: int, kept: int) -> int:
    """Disk space for the checkpoints of a run, in bytes: weights and two moments in float32, in five files at once (a
    new one while latest, previous, best and before-decay exist), and `kept` more that keep_every keeps for good."""
    return (12 * parameters + 2**20) * (5 + kept)


def utilisation(n_embd: int, peak: float) -> float:
    """Share of the peak FLOP/s of a card that training reaches, compiled and in 16 bits. Modelled.

    On an RTX 4070 69% at width 384 and 82% at 768, measured by the two anchor runs; elsewhere a line in the logarithm
    of the width. Faster cards have less bandwidth for each FLOP/s: the share falls with the fourth root of the peak, to
    40% on an H100, where llm.c had 41% (10.26B tokens in 45 minutes on eight cards, says modded-nanogpt's README).
    """
    share = min(0.82, max(0.5, 0.69 + 0.13 * math.log2(n_embd / 384)))
    return share * min(1.0, (MEASURED_ON / peak) ** 0.25)


def measured_seconds(config, dtype: torch.dtype) -> tuple[float, float]:
    """Seconds of a micro batch, forward and backward, and of the optimizers' step: measured here, on the CPU."""
    with torch.random.fork_rng():
        model = GPT(GPTConfig(**config.model_args()))
    optimizers = configure_optimizers(model, config, "cpu")
    tokens = (
        torch.arange(config.batch_size * (config.block_size + 1)).view(config.batch_size, -1) % model.config.vocab_size
    )
    for _ in range(2):  # the first is slower: buffers are made
        started = time.perf_counter()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        done = time.perf_counter()
        for optimizer in optimizers:
            optimizer.step()
        ended = time.perf_counter()
    return done - started, ended - done


def hours_left(config, step: int, seconds_per_step: float, eval_seconds: float = 0.0) -> float:
    """Hours for the remaining steps and their evaluations, from measured seconds."""
    evaluations = config.max_iters // config.eval_interval - step // config.eval_interval
    return ((config.max_iters - step) * seconds_per_step + evaluations * eval_seconds) / 3600


# ---- warnings: a line for each choice that costs something, with what to change


def warnings(config, found):
    yield from memory_and_disk_warnings(config, found)
    yield from data_warnings(found)
    if advice := size_advice(found):
        yield advice
    yield from schedule_warnings(config, found)
    if config.n_embd < 64 * config.n_head and config.n_embd >= 128:
        remedy = f"; use --n_head={config.n_embd // 64}" if config.n_embd % 64 == 0 else ""
        yield f"head size {config.n_embd // config.n_head}: 64 or 128 learn better and run faster{remedy}"
    epochs = found["epochs"] or 0
    if config.dropout and 0 < epochs <= 4:
        yield (
            f"dropout={config.dropout:g} with {epochs:.2f} epochs: a model does not overfit so early; dropout costs "
            "loss, memory and time: use --dropout=0"
        )
    if found["card"] and config.dtype == "float16" and found["card"].has_bfloat16:
        yield (
            "float16 skips steps to find its scale; --dtype=bfloat16 is as fast on this card and needs no scale "
            "(float16 has three more bits of precision)"
        )
    if found["card"] and config.dtype == "bfloat16" and not found["card"].has_bfloat16:
        yield f"{found['card'].name} has no bfloat16 arithmetic and emulates it slowly; use --dtype=float16"
    critical = critical_batch(found["loss"]) if found["loss"] else math.inf
    if config.step_tokens > 2 * critical:
        yield (
            f"{config.step_tokens:,} tokens a step: above {critical:,.0f}, more help little (Kaplan et al. 2020); "
            "halve them and double max_iters"
        )


def schedule_warnings(config, found):
    rate, usual = config.learning_rate, usual_rate(found["parameters"]["blocks"])
    if config.init_from in ("scratch", "resume", "auto") and not usual / 10 <= rate <= 15 * usual:
        yield (
            f"learning_rate={rate:g}: about {usual:.1g} is usual for GPT-2's network of this size with AdamW (Kaplan "
            f"et al. 2020, D.6), and some times more with Muon; try --learning_rate={usual:.1g}"
        )
    share = found["eval_share"]
    if share > 0.3 and config.max_iters >= 100:
        every = math.ceil(config.eval_interval * share / (1 - share) / 0.1)
        yield (
            f"evaluations take about {share:.0%} of the time; use --eval_interval={every} or a smaller --eval_tokens"
        )
    if not config.decay_lr:
        return
    if config.warmup_iters > 0.1 * config.max_iters and config.max_iters >= 100:
        never = ", so the learning rate never reaches its peak" if config.warmup_iters >= config.max_iters else ""
        yield (
            f"warm-up of {config.warmup_iters:,} in {config.max_iters:,} steps{never}: "
            f"--warmup_iters={config.max_iters // 50} is enough"
        )
    if config.min_lr > 0.101 * config.learning_rate:
        yield (
            f"min_lr={config.min_lr:g} is above a tenth of the peak, so noise remains at the end; "
            f"use --min_lr={config.learning_rate / 10:g} or less"
        )


def memory_and_disk_warnings(config, found):
    need, free, used = sum((found["memory"] or {}).values()), found["free_bytes"], found["used_bytes"]
    if free and need > free:
        ending = f"; or end other processes, which use {used / GiB:.1f} GiB" if used > 0.1 * free else ""
        yield f"memory: {need / GiB:.1f} GiB needed, {free / GiB:.1f} GiB free: {memory_remedy(config, found)}{ending}"
    if found["disk_free"] and found["disk_need"] > found["disk_free"]:
        need, free = (f"{found[name] / 1e9:.1f} GB" for name in ("disk_need", "disk_free"))
        yield f"disk: checkpoints need up to {need}, {free} are free: free some, or choose another --out_dir"


def memory_remedy(config, found):
    """A change that fits: a smaller micro batch, with activation checkpointing if need be, else a smaller network."""
    checkpointed = replace(config, activation_checkpointing=True)
    for candidate, key in ((config, ""), (checkpointed, "--activation_checkpointing=True ")):
        sizes = batch_sizes_that_fit(candidate, found["free_bytes"], "cuda", found["dtype"])
        if sizes:
            micro = config.step_sequences // sizes[-1]
            steps = "" if config.tokens_per_step else f" --gradient_accumulation_steps={micro}"
            return f"{key}--batch_size={sizes[-1]}{steps} fits, with the same results"
    memory = found["memory"]
    state = 2 * memory["weights"] + memory["optimizer state"]  # a gradient for each weight
    return f"weights, gradients and optimizer alone need {state / GiB:.1f} GiB: use a smaller --n_layer or --n_embd"


def data_warnings(found):
    train, val, epochs = found["train_tokens"], found["val_tokens"], found["epochs"] or 0
    if val is not None and val < 100_000:
        share = 100_000 / (train + val) if train else 1
        remedy = f"prepare with --val_fraction={math.ceil(100 * share) / 100:g}" if share <= 0.2 else "add text"
        yield f"val split of {val:,} tokens: the val loss has an error of {found['eval_error']:.2f} or more; {remedy}"
    if epochs > 4:
        yield f"{epochs:,.1f} epochs: beyond 4 passes repeats help little; add text, or lower max_iters"


def size_advice(found):
    """What to grow or shrink, by the law where it holds, else by the tokens per parameter; or nothing."""
    size, tokens, ratio = found["parameters"]["total"], found["tokens"], found["tokens_per_parameter"]
    if not found["loss"]:
        unusual = tokens > 1e7 and not 1 <= ratio <= 1000  # with fewer tokens it is a try
        return f"{ratio:.2g} tokens a parameter; about 20 are compute-optimal" if unusual else ""
    n, d = best_size(size, tokens)
    gain = law(size, tokens) - law(n, d)
    text = f"for the same compute, {n / 1e6:.0f}M parameters on {d / 1e9:.2f}B tokens should end {gain:.2f} lower"
    return text if gain > 0.05 else ""


# ---- the plan as lines


def lines(found: dict, config):
    """The plan for a person, a line at a time."""
    counts = found["parameters"]
    yield (
        f"model   {(counts['total'] - counts['positions']) / 1e6:.2f}M parameters without positions: "
        f"{counts['embedding'] / 1e6:.2f}M embedding, {counts['blocks'] / 1e6:.2f}M in {config.n_layer} blocks"
    )
    yield (
        f"run     {config.max_iters:,} steps x {config.step_tokens:,} tokens = {found['tokens']:,} tokens, "
        f"{found['tokens_per_parameter']:.3g} a parameter (compute-optimal: about 20)"
    )
    if found["train_tokens"]:
        yield f"data    {found['train_tokens']:,} train tokens: {found['epochs']:,.2f} epochs"
        yield (
            f"val     {found['val_tokens']:,} tokens, {found['eval_tokens']:,} of them in an evaluation: "
            f"standard error about {found['eval_error']:.4f}"
        )
    yield from memory_lines(found, config)
    if found["hours"] and not found["peak"]:
        yield f"time    about {duration(found['hours'])}, from the time of one micro batch, not compiled"
    elif found["hours"]:
        yield (
            f"time    about {found['hours']:.1f} h (modelled): {found['flops']:.2e} FLOP on {found['device']} at "
            f"{found['utilisation']:.0%} of its peak of {found['peak'] / 1e12:.0f} TFLOPS"
        )
    else:
        yield f"time    {found['flops']:.2e} FLOP; the log lines show the hours left, from the measured speed"
    if found["disk_free"]:
        yield f"disk    {found['disk_need'] / 1e9:.2f} GB for checkpoints, {found['disk_free'] / 1e9:,.1f} GB free"
    if found["loss"]:
        yield f"loss    expect val {found['loss']:.2f} +- {BAND} on FineWeb at the end (law of Hoffmann et al. 2022)"
    else:
        yield f"loss    no expectation: {found['no_loss']}"
    for text in found["warnings"]:
        yield f"WARNING {text}"


def duration(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"


def memory_lines(found, config):
    free, used = found["free_bytes"], found["used_bytes"]
    if found["memory"]:
        where = f", {free / GiB:.1f} GiB free on {found['device']}" if free else ", besides the process itself"
        note = "predicted for eager; compiled usually needs less" if config.compile else "predicted"
        yield f"memory  {sum(found['memory'].values()) / GiB:.2f} GiB at the peak of a step{where} ({note})"
        yield "        " + ", ".join(f"{name} {n / GiB:.2f}" for name, n in found["memory"].items())
    elif not config.batch_size:
        yield "memory  batch_size=0: the largest micro batch that fits is found at the start"
    if used > 0.1 * (free or 0):
        yield f"        {used / GiB:.1f} GiB in use by others: {found['gpu_processes'] or 'not named by the driver'}"

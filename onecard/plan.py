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

from configurator import describe
from model import GPT, GPTConfig
from onecard.cards import card
from onecard.law import best_size, critical_tokens, expected_loss, law, usual_rate
from onecard.memory import CPU_BATCH_TOKENS, GiB, batch_sizes_that_fit, network, trace_memory
from onecard.optim import configure_optimizers

DESKTOP = 11.2 / 12  # share of a card's memory that is free where a desktop uses the rest
SMALL = 3e7  # parameters: on a CPU, memory is no limit for a smaller network
MEASURED_ON = 58.3e12  # FLOP/s: the peak of the RTX 4070, on which the shares of the peak were measured
NOISE = 0.4  # standard deviation of the loss of one window of 1,024 tokens: 16 of them scatter by 0.1 (both anchors)


# ---- the whole plan


def noise(vocab_size: int) -> float:
    """NOISE for another vocabulary: tokens of fewer bytes scatter less. Bytes: 0.09 measured, 0.2 of GPT-2's."""
    return NOISE * (0.2 + 0.8 * math.log(max(vocab_size, 257) / 257) / math.log(50304 / 257))


def plan(
    config,
    rates,
    train_tokens: int | None = None,
    val_tokens: int | None = None,
    bytes_per_token: float | None = None,
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

    train_tokens, val_tokens, bytes_per_token: in the dataset; eval_tokens: of each split in an evaluation; device:
    "cpu", or the name of a card with `sms` multiprocessors; dtype: of the matrix products; free_bytes, total_bytes: of
    the card's memory; gpu_processes: the other processes on it; trace: predict the memory of a step, and measure the
    speed of a small network on a CPU, which takes seconds; None: the memory only where it may be short.
    """
    model, known = network(config), card(device, sms, total_bytes)
    counts, flops_per_token = model.parameter_counts(), model.flops_per_token()
    tokens, eval_tokens = config.step_tokens * config.max_iters, min(eval_tokens, val_tokens or eval_tokens)
    small_on_cpu = device == "cpu" and counts["total"] <= SMALL
    memory = None
    if config.batch_size and (trace or (trace is None and not small_on_cpu)):
        memory = trace_memory(config, "cpu" if device == "cpu" else "cuda", dtype)
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
        "eval_error": noise(model.config.vocab_size) / math.sqrt(eval_tokens / 1024),
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
    elif small_on_cpu and trace is not False and tokens:
        token_seconds, update_seconds = measured_seconds(config, dtype)
        found["hours"] = ((tokens + evaluated) * token_seconds / world_size + config.max_iters * update_seconds) / 3600
    found["loss"], found["no_loss"] = expected_loss(config, rates, found["epochs"], bytes_per_token)
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


@torch.random.fork_rng(devices=[])
def measured_seconds(config, dtype: torch.dtype) -> tuple[float, float]:
    """Seconds for a token, forward and backward, and for the optimizers' update: measured here, on the CPU."""
    model = GPT(GPTConfig(**config.model_args()))
    model.activation_checkpointing = config.activation_checkpointing
    optimizers = configure_optimizers(model, config, "cpu")
    largest = max(1, CPU_BATCH_TOKENS // config.block_size)
    batch_size = min(config.batch_size or largest, largest)
    tokens = torch.randint(model.config.vocab_size, (batch_size, config.block_size + 1))
    for _ in range(2):  # the first is slower: buffers are made
        started = time.perf_counter()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        done = time.perf_counter()
        for optimizer in optimizers:
            optimizer.step()
        ended = time.perf_counter()
    return (done - started) / (batch_size * config.block_size), ended - done


def hours_left(config, step: int, seconds_per_step: float, eval_seconds: float = 0.0) -> float:
    """Hours for the remaining steps and their evaluations, from measured seconds."""
    evaluations = config.max_iters // config.eval_interval - step // config.eval_interval
    return ((config.max_iters - step) * seconds_per_step + evaluations * eval_seconds) / 3600


# ---- warnings


def warnings(config, found):
    """A line for each choice that costs something, with the key to change."""
    yield from memory_and_disk_warnings(config, found)
    yield from data_warnings(config, found)
    if advice := size_advice(found):
        yield advice
    yield from schedule_warnings(config, found)
    if config.n_embd < 64 * config.n_head and config.n_embd >= 128:
        remedy = f"; use --n_head={config.n_embd // 64}" if config.n_embd % 64 == 0 else ""
        yield f"head size {config.n_embd // config.n_head}: 64 or 128 learn better and run faster{remedy}"
    epochs = found["epochs"] or 0
    if config.dropout and not config.from_pretrained and 0 < epochs <= 4 and found["tokens"] > 1e8:
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
    critical = critical_tokens(found["loss"]) if found["loss"] else math.inf
    if config.step_tokens > 2 * critical:
        yield (
            f"{config.step_tokens:,} tokens a step: above {critical:,.0f}, more help little (Kaplan et al. 2020); "
            "halve them and double max_iters"
        )


def schedule_warnings(config, found):
    rate, usual = config.learning_rate, usual_rate(found["parameters"]["blocks"], config.optimizer)
    if not config.from_pretrained and not usual / 10 <= rate <= 10 * usual:
        yield (
            f"learning_rate={rate:g}: about {usual:.1g} is usual for {config.optimizer} and a network of this size; "
            f"try --learning_rate={usual:.1g}"
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


def data_warnings(config, found):
    train, val, epochs = found["train_tokens"], found["val_tokens"], found["epochs"] or 0
    if val is not None and val < 100_000 and found["eval_error"] >= 0.05:
        share = 100_000 / (train + val) if train else 1
        remedy = f"prepare with --val_fraction={math.ceil(100 * share) / 100:g}" if share <= 0.2 else "add text"
        yield f"val split of {val:,} tokens: the val loss has an error of {found['eval_error']:.2f} or more; {remedy}"
    if epochs > 4 and config.always_save_checkpoint:  # else the best is kept: overfitting is expected
        yield f"{epochs:,.1f} epochs: beyond 4 passes repeats help little; add text, or lower max_iters"


def size_advice(found):
    """What to grow or shrink, by the law where it holds, else by the tokens per parameter; or nothing."""
    ratio, expected = found["tokens_per_parameter"], found["loss"]
    if not expected:
        unusual = found["tokens"] > 1e7 and not 1 <= ratio <= 1000  # with fewer tokens it is a try
        return f"{ratio:.2g} tokens a parameter; about 20 are compute-optimal" if unusual else ""
    size, tokens = expected.parameters, expected.tokens
    n, d = best_size(size, tokens)
    gain = law(size, tokens) - law(n, d)
    text = f"for the same compute, {n / 1e6:.0f}M parameters on {d / 1e9:.2f}B tokens should end {gain:.2f} lower"
    return text if gain > 0.05 else ""


# ---- the plan as lines


def show(config, rates, facts: dict, windows, tokenizer, origin: dict | None) -> dict:
    """Prints the config and the plan of a run of train.py, and returns the plan.

    facts: of device and disk, see Runtime.plan_facts; windows: of train and val, if there is a dataset; origin: of the
    weights that the run starts from, see checkpoint.take_over. With eval_only memory and hours are left out.
    """
    began_from = (origin or {}).get("began_from") or config.init_from  # also where the run is resumed
    planned = replace(config, init_from=began_from)
    facts = facts | {f"{split.split}_tokens": split.tokens for split in windows}
    facts["bytes_per_token"] = bytes_per_token(windows)
    trace = config.plan_only if config.plan_only or config.eval_only else None
    eval_tokens = config.tokens_to_evaluate(config.batch_size)
    found = plan(planned, rates, eval_tokens=eval_tokens, trace=trace, **facts)
    ids = f"{tokenizer.n_vocab:,} of the tokenizer {tokenizer.name}" if tokenizer else "of an unknown tokenizer"
    print(describe(config))
    if windows:
        print(f"ids     {ids}; vocab_size={config.vocab_size}")
    print(*lines(found, planned), sep="\n", flush=True)
    return found


def bytes_per_token(windows) -> float | None:
    """Of the train text; windows as in show."""
    return windows[0].text_bytes / windows[0].tokens if windows and windows[0].text_bytes else None


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
    if expected := found["loss"]:
        yield f"loss    expect val {expected} on FineWeb at the end ({expected.source})"
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
        note = "predicted for eager; compiled: 20% less to 4% more" if config.compile else "predicted"
        yield f"memory  {sum(found['memory'].values()) / GiB:.2f} GiB at the peak of a step{where} ({note})"
        yield "        " + ", ".join(f"{name} {n / GiB:.2f}" for name, n in found["memory"].items())
    elif not config.batch_size:
        yield "memory  batch_size=0: the largest micro batch that fits is found at the start"
    if used > 0.1 * (free or 0):
        yield f"        {used / GiB:.1f} GiB in use by others: {found['gpu_processes'] or 'not named by the driver'}"

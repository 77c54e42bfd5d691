"""Warnings of a plan: a line for each choice that costs something, with the key to change.

for text in warnings(config, found): print("WARNING", text)     # found: of plan.plan
"""

import math
from dataclasses import replace

from onecard.law import best_size, critical_tokens, law, usual_rate
from onecard.memory import GiB, batch_sizes_that_fit


def warnings(config, found):
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

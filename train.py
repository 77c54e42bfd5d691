"""Trains a GPT on the token shards that prepare.py made. Writes checkpoints and metrics.jsonl to out_dir.

    python train.py config/quickstart.py                       # two CPU cores or any card, minutes
    python train.py config/fineweb_4070.py --batch_size=8      # any key below can be set like this
    torchrun --nproc_per_node=2 train.py config/fineweb_4070.py

A step is one optimizer step on gradient_accumulation_steps x batch_size x block_size tokens. Which tokens are in it
depends on the seed and the step alone: not on evaluation, the micro batch or the number of processes. Dropout depends
on seed, step and process. So a run that was stopped or killed and then resumed equals one that never stopped; on a CPU
with as many processes, bit for bit. onecard/checkpoint.py lists the checkpoints in out_dir; ckpt.pt is the latest.
"""

import contextlib
import math
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from configurator import key, load_config, run_script
from model import GPT, GPT2_IDS, GPTConfig
from onecard import budget, cards, checkpoint, choices, forecast, metrics, optim, plan, pretrained, profiling, writing
from onecard.checkpoint import Progress
from onecard.processes import Stop, Stopped
from onecard.runtime import Batches, Runtime, choose_batch_size, compile_model, oom_errors, start_runtime
from onecard.shards import ShardError
from onecard.tokenizer import Tokenizer, dataset_tokenizer, load_tokenizer
from onecard.windows import Windows, open_windows

EVAL_TOKENS = 10_485_760  # default tokens per split in an evaluation, as in llm.c and modded-nanogpt
BAD_STEPS = 5  # this many bad steps in a row (see watch) end the run
SPIKE = 6.0  # a loss this many standard deviations above its running mean is recorded as an event


@dataclass(frozen=True)
class TrainConfig:
    # files
    out_dir: str = key("out", "folder for checkpoints and metrics.jsonl")
    data_dir: str = key("data", "folder of all datasets")
    dataset: str = key("fineweb", "name of the dataset, a folder in data_dir")
    init_from: str = key("scratch", "scratch; resume; auto: either; or weights: gpt2, a Hugging Face folder, a ckpt.pt")
    resume_from: str = key("", "checkpoint file of another run to continue in this out_dir")
    overwrite: bool = key(False, "let a new run replace the one in out_dir")
    allow_new_data: bool = key(False, "let a resumed run continue with another dataset")
    plan_only: bool = key(False, "print what the run would need, cost and reach, then exit")
    gpu: str = key("", "with plan_only: plan for this card, such as 'RTX 4070', instead of the one here")
    budget_hours: float = key(0.0, "with plan_only: show the networks and tokens that fit N hours of the card", low=0.0)
    write_config: str = key("", "with budget_hours: write the best of them as this config file, such as config/mine.py")
    # evaluation, log, checkpoints
    eval_interval: int = key(2000, "steps between evaluations", low=1)
    eval_tokens: int = key(0, f"tokens per split in an evaluation; 0: all, at most {EVAL_TOKENS:,}", low=0)
    eval_iters: int = key(0, "nanoGPT's key for eval_tokens: eval_iters x batch_size x block_size", low=0)
    choices_file: str = key("", ".jsonl file of multiple-choice items for evaluations, as of sample.py --choices")
    eval_only: bool = key(False, "evaluate once and exit")
    profile: bool = key(False, "record ten steps with torch's profiler, list the dearest operators and exit")
    log_interval: int = key(10, "steps between log lines", low=1)
    always_save_checkpoint: bool = key(True, "save after every evaluation; False: only the best, and at the end")
    keep_every: int = key(0, "keep the checkpoint of every N steps for good; 0: only latest, previous and best", low=0)
    sample_interval: int = key(0, "generate three samples every N steps; 0: never", low=0)
    wandb_log: bool = key(False, "also log to Weights & Biases (WANDB_MODE=offline works)")
    wandb_project: str = key("onecard", "wandb project")
    wandb_run_name: str = key("", "wandb run name; empty: the name of out_dir")
    wandb_artifact: bool = key(False, "upload the last checkpoint to wandb as an artifact")
    # batch
    gradient_accumulation_steps: int = key(5 * 8, "micro batches per step, over all processes", low=1, high=10**6)
    batch_size: int = key(12, "sequences in a micro batch; 0: find the largest that fits", low=0, high=10**6)
    tokens_per_step: int = key(0, "tokens per step; replaces gradient_accumulation_steps", low=0, high=2**32)
    block_size: int = key(1024, "tokens in a sequence", low=1, high=10**6)
    # model
    arch: str = key("gpt2", "network: GPT-2's, or the shape of Qwen3", choices=("gpt2", "qwen3"))
    n_layer: int = key(12, "layers", low=1, high=10**4)
    n_head: int = key(12, "attention heads per layer", low=1)
    n_embd: int = key(768, "width (channels)", low=1, high=10**6)
    vocab_size: int = key(0, "rows of the embedding; 0: the dataset's ids, to a multiple of 64", low=0, high=10**6)
    activation_checkpointing: bool = key(False, "recompute activations in backward: less memory, slower by a third")
    dropout: float = key(0.0, "share of activations dropped in training", low=0.0, high=0.99)
    bias: bool = key(False, "biases in linear layers and norms")
    gelu: str = key("tanh", "tanh: GPT-2's approximation; none: exact, as in nanoGPT", choices=("tanh", "none"))
    # optimizer
    optimizer: str = key("adamw", "muon, normuon: for the blocks' matrices", choices=("adamw", "muon", "normuon"))
    learning_rate: float = key(6e-4, "peak learning rate", low=0.0)
    max_iters: int = key(600_000, "optimizer steps of the whole run", low=0, high=10**7)
    max_hours: float = key(0.0, "save and stop before this process has run for N hours; 0: no limit", low=0.0)
    weight_decay: float = key(1e-1, "for tensors of two or more dimensions", low=0.0)
    beta1: float = key(0.9, "AdamW's decay rate of the mean", low=0.0, below=1.0)
    beta2: float = key(0.95, "AdamW's decay rate of the square", low=0.0, below=1.0)
    grad_clip: float = key(1.0, "largest norm of the gradient; 0: no clipping", low=0.0)
    # learning rate
    decay_lr: bool = key(True, "warm-up and decay; False: constant learning_rate")
    lr_schedule: str = key("cosine", "shape of the decay; wsd: only at the end", choices=("cosine", "linear", "wsd"))
    decay_iters: int = key(0, "steps of the decay of wsd; 0: a fifth of lr_decay_iters", low=0)
    warmup_iters: int = key(2000, "steps of linear warm-up", low=0)
    lr_decay_iters: int = key(0, "step at which min_lr is reached; 0: max_iters", low=0)
    min_lr: float = key(6e-5, "learning rate at the end of the decay", low=0.0)
    # system
    seed: int = key(1337, "of the initial weights, the order of the data and dropout", low=0, high=2**63 - 1)
    device: str = key("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: str = key("auto", "of matrix products", choices=("auto", "float32", "bfloat16", "float16"))
    compile: bool = key(True, "torch.compile the model")
    backend: str = key("nccl", "of torch.distributed, for CUDA devices; others use gloo")
    ddp_timeout_minutes: float = key(10.0, "how long processes wait for a missing one before they stop", low=0.05)

    @property
    def from_pretrained(self) -> bool:
        return self.init_from not in ("scratch", "resume", "auto")

    @property
    def is_saved(self) -> bool:
        return not (self.eval_only or self.profile)

    @property
    def step_sequences(self) -> int:
        return self.tokens_per_step // self.block_size or self.gradient_accumulation_steps * self.batch_size

    @property
    def step_tokens(self) -> int:
        return self.step_sequences * self.block_size

    def tokens_to_evaluate(self, batch_size: int) -> int:
        return self.eval_tokens or self.eval_iters * batch_size * self.block_size or EVAL_TOKENS

    def model_args(self) -> dict:
        args = {name: getattr(self, name) for name in GPTConfig.__dataclass_fields__}
        return args | dict(vocab_size=self.vocab_size or GPTConfig.vocab_size)

    def problems(self) -> list[str]:
        """What does not fit together, one message each."""
        found = checkpoint.problems(self) + budget.problems(self)
        if self.from_pretrained and self.init_from not in pretrained.HUB_NAMES and not os.path.exists(self.init_from):
            names = ", ".join(("scratch, resume, auto", *pretrained.HUB_NAMES, "a Hugging Face folder, a ckpt.pt"))
            found.append(f"init_from={self.init_from!r} is not a file or folder; use {names}")
        if self.wandb_artifact and not self.wandb_log:
            found.append("wandb_artifact=True needs wandb_log=True")
        if self.decay_lr and self.min_lr > self.learning_rate:
            found.append(f"min_lr={self.min_lr:g} is above learning_rate={self.learning_rate:g}: lower min_lr")
        if self.tokens_per_step % self.block_size:
            above = math.ceil(self.tokens_per_step / self.block_size) * self.block_size
            found.append(f"tokens_per_step={self.tokens_per_step} is no multiple of block_size: use {above}")
        if self.batch_size == 0 and self.tokens_per_step == 0:
            found.append("batch_size=0 needs tokens_per_step: 524288 is usual for 100M parameters")
        return found


# ---- the learning rate


def learning_rate(step: int, config: TrainConfig) -> float:
    """The learning rate of a step, counted from 0: linear warm-up, then the schedule, then min_lr.

    lr_schedule "wsd" (warm-up, stable, decay: Hu et al. 2024, arXiv 2404.06395) stays at the peak and decays linearly
    over the last decay_iters steps.
    """
    peak = config.learning_rate
    end = config.lr_decay_iters or config.max_iters
    if not config.decay_lr:
        return peak
    if step < config.warmup_iters:
        return peak * (step + 1) / (config.warmup_iters + 1)
    if step >= end:
        return config.min_lr
    progress = (step - config.warmup_iters) / (end - config.warmup_iters)  # 0 after warm-up, 1 at the end
    if config.lr_schedule == "cosine":
        height = 0.5 * (1 + math.cos(math.pi * progress))  # 1 at the peak, 0 at min_lr
    elif config.lr_schedule == "linear":
        height = 1 - progress
    elif config.lr_schedule == "wsd":
        height = min(1.0, (end - step) / (end - decay_start(config)))
    return config.min_lr + height * (peak - config.min_lr)


def learning_rates(config: TrainConfig) -> list[float]:
    return [learning_rate(step, config) for step in range(config.max_iters)]


def decay_start(config: TrainConfig) -> int | None:
    """The step at which the decay starts, for a schedule that stays at the peak until then (wsd), else None."""
    end = config.lr_decay_iters or config.max_iters
    late = config.decay_lr and config.lr_schedule == "wsd"
    return end - (config.decay_iters or max(1, end // 5)) if late else None


# ---- setting up a run


@dataclass
class Run:
    """What the loop needs. `model` is the eager network, saved and sampled; `compiled` is trained: the same weights."""

    config: TrainConfig
    runtime: Runtime
    stop: Stop
    train_windows: Windows
    val_windows: Windows
    tokenizer: Tokenizer | None  # None: not known
    items: list[choices.Item]  # of choices_file
    model: GPT
    compiled: torch.nn.Module
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler
    progress: Progress
    batch_size: int  # sequences in a micro batch
    micro_steps: int  # micro batches of this process in a step
    writer: metrics.MetricsWriter | None = None  # of metrics.jsonl; in the first process only, which also saves
    save_seconds: float = 0.0  # of the last save
    eval_seconds: float = 0.0  # of the last evaluation

    def record(self, kind: str, **numbers) -> None:
        if self.writer:
            self.writer.write(kind, self.progress.step, **numbers)


def setup(config: TrainConfig, stop: Stop) -> Run:
    """Device, data, weights, plan, optimizers, compiler: in the order in which a mistake costs the user least time."""
    runtime = start_runtime(config)
    train_windows, val_windows, tokenizer = open_data(config)
    items = choices.read_items(config.choices_file) if config.choices_file else []
    data = checkpoint.data_identity(train_windows, val_windows)
    is_new = runtime.gather(runtime.rank == 0 and checkpoint.is_new(config))[0]
    pretrained_model, origin = starting_point(config, is_new, runtime.print0)
    config = checkpoint.take_over(config, tokenizer, origin)
    train_windows.vocab_size = val_windows.vocab_size = config.vocab_size
    saved = None if pretrained_model else origin  # the checkpoint of a run that goes on
    if saved:
        progress = checkpoint.resumed(saved, config, data, learning_rate, runtime.print0)
    else:
        progress = Progress(began_from=config.init_from if pretrained_model else "")
    runtime.require_same(step=progress.step, **data)
    writes = runtime.rank == 0 and config.is_saved
    planned: dict = {}
    if runtime.rank == 0:
        facts = runtime.plan_facts(config.out_dir)
        planned = plan.show(config, learning_rates(config), facts, (train_windows, val_windows), tokenizer, origin)
    if writes:
        checkpoint.check_room(config.out_dir, planned["disk_need"], config.keep_every)

    torch.manual_seed(config.seed)
    model = pretrained_model or GPT(GPTConfig(**config.model_args()))
    model.activation_checkpointing = config.activation_checkpointing
    model.n_ids = tokenizer.n_vocab if tokenizer else model.n_ids
    model.to(runtime.device)
    optimizers = optim.configure_optimizers(model, config, runtime.device.type, runtime.rank, runtime.world_size)
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.dtype == torch.float16)
    if saved:
        with checkpoint.readable(saved["path"]):
            model.load_state_dict(saved["model"])
            optim.load_state_dicts(optimizers, saved)
            if saved["scaler"] and scaler.is_enabled():
                scaler.load_state_dict(saved["scaler"])
    elif origin and "adamw" in origin:  # nanoGPT's
        optim.take_moments(optimizers, origin["adamw"], runtime.print0)
    runtime.print0(f"device  {runtime.world_size} x {runtime.device_name}, {runtime.precision}")
    batch_size, micro_steps = choose_batch_size(model, config, runtime, progress.found)
    compiled = compile_model(model, (batch_size, config.block_size), config.compile, runtime)
    writer = None
    if writes:
        if is_new:
            checkpoint.remove_all(config.out_dir, runtime.print0)  # there are some only with overwrite=True
        about: dict = dict(torch=torch.__version__, device=runtime.device_name, dtype=runtime.dtype_name, data=data)
        about |= dict(parameters=model.num_params(positions=False), planned_memory=planned["memory"])
        about |= dict(planned_hours=planned["hours"], expected_loss=planned["loss"] and planned["loss"].loss)
        writer = metrics.start(config, progress, tokenizer, is_new, about, runtime.print0)
    return Run(
        config=config,
        runtime=runtime,
        stop=stop,
        train_windows=train_windows,
        val_windows=val_windows,
        tokenizer=tokenizer,
        items=items,
        model=model,
        compiled=compiled,
        optimizers=optimizers,
        scaler=scaler,
        progress=progress,
        batch_size=batch_size,
        micro_steps=micro_steps,
        writer=writer,
    )


def open_data(config):
    """(train windows, val windows, tokenizer). The tokenizer is None if it is not known."""
    folder, rows = Path(config.data_dir) / config.dataset, config.vocab_size or None
    train_windows, val_windows = open_windows(folder, config.block_size, config.seed, rows)
    tokenizer = dataset_tokenizer(folder)
    if tokenizer is None and not 0 < config.vocab_size < GPT2_IDS:
        tokenizer = load_tokenizer()  # GPT-2's, as in nanoGPT
    val_windows.text_bytes = metrics.text_bytes(val_windows, tokenizer)
    return train_windows, val_windows, tokenizer


def starting_point(config, is_new, print0):
    """(pretrained model, facts about its weights), or (None, the checkpoint to go on from, if any)."""
    saved = checkpoint.find(config, is_new, print0)
    if saved or not config.from_pretrained:
        return None, saved
    model, facts = pretrained.start(config.init_from, config.block_size, config.dropout)
    facts |= dict(model_args=asdict(model.config), path=config.init_from, began_from=config.init_from)
    return model, facts


def plan_only(config: TrainConfig) -> None:
    """Prints the plan of a run without starting it. With gpu=NAME it needs no card."""
    facts = cards.facts(config) or start_runtime(config).plan_facts(config.out_dir)
    windows, tokenizer = (), None
    try:
        *windows, tokenizer = open_data(config)
    except ShardError as error:
        print(f"data    unknown: {error}")
    _, origin = starting_point(config, checkpoint.is_new(config), print)
    config = checkpoint.take_over(config, tokenizer, origin)
    if config.budget_hours:
        budget.show(config, facts, windows)
    else:
        plan.show(config, learning_rates(config), facts, windows, tokenizer, origin)


# ---- evaluation and checkpoints


@torch.no_grad()
def sequence_losses(run, windows):
    """float64 (n,): the mean loss of each of n evenly spread windows of a split, the same windows every time."""
    runtime, batch_size = run.runtime, run.batch_size
    n = max(1, min(len(windows), run.config.tokens_to_evaluate(batch_size) // windows.block_size))
    chosen = np.arange(n) * len(windows) // n
    losses = torch.zeros(n, device=runtime.device)
    skip = runtime.rank * batch_size  # before the first batch of this rank; each rank has the same number of rounds
    rounds = range(skip, n + skip, runtime.world_size * batch_size)
    for first in tqdm(rounds, desc=f"eval {windows.split}", delay=5, leave=False, disable=runtime.rank > 0 or None):
        if reason := runtime.max_over_processes(run.stop.reason(run.save_seconds)):
            raise Stopped(reason)
        batch = np.arange(first, min(first + batch_size, n))
        padded = np.resize(batch if len(batch) else 0, batch_size)  # repeats windows: one shape, compiled once
        tokens = runtime.to_device(torch.from_numpy(windows.rows(chosen[padded])))  # (B, T + 1) of int64
        with runtime.autocast():
            loss = run.compiled(tokens[:, :-1], tokens[:, 1:], reduction="none")  # (B, T)
        losses[first : first + batch_size] = loss.mean(1)[: len(batch)]
    if runtime.world_size > 1:
        dist.all_reduce(losses)
    return losses.cpu().double().numpy()  # (an Apple GPU has no float64)


def evaluate(run: Run) -> bool:
    """Measures the loss of both splits, logs it with a forecast -> whether the val loss is the best so far."""
    progress, print0 = run.progress, run.runtime.print0
    began = time.perf_counter()
    run.model.eval()
    train, val = sequence_losses(run, run.train_windows), sequence_losses(run, run.val_windows)
    run.model.train()
    run.eval_seconds = time.perf_counter() - began
    progress.last_eval_step = progress.step
    if not (np.isfinite(train).all() and np.isfinite(val).all()):
        run.record("event", event="evaluation not finite")
        print0(f"step {progress.step}: the loss of the evaluation is not finite")
        return False
    numbers = metrics.eval_numbers(train, val, run.val_windows.tokens, run.val_windows.text_bytes)
    numbers |= choices.evaluate(run) if run.items and run.runtime.rank == 0 else {}
    is_best = numbers["val_loss"] < progress.best_val_loss
    progress.best_val_loss = min(numbers["val_loss"], progress.best_val_loss)
    run.record("eval", **numbers, eval_seconds=run.eval_seconds)
    print0(metrics.eval_line(progress.step, numbers, run.eval_seconds, run.tokenizer))
    progress.evals.append((progress.step, numbers["train_loss"], numbers["val_loss"]))
    if line := forecast.forecast_line(progress.evals, learning_rates(run.config)):
        print0(line)
    return is_best


def save(run: Run, names: list[str]) -> None:
    """Saves a checkpoint, under these names too. Weights that are not finite are not saved: the older files stay."""
    if run.writer is None:  # only the first process saves
        return
    norms = torch.stack(torch._foreach_norm([p.detach() for p in run.model.parameters()]))
    if not bool(torch.isfinite(norms).all()):
        run.record("event", event="weights not finite, not saved")
        run.runtime.print0(f"step {run.progress.step}: the weights are not finite: not saved, older checkpoints stay")
        return
    began = time.monotonic()
    state = run.progress.as_saved() | optim.state_dicts(run.optimizers)
    state |= dict(model=run.model.state_dict(), scaler=run.scaler.state_dict())
    state |= dict(model_args=asdict(run.model.config), config=asdict(run.config))
    state["data"] = checkpoint.data_identity(run.train_windows, run.val_windows)
    state["tokenizer"] = run.tokenizer and run.tokenizer.state()
    run.writer.sync()
    checkpoint.save(run.config.out_dir, state, names, run.config.keep_every)
    run.save_seconds = time.monotonic() - began


# ---- training


def train(config: TrainConfig, stop: Stop) -> int:
    """Runs until max_iters -> 0, or until a signal or max_hours -> the reason, see processes.Stop."""
    run = setup(config, stop)
    config, runtime, progress = run.config, run.runtime, run.progress
    model, compiled, optimizers, scaler = run.model, run.compiled, run.optimizers, run.scaler
    if config.eval_only:
        with contextlib.suppress(Stopped):
            evaluate(run)
        return runtime.max_over_processes(stop.reason())
    batches = Batches(run.train_windows, run.batch_size, runtime, progress.sequences)
    stop_reason, times = 0, metrics.StepTimes()
    profiler = profiling.StepProfiler(config.out_dir, runtime) if config.profile else None
    while not stop_reason:
        # ---- evaluate and save, when due
        step, done = progress.step, progress.step >= config.max_iters and not profiler
        names, save_now = [], False
        try:
            if (done or step % config.eval_interval == 0) and progress.last_eval_step != step and not profiler:
                is_best = evaluate(run)
                names = [checkpoint.BEST] if is_best else []
                save_now = done or is_best or config.always_save_checkpoint
            if step == decay_start(config):
                names.append(checkpoint.BEFORE_DECAY)
            if (save_now or names) and step > 0:  # at step 0 there is nothing to save
                save(run, names)
        except Stopped as stopped:
            stop_reason = stopped.args[0]
        if stop_reason or done:
            break

        # ---- one step: forward and backward of each micro batch, then the optimizers
        began = time.perf_counter()
        torch.manual_seed(runtime.dropout_seed(config.seed, step))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config)
        loss_sum = torch.zeros((), device=runtime.device)
        for micro_step in range(run.micro_steps):
            inputs, targets = batches.next()  # (B, T) each
            is_last = micro_step == run.micro_steps - 1  # only then processes exchange gradients (DDP)
            with contextlib.nullcontext() if is_last or runtime.world_size == 1 else compiled.no_sync():
                with runtime.autocast():
                    micro_loss = compiled(inputs, targets) / run.micro_steps
                scaler.scale(micro_loss).backward()
            loss_sum += micro_loss.detach()
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
        reason = torch.full((), float(stop.reason(run.save_seconds)), device=runtime.device)
        if runtime.world_size > 1:
            dist.all_reduce(loss_sum)
            loss_sum /= runtime.world_size
            dist.all_reduce(reason, dist.ReduceOp.MAX)  # all processes stop after the same step
        scale = scaler.scale(torch.ones((), device=runtime.device))  # of this step; 1 unless float16
        loss, grad_norm, reason, scale = torch.stack((loss_sum, norm, reason, scale)).tolist()  # the one wait
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if finite:  # else the step is skipped, for all optimizers: the scaler alone might skip one and step the other
            for optimizer in optimizers:
                optimizer.step()  # scaler.step would wait for the device to check once more
        scaler.update()  # with float16: halves the scale after gradients that are not finite
        model.zero_grad(set_to_none=True)
        progress.step += 1
        progress.sequences += config.step_sequences
        stop_reason = int(reason)
        times.add(time.perf_counter() - began, batches.take_waited())

        # ---- watch and log
        if profiler and profiler.step_done():
            return 0
        watch(run, loss, finite)
        metrics.add_step(progress.window, finite, loss, grad_norm)
        if progress.step % config.log_interval == 0:
            seconds, data_share = times.means()
            tokens_per_s = config.step_tokens / seconds
            numbers = metrics.window_means(progress.window) | {
                "lr": learning_rate(step, config),
                "tokens": progress.sequences * config.block_size,
                "ms_per_step": 1000 * seconds,
                "tokens_per_s": tokens_per_s,
                "data_share": data_share,
                "hours_left": plan.hours_left(config, progress.step, seconds, run.eval_seconds),
            }
            if scaler.is_enabled():
                numbers["scale"] = scale
            numbers |= runtime.card_numbers(tokens_per_s * model.flops_per_token())
            run.record("train", **numbers)
            runtime.print0(metrics.log_line(progress.step, config.max_iters, numbers))
            progress.window = {}
        if config.sample_interval and progress.step % config.sample_interval == 0 and run.writer and run.tokenizer:
            writing.write_samples(run)
    if stop_reason:
        save(run, [])
    there = checkpoint.newest(config.out_dir) or "no checkpoint"
    end = f"step {progress.step} of {config.max_iters}; {config.out_dir} has {there}"
    if stop_reason:
        runtime.print0(f"stopped at {end}; to continue, add --init_from=resume to the same command")
    else:
        runtime.print0(f"done: {end}\nnext: python sample.py {config.out_dir}, python report.py {config.out_dir}")
    if run.writer:
        run.writer.close(artifact=Path(config.out_dir) / checkpoint.LATEST if config.wandb_artifact else None)
    return stop_reason


def watch(run: Run, loss: float, finite: bool) -> None:
    """Records a skipped step or a spike of the loss. Raises SystemExit(3) after BAD_STEPS bad steps in a row.

    A step is skipped if its loss or a gradient is not finite. With float16 it is bad only if the scale has fallen below
    1: above that, skips are how the scaler finds its scale.
    """
    progress = run.progress
    sequences = [progress.sequences - run.config.step_sequences, progress.sequences - 1]  # first and last of the step
    if finite:
        progress.bad_steps, mean = 0, progress.running["mean"]
        if metrics.z_score(progress.running, loss) > SPIKE:
            run.record("event", event="spike", sequences=sequences, loss=loss, mean=mean)
            run.runtime.print0(f"step {progress.step}: the loss jumped from {mean:.4f} to {loss:.4f}")
        return
    scale = run.scaler.get_scale() if run.scaler.is_enabled() else None
    progress.skipped_steps += 1
    progress.bad_steps += scale is None or scale < 1
    run.record("event", event="skipped", sequences=sequences, scale=scale)
    if progress.bad_steps >= BAD_STEPS:
        newest = checkpoint.newest(run.config.out_dir)
        resume = f"--init_from=resume continues from {newest}" if newest else "there is no checkpoint yet"
        what = f"train.py: stopped at step {progress.step}: the gradients of {BAD_STEPS} steps in a row were not finite"
        remedy = "try --dtype=bfloat16, a lower --learning_rate or --grad_clip"
        run.runtime.print0(f"{what}, so these were not applied; {resume}; {remedy}", file=sys.stderr)
        raise SystemExit(3)


# ---- the command


def main(argv: list[str] | None = None) -> None:
    config = load_config(TrainConfig, argv)
    if config.plan_only:
        plan_only(config)
        return
    writes = int(os.environ.get("RANK", 0)) == 0 and not config.eval_only
    try:
        lock = checkpoint.owned(config.out_dir) if writes else contextlib.nullcontext()
        with lock, oom_errors(config), Stop(config.max_hours) as stop:
            stop_reason = train(config, stop)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if stop_reason not in (0, Stop.TIME_IS_UP):
        raise SystemExit(128 + stop_reason)


if __name__ == "__main__":
    run_script(main)

"""Trains a GPT on the token shards that prepare.py made; writes checkpoints and metrics to out_dir.

    python train.py config/quickstart.py                       # two CPU cores or any card, minutes
    python train.py config/fineweb_4070.py --batch_size=8      # any key below can be given like this
    torchrun --nproc_per_node=2 train.py config/fineweb_4070.py

A step is one optimizer step on gradient_accumulation_steps x batch_size x block_size tokens. Which tokens are in it
depends on the seed and the step alone: not on evaluation, on the micro batch, or on the number of processes. So a run
that was stopped, killed or moved and resumed is the run that never stopped.
"""

import contextlib
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from onecard import checkpoint
import convert
from onecard import durable
from onecard import plan
from configurator import describe, key, load_config, run_script
from onecard.generation import sample_texts
from onecard.metrics import MetricsError, deviations, eval_line, eval_numbers, log_line
from model import ModelError
from run import own, plan_only, start_run
from onecard.runtime import Batches, DeviceError, Stop, out_of_memory
from onecard.shards import ShardError
from onecard.tokenizer import TokenizerError, load_tokenizer

EVAL_TOKENS = 10_485_760  # of each split, where the config names no number; llm.c's and modded-nanogpt's val set
BAD_STEPS = 5  # so many steps in a row without finite gradients end the run
SPIKE = 6.0  # a loss so many deviations above its running mean is an event


@dataclass(frozen=True)
class TrainConfig:
    # files
    out_dir: str = key("out", "folder for checkpoints and metrics.jsonl")
    data_dir: str = key("data", "folder that holds the datasets")
    dataset: str = key("fineweb", "name of the dataset, a folder in data_dir")
    init_from: str = key(
        "scratch",
        "scratch: a new run; resume: go on with the one in out_dir; auto: if there is one; gpt2, gpt2-medium, "
        "gpt2-large, gpt2-xl, a folder in Hugging Face format or a ckpt.pt: a new run from those weights, whose "
        "network it takes over",
    )
    resume_from: str = key("", "a checkpoint file of another run, to go on from in this out_dir")
    overwrite: bool = key(False, "let a new run replace the one that is in out_dir")
    allow_new_data: bool = key(False, "let a resumed run go on with a dataset that is not the one it began with")
    plan_only: bool = key(False, "show what the run would need, cost and reach, and exit")
    gpu: str = key("", "plan for this card, such as 'RTX 4070', instead of the one here; with plan_only")
    # evaluation, log, checkpoints
    eval_interval: int = key(2000, "steps between evaluations", low=1)
    eval_tokens: int = key(0, f"tokens of each split in an evaluation; 0: all, at most {EVAL_TOKENS:,}", low=0)
    eval_iters: int = key(0, "nanoGPT's way to say it: eval_iters x batch_size x block_size tokens", low=0)
    eval_only: bool = key(False, "evaluate once and exit")
    log_interval: int = key(10, "steps between log lines", low=1)
    always_save_checkpoint: bool = key(True, "save after each evaluation; False: only after those that were the best")
    keep_every: int = key(
        0, "keep the checkpoint of every so many steps for good; 0: only latest, previous, best", low=0
    )
    sample_interval: int = key(0, "steps between three texts of the model, into the metrics; 0: none", low=0)
    wandb_log: bool = key(False, "log to Weights & Biases too (WANDB_MODE=offline works)")
    wandb_project: str = key("onecard", "project there")
    wandb_run_name: str = key("", "name of the run there; empty: the name of out_dir")
    wandb_artifact: bool = key(False, "give it the last checkpoint too, as an artifact")
    # batch
    gradient_accumulation_steps: int = key(5 * 8, "micro batches a step, over all processes together", low=1)
    batch_size: int = key(12, "sequences in a micro batch; 0: as many as fit, with tokens_per_step", low=0)
    tokens_per_step: int = key(0, "tokens of a step, instead of gradient_accumulation_steps, which follows", low=0)
    block_size: int = key(1024, "tokens in a sequence", low=1)
    # model
    arch: str = key("gpt2", "the network: GPT-2's, or Qwen3's shape", choices=("gpt2", "qwen3"))
    n_layer: int = key(12, "layers", low=1)
    n_head: int = key(12, "attention heads a layer", low=1)
    n_embd: int = key(768, "width", low=1)
    vocab_size: int = key(50304, "rows of the embedding: GPT-2's 50257 and padding", low=1)
    activation_checkpointing: bool = key(False, "compute activations twice instead of keeping them: slower, smaller")
    dropout: float = key(0.0, "share of activations dropped in training", low=0.0, high=0.99)
    bias: bool = key(False, "biases in linear layers and norms")
    gelu: str = key("tanh", "GPT-2's form of it; none: the exact one, which nanoGPT has", choices=("tanh", "none"))
    # optimizer
    optimizer: str = key("adamw", "muon: for the matrices in the blocks, adamw for the rest", choices=("adamw", "muon"))
    learning_rate: float = key(6e-4, "peak learning rate", low=0.0)
    max_iters: int = key(600_000, "optimizer steps of the whole run", low=0)
    max_hours: float = key(0.0, "stop and save before so many hours have passed; 0: no limit", low=0.0)
    weight_decay: float = key(1e-1, "AdamW's, for tensors of two or more dimensions", low=0.0)
    beta1: float = key(0.9, "AdamW's, of the mean", low=0.0, high=1.0)
    beta2: float = key(0.95, "AdamW's, of the square", low=0.0, high=1.0)
    grad_clip: float = key(1.0, "largest norm of the gradient; 0: no clipping", low=0.0)
    # learning rate
    decay_lr: bool = key(True, "warm-up and decay; False: learning_rate throughout")
    lr_schedule: str = key("cosine", "shape of the decay; wsd: only at the end", choices=("cosine", "linear", "wsd"))
    decay_iters: int = key(0, "steps of wsd's decay; 0: a fifth of the run", low=0)
    warmup_iters: int = key(2000, "steps of linear warm-up", low=0)
    lr_decay_iters: int = key(0, "step at which min_lr is reached; 0: max_iters", low=0)
    min_lr: float = key(6e-5, "learning rate at the end of the decay", low=0.0)
    # system
    seed: int = key(1337, "of the weights, the order of the data and dropout", low=0)
    device: str = key("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: str = key("auto", "of the matrix products", choices=("auto", "float32", "bfloat16", "float16"))
    compile: bool = key(True, "torch.compile the model")
    backend: str = key("nccl", "of torch.distributed, for CUDA devices; others use gloo")

    @property
    def foreign(self):
        """Whether a new run begins with weights that others trained."""
        return self.init_from not in ("scratch", "resume", "auto")

    def problems(self):
        found = []
        if self.foreign and self.init_from not in convert.HUB_NAMES and not os.path.exists(self.init_from):
            found.append(
                f"init_from={self.init_from!r} is no file or folder; permitted are scratch, resume, auto, "
                f"{', '.join(convert.HUB_NAMES)}, a folder in Hugging Face format, a ckpt.pt"
            )
        if self.foreign and self.resume_from:
            found.append(f"init_from={self.init_from} and resume_from={self.resume_from} exclude each other: give one")
        if self.wandb_artifact and not self.wandb_log:
            found.append("wandb_artifact=True needs wandb_log=True")
        if self.n_embd % self.n_head:
            found.append(f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}: change one of them")
        if self.decay_lr and self.min_lr > self.learning_rate:
            found.append(f"min_lr={self.min_lr:g} is above learning_rate={self.learning_rate:g}: the rate would rise")
        if self.tokens_per_step % self.block_size:
            near = self.tokens_per_step // self.block_size * self.block_size
            found.append(
                f"tokens_per_step={self.tokens_per_step:,} is not a multiple of block_size={self.block_size}: "
                f"{near:,} and {near + self.block_size:,} are"
            )
        if self.batch_size == 0 and self.tokens_per_step == 0:
            found.append("batch_size=0 (find one that fits) needs tokens_per_step: 524288 is usual for 100M parameters")
        if self.gpu and not (plan.card(self.gpu) and self.plan_only):
            wanted = "one of " + ", ".join(plan.CARDS) if self.plan_only else "given with --plan_only=True"
            found.append(f"gpu={self.gpu!r} has to be {wanted}")
        if self.keep_every % self.eval_interval or (self.keep_every and not self.always_save_checkpoint):
            found.append(
                f"keep_every={self.keep_every} has to be a multiple of eval_interval={self.eval_interval}, with "
                "always_save_checkpoint=True: checkpoints are made after evaluations"
            )
        return found

    def model_args(self):
        names = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "dropout", "bias", "arch", "gelu")
        return {name: getattr(self, name) for name in names}

    def tokens_to_evaluate(self, batch_size):
        return self.eval_tokens or self.eval_iters * batch_size * self.block_size or EVAL_TOKENS

    @property
    def step_sequences(self):
        return self.tokens_per_step // self.block_size or self.gradient_accumulation_steps * self.batch_size

    @property
    def step_tokens(self):
        return self.step_sequences * self.block_size


class Stopped(Exception):
    """Raised inside an evaluation when the run is to stop; its argument is the wish."""


# ---- a step


def step_seed(seed, step, rank):
    """The seed of dropout in one step of one process: unrelated for neighbouring steps and ranks."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def train_step(run, batches):
    """One optimizer step -> (mean loss of its tokens, norm of the gradient before clipping, wish to stop).

    Gradients that are not finite are not applied: with float16 that is how the scaler finds its scale.
    """
    config, runtime, scaler = run.config, run.runtime, run.scaler
    torch.manual_seed(step_seed(config.seed, run.progress.step, runtime.rank))
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate(run.progress.step, config)
    micro_steps = run.micro_steps
    total = torch.zeros((), device=runtime.device)
    for micro in range(micro_steps):
        inputs, targets = batches.next()
        silent = runtime.world_size > 1 and micro < micro_steps - 1  # gradients are exchanged at the last one only
        with run.compiled.no_sync() if silent else contextlib.nullcontext():
            with runtime.autocast():
                loss = run.compiled(inputs, targets) / micro_steps
            scaler.scale(loss).backward()
        total += loss.detach()
    for optimizer in run.optimizers:
        scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), config.grad_clip or math.inf)
    wish = torch.tensor(float(run.wish()), device=runtime.device)
    if runtime.world_size > 1:
        dist.all_reduce(total)
        total /= runtime.world_size
        dist.all_reduce(wish, dist.ReduceOp.MAX)  # all processes stop behind the same step
    loss, norm, wish = torch.stack((total, norm, wish)).tolist()  # the one read from the device in a step
    if math.isfinite(norm) and math.isfinite(loss):
        for optimizer in run.optimizers:  # both or neither: alone, the scaler would skip one and step the other
            scaler.step(optimizer)
    scaler.update()
    run.model.zero_grad(set_to_none=True)
    run.progress.step += 1
    run.progress.sequences += config.step_sequences
    return loss, norm, int(wish)


def watch(run, loss, norm):
    """Notes what went wrong in a step. Raises SystemExit(3) after BAD_STEPS steps in a row that could not be applied:
    in float16 of those at a scale below 1 only, for above it skips are how the scaler finds its scale."""
    config, progress = run.config, run.progress
    sequences = [progress.sequences - config.step_sequences, progress.sequences - 1]
    if not (math.isfinite(norm) and math.isfinite(loss)):
        progress.skipped_steps += 1
        scale = run.scaler.get_scale() if run.scaler.is_enabled() else None
        progress.bad_steps += scale is None or scale < 1
        run.record("event", event="skipped", sequences=sequences, scale=scale)
        if progress.bad_steps >= BAD_STEPS:
            give_up(run, sequences, scale)
        return
    progress.bad_steps = 0
    before = dict(progress.running)
    if deviations(progress.running, loss) > SPIKE:
        run.record("event", event="spike", sequences=sequences, loss=loss, mean=before["mean"])
        run.say(
            f"step {progress.step}: the loss jumped to {loss:.4f} from {before['mean']:.4f} "
            f"(sequences {sequences[0]} to {sequences[1]})"
        )


def give_up(run, sequences, scale):
    if run.saver is None:  # another process tells it
        raise SystemExit(3)
    run.saver.wait()
    held = checkpoint.newest(run.config.out_dir)
    print(
        f"train.py: stopped at step {run.progress.step}: {BAD_STEPS} steps in a row had gradients that are not finite"
        + (f", the last at a scale of {scale:g}" if scale else "")
        + f"; the last batch was sequences {sequences[0]} to {sequences[1]}. Nothing of it was applied or saved; "
        + (f"--init_from=resume goes on from {held}" if held else "there is no checkpoint yet")
        + f". Try {'--dtype=bfloat16, ' * (scale is not None)}a lower --learning_rate or a lower --grad_clip",
        file=sys.stderr,
    )
    raise SystemExit(3)


# ---- evaluation, log, checkpoint


@torch.no_grad()
def sequence_losses(run, blocks, tokens):
    """-> float64 (n,): the mean loss of each of n evenly spread windows of a split, the same ones every time."""
    runtime, batch_size = run.runtime, run.batch_size
    n = max(1, min(blocks.blocks, tokens // blocks.block_size))
    windows = np.arange(n) * blocks.blocks // n
    losses = torch.zeros(n, device=runtime.device)
    rounds = range(runtime.rank * batch_size, n + runtime.rank * batch_size, runtime.world_size * batch_size)
    silent = runtime.rank > 0 or None
    for first in tqdm(rounds, desc=f"evaluating {blocks.split}", delay=5, leave=False, disable=silent):
        if wish := runtime.largest(run.wish()):
            raise Stopped(wish)
        batch = np.arange(first, min(first + batch_size, n))
        padded = np.resize(batch if len(batch) else 0, batch_size)  # one shape, one compilation
        tokens = torch.from_numpy(blocks.rows(windows[padded])).to(runtime.device).to(torch.int64)
        with runtime.autocast():
            loss = run.compiled(tokens[:, :-1], tokens[:, 1:], reduction="none")  # (B, T)
        losses[first : first + batch_size] = loss.mean(1)[: len(batch)]
    if runtime.world_size > 1:
        dist.all_reduce(losses)
    return losses.cpu().double().numpy()  # (an Apple GPU has no float64)


def evaluate(run):
    """Measures both splits, records and says it, with a forecast from half of the schedule on -> True if the best."""
    config, progress = run.config, run.progress
    tokens = config.tokens_to_evaluate(run.batch_size)
    began = time.perf_counter()
    run.model.eval()
    train, val = (sequence_losses(run, blocks, tokens) for blocks in (run.train_blocks, run.val_blocks))
    run.model.train()
    seconds = run.eval_seconds = time.perf_counter() - began
    progress.last_eval_step = progress.step
    if not (np.isfinite(train).all() and np.isfinite(val).all()):
        run.record("event", event="evaluation not finite")
        run.say(f"step {progress.step}: the loss of the evaluation is not finite")
        return False
    numbers = eval_numbers(train, val, run.val_blocks.tokens, run.val_blocks.text_bytes)
    if is_best := numbers["val_loss"] < progress.best_val_loss:
        progress.best_val_loss = numbers["val_loss"]
    run.record("eval", **numbers, eval_seconds=seconds)
    run.say(eval_line(progress.step, numbers, seconds))
    progress.evals.append((progress.step, numbers["train_loss"], numbers["val_loss"]))
    if forecast := plan.forecast_line(progress.evals, config):
        run.say(forecast)
    return is_best


def log_step(run, loss, norm, seconds, waited):
    """Takes a step into the window; writes the log line if it is due."""
    config, progress, window = run.config, run.progress, run.progress.window
    applied = math.isfinite(norm) and math.isfinite(loss)
    sums = dict(steps=1, applied=1, loss=loss, grad_norm=norm) if applied else dict(steps=1)
    for name, value in sums.items():
        window[name] = window.get(name, 0) + value
    run.timed.append((seconds, waited))
    if progress.step % config.log_interval == 0:
        numbers = window_means(run)
        run.record("train", **numbers)
        run.say(log_line(progress.step, config.max_iters, numbers))
        progress.window, run.timed, run.warm = {}, [], True


def window_means(run):
    """The numbers of a log line: means over all tokens and all applied steps since the last one."""
    config, runtime, window = run.config, run.runtime, run.progress.window
    timed = run.timed if run.warm else run.timed[1:] or run.timed  # a process's first step is slower than all others
    applied, (seconds, waited) = window.get("applied", 0), np.mean(timed, axis=0).tolist()
    numbers = {name: window[name] / applied if applied else None for name in ("loss", "grad_norm")}
    numbers |= dict(lr=plan.learning_rate(run.progress.step - 1, config), skipped=window["steps"] - applied)
    numbers |= dict(tokens=run.progress.sequences * config.block_size)
    numbers |= dict(ms_per_step=1000 * seconds, tokens_per_s=config.step_tokens / seconds)
    numbers |= dict(data_share=waited / seconds)
    numbers |= dict(hours_left=plan.hours_left(config, run.progress.step, seconds, run.eval_seconds))
    if run.scaler.is_enabled():
        numbers["scale"] = run.scaler.get_scale()
    if runtime.peak_flops:
        flops = numbers["tokens_per_s"] * run.model.flops_per_token()
        numbers["mfu"] = flops / (runtime.peak_flops * runtime.world_size)
    if runtime.device.type == "cuda":
        numbers["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return numbers


def show_samples(run):
    """Three texts of the model as it is, the same draws every time, on the screen and into the metrics."""
    with run.runtime.autocast():
        texts = sample_texts(run.model, load_tokenizer())
    run.record("samples", texts=texts)
    run.say(f"step {run.progress.step}: the model writes\n" + "\n---------------\n".join(texts))


def evaluate_and_save(run):
    """What is due between two steps: an evaluation, a checkpoint, the checkpoint before wsd's decay."""
    config, step, names = run.config, run.progress.step, []
    done, wanted = step >= config.max_iters, False
    if (done or step % config.eval_interval == 0) and run.progress.last_eval_step != step:
        is_best = evaluate(run)
        names += [checkpoint.BEST] * is_best
        wanted = done or is_best or config.always_save_checkpoint
    if config.lr_schedule == "wsd" and config.decay_lr and step == plan.decay_start(config):
        names.append(checkpoint.BEFORE_DECAY)
    if step and (wanted or names):
        save(run, names)


def save(run, names=()):
    """Starts to write the checkpoint, under these names too; not if the weights are not finite: what is there stays."""
    if run.saver is None:
        return
    norms = torch.stack(torch._foreach_norm([p.detach() for p in run.model.parameters()]))
    if not bool(torch.isfinite(norms).all()):
        run.record("event", event="weights not finite, not saved")
        run.say(f"step {run.progress.step}: the weights are not finite: not saved, the older checkpoints stay")
        return
    run.metrics.sync()
    run.saver.save(run.state(), names)


# ---- the run


def train(config, stop):
    """-> 0 when the run is done, TIME_IS_UP or the number of the signal that ended it early."""
    run = start_run(config, stop)
    progress, wish = run.progress, 0
    if config.eval_only:
        with contextlib.suppress(Stopped):
            evaluate(run)
        return stop.wish()
    if progress.step >= config.max_iters:
        run.say(f"nothing to do: the run is at step {progress.step} of max_iters={config.max_iters}")
    batches = Batches(run.train_blocks, run.batch_size, run.runtime, progress.sequences)
    while not wish:
        try:
            evaluate_and_save(run)
        except Stopped as stopped:
            wish = stopped.args[0]
        if wish or progress.step >= config.max_iters:
            break
        began = time.perf_counter()
        loss, norm, wish = train_step(run, batches)
        seconds = time.perf_counter() - began
        watch(run, loss, norm)
        log_step(run, loss, norm, seconds, batches.take_waited())
        if config.sample_interval and progress.step % config.sample_interval == 0 and run.metrics:
            show_samples(run)
        if run.saver:
            run.saver.poll()
    if wish:
        save(run)
    end(run, wish)
    return wish


def end(run, wish):
    """Waits for the last checkpoint and says how the run ended."""
    if run.saver:
        run.saver.close()
        if run.config.wandb_artifact:
            run.metrics.log_checkpoint(Path(run.config.out_dir) / checkpoint.LATEST)
        run.metrics.close()
    out_dir, step = run.config.out_dir, run.progress.step
    if wish:
        run.say(f"stopped at step {step}; --init_from=resume goes on from {out_dir}/{checkpoint.LATEST}")
    else:
        run.say(f"done: {checkpoint.LATEST}, {checkpoint.BEST} and metrics.jsonl are in {out_dir}")


def main(argv=None):
    config = load_config(TrainConfig, argv)
    if int(os.environ.get("RANK", 0)) == 0:
        print(describe(config), flush=True)
    if config.plan_only:
        return plan_only(config)
    try:
        with own(config), Stop(config.max_hours) as stop:
            wish = train(config, stop)
    except torch.OutOfMemoryError as error:
        raise DeviceError(out_of_memory(config, error)) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if wish not in (0, Stop.TIME_IS_UP):
        raise SystemExit(128 + wish)


if __name__ == "__main__":
    mistakes = (convert.ConvertError, TokenizerError, ModelError, DeviceError, ShardError, MetricsError)
    run_script(main, *mistakes, checkpoint.CheckpointError, durable.OwnedError)

"""Trains a GPT on the token shards that prepare.py made; writes checkpoints and metrics to out_dir.

    python train.py config/quickstart.py                       # two CPU cores or any card, minutes
    python train.py config/fineweb_4070.py --batch_size=8      # any key below can be given like this
    torchrun --nproc_per_node=2 train.py config/fineweb_4070.py

A step is one optimizer step on gradient_accumulation_steps x batch_size x block_size tokens. Which tokens are in it
depends on the seed and the step alone: not on evaluation, on the micro batch, or on the number of processes.
"""

import contextlib
import math
import os
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoint
import plan
from configurator import ConfigError, describe, key, load_config, run_script
from metrics import MetricsWriter, duration, log_line, start_wandb
from model import GPT, GPTConfig, ModelError, pick_device, pick_dtype
from shards import ShardError, TokenBlocks

EVAL_TOKENS = 10_485_760  # of each split, where the config names no number; llm.c's and modded-nanogpt's val set
EVAL_GROUPS = 64


@dataclass(frozen=True)
class TrainConfig:
    # files
    out_dir: str = key("out", "folder for checkpoints and metrics.jsonl")
    data_dir: str = key("data", "folder that holds the datasets")
    dataset: str = key("fineweb", "name of the dataset, a folder in data_dir")
    init_from: str = key("scratch", "a new run, or go on with the one in out_dir", choices=("scratch", "resume"))
    overwrite: bool = key(False, "let a new run replace the one that is in out_dir")
    # evaluation, log, checkpoints
    eval_interval: int = key(2000, "steps between evaluations", low=1)
    eval_tokens: int = key(0, f"tokens of each split in an evaluation; 0: all, at most {EVAL_TOKENS:,}", low=0)
    eval_iters: int = key(0, "nanoGPT's way to say it: eval_iters x batch_size x block_size tokens", low=0)
    eval_only: bool = key(False, "evaluate once and exit")
    log_interval: int = key(10, "steps between log lines", low=1)
    always_save_checkpoint: bool = key(True, "save after each evaluation; False: only after those that were the best")
    wandb_log: bool = key(False, "log to Weights & Biases too (WANDB_MODE=offline works)")
    wandb_project: str = key("onecard", "project there")
    wandb_run_name: str = key("", "name of the run there; empty: the name of out_dir")
    # batch
    gradient_accumulation_steps: int = key(5 * 8, "micro batches a step, over all processes together", low=1)
    batch_size: int = key(12, "sequences in a micro batch", low=1)
    block_size: int = key(1024, "tokens in a sequence", low=1)
    # model
    n_layer: int = key(12, "layers", low=1)
    n_head: int = key(12, "attention heads a layer", low=1)
    n_embd: int = key(768, "width", low=1)
    vocab_size: int = key(50304, "rows of the embedding: GPT-2's 50257 and padding", low=1)
    dropout: float = key(0.0, "share of activations dropped in training", low=0.0, high=0.99)
    bias: bool = key(False, "biases in linear layers and norms")
    # optimizer
    learning_rate: float = key(6e-4, "peak learning rate", low=0.0)
    max_iters: int = key(600_000, "optimizer steps of the whole run", low=0)
    weight_decay: float = key(1e-1, "AdamW's, for tensors of two or more dimensions", low=0.0)
    beta1: float = key(0.9, "AdamW's, of the mean", low=0.0, high=1.0)
    beta2: float = key(0.95, "AdamW's, of the square", low=0.0, high=1.0)
    grad_clip: float = key(1.0, "largest norm of the gradient; 0: no clipping", low=0.0)
    # learning rate
    decay_lr: bool = key(True, "warm-up and cosine decay; False: learning_rate throughout")
    warmup_iters: int = key(2000, "steps of linear warm-up", low=0)
    lr_decay_iters: int = key(0, "step at which min_lr is reached; 0: max_iters", low=0)
    min_lr: float = key(6e-5, "learning rate at the end of the decay", low=0.0)
    # system
    seed: int = key(1337, "of the weights, the order of the data and dropout", low=0)
    device: str = key("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: str = key("auto", "of the matrix products", choices=("auto", "float32", "bfloat16", "float16"))
    compile: bool = key(True, "torch.compile the model")
    backend: str = key("nccl", "of torch.distributed, for CUDA devices; others use gloo")

    def problems(self):
        found = []
        if self.n_embd % self.n_head:
            found.append(f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}: change one of them")
        if self.decay_lr and self.min_lr > self.learning_rate:
            found.append(f"min_lr={self.min_lr:g} is above learning_rate={self.learning_rate:g}: the rate would rise")
        return found

    @property
    def sequences_per_step(self):
        return self.gradient_accumulation_steps * self.batch_size

    @property
    def tokens_per_step(self):
        return self.sequences_per_step * self.block_size


@dataclass(frozen=True)
class Runtime:
    """Where this process runs: resolved once, at start."""

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world_size: int = 1
    peak_flops: float | None = None  # FLOP/s of one card, None where it is not known

    @property
    def device_name(self):
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def say(self, text):
        if self.rank == 0:
            print(text, flush=True)


@dataclass
class Progress:
    """How far the run is: everything besides weights, optimizer and scaler that a resumed run needs."""

    step: int = 0  # optimizer steps done
    sequences: int = 0  # sequences seen
    best_val_loss: float = math.inf
    last_eval_step: int = -1
    skipped_steps: int = 0  # steps with gradients that were not finite, so not applied
    window: dict = field(default_factory=dict)  # sums since the last log line
    wandb_id: str = ""

    @classmethod
    def restore(cls, saved):
        names = [name for name in cls.__dataclass_fields__ if name != "step"]
        return cls(step=saved["iter_num"], **{name: saved[name] for name in names})


@dataclass
class Run:
    """Everything that a run holds; made by `start_run`. Two names for the network: `model` is the eager one, which is
    saved and counted, `compiled` the one that is trained (and shared with the other processes)."""

    config: TrainConfig
    runtime: Runtime
    train_blocks: TokenBlocks
    val_blocks: TokenBlocks
    model: GPT
    compiled: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    progress: Progress
    metrics: MetricsWriter | None = None  # of the first process only
    timed_steps: int = 0  # since the last log line, in this process
    timed_seconds: float = 0.0

    def say(self, text):
        self.runtime.say(text)

    def record(self, kind, **numbers):
        if self.metrics:
            self.metrics.write(kind, self.progress.step, **numbers)


def start_runtime(config):
    """-> Runtime. Joins the other processes if torchrun started this one."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(config.device)
    peak_flops = None
    if device.type == "cpu":
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages: logits fault 512 times less often (Linux)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 in what remains float32
        card = torch.cuda.get_device_properties(device)
        peak_flops = plan.peak_flops(card.name, card.multi_processor_count)
    if world_size > 1:
        if config.gradient_accumulation_steps % world_size:
            raise ConfigError(
                f"gradient_accumulation_steps={config.gradient_accumulation_steps} cannot be shared by {world_size} "
                f"processes: give a multiple of {world_size}"
            )
        dist.init_process_group(config.backend if device.type == "cuda" else "gloo")
    return Runtime(device, pick_dtype(config.dtype, device), rank, world_size, peak_flops)


def open_data(config):
    """-> the train and the val split as TokenBlocks."""
    folder = Path(config.data_dir) / config.dataset
    train, val = (
        TokenBlocks(folder, split, config.block_size, seed=config.seed, vocab_size=config.vocab_size)
        for split in ("train", "val")
    )
    ids = (train.tokenizer or {}).get("n_vocab", 0)
    if ids > config.vocab_size:
        raise ConfigError(
            f"{folder} was tokenised with {train.tokenizer['name']}, which has {ids} ids, more than "
            f"vocab_size={config.vocab_size}: set vocab_size=50304, or prepare the data anew"
        )
    return train, val


def model_args(config):
    names = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "dropout", "bias")
    return {name: getattr(config, name) for name in names}


def load_saved(config, fingerprint):
    """-> the checkpoint to go on from, or None for a new run. Refuses what would make another run of it."""
    path = Path(config.out_dir) / checkpoint.LATEST
    if config.init_from == "scratch":
        if path.exists() and not config.overwrite and not config.eval_only:
            raise ConfigError(
                f"{path} holds a run: --init_from=resume goes on with it, --overwrite=True replaces it, another "
                "--out_dir keeps both"
            )
        return None
    saved = checkpoint.load(path)
    old = TrainConfig(**saved["config"])
    now = model_args(config) | dict(seed=config.seed, tokens_per_step=config.tokens_per_step, data=fingerprint)
    then = saved["model_args"] | dict(seed=old.seed, tokens_per_step=old.tokens_per_step, data=saved["data"])
    differ = [f"{k}={now[k]!r} (checkpoint: {then[k]!r})" for k in now if k != "dropout" and now[k] != then[k]]
    if differ:
        raise ConfigError(f"{path} cannot go on with {', '.join(differ)}: give the checkpoint's values, or start anew")
    return saved


def build(config, runtime, saved=None):
    """-> (model, optimizer, scaler) on the device, from the seed, or from the checkpoint `saved`."""
    torch.manual_seed(config.seed)
    model = GPT(GPTConfig(**model_args(config)))
    if saved:
        model.load_state_dict(saved["model"])
    model.to(runtime.device)
    betas = (config.beta1, config.beta2)
    optimizer = model.configure_optimizers(config.weight_decay, config.learning_rate, betas, runtime.device.type)
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.dtype == torch.float16)
    if saved:
        chosen = [{k: group[k] for k in ("betas", "weight_decay")} for group in optimizer.param_groups]
        optimizer.load_state_dict(saved["optimizer"])
        for group, values in zip(optimizer.param_groups, chosen, strict=True):
            group.update(values)  # load_state_dict has brought the checkpoint's back
        if scaler.is_enabled() and saved["scaler"]:
            scaler.load_state_dict(saved["scaler"])
    return model, optimizer, scaler


def compile_model(model, config, runtime):
    """-> the model to train: compiled if that works here, and shared with the other processes.

    torch.compile fails at the first call, if it fails (no compiler, no Triton): so that call is made here, on zeros.
    """
    compiled = model
    if config.compile:
        began = time.perf_counter()
        runtime.say("compiling the model, a minute or so (--compile=False does without)")
        compiled = torch.compile(model, dynamic=False)
        zeros = torch.zeros(config.batch_size, config.block_size, dtype=torch.int64, device=runtime.device)
        try:
            with runtime.autocast():
                loss = compiled(zeros, zeros)
            loss.backward()
            runtime.say(f"compiled in {time.perf_counter() - began:.0f} s")
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            runtime.say(f"torch.compile does not work here ({reason}); going on without it, slower")
            compiled = model
        model.zero_grad(set_to_none=True)
    if runtime.world_size > 1:
        compiled = DistributedDataParallel(compiled, broadcast_buffers=False)
    return compiled


def start_run(config):
    """-> Run: device, data, checkpoint, network, in the order in which a mistake costs the user least time."""
    runtime = start_runtime(config)
    train_blocks, val_blocks = open_data(config)
    saved = load_saved(config, train_blocks.fingerprint)
    try:
        os.makedirs(config.out_dir, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out_dir={config.out_dir} cannot be made: {error.strerror}; give another") from None
    progress = Progress.restore(saved) if saved else Progress()
    model, optimizer, scaler = build(config, runtime, saved)
    describe_run(model, train_blocks, val_blocks, config, runtime)
    compiled = compile_model(model, config, runtime)
    run = Run(config, runtime, train_blocks, val_blocks, model, compiled, optimizer, scaler, progress)
    if runtime.rank == 0 and not config.eval_only:
        run.metrics = start_metrics(run, resumed=saved is not None)
    return run


def start_metrics(run, resumed):
    config, progress, wandb_run = run.config, run.progress, None
    if config.wandb_log:
        progress.wandb_id = progress.wandb_id or secrets.token_hex(4)
        name = config.wandb_run_name or Path(config.out_dir).name
        wandb_run, reason = start_wandb(config.wandb_project, name, progress.wandb_id, config.out_dir, asdict(config))
        if reason:
            run.say(f"wandb_log=True, but wandb does not start: {reason}; going on without it")
    metrics = MetricsWriter(config.out_dir, progress.step if resumed else None, wandb_run)
    about = dict(config=asdict(config), torch=torch.__version__, device=run.runtime.device_name)
    metrics.write("start", progress.step, **about, parameters=run.model.num_params(positions=False))
    return metrics


def describe_run(model, train_blocks, val_blocks, config, runtime):
    """What is about to be trained, on what, on how much: a line each."""
    tokens = config.tokens_per_step * config.max_iters
    runtime.say(
        f"model   {model.num_params(positions=False) / 1e6:.2f}M parameters without positions, "
        f"{model.num_params() / 1e6:.2f}M with them\n"
        f"data    {config.dataset}: {train_blocks.tokens:,} tokens to train on, {val_blocks.tokens:,} to validate on\n"
        f"run     {config.max_iters:,} steps of {config.tokens_per_step:,} tokens are {tokens:,} tokens, "
        f"{tokens / (train_blocks.blocks * config.block_size):.2f} epochs\n"
        f"device  {runtime.world_size} x {runtime.device_name}, {str(runtime.dtype).removeprefix('torch.')}"
    )


class Batches:
    """The micro batches of this process, one after the other; a thread assembles the next while this one is used."""

    def __init__(self, run):
        config, runtime = run.config, run.runtime
        self.blocks, self.device, self.batch_size = run.train_blocks, runtime.device, config.batch_size
        self.stride = runtime.world_size * config.batch_size
        self.thread = ThreadPoolExecutor(1)
        self.request(run.progress.sequences + runtime.rank * config.batch_size)

    def request(self, sequence):
        self.sequence, self.coming = sequence, self.thread.submit(self.assemble, sequence)

    def assemble(self, sequence):
        tokens = torch.from_numpy(self.blocks.batch(sequence, self.batch_size))  # (B, T + 1) of uint16
        return tokens.pin_memory() if self.device.type == "cuda" else tokens

    def next(self):
        """-> inputs and targets, (B, T) of int64 on the device."""
        tokens = self.coming.result()
        self.request(self.sequence + self.stride)
        tokens = tokens.to(self.device, non_blocking=True).to(torch.int64)
        return tokens[:, :-1], tokens[:, 1:]


def step_seed(seed, step, rank):
    """The seed of dropout in one step of one process: unrelated for neighbouring steps and ranks."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def train_step(run, batches):
    """One optimizer step -> (mean loss of its tokens, norm of the gradient before clipping), both floats.

    Gradients that are not finite are not applied: with float16 that is how the scaler finds its scale.
    """
    config, runtime, scaler = run.config, run.runtime, run.scaler
    torch.manual_seed(step_seed(config.seed, run.progress.step, runtime.rank))
    for group in run.optimizer.param_groups:
        group["lr"] = plan.learning_rate(run.progress.step, config)
    micro_steps = config.gradient_accumulation_steps // runtime.world_size
    total = torch.zeros((), device=runtime.device)
    for micro in range(micro_steps):
        inputs, targets = batches.next()
        silent = runtime.world_size > 1 and micro < micro_steps - 1  # gradients are exchanged at the last one only
        with run.compiled.no_sync() if silent else contextlib.nullcontext():
            with runtime.autocast():
                loss = run.compiled(inputs, targets) / micro_steps
            scaler.scale(loss).backward()
        total += loss.detach()
    scaler.unscale_(run.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), config.grad_clip or math.inf)
    if runtime.world_size > 1:
        dist.all_reduce(total)
        total /= runtime.world_size
    loss, norm = torch.stack((total, norm)).tolist()  # the one read from the device in a step
    if math.isfinite(norm):
        scaler.step(run.optimizer)
    scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    run.progress.step += 1
    run.progress.sequences += config.sequences_per_step
    return loss, norm


@torch.no_grad()
def sequence_losses(run, blocks, tokens):
    """-> float64 (n,): the mean loss of each of n evenly spread windows of a split, the same ones every time."""
    runtime, batch_size = run.runtime, run.config.batch_size
    n = max(1, min(blocks.blocks, tokens // blocks.block_size))
    windows = np.arange(n) * blocks.blocks // n
    mine = np.arange(runtime.rank, n, runtime.world_size)
    losses = torch.zeros(n, device=runtime.device)
    bar = tqdm(
        total=len(mine),
        desc=f"evaluating {blocks.split}",
        delay=5,
        leave=False,
        disable=runtime.rank > 0 or None,
    )
    for i in range(0, len(mine), batch_size):
        batch = mine[i : i + batch_size]
        padded = np.resize(batch, batch_size)  # one shape, one compilation
        tokens = torch.from_numpy(blocks.rows(windows[padded])).to(runtime.device).to(torch.int64)
        with runtime.autocast():
            loss = run.compiled(tokens[:, :-1], tokens[:, 1:], reduction="none")  # (B, T)
        losses[torch.from_numpy(batch).to(runtime.device)] = loss.mean(1)[: len(batch)]
        bar.update(len(batch))
    bar.close()
    if runtime.world_size > 1:
        dist.all_reduce(losses)
    return losses.double().cpu().numpy()


def evaluate(run):
    """Train and val loss in nats a token, and the means of 64 fixed groups of val windows -> True if it is the best."""
    config, progress = run.config, run.progress
    tokens = config.eval_tokens or config.eval_iters * config.batch_size * config.block_size or EVAL_TOKENS
    began = time.perf_counter()
    run.model.eval()
    train, val = (sequence_losses(run, blocks, tokens) for blocks in (run.train_blocks, run.val_blocks))
    run.model.train()
    seconds = time.perf_counter() - began
    groups = [round(float(group.mean()), 6) for group in np.array_split(val, min(EVAL_GROUPS, len(val)))]
    train_loss, val_loss = float(train.mean()), float(val.mean())
    is_best = val_loss < progress.best_val_loss
    progress.best_val_loss = min(val_loss, progress.best_val_loss)
    progress.last_eval_step = progress.step
    run.record("eval", train_loss=train_loss, val_loss=val_loss, val_groups=groups, eval_seconds=seconds)
    run.say(f"step {progress.step}: train loss {train_loss:.4f}, val loss {val_loss:.4f} ({duration(seconds)})")
    return is_best


def log_step(run, loss, norm, seconds):
    """Takes a step into the window; writes the log line if it is due."""
    config, progress, window = run.config, run.progress, run.progress.window
    applied = math.isfinite(norm) and math.isfinite(loss)
    sums = dict(steps=1, applied=1, loss=loss, grad_norm=norm) if applied else dict(steps=1)
    for name, value in sums.items():
        window[name] = window.get(name, 0) + value
    progress.skipped_steps += not applied
    run.timed_steps += 1
    run.timed_seconds += seconds
    if progress.step % config.log_interval == 0:
        numbers = window_means(run)
        run.record("train", **numbers)
        run.say(log_line(progress.step, config.max_iters, numbers))
        progress.window, run.timed_steps, run.timed_seconds = {}, 0, 0.0


def window_means(run):
    """The numbers of a log line: means over all tokens and all applied steps since the last one."""
    config, runtime, window = run.config, run.runtime, run.progress.window
    applied, seconds = window.get("applied", 0), run.timed_seconds / run.timed_steps
    numbers = {name: window[name] / applied if applied else None for name in ("loss", "grad_norm")}
    numbers |= dict(lr=plan.learning_rate(run.progress.step - 1, config), skipped=window["steps"] - applied)
    numbers |= dict(tokens=run.progress.sequences * config.block_size)
    numbers |= dict(ms_per_step=1000 * seconds, tokens_per_s=config.tokens_per_step / seconds)
    if runtime.peak_flops:
        flops = numbers["tokens_per_s"] * run.model.flops_per_token()
        numbers["mfu"] = flops / (runtime.peak_flops * runtime.world_size)
    if runtime.device.type == "cuda":
        numbers["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return numbers


def save(run, is_best):
    """Writes out_dir/ckpt.pt, and gives it the name ckpt_best.pt too if it is the best so far."""
    if run.metrics is None:
        return
    run.metrics.sync()
    state = asdict(run.progress)
    state["iter_num"] = state.pop("step")  # nanoGPT's name
    state |= dict(model=run.model.state_dict(), optimizer=run.optimizer.state_dict(), scaler=run.scaler.state_dict())
    state |= dict(model_args=asdict(run.model.config), config=asdict(run.config), data=run.train_blocks.fingerprint)
    path = Path(run.config.out_dir) / checkpoint.LATEST
    checkpoint.save(path, state)
    if is_best:
        checkpoint.keep_as(path, checkpoint.BEST)


def train(config):
    run = start_run(config)
    progress = run.progress
    if config.eval_only:
        evaluate(run)
        return
    if progress.step >= config.max_iters:
        run.say(f"nothing to do: the run is at step {progress.step} of max_iters={config.max_iters}")
    batches = Batches(run)
    while True:
        done = progress.step >= config.max_iters
        if (done or progress.step % config.eval_interval == 0) and progress.last_eval_step != progress.step:
            is_best = evaluate(run)
            if done or is_best or config.always_save_checkpoint:
                save(run, is_best)
        if done:
            break
        began = time.perf_counter()
        loss, norm = train_step(run, batches)
        log_step(run, loss, norm, time.perf_counter() - began)
    if run.metrics:
        run.metrics.close()
    run.say(f"done: {checkpoint.LATEST}, {checkpoint.BEST} and metrics.jsonl are in {config.out_dir}")


def main(argv=None):
    config = load_config(TrainConfig, argv)
    if int(os.environ.get("RANK", 0)) == 0:
        print(describe(config))
    try:
        train(config)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    run_script(main, ModelError, ShardError, checkpoint.CheckpointError)

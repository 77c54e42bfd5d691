"""A run: what it holds, and how it starts: from the plan and the data to the network on its device.

train.py begins with it:

    with own(config), Stop(config.max_hours) as stop:
        run = start_run(config, stop)

`config` is train.TrainConfig. The one thing to know: a run has two names for its network, `model` (eager: saved,
counted, sampled) and `compiled` (trained, and shared with the other processes).
"""

import contextlib
import math
import os
import secrets
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from onecard import checkpoint
import convert
from onecard import durable
from onecard import plan
import resume
from configurator import ConfigError
from onecard.metrics import MetricsWriter, start_wandb
from model import GPT, GPTConfig
from onecard.runtime import Runtime, Stop, compile_model, find_batch_size, micro_steps, start_runtime
from onecard.shards import ShardError, TokenBlocks


@dataclass
class Progress:
    """How far the run is: everything besides weights, optimizer and scaler that a resumed run needs."""

    step: int = 0  # optimizer steps done
    sequences: int = 0  # sequences seen
    best_val_loss: float = math.inf
    last_eval_step: int = -1
    skipped_steps: int = 0  # steps whose gradients were not finite, so not applied
    bad_steps: int = 0  # of these, the last ones in a row
    running: dict = field(default_factory=lambda: dict(n=0, mean=0.0, variance=0.0))  # of the loss of a step
    window: dict = field(default_factory=dict)  # sums since the last log line
    evals: list = field(default_factory=list)  # (step, train loss, val loss) of each evaluation, for the forecast
    wandb_id: str = ""
    began_from: str = ""  # the foreign weights, if it was with such
    found: dict = field(default_factory=dict)  # the micro batch that batch_size=0 found, and on which device

    @classmethod
    def restore(cls, saved):
        names = [name for name in cls.__dataclass_fields__ if name != "step"]
        return cls(step=saved["iter_num"], **{name: saved[name] for name in names if name in saved})


@dataclass
class Run:
    """Everything that a run holds; made by `start_run`. Two names for the network: `model` is the eager one, which is
    saved and counted, `compiled` the one that is trained (and shared with the other processes)."""

    config: object  # train.TrainConfig
    runtime: Runtime
    stop: Stop
    train_blocks: TokenBlocks
    val_blocks: TokenBlocks
    model: GPT
    compiled: torch.nn.Module
    optimizers: list
    scaler: torch.amp.GradScaler
    progress: Progress
    batch_size: int  # sequences in a micro batch
    micro_steps: int  # micro batches of this process in a step
    metrics: MetricsWriter | None = None  # these two in the first process only
    saver: checkpoint.Saver | None = None
    timed: list = field(default_factory=list)  # (seconds, those spent waiting for tokens) of each step since a log line
    warm: bool = False  # whether a line was logged by this process
    eval_seconds: float = 0.0  # of the last evaluation

    def say(self, text):
        self.runtime.say(text)

    def wish(self):
        return self.stop.wish(self.saver.seconds if self.saver else 0.0)

    def record(self, kind, **numbers):
        if self.metrics:
            self.metrics.write(kind, self.progress.step, **numbers)

    def state(self):
        """All that a checkpoint holds, by nanoGPT's names where it has one."""
        state = asdict(self.progress)
        state["iter_num"] = state.pop("step")
        state |= dict(model_args=asdict(self.model.config), config=asdict(self.config))
        state |= dict(data=resume.data_identity(self.train_blocks, self.val_blocks))
        state |= dict(model=self.model.state_dict(), scaler=self.scaler.state_dict())
        names = ("muon", "optimizer")[-len(self.optimizers) :]
        return state | {name: each.state_dict() for name, each in zip(names, self.optimizers, strict=True)}


def start_run(config, stop=None):
    """-> Run: device, data, checkpoint, network, in the order in which a mistake costs the user least time."""
    runtime, began = start_runtime(config), None
    if config.foreign:
        open_data(config)  # a mistake there is found out before weights are fetched
        began, config = begin(config)
    train_blocks, val_blocks = open_data(config)
    data = resume.data_identity(train_blocks, val_blocks)
    saved, config = resume.load_saved(config, data, runtime.say)
    runtime.require_same(step=saved and saved["iter_num"], **data)
    progress = Progress.restore(saved) if saved else Progress(began_from=config.init_from * config.foreign)
    facts = runtime.plan_facts(config.out_dir)
    show_plan(resume.as_begun(config, progress.began_from), facts, train_blocks, val_blocks, runtime.say)
    model, optimizers, scaler = build(config, runtime, saved, began)
    dtype = str(runtime.dtype).removeprefix("torch.")
    runtime.say(f"device  {runtime.world_size} x {runtime.device_name}, {dtype}")
    if runtime.rank == 0 and not config.eval_only:
        steps = config.max_iters - progress.step
        checkpoint.check_room(
            config.out_dir, model.num_params(), steps, config.keep_every, resumed=not resume.is_new(config)
        )
    batch_size, micro_steps = split_step(model, config, runtime, progress)
    compiled = compile_model(model, (batch_size, config.block_size), config.compile, runtime)
    held = (train_blocks, val_blocks, model, compiled, optimizers, scaler, progress, batch_size, micro_steps)
    run = Run(config, runtime, stop or Stop(), *held)
    if runtime.rank == 0 and not config.eval_only:
        new = resume.is_new(config)
        if new:
            checkpoint.remove_all(config.out_dir)  # overwrite=True
        run.saver = checkpoint.Saver(config.out_dir, config.keep_every)
        run.metrics = start_metrics(run, new, data)
    return run


def begin(config):
    """-> (the network of the foreign weights that a new run begins with, config with its sizes)."""
    model = convert.start(config.init_from, config.block_size, config.dropout)
    return model, resume.take_network(config, asdict(model.config), config.init_from)


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


def build(config, runtime, saved=None, model=None):
    """-> (model, optimizers, scaler) on the device: `model`, or one from the seed, or from the checkpoint `saved`."""
    torch.manual_seed(config.seed)
    model = model or GPT(GPTConfig(**config.model_args()))
    model.activation_checkpointing = config.activation_checkpointing
    if saved:
        model.load_state_dict(saved["model"])
    model.to(runtime.device)
    betas = (config.beta1, config.beta2)
    rates = (config.weight_decay, config.learning_rate, betas)
    optimizers = model.configure_optimizers(*rates, runtime.device.type, config.optimizer)
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.dtype == torch.float16)
    if saved:
        for optimizer, state in zip(optimizers, saved_optimizers(saved), strict=True):
            chosen = [
                {k: group[k] for k in ("betas", "weight_decay") if k in group} for group in optimizer.param_groups
            ]
            optimizer.load_state_dict(state)
            for group, values in zip(optimizer.param_groups, chosen, strict=True):
                group.update(values)  # load_state_dict has brought the checkpoint's back
        if scaler.is_enabled() and saved["scaler"]:
            scaler.load_state_dict(saved["scaler"])
    return model, optimizers, scaler


def saved_optimizers(saved):
    return [saved[name] for name in ("muon", "optimizer") if name in saved]


def split_step(model, config, runtime, progress):
    """-> (sequences in a micro batch, micro batches of this process in a step). With batch_size=0 the largest that
    fits, found once: a resumed run on the same device takes the one it had."""
    sequences, batch_size = config.step_sequences, config.batch_size

    def estimate(size):  # bytes
        sized = replace(config, batch_size=size)
        return sum(plan.memory(sized, runtime.device.type, runtime.dtype == torch.float32).values())

    if not batch_size:
        found = progress.found
        if found.get("device") != runtime.device_name or found["world_size"] != runtime.world_size:
            batch_size = find_batch_size(model, sequences, config.block_size, runtime, estimate)
            found.update(device=runtime.device_name, world_size=runtime.world_size, batch_size=batch_size)
        batch_size = found["batch_size"]
    return batch_size, micro_steps(sequences, batch_size, runtime.world_size)


def start_metrics(run, new, data):
    config, progress, wandb_run = run.config, run.progress, None
    if config.wandb_log:
        progress.wandb_id = (not new and progress.wandb_id) or secrets.token_hex(4)
        name = config.wandb_run_name or Path(config.out_dir).name
        wandb_run, reason = start_wandb(config.wandb_project, name, progress.wandb_id, config.out_dir, asdict(config))
        if reason:
            run.say(f"wandb_log=True, but wandb does not start: {reason}; going on without it")
    reached = (-1, -1) if new else (progress.step, progress.last_eval_step)
    metrics = MetricsWriter(config.out_dir, *reached, wandb_run)
    begun = asdict(resume.as_begun(config, progress.began_from))
    about = dict(config=begun, torch=torch.__version__, device=run.runtime.device_name, data=data)
    about |= dict(dtype=str(run.runtime.dtype).removeprefix("torch."))
    metrics.write("start", progress.step, **about, parameters=run.model.num_params(positions=False))
    return metrics


def show_plan(config, facts, train_blocks, val_blocks, say):
    """What the run will need, cost and reach. facts: of the device, Runtime.plan_facts; blocks: None if not known."""
    tokens = config.tokens_to_evaluate(config.batch_size)
    facts |= {f"{blocks.split}_tokens": blocks.tokens for blocks in (train_blocks, val_blocks) if blocks}
    say("\n".join(plan.lines(plan.plan(config, eval_tokens=tokens, **facts), config)))


def plan_only(config):
    """Shows the plan of a run that is not begun: no network is built (foreign weights are loaded, for their
    sizes, and the checkpoint of a run that goes on), and with gpu no card is needed."""
    if config.foreign:
        _, config = begin(config)
    elif not resume.is_new(config):
        saved, path, _ = checkpoint.load_newest(config.out_dir)
        config = resume.with_network(config, saved, path)
        config = resume.as_begun(config, saved.get("began_from"))
    planned = dict(device=config.gpu, wide=config.dtype == "float32")
    facts = planned if config.gpu else start_runtime(config).plan_facts(config.out_dir)
    try:
        blocks = open_data(config)
    except ShardError as error:
        print(f"data    not known: {error}")
        blocks = None, None
    show_plan(config, facts, *blocks, print)


def own(config):
    """The lock on out_dir, for the first process of a run that writes there."""
    if int(os.environ.get("RANK", 0)) or config.eval_only:
        return contextlib.nullcontext()
    try:
        os.makedirs(config.out_dir, exist_ok=True)
        lock = contextlib.ExitStack()
        lock.enter_context(durable.owned(Path(config.out_dir) / ".lock", f"out_dir={config.out_dir}"))
    except OSError as error:
        raise ConfigError(f"out_dir={config.out_dir} cannot be written to: {error.strerror}; give another") from None
    durable.remove_leftovers(config.out_dir)
    return lock

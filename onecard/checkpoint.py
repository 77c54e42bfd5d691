"""One training state on disk: written whole or not at all, checked when written and loaded; and how a run is resumed.

    save("out/run", state, names=[BEST])            # ckpt.pt, and the same file as ckpt_best.pt
    model, about = load_model("out/run/ckpt.pt")    # for sampling

A checkpoint is a torch file with the keys that nanoGPT users know (model, optimizer, model_args, iter_num,
best_val_loss, config) and more; torch.load reads it. It ends in a trailer with its step and the SHA-256 of everything
before it, because torch.load notices hardly any flipped bit. It holds only tensors and plain Python and is loaded with
weights_only=True, so nothing in it can run. Its tokenizer is in it, so that sampling does not need the dataset.
"""

import contextlib
import hashlib
import math
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch

from configurator import ConfigError, changed, checked, sources_of
from model import GPT, GPT2_IDS, GPTConfig
from onecard import UserError, durable
from onecard.tokenizer import Tokenizer, TokenizerError, from_state, load_tokenizer

VERSION = 1
LATEST = "ckpt.pt"
PREVIOUS = "ckpt_previous.pt"  # the latest before it
BEST = "ckpt_best.pt"  # lowest val loss
STEP = "ckpt_step_{:09d}.pt"  # of keep_every
BEFORE_DECAY = "ckpt_before_decay.pt"  # a longer wsd run can start from it
OURS = re.compile(r"ckpt(_previous|_best|_before_decay|_new|_step_\d{9})?\.pt")  # _new: older versions
TRAILER = re.compile(rb"onecard step (\d{12}) \1 sha256 ([0-9a-f]{64})\n")  # the step twice: shows a flipped bit in it
TRAILER_BYTES = 13 + 12 + 1 + 12 + 8 + 64 + 1
NETWORK = ("arch", "n_layer", "n_head", "n_embd", "vocab_size", "bias", "gelu")  # keys that pretrained weights decide
PARTS = {"iter_num", "model", "model_args", "config"}  # what every checkpoint has
DATA = ("train_tokens", "train_fingerprint", "val_tokens", "val_fingerprint")
NOT_LISTED = ("init_from", "overwrite", "out_dir", "data_dir", "dataset", "allow_new_data", "eval_only", "profile")


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or cannot be written: which file, why, what to do."""


@dataclass
class Progress:
    """How far a run is: all that a resumed run needs besides weights, optimizers and scaler."""

    step: int = 0  # optimizer steps done
    sequences: int = 0  # sequences seen
    best_val_loss: float = math.inf
    last_eval_step: int = -1
    skipped_steps: int = 0  # steps that were not applied because a gradient was not finite
    bad_steps: int = 0  # the last of these in a row
    running: dict = field(default_factory=lambda: dict(n=0, mean=0.0, variance=0.0))  # of the loss, for spikes
    window: dict = field(default_factory=dict)  # sums since the last log line
    evals: list = field(default_factory=list)  # (step, train loss, val loss) of each evaluation, for the forecast
    wandb_id: str = ""
    began_from: str = ""  # the pretrained weights that the run began with, if any
    found: dict = field(default_factory=dict)  # the micro batch that batch_size=0 found, and on which device

    @classmethod
    def restore(cls, saved: dict) -> "Progress":
        return cls(saved["iter_num"], **{name: saved[name] for name in cls.__dataclass_fields__ if name != "step"})

    def as_saved(self) -> dict:
        """Its values by the names that they have in a checkpoint."""
        values = asdict(self)
        return {"iter_num": values.pop("step"), **values}


# ---- one file


class _HashingFile:
    """Just enough of a file for torch.save: hashes and counts what is written."""

    def __init__(self, file):
        self.file, self.sha256, self.bytes = file, hashlib.sha256(), 0

    def write(self, data):
        written = self.file.write(data)
        self.sha256.update(data)
        self.bytes += len(data)
        return written

    def flush(self):
        self.file.flush()


def write(path: str | Path, state: dict, check: Callable | None = None) -> None:
    """Writes `state` (nested dicts and lists of tensors and plain Python) and reads it back before it gets its name.

    check: called with the temporary path instead of `verify`.
    Raises CheckpointError, with the bytes that were reached, if the system refuses; the old file is then intact.
    """
    path, hashing = Path(path), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # somebody may have deleted it during the run
        with durable.replacing(path, check=check or verify) as file:
            hashing = _HashingFile(file)
            torch.save({"version": VERSION, **state}, hashing)  # type: ignore[arg-type]
            step, digest = state["iter_num"], hashing.sha256.hexdigest().encode()
            file.write(b"onecard step %012d %012d sha256 %s\n" % (step, step, digest))
    except (OSError, RuntimeError) as error:
        refused = error if isinstance(error, OSError) else error.__context__  # torch's RuntimeError hides the first one
        if not isinstance(refused, OSError):
            raise
        raise CheckpointError(durable.write_refused(path, refused, hashing.bytes if hashing else 0)) from error


def read_trailer(path: str | Path) -> tuple[int, str, int]:
    """(step, SHA-256 in hex, bytes before the trailer). Raises CheckpointError if there is no trailer."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TRAILER_BYTES))
        found = TRAILER.fullmatch(file.read())
    if not found:
        raise CheckpointError(f"{path}: not a complete onecard checkpoint: no SHA-256 at the end of its {size:,} bytes")
    return int(found[1]), found[2].decode(), size - TRAILER_BYTES


def verify(path: str | Path) -> None:
    """Raises CheckpointError unless every bit of the file is as it was written."""
    _, expected, size = read_trailer(path)
    with open(path, "rb") as file:
        if durable.sha256_of(file, size) != expected:
            raise CheckpointError(f"{path}: damaged: its SHA-256 is not the one that was written with it")


def load(path: str | Path) -> dict:
    """The state that `write` wrote, tensors on the CPU. Raises CheckpointError unless every bit is as written."""
    try:
        verify(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no checkpoint here; train first, or check --out_dir") from None
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:  # torch.load raises any kind for bytes that are no checkpoint
        raise CheckpointError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from error
    with readable(path):
        if state["version"] > VERSION:
            raise CheckpointError(f"{path}: version {state['version']}, written by a later onecard: update this one")
        if missing := PARTS - state.keys():
            raise KeyError(", ".join(sorted(missing)))
    return state


@contextlib.contextmanager
def readable(path: str | Path):
    """Makes a CheckpointError of what is raised where a part of a checkpoint is missing or does not fit."""
    try:
        yield
    except (CheckpointError, TokenizerError, torch.OutOfMemoryError):
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        reason = f"no {error.args[0]}" if isinstance(error, KeyError) else " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path}: a part is missing, or another program has changed it ({reason}): use another checkpoint"
        ) from error


def load_model(path: str | Path) -> tuple[GPT, dict]:
    """(GPT with the trained weights on the CPU, in eval mode; the rest of the checkpoint)."""
    state = load(path)
    with readable(path):
        args = state["model_args"]
        model = GPT(GPTConfig(**{name: args[name] for name in GPTConfig.__dataclass_fields__}))
        model.load_state_dict(state.pop("model"))
        model.n_ids = (state.get("tokenizer") or {}).get("n_vocab", model.n_ids)
    return model.eval(), state


def saved_config(ConfigClass, keys: dict, source: str | Path):
    """The config of a run from its saved keys: unknown keys are left out, missing ones have their default.

    Raises CheckpointError with `source` for a value that this version does not permit.
    """
    values = {}
    for name, key in ConfigClass.__dataclass_fields__.items():
        try:
            if name in keys:
                values[name] = checked(keys[name], SimpleNamespace(**key.metadata))
        except ConfigError as error:
            raise CheckpointError(f"{source}: {name} in its config {error}") from None
    return ConfigClass(**values)


def tokenizer_of(saved: dict, path: str | Path) -> Tokenizer:
    """The tokenizer that a checkpoint was trained with. saved: what it holds; the weights are not needed.

    nanoGPT's checkpoints and older ones carry none: theirs is meta.pkl in the folder of their dataset, or else GPT-2's.
    Raises CheckpointError if that is impossible, or if the tokenizer cannot be used.
    """
    try:
        with readable(path):
            config = saved.get("config") or {}
            dataset = config.get("dataset") or "DATASET"
            nearby, here = Path(path).absolute().parent.parent / "data", Path(config.get("data_dir", "data"))
            files = [folder / "meta.pkl" for folder in (Path(path).parent, nearby / dataset, here / dataset)]
            meta = next((file for file in files if file.exists()), files[-1])
            if saved.get("tokenizer"):
                tokenizer = from_state(saved["tokenizer"])
            else:
                tokenizer = load_tokenizer(meta if meta.exists() else "gpt2")
    except TokenizerError as error:
        raise CheckpointError(f"{path}: {error}") from error
    rows = saved.get("model_args", {}).get("vocab_size", tokenizer.n_vocab)
    if tokenizer.n_vocab > rows:
        raise CheckpointError(
            f"{path}: vocab_size={rows} is less than the {tokenizer.n_vocab:,} ids of the tokenizer {tokenizer.name}, "
            f"so it was trained with another one, which is not in the file: put its dataset's meta.pkl at {meta}"
        )
    return tokenizer


# ---- the checkpoints of a run


def save(out_dir: str | Path, state: dict, names: list[str], keep_every: int = 0) -> None:
    """Saves as ckpt.pt, and under `names` (BEST, BEFORE_DECAY) too. The old ckpt.pt becomes ckpt_previous.pt.

    With keep_every, one every so many steps is kept for good. ckpt.pt is renamed last: if another name is refused, as
    by a full disk on a file system without hard links, it stays the older one. Raises CheckpointError.
    """
    latest, step = Path(out_dir) / LATEST, state["iter_num"]
    kept = [STEP.format(step)] if keep_every and step % keep_every == 0 else []

    def verify_and_name(new):  # a run that is killed before ckpt.pt is renamed continues from the newest name there is
        verify(new)
        if latest.exists():
            durable.second_name(latest, PREVIOUS)
        for name in [*names, *kept]:
            durable.second_name(new, name)

    write(latest, state | {"launch": launch()}, check=verify_and_name)
    latest.with_name("ckpt_new.pt").unlink(missing_ok=True)  # of an earlier version, killed in a save


def candidates(out_dir: str | Path) -> list[Path]:
    """The checkpoints of a run, newest first by the step in them: file times are wrong after a clock was set back.

    Those without a readable step come first, so that the caller meets and names what is damaged.
    """
    found = []
    for path in Path(out_dir).glob("ckpt*.pt"):
        if not OURS.fullmatch(path.name):
            continue
        if path.is_dir():
            raise CheckpointError(f"{path}: a folder has the name of a checkpoint: move it away")
        try:
            step = read_trailer(path)[0]
        except (CheckpointError, OSError):
            step = 10**12
        found.append((step, path.name == LATEST, path))
    return [path for *_, path in sorted(found, reverse=True)]


def newest(out_dir: str | Path) -> str | None:
    """ "ckpt.pt of step 2000": the checkpoint that `load_newest` would load, or None."""
    for path in candidates(out_dir):
        with contextlib.suppress(CheckpointError, OSError):
            verify(path)
            return f"{path.name} of step {read_trailer(path)[0]}"
    return None


def load_newest(out_dir: str | Path) -> tuple[dict, Path, list[str]]:
    """(state, its file, what is wrong with each newer one). Raises CheckpointError if none is intact."""
    problems: list[str] = []
    for path in candidates(out_dir):
        try:
            return load(path), path, problems
        except CheckpointError as error:
            problems.append(str(error))
    raise CheckpointError("; ".join(problems) or f"{Path(out_dir) / LATEST}: no checkpoint; start a run first")


def remove_all(out_dir: str | Path, print0) -> None:
    """Removes every checkpoint of a run, for the new run that replaces it."""
    found = candidates(out_dir)
    if found:
        print0(f"overwrite=True: the run in {out_dir} is replaced; checkpoints deleted: {len(found)}")
    for path in found:
        path.unlink(missing_ok=True)


def check_room(out_dir: str | Path, need: int, keep_every: int) -> None:
    """Raises CheckpointError if the checkpoints of a run, `need` bytes at most, do not fit on the disk.

    Existing ones count as free: they will be replaced, or `need` has them. Not so those that another keep_every kept.
    """
    sizes = {}  # by inode: one file may have two names
    for path in candidates(out_dir):
        step = re.fullmatch(r"ckpt_step_(\d+)\.pt", path.name)
        if not step or (keep_every and int(step[1]) % keep_every == 0):
            sizes[path.stat().st_ino] = path.stat().st_size
    free = shutil.disk_usage(out_dir).free + sum(sizes.values())
    if need > free:
        raise CheckpointError(
            f"out_dir={out_dir}: the checkpoints of this run need up to {need:,} bytes, {free:,} are free: free some, "
            "choose an --out_dir on another disk, or a larger --keep_every if it is set"
        )


@contextlib.contextmanager
def owned(out_dir: str | Path):
    """Makes out_dir if needed and holds its lock; removes what a killed process left unfinished there.

    Removes the lock, and the folders that it made, if nothing was written, as when the dataset is missing.
    """
    with contextlib.ExitStack() as lock:
        made = [folder for folder in (Path(out_dir), *Path(out_dir).parents) if not folder.exists()]
        try:
            os.makedirs(out_dir, exist_ok=True)
            lock.enter_context(durable.owned(Path(out_dir) / ".lock", f"out_dir={out_dir}"))
        except OSError as error:
            raise ConfigError(f"out_dir={out_dir}: not writable ({error.strerror}); choose another") from None
        durable.remove_leftovers(out_dir)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # Windows does not delete an open file
                if os.listdir(out_dir) == [".lock"]:
                    os.remove(Path(out_dir) / ".lock")
                    for folder in made:
                        folder.rmdir()


# ---- resuming: what a run goes on from, and whether it may


def problems(config) -> list[str]:
    """What does not fit together in the keys about checkpoints, one message each."""
    found = []
    if config.resume_from and (config.from_pretrained or config.init_from == "resume"):
        found.append(f"init_from={config.init_from} and resume_from={config.resume_from} exclude each other: set one")
    if config.keep_every and (config.keep_every % config.eval_interval or not config.always_save_checkpoint):
        needs = f"a multiple of eval_interval={config.eval_interval}, with always_save_checkpoint=True"
        found.append(f"keep_every={config.keep_every} has to be {needs}")
    return found


def is_new(config) -> bool:
    """Whether this starts a new run in out_dir rather than going on with the one there.

    A process that torchrun restarts after a save goes on from that, whatever init_from and overwrite are. The run that
    overwrite=True replaces may still be there: its checkpoints are of another launch. The first process decides for all
    machines, because each machine has a torchrun, and so a launch, of its own.
    """
    if config.init_from in ("auto", "resume"):
        return config.init_from == "auto" and not candidates(config.out_dir)
    with contextlib.suppress(CheckpointError):
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return restarts == "0" or load_newest(config.out_dir)[0].get("launch") != launch()
    return True


def launch() -> str:
    """What all restarts of one torchrun share, and no other torchrun has: a folder with a random name; or empty."""
    return os.environ.get("TORCHELASTIC_ERROR_FILE", "").rpartition("attempt_")[0]


def find(config, is_new: bool, print0) -> dict | None:
    """The checkpoint that this run goes on from, None for a new run. Prints which, and damaged newer ones.

    Raises ConfigError where a new run would replace another one, CheckpointError where there is nothing to resume.
    """
    existing = candidates(config.out_dir)
    problems: list[str] = []
    if is_new:
        if existing and config.is_saved and not (config.overwrite or config.plan_only):
            raise ConfigError(
                f"{existing[0]} holds a run: resume it with --init_from=resume, replace it with --overwrite=True, or "
                "choose another --out_dir"
            )
        if not config.resume_from:
            return None
        path = Path(config.resume_from)
        saved = load(path)
    else:
        saved, path, problems = load_newest(config.out_dir)
        if config.resume_from:
            print0(f"resume_from={config.resume_from} is not used: {config.out_dir} has a run already")
    for problem in problems:
        print0(f"{problem}; using {path.name} of step {saved['iter_num']} instead")
    if "data" not in saved:
        raise ConfigError(f"{path} has weights but no run to resume: start a new run with --init_from={path}")
    with readable(path):
        saved["model_args"] = {name: saved["model_args"][name] for name in GPTConfig.__dataclass_fields__}
        saved["data"] = {name: saved["data"][name] for name in DATA}
        saved["config"] = asdict(saved_config(type(config), saved["config"], path))
        progress = Progress.restore(saved)
    print0(f"resuming from {path} at step {saved['iter_num']:,}")
    return saved | dict(path=str(path), progress=progress)


def take_over(config, tokenizer: Tokenizer | None, origin: dict | None):
    """config with a number for vocab_size=0, and with the network of `origin` if the run began with those weights.

    tokenizer: the dataset's, None if it is not known. origin: of the weights that the run starts from: path,
    model_args, began_from, and what `tokenizer_of` reads. Raises ConfigError if the two tokenizers differ, if
    vocab_size is too small, or if the user set another network.
    """
    if origin and tokenizer:
        check_tokenizer(config, tokenizer, tokenizer_of(origin, origin["path"]), origin["path"])
    if origin and origin.get("began_from"):
        config = take_network(config, origin["model_args"], origin["path"])
    elif not config.vocab_size:
        ids = tokenizer.n_vocab if tokenizer else GPT2_IDS
        rows = origin["model_args"]["vocab_size"] if origin else 64 * math.ceil(ids / 64)  # as matrix units prefer
        config = changed(config, vocab_size=rows)
    if tokenizer and tokenizer.n_vocab > config.vocab_size:
        raise ConfigError(
            f"vocab_size={config.vocab_size} is less than the {tokenizer.n_vocab:,} ids of the tokenizer "
            f"{tokenizer.name} of dataset={config.dataset}: leave out vocab_size, or use another dataset"
        )
    return config


def check_tokenizer(config, tokenizer: Tokenizer, trained_with: Tokenizer, source: str) -> None:
    """Raises ConfigError unless the dataset has the tokenizer that the weights of `source` were trained with."""
    if tokenizer.identity != trained_with.identity:
        names = [f"{t.name} ({t.n_vocab:,} ids, SHA-256 {t.sha256[:8]})" for t in (tokenizer, trained_with)]
        raise ConfigError(
            f"dataset={config.dataset} has the tokenizer {names[0]}, {source} was trained with {names[1]}: the same "
            "id means other text; use a dataset with that tokenizer, or start a new run with --init_from=scratch"
        )


def take_network(config, args: dict, source: str):
    """config with the network of the weights in `source`. Raises ConfigError if the user set other values."""
    given = [name for name in NETWORK if name in sources_of(config) and (name != "vocab_size" or config.vocab_size)]
    if wrong := [name for name in given if getattr(config, name) != args[name]]:
        values = ", ".join(f"{name}={args[name]!r}" for name in wrong)
        raise ConfigError(f"the weights of {source} have {values}: leave out {', '.join(wrong)}")
    return changed(config, **{name: args[name] for name in NETWORK})


def data_identity(train_windows, val_windows) -> dict:
    """What identifies the data of a run: number of tokens and fingerprint of each split."""
    found = [(split.tokens, split.fingerprint) for split in (train_windows, val_windows)]
    return dict(zip(DATA, sum(found, ()), strict=True))


def resumed(saved: dict, config, data: dict, learning_rate, print0) -> Progress:
    """How far the run of the checkpoint `saved` is. learning_rate: a function of step and config.

    Network, seed, tokens per step, optimizer and data must be the same, or ConfigError. Other changes take effect and
    are listed. With a new val split the best val loss starts over.
    """
    old = type(config)(**saved["config"])
    now, then = identity(config, data), identity(old, saved["data"])
    differ = [name for name in now if now[name] != then[name] and not (config.allow_new_data and name in data)]
    if differ:
        values = ", ".join(f"{name}={now[name]!r} (checkpoint: {then[name]!r})" for name in differ)
        remedy = "; --allow_new_data=True accepts other data" if set(differ) & set(data) else ""
        raise ConfigError(
            f"{saved['path']} cannot be resumed with {values}: use the checkpoint's values, or start a new run{remedy}"
        )
    progress = saved["progress"]
    if progress.step > config.max_iters and not config.eval_only:
        reached = f"{saved['path']} is at step {progress.step}"
        raise ConfigError(f"nothing to do: {reached}, max_iters={config.max_iters}: to train on, raise --max_iters")
    before, after = asdict(old), asdict(config)
    differing = [name for name in after if before[name] != after[name] and name not in NOT_LISTED]
    if differing:
        values = ", ".join(f"{name} {before[name]!r} -> {after[name]!r}" for name in differing)
        print0(f"resumed with other settings: {values}")
    if saved["data"] != data:
        print0(f"resumed with other data: {data['train_tokens']:,} tokens, before {saved['data']['train_tokens']:,}")
        if saved["data"]["val_fingerprint"] != data["val_fingerprint"]:
            progress.best_val_loss = math.inf
    old_rate, rate = learning_rate(progress.step, old), learning_rate(progress.step, config)
    if not math.isclose(old_rate, rate, rel_tol=0.01):
        effect = ": the loss will rise at first" if rate > old_rate else ""
        print0(f"WARNING: the learning rate jumps from {old_rate:.2e} to {rate:.2e}{effect}")
    return progress


def identity(config, data):
    """What must not change when a run is resumed."""
    network = {name: value for name, value in config.model_args().items() if name != "dropout"}
    rest = dict(seed=config.seed, tokens_per_step=config.step_tokens, optimizer=config.optimizer)
    return network | rest | data

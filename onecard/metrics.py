"""The numbers of a run: its log lines, out_dir/metrics.jsonl (train.py writes it, report.py reads it), and wandb.

Each line of metrics.jsonl is a JSON object with "kind" (start, train, eval, event, samples) and "step". A resumed run
first drops the lines after its own step, so the file equals that of a run that never stopped, apart from times and one
more start line. No torch here.
"""

import json
import math
import os
import secrets
import subprocess
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

from onecard import UserError
from onecard.durable import write_refused
from onecard.shards import open_tokens
from onecard.tokenizer import Tokenizer
from onecard.tracking import Tracker
from onecard.windows import Windows

NAME = "metrics.jsonl"
EVAL_GROUPS = 64


class MetricsWriter:
    """Appends to out_dir/metrics.jsonl, and to a wandb run if there is a tracker. UserError if the disk refuses.

    step, last_eval_step: those of the checkpoint that the run goes on from; -1 for a new run.
    """

    def __init__(self, out_dir: str | Path, step: int = -1, last_eval_step: int = -1, print0=print):
        self.path, self.print0, self.start_line = Path(out_dir) / NAME, print0, b""
        self.tracker: Tracker | None = None
        try:
            drop_lines_after(self.path, step, last_eval_step, print0)
            self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (open as long as the run)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}): move it away") from None

    def write(self, kind: str, step: int, **numbers) -> None:
        line = (json.dumps({"kind": kind, "step": step, **numbers}, allow_nan=False) + "\n").encode()
        try:
            if kind == "start":
                self.start_line = line
            elif not self.path.exists() or not os.path.samestat(self.path.stat(), os.fstat(self.file.fileno())):
                self.begin_again()
            while line:  # a disk that fills up takes the first part and refuses the next
                line = line[self.file.write(line) :]
        except OSError as error:
            raise self.refused(error) from error
        if self.tracker and kind != "start":
            plain: dict = {f"{kind}/{k}": v for k, v in numbers.items() if isinstance(v, int | float)}
            self.tracker.send(dict(step=step, numbers=plain, texts=numbers.get("texts")))

    def begin_again(self):
        """Somebody has deleted or replaced the file, or all of out_dir: a new one, with the start line."""
        self.print0(f"{self.path} was deleted or replaced: the numbers so far are lost, a new file begins")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file.close()
        self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115
        self.file.write(self.start_line)

    def sync(self) -> None:
        try:
            os.fsync(self.file.fileno())
        except OSError as error:
            raise self.refused(error) from error

    def refused(self, error):
        return UserError(write_refused(self.path, error, self.path.stat().st_size if self.path.exists() else 0))

    def close(self, artifact: str | Path | None = None) -> None:
        """Closes the file and the wandb run. artifact: a checkpoint to upload; each one is a new version of it."""
        self.file.close()
        if self.tracker:
            self.tracker.close(artifact)


def drop_lines_after(path, step, last_eval_step, print0):
    """Cuts the file before the first line after `step`, as the run will write the rest again, or before a half line.

    A damaged line stays, and the good ones after it. Evaluations stay up to `last_eval_step`: a run that a signal
    stopped was saved before the evaluation of its step.
    """
    if step >= 0 and not path.exists():
        print0(f"{path} is missing: the numbers before step {step} are lost, a new file begins")
    keep, damaged = 0, []
    with open(path, "ab+") as file:
        file.seek(0)
        for number, line in enumerate(file if step >= 0 else (), 1):  # a new run keeps nothing
            if not line.endswith(b"\n"):  # it was being written when the process was killed
                break
            try:
                found = json.loads(line)
                if found["step"] > (last_eval_step if found["kind"] == "eval" else step):
                    break
            except (ValueError, KeyError, TypeError, RecursionError):
                damaged.append(number)
            keep += len(line)
        file.truncate(keep)
    if damaged:
        print0(f"{path}: {len(damaged)} lines cannot be read, first line {damaged[0]}; all others are kept")


def start(config, progress, tokenizer: Tokenizer | None, new: bool, facts: dict, print0) -> MetricsWriter:
    """Opens the metrics of a run, and wandb if wanted, and writes the start line: config, tokenizer and `facts`.

    config: train.TrainConfig; progress: checkpoint.Progress; new: a new run, not a resumed one.
    """
    step, last_eval_step = (-1, -1) if new else (progress.step, progress.last_eval_step)
    writer = MetricsWriter(config.out_dir, step, last_eval_step, print0)
    if config.wandb_log:
        progress.wandb_id = (not new and progress.wandb_id) or secrets.token_hex(4)
        name = config.wandb_run_name or Path(config.out_dir).name
        settings = dict(project=config.wandb_project, name=name, id=progress.wandb_id, dir=str(config.out_dir))
        writer.tracker = Tracker(settings | dict(config=asdict(config)), print0)
    began_from = progress.began_from or config.init_from
    about = tokenizer and {name: value for name, value in tokenizer.state().items() if name != "content"}
    facts = facts | dict(tokenizer=about, date=time.strftime("%Y-%m-%d %H:%M"), commit=commit())
    writer.write("start", progress.step, config=asdict(config) | {"init_from": began_from}, **facts)
    return writer


def commit() -> str | None:
    """The commit of this clone, with "+" if its files differ from it; None without git or a clone."""
    clone = Path(__file__).parent.parent
    command = ["git", "-C", str(clone), "describe", "--always", "--exclude=*", "--dirty=+"]
    if not (clone / ".git").exists():
        return None
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=2).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


# ---- numbers of a step


def z_score(running: dict, loss: float) -> float:
    """How many standard deviations a step's loss lies above the running mean; 0 during the first 50 steps.

    running: n, mean and variance, all 0 at first; updated here, over about the last 50 steps. A jump counts at most as
    three standard deviations, so that it does not hide the next one.
    """
    n, mean, deviation = running["n"], running["mean"], math.sqrt(running["variance"])
    above = (loss - mean) / deviation if n >= 50 and deviation > 0 else 0.0
    share = max(0.02, 1 / (n + 1))
    off = min(above, 3.0) * deviation if above else loss - mean
    variance = (1 - share) * (running["variance"] + share * off * off)
    running.update(n=n + 1, mean=mean + share * off, variance=variance)
    return above


def add_step(window: dict, applied: bool, loss: float, grad_norm: float) -> None:
    """Adds a step to the sums since the last log line. A step that was not applied has no loss to speak of."""
    window["steps"] = window.get("steps", 0) + 1
    if applied:
        for name, value in (("applied", 1), ("loss", loss), ("grad_norm", grad_norm)):
            window[name] = window.get(name, 0) + value


def window_means(window: dict) -> dict:
    """loss and grad_norm: means over the applied steps since the last log line (None if there are none); skipped."""
    applied = window.get("applied", 0)
    means = {name: window[name] / applied if applied else None for name in ("loss", "grad_norm")}
    return means | {"skipped": window["steps"] - applied}


class StepTimes:
    """Seconds of steps, and of waiting for tokens, since the last log line. The slower first step does not count."""

    def __init__(self):
        self.times, self.is_first = [], True

    def add(self, seconds: float, waited: float) -> None:
        self.times.append((seconds, waited))

    def means(self) -> tuple[float, float]:
        """(seconds of a step, share of it spent waiting for tokens), of the steps since this was last called."""
        times = self.times[1:] if self.is_first and len(self.times) > 1 else self.times
        self.times, self.is_first = [], False
        seconds, waited = np.mean(times, axis=0).tolist()
        return seconds, waited / seconds


def log_line(step: int, max_iters: int, numbers: dict) -> str:
    """One line for the terminal from the numbers of a "train" line of the metrics."""
    loss, norm = numbers["loss"], numbers["grad_norm"]
    columns = [
        f"step {step:>{len(str(max_iters))}}",
        "loss   -   " if loss is None else f"loss {loss:7.4f}",
        f"lr {numbers['lr']:.2e}",
        "grad norm  -  " if norm is None else f"grad norm {norm:5.2f}",
        f"{numbers['ms_per_step']:,.0f} ms/step",
        f"{numbers['tokens_per_s']:,.0f} tokens/s",
        f"MFU {numbers['mfu']:.1%}" if "mfu" in numbers else "",
        f"{numbers['skipped']} skipped" if numbers["skipped"] else "",
        f"{duration(3600 * numbers['hours_left'])} left",
    ]
    return " | ".join(column for column in columns if column)


# ---- numbers of an evaluation


def text_bytes(windows: Windows, tokenizer: Tokenizer | None) -> int | None:
    """Bytes of a split's text in UTF-8: the manifest's number, or counted in nanoGPT's characters; None if unknown."""
    if windows.text_bytes is not None or tokenizer is None or tokenizer.kind != "chars":
        return windows.text_bytes
    lengths = np.array([len(tokenizer.decode_bytes([i])) for i in range(tokenizer.n_vocab)])
    counts = [np.bincount(open_tokens(shard.path), minlength=2**16) for shard in windows.shards]
    return int(np.sum(counts, axis=0)[: tokenizer.n_vocab] @ lengths)


def eval_numbers(train: np.ndarray, val: np.ndarray, tokens: int, text_bytes: int | None) -> dict:
    """train, val (n,): mean loss of each window of a split, in nats per token; tokens, text_bytes: of the val split.

    The dict has the losses; val_error, the standard error of the val loss; bits_per_byte, which compares across
    tokenizers, where text_bytes is known; val_groups, the means of up to 64 groups of windows, equal in all runs.
    """
    numbers: dict = dict(train_loss=float(train.mean()), val_loss=float(val.mean()))
    numbers["perplexity"] = math.exp(min(numbers["val_loss"], 700))
    if len(val) > 1:
        numbers["val_error"] = float(val.std(ddof=1) / math.sqrt(len(val)))
    if text_bytes:
        numbers["bits_per_byte"] = numbers["val_loss"] / math.log(2) * tokens / text_bytes
    groups = np.array_split(val, min(EVAL_GROUPS, len(val)))
    return numbers | dict(val_groups=[round(float(group.mean()), 6) for group in groups])


def eval_line(step: int, numbers: dict, seconds: float, tokenizer: Tokenizer | None) -> str:
    """One line for the terminal from the numbers of an "eval" line of the metrics.

    Bits per byte come first where the tokenizer is not GPT-2's: a loss per token would compare with few other runs.
    """
    error = f" +- {numbers['val_error']:.4f}" if "val_error" in numbers else ""
    losses = f"train loss {numbers['train_loss']:.4f}, val loss {numbers['val_loss']:.4f}{error}"
    parts = [losses, f"perplexity {numbers['perplexity']:{',.2f' if numbers['perplexity'] < 1e6 else '.2g'}}"]
    if "bits_per_byte" in numbers:
        bits = f"{numbers['bits_per_byte']:.4f} bits per byte"
        parts = [f"val {bits}", *parts] if tokenizer and tokenizer.kind != "gpt2" else [*parts, bits]
    if "choices_acc" in numbers:
        parts.append(f"choices {numbers['choices_acc']:.3f} +- {numbers['choices_acc_error']:.3f}")
    return f"step {step}: {', '.join(parts)} ({duration(seconds)})"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"

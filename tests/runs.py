"""What the tests of training share: the settings of a tiny run, its metrics, and a process that is watched."""

import json
import queue
import re
import subprocess
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WALL_CLOCK = ("ms_per_step", "tokens_per_s", "eval_seconds", "data_share", "hours_left")
NEVER = "(?!)"  # a pattern that no line has
TINY = dict(
    block_size=16,
    vocab_size=96,
    n_layer=2,
    n_head=2,
    n_embd=32,
    batch_size=2,
    gradient_accumulation_steps=4,
    warmup_iters=2,
    learning_rate=1e-2,
    min_lr=1e-3,
    eval_tokens=320,
    dropout=0.1,
    device="cpu",
    dtype="float32",
    compile=False,
)


def flags_of(**keys):
    return [f"--{k}={v}" for k, v in keys.items()]


def read_metrics(out_dir, *kinds):
    """The lines of some kinds, without what a clock has measured."""
    lines = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in WALL_CLOCK} for line in lines if line["kind"] in kinds]


class Watched:
    """A process whose lines are read while it runs; `said`: those that have been looked at."""

    def __init__(self, command, **options):
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.process = subprocess.Popen(command, cwd=ROOT, **pipes, **options)
        self.said, self.lines = [], queue.Queue()
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def wait_for(self, pattern):
        """-> the first line not yet seen that has `pattern` in it; None if it ended without one."""
        while (line := self.lines.get(timeout=120)) is not None:
            self.said.append(line)
            if re.search(pattern, line):
                return line

    def end(self):
        """-> (exit code, all that was printed)."""
        self.wait_for(NEVER)
        return self.process.wait(120), "".join(self.said)

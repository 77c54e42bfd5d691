"""What the benches share: machine and commit of a figure, tables, and a process of its own for each measurement.

Memory is the peak of resident memory (VmHWM), read from /proc: on Linux only, elsewhere it is 0.
"""

import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # after `from common import ...` a bench can import train, model and onecard
SMALL = dict(n_layer=4, n_head=4, n_embd=256, block_size=256, batch_size=8, gradient_accumulation_steps=1)
M40 = dict(n_layer=12, n_head=6, n_embd=384, block_size=1024, batch_size=16, gradient_accumulation_steps=2)


@cache
def commit() -> str:
    """Short hash of the checkout, with "-dirty" where tracked files are changed; "unknown" without git."""
    command = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() or "unknown"


def machine(*packages: str) -> str:
    """One line: commit, card, processor, load by other work, and the versions of Python and of these packages."""
    card = "no GPU"
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        card = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    return (
        f"commit {commit()}; {card}, {os.cpu_count()} cores ({platform.machine()}), load {os.getloadavg()[0]:.1f} at "
        f"the start; Python {platform.python_version()}, {versions}"
    )


def spread(values: Sequence[float], digits: int = 0, middle: Callable = statistics.median) -> str:
    """Median (or another middle), smallest and largest value."""
    return f"{middle(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Ratios within each turn."""
    return [a / b for a, b in zip(above, below, strict=True)]


def header(*names: str) -> None:
    print(f"\n| {' | '.join(names)} |\n{'|---' * len(names)}|", flush=True)


def row(*cells) -> None:
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


class Finished(NamedTuple):
    output: str
    errors: str
    seconds: float  # from the start of the process to its end
    cpu_seconds: float  # of the process and its children
    peak_bytes: int  # resident memory of the process
    child_peak_bytes: int  # of its largest child


def read_proc(name: str) -> str:
    try:
        return Path("/proc", name).read_text()
    except OSError:
        return ""  # the process has just ended


def peak_memory(pid: int | str) -> int:
    """Largest resident memory that a process has had so far, in bytes; 0 if it has ended."""
    found = re.search(r"VmHWM:\s+(\d+) kB", read_proc(f"{pid}/status"))
    return 1024 * int(found[1]) if found else 0


def run(command: Sequence, environment: dict[str, str] | None = None) -> Finished:
    """Runs a command to its end. If it fails, ends this process with the last lines that the command printed.

    Peaks are polled every 10 ms, because the system's ru_maxrss includes the memory of the process that started it.
    """
    arguments, env = list(map(str, command)), os.environ | {"TQDM_DISABLE": "1"} | (environment or {})
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        began = time.perf_counter()
        process = subprocess.Popen(arguments, stdout=output, stderr=errors, env=env)
        peak = child_peak = pid = 0
        while not pid:
            time.sleep(0.01)
            peak = max(peak, peak_memory(process.pid))
            children = read_proc(f"{process.pid}/task/{process.pid}/children").split()
            child_peak = max([child_peak, *map(peak_memory, children)])
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        texts = output.read(), errors.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)}: exit {process.returncode}\n{texts[0][-1000:]}{texts[1][-2000:]}")
    return Finished(*texts, seconds, usage.ru_utime + usage.ru_stime, peak, child_peak)


def train_py(keys: dict, checkout: str | Path = ROOT) -> tuple[list[dict], Finished]:
    """Runs train.py of a checkout with these keys: the lines of its metrics.jsonl, and the finished process."""
    with tempfile.TemporaryDirectory() as out_dir:
        arguments = [f"--{name}={value}" for name, value in (keys | dict(out_dir=out_dir)).items()]
        done = run([sys.executable, Path(checkout) / "train.py", *arguments])
        lines = (Path(out_dir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], done


def in_a_process(script: str, *arguments, environment: dict[str, str] | None = None) -> dict:
    """The dict that a bench prints as JSON on its last line when it is called with --measure and these arguments.

    If the dict has no "peak", the peak of resident memory of the process is added as that.
    """
    done = run([sys.executable, script, "--measure", json.dumps(arguments)], environment)
    return dict(peak=done.peak_bytes) | json.loads(done.output.splitlines()[-1])


def interleaved(variants: Iterable, turns: int, measure: Callable) -> dict:
    """{variant: its results}. Every second turn is in reverse order, so that other work affects all variants alike."""
    results: dict = {variant: [] for variant in variants}
    for turn in range(turns):
        for variant in list(results)[:: -1 if turn % 2 else 1]:
            results[variant].append(measure(variant))
            print(f"turn {turn + 1} of {turns}: {variant} done", file=sys.stderr, flush=True)
    return results

"""Everything that a CUDA card can show, by one command, into one folder: the GPU tests, then each bench.

    python bench/gpu.py --out=out/gpu --data_dir=data --dataset=docs --minutes=9      # again for what is left

What is done has a file in --out and is not done again, for machines that are lent for minutes at a time.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--dataset", default="docs")
    parser.add_argument("--steps", type=int, default=1000, help="of bench/speedrun.py's old recipe")
    parser.add_argument("--minutes", type=float, default=9.0)
    options = parser.parse_args()
    out, end = Path(options.out), time.monotonic() + 60 * options.minutes
    out.mkdir(parents=True, exist_ok=True)
    data = [f"--data_dir={options.data_dir}", f"--dataset={options.dataset}"]
    commands = {
        "tests": ["-m", "pytest", "-m", "gpu", "-q"],
        "train": ["bench/train.py"],
        "sample": ["bench/sample.py", "--tokens=500"],
        "scaling": ["bench/train.py", "--scaling"],
        "speedrun": ["bench/speedrun.py", *data, f"--steps={options.steps}", f"--results={out}/speedrun.jsonl"],
    }
    for name, command in commands.items():
        left = end - time.monotonic()
        if (out / f"{name}.txt").exists() or left < 30:
            continue
        with open(out / f"{name}.part", "w") as file:
            try:
                done = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=file, stderr=file, timeout=left)
                print(f"{name}: exit {done.returncode}", flush=True)
            except subprocess.TimeoutExpired:
                print(f"{name}: not finished; what it printed is in {name}.part", flush=True)
                continue
        (out / f"{name}.part").rename(out / f"{name}.txt")


if __name__ == "__main__":
    main()

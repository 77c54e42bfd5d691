"""Where the time of a step goes, by torch's profiler, and on a card where its memory goes.

    python train.py config/quickstart.py --profile=True     # three steps to warm up, ten are recorded, then it exits

The files are in out_dir. Open the trace at https://ui.perfetto.dev, the memory at https://pytorch.org/memory_viz.
"""

import os
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from onecard.runtime import Runtime

WARM_UP, STEPS, ROWS = 3, 10, 10
TRACE, MEMORY = "profile.json.gz", "memory.pickle"


class StepProfiler:
    """Records steps WARM_UP to WARM_UP + STEPS of the first process, then writes the files and prints a table."""

    def __init__(self, out_dir: str | Path, runtime: Runtime):
        self.folder, self.runtime, self.steps = Path(out_dir), runtime, 0
        self.on_card = runtime.device.type == "cuda"
        self.profiler = profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.on_card)

    def step_done(self) -> bool:
        """Called after each step -> whether all of them are recorded."""
        self.steps += 1
        last = self.steps == WARM_UP + STEPS
        if self.runtime.rank == 0 and self.steps == WARM_UP:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.on_card:
                torch.cuda.memory._record_memory_history()
            self.profiler.start()
        if self.runtime.rank == 0 and last:
            self.finish()
        return last

    def finish(self):
        self.profiler.stop()
        self.profiler.export_chrome_trace(os.fspath(self.folder / TRACE))
        print(self.table())
        print(f"trace   {self.folder / TRACE}: open it at https://ui.perfetto.dev")
        if self.on_card:
            torch.cuda.memory._dump_snapshot(os.fspath(self.folder / MEMORY))
            torch.cuda.memory._record_memory_history(enabled=None)
            print(f"memory  {self.folder / MEMORY}: open it at https://pytorch.org/memory_viz")

    def table(self) -> str:
        """The operators that take most time, without the time of those that they call."""
        kind = "self_device_time_total" if self.on_card else "self_cpu_time_total"
        times = {row.key: getattr(row, kind) / STEPS / 1000 for row in self.profiler.key_averages()}  # ms a step
        calls = {row.key: row.count / STEPS for row in self.profiler.key_averages()}
        total = sum(times.values()) or 1
        lines = [f"{'operator':<60}{'ms/step':>10}{'share':>8}{'calls/step':>12}"]
        for name in sorted(times, key=times.__getitem__, reverse=True)[:ROWS]:
            lines.append(f"{name[:59]:<60}{times[name]:>10.2f}{times[name] / total:>8.1%}{calls[name]:>12.1f}")
        return "\n".join(lines)

"""Where the time of a step goes, and on a card its memory: python train.py config/quickstart.py --profile=True

Three steps warm up, ten are recorded, then the run ends. The files are in out_dir. Open the trace at
https://ui.perfetto.dev, the memory at https://pytorch.org/memory_viz.
"""

import os
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from onecard.runtime import Runtime

WARM_UP, STEPS, ROWS = 3, 10, 10
TRACE, MEMORY = "profile.json.gz", "memory.pickle"


class StepProfiler:
    """Records STEPS steps of the first process after WARM_UP, then writes the files and prints a table."""

    def __init__(self, out_dir: str | Path, runtime: Runtime):
        self.folder, self.runtime, self.steps = Path(out_dir), runtime, 0
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch 2.13 prints two lines of its own at level 5
        self.on_card = runtime.device.type == "cuda"
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.on_card
        self.profiler = profile(activities=activities, acc_events=True)  # False: torch 2.11 warns

    def step_done(self) -> bool:
        """Called after each step -> whether all of them are recorded."""
        self.steps += 1
        if self.runtime.rank == 0 and self.steps == WARM_UP:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.on_card:
                torch.cuda.memory._record_memory_history(stacks="python")  # those of C++ need addr2line
            self.profiler.start()
        done = self.steps == WARM_UP + STEPS
        if self.runtime.rank == 0 and done:
            self.finish()
        return done

    def finish(self):
        self.profiler.stop()
        self.profiler.export_chrome_trace(str(self.folder / TRACE))
        print(self.table())
        print(f"trace   {self.folder / TRACE}: open it at https://ui.perfetto.dev")
        if self.on_card:
            torch.cuda.memory._dump_snapshot(str(self.folder / MEMORY))
            torch.cuda.memory._record_memory_history(enabled=None)
            print(f"memory  {self.folder / MEMORY}: open it at https://pytorch.org/memory_viz")

    def table(self) -> str:
        """The operators that take most time without those that they call: on the card, if that was measured."""
        rows = [row for row in self.profiler.key_averages() if row.device_type == DeviceType.CPU]
        kernels = any(row.self_device_time_total for row in rows)
        times = [row.self_device_time_total if kernels else row.self_cpu_time_total for row in rows]  # microseconds
        lines = [f"{'operator':<60}{'ms/step':>10}{'share':>8}{'calls/step':>12}  ({'card' if kernels else 'CPU'})"]
        for time, row in sorted(zip(times, rows, strict=True), key=lambda pair: pair[0], reverse=True)[:ROWS]:
            share, calls = time / (sum(times) or 1), row.count / STEPS
            lines.append(f"{row.key[:59]:<60}{time / STEPS / 1000:>10.2f}{share:>8.1%}{calls:>12.1f}")
        return "\n".join(lines)

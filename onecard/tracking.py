"""Weights & Biases beside a run, in a process of its own: nothing that happens there can stop or delay training.

    tracker = Tracker(dict(project="onecard", id="1a2b3c4d", dir="out/run", config={...}), print)
    tracker.send(dict(step=10, numbers={"train/loss": 3.2}))
    tracker.close(artifact="out/run/ckpt.pt")

The run writes its messages to a pipe, one JSON object a line. This file, run as a script, is the other end: it calls
wandb. It ends when the pipe is closed, so also after a run that was killed.
"""

import contextlib
import json
import os
import queue
import select
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

PATIENCE = 5  # seconds that a message may wait for the other end; then the run goes on without wandb
LAST_PATIENCE = 60  # seconds that the end of a run waits for the upload; then it goes on in the background
BACKGROUND = 3600  # seconds of that; then it is given up
REPORTED = 3  # exit code of the process if it has printed the reason


class Tracker:
    """A wandb run in its own process. settings: the arguments of wandb.init. No method raises."""

    def __init__(self, settings: dict, print0):
        self.print0, self.alive = print0, True
        command = [sys.executable, __file__]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, bufsize=0, start_new_session=True)  # no Ctrl-C
        self.pipe: Any = self.process.stdin
        self.send(settings)

    def send(self, message: dict) -> None:
        if not self.alive:
            return
        line, pipe = (json.dumps(message) + "\n").encode(), self.pipe
        try:
            while line:
                if os.name == "posix":  # Windows cannot wait for a pipe
                    if not select.select([], [pipe], [], PATIENCE)[1]:
                        raise TimeoutError(f"no answer for {PATIENCE} s")
                    line = line[pipe.write(line[: select.PIPE_BUF]) :]
                else:
                    line = line[pipe.write(line) :]
        except OSError as error:
            self.give_up(error)

    def give_up(self, error):
        self.alive = False
        self.process.kill()  # does nothing if it has ended
        if self.process.wait() != REPORTED:
            self.print0(f"wandb's process does not take messages ({error.strerror or error}); continuing without wandb")

    def close(self, artifact: str | Path | None = None) -> None:
        """Waits until wandb has everything, at most a minute. artifact: a checkpoint to upload."""
        self.send(dict(end=True, artifact=artifact and str(artifact)))
        if not self.alive:
            return
        self.pipe.close()
        try:
            if (code := self.process.wait(LAST_PATIENCE)) not in (0, REPORTED):
                self.print0(f"wandb's process ended with code {code}; its last numbers may be missing there")
        except subprocess.TimeoutExpired:
            where = f"process {self.process.pid} continues in the background"
            self.print0(f"wandb has not finished after {LAST_PATIENCE} s; {where}")


# ---- the other process


def read_messages(pipe, messages):
    for line in pipe:
        messages.put(json.loads(line))
    messages.put(None)
    time.sleep(BACKGROUND)
    os._exit(REPORTED)


def follow(messages) -> None:
    """Calls wandb as the messages say, until the last one; None instead of it means that the run was killed."""
    import wandb

    watched = wandb.Settings(x_stats_pid=os.getppid())  # the run's processor and memory use, not this process's
    run = wandb.init(**messages.get(), resume="allow", settings=watched)
    while (message := messages.get()) and "end" not in message:
        numbers = message["numbers"]
        if texts := message.get("texts"):
            numbers["samples/texts"] = wandb.Table(columns=["text"], data=[[text] for text in texts])
        run.log(numbers, step=message["step"])
    if message and message["artifact"]:
        run.log_artifact(message["artifact"], name=f"checkpoint-{run.id}", type="model")
    run.finish(exit_code=0 if message else 1)
    if shutil.disk_usage(run.dir).free < 1 << 20:  # wandb itself is silent about it
        raise OSError("its disk is full, so it lacks numbers")


def main() -> None:
    pipe = os.fdopen(os.dup(0), "rb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # else wandb's own child would hold the pipe open
    messages: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=read_messages, args=(pipe, messages), daemon=True).start()
    try:
        follow(messages)
    except Exception as error:
        reason = "it is not installed (pip install wandb)" if isinstance(error, ImportError) else str(error)
        reason = " ".join(reason.split("[type=")[0].split())[:200] or type(error).__name__  # then pydantic's links
        with contextlib.suppress(OSError):
            print(f"wandb does not work: {reason}; continuing without it", flush=True)
        os._exit(REPORTED)  # at a usual exit wandb would wait for its dead child


if __name__ == "__main__":
    sys.path.pop(0)  # this folder, whose names are not meant for wandb's imports
    main()

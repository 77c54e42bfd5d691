"""train.py in two processes, by torchrun on the CPU (gloo): the run of one process, also after signals and kills."""

import contextlib
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from runs import assert_same_run, read_metrics

import train
from onecard import checkpoint

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and /proc as Linux has them")
BASE = dict(max_iters=20, lr_decay_iters=20, eval_interval=5, log_interval=1, dropout=0.0)
BASE |= dict(eval_tokens=336)  # 21 windows: no multiple of two processes' micro batches


@pytest.fixture
def torchrun(start):
    """A function: flags -> train.py in two processes. Workers that are left are killed at the end."""
    started = []

    def build(flags, restarts=0):
        options = ["--standalone", "--nproc_per_node=2", f"--max-restarts={restarts}"]
        started.append(start("-m", "torch.distributed.run", *options, "train.py", *flags))
        return started[-1]

    yield build
    for run in started:
        for pid in workers_of(run) if run.process.poll() is None else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def workers_of(run):
    """Process ids of the workers, the first rank first."""
    children = Path(f"/proc/{run.process.pid}/task/{run.process.pid}/children").read_text().split()
    ranks = {}
    for child in children:
        with contextlib.suppress(OSError, ValueError, IndexError, TypeError):
            environment = Path(f"/proc/{child}/environ").read_text()
            ranks[int(re.search(r"\0RANK=(\d+)", "\0" + environment)[1])] = int(child)
    return [ranks[rank] for rank in sorted(ranks)]


def test_two_processes_have_the_losses_of_one_and_after_kills_and_a_signal_those_of_two(flags, torchrun, tmp_path):
    """One test, because its first run is what the others are compared with.

    Two runs of as many processes are the same bit for bit: a sum of two numbers does not depend on their order. With
    another number of processes, or NCCL, it does: 1e-5 of the loss.
    """
    train.main(flags("one", **BASE))
    code, printed = torchrun(flags("two", **BASE)).end()
    assert code == 0 and "device  2 x cpu" in printed, printed
    assert "Traceback" not in printed and "Warning" not in printed, printed
    one, two = (read_metrics(tmp_path / out, "train", "eval") for out in ("one", "two"))
    # each line once: one process writes. 20 steps, and evaluations at 0, 5, 10, 15, 20
    assert [(line["kind"], line["step"]) for line in two] == [(line["kind"], line["step"]) for line in one]
    assert len(two) == 25 and len(read_metrics(tmp_path / "two", "start")) == 1 and printed.count("done: ") == 1
    for a, b in zip(one, two, strict=True):
        for key in ("loss", "train_loss", "val_loss"):
            assert a.get(key) == pytest.approx(b.get(key), abs=1e-5), (key, a["step"])
        assert a["kind"] == "eval" or a["tokens"] == b["tokens"]
    states = [checkpoint.load(tmp_path / out / "ckpt.pt") for out in ("one", "two")]
    for name in states[0]["model"]:
        torch.testing.assert_close(states[0]["model"][name], states[1]["model"][name], atol=1e-4, rtol=0)

    stopped = torchrun(flags("stopped", **BASE))
    stopped.wait_for("^step  7 ")
    stopped.send(signal.SIGTERM)
    code, printed = stopped.end()
    assert code != 0 and printed.count("SIGTERM: finishing the step") == 2 and printed.count("stopped at step") == 1
    assert 7 <= checkpoint.load(tmp_path / "stopped/ckpt.pt")["iter_num"] < 20

    killed = torchrun(flags("stopped", **BASE), restarts=2)  # goes on from there, and is killed twice
    for rank in (1, 0):
        killed.wait_for("^device  2 x cpu")
        killed.wait_for("^step ")
        os.kill(workers_of(killed)[rank], signal.SIGKILL)
    code, printed = killed.end()
    assert code == 0 and printed.count("device  2 x cpu") == 3, printed
    assert_same_run(tmp_path / "two", tmp_path / "stopped")


def test_a_signal_during_an_evaluation_stops_two_processes_at_the_same_batch(flags, torchrun, tmp_path):
    run = torchrun(flags(**BASE | dict(n_layer=8, n_embd=64, batch_size=1, eval_tokens=0, eval_interval=1)))
    run.wait_for("^device  2 x cpu")
    run.send(signal.SIGTERM)
    code, printed = run.end()
    assert code != 0 and ", val loss" not in printed and printed.count("stopped at step 0") == 1, printed
    assert checkpoint.load(tmp_path / "run/ckpt.pt")["last_eval_step"] == -1

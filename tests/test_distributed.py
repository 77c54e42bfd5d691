"""Two processes, started by torchrun, on the CPU (gloo): the run of one process, also after signals and kills."""

import contextlib
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
from runs import ROOT, TINY, Watched, flags_of, read_metrics

from onecard import checkpoint
import train
from onecard.runtime import DeviceError

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and /proc as Linux has them")
BASE = TINY | dict(max_iters=20, eval_interval=5, log_interval=1, dropout=0.0, init_from="auto")
BASE |= dict(eval_tokens=336)  # 21 windows: no multiple of two processes' micro batches


@pytest.fixture
def flags(tiny_data, tmp_path):
    """A function: keys -> the command line of a tiny run in tmp_path/`out`."""

    def build(out, **keys):
        return flags_of(**BASE | dict(data_dir=tiny_data[0], dataset=tiny_data[1], out_dir=tmp_path / out) | keys)

    return build


class Torchrun(Watched):
    """train.py in several processes."""

    def __init__(self, flags, script="train.py", restarts=0):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        command += [f"--max-restarts={restarts}", script, *flags]
        super().__init__(command, env={**os.environ, "OMP_NUM_THREADS": "1"})

    def workers(self):
        """Process ids of the workers, the first rank first."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        ranks = {}
        for child in children:
            with contextlib.suppress(OSError, ValueError, IndexError):
                environment = Path(f"/proc/{child}/environ").read_text()
                ranks[int(re.search(r"\0RANK=(\d+)", "\0" + environment)[1])] = int(child)
        return [ranks[rank] for rank in sorted(ranks)]


@pytest.fixture
def torchrun():
    started = []

    def start(*args, **options):
        started.append(Torchrun(*args, **options))
        return started[-1]

    yield start
    for run in started:
        workers = run.workers() if run.process.poll() is None else []
        for pid in (run.process.pid, *workers):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        run.process.wait()


def assert_same_run(a, b):
    """Weights, moments, progress and metrics of two runs of as many processes are the same bit for bit: a sum of two
    numbers does not depend on their order. (With more processes, or NCCL, it does: 1e-5 of the loss, as below.)"""
    states = [checkpoint.load(folder / "ckpt.pt") for folder in (a, b)]
    for state in states:
        del state["config"]  # names the folder
    (flat, spec), (other, other_spec) = map(torch.utils._pytree.tree_flatten, states)
    assert spec == other_spec
    for x, y in zip(flat, other, strict=True):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
    lines = [read_metrics(folder, "train", "eval", "event") for folder in (a, b)]
    assert lines[0] == lines[1]


def test_two_processes_have_the_losses_of_one_and_after_kills_and_a_signal_those_of_two(flags, torchrun, tmp_path):
    """One test, for its first run is what the others are compared with."""
    train.main(flags("one"))
    code, said = torchrun(flags("two")).end()
    assert code == 0 and "device  2 x cpu" in said, said
    assert "Traceback" not in said and "Warning" not in said, said
    one, two = (read_metrics(tmp_path / out, "train", "eval") for out in ("one", "two"))
    # each line once: one process writes. 20 steps, and evaluations at 0, 5, 10, 15, 20
    assert [(line["kind"], line["step"]) for line in two] == [(line["kind"], line["step"]) for line in one]
    assert len(two) == 25 and len(read_metrics(tmp_path / "two", "start")) == 1 and said.count("done: ") == 1
    for a, b in zip(one, two, strict=True):
        for key in ("loss", "train_loss", "val_loss"):
            assert a.get(key) == pytest.approx(b.get(key), abs=1e-5), (key, a["step"])
        assert a["kind"] == "eval" or a["tokens"] == b["tokens"]
    states = [checkpoint.load(tmp_path / out / "ckpt.pt") for out in ("one", "two")]
    for name in states[0]["model"]:
        torch.testing.assert_close(states[0]["model"][name], states[1]["model"][name], atol=1e-4, rtol=0)

    stopped = torchrun(flags("stopped"))
    stopped.wait_for("^step  7 ")
    stopped.process.send_signal(signal.SIGTERM)
    code, said = stopped.end()
    assert code != 0 and said.count("SIGTERM: finishing the step") == 2 and said.count("stopped at step") == 1
    assert 7 <= checkpoint.load(tmp_path / "stopped/ckpt.pt")["iter_num"] < 20

    killed = torchrun(flags("stopped"), restarts=2)  # goes on from there, and is killed twice
    for rank in (1, 0):
        killed.wait_for("^device  2 x cpu")
        killed.wait_for("^step ")
        os.kill(killed.workers()[rank], signal.SIGKILL)
    code, said = killed.end()
    assert code == 0 and said.count("device  2 x cpu") == 3, said
    assert_same_run(tmp_path / "two", tmp_path / "stopped")


@pytest.mark.parametrize(
    "processes, keys, message",
    [
        (
            3,
            dict(batch_size=2, gradient_accumulation_steps=4),
            "8 sequences of a step evenly: nproc_per_node=2 or 4 would",
        ),
        (2, dict(batch_size=3, gradient_accumulation_steps=7), "21 sequences of a step evenly: nproc_per_node=1 or 7"),
        (2, dict(batch_size=4, tokens_per_step=12 * 16), "12 sequences of a step evenly: batch_size=3 or 6 would"),
    ],
)
def test_a_step_that_cannot_be_shared_is_refused_with_the_nearest_that_can(
    flags, monkeypatch, processes, keys, message
):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(DeviceError, match=f"{processes} processes with batch_size=. cannot share the {message}"):
        train.main(flags("refused", **keys))


def test_a_signal_during_an_evaluation_stops_two_processes_at_the_same_batch(flags, torchrun, tmp_path):
    keys = dict(n_layer=8, n_embd=64, batch_size=1, eval_tokens=0, eval_interval=1)
    run = torchrun(flags("run", **keys))
    run.wait_for("^device  2 x cpu")
    run.process.send_signal(signal.SIGTERM)
    code, said = run.end()
    assert code != 0 and ", val loss" not in said and said.count("stopped at step 0") == 1, said
    assert checkpoint.load(tmp_path / "run/ckpt.pt")["last_eval_step"] == -1


def test_processes_that_see_other_checkpoints_are_refused(flags, torchrun, tmp_path):
    """As two machines without a shared folder would: here the second process is given another out_dir."""
    train.main(flags("first", max_iters=5))
    script = tmp_path / "two_machines.py"
    script.write_text(
        f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport configurator, train\n"
        "folder = '/first' if os.environ['RANK'] == '0' else '/second'\n"
        "argv = [a.replace('/first', folder) for a in sys.argv[1:]]\n"
        "configurator.run_script(lambda: train.main(argv), train.DeviceError)\n"
    )
    code, said = torchrun(flags("first"), script=script).end()
    assert code != 0 and "process 1 has step=None, process 0 5" in said, said

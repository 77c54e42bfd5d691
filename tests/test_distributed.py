"""train.py by torchrun on the CPU (gloo): the run of one process, also after signals and kills; who is missing."""

import contextlib
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from runs import assert_same_run, read_metrics

import train
from onecard import UserError, checkpoint, processes

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and /proc as Linux has them")
BASE = dict(max_iters=20, lr_decay_iters=20, eval_interval=5, log_interval=1, dropout=0.0)
BASE |= dict(batch_size=2, gradient_accumulation_steps=6)
BASE |= dict(eval_tokens=336)  # 21 windows: no multiple of the processes' micro batches
ONE_CANNOT_COMPILE = """
import functools, os, sys, torch, train

def backend(graph, inputs):
    raise RuntimeError("no compiler here")

backend = backend if os.environ["RANK"] == "1" else "aot_eager"
torch.compile = functools.partial(torch.compile, backend=backend)
train.main(sys.argv[1:])
"""
WHEN_GRADIENTS_ARE_READY = """
import functools, time, torch, train
from onecard import runtime

torch.compile = functools.partial(torch.compile, backend="aot_eager")  # is split like Inductor, and fast to compile
runtime.DistributedDataParallel = functools.partial(runtime.DistributedDataParallel, bucket_cap_mb=1)
keys = dict(n_layer=6, n_head=2, n_embd=160, block_size=64, vocab_size=96, batch_size=4)
config = train.TrainConfig(device="cpu", dtype="float32", **keys)
here = runtime.start_runtime(config)
model = train.GPT(train.GPTConfig(**config.model_args()))
compiled = runtime.compile_model(model, (4, 64), True, here)
times, tokens = [], torch.ones((4, 65), dtype=torch.int64)
for parameter in model.parameters():
    parameter.register_post_accumulate_grad_hook(lambda _: times.append(time.perf_counter()))
for _ in range(3):
    times.clear()
    loss = compiled(tokens[:, :-1], tokens[:, 1:])
    began = time.perf_counter()
    loss.backward()
    ended = time.perf_counter()
here.print0("ready at" + "".join(f" {(t - began) / (ended - began):.2f}" for t in times))
torch.distributed.destroy_process_group()
"""


@pytest.fixture
def torchrun(start, tmp_path):
    """A function: flags -> train.py, or other code, in two processes. Workers that are left are killed at the end."""
    started = []

    def build(flags, restarts=0, processes=2, code=""):
        options = ["--standalone", f"--nproc_per_node={processes}", f"--max-restarts={restarts}"]
        script = tmp_path / "script.py" if code else "train.py"
        if code:
            script.write_text(code)
        started.append(start("-m", "torch.distributed.run", *options, script, *flags))
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


def test_more_processes_have_the_losses_of_one_and_after_kills_and_a_signal_their_own(flags, torchrun, tmp_path):
    """One test, because its first runs are what the others are compared with.

    Two runs of as many processes are the same bit for bit: a sum of two numbers does not depend on their order. With
    another number of processes, or NCCL, it does: 1e-5 of the loss.
    """
    train.main(flags("1", **BASE))
    one = read_metrics(tmp_path / "1", "train", "eval")
    for number in (2, 3):
        out = tmp_path / str(number)
        code, printed = torchrun(flags(out.name, **BASE), processes=number).end()
        assert code == 0 and f"device  {number} x cpu" in printed, printed
        assert "Traceback" not in printed and "Warning" not in printed, printed
        lines = read_metrics(out, "train", "eval")
        # each line once: one process writes. 20 steps, and evaluations at 0, 5, 10, 15, 20
        assert [(line["kind"], line["step"]) for line in lines] == [(line["kind"], line["step"]) for line in one]
        assert len(lines) == 25 and len(read_metrics(out, "start")) == 1 and printed.count("done: ") == 1
        for a, b in zip(one, lines, strict=True):
            for key in ("loss", "train_loss", "val_loss"):
                assert a.get(key) == pytest.approx(b.get(key), abs=1e-5), (key, a["step"])
            assert a["kind"] == "eval" or a["tokens"] == b["tokens"]
        states = [checkpoint.load(folder / "ckpt.pt")["model"] for folder in (tmp_path / "1", out)]
        torch.testing.assert_close(*states, atol=1e-4, rtol=0)

    code, printed = torchrun(flags("eager", **BASE | dict(compile=True)), code=ONE_CANNOT_COMPILE).end()
    assert code == 0 and printed.count("torch.compile does not work here (") == 1, printed
    assert_same_run(tmp_path / "2", tmp_path / "eager")

    stopped = torchrun(flags("stopped", **BASE))
    stopped.wait_for("^step  7 ")
    for pid in (*workers_of(stopped), stopped.process.pid):  # as when a terminal is closed, or a job is cancelled
        os.kill(pid, signal.SIGTERM)
    code, printed = stopped.end()
    assert code != 0 and printed.count("SIGTERM: finishing the step") == 2 and printed.count("stopped at step") == 1
    assert 7 <= checkpoint.load(tmp_path / "stopped/ckpt.pt")["iter_num"] < 20

    for rank, keys in ((1, dict()), (0, dict(init_from="scratch", overwrite=True))):  # goes on from there; from 0
        killed = torchrun(flags("stopped", **BASE | keys), restarts=1)
        killed.wait_for("^step 1[1-5] ")
        os.kill(workers_of(killed)[rank], signal.SIGKILL)
        assert int(killed.wait_for(r"^step +\d+ \|").split()[1]) > 5  # not from 0 again
        code, printed = killed.end()
        assert code == 0 and printed.count("device  2 x cpu") == 2, printed
        assert_same_run(tmp_path / "2", tmp_path / "stopped")


def test_gradients_of_a_compiled_model_are_exchanged_while_backward_runs(torchrun):
    run = torchrun([], code=WHEN_GRADIENTS_ARE_READY)
    shares = [float(share) for share in run.wait_for("^ready at").split()[2:]]
    assert len(shares) == 39 and shares[0] < 0.7 and shares[19] < 0.9, shares  # 0.2 and 0.6 if idle; else all at 0.98
    assert run.end()[0] == 0


def test_a_signal_during_an_evaluation_stops_two_processes_at_the_same_batch(flags, torchrun, tmp_path):
    run = torchrun(flags(**BASE | dict(n_layer=8, n_embd=64, batch_size=1, eval_tokens=0, eval_interval=1)))
    run.wait_for("^device  2 x cpu")
    run.send(signal.SIGTERM)
    code, printed = run.end()
    assert code != 0 and ", val loss" not in printed and printed.count("stopped at step 0") == 1, printed
    assert checkpoint.load(tmp_path / "run/ckpt.pt")["last_eval_step"] == -1


# ---- who is missing


@pytest.mark.parametrize("rank, missing", [(0, 1), (1, 0)])
def test_a_process_that_does_not_come_is_named(monkeypatch, rank, missing):
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # torchrun's
    keys = dict(MASTER_ADDR="localhost", MASTER_PORT=store.port, TORCHELASTIC_USE_AGENT_STORE=True)
    for name, value in (keys | dict(RANK=rank, WORLD_SIZE=2)).items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match=f"process {rank} of 2 waited 0.02 minutes for process {missing} "):
        processes.fresh_store(rank, 2, minutes=0.02)


@pytest.mark.parametrize("counts, missing", [({1: 4}, "1"), ({1: 5}, "1"), ({1: 5, 2: 3}, "1, 2"), ({1: 2**62}, None)])
def test_a_process_that_is_behind_or_silent_is_named_and_one_that_has_ended_is_not(monkeypatch, capfd, counts, missing):
    """Process 0 has gone on 5 times and goes no further. No other one publishes any more."""
    ended = []
    monkeypatch.setattr(processes.os, "_exit", ended.append)
    monkeypatch.setattr(processes.time, "sleep", lambda seconds, sleep=time.sleep: sleep(seconds / 100))
    store = dist.HashStore()
    for rank, count in counts.items():
        store.set(str(rank), f"{count} 1")
    watch = processes.Watch(store, 0, 1 + len(counts), minutes=0.001)
    watch.count = 5
    if missing:
        watch.run()
        assert ended == [2] and f"process 0 waited 0.001 minutes for process {missing} of" in capfd.readouterr().err
    else:
        assert watch.missing(5) == []

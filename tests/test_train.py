"""train.py: learning rates, batches, steps and evaluations; runs that are stopped, killed or harmed.

The runs are train.main in this process. What happens inside a step is seen by wrapping what the step calls.
"""

import collections
import itertools
import math
import os
import pathlib
import random
import re
import shutil
import signal
import threading
import time

import numpy as np
import pytest
import runs
import torch
from runs import (
    ROOT,
    TINY,
    assert_same,
    assert_same_run,
    files_of,
    flags_of,
    read_metrics,
    write_characters,
    write_dataset,
)

import prepare
import sample
import train
from configurator import ConfigError
from model import GPT, GPTConfig
from onecard import UserError, checkpoint
from onecard.windows import Windows, shuffled

EVERYTHING = dict(arch="qwen3", optimizer="normuon", dtype="float16", dropout=0.1, lr_schedule="wsd", decay_iters=8)
EVERYTHING |= dict(dataset="letters", vocab_size=0, sample_interval=5)
POSIX = pytest.mark.skipif(os.name != "posix", reason="kills and signals as POSIX has them")


def first_model():
    """The network of a tiny run at its beginning."""
    torch.manual_seed(1337)
    names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
    return GPT(GPTConfig(**{name: TINY[name] for name in names}, bias=False)).eval()


@pytest.fixture
def during_step(monkeypatch):
    """A function: action -> it is called once in every step, after backward, with the parameters."""
    clip = torch.nn.utils.clip_grad_norm_

    def install(action):
        def wrapped(parameters, *args):
            parameters = list(parameters)
            action(parameters)
            return clip(parameters, *args)

        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", wrapped)

    return install


# ---- the learning rate


def test_learning_rate_is_a_warm_up_a_cosine_and_a_floor():
    config = train.TrainConfig(learning_rate=1.0, min_lr=0.1, warmup_iters=9, max_iters=109)
    rate = [train.learning_rate(step, config) for step in range(130)]
    assert rate[:9] == pytest.approx([0.1 * i for i in range(1, 10)])
    assert rate[9] == 1.0 and rate[59] == pytest.approx(0.55)
    assert rate[34] == pytest.approx(0.55 + 0.45 * math.sqrt(0.5))
    assert rate[109:] == [0.1] * 21
    assert all(a > b for a, b in itertools.pairwise(rate[9:110]))
    constant = train.TrainConfig(learning_rate=1.0, decay_lr=False)
    assert train.learning_rate(0, constant) == train.learning_rate(10**6, constant) == 1.0


def test_linear_and_wsd_schedules():
    config = train.TrainConfig(learning_rate=1.0, min_lr=0.0, warmup_iters=10, max_iters=110, lr_schedule="linear")
    assert [train.learning_rate(step, config) for step in (10, 35, 60, 110)] == pytest.approx([1, 0.75, 0.5, 0])
    config = train.TrainConfig(learning_rate=1.0, min_lr=0.0, warmup_iters=10, max_iters=100, lr_schedule="wsd")
    assert train.decay_start(config) == 80
    rates = [train.learning_rate(step, config) for step in (10, 50, 80, 85, 90, 95, 100, 101)]
    assert rates == pytest.approx([1, 1, 1, 0.75, 0.5, 0.25, 0, 0])


# ---- batches and steps


@pytest.mark.parametrize(
    "keys",
    [
        dict(batch_size=8, gradient_accumulation_steps=1, eval_interval=100),
        dict(batch_size=1, gradient_accumulation_steps=8, eval_interval=1),
        dict(batch_size=0, tokens_per_step=128, gradient_accumulation_steps=40),
    ],
)
def test_the_tokens_of_a_step_depend_on_neither_micro_batch_nor_evaluation_nor_a_resume(
    flags, tiny_data, monkeypatch, keys
):
    seen, next_batch = [], train.Batches.next
    monkeypatch.setattr(train.Batches, "next", lambda self: seen.append(next_batch(self)) or seen[-1])
    for max_iters in (2, 5):
        train.main(flags(max_iters=max_iters, **keys))
    expected = torch.from_numpy(Windows(tiny_data[0] / "tiny", "train", 16, seed=1337).batch(0, 5 * 8)).long()
    inputs, targets = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert torch.equal(inputs, expected[:, :-1]) and torch.equal(targets, expected[:, 1:])


@pytest.fixture
def gradients(flags, monkeypatch):
    """A function: keys -> the gradients that the first step of a run gives to AdamW."""

    def run(out, **keys):
        given = []

        def of(optimizer):
            assert getattr(optimizer, "grad_scale", None) is None  # its step does not unscale
            return [p.grad.clone() for group in optimizer.param_groups for p in group["params"]]

        with monkeypatch.context() as patch:
            patch.setattr(torch.optim.AdamW, "step", lambda self: given.__setitem__(slice(None), of(self)))
            train.main(flags(out, max_iters=1, log_interval=1, eval_tokens=16, **keys))
        return given

    return run


def norm_of(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors]).norm().item()


def test_accumulation_gives_the_gradients_of_the_whole_batch(gradients, tiny_data):
    model = first_model()
    tokens = torch.from_numpy(Windows(tiny_data[0] / "tiny", "train", 16, seed=1337).batch(0, 8)).long()
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    whole = [p.grad for p in sorted(model.parameters(), key=lambda p: p.dim() < 2)]  # in AdamW's order
    parts = gradients("run", dropout=0.0, grad_clip=0.0)
    torch.testing.assert_close(parts, whole, atol=1e-7, rtol=1e-5)


def test_clipping_limits_the_norm_and_the_log_has_it_unclipped(gradients, tmp_path):
    free, clipped = gradients("free", grad_clip=0.0), gradients("clipped", grad_clip=0.01)
    assert norm_of(clipped) == pytest.approx(0.01, rel=1e-4)
    for out in ("free", "clipped"):
        assert read_metrics(tmp_path / out, "train")[0]["grad_norm"] == pytest.approx(norm_of(free), rel=1e-5)


def test_float16_unscales_before_it_clips_so_it_takes_the_steps_of_float32(gradients, tmp_path):
    plain = gradients("float32", dropout=0.0, grad_clip=0.1)
    scaled = gradients("float16", dropout=0.0, grad_clip=0.1, dtype="float16")
    for a, b in zip(scaled, plain, strict=True):
        assert (a - b).norm() < 2e-2 * b.norm()
    norms = [read_metrics(tmp_path / out, "train")[0]["grad_norm"] for out in ("float32", "float16")]
    assert norms[0] == pytest.approx(norms[1], rel=2e-2)


def test_activation_checkpointing_changes_memory_and_not_the_gradients(gradients):
    results, saved = [], []
    for keep in (True, False):  # with dropout: its draws are repeated too
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            results.append(gradients(str(keep), activation_checkpointing=not keep))
        saved.append(sum(kept))
    assert_same(*results)
    assert saved[1] < 0.7 * saved[0], saved


@pytest.mark.parametrize("recipe", [dict(), dict(dtype="float16", arch="qwen3", optimizer="normuon")])
def test_a_step_whose_gradients_are_not_finite_changes_no_tensor_of_any_optimizer_and_is_counted(
    flags, tmp_path, during_step, recipe
):
    hooks = []

    def spoil(parameters):  # in the second step the gradient of one tensor, which is AdamW's
        if not hooks:
            hooks.append(parameters[0].register_hook(lambda gradient: gradient * math.inf))
        else:
            hooks[0].remove()

    during_step(spoil)
    train.main(flags(max_iters=3, eval_interval=1, keep_every=1, dropout=0.0, **recipe))
    one, two, three = (checkpoint.load(tmp_path / f"run/ckpt_step_00000000{step}.pt") for step in (1, 2, 3))
    assert_same(one["model"], two["model"])
    assert all(not torch.equal(two["model"][name], three["model"][name]) for name in two["model"])
    assert [line["step"] for line in read_metrics(tmp_path / "run", "event")] == [2]
    assert [state["skipped_steps"] for state in (one, two, three)] == [0, 1, 1]


def test_logged_loss_is_the_mean_over_all_sequences_since_the_last_line(flags, tmp_path, tiny_data):
    train.main(flags(learning_rate=0, min_lr=0, weight_decay=0, dropout=0.0, max_iters=3))
    rows = torch.from_numpy(Windows(tiny_data[0] / "tiny", "train", 16, seed=1337).batch(0, 3 * 8)).long()
    expected = first_model()(rows[:, :-1], rows[:, 1:]).item()
    assert read_metrics(tmp_path / "run", "train")[0]["loss"] == pytest.approx(expected, abs=1e-6)


def test_compiled_training_gives_the_losses_of_eager_training(flags, tmp_path, capsys):
    keys = dict(dropout=0.0, n_layer=1, max_iters=5, log_interval=1)
    for compile in (False, True):
        train.main(flags(str(compile), compile=compile, **keys))
    assert re.search(r"compiled in \d+ s", capsys.readouterr().out)
    eager, compiled = (read_metrics(tmp_path / out, "train", "eval") for out in ("False", "True"))
    for a, b in zip(eager, compiled, strict=True):
        name = "loss" if a["kind"] == "train" else "val_loss"
        assert a[name] == pytest.approx(b[name], abs=1e-4)


# ---- evaluation and samples


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_an_evaluation_is_the_mean_over_all_windows_whatever_the_batch_size(flags, tmp_path, tiny_data, batch_size):
    train.main(flags(batch_size=batch_size, eval_tokens=0, max_iters=0))
    (line,) = read_metrics(tmp_path / "run", "eval")
    for split in ("train", "val"):
        windows = Windows(tiny_data[0] / "tiny", split, 16)
        rows = torch.from_numpy(windows.rows(np.arange(len(windows)))).long()
        with torch.no_grad():
            losses = first_model()(rows[:, :-1], rows[:, 1:], reduction="none").mean(1)
        assert line[f"{split}_loss"] == pytest.approx(losses.mean().item(), abs=1e-5)
    assert line["val_groups"] == pytest.approx([group.mean().item() for group in losses.tensor_split(64)], abs=1e-5)


def test_eval_tokens_and_nanogpts_eval_iters_choose_evenly_spread_windows(flags, monkeypatch):
    asked, rows = [], Windows.rows
    monkeypatch.setattr(Windows, "rows", lambda self, i: asked.extend(i) or rows(self, i))
    train.main(flags(eval_only=True, eval_tokens=160))
    train.main(flags(eval_only=True, eval_tokens=0, eval_iters=5))  # 5 x 2 x 16 tokens = 10 windows
    assert asked == 2 * ([i * 312 // 10 for i in range(10)] + [i * 92 // 10 for i in range(10)])


def test_evaluation_and_samples_do_not_disturb_training(flags, tmp_path, monkeypatch, capsys):
    keys = dict(vocab_size=50304, n_embd=8)
    train.main(flags("often", eval_interval=1, sample_interval=6, always_save_checkpoint=False, **keys))
    printed = capsys.readouterr().out
    train.main(flags("never", eval_interval=100, **keys))
    assert_same(*(checkpoint.load(tmp_path / out / "ckpt.pt")["model"] for out in ("often", "never")))
    broken = lambda *_: {}["\n"]  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(train.writing, "sample_texts", broken)
        train.main(flags("broken", sample_interval=6, eval_interval=100, **keys))
    assert "step 12: no samples: " in capsys.readouterr().out
    assert_same(*(checkpoint.load(tmp_path / out / "ckpt.pt")["model"] for out in ("broken", "never")))
    lines = read_metrics(tmp_path / "often", "samples")
    assert [line["step"] for line in lines] == [6, 12] and all(len(line["texts"]) == 3 for line in lines)
    assert lines[0]["texts"][0] in printed


def test_eval_only_evaluates_and_leaves_everything_as_it_was(flags, tmp_path, capsys):
    train.main(flags(max_iters=3))
    files = files_of(tmp_path / "run", "*")
    at_end = read_metrics(tmp_path / "run", "eval")[-1]
    capsys.readouterr()
    train.main(flags(eval_only=True))
    printed = capsys.readouterr().out
    assert f"step 3: train loss {at_end['train_loss']:.4f}, val loss {at_end['val_loss']:.4f}" in printed
    train.main(flags(eval_only=True, init_from="scratch"))
    assert "step 0: train loss 4.5" in capsys.readouterr().out
    (tmp_path / "items.jsonl").write_text('{"prompt": "a", "choices": ["b", "c"], "answer": 0}')
    train.main(flags("none", eval_only=True, vocab_size=50304, choices_file=tmp_path / "items.jsonl"))
    assert re.search(r"step 0: .*, choices [01]\.000 \+- 0\.000", capsys.readouterr().out)
    assert files == files_of(tmp_path / "run", "*")


def test_best_and_latest_checkpoints_are_kept_apart(flags, tmp_path, monkeypatch):
    losses = iter([5, 5.0, 3, 3.0, 4, 4.0])  # train and val of three evaluations
    monkeypatch.setattr(train, "sequence_losses", lambda *_: np.full(8, next(losses)))
    train.main(flags(max_iters=4, eval_interval=2))
    states = [checkpoint.load(tmp_path / "run" / name) for name in ("ckpt.pt", "ckpt_best.pt")]
    assert [(state["iter_num"], state["best_val_loss"]) for state in states] == [(4, 3.0), (2, 3.0)]


def test_a_wsd_run_continues_from_before_its_decay_as_if_it_had_been_longer(flags, tmp_path):
    wsd = dict(lr_schedule="wsd", decay_iters=2, eval_interval=100, lr_decay_iters=0)
    train.main(flags("long", max_iters=8, **wsd))
    train.main(flags("short", max_iters=4, **wsd))
    before = tmp_path / "short" / "ckpt_before_decay.pt"
    assert checkpoint.load(before)["iter_num"] == 2
    train.main(flags("longer", max_iters=8, resume_from=before, **wsd))
    long, longer = (checkpoint.load(tmp_path / out / "ckpt.pt") for out in ("long", "longer"))
    assert_same([long["model"], long["optimizer"]], [longer["model"], longer["optimizer"]])


# ---- vocabularies

TEXT = "Der Fuß, naïve: 日本!\nOne two? " * 80


def test_characters_of_nanogpt_are_trained_on_by_its_config_and_sampled_without_the_dataset(
    tmp_path, monkeypatch, capsys
):
    """Its README's commands, with another text and fewer steps."""
    monkeypatch.chdir(tmp_path)
    write_characters(tmp_path / "data/shakespeare_char", TEXT)
    keys = """
out_dir = 'out-shakespeare-char'
eval_interval = 250 # keep frequent because we'll overfit
eval_iters = 200; log_interval = 10; always_save_checkpoint = False
wandb_log = False; wandb_project = 'shakespeare-char'; wandb_run_name = 'mini-gpt'
dataset = 'shakespeare_char'; gradient_accumulation_steps = 1; batch_size = 64; block_size = 256
n_layer = 6; n_head = 6; n_embd = 384; dropout = 0.2
learning_rate = 1e-3; max_iters = 5000; lr_decay_iters = 5000; min_lr = 1e-4; beta2 = 0.99; warmup_iters = 100
"""
    pathlib.Path("train_shakespeare_char.py").write_text(keys)
    flags = flags_of(device="cpu", compile=False, eval_iters=20, log_interval=1, block_size=64, batch_size=12)
    flags += flags_of(n_layer=4, n_head=4, n_embd=128, max_iters=30, lr_decay_iters=30, dropout=0.0, warmup_iters=2)
    train.main(["train_shakespeare_char.py", *flags])
    printed, out_dir = capsys.readouterr().out, tmp_path / "out-shakespeare-char"
    n = len(set(TEXT))
    assert f"{n} of the tokenizer shakespeare_char; vocab_size=64" in printed
    first, last = read_metrics(out_dir, "eval")
    assert first["val_loss"] == pytest.approx(math.log(64), abs=0.3) and last["val_loss"] < 2
    val = TEXT[int(len(TEXT) * 0.9) :]
    bits = last["val_loss"] / math.log(2) * len(val) / len(val.encode())
    assert last["bits_per_byte"] == pytest.approx(bits) and f"step 30: val {bits:.4f} bits per byte, train" in printed
    start = read_metrics(out_dir, "start")[0]
    assert start["config"]["vocab_size"] == 64 and start["tokenizer"]["kind"] == "chars" and start["planned_hours"] > 0
    assert checkpoint.load(out_dir / "ckpt.pt")["config"]["vocab_size"] == 64
    shutil.rmtree("data")
    sample.main(["out-shakespeare-char", "--device=cpu", "--num_samples=5", "--temperature=3", "--top_k", "0"])
    text = "".join(capsys.readouterr().out.split("\n---------------\n"))
    assert len(text) == 5 * 200 and len(set(text)) > 20 and set(text) <= set(TEXT)
    sample.main(["out-shakespeare-char", "--device=cpu", "--num_samples=1", "--start=日本", "--max_new_tokens=5"])
    assert re.fullmatch("日本.{5}\n---+\n", capsys.readouterr().out, re.S)


@pytest.mark.parametrize("vocab_size, rows", [(0, 128), (71, 71), (96, 96)])
def test_vocab_size_0_is_the_datasets_ids_rounded_up_and_other_numbers_stay(
    flags, tiny_data, tmp_path, vocab_size, rows
):
    write_characters(tiny_data[0] / "letters", TEXT, sorted({*TEXT, *map(chr, range(0x100, 0x130))})[:71])
    train.main(flags(dataset="letters", max_iters=1, sample_interval=1, vocab_size=vocab_size))
    assert checkpoint.load(tmp_path / "run/ckpt.pt")["model"]["lm_head.weight"].shape == (rows, 32)
    train.main(flags(dataset="letters", max_iters=2, vocab_size=0))  # a resumed run keeps its own
    (line,) = read_metrics(tmp_path / "run", "samples")
    assert {*"".join(line["texts"])} <= {*TEXT, *map(chr, range(0x100, 0x130))}


def test_a_dataset_without_a_tokenizer_has_gpt2s_and_a_plan_without_a_dataset_too(flags, tiny_data, tmp_path, capsys):
    for path in (tiny_data[0] / "tiny").glob("*"):  # nanoGPT's files, without a meta.pkl
        (tiny_data[0] / "plain").mkdir(exist_ok=True)
        if path.suffix == ".bin":
            (tiny_data[0] / "plain" / path.name).write_bytes(path.read_bytes()[1024:])
    train.main(flags(dataset="plain", vocab_size=0, n_embd=8, max_iters=1))
    saved = checkpoint.load(tmp_path / "run/ckpt.pt")
    assert saved["config"]["vocab_size"] == 50304 and saved["tokenizer"]["kind"] == "gpt2"
    assert "50,257 of the tokenizer gpt2; vocab_size=50304" in capsys.readouterr().out
    train.main(flags("other", dataset="none", vocab_size=0, plan_only=True))
    assert "data    unknown" in (printed := capsys.readouterr().out) and f"{50304 * 32 / 1e6:.2f}M embedding" in printed
    train.main(flags("own", dataset="plain", max_iters=1, sample_interval=1))  # vocab_size=96: ids of an unknown kind
    assert checkpoint.load(tmp_path / "own/ckpt.pt")["tokenizer"] is None


def test_another_tokenizer_is_refused_in_resuming_and_finetuning_and_both_are_named(flags, tiny_data, tmp_path):
    characters = sorted(set(TEXT))
    for name, order in (("one", characters), ("two", characters[::-1])):
        write_characters(tiny_data[0] / name, TEXT, order)
    train.main(flags(dataset="one", vocab_size=0, max_iters=2))
    for keys in (dict(allow_new_data=True), dict(init_from=tmp_path / "run", out="tuned", overwrite=True)):
        keys = dict(vocab_size=0, dataset="two", max_iters=4) | keys
        with pytest.raises(ConfigError, match=r"dataset=two has the tokenizer two \(\d+ ids.* was trained with one \("):
            train.main(flags(**keys))
        train.main(flags(**keys | dict(dataset="one")))
    assert checkpoint.load(tmp_path / "tuned/ckpt.pt")["tokenizer"]["name"] == "one"
    with pytest.raises(ConfigError, match=r"tokenizer gpt2 .50,257 ids.* was trained with one"):
        shutil.copytree(ROOT / "tests/data/old_data", tiny_data[0] / "old_data")
        train.main(flags("new", init_from=tmp_path / "run", dataset="old_data", vocab_size=0))


# ---- mistakes and damaged data


@pytest.mark.parametrize(
    "keys, message",
    [
        (dict(min_lr=0.1), "min_lr=0.1 is above learning_rate=0.01"),
        (dict(n_head=3), "n_embd=32 is not a multiple of n_head=3"),
        (dict(tokens_per_step=120), "120 is no multiple of block_size: use 128"),
        (dict(batch_size=0), "batch_size=0 needs tokens_per_step"),
        (dict(gpu="RTX 4070"), "gpu='RTX 4070' needs plan_only=True"),
        (dict(keep_every=3), "keep_every=3 has to be a multiple of eval_interval=4"),
        (dict(wandb_artifact=True), "needs wandb_log=True"),
        (dict(dataset="no-such"), "no-such: no such folder"),
        (dict(dataset="tinny"), "did you mean tiny?"),
        (dict(dataset="letters", vocab_size=5), "vocab_size=5 is less than the 22 ids of the tokenizer letters"),
        (dict(vocab_size=64), "96 ids.*vocab_size=64"),
        (dict(init_from="resume"), "no checkpoint"),
        (dict(device="cuda"), "no CUDA device; use --device=cpu"),
        (dict(device="meta"), "device='meta' is not a device for training"),
        (dict(n_embd=10**9), "n_embd=1000000000: must be an integer, at least 1, at most 1000000"),
        (dict(dataset="cut"), r"val_000000\.bin: 1,222 bytes, expected 1,224"),
    ],
)
def test_a_mistake_is_refused_before_the_model_is_built_or_anything_is_printed_or_written(
    flags, tiny_data, tmp_path, monkeypatch, capsys, keys, message
):
    monkeypatch.setattr(train, "GPT", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    write_dataset(tiny_data[0] / "cut", train=[np.arange(100) % 96], val=[np.arange(100) % 96])
    os.truncate(tiny_data[0] / "cut/val_000000.bin", 1222)
    write_characters(tiny_data[0] / "letters", TEXT)
    with pytest.raises(UserError, match=message):
        train.main(flags(**keys))
    assert capsys.readouterr().out == "" and not (tmp_path / "run").exists()


def test_a_dataset_of_the_code_before_the_rebuild_is_trained_on_and_made_again_byte_for_byte(tmp_path, capsys):
    shutil.copytree(ROOT / "tests/data/old_data", tmp_path / "old_data")
    keys = TINY | dict(vocab_size=50304, n_embd=8, eval_tokens=32, max_iters=1, data_dir=tmp_path)
    train.main(flags_of(**keys, dataset="old_data", out_dir=tmp_path / "run"))
    prepare.main(flags_of(verify=True, dataset="old_data", data_dir=tmp_path))
    printed = capsys.readouterr().out
    assert "data    2,154 train tokens" in printed and "2,815 tokens" in printed
    settings = dict(val_fraction=0.2, shard_tokens=1000, workers=1, data_dir=tmp_path)
    source = str(tmp_path / "old_data/texts.jsonl")
    before = files_of(tmp_path / "old_data", "*.bin")
    for dataset in ("old_data", "new_data"):  # nothing is left to do in the first; the second has one val shard
        prepare.main([source, *flags_of(**settings, dataset=dataset)])
        assert files_of(tmp_path / dataset, "train*.bin") == files_of(tmp_path / "old_data", "train*.bin")
        tokens = [content[1024:] for content in files_of(tmp_path / dataset, "val*.bin").values()]
        assert b"".join(tokens) == b"".join(before[f"val_00000{number}.bin"][1024:] for number in range(3))
    assert files_of(tmp_path / "old_data", "*.bin") == before and len(tokens) == 1


# ---- numbers that go wrong


def blow_up(flags, tmp_path, **keys):
    """A run of 4 good steps, then at a learning rate of 1e30 -> the exit code and the checkpoints before."""
    train.main(flags(max_iters=4, **keys))
    before = files_of(tmp_path / "run")
    with pytest.raises(SystemExit) as ended:
        train.main(flags(max_iters=60, lr_decay_iters=60, learning_rate=1e30, **keys))
    return ended.value.code, before


def test_five_steps_in_a_row_that_are_not_finite_end_the_run_with_3_and_the_good_weights(flags, tmp_path, capsys):
    code, before = blow_up(flags, tmp_path)
    assert code == 3 and files_of(tmp_path / "run") == before
    events = read_metrics(tmp_path / "run", "event")
    skipped = [line for line in events if line["event"] == "skipped"]
    assert [line["step"] for line in skipped] == [6, 7, 8, 9, 10]  # step 5 made the weights what they are
    assert [line["sequences"] for line in skipped] == [[8 * step - 8, 8 * step - 1] for step in range(6, 11)]
    others = [(line["step"], line["event"]) for line in events if line["event"] != "skipped"]
    assert others == [(8, "evaluation not finite"), (8, "weights not finite, not saved")]
    printed = capsys.readouterr().err
    assert re.search(r"stopped at step 10: .* 5 steps in a row .* continues from ckpt\.pt of step 4", printed)
    assert "lower --learning_rate or --grad_clip" in printed
    train.main(flags("whole"))
    train.main(flags())  # and it continues from there at the old rate
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_float16_skips_and_counts_until_its_scale_is_below_1_and_then_five_more(flags, tmp_path, capsys):
    code, before = blow_up(flags, tmp_path, dtype="float16", eval_interval=50)
    assert code == 3 and files_of(tmp_path / "run") == before
    scales = [line["scale"] for line in read_metrics(tmp_path / "run", "event") if line["step"] > 5]
    assert scales[-5:] == [2.0**-k for k in range(1, 6)] and len(scales) > 15
    assert all(a == 2 * b for a, b in itertools.pairwise(scales))
    line = read_metrics(tmp_path / "run", "train")[-1]
    assert line["skipped"] == 3 and line["loss"] is None and line["scale"] in scales
    printed, errors = capsys.readouterr()
    assert "3 skipped" in printed and "try --dtype=bfloat16, a lower --learning_rate" in errors


def test_a_spike_of_the_loss_is_an_event_with_its_sequences(flags, tiny_data, tmp_path, capsys):
    windows, spike, garbage = 400, 250, np.random.default_rng(0)
    ids = np.arange(windows * 16 + 1) % 7
    window = int(shuffled(np.array([spike]), windows, seed=1337)[0])
    ids[16 * window + 1 : 16 * window + 16] = garbage.integers(7, 96, 15)
    write_dataset(tiny_data[0] / "spiky", train=[ids], val=[np.arange(500) % 7])
    keys = dict(batch_size=1, gradient_accumulation_steps=1, max_iters=260, eval_interval=1000, log_interval=100)
    train.main(flags(**keys, lr_decay_iters=300, dataset="spiky", dropout=0.0))
    event = read_metrics(tmp_path / "run", "event")[0]
    assert (event["event"], event["sequences"], event["step"]) == ("spike", [spike, spike], spike + 1)
    assert event["loss"] > 4 > 1 > event["mean"]
    assert re.search(rf"step {spike + 1}: the loss jumped from {event['mean']:.4f} to", capsys.readouterr().out)


# ---- signals and time


@POSIX
@pytest.mark.parametrize(
    "number, recipe",
    [
        (signal.SIGTERM, dict()),
        (signal.SIGINT, dict(dtype="float16", lr_schedule="wsd", decay_iters=2)),
        (signal.SIGHUP, dict(dtype="bfloat16", arch="qwen3", optimizer="normuon")),
    ],
)
def test_stopped_by_a_signal_after_each_of_its_steps_it_is_the_run_that_never_stopped(
    flags, tmp_path, monkeypatch, during_step, capfd, number, recipe
):
    keys = dict(max_iters=6, lr_decay_iters=6, eval_interval=2, log_interval=3) | recipe
    train.main(flags("whole", **keys))
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_DFL)  # as without nohup
    during_step(lambda _: signal.raise_signal(number))
    for step in range(1, 7):
        with pytest.raises(SystemExit, match=str(128 + number)):
            train.main(flags("stopped", **keys))
        assert checkpoint.load(tmp_path / "stopped/ckpt.pt")["iter_num"] == step
        printed, errors = capfd.readouterr()
        assert f"{number.name}: finishing the step and saving" in errors
        there = f"stopped at step {step} of 6; {tmp_path}/stopped has ckpt.pt of step {step}"
        assert f"{there}; to continue, add --init_from=resume" in printed
    train.main(flags("stopped", **keys))  # the evaluation of the last step
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.parametrize("eval_only", [False, True])
def test_a_signal_during_an_evaluation_does_not_wait_for_its_end(flags, tmp_path, monkeypatch, capsys, eval_only):
    rows, batches = Windows.rows, []

    def rows_with_signal(self, indices):
        if threading.current_thread() is threading.main_thread():  # not the batches of training
            batches.append(indices)
            if len(batches) == 3:
                signal.raise_signal(signal.SIGTERM)
        return rows(self, indices)

    with pytest.raises(SystemExit, match="143"), monkeypatch.context() as patch:
        patch.setattr(Windows, "rows", rows_with_signal)
        train.main(flags(eval_only=eval_only, max_iters=2))
    assert len(batches) == 3 and ", val loss" not in capsys.readouterr().out
    if eval_only:
        assert not (tmp_path / "run").exists()
        return
    assert read_metrics(tmp_path / "run", "eval") == []
    assert checkpoint.load(tmp_path / "run/ckpt.pt")["last_eval_step"] == -1


@POSIX
def test_a_second_signal_stops_at_once_and_the_same_one_twice_counts_once(flags, start, tmp_path):
    training = start("train.py", *flags(gradient_accumulation_steps=100_000, eval_tokens=32))  # a step takes minutes
    training.wait_for("^step 0:")
    training.send(signal.SIGTERM)
    training.wait_for("SIGTERM: finishing the step")
    training.send(signal.SIGTERM)  # the same one, passed on by torchrun
    time.sleep(train.Stop.AGAIN)
    assert training.process.poll() is None
    training.send(signal.SIGINT)
    assert training.end()[0] == 130
    assert not files_of(tmp_path / "run")


def test_max_hours_stops_and_saves_and_the_run_can_go_on(flags, tmp_path, monkeypatch, capsys):
    keys = dict(eval_interval=10**5, log_interval=10**5, warmup_iters=0, decay_lr=False)
    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", itertools.count().__next__)  # a second passes whenever somebody looks
        train.main(flags(max_iters=10**5, max_hours=60 / 3600, **keys))  # returns: exit code 0
    step = checkpoint.load(tmp_path / "run/ckpt.pt")["iter_num"]
    assert f"stopped at step {step} of 100000; " in capsys.readouterr().out and step > 0
    for out in ("run", "whole"):
        train.main(flags(out, max_iters=step + 2, **keys))
    states = [checkpoint.load(tmp_path / out / "ckpt.pt") for out in ("run", "whole")]
    assert_same(*([state[key] for key in ("model", "optimizer", "running", "iter_num")] for state in states))


# ---- kill -9


@POSIX
@pytest.mark.parametrize("kills, recipe", [(8, {}), pytest.param(100, EVERYTHING, marks=pytest.mark.slow)])
def test_killed_at_random_moments_and_resumed_it_is_the_run_that_never_stopped(
    flags, start, tiny_data, tmp_path, kills, recipe
):
    """A third of the kills come at a random time, the others before a random system call of a save."""
    write_characters(tiny_data[0] / "letters", TEXT)
    code = f"import sys, test_train; test_train.kill_often({kills}, sys.argv[1], sys.argv[2:])"
    argv = flags(**dict(max_iters=40, lr_decay_iters=40, keep_every=4, n_embd=16) | recipe)
    returned, printed = start("-c", code, tmp_path, *argv).end()
    assert returned == 0, printed
    places = collections.Counter(re.findall(r"^killed (.+)", printed, re.M))
    assert places.total() == kills and len(places) >= 3, places


def kill_often(kills, folder, argv):
    """Runs train.main again and again and kills it, then lets it reach its end. Whenever it was killed or ended, the
    newest checkpoint is that of a run never killed; when it ended, the metrics are too."""
    draw, whole, out_dir = random.Random(0), pathlib.Path(folder, "whole"), pathlib.Path(folder, "killed")
    train.main([*argv, f"--out_dir={whole}", "--eval_only=True"])  # imports what a run imports
    began = time.monotonic()
    assert runs.fork(train.main, [*argv, f"--out_dir={whole}"]) == 0
    most, ended = (time.monotonic() - began) / 2, False

    def train_until_killed(number):
        runs.kill_before_call(number)
        train.main([*argv, f"--out_dir={out_dir}"])

    while kills or not ended:
        number, seconds = 0, 0.0
        if kills and draw.random() < 1 / 3:
            seconds = draw.uniform(0.01, most)
        elif kills:
            number = draw.randint(1, 200)
        ended = runs.fork(train_until_killed, number, seconds=seconds) == 0
        for path in checkpoint.candidates(out_dir):  # nothing partial has a final name
            checkpoint.verify(path)
        if checkpoint.candidates(out_dir):
            state = checkpoint.load_newest(out_dir)[0]
            expected = checkpoint.load(whole / checkpoint.STEP.format(state["iter_num"]))
            del state["config"], expected["config"]  # they name the folder
            assert_same(state, expected)
        if ended:
            assert_same_run(whole, out_dir)
            shutil.rmtree(out_dir)  # the next kill is of a new run
        else:
            kills -= 1

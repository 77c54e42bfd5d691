import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import TINY, flags_of, read_metrics

from onecard import checkpoint
from onecard import plan
import train
from configurator import ConfigError, load_config
from model import GPT, GPTConfig
from onecard.runtime import Batches, DeviceError, Runtime
from onecard.shards import TokenBlocks

BASE = TINY | dict(max_iters=6, eval_interval=3, log_interval=2)


@pytest.fixture
def arguments(tiny_data, tmp_path):
    """A function: keys -> the command line of a tiny run on the tiny dataset, in out_dir tmp_path/`out`."""

    def build(out="run", **keys):
        data_dir, dataset = tiny_data
        return flags_of(**BASE | dict(data_dir=data_dir, dataset=dataset, out_dir=tmp_path / out) | keys)

    return build


@pytest.fixture
def start(arguments):
    """A function: keys -> a Run at its beginning."""

    def build(**keys):
        config = load_config(train.TrainConfig, arguments(**keys))
        Path(config.out_dir).mkdir(exist_ok=True)
        return train.start_run(config)

    return build


def batches_of(run):
    return Batches(run.train_blocks, run.batch_size, run.runtime, run.progress.sequences)


def assert_same_state(a, b):
    """Bit for bit, through nested dicts and lists."""
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_state(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same_state(x, y)
    else:
        assert a == b


@pytest.mark.parametrize("recipe", [{}, dict(arch="qwen3", optimizer="muon"), dict(dtype="float16")])
def test_resume_gives_the_same_weights_and_metrics(arguments, tmp_path, recipe):
    train.main(arguments("whole", **recipe))
    train.main(arguments("parts", max_iters=3, lr_decay_iters=6, **recipe))
    train.main(arguments("parts", lr_decay_iters=6, init_from="resume", **recipe))
    whole, parts = (checkpoint.load(tmp_path / out / "ckpt.pt") for out in ("whole", "parts"))
    for state in (whole, parts):
        del state["config"]  # lr_decay_iters=6 is said in one and meant in the other
    assert_same_state(whole, parts)
    whole, parts = (read_metrics(tmp_path / out, "train", "eval") for out in ("whole", "parts"))
    assert whole == parts and [line["step"] for line in whole] == [0, 2, 3, 4, 6, 6]


def test_metrics_past_the_checkpoint_are_dropped_on_resume(arguments, tmp_path):
    train.main(arguments(max_iters=3, lr_decay_iters=6))
    path = tmp_path / "run" / "metrics.jsonl"
    with open(path, "a") as file:  # as a run leaves it that was killed after its checkpoint, in the middle of a line
        file.write('{"kind": "train", "step": 4, "loss": 1.0}\n{"kind": "eva')
    train.main(arguments(lr_decay_iters=6, init_from="resume"))
    assert [line["step"] for line in read_metrics(tmp_path / "run", "train", "eval")] == [0, 2, 3, 4, 6, 6]


def test_evaluation_does_not_disturb_training(arguments, tmp_path):
    train.main(arguments("often", eval_interval=1))
    train.main(arguments("never", eval_interval=100))
    often, never = (checkpoint.load(tmp_path / out / "ckpt.pt")["model"] for out in ("often", "never"))
    assert_same_state(often, never)


def step_tokens(run, batches):
    micro_steps = run.config.step_sequences // (run.batch_size * run.runtime.world_size)
    inputs, targets = zip(*(batches.next() for _ in range(micro_steps)), strict=True)
    assert all(torch.equal(x[:, 1:], y[:, :-1]) for x, y in zip(inputs, targets, strict=True))
    return torch.cat(inputs)


def test_micro_batch_and_evaluation_change_no_training_batch(start):
    runs = [
        start(out="a"),
        start(out="b", batch_size=8, gradient_accumulation_steps=1),
        start(out="c", batch_size=1, gradient_accumulation_steps=8, eval_interval=1),
    ]
    batches = [batches_of(run) for run in runs]
    for step in range(60):  # more than an epoch
        tokens = [step_tokens(*pair) for pair in zip(runs, batches, strict=True)]
        assert torch.equal(tokens[0], tokens[1]) and torch.equal(tokens[0], tokens[2]), step


def test_every_window_comes_once_an_epoch(start):
    run = start(batch_size=1, gradient_accumulation_steps=1)
    batches = batches_of(run)
    seen = sorted(tuple(batches.next()[0][0].tolist()) for _ in range(run.train_blocks.blocks))
    every = run.train_blocks.rows(np.arange(run.train_blocks.blocks))[:, :-1].tolist()
    assert seen == sorted(map(tuple, every))


def test_ranks_share_the_batches_of_one_process(start):
    one = start(out="one")
    expected = step_tokens(one, batches_of(one))
    shares = []
    for rank in range(2):
        run = start(out=f"rank{rank}")
        run.runtime = Runtime(torch.device("cpu"), torch.float32, rank, world_size=2)
        shares.append(step_tokens(run, batches_of(run)).view(2, 2, -1))  # (micro step, B, T)
    assert torch.equal(torch.stack(shares, 1).flatten(0, 2), expected)


def gradients(run):
    """The gradients that a step would apply."""
    applied = {}
    run.optimizers[-1].step = lambda *_: applied.update({n: p.grad.clone() for n, p in run.model.named_parameters()})
    train.train_step(run, batches_of(run))
    return applied


def test_accumulation_gives_the_gradients_of_the_whole_batch(start):
    split = {"dropout": 0.0, "grad_clip": 0.0}
    whole = gradients(start(out="a", batch_size=8, gradient_accumulation_steps=1, **split))
    parts = gradients(start(out="b", batch_size=2, gradient_accumulation_steps=4, **split))
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], atol=1e-7, rtol=1e-5)


def test_clipping_limits_the_norm_and_reports_it_unclipped(start):
    free = gradients(start(out="a", grad_clip=0.0))
    clipped = gradients(start(out="b", grad_clip=0.01))
    norm = lambda grads: torch.cat([g.flatten() for g in grads.values()]).norm().item()  # noqa: E731
    assert norm(clipped) == pytest.approx(0.01, rel=1e-4)
    run = start(out="c", grad_clip=0.01)
    assert train.train_step(run, batches_of(run))[1] == pytest.approx(norm(free), rel=1e-5)


def test_float16_skips_a_step_that_overflows(start):
    run = start(dtype="float16", dropout=0.0)
    batches, before = batches_of(run), {n: p.clone() for n, p in run.model.named_parameters()}
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    loss, norm, _ = train.train_step(run, batches)
    assert math.isfinite(loss) and not math.isfinite(norm) and run.scaler.get_scale() == 2.0**29
    assert all(torch.equal(p, before[n]) for n, p in run.model.named_parameters())
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    loss, norm, _ = train.train_step(run, batches)
    assert math.isfinite(norm) and run.scaler.get_scale() == 2.0**10
    assert all(not torch.equal(p, before[n]) for n, p in run.model.named_parameters())


def test_muon_and_adamw_step_together_or_not_at_all(start):
    run = start(dtype="float16", dropout=0.0, arch="qwen3", optimizer="muon")
    batches = batches_of(run)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    train.train_step(run, batches)  # the zeros of the projections let no gradient into the rest of the first step
    hook = run.model.transformer.wte.weight.register_hook(lambda g: g * math.inf)  # AdamW's part alone overflows
    before = {n: p.clone() for n, p in run.model.named_parameters()}
    assert not math.isfinite(train.train_step(run, batches)[1])
    assert all(torch.equal(p, before[n]) for n, p in run.model.named_parameters())
    hook.remove()
    assert math.isfinite(train.train_step(run, batches)[1])
    assert all(not torch.equal(p, before[n]) for n, p in run.model.named_parameters())


def test_float16_takes_the_steps_of_float32(start):
    """Unscaled before clipping: with a scale of 2**14 and a clip of 0.1 the gradients are those of float32."""
    plain = gradients(start(out="a", dropout=0.0, grad_clip=0.1))
    run = start(out="b", dropout=0.0, grad_clip=0.1, dtype="float16")
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    for name, gradient in gradients(run).items():
        assert (gradient - plain[name]).norm() < 2e-2 * plain[name].norm(), name


def test_skipped_steps_are_counted(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: OverflowingScaler(device, init_scale=2.0**40))
    train.main(arguments(dtype="float16", max_iters=4, log_interval=4))
    assert checkpoint.load(tmp_path / "run" / "ckpt.pt")["skipped_steps"] == 4
    line = read_metrics(tmp_path / "run", "train")[0]
    assert line["skipped"] == 4 and line["loss"] is None
    assert "4 skipped" in capsys.readouterr().out


class OverflowingScaler(torch.amp.GradScaler):
    """Stays at a scale at which float16 overflows."""

    def update(self, new_scale=None):
        super().update(new_scale or self.get_scale())


def test_gradients_that_are_not_finite_are_not_applied(start):
    run = start(dropout=0.0)
    batches, before = batches_of(run), {n: p.clone() for n, p in run.model.named_parameters()}
    handle = run.model.transformer.ln_f.weight.register_hook(lambda g: g * math.nan)
    assert not math.isfinite(train.train_step(run, batches)[1])
    assert all(torch.equal(p, before[n]) for n, p in run.model.named_parameters())
    handle.remove()
    assert math.isfinite(train.train_step(run, batches)[1])


def test_logged_loss_is_the_mean_over_all_sequences_since_the_last_line(arguments, tmp_path, tiny_data):
    train.main(arguments(learning_rate=0, min_lr=0, weight_decay=0, dropout=0.0, max_iters=3, log_interval=3))
    blocks = TokenBlocks(tiny_data[0] / tiny_data[1], "train", 16, seed=1337)
    rows = torch.from_numpy(blocks.batch(0, 3 * 8)).long()
    model, _ = checkpoint.load_model(tmp_path / "run" / "ckpt.pt")
    with torch.no_grad():
        expected = model(rows[:, :-1], rows[:, 1:]).item()
    assert read_metrics(tmp_path / "run", "train")[0]["loss"] == pytest.approx(expected, abs=1e-6)


def test_evaluation_is_the_mean_over_the_same_windows_whatever_the_batch_size(start):
    results = []
    for batch_size in (1, 7, 64):
        run = start(out=str(batch_size), batch_size=batch_size, eval_tokens=0)
        run.metrics = FakeMetrics()
        train.evaluate(run)
        results.append(run.metrics.lines[0])
        rows = torch.from_numpy(run.val_blocks.rows(np.arange(run.val_blocks.blocks))).long()
        with torch.no_grad():
            expected = run.model.eval()(rows[:, :-1], rows[:, 1:], reduction="none").mean(1)
        assert results[-1]["val_loss"] == pytest.approx(expected.mean().item(), abs=1e-5)
        assert len(results[-1]["val_groups"]) == 64
        assert results[-1]["val_groups"] == pytest.approx(
            [g.mean().item() for g in expected.tensor_split(64)], abs=1e-5
        )
    assert results[0]["train_loss"] == pytest.approx(results[2]["train_loss"], abs=1e-5)


class FakeMetrics:
    def __init__(self):
        self.lines = []

    def write(self, kind, step, **numbers):
        self.lines.append(numbers)


def test_eval_tokens_and_nanogpts_eval_iters_choose_evenly_spread_windows(start, monkeypatch):
    asked = []
    monkeypatch.setattr(TokenBlocks, "rows", lambda self, i, rows=TokenBlocks.rows: asked.extend(i) or rows(self, i))
    run = start(eval_tokens=0, eval_iters=5)  # 5 x 2 x 16 tokens = 10 windows
    train.evaluate(run)
    n = run.train_blocks.blocks
    assert asked[:10] == [i * n // 10 for i in range(10)] and len(asked) == 20


def test_learning_rate_is_a_warm_up_a_cosine_and_a_floor():
    config = train.TrainConfig(learning_rate=1.0, min_lr=0.1, warmup_iters=9, max_iters=109)
    rate = [plan.learning_rate(step, config) for step in range(130)]
    assert rate[:9] == pytest.approx([0.1 * i for i in range(1, 10)])
    assert (
        rate[9] == 1.0 and rate[59] == pytest.approx(0.55) and rate[34] == pytest.approx(0.55 + 0.45 * math.sqrt(0.5))
    )
    assert rate[109:] == [0.1] * 21
    assert all(a > b for a, b in itertools.pairwise(rate[9:110]))
    constant = train.TrainConfig(learning_rate=1.0, decay_lr=False)
    assert plan.learning_rate(0, constant) == plan.learning_rate(10**6, constant) == 1.0


def test_linear_and_wsd_schedules():
    config = train.TrainConfig(learning_rate=1.0, min_lr=0.0, warmup_iters=10, max_iters=110, lr_schedule="linear")
    assert [plan.learning_rate(step, config) for step in (10, 35, 60, 110)] == pytest.approx([1, 0.75, 0.5, 0])
    config = train.TrainConfig(learning_rate=1.0, min_lr=0.0, warmup_iters=10, max_iters=100, lr_schedule="wsd")
    assert plan.decay_start(config) == 80
    rates = [plan.learning_rate(step, config) for step in (10, 50, 80, 85, 90, 95, 100, 101)]
    assert rates == pytest.approx([1, 1, 1, 0.75, 0.5, 0.25, 0, 0])


def test_a_wsd_run_goes_on_from_before_its_decay_as_if_it_had_been_longer(arguments, tmp_path):
    wsd = dict(lr_schedule="wsd", decay_iters=2, eval_interval=100)
    train.main(arguments("long", max_iters=8, **wsd))
    train.main(arguments("short", max_iters=4, **wsd))
    before = tmp_path / "short" / "ckpt_before_decay.pt"
    assert checkpoint.load(before)["iter_num"] == 2
    train.main(arguments("longer", max_iters=8, resume_from=before, **wsd))
    long, longer = (checkpoint.load(tmp_path / out / "ckpt.pt") for out in ("long", "longer"))
    assert_same_state(long["model"], longer["model"])
    assert_same_state(long["optimizer"], longer["optimizer"])


def test_dropout_differs_between_steps_and_ranks():
    seeds = {train.step_seed(seed, step, rank) for seed in range(3) for step in range(50) for rank in range(4)}
    assert len(seeds) == 3 * 50 * 4


def test_best_and_latest_checkpoints_are_kept_apart(arguments, tmp_path, monkeypatch):
    losses = iter([5, 5.0, 3, 3.0, 4, 4.0])  # train and val of three evaluations
    monkeypatch.setattr(train, "sequence_losses", lambda *_: np.full(8, next(losses)))
    train.main(arguments(max_iters=4, eval_interval=2))
    states = {name: checkpoint.load(tmp_path / "run" / name) for name in ("ckpt.pt", "ckpt_best.pt")}
    assert [(s["iter_num"], s["best_val_loss"]) for s in states.values()] == [(4, 3.0), (2, 3.0)]


def test_new_settings_take_effect_after_a_resume(arguments, tmp_path):
    train.main(arguments(max_iters=3))
    config = load_config(train.TrainConfig, arguments(init_from="resume", weight_decay=0.3, beta2=0.999))
    run = train.start_run(config)
    assert [group["weight_decay"] for group in run.optimizers[-1].param_groups] == [0.3, 0.0]
    assert all(group["betas"] == (0.9, 0.999) for group in run.optimizers[-1].param_groups)
    assert run.progress.step == 3 and len(run.optimizers[-1].state) == len(list(run.model.parameters()))


def test_an_old_run_is_neither_overwritten_nor_continued_as_another(arguments, tmp_path):
    train.main(arguments(max_iters=2))
    with pytest.raises(ConfigError, match=r"holds a run.*--init_from=resume.*--overwrite=True"):
        train.main(arguments())
    with pytest.raises(ConfigError, match=r"n_embd=64 \(checkpoint: 32\), seed=1 \(checkpoint: 1337\)"):
        train.main(arguments(init_from="resume", n_embd=64, seed=1))
    with pytest.raises(ConfigError, match=r"tokens_per_step=64 \(checkpoint: 128\)"):
        train.main(arguments(init_from="resume", batch_size=1))
    train.main(arguments(overwrite=True, max_iters=1))
    assert checkpoint.load(tmp_path / "run" / "ckpt.pt")["iter_num"] == 1


def test_mistakes_are_sentences(arguments, tmp_path):
    with pytest.raises(ConfigError, match="min_lr"):
        train.main(arguments(min_lr=0.1))
    with pytest.raises(ConfigError, match="n_head=3"):
        train.main(arguments(n_head=3))
    with pytest.raises(ValueError, match="no-such"):
        train.main(arguments(dataset="no-such"))
    with pytest.raises(ConfigError, match=r"96 ids.*vocab_size=64"):
        train.main(arguments(vocab_size=64))
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint"):
        train.main(arguments(init_from="resume"))


def test_the_speed_leaves_out_the_first_step_of_the_process_where_there_is_another(start):
    """Steps of 9, 1 and 2 s, of which 3, 0.1 and 0.2 s were waited; then lines of a step each."""
    run = start(log_interval=3)
    run.metrics = FakeMetrics()

    def line(steps):
        for seconds, waited in steps:
            run.progress.step += 1
            train.log_step(run, 1.0, 1.0, seconds, waited)
        return run.metrics.lines[-1]

    first = line([(9.0, 3.0), (1.0, 0.1), (2.0, 0.2)])
    assert first["ms_per_step"] == pytest.approx(1500) and first["data_share"] == pytest.approx(0.1)
    assert first["tokens_per_s"] == pytest.approx(run.config.step_tokens / 1.5)
    assert line([(9.0, 3.0), (1.0, 0.1), (2.0, 0.2)])["ms_per_step"] == pytest.approx(4000)
    run = start(out="each", log_interval=1)
    run.metrics = FakeMetrics()
    assert [line([(s, 0.0)])["ms_per_step"] for s in (9.0, 1.0)] == pytest.approx([9000, 1000])


def test_without_a_compiler_training_goes_on_and_says_so(start, monkeypatch, capsys):
    def no_compiler(*_, **__):
        raise RuntimeError("no C++ compiler\nand a long trace")

    monkeypatch.setattr(torch, "compile", lambda model, dynamic: no_compiler)
    run = start(compile=True)
    assert run.compiled is run.model
    assert "torch.compile does not work here (no C++ compiler); going on without it" in capsys.readouterr().out
    train.train_step(run, batches_of(run))


def test_compiled_training_gives_the_loss_of_eager_training(start):
    losses = []
    for compile in (False, True):
        run = start(out=str(compile), compile=compile, dropout=0.0, n_layer=1)
        batches = batches_of(run)
        losses.append([train.train_step(run, batches)[0] for _ in range(5)])
        assert (run.compiled is not run.model) == compile
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_eval_only_evaluates_and_leaves_everything_as_it_was(arguments, tmp_path, capsys):
    train.main(arguments(max_iters=3))
    files = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    at_end = read_metrics(tmp_path / "run", "eval")[-1]
    capsys.readouterr()
    train.main(arguments(eval_only=True, init_from="resume"))
    said = capsys.readouterr().out
    assert f"step 3: train loss {at_end['train_loss']:.4f}, val loss {at_end['val_loss']:.4f}" in said
    train.main(arguments(eval_only=True))
    assert "step 0: train loss 4.5" in capsys.readouterr().out
    assert files == {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}


def test_checkpoint_has_nanogpts_keys_and_names(arguments, tmp_path):
    train.main(arguments(max_iters=2, bias=True))
    state = torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)
    assert {"model", "optimizer", "model_args", "iter_num", "best_val_loss", "config"} <= state.keys()
    assert state["model"].keys() == GPT(GPTConfig(**state["model_args"])).state_dict().keys()
    assert {"transformer.h.1.attn.c_attn.weight", "transformer.ln_f.bias", "lm_head.weight"} <= state["model"].keys()


def test_wandb_offline_continues_the_same_run(arguments, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train.main(arguments(wandb_log=True, max_iters=3))
    train.main(arguments(wandb_log=True, init_from="resume"))
    run_id = checkpoint.load(tmp_path / "run" / "ckpt.pt")["wandb_id"]
    files = list((tmp_path / "run").glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2 and all(file.name == f"run-{run_id}.wandb" for file in files)


def test_tokens_per_step_derives_the_accumulation_and_keeps_the_batches(start):
    a = start(out="a", batch_size=4, gradient_accumulation_steps=2)
    b = start(out="b", batch_size=0, tokens_per_step=128, gradient_accumulation_steps=40)
    assert b.batch_size * b.micro_steps == 8 and b.progress.found["batch_size"] == b.batch_size
    assert torch.equal(step_tokens(a, batches_of(a)), step_tokens(b, batches_of(b)))


def test_a_found_micro_batch_is_found_once(arguments, tmp_path, monkeypatch):
    train.main(arguments(batch_size=0, tokens_per_step=128, max_iters=2))
    assert checkpoint.load(tmp_path / "run" / "ckpt.pt")["found"]["batch_size"] == 8
    monkeypatch.setattr("run.find_batch_size", lambda *_: pytest.fail("searched again"))
    train.main(arguments(batch_size=0, tokens_per_step=128, init_from="resume"))


def test_tokens_per_step_that_cannot_be_is_a_sentence(arguments):
    with pytest.raises(ConfigError, match="120 is not a multiple of block_size=16: 112 and 128 are"):
        train.main(arguments(tokens_per_step=120))
    with pytest.raises(ConfigError, match=r"batch_size=0 .* needs tokens_per_step"):
        train.main(arguments(batch_size=0))


def test_activation_checkpointing_changes_memory_and_not_the_gradients(start):
    grads, saved = [], []
    for keep in (True, False):
        run = start(out=str(keep), activation_checkpointing=not keep)  # with dropout: its draws are repeated too
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            grads.append(gradients(run))
        saved.append(sum(kept))
    assert_same_state(grads[0], grads[1])
    assert saved[1] < 0.7 * saved[0], saved


def test_out_of_memory_says_which_keys_keep_the_tokens_a_step(arguments, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 11 GiB"
        )

    monkeypatch.setattr(train, "train_step", full)
    with pytest.raises(DeviceError, match="batch_size=1 --gradient_accumulation_steps=8 should fit"):
        train.main(arguments())


def test_samples_go_into_the_metrics_and_change_nothing(arguments, tmp_path, capsys):
    train.main(arguments("plain", vocab_size=50304))
    train.main(arguments("sampled", vocab_size=50304, sample_interval=3))
    plain, sampled = (checkpoint.load(tmp_path / out / "ckpt.pt") for out in ("plain", "sampled"))
    assert_same_state(plain["model"], sampled["model"])
    lines = read_metrics(tmp_path / "sampled", "samples")
    assert [line["step"] for line in lines] == [3, 6] and all(len(line["texts"]) == 3 for line in lines)
    assert lines[0]["texts"][0] in capsys.readouterr().out

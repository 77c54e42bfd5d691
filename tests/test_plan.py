"""plan.py against the network itself, against sums written out, against the vendor's table and two real runs."""

import math
import re
from pathlib import Path

import curves
import numpy as np
import pytest
import torch
from curves import anchor, config

import model
from onecard import plan
import train
from configurator import ConfigError
from report import read_config

GPT2 = dict(n_layer=12, n_head=12, vocab_size=50304, block_size=1024)
TINY = dict(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=64)


# ---- the network


@pytest.mark.parametrize("arch, bias", [("gpt2", True), ("gpt2", False), ("qwen3", False)])
def test_parameters_and_flops_are_those_of_the_network(arch, bias):
    keys = TINY | dict(arch=arch, bias=bias)
    network = model.GPT(model.GPTConfig(**keys))
    found = plan.parameters(config(**keys))
    assert found["total"] == network.num_params()
    assert found["total"] - found["positions"] == network.num_params(positions=False)
    assert found["embedding"] == 64 * 32
    assert plan.flops_per_token(config(**keys)) == network.flops_per_token()


def test_parameters_of_the_founding_runs():
    small, large = (plan.parameters(config(**GPT2, n_embd=width)) for width in (384, 768))
    assert small["total"] - small["positions"] == 40_560_000 and small["embedding"] == 19_316_736
    assert large["total"] == 124_373_760
    assert plan.parameters(config(**GPT2, n_embd=768, bias=True))["total"] == 124_475_904


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("arch", ["gpt2", "qwen3"])
def test_a_block_keeps_for_backward_what_autograd_saves(arch, wide):
    keys = dict(n_head=2, n_embd=128, block_size=64, vocab_size=64, arch=arch, bias=False)
    idx, kept = torch.zeros(2, 64, dtype=torch.int64), []
    for layers in (1, 2):
        network, seen = model.GPT(model.GPTConfig(n_layer=layers, **keys)), {}
        weights = {p.untyped_storage().data_ptr() for p in network.parameters()}

        def save(tensor, seen=seen, weights=weights):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                seen[storage.data_ptr()] = storage.nbytes(), tensor
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=not wide):
            network(idx, idx)
        kept.append(sum(size for size, _ in seen.values()))
    c = config(n_layer=1, compile=False, batch_size=2, gradient_accumulation_steps=1, **keys)
    more = config(**{**vars(c), "n_layer": 2})
    planned = plan.memory(more, "cpu", wide)["activations"] - plan.memory(c, "cpu", wide)["activations"]
    matrices = plan.parameters(more)["blocks"] - plan.parameters(c)["blocks"]  # saved as 16-bit copies too
    assert kept[1] - kept[0] - (0 if wide else 2 * matrices) == pytest.approx(planned, rel=0.03)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_chunks_of_logits_are_as_large_as_the_networks(device):
    for rows in (100, 2048, 16384):
        assert model.chunk_rows(rows, 50304, device) <= plan.CHUNK_LOGITS[device] / 50304 + 1
        chunks = math.ceil(rows * 50304 / plan.CHUNK_LOGITS[device])
        assert model.chunk_rows(rows, 50304, device) == math.ceil(rows / chunks)


def test_memory_on_a_card_is_that_of_the_derived_table():
    """GiB of a step with the loss in chunks at 16 x 1024 x 50304, counted by hand: 4.1 and 8.1."""
    for width, gib in ((384, 4.1), (768, 8.1)):
        c = config(**GPT2, n_embd=width, batch_size=16, gradient_accumulation_steps=32)
        assert sum(plan.memory(c).values()) / 2**30 == pytest.approx(gib, rel=0.1)


def test_memory_falls_with_activation_checkpointing_and_is_unknown_without_a_micro_batch():
    c = config(**GPT2, n_embd=768)
    spared = (
        plan.memory(c)["activations"]
        - plan.memory(config(**{**vars(c), "activation_checkpointing": True}))["activations"]
    )
    assert spared == (12 * 36 - 12 * 4 - 36) * 768 * 12 * 1024  # inputs of all blocks, all of one block
    assert plan.memory(config(batch_size=0, tokens_per_step=2**19)) is None


@pytest.mark.parametrize("free_gib", [2, 5.4, 100])
def test_the_micro_batch_that_fits_is_the_largest_that_divides_the_step(free_gib):
    c = config(**GPT2, n_embd=384, batch_size=0, tokens_per_step=96 * 1024)
    peaks = {
        n: sum(plan.memory(config(**{**vars(c), "batch_size": n})).values()) for n in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
    }
    size = max(n for n in peaks if peaks[n] <= free_gib * 2**30)
    assert plan.batch_that_fits(c, free_gib * 2**30) == (size, peaks[size])
    assert plan.batch_that_fits(c, 2**28) == (0, 0)


def test_a_card_held_by_another_is_said_with_who_and_a_batch_that_fits():
    """5.9 GB of the founding run's card were held by another process, and it died in its first backward pass."""
    c = config(**GPT2, n_embd=768, batch_size=16, gradient_accumulation_steps=32)
    facts = dict(device="NVIDIA GeForce RTX 4070", sms=46, holders="4242, python3, 5900 MiB", disk_free=10**9)
    found = plan.plan(c, free_bytes=int(5.4 * plan.GiB), **facts)
    said = "\n".join(plan.lines(found, c))
    assert "6.6 GiB are held by others, the desktop included: 4242, python3, 5900 MiB" in said
    warned = re.search(r"memory: .* 5.4 free: --batch_size=(\d+) --gradient_accumulation_steps=(\d+) needs", said)
    size, steps = int(warned[1]), int(warned[2])
    assert size * steps == 512 and "or end what holds 6.6" in said
    smaller = config(**{**vars(c), "batch_size": size, "gradient_accumulation_steps": steps})
    assert not [
        line for line in plan.plan(smaller, free_bytes=int(5.4 * plan.GiB), **facts)["warnings"] if "memory" in line
    ]
    assert "disk: checkpoints take 7.5 GB at their most, 1.0 GB are free" in said


# ---- cards


def test_ada_cards_have_the_peak_of_their_sms_and_boost_clock():
    for name, sms, ghz in (("RTX 4070", 46, 2.475), ("RTX 4090", 128, 2.52), ("RTX 4070 Ti SUPER", 66, 2.61)):
        assert plan.peak_flops(name) == pytest.approx(sms * 512 * ghz * 1e9, rel=0.005)


@pytest.mark.parametrize(
    "name, sms, tflops",
    [
        ("NVIDIA GeForce RTX 4070", 46, 58.3),
        ("NVIDIA GeForce RTX 4070 SUPER", None, 71.0),
        ("4070 ti", None, 80.2),
        ("NVIDIA A100-SXM4-80GB", 108, 312.0),
        ("NVIDIA H200", 132, 989.0),
        ("NVIDIA GeForce RTX 4070 Laptop GPU", 36, None),
        ("NVIDIA GeForce RTX 4070", 36, None),
        ("NVIDIA GeForce RTX 9999", None, None),
        ("cpu", None, None),
    ],
)
def test_a_card_is_known_by_its_whole_name_or_not_at_all(name, sms, tflops):
    assert plan.peak_flops(name, sms) == (tflops and tflops * 1e12)


# ---- the law


def test_the_law_meets_its_anchor_and_the_founding_run():
    assert plan.law(124_475_904, 10.26e9) == pytest.approx(3.2722)
    assert plan.law(40_560_000, 10.49e9) == pytest.approx(3.60, abs=0.005)
    _, train, _ = anchor("40m")
    assert plan.law(40_953_216, 10.49e9) == pytest.approx(train[-3:].mean(), abs=0.03)


def test_the_best_size_is_the_minimum_at_equal_flops():
    n, d = plan.best_size(41e6, 10.49e9)
    sizes = np.geomspace(1e7, 1e9, 20001)
    assert n * d == pytest.approx(41e6 * 10.49e9)
    assert n == pytest.approx(sizes[np.argmin([plan.law(m, n * d / m) for m in sizes])], rel=0.001)


@pytest.mark.parametrize(
    "keys, why",
    [
        (dict(arch="qwen3", optimizer="muon"), "qwen3 with muon"),
        (dict(vocab_size=256), "vocabulary of 256"),
        (dict(n_layer=1, n_embd=64, n_head=1), "networks of 3M parameters"),
        (dict(max_iters=100), "runs of 52.4M tokens"),
        (dict(init_from="gpt2"), "weights of gpt2"),
        (dict(lr_decay_iters=40000), "finished schedules"),
        (dict(decay_lr=False), "finished schedules"),
    ],
)
def test_no_loss_is_expected_where_the_law_does_not_hold(keys, why):
    base = curves.ANCHORS["40m"]
    assert plan.expected_loss(config(**base))[0] == pytest.approx(3.60, abs=0.01)
    loss, reason = plan.expected_loss(config(**(base | keys)))
    assert loss is None and why in reason
    assert plan.expected_loss(config(**base), epochs=8)[0] is None


# ---- the forecast


def test_annealing_sums_are_the_double_sums_of_the_paper():
    rates = [plan.learning_rate(step, config(max_iters=60, lr_decay_iters=60, warmup_iters=5)) for step in range(60)]
    s1, s2 = plan.annealing(rates)
    units = np.array(rates) / max(rates)
    for s in (1, 7, 30, 60):
        falls = [max(0.0, units[k - 1] - units[k]) for k in range(1, s)]
        double = sum(falls[k - 1] * 0.999 ** (i - k) for i in range(1, s) for k in range(1, i + 1))
        assert s1[s] == pytest.approx(units[:s].sum()) and s2[s] == pytest.approx(double)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_a_curve_that_obeys_the_law_is_forecast_exactly(schedule):
    c = config(max_iters=10000, lr_decay_iters=10000, warmup_iters=200, lr_schedule=schedule)
    rates = plan.rates(c)
    truth = plan.follow(dict(a=0.5, b=(3.1, 0.2, 0.12), scale=[s[-1] for s in plan.annealing(rates)]), rates)
    steps = np.arange(0, 9001, 250)
    found, _ = plan.forecast(steps, truth[steps], rates)
    assert found["loss"] == pytest.approx(truth[-1], abs=0.002) and found["a"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    "name, split, cut, within",
    [
        ("40m", "train", 10000, 0.01),
        ("40m", "train", 14500, 0.01),
        ("40m", "val", 10000, 0.02),
        ("40m", "val", 14500, 0.02),
        ("124m", "train", 8000, 0.03),
        ("124m", "val", 8000, 0.03),
    ],
)
def test_the_ends_of_two_real_runs_are_forecast_from_their_beginnings(name, split, cut, within):
    steps, train, val = anchor(name)
    losses, rates = {"train": train, "val": val}[split], plan.rates(config(**curves.ANCHORS[name]))
    found, _ = plan.forecast(steps[steps <= cut], losses[steps <= cut], rates)
    error = abs(plan.follow(found, rates)[steps[-1]] - losses[-1])
    assert error < within and error < found["band"] < 0.1


def test_no_forecast_before_half_before_the_decay_or_from_few_evaluations():
    steps, _, val = anchor("40m")
    c = curves.ANCHORS["40m"]
    rates = plan.rates(config(**c))
    assert "before step 10,000" in plan.forecast(steps[:19], val[:19], rates)[1]
    few = [0, 2000, 4000, 6000, 8000, 10000, 12000]
    assert "fewer than seven" in plan.forecast(few, val[:7], rates)[1]
    stable = plan.rates(config(**c, lr_schedule="wsd"))
    assert "begun to fall" in plan.forecast(steps[:30], val[:30], stable)[1]


def test_train_says_the_forecast_from_half_of_the_schedule_on():
    rows, c = list(zip(*anchor("40m"), strict=True)), config(**curves.ANCHORS["40m"])
    assert plan.forecast_line(rows[:20], c) == "" == plan.forecast_line(rows, c)
    assert plan.forecast_line(rows[:30], c) == "forecast: val loss 3.5353 +- 0.0341 at step 20,000"


# ---- the whole plan


def test_hours_are_those_that_the_founding_runs_took():
    for name, seconds in (("40m", 3.91), ("124m", 9.35)):
        c = config(**curves.ANCHORS[name], n_head=12)
        found = plan.plan(c, device="NVIDIA GeForce RTX 4070", sms=46, eval_tokens=200 * 16 * 1024)
        assert found["hours"] == pytest.approx(c.max_iters * seconds / 3600, rel=0.05)
    assert plan.plan(c, device="NVIDIA GeForce RTX 4070", sms=36)["hours"] is None


def test_a_faster_card_reaches_less_of_its_peak():
    """llm.c: 10.26B tokens with GPT-2 124M in 45 minutes on eight H100 (modded-nanogpt's README), 41% of the peak."""
    c = config(**GPT2, n_embd=768, bias=True)
    reached = 10.26e9 * plan.flops_per_token(c) / (45 * 60 * 8)
    assert plan.utilisation(c, 989e12) == pytest.approx(reached / 989e12, abs=0.02)
    assert plan.utilisation(c, 30e12) == plan.utilisation(c, 58.3e12) == 0.82


def test_hours_left_count_the_evaluations_to_come():
    c = config(max_iters=1000, eval_interval=100)
    assert plan.hours_left(c, 50, 2.0, 30.0) == pytest.approx((950 * 2 + 10 * 30) / 3600)
    assert plan.hours_left(c, 1000, 2.0, 30.0) == 0


def test_the_plan_of_the_founding_run_says_what_its_owner_was_not_told():
    c = config(**curves.ANCHORS["40m"], n_head=12)
    said = "\n".join(plan.lines(plan.plan(c, train_tokens=10.3e9, val_tokens=5500, device="RTX 4070"), c))
    for words in (
        "40.56M parameters",
        "10,485,760,000 tokens, 259 a parameter",
        "1.02 epochs",
        "val split of 5,500 tokens",
        "3.60 +- 0.08",
        "124M parameters on 3.48B tokens would end 0.10 lower",
        "heads of 32",
        "dropout=0.1 in 1.02 epochs",
        "of 11.2 GiB free on RTX 4070",
    ):
        assert words in said


@pytest.mark.parametrize(
    "keys, words",
    [
        (dict(warmup_iters=5000), "warm-up of 5,000 in 20,000 steps"),
        (dict(min_lr=5e-4), "min_lr=0.0005"),
        (dict(dtype="float16"), "bfloat16 is as fast"),
        (
            dict(gradient_accumulation_steps=512, max_iters=1250, lr_decay_iters=1250, warmup_iters=50),
            "8,388,608 tokens a step",
        ),
        (dict(max_iters=100, lr_decay_iters=100, warmup_iters=5), "a parameter, about 20 are"),
    ],
)
def test_a_choice_that_costs_something_is_warned_of_and_no_other(keys, words):
    sound = dict(n_embd=768, n_head=12, batch_size=16, gradient_accumulation_steps=32, max_iters=10000)
    sound |= dict(lr_decay_iters=10000, warmup_iters=300, learning_rate=1e-3, min_lr=1e-4)
    given = dict(train_tokens=5_000_000_000, val_tokens=10_000_000, device="RTX 4090")
    assert plan.plan(config(**sound), **given)["warnings"] == []
    found = plan.plan(config(**(sound | dict(max_iters=20000, lr_decay_iters=20000) | keys)), **given)
    assert [words in warning for warning in found["warnings"]] == [True]
    assert "5.24 epochs" in plan.plan(config(**sound), train_tokens=1_000_000_000)["warnings"][0]


def test_a_try_is_not_warned_of_what_only_a_real_run_can_heed():
    tiny = config(**TINY, max_iters=6, lr_decay_iters=6, warmup_iters=2, batch_size=2, gradient_accumulation_steps=1)
    assert plan.plan(tiny, train_tokens=10**6, val_tokens=10**5)["warnings"] == []
    keys = read_config(str(Path(__file__).parent.parent / "config" / "quickstart.py"))
    found = plan.plan(config(**keys), train_tokens=577_221, val_tokens=21_761, eval_tokens=16_384)
    assert len(found["warnings"]) == 1 and "prepare with --val_fraction=0.17" in found["warnings"][0]
    assert 0.17 * (577_221 + 21_761) > 100_000 > 0.16 * (577_221 + 21_761)


# ---- as train.py shows it


def shown(capsys, *arguments):
    train.main(["config/fineweb_4070.py", "--plan_only=True", *arguments])
    return capsys.readouterr().out


def test_plan_only_needs_no_card_no_data_and_builds_no_network(capsys, monkeypatch, tmp_path):
    """The README's command, and with what it may be joined."""
    monkeypatch.chdir(Path(__file__).parent.parent)
    monkeypatch.setattr(model.GPT, "__init__", lambda *_: pytest.fail("a network was built"))
    said = shown(capsys, "--gpu=RTX 4070", "--dataset=none")
    assert "about 22.0 h" in said and "3.60 +- 0.08" in said and "data    not known: " in said
    said = shown(capsys, "--gpu=RTX 4070", "--dataset=none", "--batch_size=0", "--tokens_per_step=524288")
    assert "batch_size=0: about 32 fit" in said
    with pytest.raises(ConfigError, match="gpu='RTX 4O70' has to be one of RTX 3060"):
        shown(capsys, "--gpu=RTX 4O70")
    (tmp_path / "made").mkdir()
    for split, tokens in (("train", 2_000_000), ("val", 60_000)):
        np.zeros(tokens, "<u2").tofile(tmp_path / "made" / f"{split}.bin")
    said = shown(capsys, "--device=cpu", f"--data_dir={tmp_path}", "--dataset=made", f"--out_dir={tmp_path}/out")
    assert "2,000,000 tokens to train on: 5,243 epochs" in said and "60,000 tokens" in said
    assert "of this process" in said and "GB for checkpoints" in said and "past 4 epochs a repeated one" in said
    assert not (tmp_path / "out").exists()

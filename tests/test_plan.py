"""plan.py against known sizes, the vendor's table, a simulated card's memory and two real runs."""

import math
import re
from dataclasses import replace
from pathlib import Path

import curves
import numpy as np
import pytest
import torch
from curves import anchor
from runs import flags_of

import train
from configurator import ConfigError, load_config
from onecard import plan
from onecard.law import BAND, best_size, law, usual_rate
from onecard.memory import GiB, network
from train import learning_rates

CONFIGS = Path(__file__).parent.parent / "config"
SOUND = dict(n_embd=768, n_head=12, batch_size=16, gradient_accumulation_steps=32, learning_rate=1e-3, min_lr=1e-4)
SOUND |= dict(max_iters=10000, lr_decay_iters=10000, warmup_iters=300)


def plan_of(config, **facts):
    """Without the memory of a step unless it is asked for, as that takes seconds."""
    return plan.plan(config, learning_rates(config), **dict(trace=False) | facts)


# ---- the loss to expect


def test_the_law_meets_its_anchor_and_the_founding_run():
    assert law(124_475_904, 10.26e9) == pytest.approx(3.2722)
    assert law(40_560_000, 10.49e9) == pytest.approx(3.60, abs=0.005)
    config, (_, train_losses, _) = curves.config(**curves.ANCHORS["40m"]), anchor("40m")
    expected, _ = plan.expected_loss(config, learning_rates(config), epochs=4.0)
    assert expected.loss == pytest.approx(train_losses[-3:].mean(), abs=0.03)
    assert (expected.band, expected.bits_per_byte, expected.multiplier) == (BAND, None, 1.0)


def test_a_token_of_the_newer_recipe_counts_several_times_as_in_the_public_run():
    """modded-nanogpt, track 3 (2026): 124M parameters, Muon and AdamW, end at 3.2788 after 3,350 steps."""
    config = curves.config(arch="qwen3", optimizer="muon", n_embd=768, learning_rate=3.6e-3, min_lr=0.0)
    config = replace(config, tokens_per_step=2**19, max_iters=3350, lr_decay_iters=0, warmup_iters=100, dropout=0.0)
    expected, _ = plan.expected_loss(config, learning_rates(config))
    assert expected.loss == pytest.approx(3.2788, abs=expected.band) and BAND < expected.band < 0.15
    plain = replace(config, arch="gpt2", optimizer="adamw", learning_rate=6e-4)
    gains = [plan.expected_loss(c, learning_rates(c))[0].gain(124e6, 4 * c.step_tokens * 3350) for c in (config, plain)]
    assert gains[1] > gains[0] > 0  # what the newer recipe has gained, more tokens cannot gain again
    few = replace(config, max_iters=1500)
    assert "less than 10 tokens a parameter" in plan.expected_loss(few, learning_rates(few))[1]


def test_of_another_vocabulary_the_loss_is_expected_by_the_bytes_of_its_tokens():
    config = curves.config(**curves.ANCHORS["124m"], vocab_size=16384)
    rates = learning_rates(config)
    expected, _ = plan.expected_loss(config, rates, bytes_per_token=4.0)
    n, tokens = network(config).parameter_counts()["total"], config.step_tokens * config.max_iters
    bits = law(n, tokens * 4.0 / 4.67) / 4.67 / math.log(2)
    assert expected.bits_per_byte == pytest.approx(bits) and expected.band > BAND * 4.0 / 4.67
    assert expected.loss / 4.0 / math.log(2) == pytest.approx(bits) and f"({bits:.3f} bits per byte)" in str(expected)
    assert "needs the bytes of text per token" in plan.expected_loss(config, rates)[1]


def test_the_best_size_is_the_minimum_at_equal_flops():
    n, d = best_size(41e6, 10.49e9)
    sizes = np.geomspace(1e7, 1e9, 20001)
    assert n * d == pytest.approx(41e6 * 10.49e9)
    assert n == pytest.approx(sizes[np.argmin([law(m, n * d / m) for m in sizes])], rel=0.001)


def test_the_usual_learning_rate_is_kaplans_formula_up_to_his_largest_network_and_stays_there():
    assert [usual_rate(n) for n in (1e6, 1.5e9)] == pytest.approx([1.312e-3, 2.92e-4], rel=0.002)
    assert usual_rate(1e13, "muon") == 5.6 * usual_rate(1.5e9)


@pytest.mark.parametrize(
    "keys, epochs, why",
    [
        (dict(arch="qwen3"), None, "qwen3 with muon, qwen3 with normuon, not for qwen3 with adamw"),
        (dict(vocab_size=256), None, "vocabulary of 256"),
        (dict(n_layer=1, n_embd=64, n_head=1), None, "validated for 3M parameters"),
        (dict(max_iters=100), None, "validated for 52.4M tokens"),
        (dict(init_from="gpt2"), None, "those of gpt2"),
        (dict(lr_decay_iters=40000), None, "finished schedules"),
        (dict(decay_lr=False), None, "finished schedules"),
        (dict(), 8.0, "beyond 4 epochs"),
        (dict(learning_rate=1.0), None, "a good learning rate, about 0.0009, not 1"),
        (dict(learning_rate=1e-7, min_lr=0.0), None, "a good learning rate"),
        (dict(warmup_iters=50000), None, "a short warm-up"),
    ],
)
def test_no_loss_is_expected_where_the_law_does_not_hold(keys, epochs, why):
    config = curves.config(**curves.ANCHORS["40m"] | keys)
    loss, reason = plan.expected_loss(config, learning_rates(config), epochs)
    assert loss is None and why in reason


# ---- hours


def test_hours_are_those_that_the_founding_runs_took():
    for name, seconds in (("40m", 3.91), ("124m", 9.35)):
        config = curves.config(**curves.ANCHORS[name], n_head=12)
        found = plan_of(config, device="NVIDIA GeForce RTX 4070", sms=46, eval_tokens=200 * 16 * 1024)
        assert found["hours"] == pytest.approx(config.max_iters * seconds / 3600, rel=0.05)
    assert plan_of(config, device="NVIDIA GeForce RTX 4070", sms=36)["hours"] is None


def test_a_faster_card_reaches_less_of_its_peak():
    """llm.c: 10.26B tokens with GPT-2 124M in 45 minutes on eight H100 (modded-nanogpt's README), 41% of the peak."""
    network = plan.network(curves.config(n_embd=768, bias=True))
    reached = 10.26e9 * network.flops_per_token() / (45 * 60 * 8)
    assert plan.utilisation(768, 989e12) == pytest.approx(reached / 989e12, abs=0.02)
    assert plan.utilisation(768, 30e12) == plan.utilisation(768, 58.3e12) == 0.82


def test_hours_left_count_the_evaluations_to_come():
    config = curves.config(max_iters=1000, eval_interval=100)
    assert plan.hours_left(config, 50, 2.0, 30.0) == pytest.approx((950 * 2 + 10 * 30) / 3600)
    assert plan.hours_left(config, 1000, 2.0, 30.0) == 0


# ---- the whole plan


def test_the_plan_of_the_founding_run_has_its_figures_and_its_mistakes():
    config = curves.config(**curves.ANCHORS["40m"], n_head=12)
    found = plan_of(config, train_tokens=10_300_000_000, val_tokens=5500, device="RTX 4070")
    assert found["flops"] == 20_000 * 2**19 * (6 * 40_560_000 + 12 * 12 * 384 * 1024)
    shown = "\n".join(plan.lines(found, config))
    assert "40.56M parameters" in shown and "10,485,760,000 tokens, 259 a parameter" in shown and "1.02 epochs" in shown
    assert "val split of 5,500 tokens" in shown and "dropout=0.1 with 1.02 epochs" in shown
    assert "3.60 +- 0.08" in shown and "124M parameters on 3.48B tokens should end 0.10 lower" in shown
    assert "head size 32: 64 or 128 learn better and run faster; use --n_head=6" in shown


@pytest.mark.parametrize(
    "keys, words",
    [
        (dict(warmup_iters=5000), "warm-up of 5,000 in 20,000 steps: --warmup_iters=400"),
        (dict(min_lr=5e-4), "min_lr=0.0005 .*--min_lr=0.0001"),
        (dict(dtype="float16"), "--dtype=bfloat16 is as fast"),
        (dict(gradient_accumulation_steps=512, max_iters=1250, lr_decay_iters=1250, warmup_iters=50), "8,388,608 tok"),
        (dict(max_iters=100, lr_decay_iters=100, warmup_iters=5), "a parameter; about 20 are"),
        (dict(max_iters=40000, lr_decay_iters=40000), "4.2 epochs: beyond 4 passes"),
        (dict(learning_rate=1.0), r"learning_rate=1: about 0.0007 is usual .*--learning_rate=0.0007"),
        (dict(learning_rate=1e-7, min_lr=0.0), "learning_rate=1e-07: about 0.0007 is usual"),
        (dict(warmup_iters=30000), "the learning rate never reaches its peak: --warmup_iters=400"),
        (dict(eval_interval=1), "evaluations take about 93% of the time; use --eval_interval=1"),
    ],
)
def test_a_choice_that_costs_something_has_a_warning_and_only_that_one(keys, words):
    given = dict(train_tokens=5_000_000_000, val_tokens=10_000_000, device="RTX 4090")
    assert plan_of(curves.config(**SOUND), **given)["warnings"] == []
    found = plan_of(curves.config(**SOUND | dict(max_iters=20000, lr_decay_iters=20000) | keys), **given)
    assert len(found["warnings"]) == 1 and re.search(words, found["warnings"][0])


def test_a_try_has_no_warning_of_what_only_a_real_run_can_follow():
    config = load_config(train.TrainConfig, [str(CONFIGS / "quickstart.py")])
    assert plan_of(config, train_tokens=10**6, val_tokens=10**5, eval_tokens=16_384)["warnings"] == []
    found = plan_of(config, train_tokens=577_221, val_tokens=21_761, eval_tokens=16_384, trace=None)
    assert found["memory"] is None  # not traced: on a CPU, memory is no limit for a small network
    (warning,) = found["warnings"]
    assert "prepare with --val_fraction=0.17" in warning
    assert 0.17 * (577_221 + 21_761) > 100_000 > 0.16 * (577_221 + 21_761)


def test_where_memory_and_disk_are_short_the_plan_names_who_has_it_and_a_micro_batch_that_fits():
    """5.9 GB of the founding run's card were used by another process, and it died in its first backward pass."""
    keys, free = SOUND | dict(gradient_accumulation_steps=4), int(5.4 * GiB)
    facts = dict(device="NVIDIA GeForce RTX 4070", gpu_processes="4242, python3, 5900 MiB", total_bytes=12 * GiB)
    found = plan_of(curves.config(**keys), trace=True, free_bytes=free, disk_free=10**9, **facts)
    shown = "\n".join(plan.lines(found, curves.config(**keys)))
    assert "6.6 GiB in use by others: 4242, python3, 5900 MiB" in shown and "or end other processes" in shown
    assert "disk: checkpoints need up to 7.5 GB, 1.0 GB are free" in shown
    remedy = re.search(r"5.4 GiB free: --batch_size=(\d+) --gradient_accumulation_steps=(\d+) fits", shown)
    size, steps = int(remedy[1]), int(remedy[2])
    assert size * steps == 16 * 4
    fits = curves.config(**keys | dict(batch_size=size, gradient_accumulation_steps=steps))
    assert "memory: " not in str(plan_of(fits, trace=True, free_bytes=free, **facts)["warnings"])


def test_the_memory_remedy_is_one_that_fits():
    """With less than the state of the network, only a smaller network helps, not activation checkpointing."""
    config = curves.config(**SOUND | dict(n_layer=2, n_embd=4096, n_head=64, tokens_per_step=2**17, vocab_size=8192))
    for gib, remedy in ((6, "use a smaller --n_layer"), (8.5, "--activation_checkpointing=True --batch_size=")):
        found = plan_of(config, device="RTX 4070", free_bytes=int(gib * GiB), trace=True)
        assert remedy in found["warnings"][0]


def test_the_hours_of_a_small_run_on_a_cpu_are_measured_without_drawing_random_numbers():
    sizes = dict(n_layer=2, n_embd=128, n_head=2, block_size=128, vocab_size=512, batch_size=4, dropout=0.1)
    keys = sizes | dict(gradient_accumulation_steps=1, max_iters=100, lr_decay_iters=100, warmup_iters=5)
    config, state = curves.config(**keys), torch.get_rng_state()
    found = plan_of(config, trace=None, dtype=torch.float32, eval_tokens=4096)
    assert 0 < found["hours"] < 0.1 and "from the time of one micro batch" in "\n".join(plan.lines(found, config))
    assert torch.equal(torch.get_rng_state(), state)
    found = curves.config(**keys | dict(tokens_per_step=2**21, batch_size=2**14))  # not measured in this size
    assert plan_of(found, trace=None, dtype=torch.float32, eval_tokens=4096)["hours"] > 0


# ---- as train.py shows it


@pytest.fixture
def shown(capsys, tmp_path):
    """A function: arguments -> what --plan_only=True prints. There is no dataset and no card."""

    def run(name, **keys):
        keys = dict(data_dir=tmp_path, out_dir=tmp_path / "out") | keys
        train.main([str(CONFIGS / f"{name}.py"), "--plan_only=True", *flags_of(**keys)])
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize(
    "name, gib, hours, loss",  # gib: torch.cuda.max_memory_allocated of train.py, eager, on a simulated card
    [
        ("fineweb_4070", 4.05, "22.0 h", "expect val 3.60 +- 0.08"),
        ("gpt2_124m_4070", 5.45, "31.6 h", "expect val 3.37 +- 0.08"),
        ("fineweb_4070_fast", 5.90, "5.6 h", "expect val 3.58 +- 0.12"),
        ("124m_4070_fast", 7.03, "9.3 h", "expect val 3.31 +- 0.13"),
    ],
)
def test_plan_only_needs_no_card_and_no_data_and_has_the_memory_of_a_simulated_card(shown, name, gib, hours, loss):
    lines = shown(name, gpu="RTX 4070", dtype="bfloat16" if "fast" in name else "float16")  # as it was measured
    memory = re.search(r"memory  ([\d.]+) GiB at the peak .* 11.2 GiB free", lines)
    assert float(memory[1]) == pytest.approx(gib, rel=0.05)
    assert hours in lines and loss in lines and "WARNING memory" not in lines and "data    unknown: " in lines


def test_plan_only_on_this_machine_counts_the_tokens_of_the_dataset(shown, tmp_path):
    (tmp_path / "made").mkdir()
    for split, tokens in (("train", 2_000_000), ("val", 60_000)):
        np.zeros(tokens, "<u2").tofile(tmp_path / "made" / f"{split}.bin")
    lines = shown("fineweb_4070", device="cpu", dataset="made", batch_size=0, tokens_per_step=2**19)
    assert "2,000,000 train tokens: 5,242.88 epochs" in lines and "60,000 tokens" in lines
    assert "batch_size=0: the largest micro batch that fits" in lines and "GB for checkpoints" in lines
    with pytest.raises(ConfigError, match=r"gpu='RTX 4O70' is not .*did you mean 'RTX 4070' or"):
        shown("fineweb_4070", gpu="RTX 4O70")

"""What only a CUDA card can show: the results of a CPU, memory, waiting, float16, resume there. Skipped without one.

python -m pytest -m gpu          # about five minutes; the limits are those of a card of 12 GB
"""

import json
import math
import re
import warnings

import numpy as np
import pytest
import torch
from runs import flags_of

import train
from model import GPT, GPTConfig
from onecard import checkpoint, profiling
from onecard.generation import generate
from onecard.memory import trace_memory
from onecard.runtime import DeviceError
from onecard.shards import ShardWriter

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")]

GiB = 2**30
M40 = dict(n_layer=12, n_head=6, n_embd=384, block_size=1024, batch_size=16, gradient_accumulation_steps=2)
M124 = M40 | dict(n_head=12, n_embd=768)
SMALL = dict(n_layer=2, n_head=2, n_embd=128, block_size=128, batch_size=8, gradient_accumulation_steps=4)
QWEN3 = dict(arch="qwen3", optimizer="normuon")
RECIPES = pytest.mark.parametrize("recipe", [{}, QWEN3], ids=["gpt2", "qwen3"])


@pytest.fixture
def steps_of(tmp_path):
    """A function: keys -> the metrics of each step of such a run in tmp_path/`out`, in float16 and eager by default."""
    rng = np.random.default_rng(0)
    (tmp_path / "random").mkdir()
    for split in ("train", "val"):
        with ShardWriter(tmp_path / "random" / f"{split}_000000.bin") as shard:
            shard.write((rng.integers(0, 300, 400_000) ** 2 % 50257).astype(np.uint16))  # 300 of the ids: learnable

    def run(out="run", **keys):
        base = dict(data_dir=tmp_path, dataset="random", out_dir=tmp_path / out, dtype="float16", compile=False)
        base |= dict(max_iters=3, eval_tokens=65_536, log_interval=1, warmup_iters=2, learning_rate=1e-3)
        torch._dynamo.reset()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        train.main(flags_of(**base | keys))
        lines = map(json.loads, (tmp_path / out / "metrics.jsonl").read_text().splitlines())
        return [line for line in lines if line["kind"] == "train"]

    return run


@pytest.fixture
def small_card():
    """Makes a card of 11.2 GiB of whatever card there is."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, 11.2 * GiB / total))
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("keys, most", [(M40, 5.0), (M124, 9.0), (M40 | QWEN3, 7.0)], ids=["40M", "124M", "qwen3 40M"])
def test_peak_memory_is_as_predicted_and_fits_a_card_of_12_gb(steps_of, small_card, keys, most, compiled):
    predicted = sum(trace_memory(train.TrainConfig(**keys), "cuda", torch.float16).values()) / GiB
    peak = steps_of(compile=compiled, **keys)[-1]["peak_memory_gib"]
    assert peak < min(most, 1.05 * predicted) if compiled else peak == pytest.approx(predicted, rel=0.1)


def test_a_step_waits_for_the_device_once(steps_of):
    """Runs of 4 and of 12 steps differ by 8 waits: all others are at the start and the end."""
    waits = []
    for steps in (4, 12):
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            steps_of(max_iters=steps, log_interval=1000, overwrite=True, dtype="bfloat16", **SMALL)
        torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchroniz" in str(warning.message) for warning in caught))
    assert waits[1] - waits[0] == 8


@RECIPES
def test_float16_skips_no_step_of_a_healthy_model_and_learns(steps_of, recipe):
    steps = steps_of(max_iters=100, **SMALL, **recipe)
    assert {step["scale"] for step in steps} == {65536.0} and all(math.isfinite(step["loss"]) for step in steps)
    assert steps[-1]["loss"] < 0.7 * steps[0]["loss"]


def test_the_found_micro_batch_fits(steps_of, small_card, capsys):
    (step,) = steps_of(**M124 | dict(batch_size=0, tokens_per_step=2**19, max_iters=1, compile=True))
    assert int(re.search(r"found batch_size=(\d+)", capsys.readouterr().out)[1]) >= 8
    assert step["peak_memory_gib"] < 11.2


@RECIPES
def test_a_card_has_the_losses_of_a_cpu_and_a_compiled_step_those_of_an_eager_one(steps_of, recipe):
    def losses(name, **keys):
        return [step["loss"] for step in steps_of(name, max_iters=8, **SMALL, **recipe, **keys)]

    assert losses("card", dtype="float32") == pytest.approx(losses("cpu", dtype="float32", device="cpu"), abs=0.01)
    assert losses("eager") == pytest.approx(losses("compiled", compile=True), abs=0.05)


@pytest.mark.parametrize("arch", ["gpt2", "qwen3"])
def test_text_of_a_card_is_that_of_a_cpu_with_and_without_cache_and_compiled(arch):
    torch.manual_seed(0)
    model = GPT(GPTConfig(arch=arch, n_layer=2, n_head=2, n_embd=64, vocab_size=512, block_size=64, bias=False)).eval()
    prompts = [[1, 2, 3], [4]]
    expected = generate(model, prompts, 40, temperature=0)
    model.to("cuda")
    for options in ({}, dict(use_cache=False), dict(compile=True)):
        assert generate(model, prompts, 40, temperature=0, **options) == expected, options


def test_profile_names_kernels_of_the_card_and_writes_its_memory(steps_of, tmp_path, capsys):
    steps_of(profile=True, **SMALL)
    assert "(card)" in capsys.readouterr().out
    assert all((tmp_path / "run" / name).stat().st_size > 10_000 for name in (profiling.TRACE, profiling.MEMORY))


def test_resume_gives_the_same_weights(steps_of, tmp_path):
    steps_of("whole", max_iters=20, **SMALL)
    steps_of("parts", max_iters=10, lr_decay_iters=20, **SMALL)
    steps_of("parts", max_iters=20, init_from="resume", **SMALL)
    whole, parts = (checkpoint.load(tmp_path / out / "ckpt.pt") for out in ("whole", "parts"))
    assert whole["sequences"] == parts["sequences"] and whole["scaler"] == parts["scaler"]
    for name, weight in whole["model"].items():
        assert torch.allclose(weight, parts["model"][name], atol=1e-4), name


def test_out_of_memory_is_one_line_with_a_micro_batch_to_try(steps_of, small_card):
    with pytest.raises(DeviceError, match=r"memory is full at batch_size=256.*batch_size=128"):
        steps_of(**M124 | dict(batch_size=256, gradient_accumulation_steps=1))

"""What only a CUDA card can show: memory, synchronisation, float16, resume there. Skipped without one.

python -m pytest -m gpu          # about five minutes; the limits are those of a card of 12 GB
"""

import warnings

import numpy as np
import pytest
import torch

from onecard import checkpoint
from onecard import plan
import train
from configurator import load_config
from onecard.runtime import Batches
from onecard.shards import ShardWriter

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")]

GiB = 2**30
M40 = dict(n_layer=12, n_head=6, n_embd=384, block_size=1024, batch_size=16, gradient_accumulation_steps=2)
M124 = dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, batch_size=16, gradient_accumulation_steps=2)
SMALL = dict(n_layer=2, n_head=2, n_embd=128, block_size=128, batch_size=8, gradient_accumulation_steps=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    (folder / "random").mkdir()
    for split in ("train", "val"):
        with ShardWriter(folder / "random" / f"bench_{split}_000000.bin") as shard:
            shard.write((rng.integers(0, 300, 400_000) ** 2 % 50257).astype(np.uint16))  # 300 of the ids: learnable
    return folder


@pytest.fixture
def arguments(data, tmp_path):
    def make(out="run", **keys):
        keys = dict(data_dir=data, dataset="random", out_dir=tmp_path / out, dtype="float16", max_iters=20) | keys
        keys = dict(eval_tokens=65_536, eval_interval=10, log_interval=1, warmup_iters=2, learning_rate=1e-3) | keys
        return [f"--{name}={value}" for name, value in keys.items()]

    return make


@pytest.fixture
def small_card():
    """Makes a card of 11.2 GiB of whatever card there is."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, 11.2 * GiB / total))
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def steps_of(arguments, n):
    """-> (run, what each of n steps gave), with the peak of memory counted from before the first."""
    torch._dynamo.reset()
    torch.cuda.reset_peak_memory_stats()
    run = train.start_run(load_config(train.TrainConfig, arguments))
    batches = Batches(run.train_blocks, run.batch_size, run.runtime)
    return run, [train.train_step(run, batches) for _ in range(n)]


@pytest.mark.parametrize("network, most", [(M40, 5.0), (M124, 9.0)], ids=["40M", "124M"])
@pytest.mark.parametrize("compiled", [True, False])
def test_peak_memory_fits_a_card_of_12_gb_and_is_as_predicted(arguments, small_card, network, most, compiled):
    given = arguments(compile=compiled, eval_only=True, **network)
    run, _ = steps_of(given, 3)
    peak = torch.cuda.max_memory_allocated()
    if compiled:
        assert peak <= most * GiB
    assert sum(plan.memory(run.config, "cuda").values()) == pytest.approx(peak, rel=0.15)


def test_one_read_from_the_device_in_a_step(arguments):
    run, _ = steps_of(arguments(compile=False, eval_only=True, dtype="bfloat16", **SMALL), 2)
    batches = Batches(run.train_blocks, run.batch_size, run.runtime)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train.train_step(run, batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in caught if "synchroniz" in str(w.message)]) == 1


@pytest.mark.parametrize("recipe", [{}, dict(arch="qwen3", optimizer="muon")], ids=["gpt2", "qwen3"])
def test_float16_skips_no_step_of_a_healthy_model_and_learns(arguments, recipe):
    run, steps = steps_of(arguments(compile=False, eval_only=True, **SMALL, **recipe), 100)
    assert run.scaler.get_scale() == 65536.0 and all(np.isfinite(step[1]) for step in steps)
    assert steps[-1][0] < 0.7 * steps[0][0]


def test_the_found_micro_batch_fits(arguments, small_card):
    given = arguments(**{**M124, "batch_size": 0}, tokens_per_step=2**19, eval_only=True)
    run, _ = steps_of(given, 1)
    assert run.batch_size >= 8 and torch.cuda.max_memory_allocated() < 11.2 * GiB


def test_resume_gives_the_same_losses(arguments, tmp_path):
    train.main(arguments("whole", **SMALL))
    train.main(arguments("parts", max_iters=10, lr_decay_iters=20, **SMALL))
    train.main(arguments("parts", lr_decay_iters=20, init_from="resume", **SMALL))
    whole, parts = (checkpoint.load(tmp_path / out / "ckpt.pt") for out in ("whole", "parts"))
    assert whole["sequences"] == parts["sequences"] and whole["scaler"] == parts["scaler"]
    for name, weight in whole["model"].items():
        assert torch.allclose(weight, parts["model"][name], atol=1e-4), name


def test_out_of_memory_is_a_sentence(arguments, small_card, capsys):
    with pytest.raises(ValueError, match=r"memory is full at batch_size=256.*batch_size=128"):
        train.main(arguments(compile=False, **{**M124, "batch_size": 256, "gradient_accumulation_steps": 1}))

"""memory.py against counts by hand, what torch itself keeps for backward, and the allocator of a simulated card."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import model as model_module
from configurator import load_config
from model import GPT, GPTConfig
from onecard.memory import BUDGET, batch_sizes_that_fit, trace_memory
from train import TrainConfig

GiB = 2**30
CONFIGS = Path(__file__).parent.parent / "config"
SMALL = dict(n_layer=4, n_head=2, n_embd=128, block_size=128, vocab_size=64, batch_size=8)
MUON = dict(arch="qwen3", optimizer="muon")
BF16, FP32 = torch.bfloat16, torch.float32


def config(**keys):
    """Gradients accumulate over two micro batches, so they exist during the forward pass."""
    return TrainConfig(**SMALL | dict(gradient_accumulation_steps=2) | keys)


def traced(device_type="cpu", dtype=FP32, **keys):
    return trace_memory(config(**keys), device_type, dtype)


def parameters(**keys):
    return sum(p.numel() for p in GPT(GPTConfig(**config(**keys).model_args())).parameters())


@pytest.mark.parametrize("keys", [dict(), MUON], ids=["adamw", "muon"])
def test_weights_and_optimizer_state_are_those_counted_by_hand(keys):
    """float32: a weight has 4 bytes, AdamW's two moments 8, Muon's one momentum 4."""
    n, matrices = parameters(**keys), 4 * (4 * 128 * 128 + 3 * 128 * 384) if keys else 0
    found = traced(**keys)
    assert found["weights"] == 4 * n
    rest = found["optimizer state"] - (8 * n - 4 * matrices)
    assert 0 <= rest - 8 * 8 * 129 < 4 * 100  # the tokens of a batch; a step count of each tensor


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("arch", ["gpt2", "qwen3"])
def test_activations_are_what_autograd_keeps_of_the_real_model_within_4_percent(arch, dtype):
    keys, sizes, kept = dict(arch=arch, n_layer=8), {}, []
    network, idx = GPT(GPTConfig(**config(**keys).model_args())), torch.zeros(8, 128, dtype=torch.int64)
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)  # so that its address is not used again
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", dtype, enabled=dtype != FP32):
        network(idx, idx)
    gradients = 4 * parameters(**keys)
    found = traced(dtype=dtype, **keys)["activations and gradients"] - gradients
    assert sum(sizes.values()) <= found <= 1.04 * sum(sizes.values())  # more: temporaries


@pytest.mark.parametrize(
    "name, gib",  # torch.cuda.max_memory_allocated of train.py, eager, torch 2.11, with torch's real allocator
    [("gpt2_124m_4070", 3.38), ("fineweb_4070_fast", 2.37)],
)
def test_with_activation_checkpointing_a_simulated_cards_peak_is_predicted_within_5_percent(name, gib):
    """test_plan.py has the peaks without it, as train.py prints them for the four big configs."""
    c = load_config(TrainConfig, [str(CONFIGS / f"{name}.py"), "--activation_checkpointing=True"])
    assert sum(trace_memory(c, "cuda", getattr(torch, c.dtype)).values()) / GiB == pytest.approx(gib, rel=0.05)


def test_a_changed_block_changes_the_prediction_by_what_it_adds(monkeypatch):
    """Twice the width inside the MLP, and then another activation, without a change elsewhere."""
    before = traced()

    class WideMLP(model_module.GPT2MLP):
        def __init__(self, c):
            super().__init__(c)
            self.c_fc, self.c_proj = torch.nn.Linear(128, 1024, bias=False), torch.nn.Linear(1024, 128, bias=False)

    class ReluMLP(WideMLP):
        def forward(self, x):
            return self.c_proj(F.relu(self.c_fc(x)))

    monkeypatch.setattr(model_module, "GPT2MLP", WideMLP)
    wide, added, tokens = traced(), 4 * 2 * 128 * 512, 8 * 128
    assert wide["weights"] - before["weights"] == 4 * added
    assert wide["optimizer state"] - before["optimizer state"] == 8 * added
    kept = 4 * tokens * 512 * (4 + 4)  # GELU's input and output, in float32, in 4 layers
    backward = 4 * tokens * 512 + 4 * 128 * 512  # of the last block: the gradients inside its MLP and of one matrix
    more = wide["activations and gradients"] - before["activations and gradients"]
    assert more == kept + 4 * added + backward
    monkeypatch.setattr(model_module, "GPT2MLP", ReluMLP)
    less = wide["activations and gradients"] - traced()["activations and gradients"]
    hidden, matrix = 4 * tokens * 1024, 4 * 128 * 1024
    at_peak = hidden - matrix  # in the last block: ReLU's backward has two gradients, GELU's one and that of a matrix
    assert less == 4 * hidden - at_peak  # ReLU keeps its output only


def test_gradients_that_accumulate_exist_during_the_forward_pass():
    once = traced(gradient_accumulation_steps=1)["activations and gradients"]
    assert traced()["activations and gradients"] - once == pytest.approx(4 * parameters(), rel=0.05)


def test_a_card_computes_twice_as_many_rows_of_logits_at_a_time():
    keys = dict(n_layer=1, n_embd=32, vocab_size=50304, batch_size=32)  # 4,096 rows: 1,024 at a time on a CPU
    cpu, card = (traced(device, **keys)["activations and gradients"] for device in ("cpu", "cuda"))
    logit = 4 + 4 + 4  # bytes: float32, its log-softmax, its gradient in the chunk before
    assert card - cpu == pytest.approx(1024 * 50304 * logit, rel=1e-3)


def test_only_a_cpu_keeps_the_scores_of_attention_with_dropout():
    keys = dict(dropout=0.1, block_size=256)
    cpu, card = (traced(device, **keys)["activations and gradients"] for device in ("cpu", "cuda"))
    assert cpu - card > 4 * 8 * 2 * 256 * 256 * 4  # (B, H, T, T) of 4 layers, at least once


def test_a_trace_leaves_nothing_behind_even_if_it_fails(monkeypatch):
    state, log_softmax, functions = torch.get_rng_state(), torch.log_softmax, dict(vars(F))
    first = traced("cuda", dropout=0.1, **MUON)
    assert traced("cuda", dropout=0.1, **MUON) == first
    monkeypatch.setattr(model_module, "chunk_rows", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        traced("cuda", **MUON)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.log_softmax is log_softmax and vars(F) == functions
    assert torch.ones(3).sum().item() == 3  # a fake tensor has no value


def test_the_micro_batches_that_fit_are_all_divisors_up_to_the_largest_that_fits():
    keys = dict(n_layer=1, block_size=64, tokens_per_step=12 * 64)

    def fit(free_bytes, world_size=1):
        return batch_sizes_that_fit(config(batch_size=0, **keys), free_bytes, "cpu", FP32, world_size)

    need = sum(traced(batch_size=3, **keys).values()) / BUDGET
    assert [fit(0), fit(need - 1), fit(need), fit(GiB)] == [[], [1, 2], [1, 2, 3], [1, 2, 3, 4, 6, 12]]
    assert fit(GiB, world_size=2) == [1, 2, 3, 6]

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

CONFIGS = Path(__file__).parent.parent / "config"
SMALL = dict(n_layer=4, n_head=2, n_embd=128, block_size=128, vocab_size=64, batch_size=8)
MUON = dict(arch="qwen3", optimizer="muon")
GiB, FP32 = 2**30, torch.float32


def config(**keys):
    """Gradients accumulate over two micro batches, so they exist during the forward pass."""
    return TrainConfig(**SMALL | dict(gradient_accumulation_steps=2) | keys)


def traced(device_type="cpu", dtype=FP32, **keys):
    """-> bytes of the weights, of the optimizer state, of activations and gradients."""
    return trace_memory(config(**keys), device_type, dtype).values()


def network(**keys):
    """-> (the real network, its number of parameters)."""
    model = GPT(GPTConfig(**config(**keys).model_args()))
    return model, model.num_params()


@pytest.mark.parametrize("keys, matrices", [(dict(), 0), (MUON, 4 * (4 * 128 * 128 + 3 * 128 * 384))])
def test_weights_and_optimizer_state_are_those_counted_by_hand(keys, matrices):
    """float32: a weight has 4 bytes, AdamW's two moments 8, Muon's one momentum 4."""
    (_, n), (weights, state, _) = network(**keys), traced(**keys)
    assert weights == 4 * n
    rest = state - (8 * n - 4 * matrices)
    assert 0 <= rest - 8 * 8 * 129 < 4 * 100  # the tokens of a batch; a step count of each tensor


@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arch", ["gpt2", "qwen3"])
def test_activations_are_what_autograd_keeps_of_the_real_model_within_4_percent(arch, dtype):
    keys, sizes, kept, idx = dict(arch=arch, n_layer=8), {}, [], torch.zeros(8, 128, dtype=torch.int64)
    model, n = network(**keys)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)  # so that its address is not used again
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", dtype, enabled=dtype != FP32):
        model(idx, idx)
    _, _, found = traced(dtype=dtype, **keys)
    assert 1 <= (found - 4 * n) / sum(sizes.values()) <= 1.04  # without the gradients; the rest are temporaries


@pytest.mark.parametrize(
    "name, checkpointing, gib",
    [("fineweb_4070_fast", False, 5.905), ("fineweb_4070_fast", True, 2.143), ("gpt2_124m_4070", True, 3.188)],
)
def test_the_peak_of_a_simulated_card_is_predicted_within_5_percent(name, checkpointing, gib):
    """torch.cuda.max_memory_allocated of train.py, eager, torch 2.11. test_plan.py has those of the other configs."""
    c = load_config(TrainConfig, [str(CONFIGS / f"{name}.py"), f"--activation_checkpointing={checkpointing}"])
    dtype = torch.bfloat16 if "fast" in name else torch.float16  # as it was measured
    assert sum(trace_memory(c, "cuda", dtype).values()) / GiB == pytest.approx(gib, rel=0.05)


def test_a_changed_block_changes_the_prediction_by_what_it_adds(monkeypatch):
    """Twice the width inside the MLP; nothing but model.py knows of it."""

    class WideMLP(model_module.GPT2MLP):
        def __init__(self, c):
            super().__init__(c)
            self.c_fc, self.c_proj = torch.nn.Linear(128, 1024, bias=False), torch.nn.Linear(1024, 128, bias=False)

    before = traced()
    monkeypatch.setattr(model_module, "GPT2MLP", WideMLP)
    wide = traced()
    weights, state, activations = (b - a for a, b in zip(before, wide, strict=True))
    layers, tokens, added = 4, 8 * 128, 4 * 2 * 128 * 512  # added: parameters
    assert (weights, state) == (4 * added, 8 * added)
    kept = layers * tokens * 512 * (4 + 4)  # GELU's input and output
    backward = 4 * tokens * 512 + 4 * 128 * 512  # at the peak, in the last block: gradients of the hidden and a matrix
    assert activations == kept + 4 * added + backward


def test_a_card_squares_in_float32_as_cuda_autocast_does_and_a_product_stays_in_16_bits(monkeypatch):
    class SquaredReLU(model_module.Qwen3MLP):
        def forward(self, x):
            return self.c_proj(F.relu(self.c_gate(x)) ** 2 * self.c_fc(x))

    class Product(model_module.Qwen3MLP):
        def forward(self, x):
            gate = F.relu(self.c_gate(x))
            return self.c_proj(gate * gate * self.c_fc(x))

    found = []
    for mlp in (SquaredReLU, Product):
        monkeypatch.setattr(model_module, "Qwen3MLP", mlp)
        found.append([[*traced(device, dtype=torch.bfloat16, **MUON)][2] for device in ("cpu", "cuda")])
    (square_cpu, square_card), (product_cpu, product_card) = found
    inner, layers, tokens = 384, 4, 8 * 128  # 8 / 3 x 128, rounded up to a multiple of 64
    extra = layers * tokens * inner * (4 + 4 + 4 - 2 - 2)  # float32: the input of the square, its result, c_fc's copy
    assert square_cpu <= product_cpu
    assert 0.7 * extra < square_card - product_card < 1.3 * extra


def test_a_card_computes_twice_as_many_rows_of_logits_at_a_time():
    keys = dict(n_layer=1, n_embd=32, vocab_size=50304, batch_size=32)  # 4,096 rows: 1,024 at a time on a CPU
    (*_, cpu), (*_, card) = traced("cpu", **keys), traced("cuda", **keys)
    logit = 4 + 4  # bytes: float32, and its log-softmax, which becomes its gradient
    assert card - cpu == pytest.approx(1024 * 50304 * logit, rel=1e-3)


def test_only_a_cpu_keeps_the_scores_of_attention_with_dropout():
    keys = dict(dropout=0.1, block_size=256)
    (*_, cpu), (*_, card) = traced("cpu", **keys), traced("cuda", **keys)
    assert cpu - card > 4 * 8 * 2 * 256 * 256 * 4  # (B, H, T, T) of 4 layers, at least once


def test_a_trace_leaves_nothing_behind_even_if_it_fails(monkeypatch):
    state, log_softmax, functions = torch.get_rng_state(), torch.log_softmax, dict(vars(F))
    assert [*traced("cuda", dropout=0.1, **MUON)] == [*traced("cuda", dropout=0.1, **MUON)]
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

    need = sum(traced(batch_size=3, **keys)) / BUDGET
    assert [fit(0), fit(need - 1), fit(need), fit(GiB)] == [[], [1, 2], [1, 2, 3], [1, 2, 3, 4, 6, 12]]
    assert fit(GiB, world_size=2) == [1, 2, 3, 6]

import pytest
import torch

from onecard import runtime
from model import GPT, GPTConfig
from onecard.runtime import DeviceError, pick_device, pick_dtype


def test_a_card_that_torch_cannot_use_is_not_passed_over(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(runtime.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    with pytest.raises(DeviceError, match=r"NVIDIA driver.*--device=cpu"):
        pick_device("auto")
    assert pick_device("cpu").type == "cpu"
    with pytest.raises(DeviceError, match="no CUDA device"):
        pick_device("cuda")
    with pytest.raises(DeviceError, match="not a device"):
        pick_device("gpu")


def test_dtype_auto_on_a_cpu_is_bfloat16_only_where_the_hardware_has_it(monkeypatch):
    cpu = torch.device("cpu")
    assert pick_dtype("float16", cpu) == torch.float16
    for has, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has: has)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has=has: has)
        assert pick_dtype("auto", cpu) == dtype


def test_a_step_is_shared_evenly_or_refused_with_the_nearest_that_are():
    assert runtime.micro_steps(512, 16, 4) == 8
    with pytest.raises(DeviceError, match="nproc_per_node=2 or 4 would"):
        runtime.micro_steps(512, 16, 3)
    with pytest.raises(DeviceError, match="batch_size=8 or 16 would"):
        runtime.micro_steps(512, 12, 2)


@pytest.mark.parametrize("budget, expected", [(100, 1), (139, 1), (140, 2), (1000, 16), (30_000, 64)])
def test_found_batch_is_the_largest_whose_extrapolated_peak_fits(budget, expected):
    tried = []

    def measure(n):
        tried.append(n)
        return 60 + 40 * n  # bytes

    sizes = [1, 2, 4, 8, 16, 32, 64]
    assert runtime.largest_that_fits(sizes, measure, budget)[-1] == expected
    assert max(tried) <= max(2, expected)  # memory is never filled to find out
    assert 60 + 40 * expected <= budget and (expected == 64 or 60 + 80 * expected > budget)


def test_a_choice_that_needs_more_than_the_line_said_is_made_smaller():
    assert runtime.largest_that_fits([1, 2, 4, 8], lambda n: 10 * n + 50 * (n > 4), 100) == [1, 2, 4]


def test_a_network_that_does_not_fit_at_all_is_a_sentence():
    with pytest.raises(DeviceError, match=r"needs 20\.0 GiB and 11\.2 are free.*activation_checkpointing"):
        runtime.largest_that_fits([1, 2], lambda n: 20 * 2**30, 11.2 * 2**30)


def test_batches_found_on_a_cpu_divide_the_step_and_stay_small():
    where = runtime.Runtime(torch.device("cpu"), torch.float32)
    assert runtime.find_batch_size(None, 512, 1024, where, None) == 4
    assert runtime.find_batch_size(None, 30, 64, where, None) == 30
    assert runtime.find_batch_size(None, 7, 8192, where, None) == 1


def test_float16_on_an_apple_gpu_is_refused():
    with pytest.raises(DeviceError, match="float32"):
        pick_dtype("float16", torch.device("mps"))


def test_the_compiler_is_done_before_the_first_step_and_the_first_evaluation(monkeypatch):
    """torch counts the graphs: batches and evaluations as train.py makes them need none that compile_model did not."""
    counted, compiler = torch._dynamo.utils.counters["stats"], torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **keys: compiler(model, backend="eager", **keys))
    where = runtime.Runtime(torch.device("cpu"), torch.float32)
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=16, block_size=8, vocab_size=64, dropout=0.1))
    torch._dynamo.reset()
    compiled = runtime.compile_model(model, (2, 8), True, where)
    graphs = counted["unique_graphs"]
    assert compiled is not model and model.training and all(p.grad is None for p in model.parameters())
    tokens = torch.randint(64, (2, 9))
    for _ in range(2):
        compiled(tokens[:, :-1], tokens[:, 1:]).backward()
        model.eval()
        with torch.no_grad():
            compiled(tokens[:, :-1], tokens[:, 1:], reduction="none")
        model.train()
    assert counted["unique_graphs"] == graphs >= 2

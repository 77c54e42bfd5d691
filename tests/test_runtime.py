"""runtime.py: the device, the micro batch, reasons to stop, the compiler. test_train.py has the batches."""

import pytest
import torch

import train
from onecard import processes, runtime
from onecard.runtime import DeviceError, Runtime, pick_device, pick_dtype

CPU = torch.device("cpu")


def test_a_card_that_torch_cannot_use_is_not_ignored(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(runtime.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    with pytest.raises(DeviceError, match=r"NVIDIA driver.*--device=cpu"):
        pick_device("auto")
    assert pick_device("cpu").type == "cpu"
    with pytest.raises(DeviceError, match="no CUDA device"):
        pick_device("cuda")
    for name in ("gpu", "meta", "xla", "cuda:x"):
        with pytest.raises(DeviceError, match="not a device"):
            pick_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(DeviceError, match="LOCAL_RANK=2: there are 2 CUDA devices: use --nproc_per_node=2"):
        runtime.start_runtime(train.TrainConfig(device="cuda"))


def test_dtype_auto_on_a_cpu_is_bfloat16_only_where_the_hardware_has_it(monkeypatch):
    assert pick_dtype("float16", CPU) == torch.float16
    for has, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has: has)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has=has: has)
        assert pick_dtype("auto", CPU) == dtype


def test_dropout_differs_between_steps_and_ranks():
    ranks = [Runtime(CPU, torch.float32, rank, world_size=4) for rank in range(4)]
    seeds = {rank.dropout_seed(seed, step) for rank in ranks for seed in range(3) for step in range(50)}
    assert len(seeds) == 4 * 3 * 50


def test_processes_that_find_other_data_or_checkpoints_are_refused(monkeypatch):
    """As on two machines without a shared folder."""

    def gather(everyone, values):
        everyone[:] = values, values | dict(step=0)

    monkeypatch.setattr(runtime.dist, "all_gather_object", gather)
    here = Runtime(CPU, torch.float32, rank=0, world_size=2)
    here.require_same(step=0, train_tokens=5000)
    with pytest.raises(DeviceError, match=r"process 1 has step=0, process 0 has 5.*shared folder"):
        here.require_same(step=5, train_tokens=5000)


# ---- the micro batch


SHARED = [  # processes, keys, what is said
    (3, dict(batch_size=2, gradient_accumulation_steps=4), "8 sequences .* use nproc_per_node=2 or 4"),
    (2, dict(batch_size=3, gradient_accumulation_steps=7), "21 sequences .* use nproc_per_node=1 or 7"),
    (2, dict(batch_size=4, tokens_per_step=12 * 16), "12 sequences .* use batch_size=3 or 6"),
]


@pytest.mark.parametrize("processes, keys, message", SHARED)
def test_a_step_that_cannot_be_shared_names_the_nearest_that_can(flags, monkeypatch, processes, keys, message):
    assert runtime.micro_steps(512, 16, 4) == 8
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(DeviceError, match=f"{processes} processes with batch_size=. cannot share the {message}"):
        train.main(flags(**keys))


def test_a_micro_batch_is_found_once_and_kept_by_a_resumed_run(flags, monkeypatch, capsys):
    train.main(flags(batch_size=0, tokens_per_step=128, max_iters=2))
    assert "found batch_size=8 for 8 sequences" in capsys.readouterr().out
    monkeypatch.setattr(runtime, "find_batch_size", lambda *_: pytest.fail("searched again"))
    train.main(flags(batch_size=0, tokens_per_step=128))


class TriedOnACard(torch.nn.Linear):
    """A network of 2 numbers on a card of 1,016 bytes: needs so many for a size, else 800; None: more than there are"""

    def __init__(self, needs):
        super().__init__(1, 1)
        self.needs = needs

    def forward(self, idx, targets):
        self.peak = self.needs.get(len(idx), 800)
        if self.peak is None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self.weight.sum()


@pytest.mark.parametrize("needs, expected", [({}, 8), ({8: 950}, 4), ({8: None, 4: 930}, 2), ({8: None, 2: None}, 4)])
def test_on_a_card_the_predicted_micro_batch_is_tried_and_made_smaller_until_it_fits(monkeypatch, needs, expected):
    """Of 1,016 bytes that are free, 92% may be used, of these 16 by AdamW's moments. What fits is the largest."""
    model, trial_peak = TriedOnACard(needs), runtime.trial_peak
    for name, value in (("mem_get_info", (1000, 9999)), ("memory_reserved", 16), ("empty_cache", None)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: model.peak)
    monkeypatch.setattr(runtime, "batch_sizes_that_fit", lambda config, free, *_: [1, 2, 4, 8] if free == 1016 else [])
    monkeypatch.setattr(runtime, "trial_peak", lambda *args: trial_peak(*args[:3], Runtime(CPU, torch.float32)))
    config = train.TrainConfig(batch_size=0, tokens_per_step=2**13, block_size=16)
    card = Runtime(torch.device("cuda"), torch.bfloat16)
    assert runtime.find_batch_size(model, config, card) == expected and model.weight.grad is None
    needs.update({1: None, 2: 2000, 4: 2000, 8: 2000})
    with pytest.raises(DeviceError, match=r"batch_size=1 does not fit .*--activation_checkpointing=True"):
        runtime.find_batch_size(model, config, card)


REMEDIES = [
    (dict(batch_size=12, gradient_accumulation_steps=40), "batch_size=6 --gradient_accumulation_steps=80 should"),
    (dict(batch_size=1), "--activation_checkpointing=True, or a smaller"),
    (dict(batch_size=8, tokens_per_step=2**19), "--batch_size=0 finds one that fits"),
]


@pytest.mark.parametrize("keys, remedy", REMEDIES)
def test_out_of_memory_names_the_keys_that_keep_the_tokens_per_step(keys, remedy):
    config, where = train.TrainConfig(**keys), f"memory is full at batch_size={keys['batch_size']}"
    card = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has a total capacity of 11 GiB")
    for error in (card, RuntimeError("DefaultCPUAllocator: can't allocate memory: "), MemoryError()):
        with pytest.raises(DeviceError, match=rf"{where}, .*\).*{remedy}"), runtime.oom_errors(config):
            raise error
    with pytest.raises(RuntimeError, match="another"), runtime.oom_errors(config):
        raise RuntimeError("another error")


# ---- stopping, compiling


def test_max_hours_counts_the_step_and_the_save_to_come(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(processes.time, "monotonic", lambda: clock[0])
    stop, reasons = processes.Stop(max_hours=1.0), []
    for _ in range(36):  # steps of 100 s, saves of 250 s: the save after step 33 ends at 3550 s, after 34 at 3650 s
        clock[0] += 100
        reasons.append(stop.reason(save_seconds=250))
    assert reasons == [0] * 32 + [stop.TIME_IS_UP] * 4
    assert processes.Stop().reason(1e9) == 0


def test_without_a_compiler_one_line_says_so_and_the_run_goes_on(flags, start, tmp_path, monkeypatch):
    """In a process of its own: torch remembers for the rest of a process that there is no compiler."""
    monkeypatch.setenv("CXX", "/nowhere/c++")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    code, printed = start("train.py", *flags(compile=True, n_layer=1, max_iters=2)).end()
    assert code == 0
    assert printed.count("torch.compile does not work here (") == 1 and "training without it, slower" in printed
    assert "step 2: train loss" in printed

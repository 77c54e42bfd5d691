"""runtime.py: the device, the micro batch, reasons to stop, the compiler. test_train.py has the batches."""

import pytest
import torch

import train
from onecard import runtime
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
    with pytest.raises(DeviceError, match="not a device"):
        pick_device("gpu")


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


@pytest.mark.parametrize(
    "processes, keys, message",
    [
        (3, dict(batch_size=2, gradient_accumulation_steps=4), "8 sequences .* use nproc_per_node=2 or 4"),
        (2, dict(batch_size=3, gradient_accumulation_steps=7), "21 sequences .* use nproc_per_node=1 or 7"),
        (2, dict(batch_size=4, tokens_per_step=12 * 16), "12 sequences .* use batch_size=3 or 6"),
    ],
)
def test_a_step_that_cannot_be_shared_is_refused_with_the_nearest_that_can(
    flags, monkeypatch, processes, keys, message
):
    assert runtime.micro_steps(512, 16, 4) == 8
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(DeviceError, match=f"{processes} processes with batch_size=. cannot share the {message}"):
        train.main(flags(**keys))


def test_a_micro_batch_is_found_once_and_kept_by_a_resumed_run(flags, monkeypatch, capsys):
    train.main(flags(batch_size=0, tokens_per_step=128, max_iters=2))
    assert "found batch_size=8 for 8 sequences" in capsys.readouterr().out
    monkeypatch.setattr(runtime, "find_batch_size", lambda *_: pytest.fail("searched again"))
    train.main(flags(batch_size=0, tokens_per_step=128))


@pytest.mark.parametrize("peaks, expected", [({}, 8), ({8: 95}, 4), ({8: float("inf"), 4: 93}, 2)])
def test_on_a_card_the_predicted_micro_batch_is_tried_and_made_smaller_until_it_fits(monkeypatch, peaks, expected):
    """Of 100 bytes that are free, 92 may be used. Memory that ran out is an infinite peak."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (90, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 10)
    monkeypatch.setattr(runtime, "batch_sizes_that_fit", lambda config, free, *_: [1, 2, 4, 8] if free == 100 else [])
    monkeypatch.setattr(runtime, "trial_peak", lambda model, size, *_: peaks.get(size, 90))
    config, card = train.TrainConfig(batch_size=0, tokens_per_step=2**19), Runtime(torch.device("cuda"), torch.bfloat16)
    assert runtime.find_batch_size(None, config, card) == expected
    peaks.update({1: 200, 2: 200, 4: 200, 8: 200})
    with pytest.raises(DeviceError, match=r"batch_size=1 does not fit .*--activation_checkpointing=True"):
        runtime.find_batch_size(None, config, card)


@pytest.mark.parametrize(
    "keys, remedy",
    [
        (
            dict(batch_size=12, gradient_accumulation_steps=40),
            "batch_size=6 --gradient_accumulation_steps=80 should fit",
        ),
        (dict(batch_size=1), "--activation_checkpointing=True, or a smaller"),
        (dict(batch_size=8, tokens_per_step=2**19), "--batch_size=0 finds one that fits"),
    ],
)
def test_out_of_memory_names_the_keys_that_keep_the_tokens_per_step(keys, remedy):
    full = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 11 GiB"
    with (
        pytest.raises(DeviceError, match=rf"batch_size={keys['batch_size']}, .*Tried to allocate 2.00 GiB\).*{remedy}"),
        runtime.oom_errors(train.TrainConfig(**keys)),
    ):
        raise torch.OutOfMemoryError(full)


# ---- stopping, compiling


def test_max_hours_counts_the_step_and_the_save_to_come(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(runtime.time, "monotonic", lambda: clock[0])
    stop, reasons = runtime.Stop(max_hours=1.0), []
    for _ in range(36):  # steps of 100 s, saves of 250 s: the save after step 33 ends at 3550 s, after 34 at 3650 s
        clock[0] += 100
        reasons.append(stop.reason(save_seconds=250))
    assert reasons == [0] * 32 + [stop.TIME_IS_UP] * 4
    assert runtime.Stop().reason(1e9) == 0


def test_without_a_compiler_one_line_says_so_and_the_run_goes_on(flags, start, tmp_path, monkeypatch):
    """In a process of its own: torch remembers for the rest of a process that there is no compiler."""
    monkeypatch.setenv("CXX", "/nowhere/c++")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    code, printed = start("train.py", *flags(compile=True, n_layer=1, max_iters=2)).end()
    assert code == 0
    assert printed.count("torch.compile does not work here (") == 1 and "training without it, slower" in printed
    assert "step 2: train loss" in printed

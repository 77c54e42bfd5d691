import pytest
import torch

import runtime
from runtime import DeviceError, pick_device, pick_dtype


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

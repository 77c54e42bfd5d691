"""Tiny networks for test_convert.py and test_pretrained.py, and their checkpoints."""

import math
from dataclasses import asdict

import pytest
import torch

from model import GPT, GPT2_IDS, GPTConfig
from onecard import checkpoint

TINY = dict(block_size=64, n_layer=2, n_head=2, n_embd=32, dropout=0.1)
NETWORKS = {
    "gpt2": dict(bias=False),
    "gpt2 with biases and the exact GELU": dict(bias=True, gelu="none"),
    "qwen3": dict(arch="qwen3", bias=False),
}


def tiny(**changes):
    """A network with every weight away from the zeros and ones of its initialization."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**TINY | changes))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def save(model, folder, **state):
    folder.mkdir(parents=True)
    state = dict(iter_num=7, best_val_loss=math.inf, config={}, model_args=asdict(model.config)) | state
    checkpoint.write(folder / "ckpt.pt", state | dict(model=model.state_dict()))
    return folder


def text_ids(n):
    return torch.randint(GPT2_IDS, (2, n), generator=torch.Generator().manual_seed(0))


def assert_same(ours, back):
    """Equal configs, and equal weights bit for bit, except padding rows of the vocabulary."""
    assert back.config == ours.config
    for (name, a), b in zip(ours.state_dict().items(), back.state_dict().values(), strict=True):
        assert torch.equal(a[:GPT2_IDS], b[:GPT2_IDS]), name


def hf_gpt2(folder, **changes):
    """A tiny random GPT-2 as transformers itself makes and saves it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    sizes = dict(n_positions=64, n_embd=32, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **changes)).eval()
    model.save_pretrained(folder)
    return model

"""A step on a device that is not the CPU, without one: what waits for it, and what is left on the CPU by mistake.

torch's meta device stands for a card: its tensors have sizes and no content. Whoever reads them gets True or zeros.
"""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from model import GPT, GPTConfig
from onecard import generation, writing
from onecard.runtime import Runtime
from onecard.tokenizer import load_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")  # into one that has no content
QWEN3 = dict(arch="qwen3", optimizer="normuon", activation_checkpointing=True)


class StandIn(TorchDispatchMode):
    """Counts what would wait for the device, and raises where an operator gets tensors of the CPU and of the card."""

    def __init__(self, device="meta"):
        super().__init__()
        self.device, self.waits = device, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_card, on_cpu = any(x.is_meta for x in tensors), any(not x.is_meta and x.dim() for x in tensors)
        if name == "_local_scalar_dense":  # item, int, float, bool
            self.waits["read"] += args[0].device.type == self.device
            if on_card:
                return True if args[0].dtype == torch.bool else 0
        elif name in ("_to_copy", "copy_", "lift_fresh"):  # lift_fresh: torch.tensor
            target = torch.device(kwargs.get("device") or args[0].device).type
            if on_card and target == "cpu":  # cpu, tolist
                self.waits["read"] += 1
                return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
            if target == "meta" and (on_cpu or name == "lift_fresh") and not kwargs.get("non_blocking"):
                self.waits["blocking copy"] += 1
        elif on_card and on_cpu:
            raise AssertionError(f"{func} gets tensors of the CPU and of the card")
        return func(*args, **kwargs)


def to_card(model, device):
    """Module.to for the meta device, where it makes new tensors, without the tie of head and embedding."""
    torch.nn.Module.to(model, device)
    model.lm_head.weight = model.transformer.wte.weight


@pytest.fixture
def waits(flags, monkeypatch):
    """A function: device, keys -> what waits in a run that the CPU began, with an evaluation every second step."""

    def run(device="meta", steps=2, **keys):
        keys |= dict(n_layer=1, gradient_accumulation_steps=2, eval_tokens=64, eval_interval=2, log_interval=1)
        keys |= dict(out=f"{steps}", dtype="float16" if device == "cpu" else "float32")
        train.main(flags(max_iters=2, **keys))
        with monkeypatch.context() as patch, StandIn(device) as card:
            if device == "meta":
                patch.setattr(GPT, "to", to_card)
                patch.setattr(train, "start_runtime", lambda config: Runtime(torch.device("meta"), torch.float32))
            train.main(flags(max_iters=2 + steps, **keys))
        return card.waits

    return run


@pytest.mark.parametrize(
    "device, keys, save",  # save: reads of a save: are the weights finite; with float16 the two numbers of the scaler
    [("meta", {}, 1), ("meta", QWEN3, 1), ("cpu", QWEN3, 3)],
    ids=["gpt2", "qwen3", "qwen3 in float16, on the CPU"],
)
def test_a_step_waits_for_the_device_once_and_an_evaluation_of_a_split_at_its_end(waits, device, keys, save):
    """Runs of 2 and of 6 steps: all other waits are at the start."""
    short, long = waits(device, 2, **keys), waits(device, 6, **keys)
    steps_and_splits = 4 + 2 * 2 if device == "meta" else 0  # the CPU has no copy to read
    assert long - short == {"read": steps_and_splits + 2 * save}
    assert device == "cpu" or short["blocking copy"] > 0  # the weights; so such a copy is counted


def test_sampling_and_scoring_leave_no_tensor_on_the_cpu():
    model = GPT(GPTConfig(block_size=32, n_layer=2, n_head=2, n_embd=32, arch="qwen3", bias=False)).to("meta")
    with StandIn():
        assert len(writing.sample_texts(model, load_tokenizer(), n=2, max_new_tokens=40)) == 2
        assert generation.score(model, [*range(70)], prefix_id=0).shape == (70,)


def test_a_tensor_that_is_left_on_the_cpu_is_found(waits, monkeypatch):
    """An index of the CPU into an embedding of the card: torch itself lets it pass on the meta device."""
    arange = torch.arange
    monkeypatch.setattr("model.torch.arange", lambda *args, device=None, **keys: arange(*args, **keys))
    with pytest.raises(AssertionError, match="tensors of the CPU and of the card"):
        waits()

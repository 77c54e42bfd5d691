"""The memory of a training step, predicted: one step of the real model runs with fake tensors, which have sizes only.

    parts = trace_memory(config, device_type="cuda")     # bytes by what holds them; their sum is the peak
    sizes = batch_sizes_that_fit(config, free_bytes, device_type="cuda")

Nothing here depends on the network: whoever changes a block in model.py changes the prediction with it. It is for an
eager step; a compiled one needs up to 20% less (qwen3), or up to 4% more (gpt2 in float16).
"""

import bisect
import contextlib
import weakref
from dataclasses import replace
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from model import GPT, GPTConfig
from onecard.optim import configure_optimizers

# Operators of a network that autocast computes in float32 on CUDA but not on a CPU (torch's list "CUDA Ops that can
# autocast to float32").
FLOAT32_ON_A_CARD = (
    "pow.Tensor_Scalar pow.Tensor_Tensor exp log rsqrt reciprocal softplus softmax.int cumsum layer_norm"
)
GiB = 2**30
CPU_BATCH_TOKENS = 2**12  # a larger micro batch is not faster on a CPU
BUDGET = 0.92  # share of the free memory that a micro batch may need: the allocator loses some to fragments


class LiveBytes(TorchDispatchMode):
    """While it is active, `live` is the number of bytes of all tensors that exist, `peak` its largest value."""

    def __init__(self):
        super().__init__()
        self.sizes, self.live, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.add, out)
        return out

    def add(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.remove, storage._cdata).atexit = False

    def remove(self, address):
        self.live -= self.sizes.pop(address)


@contextlib.contextmanager
def card_kernels():
    """Fake tensors take the ways of a CPU. Here functions of torch that a card computes otherwise get its sizes.

    Three functions are one kernel there, and autocast computes more operators in float32 (FLOAT32_ON_A_CARD).
    """
    attention, log_softmax = F.scaled_dot_product_attention, torch.log_softmax

    def fused_attention(*args, dropout_p=0.0, **options):  # keeps a random seed, a CPU all B x H x T x T scores
        return attention(*args, **options)

    def fused_rms_norm(x, shape, weight=None, eps=None):
        return RMSNormKernel.apply(x, weight)

    def fused_log_softmax(x, dim, dtype):  # float16 is converted inside the kernel, other dtypes before it
        fused = x.dtype == torch.float16 and not torch.is_grad_enabled()
        return torch.empty_like(x, dtype=dtype) if fused else log_softmax(x, dim, dtype=dtype)

    functions = dict(scaled_dot_product_attention=fused_attention, rms_norm=fused_rms_norm)
    with (
        mock.patch.multiple(F, **functions),
        mock.patch.object(torch, "log_softmax", fused_log_softmax),
        torch.library._scoped_library("aten", "IMPL") as library,
    ):
        for name in FLOAT32_ON_A_CARD.split():
            library.impl(name, in_float32(name), "AutocastCPU")
        yield


def in_float32(name):
    """The operator torch.ops.aten.<name> as autocast calls it on a card: with float32 inputs."""
    operator = getattr(torch.ops.aten, name.partition(".")[0])

    def cast_and_call(*args, **options):
        floats = tree_map_only(torch.Tensor, lambda x: x.float() if x.is_floating_point() else x, args)
        with torch.autocast("cpu", enabled=False):
            return operator(*floats, **options)

    return cast_and_call


class RMSNormKernel(torch.autograd.Function):
    """The sizes of a card's RMSNorm kernel, which keeps its input and one number a row. No content."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight
        ctx.save_for_backward(x, torch.empty_like(x[..., :1]))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        return torch.empty_like(ctx.saved_tensors[0]), None if ctx.weight is None else torch.empty_like(ctx.weight)


def network(config) -> GPT:
    """The network of a config on the meta device: it has all sizes and no memory."""
    with torch.device("meta"):
        return GPT(GPTConfig(**config.model_args()))


def trace_memory(config, device_type: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, int]:
    """Bytes of all tensors at the peak of an eager training step or evaluation, by what holds them.

    device_type: the kind of device to predict for, "cpu" or a card's; dtype: of the matrix products. Not included: what
    a process needs besides tensors, and the workspaces inside kernels. Blocks are alike, so of a deep network only 2
    and 4 layers are traced, and each pair of layers adds the difference: several times faster, and the same bytes.
    """
    if config.n_layer <= 4:
        return trace_step(config, device_type, dtype)
    two, four = (trace_step(replace(config, n_layer=n), device_type, dtype) for n in (2, 4))
    return {part: two[part] + (four[part] - two[part]) * (config.n_layer - 2) // 2 for part in two}


def trace_step(config, device_type, dtype):
    """trace_memory of exactly this network."""
    live, kernels = LiveBytes(), contextlib.nullcontext() if device_type == "cpu" else card_kernels()
    with FakeTensorMode(), live, kernels:
        model = GPT(GPTConfig(**config.model_args()))
        model.plan_for, model.activation_checkpointing = device_type, config.activation_checkpointing
        weights = live.live
        optimizers = configure_optimizers(model, config, device_type)
        tokens = torch.zeros(config.batch_size, config.block_size + 1, dtype=torch.int64)
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        for first in (True, False):  # the second step has the optimizers' state, which the first one makes
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss = model(inputs, targets)
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            if not first or config.batch_size == config.step_sequences:
                model.zero_grad(set_to_none=True)  # else gradients accumulate: they exist during the next forward
        del loss
        state = live.live - weights
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            model(inputs, targets, reduction="none")
    return {"weights": weights, "optimizer state": state, "activations and gradients": live.peak - weights - state}


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def batch_sizes_that_fit(
    config, free_bytes: float, device_type: str, dtype: torch.dtype, world_size: int = 1
) -> list[int]:
    """The micro batches that divide a process's share of a step and whose traced memory fits, ascending.

    Memory grows with the micro batch, so a binary search traces a few of them only.
    """
    sizes = divisors(config.step_sequences // world_size)

    def too_large(size):
        sized = replace(config, batch_size=size, tokens_per_step=config.step_tokens)
        return sum(trace_memory(sized, device_type, dtype).values()) > BUDGET * free_bytes

    return sizes[: bisect.bisect_left(sizes, True, key=too_large)]

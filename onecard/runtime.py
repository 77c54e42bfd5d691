"""Where a run runs: device and precision, the compiler, batches prepared ahead.

`start_runtime(config)` resolves what the config leaves open ("auto") once, at start. The result is one frozen object.
"""

import contextlib
import logging
import os
import re
import shutil
import subprocess
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from onecard import UserError, processes
from onecard.cards import card
from onecard.memory import BUDGET, CPU_BATCH_TOKENS, batch_sizes_that_fit, divisors


class DeviceError(UserError):
    """An impossible device, precision or number of processes: which, why, what to do."""


@dataclass(frozen=True)
class Runtime:
    """Where this process runs."""

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world_size: int = 1
    peak_flops: float | None = None  # FLOP/s of one card, None if unknown
    watch: processes.Watch | None = None  # of the other processes, if there are any

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def precision(self) -> str:
        """Of matrix products, for people."""
        tf32 = f"; TF32 {'off' if self.dtype == torch.float32 else 'on'}" if self.device.type == "cuda" else ""
        return self.dtype_name + tf32

    def plan_facts(self, out_dir: str) -> dict:
        """What plan.plan wants to know of the device and of the disk of out_dir: keyword arguments for it."""
        folder = next(path for path in (Path(out_dir), *Path(out_dir).absolute().parents) if path.exists())
        facts = dict(device=self.device_name, world_size=self.world_size, dtype=self.dtype)
        facts["disk_free"] = shutil.disk_usage(folder).free
        if self.device.type == "cuda":
            facts["sms"] = torch.cuda.get_device_properties(self.device).multi_processor_count
            facts["free_bytes"], facts["total_bytes"] = torch.cuda.mem_get_info(self.device)
            facts["gpu_processes"] = gpu_processes()
        return facts

    def autocast(self) -> contextlib.AbstractContextManager:
        if not torch.amp.is_autocast_available(self.device.type):
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def pinned(self, tokens: torch.Tensor) -> torch.Tensor:
        """The tokens in memory from which a card copies while others work; on a CPU the tokens themselves."""
        return tokens.pin_memory() if self.device.type == "cuda" else tokens

    def to_device(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens of uint16 -> of int64 on the device, without waiting for it."""
        return self.pinned(tokens).to(self.device, non_blocking=True).to(torch.int64)

    def card_numbers(self, flops: float) -> dict:
        """mfu, the share of the peak at so many FLOP/s of all processes together; peak_memory_gib. Empty on a CPU."""
        numbers = {}
        if self.peak_flops:
            numbers["mfu"] = flops / (self.peak_flops * self.world_size)
        if self.device.type == "cuda":
            numbers["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return numbers

    def print0(self, text: str, file=None) -> None:
        """Prints in the first process only."""
        if self.rank == 0:
            print(text, flush=True, file=file)

    def dropout_seed(self, seed: int, step: int) -> int:
        """The seed of dropout in one step of this process: unrelated for neighbouring steps and ranks."""
        sequence = np.random.SeedSequence((seed, step, self.rank))
        return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))

    def going_on(self) -> None:
        """Tells the watch that this process is not stuck: called wherever it has come a little further."""
        if self.watch:
            self.watch.count += 1

    def max_over_processes(self, number: int) -> int:
        self.going_on()
        if self.world_size > 1:
            shared = torch.tensor(number, device=self.device)
            dist.all_reduce(shared, dist.ReduceOp.MAX)
            number = int(shared)
        return number

    def gather(self, value: Any) -> list:
        """The values of all processes, by rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def require_same(self, **values) -> None:
        """Raises DeviceError if the processes have different values, such as two machines without a shared folder."""
        everyone = self.gather(values)
        for rank, other in enumerate(everyone):
            for key in values:
                if other[key] != everyone[0][key]:
                    raise DeviceError(
                        f"process {rank} has {key}={other[key]!r}, process 0 has {everyone[0][key]!r}: give all "
                        "machines the same files in data_dir and out_dir, by a shared folder or by copies"
                    )


def gpu_processes() -> str:
    """The other processes that use memory of a card, as nvidia-smi names them; empty if it does not."""
    command = ["nvidia-smi", "--query-compute-apps=pid,process_name,used_memory", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "; ".join(line for line in output.splitlines() if not line.startswith(f"{os.getpid()},"))


# ---- device, precision, processes


def pick_device(name: str) -> torch.device:
    """'auto' or a torch device string -> torch.device. An NVIDIA card that torch cannot use is an error."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        if torch.backends.mps.is_available():
            return torch.device("mps")
        if shutil.which("nvidia-smi") or Path("/proc/driver/nvidia/version").exists():
            raise DeviceError(
                f"device=auto: this machine has an NVIDIA driver, but torch {torch.__version__} cannot use it (a build "
                "without CUDA, or a driver that is too old). Install the CUDA build from PyTorch's 'Get started' page, "
                "or use --device=cpu to train on the CPU"
            )
        return torch.device("cpu")
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise DeviceError(f"device={name!r} is not a device for training; use auto, cpu, cuda, cuda:0 or mps")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError(f"device={name}: torch {torch.__version__} finds no CUDA device; use --device=cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"device={name}: there are {torch.cuda.device_count()} CUDA devices, counted from cuda:0")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError(f"device={name}: torch {torch.__version__} finds no Apple GPU; use --device=cpu")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """'auto' or 'float32', 'bfloat16', 'float16' -> torch.dtype for autocast on that torch.device.

    auto takes bfloat16 where the hardware has it (float16 is as fast but needs a GradScaler), float16 on older CUDA
    cards, and float32 where neither is faster.
    """
    if name == "float16" and device.type == "mps":
        raise DeviceError("dtype=float16 needs a GradScaler, which torch lacks on an Apple GPU; use --dtype=float32")
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return torch.bfloat16
    return torch.float32


def start_runtime(config) -> Runtime:
    """Resolves device and precision. Joins the other processes if torchrun started this one."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(config.device)
    peak_flops = watch = None
    if device.type == "cpu":
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages: 512 times fewer page faults (Linux)
    if device.type == "cuda":
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # loses less memory to fragments
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        if device.index >= (count := torch.cuda.device_count()):
            raise DeviceError(
                f"LOCAL_RANK={device.index}: there are {count} CUDA devices: use --nproc_per_node={count}"
            )
        torch.cuda.set_device(device)
        tf32 = pick_dtype(config.dtype, device) != torch.float32
        torch.set_float32_matmul_precision("high" if tf32 else "highest")  # dtype=float32 means float32
        warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")  # which advises the opposite
        driver = torch.cuda.get_device_properties(device)
        found = card(driver.name, driver.multi_processor_count)
        peak_flops = found.tflops * 1e12 if found else None
    if world_size > 1:
        micro_steps(config.step_sequences, config.batch_size or 1, world_size)  # raises if it does not divide
        backend = config.backend if device.type == "cuda" else "gloo"
        watch = processes.join(backend, device, rank, world_size, config.ddp_timeout_minutes)
    return Runtime(device, pick_dtype(config.dtype, device), rank, world_size, peak_flops, watch)


# ---- the micro batch


def micro_steps(sequences: int, batch_size: int, world_size: int) -> int:
    """Micro batches of one process in a step of so many sequences. DeviceError names the nearest that divide."""
    if sequences % (batch_size * world_size) == 0:
        return sequences // (batch_size * world_size)
    if sequences % world_size:
        key, given = "nproc_per_node", world_size
        fits = divisors(sequences // batch_size if sequences % batch_size == 0 else sequences)
    else:
        key, given, fits = "batch_size", batch_size, divisors(sequences // world_size)
    nearest = {max(n for n in fits if n <= given), min((n for n in fits if n >= given), default=fits[-1])}
    raise DeviceError(
        f"{world_size} processes with batch_size={batch_size} cannot share the {sequences} sequences of a step evenly: "
        f"use {key}={' or '.join(map(str, sorted(nearest)))}"
    )


def choose_batch_size(model: torch.nn.Module, config, runtime: Runtime, found: dict) -> tuple[int, int]:
    """(sequences in a micro batch, micro batches of this process in a step).

    found: with batch_size=0, what was found and on which device; part of a checkpoint, so that a run that is resumed on
    the same device keeps its micro batch.
    """
    batch_size = config.batch_size
    if batch_size == 0:
        here = dict(device=runtime.device_name, world_size=runtime.world_size)
        if not here.items() <= found.items():
            found.update(here, batch_size=find_batch_size(model, config, runtime))
        batch_size = found["batch_size"]
    return batch_size, micro_steps(config.step_sequences, batch_size, runtime.world_size)


def find_batch_size(model: torch.nn.Module, config, runtime: Runtime) -> int:
    """The largest micro batch that divides the step and fits; with several cards the one that fits on all.

    On a card: the largest whose predicted memory fits is tried with one forward and backward; if its measured peak is
    too large or memory runs out, the next smaller one. (On Windows memory does not run out: the driver would swap to
    host memory and training would be very slow.) On a CPU: up to CPU_BATCH_TOKENS, without a trial.
    """
    if runtime.device.type == "cuda":
        free = torch.cuda.mem_get_info(runtime.device)[0] + torch.cuda.memory_reserved(runtime.device)
        sizes = batch_sizes_that_fit(config, free, "cuda", runtime.dtype, runtime.world_size)
        while sizes and trial_peak(model, sizes[-1], config, runtime) > BUDGET * free:
            sizes.pop()
        if not sizes:
            raise DeviceError(
                f"batch_size=1 does not fit into the {free / 2**30:.1f} GiB that are free: use a smaller n_embd, "
                "n_layer or block_size, or --activation_checkpointing=True, or free memory on the card"
            )
    else:
        every = divisors(config.step_sequences // runtime.world_size)
        sizes = [size for size in every if size * config.block_size <= CPU_BATCH_TOKENS] or every[:1]
    batch_size = -runtime.max_over_processes(-sizes[-1])
    runtime.print0(f"found batch_size={batch_size} for {config.step_sequences} sequences a step")
    return batch_size


def trial_peak(model, batch_size, config, runtime):
    """Peak bytes of the eager micro batches of a step, with the moments that AdamW will add; infinite if it fails.

    The second micro batch needs most, because the gradients of the first are there.
    """
    torch.cuda.reset_peak_memory_stats()
    zeros = torch.zeros(batch_size, config.block_size, dtype=torch.int64, device=runtime.device)
    try:
        for _ in range(min(2, micro_steps(config.step_sequences, batch_size, runtime.world_size))):
            with runtime.autocast():
                loss = model(zeros, zeros)
            loss.backward()
        return torch.cuda.max_memory_allocated() + 8 * sum(p.numel() for p in model.parameters())
    except torch.OutOfMemoryError:
        return float("inf")
    finally:
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()


@contextlib.contextmanager
def oom_errors(config):
    """Makes a DeviceError of an out-of-memory error: what did not fit, and keys with the same tokens per step."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # only on CUDA torch has an error of its own for it
        full = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not full and not re.search("out of memory|allocate memory|size calculation overflowed", str(error)):
            raise
        batch, steps = config.batch_size, config.gradient_accumulation_steps
        smaller = next((d for d in range(2, batch + 1) if batch % d == 0), 0)
        if config.tokens_per_step:
            remedy = "--batch_size=0 finds one that fits" if batch else "--activation_checkpointing=True needs less"
        elif smaller:
            remedy = f"--batch_size={batch // smaller} --gradient_accumulation_steps={steps * smaller} should fit"
        else:
            remedy = "--activation_checkpointing=True, or a smaller block_size or network, needs less"
        where = f"batch_size={batch}, block_size={config.block_size}, n_embd={config.n_embd}"
        reason = " ".join(str(error).split())[:200].split(". GPU")[0]
        raise DeviceError(f"memory is full at {where} ({reason}); with the same tokens per step, {remedy}") from None


# ---- the compiler


def compile_model(model: torch.nn.Module, shape: tuple[int, int], wanted: bool, runtime: Runtime) -> torch.nn.Module:
    """The model to train on micro batches of this shape (B, T): compiled if wanted, and shared with other processes.

    torch.compile compiles, and fails, at the first call. So the first calls are made here: no step of the run waits for
    the compiler. They go through DDP, so that backward is compiled in parts, and gradients are exchanged while it runs.
    If one process cannot compile, none does.
    """
    network: Any = torch.compile(model, dynamic=False) if wanted else model
    compiled: Any = network
    if runtime.world_size > 1:
        compiled = DistributedDataParallel(network, gradient_as_bucket_view=True)  # no second copy of the gradients
    if wanted:
        began = time.perf_counter()
        runtime.print0("compiling the model, about a minute (--compile=False skips this)")
        logging.getLogger("torch._inductor.utils").setLevel(logging.ERROR)  # "Not enough SMs": as on every smaller card
        failed = [reason for reason in runtime.gather(first_calls(compiled, shape, runtime)) if reason]
        if not failed:
            runtime.print0(f"compiled in {time.perf_counter() - began:.0f} s")
            return compiled
        effect = "training without it, slower; the predicted memory is that of this eager model"
        runtime.print0(f"torch.compile does not work here ({failed[0]}); {effect}")
        if runtime.world_size == 1:
            return model
        compiled.module = model  # the same weights, so DDP still has its hooks
    return compiled


def first_calls(compiled, shape, runtime):
    """Makes the first training and evaluation calls, on zeros -> why they failed, or an empty text."""
    zeros = torch.zeros((shape[0], shape[1] + 1), dtype=torch.int64, device=runtime.device)
    inputs, targets = zeros[:, :-1], zeros[:, 1:]  # strides of real batches: with others it would be compiled again
    try:
        with compiled.no_sync() if runtime.world_size > 1 else contextlib.nullcontext():  # others may not come so far
            with runtime.autocast():
                loss = compiled(inputs, targets)
            loss.backward()
        compiled.eval()
        with torch.no_grad(), runtime.autocast():
            compiled(inputs, targets, reduction="none")
        return ""
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return " ".join(str(error).split())[:200] or type(error).__name__
    finally:
        compiled.train()
        compiled.zero_grad(set_to_none=True)


# ---- batches


class Batches:
    """The micro batches of this process, one after the other; a thread assembles the next while this one is used.

    windows: windows.Windows; first_sequence: where the run starts. The sequences of a step are dealt to micro steps,
    then to processes.
    """

    def __init__(self, windows, batch_size: int, runtime: Runtime, first_sequence: int = 0):
        self.windows, self.batch_size, self.runtime = windows, batch_size, runtime
        self.stride = runtime.world_size * batch_size
        self.thread, self.waited = ThreadPoolExecutor(1), 0.0
        self.request(first_sequence + runtime.rank * batch_size)

    def request(self, sequence):
        self.sequence, self.next_tokens = sequence, self.thread.submit(self.assemble, sequence)

    def assemble(self, sequence):
        return self.runtime.pinned(torch.from_numpy(self.windows.batch(sequence, self.batch_size)))  # (B, T + 1)

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets, (B, T) each, of int64 on the device."""
        began = time.perf_counter()
        tokens = self.next_tokens.result()
        self.waited += time.perf_counter() - began
        self.runtime.going_on()
        self.request(self.sequence + self.stride)
        tokens = self.runtime.to_device(tokens)
        return tokens[:, :-1], tokens[:, 1:]

    def take_waited(self) -> float:
        """Seconds that `next` has waited for tokens since this was last called."""
        waited, self.waited = self.waited, 0.0
        return waited

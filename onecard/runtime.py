"""Where a run runs: its device and precision, its processes, the signals that end it, the compiler, batches ahead.

`start_runtime` resolves what the config leaves open ("auto") once, at start; the result is one small frozen object.
"""

import os
import secrets
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from onecard import plan


class DeviceError(ValueError):
    """A device, a precision or a number of processes that cannot be: which, why, what to do."""


@dataclass(frozen=True)
class Runtime:
    """Where this process runs: resolved once, at start."""

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world_size: int = 1
    peak_flops: float | None = None  # FLOP/s of one card, None where it is not known

    @property
    def device_name(self):
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    def plan_facts(self, out_dir):
        """What plan.plan wants to know of the device, and of the disk of out_dir: keyword arguments for it."""
        folder = next(path for path in (Path(out_dir), *Path(out_dir).absolute().parents) if path.exists())
        facts = dict(device=self.device_name, world_size=self.world_size, wide=self.dtype == torch.float32)
        facts |= dict(disk_free=shutil.disk_usage(folder).free)
        if self.device.type == "cuda":
            facts |= dict(sms=torch.cuda.get_device_properties(self.device).multi_processor_count)
            facts |= dict(free_bytes=torch.cuda.mem_get_info(self.device)[0], holders=holders())
        return facts

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def say(self, text):
        if self.rank == 0:
            print(text, flush=True)

    def largest(self, number):
        """The largest of a whole number over the processes."""
        if self.world_size > 1:
            number = torch.tensor(number, device=self.device)
            dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)

    def require_same(self, **seen):
        """Raises DeviceError if the processes do not see the same: two machines without a shared folder, say."""
        if self.world_size == 1:
            return
        others = [None] * self.world_size
        dist.all_gather_object(others, seen)
        for rank, other in enumerate(others):
            for key in seen:
                if other[key] != others[0][key]:
                    raise DeviceError(
                        f"process {rank} has {key}={other[key]!r}, process 0 {others[0][key]!r}: all need the same "
                        "files in data_dir and out_dir, by a shared folder or by copies"
                    )


def holders():
    """The other processes that hold memory of a card, as nvidia-smi names them; empty where it does not."""
    command = ["nvidia-smi", "--query-compute-apps=pid,process_name,used_memory", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "; ".join(line for line in said.splitlines() if not line.startswith(f"{os.getpid()},"))


def pick_device(name):
    """'auto' or a torch device string -> torch.device. An NVIDIA card that torch cannot use is an error."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        if torch.backends.mps.is_available():
            return torch.device("mps")
        driver = shutil.which("nvidia-smi") or Path("/proc/driver/nvidia/version").exists()
        if driver:
            raise DeviceError(
                f"device=auto: this machine has an NVIDIA driver, but torch {torch.__version__} cannot use it "
                "(a build without CUDA, or a driver too old for it). Install the CUDA build that PyTorch's "
                "'Get started' page gives for this system, or say --device=cpu to train on the CPU on purpose"
            )
        return torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceError(f"device={name!r} is not a device; use auto, cpu, cuda, cuda:0 or mps") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError(
            f"device={name}: torch {torch.__version__} sees no CUDA device; use --device=cpu, or mend that"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"device={name}: there are {torch.cuda.device_count()} CUDA devices, counted from cuda:0")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError(f"device={name}: torch {torch.__version__} sees no Apple GPU here; use --device=cpu")
    return device


def pick_dtype(name, device):
    """'auto' or 'float32', 'bfloat16', 'float16' -> torch.dtype for autocast on that torch.device.

    auto takes bfloat16 where the hardware multiplies in it (float16 has the same speed but needs a GradScaler),
    float16 on older CUDA cards, and float32 where neither is faster.
    """
    if name == "float16" and device.type == "mps":
        raise DeviceError("dtype=float16 on an Apple GPU would need a GradScaler that torch lacks there; use float32")
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return torch.bfloat16
    return torch.float32


def start_runtime(config):
    """-> Runtime. Joins the other processes if torchrun started this one."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(config.device)
    peak_flops = None
    if device.type == "cpu":
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages: logits fault 512 times less often (Linux)
    if device.type == "cuda":
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # less lost to fragments
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 in what remains float32
        card = torch.cuda.get_device_properties(device)
        peak_flops = plan.peak_flops(card.name, card.multi_processor_count)
    if world_size > 1:
        micro_steps(config.step_sequences, config.batch_size or 1, world_size)  # refuses what does not divide
        backend = config.backend if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=meet(rank, world_size), rank=rank, world_size=world_size)
    return Runtime(device, pick_dtype(config.dtype, device), rank, world_size, peak_flops)


def meet(rank, world_size):
    """-> a store that only the processes of this start share. torchrun keeps one store over its restarts, and with it
    the addresses of processes that are dead, for which the new ones would wait (pytorch issue 135712). So the first
    process thinks of a name, and answers each that has read it; who has read a dead one's gets no answer, and asks
    again."""
    store, *_ = next(dist.rendezvous("env://"))
    me = secrets.token_hex(8)
    if rank == 0:
        store.set("name", me)
        for other in range(1, world_size):
            store.set(store.get(f"{me}/{other}").decode(), me)
        return dist.PrefixStore(me, store)
    while not store.check([me]):
        store.set(f"{store.get('name').decode()}/{rank}", me)
        time.sleep(0.05)
    return dist.PrefixStore(store.get(me).decode(), store)


def micro_steps(sequences, batch_size, world_size):
    """-> micro batches of one process in a step of so many sequences. DeviceError names the nearest that divide."""
    if sequences % (batch_size * world_size) == 0:
        return sequences // (batch_size * world_size)
    if sequences % world_size:
        shares = sequences // batch_size if sequences % batch_size == 0 else sequences
        key, given, fits = "nproc_per_node", world_size, divisors(shares)
    else:
        key, given, fits = "batch_size", batch_size, divisors(sequences // world_size)
    near = {max(n for n in fits if n <= given), min((n for n in fits if n >= given), default=fits[-1])}
    raise DeviceError(
        f"{world_size} processes with batch_size={batch_size} cannot share the {sequences} sequences of a step evenly: "
        f"{key}={' or '.join(map(str, sorted(near)))} would"
    )


def divisors(n):
    return [d for d in range(1, n + 1) if n % d == 0]


def find_batch_size(model, sequences, block_size, runtime, estimate):
    """-> the largest micro batch that divides the step and fits. On a card the estimate (bytes of a micro batch) comes
    first; then two small ones are tried, their peaks extrapolated, and the choice is tried too, so that memory never
    runs out (on Windows it would not: the driver would swap, and training crawl)."""
    fits = divisors(sequences // runtime.world_size)
    most = 2**15 if runtime.device.type == "cuda" else 2**12  # tokens; more at a time are not faster
    fits = [n for n in fits if n * block_size <= most] or fits[:1]
    if runtime.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(runtime.device)
        budget = 0.92 * (free + torch.cuda.memory_reserved(runtime.device))
        fits = [n for n in fits if estimate(n) <= budget] or fits[:1]
        fits = largest_that_fits(fits, lambda n: peak_bytes(model, n, block_size, runtime), budget)
    batch_size = -runtime.largest(-fits[-1])  # the smallest of all cards
    runtime.say(f"found batch_size={batch_size} for {sequences} sequences a step")
    return batch_size


def largest_that_fits(sizes, measure, budget):
    """-> those of the ascending sizes whose peak fits into budget bytes, by a line through the two smallest; the
    largest of them is measured too."""
    first = measure(sizes[0])
    if first > budget:
        raise DeviceError(
            f"batch_size={sizes[0]} needs {first / 2**30:.1f} GiB and {budget / 2**30:.1f} are free: take a smaller "
            "n_embd, n_layer or block_size, or --activation_checkpointing=True, or free memory on the card"
        )
    if len(sizes) == 1:
        return sizes
    slope = (measure(sizes[1]) - first) / (sizes[1] - sizes[0])
    fits = [n for n in sizes if first + slope * (n - sizes[0]) <= budget]
    while len(fits) > 2 and measure(fits[-1]) > budget:
        fits.pop()
    return fits


def peak_bytes(model, batch_size, block_size, runtime):
    """Peak of one eager forward and backward on the card, and the two moments that AdamW will add."""
    torch.cuda.reset_peak_memory_stats()
    zeros = torch.zeros(batch_size, block_size, dtype=torch.int64, device=runtime.device)
    with runtime.autocast():
        loss = model(zeros, zeros)
    loss.backward()
    peak = torch.cuda.max_memory_allocated()
    model.zero_grad(set_to_none=True)
    return peak + 8 * sum(p.numel() for p in model.parameters())


class Stop:
    """The wish to end a run early: SIGINT, SIGTERM, SIGHUP, or max_hours. A first signal lets the step be finished and
    saved, a second one ends the process at once. `wish` is 0, a signal's number, or TIME_IS_UP."""

    TIME_IS_UP = 64

    def __init__(self, max_hours=0.0):
        self.signal, self.seconds = 0, 3600 * max_hours or float("inf")
        self.began = self.asked = time.monotonic()

    def __enter__(self):
        numbers = [signal.SIGINT, signal.SIGTERM]
        if getattr(signal, "SIGHUP", None) and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # nohup ignores it
            numbers.append(signal.SIGHUP)  # the terminal was closed
        self.before = {number: signal.signal(number, self.receive) for number in numbers}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number, _):
        if self.signal:
            os._exit(128 + number)
        self.signal = number
        name = signal.Signals(number).name
        os.write(2, f"\n{name}: finishing the step and saving; once more stops at once\n".encode())

    def wish(self, seconds_to_save=0.0):
        """Asked once a step. The time is up when another step as long as this one, and the save, would end too late."""
        now = time.monotonic()
        step, self.asked = now - self.asked, now
        late = now + step + seconds_to_save > self.began + self.seconds
        return int(self.signal) or self.TIME_IS_UP * late


def out_of_memory(config, error):
    """One sentence: what did not fit, and the keys that keep the tokens of a step and should fit."""
    batch, steps = config.batch_size, config.gradient_accumulation_steps
    smaller = next((d for d in range(2, batch + 1) if batch % d == 0), 0)
    if config.tokens_per_step:
        remedy = "--batch_size=0 finds one that fits" if batch else "--activation_checkpointing=True needs less"
    elif smaller:
        remedy = f"--batch_size={batch // smaller} --gradient_accumulation_steps={steps * smaller} should fit"
    else:
        remedy = "--activation_checkpointing=True, or a smaller block_size or network, needs less"
    where = f"batch_size={batch}, block_size={config.block_size}, n_embd={config.n_embd}"
    return (
        f"the card's memory is full at {where} ({str(error).split('. GPU')[0]}); with the same tokens a step {remedy}"
    )


def compile_model(model, shape, wanted, runtime):
    """-> the model to train on micro batches of this shape: compiled if that is wanted and works here, and shared with
    the other processes.

    torch.compile fails at the first call, if it fails (no compiler, no Triton): so that call is made here, on zeros
    laid out like real batches, and an evaluation's too: no step and no evaluation of the run waits for the compiler.
    """
    compiled = model
    if wanted:
        began = time.perf_counter()
        runtime.say("compiling the model, a minute or so (--compile=False does without)")
        compiled = torch.compile(model, dynamic=False)
        zeros = torch.zeros((shape[0], shape[1] + 1), dtype=torch.int64, device=runtime.device)
        inputs, targets = zeros[:, :-1], zeros[:, 1:]  # strides count: others are compiled anew
        try:
            with runtime.autocast():
                loss = compiled(inputs, targets)
            loss.backward()
            model.eval()
            with torch.no_grad(), runtime.autocast():
                compiled(inputs, targets, reduction="none")
            runtime.say(f"compiled in {time.perf_counter() - began:.0f} s")
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            runtime.say(f"torch.compile does not work here ({reason}); going on without it, slower")
            compiled = model
        model.train()
        model.zero_grad(set_to_none=True)
    if runtime.world_size > 1:
        compiled = DistributedDataParallel(compiled, gradient_as_bucket_view=True)  # no second copy of the gradients
    return compiled


class Batches:
    """The micro batches of this process, one after the other; a thread assembles the next while this one is used.

    blocks: TokenBlocks; first_sequence: where the run goes on. Sequences are dealt to micro steps, then to processes.
    """

    def __init__(self, blocks, batch_size, runtime, first_sequence=0):
        self.blocks, self.batch_size, self.device = blocks, batch_size, runtime.device
        self.stride = runtime.world_size * batch_size
        self.thread, self.waited = ThreadPoolExecutor(1), 0.0
        self.request(first_sequence + runtime.rank * batch_size)

    def request(self, sequence):
        self.sequence, self.coming = sequence, self.thread.submit(self.assemble, sequence)

    def assemble(self, sequence):
        tokens = torch.from_numpy(self.blocks.batch(sequence, self.batch_size))  # (B, T + 1) of uint16
        return tokens.pin_memory() if self.device.type == "cuda" else tokens

    def next(self):
        """-> inputs and targets, (B, T) of int64 on the device."""
        began = time.perf_counter()
        tokens = self.coming.result()
        self.waited += time.perf_counter() - began
        self.request(self.sequence + self.stride)
        tokens = tokens.to(self.device, non_blocking=True).to(torch.int64)
        return tokens[:, :-1], tokens[:, 1:]

    def take_waited(self):
        """Seconds for which `next` has waited for tokens since this was last asked."""
        waited, self.waited = self.waited, 0.0
        return waited

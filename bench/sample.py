"""How fast text is made: with our cache, without it, and by transformers' generate with its own; on whatever device.

    python bench/sample.py                                  # three quarters of an hour on two CPU cores
    python bench/sample.py --tokens=50 --turns=1            # a quick look
    python bench/sample.py --floor                          # a step beside its matrix products alone

The network has 124M parameters and random weights, the same ones on both sides; everything greedy unless it says
sampled, behind one <|endoftext|>. Every measurement is a process of its own; the variants take turns, and median and
spread (smallest to largest) over the turns are printed, ratios within a turn, so that other work falls on all alike.
Without cache every 50th step is timed and counted for fifty: all of them would take a quarter of an hour.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from onecard.generation import generate  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402

EOT, SAMPLED = 50256, dict(temperature=0.8, top_k=200)
TABLES = {  # title: [variants: who, dtype, batch, how]; the first is what the others are divided by
    "One text, float32": ["transformers float32 1", "ours float32 1", "uncached float32 1"],
    "One text, float32, drawn among the 200 likeliest": ["transformers float32 1 sampled", "ours float32 1 sampled"],
    "One text, bfloat16 weights": ["transformers bfloat16 1", "ours bfloat16 1", "ours float32 1"],
    "Eight texts, float32": ["ours float32 1", "ours float32 8", "transformers float32 8"],
    "Eight texts, bfloat16 weights": ["ours bfloat16 1", "ours bfloat16 8"],
}


def network(dtype, device):
    torch.manual_seed(0)
    model = GPT(GPTConfig(bias=True))
    with torch.no_grad():
        model.transformer.wte.weight[EOT + 1 :] = 0  # transformers does not know that these rows are padding
    return model.eval().to(device, dtype)


def to_transformers(model):
    """The same weights in transformers' GPT2LMHeadModel, whose linear layers are stored transposed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    c, ours, weight = model.config, model.state_dict(), model.transformer.wte.weight
    sizes = dict(vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head)
    theirs = GPT2LMHeadModel(GPT2Config(**sizes)).eval().to(weight.device, weight.dtype)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            transposed = ".c_" in name and name.endswith("weight")
            parameter.copy_(ours[name].t() if transposed else ours[name])
    theirs.generation_config.eos_token_id = None  # all texts have the same length
    return theirs


def texts_of(variant, device):
    """-> a function: number of tokens -> list of ids of the first text."""
    who, dtype, batch, *how = variant.split()
    model = network(getattr(torch, dtype), device)
    if who == "transformers":
        theirs, idx = to_transformers(model), torch.full((int(batch), 1), EOT, device=device)
        options = dict(do_sample=True, top_p=1.0, **SAMPLED) if how else dict(do_sample=False)
        options |= dict(use_cache=True, pad_token_id=EOT, attention_mask=torch.ones_like(idx))
        return lambda n: theirs.generate(idx, max_new_tokens=n, **options)[0].tolist()
    options = dict(seeds=range(int(batch)), **SAMPLED) if how else dict(temperature=0)
    return lambda n: generate(model, [[EOT]] * int(batch), n, **options)[0]


def uncached_seconds(model, tokens):
    """Seconds of `tokens` greedy steps without cache: every 50th is timed."""
    seconds, prompt = 0.0, generate(model, [[EOT]], tokens, temperature=0)[0]
    for n in range(25, tokens + 1, 50):
        began = time.perf_counter()
        generate(model, [prompt[:n]], 1, temperature=0, use_cache=False)
        seconds += 50 * (time.perf_counter() - began)
    return seconds


def measure(variant, tokens):
    """In a process of its own: -> tokens/s over all texts, and the ids of the first one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    who, dtype, batch, *_ = variant.split()
    if who == "uncached":
        seconds, ids = uncached_seconds(network(getattr(torch, dtype), device), tokens), []
    else:
        make = texts_of(variant, device)
        make(8)
        began = time.perf_counter()
        ids = make(tokens)
        seconds = time.perf_counter() - began
    return dict(tokens_per_s=int(batch) * tokens / seconds, ms=1000 * seconds / tokens, ids=ids)


def floor(device):
    """Prints ms of a step with little context, and of nothing but its matrix products, which read all weights."""
    print("| dtype, texts | products alone, ms | a step, ms |\n|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        model = network(dtype, device)
        weights = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
        for batch in (1, 8):
            inputs = {w.shape[1]: torch.randn(batch, w.shape[1], device=device, dtype=dtype) for w in weights}
            alone, steps = [], []
            with torch.no_grad():
                for _ in range(12):
                    began = time.perf_counter()
                    last = [torch.nn.functional.linear(inputs[w.shape[1]], w) for w in weights][-1]
                    last.sum().item()  # waits for a card
                    alone.append(1000 * (time.perf_counter() - began))
            for _ in range(3):
                began = time.perf_counter()
                generate(model, [[EOT]] * batch, 40, temperature=0)
                steps.append(1000 * (time.perf_counter() - began) / 40)
            print(f"| {dtype}, {batch} | {spread(alone[2:])} | {spread(steps)} |", flush=True)


def in_a_process(variant, tokens):
    command = [sys.executable, __file__, "--measure", json.dumps([variant, tokens])]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TQDM_DISABLE": "1"})
    if done.returncode:
        raise SystemExit(f"{variant}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def spread(values, digits=1):
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--floor", action="store_true", help="a step beside its matrix products alone")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*json.loads(options.measure))))
        return
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    where = f"{name} ({platform.machine()}), torch {torch.__version__}, commit {commit.strip() or 'unknown'}"
    if options.floor:
        print(where)
        return floor(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    print(f"# Sampling: {options.tokens} tokens a text, {options.turns} turns\n\n{where}")
    variants = dict.fromkeys(variant for rows in TABLES.values() for variant in rows)
    results = {variant: [] for variant in variants}
    for _ in range(options.turns):
        for variant in variants:
            results[variant].append(in_a_process(variant, options.tokens))
    for title, rows in TABLES.items():
        print(f"\n## {title}\n\n| who, dtype, texts | tokens/s | over the first | ms a step |\n|---|---|---|---|")
        for variant in rows:
            pairs = zip(results[variant], results[rows[0]], strict=True)
            ratios = [r["tokens_per_s"] / base["tokens_per_s"] for r, base in pairs]
            speed, ms = ([r[k] for r in results[variant]] for k in ("tokens_per_s", "ms"))
            print(f"| {variant} | {spread(speed)} | {spread(ratios, 2)} | {spread(ms)} |", flush=True)
    same = results["ours float32 1"][0]["ids"] == results["transformers float32 1"][0]["ids"]
    print(f"\nThe greedy texts of ours and of transformers in float32 are {'the same' if same else 'NOT the same'}.")


if __name__ == "__main__":
    main()

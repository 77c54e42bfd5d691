"""Which vocabulary suits a small network? Bits per byte with equal parameters and tokens, so equal FLOPs.

    python bench/vocabulary.py ../shared/corpus                 # prepares each dataset once, then trains

Every number is the val loss at the end of a finished schedule, in bits per byte, on the same val text. The width
follows from the vocabulary: a large embedding leaves less for the blocks. Finished runs in --results are kept.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from common import ROOT, commit, header, machine, row, run, train_py

from onecard.memory import network
from train import TrainConfig

VOCABULARIES = {257: "bytes", 1024: "", 4096: "", 16384: "", 50257: "gpt2"}  # ids: tokenizer, or trained
RECIPE = dict(arch="qwen3", optimizer="muon", lr_schedule="linear", min_lr=0.0, learning_rate=6e-3)
BATCH = dict(block_size=256, batch_size=8, gradient_accumulation_steps=1, n_layer=4, n_head=2)


def prepare(inputs, data_dir, ids, name):
    tokenizer = f"--tokenizer={name}" if name else f"--train_tokenizer={ids}"
    dataset = f"vocabulary_{ids}"
    run([sys.executable, ROOT / "prepare.py", *inputs, f"--dataset={dataset}", f"--data_dir={data_dir}", tokenizer])
    return dataset


def width(ids, parameters):
    """The width, a multiple of 4, with which the network has about so many parameters."""

    def size(n_embd):
        return network(TrainConfig(**BATCH, **RECIPE, n_embd=n_embd, vocab_size=-(-ids // 64) * 64)).num_params()

    return min(range(8, 1024, 4), key=lambda n_embd: abs(size(n_embd) - parameters))


def finish(options, ids, name, seed):
    """The result of one training, a process of its own, unless it is done already."""
    steps = options.tokens // (BATCH["batch_size"] * BATCH["block_size"])
    keys = BATCH | RECIPE | dict(n_embd=width(ids, options.parameters), max_iters=steps, seed=seed)
    keys |= dict(
        warmup_iters=steps // 20, eval_interval=steps, dataset=f"vocabulary_{ids}", eval_tokens=2**17, compile=False
    )
    results = Path(options.results)
    for line in results.read_text().splitlines() if results.exists() else []:
        if json.loads(line)["keys"] == keys:
            return json.loads(line)
    prepare(options.inputs, options.data_dir, ids, name)
    lines, done = train_py(keys | dict(data_dir=options.data_dir, log_interval=steps, always_save_checkpoint=False))
    start, last = lines[0], [line for line in lines if line["kind"] == "eval"][-1]
    result = dict(keys=keys, commit=commit(), parameters=start["parameters"], cpu_seconds=done.cpu_seconds)
    result |= dict(bits_per_byte=last["bits_per_byte"], val_loss=last["val_loss"])
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a") as file:
        file.write(json.dumps(result) + "\n")
    print(f"  {ids} ids, seed {seed}: {result}", file=sys.stderr, flush=True)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", help="text files or folders for prepare.py")
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--parameters", type=int, default=600_000)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--seeds", type=int, default=3, help="for up to 4,096 ids; one for the others")
    parser.add_argument("--results", default="out/vocabulary.jsonl", help="file for finished runs")
    options = parser.parse_args()
    print(f"{machine('torch')}; {options.parameters:,} parameters, {options.tokens:,} tokens", flush=True)
    found = {ids: [] for ids in VOCABULARIES}
    for seed in range(options.seeds):
        for ids, name in VOCABULARIES.items():
            if seed == 0 or ids <= 4096:
                found[ids].append(finish(options, ids, name, seed))
    header("ids", "parameters", "width", "bits per byte", "smallest to largest", "CPU seconds")
    for ids, results in found.items():
        bits = [result["bits_per_byte"] for result in results]
        spread = f"{min(bits):.3f} to {max(bits):.3f}, {len(bits)} seeds" if len(bits) > 1 else "1 seed"
        seconds = statistics.median(result["cpu_seconds"] for result in results)
        first = results[0]
        row(
            ids,
            f"{first['parameters']:,}",
            first["keys"]["n_embd"],
            f"{statistics.mean(bits):.3f}",
            spread,
            f"{seconds:.0f}",
        )


if __name__ == "__main__":
    main()

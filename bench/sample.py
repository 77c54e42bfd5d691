"""How fast is text made: with our cache, without it, and by transformers' generate with its own?

    python bench/sample.py --tokens=200            # half an hour on two CPU cores; less with --turns=1
    python bench/sample.py --against=FOLDER        # sample.py here and in FOLDER, a checkout of another commit

The network has 124M parameters and random weights, the same ones on both sides; each text begins with <|endoftext|> and
is greedy unless the row says sampled. Each measurement is a process of its own; the variants take turns. Printed are
median (smallest to largest) over the turns; ratios are taken within a turn.
"""

import argparse
import json
import re
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import ROOT, header, in_a_process, interleaved, machine, ratios, row, run, spread

from model import GPT, GPTConfig
from onecard import checkpoint, pretrained
from onecard.generation import generate

EOT = 50256
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
COMPARED = [  # who, dtype, texts at a time, how; and the same of what it is compared with
    ("ours float32 1 greedy", "transformers float32 1 greedy"),
    ("ours float32 1 greedy", "ours float32 1 uncached"),
    ("ours float32 1 sampled", "transformers float32 1 sampled"),
    ("ours float32 1 compiled", "ours float32 1 greedy"),
    ("ours bfloat16 1 greedy", "transformers bfloat16 1 greedy"),
    ("ours bfloat16 1 compiled", "transformers bfloat16 1 greedy"),
    ("ours float32 8 greedy", "transformers float32 8 greedy"),
    ("ours float32 8 greedy", "ours float32 1 greedy"),
    ("ours bfloat16 8 greedy", "transformers bfloat16 8 greedy"),
]


def network(dtype):
    torch.manual_seed(0)
    model = GPT(GPTConfig(bias=True))
    with torch.no_grad():
        model.transformer.wte.weight[EOT + 1 :] = 0  # transformers does not know that these rows are padding
    return model.eval().to(DEVICE, dtype)


def to_transformers(model):
    """The same weights in transformers' GPT2LMHeadModel."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=model.config.vocab_size, **pretrained.hf_network(model.config))
    theirs, weights = GPT2LMHeadModel(config).to(DEVICE, model.lm_head.weight.dtype), model.state_dict()
    theirs.load_state_dict({name: pretrained.transposed(name, weight, "gpt2") for name, weight in weights.items()})
    theirs.generation_config.eos_token_id = None  # all texts have the same length
    return theirs.eval()


def generate_by(who, model, batch, how):
    """A function: number of tokens -> the ids of the first text."""
    sampled = dict(temperature=0.8, top_k=200)
    if who == "transformers":
        theirs, idx = to_transformers(model), torch.full((batch, 1), EOT, device=DEVICE)
        options = dict(do_sample=True, top_p=1.0, **sampled) if how == "sampled" else dict(do_sample=False)
        options |= dict(use_cache=True, pad_token_id=EOT, attention_mask=torch.ones_like(idx))
        return lambda n: theirs.generate(idx, max_new_tokens=n, **options)[0].tolist()
    options = dict(seeds=range(batch), **sampled) if how == "sampled" else dict(temperature=0)
    options |= dict(use_cache=how != "uncached", compile=how == "compiled")
    return lambda n: generate(model, [[EOT]] * batch, n, **options)[0]


def measure(variant, tokens):
    """Tokens per second of all texts together, and the ids of the first one. Runs in a process of its own."""
    who, dtype, batch, how = variant.split()
    make = generate_by(who, network(getattr(torch, dtype)), int(batch), how)
    make(tokens if how == "compiled" else 8)  # a compiled step is compiled for a length of the cache
    began = time.perf_counter()
    ids = make(tokens)
    seconds = time.perf_counter() - began
    return dict(tokens_per_s=int(batch) * tokens / seconds, ids=ids)


def compare(tokens, turns):
    variants = dict.fromkeys(variant for pair in COMPARED for variant in pair)
    results = interleaved(variants, turns, lambda variant: in_a_process(__file__, variant, tokens))
    header("who, dtype, texts, how", "tokens/s", "compared with", "tokens/s", "ratio")
    for ours, other in COMPARED:
        speeds, other_speeds = ([result["tokens_per_s"] for result in results[each]] for each in (ours, other))
        row(ours, spread(speeds, 1), other, spread(other_speeds, 1), spread(ratios(speeds, other_speeds), 2))
    same = len({tuple(results[each][0]["ids"]) for each in COMPARED[0]}) == 1
    print(f"\nThe greedy texts of ours and of transformers in float32 are {'the same' if same else 'NOT the same'}.")


def compare_checkouts(other, tokens, turns):
    """The speed that sample.py prints, for one checkpoint and one greedy text of fixed length."""
    with tempfile.TemporaryDirectory() as out_dir:
        model = network(torch.float32).cpu()
        state = dict(iter_num=0, best_val_loss=0.0, model_args=vars(model.config), model=model.state_dict())
        checkpoint.write(Path(out_dir) / checkpoint.LATEST, state)

        def speed(folder):
            arguments = [f"--out_dir={out_dir}", "--start=The card", "--num_samples=1", "--temperature=0"]
            done = run([sys.executable, Path(folder) / "sample.py", *arguments, f"--max_new_tokens={tokens}"])
            return float(re.search(r"([\d,.]+) tokens/s", done.errors)[1].replace(",", ""))

        results = interleaved((str(other), str(ROOT)), turns, speed)
    header("sample.py of", "tokens/s", "ratio to the first")
    for folder, speeds in results.items():
        row(folder, spread(speeds, 1), spread(ratios(speeds, results[str(other)]), 2))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1000, help="of each text")
    parser.add_argument("--turns", type=int, default=3, help="measurements of each variant")
    parser.add_argument("--against", metavar="FOLDER", help="compare with sample.py of this checkout")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*json.loads(options.measure))))
        return
    print(f"{machine('torch', 'transformers')}; {options.tokens} tokens per text, {options.turns} turns", flush=True)
    if options.against:
        compare_checkouts(options.against, options.tokens, options.turns)
    else:
        compare(options.tokens, options.turns)


if __name__ == "__main__":
    main()

"""Generates text with a trained model and prints it as it is made; or measures the loss of a text.

    python sample.py out/quickstart                                    # or --out_dir=out/quickstart
    python sample.py out/fineweb_4070 --start="The card" --num_samples=3 --temperature=0.7
    python sample.py out/fineweb_4070 --start=FILE:prompt.txt          # --start=- reads standard input
    python sample.py out/fineweb_4070 --prompts=prompts.txt --json     # one prompt per line, in batches
    python sample.py out/fineweb_4070 --interactive=True
    python sample.py out/fineweb_4070 --score=text.txt                 # --choices=items.jsonl: multiple choice
    python sample.py FOLDER                                            # GPT-2 or Qwen3 in Hugging Face format

Every text begins with the document separator, as every training document does, and ends where the model generates it.
nanoGPT's characters have no separator: a text without a prompt begins after a line end. Results go to standard output,
everything else to standard error.
"""

import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from configurator import ConfigError, key, load_config, run_script
from model import GPT
from onecard import checkpoint, pretrained
from onecard.choices import Item, choose, read_items
from onecard.generation import score
from onecard.runtime import pick_device, pick_dtype
from onecard.tokenizer import Tokenizer, from_state
from onecard.writing import Text, encode, first_id, interact, log, prompt_ids, read_text, write_batch

ACCURACIES = {"acc": "accuracy", "acc_norm": "by length"}


@dataclass(frozen=True)
class SampleConfig:
    # files
    out_dir: str = key(
        "out", "what train.py wrote, or convert.py reads; also as an argument without a key", inputs=True
    )
    checkpoint: str = key("latest", "which of its checkpoints", choices=("latest", "best"))
    # prompts
    start: str = key("", "prompt; FILE:name reads it from a file, - from standard input; empty: no prompt")
    prompts: str = key("", "file with one prompt per line, - for standard input")
    interactive: bool = key(False, "type prompts, one after the other, in the terminal")
    special_tokens: bool = key(False, "read <|endoftext|> in prompts and in score as the document separator")
    num_samples: int = key(0, "texts per prompt; 0: three for start, one for each line of prompts", low=0)
    batch_size: int = key(8, "texts generated at a time; more: faster in total, each text slower", low=1)
    # sampling
    max_new_tokens: int = key(200, "maximum length of a text, in tokens, without the prompt", low=1)
    temperature: float = key(0.8, "below 1: more likely tokens; above 1: more varied; 0: always the likeliest", low=0.0)
    top_k: int = key(200, "sample among the k likeliest tokens only; 0: among all", low=0)
    top_p: float = key(1.0, "sample among the fewest tokens with this total probability", low=0.0, high=1.0)
    min_p: float = key(0.0, "sample among tokens at least this fraction as likely as the likeliest", low=0.0, high=1.0)
    stop: str = key("", "a text ends before this string ($'\\n' in a shell is a line end)")
    seed: int = key(1337, "text i is sampled with seed + i, whatever batch_size is", low=0)
    json: bool = key(False, "print a line of JSON for each text: prompt, text, tokens, end, seed")
    # measurements
    score: str = key("", "file to measure the loss of, - for standard input; no text is generated")
    stride: int = key(0, "tokens between the windows of score; 0: block_size; fewer: more context, slower", low=0)
    choices: str = key("", ".jsonl file of multiple-choice items, HellaSwag's or prompt, choices, answer: accuracy")
    # system
    device: str = key("auto", "auto, cpu, cuda, cuda:1, mps")
    compile: bool = key(False, "torch.compile the step of a token: faster after a minute, for long texts on a card")
    dtype: str = key(
        "auto", "auto: the fastest; for score and choices float32", choices=("auto", "float32", "bfloat16", "float16")
    )

    def problems(self) -> list[str]:
        names = ("start", "prompts", "interactive", "score", "choices")
        given = [f"{name}={getattr(self, name)!r}" for name in names if getattr(self, name)]
        return [f"{' and '.join(given)} exclude each other: give one of them"] if len(given) > 1 else []


def read_prompts(config: SampleConfig) -> list[str]:
    if config.prompts:
        lines = read_text("prompts", config.prompts).removesuffix("\n").split("\n")
        lines = [line.removesuffix("\r") for line in lines]
        if "" in lines:
            where = f"line {lines.index('') + 1} of {config.prompts}"
            raise ConfigError(f"prompts: {where} is empty; write a prompt there, or delete the line")
        return lines
    if config.start == "-" or config.start.startswith("FILE:"):
        return [read_text("start", config.start.removeprefix("FILE:"))]
    try:
        config.start.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"start: character {error.start + 1} is not UTF-8; check how the shell passes it") from None
    return [config.start]


def load(config: SampleConfig) -> tuple[GPT, Tokenizer]:
    """The model on its device, and its tokenizer. The weights are cast once to the dtype that is computed in."""
    device = pick_device(config.device)
    measures = config.score or config.choices
    dtype = "float32" if measures and config.dtype == "auto" else config.dtype
    model, saved = pretrained.read(config.out_dir, config.checkpoint)
    tokenizer = from_state(saved["tokenizer"])
    model.n_ids = tokenizer.n_vocab
    step, loss = saved.get("iter_num", 0), saved.get("best_val_loss", math.inf)
    log(f"step {step:,}, best val loss {loss:.4f}, tokenizer {tokenizer.name}")
    best = Path(config.out_dir) / checkpoint.BEST
    if best.exists() and (best_step := checkpoint.read_trailer(best)[0]) < step:
        log(f"the best val loss was at step {best_step:,}; --checkpoint=best samples from there")
    return model.to(device, pick_dtype(dtype, device)), tokenizer


def write_texts(model: GPT, tokenizer: Tokenizer, prompts: list[str], config: SampleConfig) -> None:
    """Generates and prints the texts, batch_size at a time, in the order of the prompts."""
    n = config.num_samples or (1 if config.prompts else 3)
    prompts = [prompt for prompt in prompts for _ in range(n)]
    rows = [prompt_ids(prompt, tokenizer, config.special_tokens) for prompt in prompts]
    longest, block_size = max(map(len, rows)), model.config.block_size
    if longest > block_size:
        log(
            f"a prompt has {longest:,} tokens, more than block_size={block_size}: of a longer text the model reads "
            f"the last {block_size // 2} to {block_size}"
        )
    texts = [Text(prompts[i], rows[i], config.seed + i, config, tokenizer) for i in range(len(rows))]
    began = time.perf_counter()
    for i in range(0, len(texts), config.batch_size):
        batch = slice(i, i + config.batch_size)
        write_batch(model, texts[batch], config)
    seconds, tokens = time.perf_counter() - began, sum(text.tokens for text in texts)
    log(f"texts {len(texts)}, tokens {tokens:,}, {seconds:.1f} s, {tokens / seconds:,.1f} tokens/s")


def write_score(model: GPT, tokenizer: Tokenizer, text: str, config: SampleConfig) -> None:
    """Prints the loss in nats per token, the perplexity, and bits per byte of UTF-8, comparable across vocabularies."""
    ids = encode(text, tokenizer, config.special_tokens)
    losses = score(model, ids, first_id(tokenizer), config.stride, config.batch_size)
    loss, size = losses.mean().item(), len(text.encode())
    perplexity, bits = math.exp(min(loss, 700)), losses.sum().item() / math.log(2) / size
    if config.json:
        numbers = dict(loss=loss, perplexity=perplexity, bits_per_byte=bits, tokens=len(losses), bytes=size)
        print(json.dumps(dict(file=config.score, **numbers)))
    else:
        print(f"loss {loss:.4f}, perplexity {perplexity:,.2f}, bits per byte {bits:.4f}")
        print(f"over {len(losses):,} tokens, {size:,} bytes")


def write_choices(model: GPT, tokenizer: Tokenizer, items: list[Item], config: SampleConfig) -> None:
    """Prints the accuracies on multiple-choice items, with the document separator before each prompt and without."""
    found = {}
    for separator in (True, False) if tokenizer.eot is not None else (False,):
        found[separator] = result = choose(model, tokenizer, items, config.batch_size, separator)
        if not config.json:
            line = ", ".join(f"{what} {result[n]:.4f} +- {result[n + '_error']:.4f}" for n, what in ACCURACIES.items())
            print(f"{line}, {len(items):,} items, {'with' if separator else 'without'} <|endoftext|> before the prompt")
    if config.json:
        print(json.dumps(dict(file=config.choices, **found[max(found)], without_separator=found[False])))


def main(argv: Sequence[str] | None = None) -> None:
    config = load_config(SampleConfig, argv)
    sys.stdout.reconfigure(errors="replace")  # a character that the terminal cannot show becomes a question mark
    if config.choices:
        items = read_items(config.choices)
        write_choices(*load(config), items, config)
    elif config.score:
        text = read_text("score", config.score)
        write_score(*load(config), text, config)
    elif config.interactive:
        interact(*load(config), config)
    else:
        prompts = read_prompts(config)
        write_texts(*load(config), prompts, config)


if __name__ == "__main__":
    run_script(main)

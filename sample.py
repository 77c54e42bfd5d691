"""Writes text with a trained model, as it is made; or measures the loss of a text.

    python sample.py --out_dir=out/quickstart
    python sample.py --out_dir=out/fineweb_4070 --start="The card" --num_samples=3 --temperature=0.7
    python sample.py --out_dir=out/fineweb_4070 --start=FILE:prompt.txt          # --start=- reads standard input
    python sample.py --out_dir=out/fineweb_4070 --prompts=prompts.txt --json     # one a line, in batches
    python sample.py --out_dir=out/fineweb_4070 --score=text.txt

Every text begins as a document of the training data does, with <|endoftext|>, and ends where the model ends it. Text is
on standard output, everything else on standard error.
"""

import codecs
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from onecard import checkpoint
from configurator import ConfigError, key, load_config, run_script
from onecard.generation import GenerationError, score, stream
from onecard.runtime import DeviceError, pick_device, pick_dtype
from onecard.tokenizer import TokenizerError, load_tokenizer


@dataclass(frozen=True)
class SampleConfig:
    # files
    out_dir: str = key("out", "folder that train.py wrote")
    checkpoint: str = key("latest", "which of its checkpoints", choices=("latest", "best"))
    # what is continued
    start: str = key("", "beginning of the text; FILE:name reads it from a file, - from standard input; empty: none")
    prompts: str = key("", "file with a beginning on each line, - for standard input; each is continued")
    num_samples: int = key(0, "texts for each beginning; 0: three of start, one of each line of prompts", low=0)
    batch_size: int = key(8, "texts made at a time: together faster, each alone slower", low=1)
    # how
    max_new_tokens: int = key(200, "longest text, in tokens", low=1)
    temperature: float = key(0.8, "below 1 bolder towards the likely, above 1 wilder; 0: always the likeliest", low=0.0)
    top_k: int = key(200, "draw among so many likeliest tokens only; 0: among all", low=0)
    top_p: float = key(1.0, "draw among the fewest tokens that have this probability together", low=0.0, high=1.0)
    min_p: float = key(0.0, "draw among tokens at least so likely, as a share of the likeliest", low=0.0, high=1.0)
    stop: str = key("", "a text ends before this, if it comes up ($'\\n' in a shell is the end of a line)")
    seed: int = key(1337, "text i is drawn with seed + i, whatever batch_size is", low=0)
    json: bool = key(False, "a line of JSON for each text: prompt, text, tokens, end, seed")
    # the loss of a text
    score: str = key("", "file of which the loss is measured, - for standard input; then no text is made")
    stride: int = key(0, "its windows are so many tokens apart; 0: block_size; fewer: more context, more work", low=0)
    # system
    device: str = key("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: str = key(
        "auto", "of weights and products; auto: float32 for score", choices=("auto", "float32", "bfloat16", "float16")
    )

    def problems(self):
        given = [f"{name}={getattr(self, name)!r}" for name in ("start", "prompts", "score") if getattr(self, name)]
        return [f"{' and '.join(given)} exclude each other: give one of them"] if len(given) > 1 else []


# ---- what is given: files, standard input, a checkpoint


def read_text(name, source):
    """The text in the file `source`, or on standard input for "-", as it is. `name`: the key that named it."""
    where = "standard input" if source == "-" else source
    try:
        text = (sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()).decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{name}: {where} cannot be read ({error.strerror}); give the path of a text file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: {where} is not UTF-8 (byte {error.start:,}); save it as UTF-8") from None
    if not text:
        raise ConfigError(f"{name}: {where} is empty; there has to be text in it")
    return text


def read_prompts(config):
    """-> the beginnings to continue, as texts."""
    if config.prompts:
        lines = [line.removesuffix("\r") for line in read_text("prompts", config.prompts).split("\n")]
        lines = lines if lines[-1] else lines[:-1]  # behind the last end of a line is no line
        if "" in lines:
            line = lines.index("") + 1
            raise ConfigError(
                f"prompts: line {line} of {config.prompts} is empty; write a beginning there, or take it out"
            )
        return lines
    if config.start == "-" or config.start.startswith("FILE:"):
        return [read_text("start", config.start.removeprefix("FILE:"))]
    try:
        config.start.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"start: character {error.start + 1} is not UTF-8; check how the shell passes it") from None
    return [config.start]


def load(config, tokenizer):
    """-> the model on its device, its weights in the dtype that is multiplied in: cast once, not for each token."""
    device = pick_device(config.device)
    dtype = "float32" if config.score and config.dtype == "auto" else config.dtype
    path = Path(config.out_dir) / (checkpoint.LATEST if config.checkpoint == "latest" else checkpoint.BEST)
    model, saved = checkpoint.load_model(path)
    if model.config.vocab_size < tokenizer.n_vocab:
        raise ConfigError(
            f"{path} has vocab_size={model.config.vocab_size}, less than the {tokenizer.n_vocab} ids of GPT-2's "
            "tokenizer: it was trained on other tokens, which cannot be written as text"
        )
    say(f"step {saved['iter_num']:,}, best val loss {saved['best_val_loss']:.4f}")
    return model.to(device, pick_dtype(dtype, device))


def say(text):
    print(text, file=sys.stderr, flush=True)


# ---- texts


class Text:
    """A text that grows by a token at a time, in whole characters; half a one at its very end is never shown.

    end: why it ended (endoftext, stop, max_new_tokens), "" while it has not.
    """

    def __init__(self, prompt, seed, stop, tokenizer):
        self.prompt, self.seed, self.stop, self.tokenizer = prompt, seed, stop, tokenizer
        self.text, self.tokens, self.end = "", 0, ""
        self.shown = 0  # characters of prompt and text
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")  # keeps the bytes of half a character

    def add(self, id):
        self.tokens += 1
        if id == self.tokenizer.eot:
            self.end = "endoftext"
            return
        searched = max(0, len(self.text) - len(self.stop))
        self.text += self.decoder.decode(self.tokenizer.decode_bytes([id]))
        found = self.text.find(self.stop, searched) if self.stop else -1
        if found >= 0:
            self.text, self.end = self.text[:found], "stop"

    def ready(self):
        """What can be shown and was not: all, but for an end that may be the beginning of `stop`."""
        begun = (n for n in range(min(len(self.stop), len(self.text)), 0, -1) if self.text.endswith(self.stop[:n]))
        held = 0 if self.end else next(begun, 0)
        whole = self.prompt + self.text
        begin, self.shown = self.shown, len(whole) - held
        return whole[begin : self.shown]

    def line(self):
        names = ("prompt", "text", "tokens", "end", "seed")
        return json.dumps({name: getattr(self, name) for name in names})


def show(texts, turn, as_json):
    """Prints what has been made of texts[turn], and if it has ended of the next ones -> whose turn it is then."""
    while turn < len(texts):
        text = texts[turn]
        if not as_json:
            print(text.ready(), end="", flush=True)
        if not text.end:
            break
        print(text.line() if as_json else "\n---------------", flush=True)
        turn += 1
    return turn


def write_texts(model, tokenizer, prompts, config):
    """Continues each prompt, batch_size texts at a time.

    A prompt that is too long for the network is no mistake: it is read as any long text is, and that is said.
    """
    n = config.num_samples or (1 if config.prompts else 3)
    prompts = [prompt for prompt in prompts for _ in range(n)]
    rows = [[tokenizer.eot, *tokenizer.encode(prompt).tolist()] for prompt in prompts]
    longest, block_size = max(map(len, rows)), model.config.block_size
    if longest > block_size:
        reads = f"of a longer text the model reads the last {block_size // 2} to {block_size} (generation.window_start)"
        say(f"a prompt has {longest:,} tokens, more than block_size={block_size}: {reads}")
    texts = [Text(prompt, config.seed + i, config.stop, tokenizer) for i, prompt in enumerate(prompts)]
    began = time.perf_counter()
    for i in range(0, len(texts), config.batch_size):
        batch = slice(i, i + config.batch_size)
        write_batch(model, rows[batch], texts[batch], tokenizer.eot, config)
    seconds, tokens = time.perf_counter() - began, sum(text.tokens for text in texts)
    say(f"texts {len(texts)}, tokens {tokens:,}, {seconds:.1f} s, {tokens / seconds:,.1f} tokens/s")


def write_batch(model, rows, texts, eot, config):
    """Makes these texts together; the first that has not ended is shown as it grows, the others behind it."""
    options = {name: getattr(config, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    options |= dict(seeds=[text.seed for text in texts], stop_id=eot, ended=set())
    turn = 0
    for ids in stream(model, rows, config.max_new_tokens, **options):
        for i, id in enumerate(ids):
            if id is not None:
                texts[i].add(id)
                if texts[i].end:
                    options["ended"].add(i)
        turn = show(texts, turn, config.json)
    for text in texts:
        text.end = text.end or "max_new_tokens"
    show(texts, turn, config.json)


# ---- the loss of a text


def write_score(model, tokenizer, text, config):
    """Prints loss in nats a token, perplexity, and bits per byte of UTF-8, which compares across vocabularies."""
    losses = score(model, tokenizer.encode(text).astype("int64"), tokenizer.eot, config.stride, config.batch_size)
    size, loss = len(text.encode()), losses.mean().item()
    bits = losses.sum().item() / math.log(2) / size
    found = dict(loss=loss, perplexity=math.exp(min(loss, 700)), bits_per_byte=bits, tokens=len(losses), bytes=size)
    if config.json:
        print(json.dumps(dict(file=config.score, **found)))
    else:
        print(f"loss {loss:.4f}, perplexity {found['perplexity']:,.2f}, bits per byte {bits:.4f}")
        print(f"over {len(losses):,} tokens, {size:,} bytes")


def main(argv=None):
    config = load_config(SampleConfig, argv)
    tokenizer = load_tokenizer()
    given = read_text("score", config.score) if config.score else read_prompts(config)
    model = load(config, tokenizer)
    if config.score:
        write_score(model, tokenizer, given, config)
        return
    sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows a question mark
    write_texts(model, tokenizer, given, config)


if __name__ == "__main__":
    run_script(main, DeviceError, TokenizerError, GenerationError, checkpoint.CheckpointError)

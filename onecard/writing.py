"""Texts that are printed while they grow: a batch of them, or one after the other in a terminal.

    write_batch(model, [Text("The", ids, seed=1, config=config, tokenizer=tokenizer)], config)
    interact(model, tokenizer, config)

config is sample.py's: temperature, top_k, top_p, min_p, max_new_tokens, stop, seed, json, special_tokens, compile.
"""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from configurator import ConfigError, changed, load_config
from model import GPT
from onecard.generation import generate, stream
from onecard.tokenizer import Tokenizer, TokenizerError

HELP = "Type the beginning of a text. Enter alone continues the last text, Ctrl-C stops a text, /quit ends."
COMMANDS = ("temperature", "top_k", "top_p", "min_p", "max_new_tokens", "seed")


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def read_text(name: str, source: str) -> str:
    """The text of the file `source`, or of standard input for "-". Raises ConfigError, which names the key `name`."""
    where = "standard input" if source == "-" else source
    try:
        text = (sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()).decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{name}: {where} cannot be read ({error.strerror}); give the path of a text file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: {where} is not UTF-8 (byte {error.start:,}); save it as UTF-8") from None
    if not text:
        raise ConfigError(f"{name}: {where} is empty; give a file with text")
    return text


def encode(text: str, tokenizer: Tokenizer, special_tokens: bool) -> list[int]:
    """The ids of a text. With special_tokens, `<|endoftext|>` in it is the document separator."""
    if tokenizer.eot is None:
        return tokenizer.encode(text).tolist()
    mark = tokenizer.decode([tokenizer.eot])
    if mark in text and not special_tokens:
        log(f"{mark} is read as {len(tokenizer.encode(mark))} tokens of text; with --special_tokens=True it is one")
    ids: list[int] = []
    for part in text.split(mark) if special_tokens else [text]:
        ids += [tokenizer.eot, *tokenizer.encode(part).tolist()]
    return ids[1:]  # the separator stands between the parts


def first_id(tokenizer: Tokenizer) -> int:
    """The id before a text: the document separator. Characters have none: a line end, as in nanoGPT, or else id 0."""
    if tokenizer.eot is not None:
        return tokenizer.eot
    try:
        return int(tokenizer.encode("\n")[0])
    except TokenizerError:
        return 0


def sample_texts(model: GPT, tokenizer: Tokenizer, n: int = 3, max_new_tokens: int = 100) -> list[str]:
    """n texts from the beginning of a document, with the same seeds every time; no effect on a training run."""
    training, prompts, seeds = model.training, [[first_id(tokenizer)]] * n, range(1337, 1337 + n)
    model.eval()
    try:
        rows = generate(model, prompts, max_new_tokens, seeds=seeds, stop_id=tokenizer.eot, temperature=0.8, top_k=200)
    finally:
        model.train(training)
    return [tokenizer.decode([id for id in row[1:] if id != tokenizer.eot]) for row in rows]


def prompt_ids(prompt: str, tokenizer: Tokenizer, special_tokens: bool) -> list[int]:
    """The ids that the model reads first. Without a document separator a prompt stands alone, as in nanoGPT."""
    ids = encode(prompt, tokenizer, special_tokens)
    begun = ids and ids[0] == tokenizer.eot  # only with special_tokens
    return ids if ids and (tokenizer.eot is None or begun) else [first_id(tokenizer), *ids]


def write_samples(run: Any) -> None:
    """Prints three texts of a training run (train.py's Run) and records them. What fails here does not end the run."""
    step, print0 = run.progress.step, run.runtime.print0
    try:
        with run.runtime.autocast():
            texts = sample_texts(run.model, run.tokenizer)
        print0(f"step {step}: samples\n" + "\n---------------\n".join(texts))
    except Exception as error:
        print0(f"step {step}: no samples: {' '.join(str(error).split())[:200]!a}")
    else:
        run.record("samples", texts=texts)


class Text:
    """A text that grows by one token at a time and is shown in whole characters."""

    def __init__(self, prompt: str, ids: list[int], seed: int, config: Any, tokenizer: Tokenizer):
        self.prompt, self.ids, self.seed, self.eot = prompt, ids, seed, tokenizer.eot
        self.stop, self.max_tokens = config.stop, config.max_new_tokens
        self.text, self.tokens = "", 0
        self.end = ""  # why it ended: endoftext, stop or max_new_tokens
        self.shown = 0  # characters of prompt and text
        self.decode = tokenizer.decoder(ids)  # keeps the bytes of an incomplete character

    def add(self, id: int) -> None:
        """Appends one token. Sets `end` if it is the last one."""
        self.tokens += 1
        if self.tokens == self.max_tokens:
            self.end = "max_new_tokens"
        if id == self.eot:
            self.end = "endoftext"
            return
        searched = max(0, len(self.text) - len(self.stop))
        self.text += self.decode(id)
        found = self.text.find(self.stop, searched) if self.stop else -1
        if found >= 0:
            self.text, self.end = self.text[:found], "stop"

    def take_new(self) -> str:
        """The characters that were not shown yet, except an end that may be the beginning of `stop`."""
        whole = self.prompt + self.text
        begin, self.shown = self.shown, len(whole) - (0 if self.end else self.partial_stop())
        return whole[begin : self.shown]

    def partial_stop(self) -> int:
        """The length of the longest end of the text that is a beginning of `stop`."""
        lengths = range(len(self.stop), 0, -1)
        return next((n for n in lengths if self.text.endswith(self.stop[:n])), 0)

    def json_line(self) -> str:
        return json.dumps({name: getattr(self, name) for name in ("prompt", "text", "tokens", "end", "seed")})


def write_batch(model: GPT, texts: list[Text], config: Any) -> None:
    """Generates these texts together and prints them in order. The first that has not ended is printed as it grows."""
    sampling = dict(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, min_p=config.min_p)
    seeds, ended = [text.seed for text in texts], set[int]()
    options = dict(seeds=seeds, ended=ended, compile=config.compile) | sampling
    steps = stream(model, [text.ids for text in texts], config.max_new_tokens, **options)
    for text in texts:
        while not text.end:
            if not config.json:
                print(text.take_new(), end="", flush=True)
            for i, id in next(steps).items():
                texts[i].add(id)
                if texts[i].end:
                    ended.add(i)
        print(text.json_line() if config.json else text.take_new() + "\n---------------", flush=True)


def interact(model: GPT, tokenizer: Tokenizer, config: Any) -> None:
    """Reads a line, writes its continuation, and so on, until /quit or the end of the input."""
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401 (with it, input() edits a line and recalls earlier ones)
    log(f"{HELP}\n{settings(config)}")
    text = ""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            log("")
            return
        except KeyboardInterrupt:
            log("\n/quit ends")
            continue
        if line.strip() == "/quit":
            return
        if line.startswith("/"):
            config = change(config, line)
            continue
        prompt = line or text
        try:
            grown = Text(prompt, prompt_ids(prompt, tokenizer, config.special_tokens), config.seed, config, tokenizer)
        except TokenizerError as error:
            log(str(error))
            continue
        try:
            write_batch(model, [grown], config)
        except KeyboardInterrupt:
            print(grown.take_new(), flush=True)
        text, config = grown.prompt + grown.text, changed(config, seed=config.seed + 1)


def settings(config: Any) -> str:
    return "Settings: " + "  ".join(f"/{name} {getattr(config, name):g}" for name in COMMANDS)


def change(config: Any, line: str) -> Any:
    """The config after a line such as "/temperature 0.5"; the same, and a message, if that is impossible."""
    name, _, value = line[1:].partition(" ")
    if name not in COMMANDS or not value.strip():
        log(f"{line} changes nothing. {settings(config)}")
        return config
    try:
        given = load_config(type(config), [f"--{name}={value.strip()}"])
    except ConfigError as error:
        log(str(error).removeprefix("command line: --"))
        return config
    return changed(config, **{name: getattr(given, name)})

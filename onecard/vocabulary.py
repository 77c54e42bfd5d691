"""A tokenizer's vocabulary in the files of other programs: Hugging Face's tokenizer.json, GGUF, GPT-2's vocab.json.

text = tokenizer_json(tokenizer)                # the same ids in transformers
tokenizer = folder_tokenizer(Path("FOLDER"), {})  # the way back
"""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from onecard.tokenizer import ENDOFTEXT, LETTERS, Tokenizer, TokenizerError, from_state, load_tokenizer


def vocabulary(tokenizer: Tokenizer) -> dict[str, int]:
    """{token: id} of characters, of bytes or of GPT-2, the latter two in GPT-2's alphabet and without <|endoftext|>."""
    if tokenizer.kind == "chars":
        tokens = json.loads(tokenizer.content or "")
    else:
        tokens = ["".join(LETTERS[byte] for byte in token) for token in tokenizer.token_bytes[: tokenizer.eot]]
    return {token: i for i, token in enumerate(tokens)}


def merges(ids: dict[str, int]) -> list[str]:
    """{token: id} -> ["left right"] in the order in which byte pair encoding learned them: that of the ids.

    The two parts of a token are what the merges before it make of its letters.
    """
    pairs = []
    for token in ids:
        parts = list(token)
        while len(parts) > 2 and token != ENDOFTEXT:
            ranks = [ids.get(a + b, len(ids)) for a, b in pairwise(parts)]
            i = ranks.index(min(ranks))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            pairs.append(" ".join(parts))
    return pairs


def tokenizer_json(tokenizer: Tokenizer) -> str:
    """The text of a tokenizer.json with the same ids: the tokenizer's own, or made from its vocabulary."""
    if tokenizer.kind == "bpe":
        return tokenizer.content or ""
    ids = vocabulary(tokenizer)
    if tokenizer.kind == "chars":
        split = dict(type="Split", pattern=dict(Regex=r"[\s\S]"), behavior="Isolated", invert=False)
        steps: dict = dict(added_tokens=[], pre_tokenizer=split, decoder=dict(type="Fuse"))
        model = dict(type="WordLevel", vocab=ids, unk_token="")  # no token: other characters are an error
    else:
        ids |= {ENDOFTEXT: len(ids)}  # its id is eot
        level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
        flags = dict(special=True, normalized=False, single_word=False, lstrip=False, rstrip=False)
        special = dict(flags, id=tokenizer.eot, content=ENDOFTEXT)
        steps = dict(added_tokens=[special], pre_tokenizer=level, post_processor=level, decoder=level)
        model = dict(type="BPE", vocab=ids, merges=merges(ids))
    return json.dumps(dict(version="1.0", **steps, model=model), indent=1, ensure_ascii=False)


def gguf_tokenizer(tokenizer: Tokenizer, gguf: Any) -> dict[str, Any]:
    """The tokenizer's keys of a GGUF file, as arguments of GGUFWriter's add_ methods.

    Raises TokenizerError unless it is byte-level BPE with GPT-2's splitting: a file names a way to split text, and
    llama.cpp has code for each name.
    """
    content = json.loads(tokenizer_json(tokenizer))
    model, n_vocab, eot = content["model"], tokenizer.n_vocab, tokenizer.eot
    if model["type"] != "BPE" or model.get("ignore_merges") or not tokenizer.gpt2_split:
        reason = "only byte-level BPE with GPT-2's splitting of text can be written"
        raise TokenizerError(f"--to=gguf: {reason}, and the tokenizer {tokenizer.name} is of another kind: use --to=hf")
    special = {token["id"]: token["content"] for token in content.get("added_tokens") or []}
    tokens = {i: token for token, i in model["vocab"].items()} | special
    kinds = [gguf.TokenType.CONTROL if i == eot or i in special else gguf.TokenType.NORMAL for i in range(n_vocab)]
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    pairs = pairs or [f"{ENDOFTEXT} {ENDOFTEXT}"]  # llama.cpp needs a merge; bytes have none, and this one never occurs
    words = dict(token_list=[tokens.get(i, f"[unused {i}]") for i in range(n_vocab)], token_types=kinds)
    special_ids = dict(bos_token_id=eot, eos_token_id=eot, add_bos_token=True)  # the separator first, as in training
    return dict(tokenizer_model="gpt2", tokenizer_pre="gpt-2", token_merges=pairs) | words | special_ids


def folder_tokenizer(folder: Path, own: dict) -> Tokenizer:
    """The tokenizer of a Hugging Face folder: the one that the key "onecard" of its config names, GPT-2's (also where
    there is no file), or any other tokenizer.json. Raises TokenizerError.
    """
    tokenizer = from_state(own.get("tokenizer"))
    path = next((path for name in ("tokenizer.json", "vocab.json") if (path := folder / name).exists()), folder)
    if path != folder:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            theirs = content["model"]["vocab"] if path.name == "tokenizer.json" else content
            same = vocabulary(tokenizer).items() <= dict(theirs).items()
        except (ValueError, KeyError, TypeError) as error:
            raise TokenizerError(f"{path}: has no readable vocabulary ({error!r}): copy the folder again") from None
        if not same and path.name == "vocab.json":
            raise TokenizerError(f"{path}: not GPT-2's tokenizer; others are read from a tokenizer.json: add that file")
        tokenizer = tokenizer if same else load_tokenizer(str(path))
    return tokenizer

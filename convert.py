"""Converts weights between onecard's checkpoints and other programs' formats.

    python convert.py out/run --to=hf                # out/run/hf: transformers, lm-evaluation-harness, vLLM
    python convert.py out/run --to=gguf              # out/run/run.gguf: llama.cpp, Ollama
    python convert.py out/run --to=nanogpt           # out/run/nanogpt/ckpt.pt: nanoGPT's sample.py
    python convert.py FOLDER --to=onecard            # GPT-2 or Qwen3 in Hugging Face format -> out/FOLDER/ckpt.pt
    python convert.py nanoGPT/out/ckpt.pt --to=onecard

Any source goes to any target: onecard/pretrained.py reads, this file writes. The output is read back and compared
before it gets its final name. Nothing is ever overwritten.
"""

import contextlib
import io
import json
import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch

from configurator import key, load_config, run_script
from model import GPT, GPT2_IDS, NORM_EPS, ROPE_THETA, GPTConfig
from onecard import checkpoint, durable, metrics, pretrained
from onecard.pretrained import ConvertError, need
from onecard.tokenizer import ENDOFTEXT, HARD_STRINGS, Tokenizer, load_tokenizer

TOLERANCE = 1e-4  # largest permitted difference between our logits and transformers'
TEXT = Path(__file__).resolve().parent / "README.md"  # real text to compare ids and logits on
CARD = """---
library_name: transformers
pipeline_tag: text-generation
---
# {name}

{table}

The tokenizer is GPT-2's. Every training document began with `<|endoftext|>`, so begin each prompt with it, as in
`tokenizer("<|endoftext|>The", return_tensors="pt")`. Settings of the training run:

```json
{config}
```
"""


@dataclass(frozen=True)
class ConvertConfig:
    inputs: tuple[str, ...] = key(
        (), "a run's folder, a Hugging Face folder, a ckpt.pt of onecard or nanoGPT, or gpt2 ...", inputs=True
    )
    to: str = key("hf", "format to write", choices=("hf", "gguf", "nanogpt", "onecard"))
    out: str = key("", "folder (gguf: file) to write; empty: in the source's folder, for onecard out/NAME")
    checkpoint: str = key("latest", "which checkpoint of a run's folder", choices=("latest", "best"))

    def problems(self) -> list[str]:
        return [] if len(self.inputs) == 1 else ["give one source: python convert.py out/run --to=hf"]


# ---- what Hugging Face and GGUF share


def common_weights(model: GPT) -> dict[str, torch.Tensor]:
    """One table for embedding and head, without padding rows; zeros for the biases that GPT-2 has and we may not."""
    weights = model.state_dict()
    del weights["lm_head.weight"]
    for name, weight in list(weights.items()):
        if name.endswith("wte.weight"):
            weights[name] = weight[:GPT2_IDS]
        elif model.config.arch == "gpt2" and name.endswith(".weight") and not name.endswith("wpe.weight"):
            weights.setdefault(name.removesuffix("weight") + "bias", torch.zeros(len(weight)))
    return weights


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


# ---- Hugging Face: a folder with weights, config, tokenizer, model card


def write_hf(folder: Path, model: GPT, about: dict, name: str) -> None:
    """Writes a folder for transformers, lm-evaluation-harness and vLLM. Raises ConvertError if it differs when read."""
    need("transformers", "hf")
    save = need("safetensors.torch", "hf").save
    c, tokenizer, weights = model.config, load_tokenizer(), common_weights(model)
    theirs = {}
    for ours, weight in weights.items():
        theirs[pretrained.hf_name(ours, c.arch)] = pretrained.transposed(ours, weight, c.arch).contiguous()
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(save(theirs, metadata={"format": "pt"}))  # save_file hides a full disk
    special = dict(bos_token_id=tokenizer.eot, eos_token_id=tokenizer.eot)
    words = dict(bos_token=ENDOFTEXT, eos_token=ENDOFTEXT, unk_token=ENDOFTEXT, clean_up_tokenization_spaces=False)
    words |= dict(tokenizer_class="PreTrainedTokenizerFast", model_max_length=c.block_size)
    contents = {
        "config.json": hf_config(c, about) | special,
        "generation_config.json": special,
        "tokenizer.json": hf_tokenizer(tokenizer),
        "tokenizer_config.json": words,
    }
    for file, content in contents.items():
        (folder / file).write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    card = model_card(c, about, name, sum(weight.numel() for weight in weights.values()))
    (folder / "README.md").write_text(card, encoding="utf-8")
    check_hf(folder, model, tokenizer)


def hf_config(c: GPTConfig, about: dict) -> dict:
    """The content of config.json. Its key "onecard" holds what only the way back needs."""
    known = {k: about[k] for k in ("iter_num", "best_val_loss") if math.isfinite(about.get(k, math.inf))}
    own = dict(bias=c.bias, vocab_size=c.vocab_size, dropout=c.dropout, about=known)
    name = {"gpt2": "GPT2LMHeadModel", "qwen3": "Qwen3ForCausalLM"}[c.arch]
    config = dict(architectures=[name], vocab_size=min(c.vocab_size, GPT2_IDS), torch_dtype="float32", onecard=own)
    if c.arch == "gpt2":
        config |= dict(n_ctx=c.block_size, resid_pdrop=c.dropout, embd_pdrop=c.dropout, attn_pdrop=c.dropout)
    return pretrained.hf_network(c) | config


def hf_tokenizer(tokenizer: Tokenizer) -> dict:
    """The content of tokenizer.json: GPT-2's way to split a text, then byte pair encoding."""
    ids = pretrained.vocabulary(tokenizer)
    bpe = dict(type="BPE", vocab=ids, merges=merges(ids))
    level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    flags = dict(special=True, normalized=False, single_word=False, lstrip=False, rstrip=False)
    special = dict(id=tokenizer.eot, content=ENDOFTEXT) | flags
    content = dict(version="1.0", truncation=None, padding=None, normalizer=None, added_tokens=[special], model=bpe)
    return content | dict(pre_tokenizer=level, post_processor=level, decoder=level)


def model_card(c: GPTConfig, about: dict, name: str, parameters: int) -> str:
    """The folder's README.md: network, data, loss, use, and the settings without paths of this machine."""
    config = about.get("config", {})
    rows = {
        "network": f"{c.arch}, {c.n_layer} layers, {c.n_head} heads, width {c.n_embd}, context {c.block_size}",
        "parameters": f"{parameters:,}",
    }
    if about.get("data"):
        rows["data"] = f"{config.get('dataset')}, {about['data']['train_tokens']:,} training tokens"
        rows["trained on"] = f"{about['sequences'] * c.block_size:,} tokens in {about['iter_num']:,} steps"
    if "val_loss" in about:
        error = f" +- {about['val_error']:.4f} (standard error)" if "val_error" in about else ""
        rows["val loss"] = f"{about['val_loss']:.4f}{error} nats per token"
    if about.get("began_from"):
        rows["finetuned from"] = Path(about["began_from"]).name
    table = "\n".join(["| | |", "|---|---|", *[f"| {what} | {value} |" for what, value in rows.items()]])
    paths = ("out_dir", "data_dir", "init_from", "resume_from")
    settings = {k: v for k, v in config.items() if k not in paths}
    return CARD.format(name=name, table=table, config=json.dumps(settings, indent=1))


def last_evaluation(path: Path, step: int) -> dict[str, float]:
    """val_loss of this step and its standard error val_error, as far as the metrics.jsonl at `path` has them."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a line that a kill cut off
            row = json.loads(line)
            if row["kind"] == "eval" and row["step"] == step:
                return {name: row[name] for name in ("val_loss", "val_error") if name in row}
    return {}


@torch.no_grad()
def check_hf(folder: Path, model: GPT, tokenizer: Tokenizer) -> None:
    """Raises ConvertError unless transformers gets our ids and, within TOLERANCE, our logits from this folder."""
    transformers = need("transformers", "hf")
    transformers.utils.logging.disable_progress_bar()
    program, text = f"transformers {transformers.__version__}", TEXT.read_text(encoding="utf-8")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for string in (*HARD_STRINGS, text):
        ids = theirs(string, split_special_tokens=True, verbose=False)["input_ids"]
        if ids != tokenizer.encode(string).tolist():
            raise ConvertError(f"{program} gives other ids for {string[:40]!r}: install another version")
    copy, found = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values()), found  # a weight missing, unexpected, or of another shape
    ids = tokenizer.encode(text)
    T = min(model.config.block_size - 1, len(ids))
    starts = range(0, len(ids) - T + 1, T)[:4]  # the first windows of the text, each after <|endoftext|>
    idx = torch.tensor([[tokenizer.eot, *ids[i : i + T].tolist()] for i in starts])  # (B, T + 1)
    a, b = model(idx)[..., :GPT2_IDS], copy.eval()(idx).logits
    difference, same = (a - b).abs().max().item(), (a.argmax(-1) == b.argmax(-1)).sum().item()
    likeliest = f"same most likely token at {same:,} of {idx.numel():,} positions"
    print(f"{program}: same ids; logits differ by at most {difference:.1e}; {likeliest}")
    if not difference <= TOLERANCE:
        raise ConvertError(f"{program}: logits differ by {difference:.1e}, more than {TOLERANCE}; nothing was written")


# ---- GGUF: one file


def write_gguf(path: Path, model: GPT, about: dict, name: str) -> None:
    """Writes a float32 file for llama.cpp and Ollama. llama.cpp's llama-quantize makes it smaller."""
    c, gguf, ids = model.config, need("gguf", "gguf"), pretrained.vocabulary(load_tokenizer())
    if c.arch == "gpt2" and c.gelu != "tanh":
        reason = "this network has the exact GELU (gelu='none'), but llama.cpp computes GPT-2 with the tanh form alone"
        raise ConvertError(f"--to=gguf: {reason}: its loss would differ; use --to=hf, or train with gelu='tanh'")
    writer = gguf.GGUFWriter(path, c.arch)
    for what, value in gguf_keys(c, ids, gguf).items():
        getattr(writer, f"add_{what}")(value)
    writer.add_name(name)
    arch = {arch: number for number, arch in gguf.MODEL_ARCH_NAMES.items()}[c.arch]
    table, weights = gguf.get_tensor_name_map(arch, c.n_layer), {}  # transformers' names -> GGUF's
    for ours, weight in common_weights(model).items():
        there = table.get_name(pretrained.hf_name(ours, c.arch), try_suffixes=(".weight", ".bias"))
        weights[there] = weight.contiguous()
        writer.add_tensor(there, weights[there].numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    reader = gguf.GGUFReader(path)
    check_same(weights, {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}, path)
    if reader.fields["tokenizer.ggml.tokens"].contents() != list(ids):
        raise ConvertError(f"{path}: gguf reads back other tokens than it wrote; install another version of gguf")


def gguf_keys(c, ids, gguf):
    """The file's keys: network and tokenizer, as arguments of GGUFWriter's add_ methods."""
    eot = ids[ENDOFTEXT]
    network = dict(context_length=c.block_size, block_count=c.n_layer, embedding_length=c.n_embd, head_count=c.n_head)
    sizes = dict(feed_forward_length=c.n_inner, file_type=gguf.LlamaFileType.ALL_F32)
    D = c.n_embd // c.n_head
    if c.arch == "gpt2":
        network |= dict(layer_norm_eps=pretrained.LAYER_NORM_EPS)
    else:
        network |= dict(head_count_kv=c.n_head, key_length=D, value_length=D)
        network |= dict(layer_norm_rms_eps=NORM_EPS, rope_freq_base=ROPE_THETA)
    kinds = [gguf.TokenType.CONTROL if token == ENDOFTEXT else gguf.TokenType.NORMAL for token in ids]
    tokens = dict(tokenizer_model="gpt2", tokenizer_pre="gpt-2", token_list=list(ids), token_types=kinds)
    special = dict(bos_token_id=eot, eos_token_id=eot, add_bos_token=True)  # <|endoftext|> first, as in training
    return network | sizes | tokens | special | dict(token_merges=merges(ids))


# ---- checkpoints


def write_nanogpt(folder: Path, model: GPT, about: dict, name: str) -> None:
    """Writes a folder with a ckpt.pt for nanoGPT's sample.py: weights and sizes, no optimizer."""
    c = model.config
    if c.arch != "gpt2":
        raise ConvertError(f"--to=nanogpt: nanoGPT has only GPT-2's network, and this one is {c.arch}: use --to=hf")
    if c.gelu == "tanh":
        print("nanoGPT computes the exact GELU; this network was trained with the tanh form: logits differ slightly")
    args = {k: v for k, v in asdict(c).items() if k not in ("arch", "gelu")}
    state = dict(model=model.state_dict(), model_args=args, config={}, onecard={"gelu": c.gelu})
    state |= dict(iter_num=about.get("iter_num", 0), best_val_loss=about.get("best_val_loss", math.inf))
    folder.mkdir()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    (folder / "ckpt.pt").write_bytes(buffer.getbuffer())  # torch.save would hide a full disk
    check_same(model.state_dict(), pretrained.read_nanogpt(folder / "ckpt.pt")[0].state_dict(), folder)


def write_onecard(folder: Path, model: GPT, about: dict, name: str) -> None:
    """Writes a folder like a run's: for sample.py, for train.py's init_from, and to resume from."""
    state = dict(config={}, iter_num=0, best_val_loss=math.inf) | about
    state |= dict(model=model.state_dict(), model_args=asdict(model.config))
    folder.mkdir()
    checkpoint.write(folder / checkpoint.LATEST, state)
    check_same(model.state_dict(), checkpoint.load(folder / checkpoint.LATEST)["model"], folder)


def check_same(weights, copy, path):
    if weights.keys() != copy.keys() or not all(torch.equal(w, copy[name]) for name, w in weights.items()):
        raise ConvertError(f"{path}: other weights are read back than were written: check the disk and the memory")
    print(f"{len(weights)} tensors read back: identical bit for bit")


# ---- main


@contextlib.contextmanager
def new_path(path: Path) -> Iterator[Path]:
    """Gives the body a temporary path for the file or folder it makes; then syncs and renames it to `path`.

    Raises ConvertError if `path` exists or cannot be written. Nothing is left behind if the body fails.
    """
    if path.exists():
        raise ConvertError(f"{path} is there already: remove it, or give another --out")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(f".convert{durable.TEMPORARY}", f"{path.name}.", path.parent) as folder:
            temporary = Path(folder) / path.name
            yield temporary
            for file in (temporary, *temporary.rglob("*")):
                if file.is_file():
                    with open(file, "rb+") as opened:
                        os.fsync(opened.fileno())
            os.rename(temporary, path)
        durable.sync_folder(path.parent)
    except OSError as error:
        raise ConvertError(f"{durable.write_refused(path, error)}, or give another --out") from error


def output_path(config: ConvertConfig, folder: Path, name: str) -> Path:
    if config.out:
        return Path(config.out)
    if config.to == "onecard":
        return Path("out") / name
    if not folder.exists():  # weights that transformers downloads
        return Path("out") / f"{name}-{config.to}"
    return folder / (f"{name}.gguf" if config.to == "gguf" else config.to)


def main(argv: list[str] | None = None) -> None:
    config = load_config(ConvertConfig, argv)
    source = config.inputs[0]
    folder = Path(source).parent if Path(source).is_file() else Path(source)
    name = folder.resolve().name if folder.exists() else source
    path = output_path(config, folder, name)
    with new_path(path) as temporary:
        model, about = pretrained.read(source, config.checkpoint)
        c, step = model.config, about.get("iter_num", 0)
        print(f"{source}: {c.arch}, {model.num_params():,} parameters, step {step:,}")
        if c.vocab_size < GPT2_IDS and config.to in ("hf", "gguf"):
            reason = f"fewer than the {GPT2_IDS} ids of GPT-2's tokenizer, which --to={config.to} adds"
            raise ConvertError(f"{source}: vocab_size={c.vocab_size} is {reason}; use --to=nanogpt")
        about |= last_evaluation(folder / metrics.NAME, step)
        write = dict(hf=write_hf, gguf=write_gguf, nanogpt=write_nanogpt, onecard=write_onecard)[config.to]
        write(temporary, model, about, name)
    print(f"{path} is written")


if __name__ == "__main__":
    run_script(main)

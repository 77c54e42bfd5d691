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
import pickle
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from configurator import key, load_config, run_script
from model import GPT, NORM_EPS, ROPE_THETA, GPTConfig
from onecard import UserError, checkpoint, durable, metrics, modelcard, pretrained
from onecard.tokenizer import HARD_STRINGS, Tokenizer, from_state, need
from onecard.vocabulary import gguf_tokenizer, tokenizer_json, vocabulary

TOLERANCE = 1e-4  # largest permitted difference between our logits and transformers'
GGUF_TYPES = dict(float32=("F32", "ALL_F32"), float16=("F16", "MOSTLY_F16"), bfloat16=("BF16", "MOSTLY_BF16"))
TEXT = Path(__file__).resolve().parent / "README.md"  # real text to compare ids and logits on


@dataclass(frozen=True)
class ConvertConfig:
    inputs: tuple[str, ...] = key((), "folder of a run or in Hugging Face format, a ckpt.pt, or gpt2 ...", inputs=True)
    to: str = key("hf", "format to write", choices=("hf", "gguf", "nanogpt", "onecard"))
    out: str = key("", "folder (gguf: file) to write; empty: in the source's folder, for onecard out/NAME")
    checkpoint: str = key("latest", "which checkpoint of a run's folder", choices=("latest", "best"))
    dtype: str = key("float32", "of the weights in hf and gguf", choices=("float32", "bfloat16", "float16"))

    def problems(self) -> list[str]:
        found = [] if len(self.inputs) == 1 else ["give one source: python convert.py out/run --to=hf"]
        if self.dtype != "float32" and self.to not in ("hf", "gguf"):
            found.append(f"dtype={self.dtype!r}: a checkpoint keeps float32; leave out --dtype, or use --to=hf or gguf")
        return found


@dataclass
class Export:
    """What is written: a network, and what is known of it."""

    model: GPT  # its weights are rounded to dtype
    tokenizer: Tokenizer
    about: dict  # the rest of its checkpoint
    rows: list[dict]  # of its metrics.jsonl
    name: str
    dtype: str


def common_weights(model: GPT, n_ids: int) -> dict[str, torch.Tensor]:
    """One table of n_ids rows for embedding and head; zeros for the biases that GPT-2 has and we may not."""
    weights = model.state_dict()
    del weights["lm_head.weight"]
    for name, weight in list(weights.items()):
        if name.endswith("wte.weight"):
            weights[name] = weight[:n_ids]
        elif model.config.arch == "gpt2" and name.endswith(".weight") and not name.endswith("wpe.weight"):
            weights.setdefault(name.removesuffix("weight") + "bias", torch.zeros(len(weight)))
    return weights


def write_hf(folder: Path, export: Export) -> None:
    """Writes a folder for transformers, lm-evaluation-harness and vLLM. Raises UserError if it differs when read."""
    save = need("safetensors.torch", "hf").save
    model, tokenizer, c = export.model, export.tokenizer, export.model.config
    weights, theirs = common_weights(model, tokenizer.n_vocab), {}
    for ours, weight in weights.items():
        weight = pretrained.transposed(ours, weight, c.arch).to(getattr(torch, export.dtype)).contiguous()
        theirs[pretrained.hf_name(ours, c.arch)] = weight
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(save(theirs, metadata={"format": "pt"}))  # save_file hides a full disk
    special = dict(bos_token_id=tokenizer.eot, eos_token_id=tokenizer.eot, pad_token_id=tokenizer.eot)
    words = dict(tokenizer_class="PreTrainedTokenizerFast", model_max_length=c.block_size, padding_side="left")
    words |= dict(clean_up_tokenization_spaces=False)
    if tokenizer.eot is not None:
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        words |= dict.fromkeys(names, tokenizer.decode([tokenizer.eot]))
    contents = {
        "config.json": hf_config(c, tokenizer, export.about) | special | dict(dtype=export.dtype),
        "generation_config.json": special | modelcard.SAMPLING,
        "tokenizer.json": tokenizer_json(tokenizer),
        "tokenizer_config.json": words,
        "README.md": modelcard.model_card(export, parameters=sum(weight.numel() for weight in weights.values())),
    }
    for file, content in contents.items():
        text = content if isinstance(content, str) else json.dumps(content, indent=1, ensure_ascii=False)
        (folder / file).write_text(text, encoding="utf-8", newline="")
    check_hf(folder, model, tokenizer)


def hf_config(c: GPTConfig, tokenizer: Tokenizer, about: dict) -> dict:
    """The content of config.json. Its key "onecard" holds what only the way back needs."""
    known = {k: about[k] for k in ("iter_num", "best_val_loss") if math.isfinite(about.get(k, math.inf))}
    state = None if tokenizer.kind == "bpe" else tokenizer.state()  # a bpe tokenizer is its tokenizer.json
    own = dict(bias=c.bias, vocab_size=c.vocab_size, dropout=c.dropout, about=known, tokenizer=state)
    name = {"gpt2": "GPT2LMHeadModel", "qwen3": "Qwen3ForCausalLM"}[c.arch]
    config = dict(architectures=[name], vocab_size=tokenizer.n_vocab, onecard=own)
    if c.arch == "gpt2":
        config |= dict(n_ctx=c.block_size, resid_pdrop=c.dropout, embd_pdrop=c.dropout, attn_pdrop=c.dropout)
    return pretrained.hf_network(c) | config


@torch.no_grad()
def check_hf(folder: Path, model: GPT, tokenizer: Tokenizer) -> None:
    """Raises UserError unless transformers gets our ids and, within TOLERANCE, our logits from this folder.

    The logits are those of the rounded weights, computed in float32.
    """
    transformers = need("transformers", "hf")
    transformers.utils.logging.disable_progress_bar()
    program, theirs = f"transformers {transformers.__version__}", transformers.AutoTokenizer.from_pretrained(folder)
    strings = [*HARD_STRINGS, TEXT.read_text(encoding="utf-8")]
    if tokenizer.kind == "chars":
        known = vocabulary(tokenizer)
        strings = ["".join(character for character in string if character in known) for string in strings]
    for string in strings:
        ids = theirs(string, split_special_tokens=True, add_special_tokens=False, verbose=False)["input_ids"]
        if ids != tokenizer.encode(string).tolist():
            raise UserError(f"{program} gives other ids for {string[:40]!r}: install another version")
    load = transformers.AutoModelForCausalLM.from_pretrained
    copy, found = load(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(found.values()), found  # a weight missing, unexpected, or of another shape
    begin = [] if tokenizer.eot is None else [tokenizer.eot]
    ids = tokenizer.encode(strings[-1]).tolist()
    T = min(model.config.block_size - len(begin), len(ids))
    starts = range(0, len(ids) - T + 1, max(1, T))[:4]  # the first windows of the text, each as a document begins
    idx = torch.tensor([begin + ids[i : i + T] for i in starts])  # (B, at most block_size)
    a, b = model(idx)[..., : tokenizer.n_vocab], copy.eval()(idx, attention_mask=torch.ones_like(idx)).logits
    difference = (a - b).abs().max().item()
    print(f"{program}: same ids; logits differ by at most {difference:.1e} at {idx.numel():,} positions")
    if not difference <= TOLERANCE:
        raise UserError(f"{program}: logits differ by {difference:.1e}, more than {TOLERANCE}; nothing was written")


def write_gguf(path: Path, export: Export) -> None:
    """Writes a file for llama.cpp and Ollama, with matrices in this dtype. llama.cpp's llama-quantize shrinks it."""
    model, tokenizer, c, gguf = export.model, export.tokenizer, export.model.config, need("gguf", "gguf")
    if c.arch == "gpt2" and c.gelu != "tanh":
        reason = "this network has the exact GELU (gelu='none'), but llama.cpp computes GPT-2 with the tanh form alone"
        raise UserError(f"--to=gguf: {reason}: its loss would differ; use --to=hf, or train with gelu='tanh'")
    kind, files = GGUF_TYPES[export.dtype]
    matrices, vectors = gguf.GGMLQuantizationType[kind], gguf.GGMLQuantizationType.F32
    about = dict(name=export.name, file_type=getattr(gguf.LlamaFileType, files))
    writer = gguf.GGUFWriter(path, c.arch)
    for what, value in (about | gguf_network(c) | gguf_tokenizer(tokenizer, gguf)).items():
        getattr(writer, f"add_{what}")(value)
    arch = {arch: number for number, arch in gguf.MODEL_ARCH_NAMES.items()}[c.arch]
    table, weights = gguf.get_tensor_name_map(arch, c.n_layer), {}  # transformers' names -> GGUF's
    for ours, weight in common_weights(model, tokenizer.n_vocab).items():
        there = table.get_name(pretrained.hf_name(ours, c.arch), try_suffixes=(".weight", ".bias"))
        weights[there] = weight.contiguous()
        stored = matrices if weight.dim() > 1 and "position" not in there else vectors  # as llama.cpp's own converter
        writer.add_tensor(there, gguf.quants.quantize(weights[there].numpy(), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = gguf.GGUFReader(path).tensors
    check_same(weights, {t.name: torch.tensor(gguf.quants.dequantize(t.data, t.tensor_type)) for t in read}, path)


def gguf_network(c):
    """The network's keys of the file, as arguments of GGUFWriter's add_ methods."""
    network = dict(context_length=c.block_size, block_count=c.n_layer, embedding_length=c.n_embd, head_count=c.n_head)
    network |= dict(feed_forward_length=c.n_inner)
    if c.arch == "gpt2":
        return network | dict(layer_norm_eps=pretrained.LAYER_NORM_EPS)
    D = c.n_embd // c.n_head
    heads = dict(head_count_kv=c.n_head, key_length=D, value_length=D)
    return network | heads | dict(layer_norm_rms_eps=NORM_EPS, rope_freq_base=ROPE_THETA)


def write_nanogpt(folder: Path, export: Export) -> None:
    """Writes a folder for nanoGPT's sample.py: ckpt.pt without optimizer, and meta.pkl if the tokens are characters."""
    c, weights, tokenizer, about = export.model.config, export.model.state_dict(), export.tokenizer, export.about
    if c.arch != "gpt2":
        raise UserError(f"--to=nanogpt: nanoGPT has only GPT-2's network, and this one is {c.arch}: use --to=hf")
    if tokenizer.kind not in ("gpt2", "chars"):
        reason = f"nanoGPT's sample.py has GPT-2's tokenizer or characters, and this tokenizer is {tokenizer.name}"
        raise UserError(f"--to=nanogpt: {reason}: use --to=hf")
    if c.gelu == "tanh":
        print("nanoGPT computes the exact GELU; this network was trained with the tanh form: logits differ slightly")
    args = {k: v for k, v in asdict(c).items() if k not in ("arch", "gelu")}
    dataset = about.get("config", {}).get("dataset") or export.name
    folder.mkdir()
    if tokenizer.kind == "chars":
        n = args["vocab_size"] = tokenizer.n_vocab  # nanoGPT samples from all rows
        weights |= {k: weights[k][:n].clone() for k in ("transformer.wte.weight", "lm_head.weight")}
        ids = vocabulary(tokenizer)
        meta = dict(vocab_size=n, stoi=ids, itos={i: character for character, i in ids.items()})
        (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
        print(f"copy meta.pkl to data/{dataset}/meta.pkl in nanoGPT's folder: its sample.py reads the characters there")
    state = dict(model=weights, model_args=args, config=dict(dataset=dataset), onecard=dict(gelu=c.gelu))
    state |= dict(iter_num=about.get("iter_num", 0), best_val_loss=about.get("best_val_loss", math.inf))
    buffer = io.BytesIO()
    torch.save(state, buffer)
    (folder / "ckpt.pt").write_bytes(buffer.getbuffer())  # torch.save would hide a full disk
    check_same(weights, pretrained.read_nanogpt(folder / "ckpt.pt")[0].state_dict(), folder)


def write_onecard(folder: Path, export: Export) -> None:
    """Writes a folder like a run's: for sample.py, for train.py's init_from, and to resume from."""
    path, weights = folder / checkpoint.LATEST, export.model.state_dict()
    state = dict(config={}, iter_num=0, best_val_loss=math.inf) | export.about
    folder.mkdir()
    checkpoint.write(path, state | dict(model=weights, model_args=asdict(export.model.config)))
    check_same(weights, checkpoint.load(path)["model"], folder)


def check_same(weights, copy, path):
    if weights.keys() != copy.keys() or not all(torch.equal(w, copy[name]) for name, w in weights.items()):
        raise UserError(f"{path}: other weights are read back than were written: check the disk and the memory")
    print(f"{len(weights)} tensors read back: identical bit for bit")


@contextlib.contextmanager
def new_path(path: Path) -> Iterator[Path]:
    """Gives the body a temporary path for the file or folder it makes; then syncs and renames it to `path`.

    Raises UserError if `path` exists or cannot be written. Nothing is left behind if the body fails.
    """
    if path.exists():
        raise UserError(f"{path} is there already: give another --out")
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
        raise UserError(f"{durable.write_refused(path, error)}, or give another --out") from error


def output_path(config: ConvertConfig, folder: Path, name: str) -> Path:
    if config.out:
        return Path(config.out)
    if config.to == "onecard":
        return Path("out") / name
    folder = folder if folder.exists() else Path("out") / name  # of the hub
    return folder / (f"{name}.gguf" if config.to == "gguf" else config.to)


def main(argv: list[str] | None = None) -> None:
    config = load_config(ConvertConfig, argv)
    source = config.inputs[0]
    folder = Path(source).parent if Path(source).is_file() else Path(source)
    name = folder.resolve().name if folder.exists() else source
    path = output_path(config, folder, name)
    with new_path(path) as temporary:
        model, about = pretrained.read(source, config.checkpoint)
        c, step, tokenizer = model.config, about.get("iter_num", 0), from_state(about["tokenizer"])
        print(f"{source}: {c.arch}, {model.num_params():,} parameters, step {step:,}, tokenizer {tokenizer.name}")
        model = model.to(getattr(torch, config.dtype)).float()  # what is written, and compared, are rounded weights
        if not all(weight.isfinite().all() for weight in model.state_dict().values()):
            remedy = "use --dtype=bfloat16" if config.dtype == "float16" else "use an earlier checkpoint"
            raise UserError(f"{source}: weights are not finite in {config.dtype}; {remedy}")
        rows = modelcard.read_rows(folder / metrics.NAME)
        export = Export(model=model, tokenizer=tokenizer, about=about, rows=rows, name=name, dtype=config.dtype)
        write = dict(hf=write_hf, gguf=write_gguf, nanogpt=write_nanogpt, onecard=write_onecard)[config.to]
        write(temporary, export)
        if config.to == "gguf":
            with new_path(path.with_suffix(".Modelfile")) as beside:
                beside.write_text(modelcard.modelfile(path.name, c.block_size), encoding="utf-8")
    print(f"{path} is written")


if __name__ == "__main__":
    run_script(main)

"""Weights between a checkpoint of ours and other people's files; and the beginning of a finetuning run.

    python convert.py out/run --to=hf                # out/run/hf: transformers, lm-evaluation-harness, vLLM
    python convert.py out/run --to=gguf              # out/run/run.gguf: llama.cpp, Ollama
    python convert.py out/run --to=nanogpt           # out/run/nanogpt/ckpt.pt: nanoGPT's sample.py
    python convert.py FOLDER --to=onecard            # GPT-2 or Qwen3 in Hugging Face format -> out/FOLDER/ckpt.pt
    python convert.py nanoGPT/out/ckpt.pt --to=onecard

Any source goes to any target. What was written is read back, by transformers or by the format's own reader, and
compared before it gets its name. Nothing is ever written over.
"""

import contextlib
import importlib
import io
import itertools
import json
import math
import os
import pickle
import re
import secrets
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from onecard import checkpoint
from onecard import durable
from configurator import key, load_config, run_script
from model import GPT, GPT2_IDS, NORM_EPS, ROPE_THETA, GPTConfig, ModelError
from onecard.tokenizer import ENDOFTEXT, HARD_STRINGS, TokenizerError, load_tokenizer

HUB_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # OpenAI's weights, which transformers downloads
TOLERANCE = 1e-4  # largest difference of a logit from transformers'
LAYER_NORM_EPS = 1e-5  # GPT-2's, and torch's default
GELU_NAMES = {"gelu_pytorch_tanh": "gelu_new"}  # transformers has two names for the tanh form
TEXT = Path(__file__).resolve().parent / "README.md"  # the real text on which ids and logits are compared

NAMES = {  # of ours: in transformers' Qwen3 (its GPT-2 has our names), in GGUF
    "transformer.wte": ("model.embed_tokens", "token_embd"),
    "transformer.wpe": ("", "position_embd"),
    "transformer.ln_f": ("model.norm", "output_norm"),
    "ln_1": ("input_layernorm", "attn_norm"),
    "ln_2": ("post_attention_layernorm", "ffn_norm"),
    "attn.c_attn": ("", "attn_qkv"),
    "attn.q": ("self_attn.q_proj", "attn_q"),
    "attn.k": ("self_attn.k_proj", "attn_k"),
    "attn.v": ("self_attn.v_proj", "attn_v"),
    "attn.q_norm": ("self_attn.q_norm", "attn_q_norm"),
    "attn.k_norm": ("self_attn.k_norm", "attn_k_norm"),
    "attn.c_proj": ("self_attn.o_proj", "attn_output"),
    "mlp.c_gate": ("mlp.gate_proj", "ffn_gate"),
    "mlp.c_fc": ("mlp.up_proj", "ffn_up"),
    "mlp.c_proj": ("mlp.down_proj", "ffn_down"),
}

CARD = """---
library_name: transformers
pipeline_tag: text-generation
---
# {name}

{table}

Its tokenizer is GPT-2's. Each document of its data began with `<|endoftext|>`; begin a prompt with it.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".")
inputs = tokenizer("<|endoftext|>The", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50, do_sample=True, top_k=200)[0]))
```

The settings of the run:

```json
{config}
```
"""


@dataclass(frozen=True)
class ConvertConfig:
    inputs: tuple[str, ...] = key(
        (), "a run's folder or one in Hugging Face format, a ckpt.pt of ours or nanoGPT's, or gpt2 ...", inputs=True
    )
    to: str = key("hf", "format to write", choices=("hf", "gguf", "nanogpt", "onecard"))
    out: str = key("", "folder (gguf: file) to write; empty: in the source's folder, for onecard out/NAME")
    checkpoint: str = key("latest", "which checkpoint of a run's folder", choices=("latest", "best"))

    def problems(self):
        return [] if len(self.inputs) == 1 else ["give one source: python convert.py out/run --to=hf"]


class ConvertError(ValueError):
    """Weights that cannot be read or written, or that are others afterwards: which file, why, what to do."""


def need(module, extra):
    """An optional package, imported where it is needed. Raises ConvertError with the line that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConvertError(f"{module} cannot be used ({error}): pip install -e '.[{extra}]'") from error


def one_line(error):
    return " ".join(str(error).split())[:300]


# ---- in: any source -> (GPT in eval mode on the CPU, a dict of what is known about it)


def read(source, which="latest"):
    """source: what the command line names; which: latest or best -> (GPT, about). Raises ConvertError, CheckpointError.

    about is, of a checkpoint of ours, all but its weights and optimizer; of others, at most iter_num and best_val_loss.
    """
    path = Path(source)
    if not path.exists() and source not in HUB_NAMES:
        known = ", ".join(HUB_NAMES)
        raise ConvertError(f"{source}: there is no such file or folder; give one, or one of {known}")
    if not path.exists() or (path / "config.json").exists():
        return read_hf(source)
    if path.is_dir():
        path = path / (checkpoint.LATEST if which == "latest" else checkpoint.BEST)
    try:
        checkpoint.read_trailer(path)
    except checkpoint.CheckpointError:  # no onecard checkpoint
        return read_nanogpt(path)
    except FileNotFoundError:
        raise ConvertError(f"{path}: there is no such file, nor a config.json beside it; train first") from None
    except OSError as error:
        raise ConvertError(f"{path}: cannot be read ({error.strerror}); give a file that can be") from None
    model, about = checkpoint.load_model(path)
    return model, about | last_evaluation(path.parent / "metrics.jsonl", about["iter_num"])


def last_evaluation(path, step):
    """-> val_loss of this step and val_error, its standard error, as far as they are known."""
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):  # a line that was being written when the process was killed
            row = json.loads(line)
            if row["kind"] == "eval" and row["step"] == step:
                return {name: row[name] for name in ("val_loss", "val_error") if name in row}
    return {}


def build(args, weights, source):
    """-> GPT of these arguments with these weights. Raises ConvertError if they do not fit each other."""
    model = GPT(GPTConfig(**args))
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ConvertError(
            f"{source}: its weights do not fit the network that it describes: {one_line(error)}"
        ) from None
    return model.eval()


def read_nanogpt(path):
    """A ckpt.pt of nanoGPT's train.py, a compiled model's too. Its network has the exact GELU."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)  # never without: a pickle can run anything
        args, weights = dict(saved["model_args"]), dict(saved["model"])
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, KeyError, TypeError, ValueError) as error:
        what = "no whole checkpoint of onecard, nor one of nanoGPT's with tensors and plain values alone"
        raise ConvertError(f"{path}: {what} ({type(error).__name__}): give another, or copy it anew") from None
    weights = {name.removeprefix("module.").removeprefix("_orig_mod."): w for name, w in weights.items()}
    weights = {name: w for name, w in weights.items() if not name.endswith(".attn.bias")}  # masks, of old ones
    unknown = ", ".join(set(args) - set(GPTConfig.__dataclass_fields__))
    if unknown:
        raise ConvertError(f"{path}: its model_args has {unknown}, which nanoGPT's network does not have")
    args = {"bias": "transformer.ln_f.bias" in weights, "gelu": "none"} | args | saved.get("onecard", {})
    about = dict(iter_num=saved.get("iter_num", 0), best_val_loss=float(saved.get("best_val_loss", math.inf)))
    return build(args, weights, path), about


def read_hf(source):
    """A folder in Hugging Face format, or one of HUB_NAMES, by transformers."""
    transformers = need("transformers", "hf")
    transformers.utils.logging.disable_progress_bar()
    config = foreign(source, transformers.AutoConfig.from_pretrained, source)
    args, own = network_of(config, source)
    check_vocabulary(Path(source))
    load = transformers.AutoModelForCausalLM.from_pretrained
    model, found = foreign(source, load, source, output_loading_info=True)
    lost = [*found["missing_keys"], *found["mismatched_keys"]]
    if lost:
        raise ConvertError(f"{source}: weights are missing or of another shape, first {lost[0]}: copy the folder anew")
    theirs = {name: weight.float() for name, weight in model.state_dict().items()}
    return build(args, from_hf(theirs, args, source), source), own.get("about", {})


def foreign(source, function, *args, **options):
    """Calls a loading function of transformers, whose errors are of many kinds, and of many lines."""
    try:
        return function(*args, **options)
    except Exception as error:
        remedy = "" if Path(source).exists() else "; without a network give a folder that holds it"
        raise ConvertError(f"{source}: transformers cannot load it: {one_line(error)}{remedy}") from error


def network_of(config, source):
    """transformers' config -> (arguments of GPTConfig, our own key in it). ConvertError if model.py cannot be that."""
    own = getattr(config, "onecard", None) or {}
    if config.model_type not in ("gpt2", "qwen3"):
        raise ConvertError(f"{source}: a network of type {config.model_type}; gpt2 and qwen3 are known")
    args = dict(n_layer=config.num_hidden_layers, n_head=config.num_attention_heads, n_embd=config.hidden_size)
    args |= dict(arch=config.model_type, block_size=config.max_position_embeddings)
    args |= dict(bias=config.model_type == "gpt2", vocab_size=config.vocab_size)
    if config.model_type == "gpt2":
        gelu = config.activation_function = GELU_NAMES.get(config.activation_function, config.activation_function)
        args |= dict(gelu="none" if gelu == "gelu" else "tanh", dropout=config.resid_pdrop)
        config.n_inner = config.n_inner or 4 * config.n_embd
    else:
        config.rope_theta, config.rope_type = (config.rope_parameters[name] for name in ("rope_theta", "rope_type"))
    args |= {name: own[name] for name in ("bias", "vocab_size", "dropout") if name in own}
    asked = hf_network(GPTConfig(**args)) | dict(rope_type="default")
    differ = [f"{k}={getattr(config, k)} (ours: {v})" for k, v in asked.items() if getattr(config, k, v) != v]
    if differ:
        raise ConvertError(f"{source}: model.py cannot be this {config.model_type}: {', '.join(differ)}")
    return args, own


def check_vocabulary(folder):
    """Raises ConvertError if the folder has another tokenizer than GPT-2's: the ids would mean other texts."""
    for path in (folder / name for name in ("tokenizer.json", "vocab.json") if (folder / name).exists()):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            theirs = dict(content["model"]["vocab"] if path.name == "tokenizer.json" else content)
        except (ValueError, KeyError, TypeError) as error:
            raise ConvertError(f"{path}: no vocabulary can be read from it ({error!r}): copy the folder anew") from None
        for token, i in vocabulary(load_tokenizer()).items():
            if token != ENDOFTEXT and theirs.get(token) != i:
                ids = f"{token!r} is {theirs.get(token)}, GPT-2's is {i}"
                raise ConvertError(f"{path}: not GPT-2's tokenizer, the only one that onecard has: {ids}")


def from_hf(theirs, args, source):
    """transformers' weights -> ours: names, linear layers the other way round, biases dropped, vocabulary padded."""
    with torch.device("meta"):
        ours = GPT(GPTConfig(**args)).state_dict()
    names = {name: hf_name(name, args["arch"]) for name in ours if name != "lm_head.weight"}
    rest = set(theirs) - {*names.values(), "lm_head.weight"}
    wrong = [name for name in names.values() if name not in theirs]
    wrong += [name for name in rest if not name.endswith(".bias") or theirs[name].any()]
    if wrong:
        raise ConvertError(f"{source}: its weights do not fit the network that it describes, first {min(wrong)}")
    weights = {name: turned(name, theirs[there], args["arch"]) for name, there in names.items()}
    table = pad_rows(weights["transformer.wte.weight"], args["vocab_size"])
    return weights | {"transformer.wte.weight": table, "lm_head.weight": table}


def pad_rows(table, rows):
    """table (V, C) -> (rows, C). A new row is the mean of all, so that its logit is the mean logit: by Jensen's
    inequality k such rows raise no loss by more than ln(1 + k / V), which is 0.0009 for 47 behind GPT-2's 50257."""
    return torch.cat((table, table.mean(0, keepdim=True).expand(max(0, rows - len(table)), -1)))


def start(source, block_size, dropout):
    """What train.py begins a finetuning run with -> GPT in training mode, with this context and dropout.

    Positions past block_size are cut off. Raises ConvertError where there are not as many.
    """
    model, _ = read(source)
    args, weights = asdict(model.config), model.state_dict()
    if args["arch"] == "gpt2":
        if block_size > args["block_size"]:
            raise ConvertError(f"block_size={block_size}: {source} has {args['block_size']} positions: give fewer")
        weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"][:block_size]
    return build(args | dict(block_size=block_size, dropout=dropout), weights, source).train()


# ---- what the formats share: names, weights, vocabulary


def renamed(name, column, layer):
    """Our name of a weight -> that in a column of NAMES; layer: what "transformer.h.{}." is called there."""
    stem, _, kind = name.rpartition(".")
    found = re.fullmatch(r"transformer\.h\.(\d+)\.(.+)", stem)
    prefix, part = (layer.format(found[1]), found[2]) if found else ("", stem)
    return f"{prefix}{NAMES[part][column]}.{kind}"


def hf_name(name, arch):
    return renamed(name, 0, "model.layers.{}.") if arch == "qwen3" else name


def turned(name, weight, arch):
    """transformers keeps GPT-2's linear layers as (in, out); Qwen3's, like all of ours, are (out, in)."""
    return weight.t() if arch == "gpt2" and ".c_" in name and weight.dim() == 2 else weight


def common_weights(model):
    """Our weights as other programs want them: one table for embedding and head, without the rows that only pad the
    vocabulary, and zeros for the biases that GPT-2 has and this network has not."""
    weights = {name: weight for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"][:GPT2_IDS]
    if model.config.arch == "gpt2":
        for name in [name for name in weights if name.endswith(".weight") and not re.search(r"\.w[tp]e\.", name)]:
            weights.setdefault(name.removesuffix("weight") + "bias", torch.zeros(len(weights[name])))
    return weights


def vocabulary(tokenizer):
    """-> {token: id} of all 50257, in GPT-2's alphabet, in which each of the 256 bytes is a visible letter."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in visible}
    letters |= {byte: chr(256 + n) for n, byte in enumerate(sorted(set(range(256)) - set(visible)))}
    tokens = ("".join(letters[byte] for byte in tokenizer.decode_bytes([i])) for i in range(tokenizer.eot))
    return {token: i for i, token in enumerate(tokens)} | {ENDOFTEXT: tokenizer.eot}


def merges(ids):
    """{token: id} -> ["left right"] in the order in which byte pair encoding learned them, which the ids are: a token
    was made of the two parts to which the merges before it bring its letters."""
    pairs = []
    for token in ids:
        parts = list(token)
        while len(parts) > 2 and token != ENDOFTEXT:
            ranks = [ids.get(a + b, len(ids)) for a, b in itertools.pairwise(parts)]
            i = ranks.index(min(ranks))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            pairs.append(" ".join(parts))
    return pairs


# ---- out: each writer makes a file or folder at a temporary path, and checks it


def write_hf(folder, model, about, name):
    """A folder for transformers, and with it lm-evaluation-harness and vLLM: weights, tokenizer, model card."""
    need("transformers", "hf")
    tokenizer, arch, weights = load_tokenizer(), model.config.arch, common_weights(model)
    theirs = {hf_name(n, arch): turned(n, w, arch).contiguous() for n, w in weights.items()}
    folder.mkdir()
    data = need("safetensors.torch", "hf").save(theirs, metadata={"format": "pt"})
    (folder / "model.safetensors").write_bytes(data)  # here a full disk raises an OSError, in save_file it does not
    special = dict(bos_token_id=tokenizer.eot, eos_token_id=tokenizer.eot)
    words = dict(bos_token=ENDOFTEXT, eos_token=ENDOFTEXT, unk_token=ENDOFTEXT, clean_up_tokenization_spaces=False)
    words |= dict(tokenizer_class="PreTrainedTokenizerFast", model_max_length=model.config.block_size)
    files = {"config.json": hf_config(model.config, about) | special, "generation_config.json": special}
    files |= {"tokenizer.json": hf_tokenizer(tokenizer), "tokenizer_config.json": words}
    texts = {filename: json.dumps(content, indent=1, ensure_ascii=False) for filename, content in files.items()}
    texts |= {"README.md": model_card(model.config, about, name, sum(w.numel() for w in weights.values()))}
    for filename, text in texts.items():
        (folder / filename).write_text(text, encoding="utf-8")
    check_hf(folder, model, tokenizer)


def hf_network(c):
    """GPTConfig -> what transformers' config says of the network, all that is not its default in every version."""
    shared = dict(model_type=c.arch, tie_word_embeddings=True)
    if c.arch == "gpt2":
        sizes = dict(n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head, n_inner=c.n_inner)
        kind = dict(activation_function="gelu_new" if c.gelu == "tanh" else "gelu", layer_norm_epsilon=LAYER_NORM_EPS)
        kind |= dict(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
        return shared | sizes | kind
    sizes = dict(max_position_embeddings=c.block_size, hidden_size=c.n_embd, intermediate_size=c.n_inner)
    sizes |= dict(num_hidden_layers=c.n_layer, num_attention_heads=c.n_head, num_key_value_heads=c.n_head)
    sizes |= dict(head_dim=c.n_embd // c.n_head, rope_theta=ROPE_THETA, rms_norm_eps=NORM_EPS)
    return shared | sizes | dict(hidden_act="silu", attention_bias=False, use_sliding_window=False)


def hf_config(c, about):
    """The content of config.json. Its key "onecard" has what only our way back needs."""
    own = dict(bias=c.bias, vocab_size=c.vocab_size, dropout=c.dropout)
    own |= dict(about={k: about[k] for k in ("iter_num", "best_val_loss") if math.isfinite(about.get(k, math.inf))})
    name = {"gpt2": "GPT2LMHeadModel", "qwen3": "Qwen3ForCausalLM"}[c.arch]
    config = dict(architectures=[name], vocab_size=min(c.vocab_size, GPT2_IDS), torch_dtype="float32", onecard=own)
    if c.arch == "gpt2":
        config |= dict(n_ctx=c.block_size, resid_pdrop=c.dropout, embd_pdrop=c.dropout, attn_pdrop=c.dropout)
    return hf_network(c) | config


def hf_tokenizer(tokenizer):
    """The content of tokenizer.json: byte pair encoding behind GPT-2's own way to split a text."""
    ids = vocabulary(tokenizer)
    special = dict(id=tokenizer.eot, content=ENDOFTEXT, special=True, normalized=False)
    special |= dict(single_word=False, lstrip=False, rstrip=False)
    level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    parts = dict(normalizer=None, pre_tokenizer=level, post_processor=level, decoder=level)
    parts |= dict(added_tokens=[special], model=dict(type="BPE", vocab=ids, merges=merges(ids)))
    return dict(version="1.0", truncation=None, padding=None) | parts


def model_card(c, about, name, parameters):
    data, config, loss = about.get("data", {}), about.get("config", {}), about.get("val_loss")
    rows = {"network": f"{c.arch}, {c.n_layer} layers, {c.n_head} heads, width {c.n_embd}, context {c.block_size}"}
    rows |= {"parameters": f"{parameters:,}"}
    if data:
        rows |= {"data": f"{config.get('dataset')}, {data['train_tokens']:,} tokens to train on"}
        rows |= {"trained on": f"{about['sequences'] * c.block_size:,} tokens in {about['iter_num']:,} steps"}
    if loss is not None:
        error = f" +- {about['val_error']:.4f} (standard error)" if "val_error" in about else ""
        rows |= {"val loss": f"{loss:.4f}{error} nats a token"}
    if about.get("began_from"):
        rows |= {"began from": Path(about["began_from"]).name}
    config = {k: v for k, v in config.items() if k not in ("out_dir", "data_dir", "init_from", "resume_from")}  # paths
    table = "\n".join(["| | |", "|---|---|", *[f"| {what} | {value} |" for what, value in rows.items()]])
    return CARD.format(name=name, table=table, config=json.dumps(config, indent=1))


@torch.no_grad()
def check_hf(folder, model, tokenizer):
    """Raises ConvertError unless transformers gives our ids and, to within TOLERANCE, our logits from this folder."""
    transformers = need("transformers", "hf")
    transformers.utils.logging.disable_progress_bar()
    theirs, text = transformers.AutoTokenizer.from_pretrained(folder), TEXT.read_text(encoding="utf-8")
    for string in (*HARD_STRINGS, text):
        ids = theirs(string, split_special_tokens=True, verbose=False)["input_ids"]
        if ids != tokenizer.encode(string).tolist():
            raise ConvertError(f"transformers {transformers.__version__} gives other ids for {string[:40]!r}")
    idx = text_windows(text, tokenizer, model.config.block_size)
    copy, found = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values()), found  # a weight too many, too few, or of another shape
    a, b = model(idx)[..., :GPT2_IDS], copy.eval()(idx).logits
    difference, same = (a - b).abs().max().item(), (a.argmax(-1) == b.argmax(-1)).sum().item()
    likeliest = f"the likeliest token the same at {same:,} of {idx.numel():,}"
    print(f"transformers {transformers.__version__}: same ids; logits differ by up to {difference:.1e}; {likeliest}")
    if not difference <= TOLERANCE:
        raise ConvertError(
            f"transformers' logits differ by {difference:.1e}, more than {TOLERANCE}: nothing is written"
        )


def text_windows(text, tokenizer, block_size, most=4):
    """-> ids (B, T), B up to `most`: consecutive windows of a text, each led by <|endoftext|>."""
    ids = tokenizer.encode(text).tolist()
    T = min(block_size - 1, len(ids))
    return torch.tensor([[tokenizer.eot, *ids[i : i + T]] for i in range(0, len(ids) - T + 1, T)][:most])


def write_gguf(path, model, about, name):
    """One float32 file for llama.cpp and Ollama. (llama.cpp's llama-quantize makes smaller kinds of it.)"""
    c, gguf, tokenizer = model.config, need("gguf", "gguf"), load_tokenizer()
    if c.arch == "gpt2" and c.gelu != "tanh":
        raise ConvertError(
            "--to=gguf: this network has the exact GELU (gelu='none', as nanoGPT's), and llama.cpp computes GPT-2 with "
            "the tanh form alone, which gives another loss: use --to=hf, or train with the tanh form"
        )
    ids = vocabulary(tokenizer)
    kinds = [gguf.TokenType.CONTROL if token == ENDOFTEXT else gguf.TokenType.NORMAL for token in ids]
    keys = dict(name=name, file_type=gguf.LlamaFileType.ALL_F32, context_length=c.block_size, block_count=c.n_layer)
    keys |= dict(embedding_length=c.n_embd, feed_forward_length=c.n_inner, head_count=c.n_head)
    if c.arch == "gpt2":
        keys |= dict(layer_norm_eps=LAYER_NORM_EPS)
    else:
        keys |= dict(head_count_kv=c.n_head, key_length=c.n_embd // c.n_head, value_length=c.n_embd // c.n_head)
        keys |= dict(layer_norm_rms_eps=NORM_EPS, rope_freq_base=ROPE_THETA)
    keys |= dict(tokenizer_model="gpt2", tokenizer_pre="gpt-2", token_list=list(ids), token_types=kinds)
    keys |= dict(token_merges=merges(ids), bos_token_id=tokenizer.eot, eos_token_id=tokenizer.eot)
    keys |= dict(add_bos_token=True)  # a text begins with <|endoftext|>, as in training and in sample.py
    weights = {renamed(n, 1, "blk.{}."): w.contiguous() for n, w in common_weights(model).items()}
    writer = gguf.GGUFWriter(path, c.arch)
    for what, value in keys.items():
        getattr(writer, f"add_{what}")(value)
    for there, weight in weights.items():
        writer.add_tensor(there, weight.numpy())
    for part in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{part}_to_file")()
    writer.close()
    reader = gguf.GGUFReader(path)
    check_same(weights, {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}, path)
    if reader.fields["tokenizer.ggml.tokens"].contents() != list(ids):
        raise ConvertError(f"{path}: gguf reads other tokens back than were written; try another version of gguf")


def write_nanogpt(folder, model, about, name):
    """A folder with a ckpt.pt that nanoGPT's sample.py reads: weights and sizes, no optimizer."""
    c = model.config
    if c.arch != "gpt2":
        raise ConvertError(f"--to=nanogpt: nanoGPT has GPT-2's network alone, and this is {c.arch}: use --to=hf")
    if c.gelu == "tanh":
        print("nanoGPT has the exact GELU and this was trained with the tanh form: its logits will differ a little")
    args = {k: v for k, v in asdict(c).items() if k not in ("arch", "gelu")}
    state = dict(model=model.state_dict(), model_args=args, iter_num=about.get("iter_num", 0), config={})
    state |= dict(best_val_loss=about.get("best_val_loss", math.inf), onecard={"gelu": c.gelu})
    folder.mkdir()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    (folder / "ckpt.pt").write_bytes(buffer.getbuffer())  # a full disk raises an OSError here, not in torch.save
    check_same(model.state_dict(), read_nanogpt(folder / "ckpt.pt")[0].state_dict(), folder)


def write_onecard(folder, model, about, name):
    """A folder like a run's, for sample.py, for train.py's init_from, and to be taken further from."""
    state = dict(config={}, iter_num=0, best_val_loss=math.inf) | about
    state |= dict(model=model.state_dict(), model_args=asdict(model.config))
    folder.mkdir()
    checkpoint.write(folder / checkpoint.LATEST, state)
    check_same(model.state_dict(), checkpoint.load(folder / checkpoint.LATEST)["model"], folder)


def check_same(weights, copy, path):
    if weights.keys() != copy.keys() or not all(torch.equal(w, copy[name]) for name, w in weights.items()):
        raise ConvertError(f"{path}: other weights are read back than were written: is the disk or the memory damaged?")
    print(f"{len(weights)} tensors read back: the same, bit for bit")


@contextlib.contextmanager
def fresh(path):
    """Gives the body a temporary path beside `path` for the file or folder that it makes; syncs and renames it then.
    Raises ConvertError if `path` is there. Nothing stays behind where the body fails."""
    if path.exists():
        raise ConvertError(f"{path} is there already: remove it, or give another --out")
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{durable.TEMPORARY}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        for file in (p for p in (temporary, *temporary.rglob("*")) if p.is_file()):
            with open(file, "rb+") as opened:
                os.fsync(opened.fileno())
        os.rename(temporary, path)
        durable.sync_folder(path.parent)
    except OSError as error:
        raise ConvertError(f"{path} cannot be written ({error}): make room, or give another --out") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.unlink(missing_ok=True)


def target(config):
    """-> (path to write, name of the model)."""
    source = Path(config.inputs[0])
    folder = source.parent if source.is_file() else source
    name = folder.resolve().name if source.exists() else config.inputs[0]
    beside = folder / {"hf": "hf", "gguf": f"{name}.gguf", "nanogpt": "nanogpt", "onecard": ""}[config.to]
    elsewhere = Path("out") / (name if config.to == "onecard" else f"{name}-{config.to}")
    return Path(config.out or (elsewhere if config.to == "onecard" or not source.exists() else beside)), name


def main(argv=None):
    config = load_config(ConvertConfig, argv)
    path, name = target(config)
    with fresh(path) as temporary:
        model, about = read(config.inputs[0], config.checkpoint)
        c = model.config
        print(f"{config.inputs[0]}: {c.arch}, {model.num_params():,} parameters, step {about.get('iter_num', 0):,}")
        if c.vocab_size < GPT2_IDS and config.to in ("hf", "gguf"):
            raise ConvertError(
                f"vocab_size={c.vocab_size}: less than the {GPT2_IDS} ids of the tokenizer that goes along"
            )
        write = dict(hf=write_hf, gguf=write_gguf, nanogpt=write_nanogpt, onecard=write_onecard)[config.to]
        write(temporary, model, about, name)
    print(f"{path} is written")


if __name__ == "__main__":
    run_script(main, ConvertError, ModelError, TokenizerError, checkpoint.CheckpointError)

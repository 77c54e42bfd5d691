"""Weights of other programs in: Hugging Face folders (GPT-2, Qwen3), OpenAI's GPT-2 by name, nanoGPT's ckpt.pt.

    model, about = read("FOLDER")                               # what convert.py reads
    model, about = start("gpt2", block_size=1024, dropout=0.1)  # what train.py --init_from=gpt2 starts from

The one thing to know: a source is refused unless model.py computes exactly what its config describes, and unless its
tokenizer is known. The names of the weights in other formats stand here once; convert.py writes with the same tables.
"""

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from model import GPT, NORM_EPS, ROPE_THETA, GPTConfig
from onecard import UserError, checkpoint
from onecard.tokenizer import need
from onecard.vocabulary import folder_tokenizer

HUB_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # OpenAI's weights, downloaded by transformers
MOST_ROWS = 1.001  # times the vocabulary: it is padded again up to here, where that costs 0.001 of loss at most
LAYER_NORM_EPS = 1e-5  # GPT-2's, and torch's default
QWEN3_NAMES = {  # parts of our names -> of those in transformers' Qwen3; its GPT-2 has our names
    "transformer.wte.": "model.embed_tokens.",
    "transformer.ln_f.": "model.norm.",
    "transformer.h.": "model.layers.",
    ".ln_1.": ".input_layernorm.",
    ".ln_2.": ".post_attention_layernorm.",
    ".mlp.c_gate.": ".mlp.gate_proj.",
    ".mlp.c_fc.": ".mlp.up_proj.",
    ".mlp.c_proj.": ".mlp.down_proj.",
    ".attn.c_proj.": ".self_attn.o_proj.",
    ".attn.q.": ".self_attn.q_proj.",
    ".attn.k.": ".self_attn.k_proj.",
    ".attn.v.": ".self_attn.v_proj.",
    ".attn.": ".self_attn.",  # q_norm and k_norm; last, because it is a part of others
}


def one_line(error):
    return " ".join(str(error).split())[:300]


def read(source: str, which: str = "latest") -> tuple[GPT, dict]:
    """A run's folder, a Hugging Face folder, a ckpt.pt of onecard or nanoGPT, or a HUB_NAME -> (model, about).

    which: "latest" or "best", the checkpoint of a run's folder. The model is on the CPU in eval mode. about: all of a
    onecard checkpoint but its weights; of other sources "tokenizer" (a Tokenizer.state()) and at most iter_num and
    best_val_loss. Raises UserError.
    """
    path = Path(source)
    if not path.exists() and source not in HUB_NAMES:
        raise UserError(f"{source}: there is no such file or folder; give one, or one of {', '.join(HUB_NAMES)}")
    if not path.exists() or (path / "config.json").exists():
        return read_hf(source)
    if path.is_dir():
        path = path / (checkpoint.LATEST if which == "latest" else checkpoint.BEST)
    try:
        checkpoint.read_trailer(path)
    except checkpoint.CheckpointError:  # not written by onecard
        return read_nanogpt(path)
    except FileNotFoundError:
        reason = "there is no such file, and no config.json in its folder"
        remedy = "leave out --checkpoint=best" if which == "best" else "train first, or give the folder of another run"
        raise UserError(f"{path}: {reason}; {remedy}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a readable file") from None
    model, about = checkpoint.load_model(path)
    return model, about | dict(tokenizer=checkpoint.tokenizer_of(about, path).state())


def start(source: str, block_size: int, dropout: float) -> tuple[GPT, dict]:
    """(the model that a finetuning run starts from, in training mode, with this context and dropout; see `read`).

    Learned positions from block_size on are cut off. Raises UserError if the source has fewer positions.
    """
    model, about = read(source)
    args, weights = asdict(model.config), model.state_dict()
    if args["arch"] == "gpt2":
        if block_size > args["block_size"]:
            remedy = f"set block_size={args['block_size']} or less"
            raise UserError(f"block_size={block_size}: {source} has {args['block_size']} positions; {remedy}")
        weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"][:block_size]
    return build(args | dict(block_size=block_size, dropout=dropout), weights, source).train(), about


def build(args, weights, source):
    """The GPT with these arguments of GPTConfig and these weights, in eval mode. UserError if they do not fit."""
    try:
        model = GPT(GPTConfig(**args))
        model.load_state_dict(weights)
    except (RuntimeError, TypeError) as error:  # TypeError: an argument that GPTConfig does not have
        raise UserError(f"{source}: the weights do not fit the config beside them: {one_line(error)}") from None
    return model.eval()


def read_nanogpt(path: Path) -> tuple[GPT, dict]:
    """Reads the ckpt.pt of nanoGPT's train.py, also of a compiled or distributed run. Its GELU is exact."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)  # without it a pickle can run any code
        args, weights = dict(saved["model_args"]), dict(saved["model"])
        config = dict(dataset=dict(saved.get("config", {})).get("dataset", ""))
        moments = dict((saved.get("optimizer") or {}).get("state", {}))  # AdamW's: {number of a parameter: tensors}
    except Exception as error:  # torch.load raises any kind for bytes that are no checkpoint
        what = "not a whole checkpoint of onecard, nor one of nanoGPT with only tensors and plain values"
        raise UserError(f"{path}: {what} ({type(error).__name__}): copy it again, or give another file") from None
    if "version" in saved:  # a key of onecard's checkpoints: the SHA-256 at the end was lost
        raise UserError(f"{path}: damaged: a onecard checkpoint without its SHA-256 at the end: copy it again")
    weights = {name.removeprefix("module.").removeprefix("_orig_mod."): w for name, w in weights.items()}
    weights = {name: w for name, w in weights.items() if not name.endswith(".attn.bias")}  # masks of old checkpoints
    defaults = dict(bias="transformer.ln_f.bias" in weights, gelu="none")
    about: dict[str, Any] = dict(config=config, iter_num=saved.get("iter_num", 0))
    about["best_val_loss"] = float(saved.get("best_val_loss", math.inf))
    about["tokenizer"] = checkpoint.tokenizer_of(dict(config=config, model_args=args), path).state()
    if moments and all(set(state) == {"step", "exp_avg", "exp_avg_sq"} for state in moments.values()):
        about["adamw"] = moments
    return build(defaults | args | saved.get("onecard", {}), weights, path), about


def read_hf(source: str) -> tuple[GPT, dict]:
    """Reads a folder in Hugging Face format, or one of HUB_NAMES, with transformers."""
    transformers = need("transformers", "hf")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # its report of missing weights; the errors below name them
    config = call_transformers(source, transformers.AutoConfig.from_pretrained)
    args, own = network_of(config, source)
    tokenizer = folder_tokenizer(Path(source), own)
    if args["vocab_size"] < tokenizer.n_vocab:
        reason = f"vocab_size={args['vocab_size']} is less than the {tokenizer.n_vocab} ids of {tokenizer.name}"
        raise UserError(f"{source}: {reason}: put its own tokenizer.json beside it")
    model, found = call_transformers(
        source, transformers.AutoModelForCausalLM.from_pretrained, output_loading_info=True
    )
    bad = [*found["missing_keys"], *found["mismatched_keys"]]
    if bad:
        raise UserError(f"{source}: weights are missing or have the wrong shape, first {bad[0]}: copy it again")
    theirs = {name: weight.float() for name, weight in model.state_dict().items()}
    return build(args, from_hf(theirs, args), source), own.get("about", {}) | dict(tokenizer=tokenizer.state())


def call_transformers(source: str, load: Callable, **options) -> Any:
    """load(source, **options), a from_pretrained of transformers. Its many kinds of errors become a UserError."""
    try:
        return load(source, trust_remote_code=False, **options)  # None would ask the user whether to run its code
    except Exception as error:
        remedy = "copy the folder again" if Path(source).exists() else "without a network give a folder with its files"
        raise UserError(f"{source}: transformers cannot load it: {one_line(error)}; {remedy}") from error


def network_of(config: Any, source: str) -> tuple[dict, dict]:
    """transformers' config -> (arguments of GPTConfig, its key "onecard"). Refuses what model.py cannot be."""
    arch = config.model_type
    if arch not in ("gpt2", "qwen3"):
        raise UserError(f"{source}: the network has type {arch}; onecard reads gpt2 and qwen3")
    args = dict(arch=arch, bias=arch == "gpt2", vocab_size=config.vocab_size, block_size=config.max_position_embeddings)
    args |= dict(n_layer=config.num_hidden_layers, n_head=config.num_attention_heads, n_embd=config.hidden_size)
    if arch == "gpt2":
        if config.activation_function == "gelu_pytorch_tanh":  # the tanh form has two names
            config.activation_function = "gelu_new"
        config.n_inner = config.n_inner or 4 * config.n_embd
        args |= dict(gelu="none" if config.activation_function == "gelu" else "tanh", dropout=config.resid_pdrop)
    else:
        config.rope_theta, config.rope_type = config.rope_parameters["rope_theta"], config.rope_parameters["rope_type"]
    own = getattr(config, "onecard", None) or {}
    args |= {name: own[name] for name in ("bias", "dropout") if name in own}
    if config.vocab_size < own.get("vocab_size", 0) <= MOST_ROWS * config.vocab_size:
        args["vocab_size"] = own["vocab_size"]
    ours = hf_network(GPTConfig(**args)) | dict(rope_type="default")
    theirs = {name: getattr(config, name, value) for name, value in ours.items()}
    wrong = [f"{name}={theirs[name]} (must be {value})" for name, value in ours.items() if theirs[name] != value]
    if wrong:
        raise UserError(f"{source}: model.py cannot be this {arch} network: {', '.join(wrong)}; use another")
    return args, own


def hf_network(c: GPTConfig) -> dict[str, Any]:
    """What transformers' config says of this network: sizes, and the settings that its defaults could change."""
    shared = dict(model_type=c.arch, tie_word_embeddings=True)
    if c.arch == "gpt2":
        sizes = dict(n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head, n_inner=c.n_inner)
        attention = dict(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
        gelu = "gelu_new" if c.gelu == "tanh" else "gelu"
        return shared | sizes | attention | dict(activation_function=gelu, layer_norm_epsilon=LAYER_NORM_EPS)
    sizes = dict(max_position_embeddings=c.block_size, hidden_size=c.n_embd, intermediate_size=c.n_inner)
    layers = dict(num_hidden_layers=c.n_layer, hidden_act="silu", rms_norm_eps=NORM_EPS, rope_theta=ROPE_THETA)
    heads = dict(num_attention_heads=c.n_head, num_key_value_heads=c.n_head, head_dim=c.n_embd // c.n_head)
    return shared | sizes | layers | heads | dict(attention_bias=False, use_sliding_window=False)


def from_hf(theirs: dict, args: dict) -> dict[str, torch.Tensor]:
    """transformers' weights -> ours: renamed, transposed, without biases if bias=False, with a padded vocabulary."""
    with torch.device("meta"):
        ours = {hf_name(name, args["arch"]): name for name in GPT(GPTConfig(**args)).state_dict()}
    weights = {}
    for name, weight in theirs.items():
        if args["bias"] or not name.endswith(".bias") or weight.any():  # what does not fit must not be lost
            weights[ours.get(name, name)] = transposed(name, weight, args["arch"])
    table = pad_rows(weights["transformer.wte.weight"], args["vocab_size"])
    return weights | {"transformer.wte.weight": table, "lm_head.weight": table}


def pad_rows(table: torch.Tensor, rows: int) -> torch.Tensor:
    """table (V, C) -> (rows, C). Each new row is the mean of the V rows, so its logit is the mean logit.

    By Jensen's inequality k such rows raise no loss by more than ln(1 + k / V): 0.0009 for GPT-2's 47.
    """
    return torch.cat((table, table.mean(0, keepdim=True).expand(max(0, rows - len(table)), -1)))


def hf_name(name: str, arch: str) -> str:
    """Our name of a weight -> transformers'."""
    for ours, theirs in QWEN3_NAMES.items() if arch == "qwen3" else ():
        name = name.replace(ours, theirs)
    return name


def transposed(name: str, weight: torch.Tensor, arch: str) -> torch.Tensor:
    """transformers keeps GPT-2's linear layers as (in, out). Ours, and its Qwen3's, are (out, in)."""
    return weight.t() if arch == "gpt2" and ".c_" in name and weight.dim() == 2 else weight

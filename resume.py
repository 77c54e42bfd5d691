"""Which checkpoint a run goes on from, and whether it may: compared before anything is built. For train.py.

What makes a run that run (network, seed, tokens of a step, data) must not change; all else may, takes effect, is said.
"""

import math
from dataclasses import asdict, replace
from pathlib import Path

from onecard import checkpoint
from onecard import plan
from configurator import ConfigError, given

NETWORK = ("arch", "n_layer", "n_head", "n_embd", "vocab_size", "bias", "gelu")  # keys that foreign weights decide


def identity(config, data):
    """What makes a run that run: none of it may change when it is resumed (dropout apart)."""
    return (
        config.model_args()
        | dict(seed=config.seed, tokens_per_step=config.step_tokens, optimizer=config.optimizer)
        | data
    )


def data_identity(train_blocks, val_blocks):
    return {
        f"{name}_{what}": getattr(blocks, what)
        for name, blocks in (("train", train_blocks), ("val", val_blocks))
        for what in ("tokens", "fingerprint")
    }


def is_new(config):
    """Whether out_dir gets a new run, rather than more of the one that is in it."""
    if config.init_from == "auto":
        return not checkpoint.candidates(config.out_dir)
    return config.init_from != "resume"


def take_network(config, args, source):
    """-> config with the network of the weights in `source`, for the keys that the user has not set himself."""
    wrong = [name for name in NETWORK if name in given(config) and getattr(config, name) != args[name]]
    if wrong:
        values = ", ".join(f"{name}={args[name]!r}" for name in wrong)
        raise ConfigError(f"the weights of {source} have {values}: leave {', '.join(wrong)} out")
    return replace(config, **{name: args[name] for name in NETWORK})


def with_network(config, saved, path):
    """-> config with the network of the checkpoint `saved`, if its run began with foreign weights."""
    return take_network(config, saved["model_args"], path) if saved.get("began_from") else config


def as_begun(config, began_from):
    """-> config whose init_from is what the run began with, also when it is resumed: what plan.py has to know."""
    return replace(config, init_from=began_from) if began_from else config


def load_saved(config, data, say):
    """-> (the checkpoint to go on from, or None for a new run; config, with the network of foreign weights where the
    run began with those). Refuses what would make another run of it."""
    out_dir = Path(config.out_dir)
    existing = checkpoint.candidates(out_dir)
    if is_new(config):
        if existing and not config.overwrite and not config.eval_only:
            raise ConfigError(
                f"{existing[0]} holds a run: --init_from=resume goes on with it, --overwrite=True replaces it, another "
                "--out_dir keeps both"
            )
        if not config.resume_from:
            return None, config
        path, problems = Path(config.resume_from), []
        saved = checkpoint.load(path)
    else:
        saved, path, problems = checkpoint.load_newest(out_dir)
    for problem in problems:
        say(f"{problem}; going on from {path.name} of step {saved['iter_num']} instead")
    if "data" not in saved:
        raise ConfigError(f"{path} is no run to go on with, but weights to begin from: --init_from={path}")
    config = with_network(config, saved, path)
    known = type(config).__dataclass_fields__.keys()
    old = type(config)(**{k: v for k, v in saved["config"].items() if k in known})
    now, then = identity(config, data), identity(old, saved["data"])
    differ = [k for k in now if now[k] != then[k] and k != "dropout" and not (config.allow_new_data and k in data)]
    if differ:
        values = ", ".join(f"{k}={now[k]!r} (checkpoint: {then[k]!r})" for k in differ)
        purpose = "; --allow_new_data=True goes on with other data on purpose" if set(differ) & set(data) else ""
        raise ConfigError(f"{path} cannot go on with {values}: give the checkpoint's values, or start anew{purpose}")
    say_changes(old, config, saved["iter_num"], say)
    if saved["data"] != data:
        say(f"goes on with other data: {data['train_tokens']:,} tokens, {saved['data']['train_tokens']:,} before")
        if saved["data"]["val_fingerprint"] != data["val_fingerprint"]:
            saved["best_val_loss"] = math.inf
    return saved, config


def say_changes(old, config, step, say):
    """Names what a resumed run does otherwise than before; loudly, where the learning rate jumps by it."""
    unimportant = ("init_from", "overwrite", "out_dir", "data_dir", "dataset", "allow_new_data", "eval_only")
    pairs = {k: (getattr(old, k), v) for k, v in asdict(config).items() if k not in unimportant}
    changed = [f"{k} {a!r} -> {b!r}" for k, (a, b) in pairs.items() if a != b]
    if changed:
        say(f"resumed with other settings: {', '.join(changed)}")
    before, after = plan.learning_rate(step, old), plan.learning_rate(step, config)
    if not math.isclose(before, after, rel_tol=0.01):
        say(
            f"WARNING: with these settings the learning rate jumps from {before:.2e} to {after:.2e} at step {step}"
            + (": the loss will rise with it at first" if after > before else "")
        )

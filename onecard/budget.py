"""The best run for a budget of hours on one card: networks and token counts that fit its time and memory.

    python train.py --plan_only=True --gpu='RTX 4070' --budget_hours=24 --write_config=config/mine.py

The hours are modelled (plan.utilisation) and the losses are expected by the scaling law, where it is validated. The
differences between rows are more certain than the values.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from onecard import UserError
from onecard.cards import Card, card, similar
from onecard.durable import replacing
from onecard.law import Expected, critical_batch, expected_loss, law, usual_rate
from onecard.memory import BUDGET, GiB, network, trace_memory
from onecard.plan import DESKTOP, bytes_per_token, utilisation

SHAPES = ((6, 384), (8, 512), (12, 512), (12, 768), (16, 1024), (24, 1024), (24, 1536), (32, 2048))  # layers, width
HEAD = 64
MAX_MICRO_BATCH = 32
NEWER = dict(arch="qwen3", optimizer="normuon", lr_schedule="linear", bias=False)  # docs/recipe.md
SHOWN = 4  # networks in the table: the one with the lowest loss to expect and its rivals
EPOCHS = 4  # beyond so many passes over the data repeats help little (Muennighoff et al. 2023, arXiv 2305.16264)
WRITTEN = (  # keys of a written config
    "dataset arch n_layer n_head n_embd bias block_size activation_checkpointing tokens_per_step batch_size max_iters "
    "optimizer learning_rate lr_schedule min_lr warmup_iters weight_decay beta2 dropout eval_interval eval_tokens dtype"
)


class BudgetError(UserError):
    """A budget that cannot be planned: why, and what to do."""


class Row(NamedTuple):
    config: Any  # train.TrainConfig
    parameters: int
    tokens: int
    memory: float  # bytes at the peak of a step
    hours: float
    loss: Expected | None  # on FineWeb, where the law is validated
    rank: float  # the law's value for this size and these tokens, whatever the recipe: lower is better


def problems(config) -> list[str]:
    """What does not fit together in the keys about planning, one message each."""
    found = []
    if config.gpu and not config.plan_only:
        found.append(f"gpu={config.gpu!r} needs plan_only=True: a run uses the card of this machine")
    elif config.gpu and not card(config.gpu):
        near = similar(config.gpu)
        remedy = f"did you mean {' or '.join(map(repr, near))}?" if near else "'RTX 4070', 'RTX 5090', 'H100' are"
        found.append(f"gpu={config.gpu!r} is not a card that onecard knows; {remedy} (all: onecard/cards.py)")
    if config.budget_hours and not config.plan_only:
        found.append("budget_hours needs plan_only=True")
    if config.write_config:
        file = Path(config.write_config)
        if not config.budget_hours:
            found.append("write_config needs budget_hours, such as --budget_hours=24")
        if file.exists():
            found.append(f"write_config={file}: exists already; give another name, or delete it")
        elif file.suffix != ".py" or not file.parent.is_dir():
            found.append(f"write_config={file}: give a name that ends in .py, in a folder that exists")
    return found


def show(config, facts: dict, windows) -> None:
    """Prints the table for config.budget_hours, and writes the best row as a config if config.write_config names one.

    facts: of the device, as plan.plan has them; windows: of train and val, if there is a dataset. Raises BudgetError.
    """
    found = card(facts["device"], facts.get("sms"), facts.get("total_bytes"))
    if not found:
        raise BudgetError(f"budget_hours: the speed of {facts['device']} is not known; give --gpu='RTX 4070', say")
    free = facts.get("free_bytes") or DESKTOP * found.gib * GiB
    data = (windows[0].tokens, bytes_per_token(windows)) if windows else ()
    rows = choices(config, config.budget_hours, found, free, facts["dtype"], *data)
    chosen = best(rows)
    print(
        f"{config.budget_hours:g} hours on {found.name}, {free / GiB:.1f} GiB free; {config.arch}, {config.optimizer}"
    )
    print(*table(rows, chosen), sep="\n")
    print("*: the lowest loss to expect by the scaling law. Hours and memory are modelled.")
    newer = longest_run(replace(rows[chosen].config, **NEWER), config.budget_hours, found, facts["dtype"], *data)
    if config.arch == "gpt2" and newer and newer.loss:
        keys = " ".join(f"--{name}={NEWER[name]}" for name in ("arch", "optimizer", "lr_schedule"))
        keys += " --bias=False" if config.bias else ""
        print(f"The newer recipe (docs/recipe.md) should reach val loss {newer.loss} in the same hours: add {keys}")
    if config.write_config:
        write_config(config.write_config, rows[chosen], found.name)
        print(f"wrote {config.write_config}; next: python train.py {config.write_config}")
    else:
        print("add --write_config=config/mine.py to write it as a config")


def choices(
    config, hours: float, found: Card, free_bytes: float, dtype: torch.dtype, train_tokens=None, bytes_per_token=None
) -> list[Row]:
    """The best rows that fit, by size. config gives arch, optimizer, schedule and block_size.

    The loss to expect does not depend on memory, which takes seconds to predict: it is predicted for the best networks
    only. Raises BudgetError if nothing fits.
    """
    shapes = [replace(config, n_layer=layers, n_embd=width, n_head=width // HEAD) for layers, width in SHAPES]
    runs = [run for shape in shapes if (run := longest_run(shape, hours, found, dtype, train_tokens, bytes_per_token))]
    rows: list[Row] = []
    for run in tqdm(sorted(runs, key=lambda run: run.rank), desc="networks", leave=False, delay=2):
        row = with_micro_batch(run, free_bytes, dtype)
        if row:
            rows.append(row)
        if len(rows) == SHOWN:
            break
    if not rows:
        raise BudgetError(
            f"budget_hours={hours:g}: no network of the table fits {found.name} and trains 2,000 steps in that time; "
            "give more hours, or a smaller --block_size"
        )
    return sorted(rows, key=lambda row: row.parameters)


def longest_run(config, hours, found, dtype, train_tokens=None, bytes_per_token=None) -> Row | None:
    """This network on as many tokens as the hours allow, without a micro batch yet. None: they are too few."""
    model = network(config)
    counts, flops_per_token = model.parameter_counts(), model.flops_per_token()
    speed = found.tflops * 1e12 * utilisation(config.n_embd, found.tflops * 1e12)  # FLOP/s
    tokens = 0.97 * hours * 3600 * speed / flops_per_token  # the rest: evaluations and saves
    if train_tokens:
        tokens = min(tokens, EPOCHS * train_tokens)
    rank = law(counts["total"], tokens)
    sequences = int(min(critical_batch(rank), tokens / 2000)) // config.block_size  # of a step: at least 2,000 steps
    if not sequences:
        return None
    step_tokens = 2 ** (sequences.bit_length() - 1) * config.block_size  # the power of two below
    steps = int(tokens // step_tokens)
    rate = float(f"{usual_rate(counts['blocks'], config.optimizer):.1e}")
    config = replace(
        config,
        tokens_per_step=step_tokens,
        max_iters=steps,
        lr_decay_iters=0,
        warmup_iters=max(100, steps // 50),
        learning_rate=rate,
        min_lr=0.0 if config.lr_schedule == "linear" else rate / 10,
        eval_interval=max(1, steps // 40),
        eval_tokens=2**20,
        dropout=0.0,
        dtype=str(dtype).removeprefix("torch."),
    )
    rates = [rate, config.min_lr]  # the law asks for the first and the last one
    epochs = tokens / train_tokens if train_tokens else None
    loss, _ = expected_loss(config, rates, epochs, bytes_per_token)
    seconds = steps * step_tokens * flops_per_token / speed / 0.97
    return Row(config, counts["total"], steps * step_tokens, 0.0, seconds / 3600, loss, rank)


def with_micro_batch(row: Row, free_bytes: float, dtype: torch.dtype) -> Row | None:
    """The row with the largest micro batch that fits the memory, and the memory of its step; None if none fits."""
    size, limit = min(MAX_MICRO_BATCH, row.config.step_sequences), BUDGET * free_bytes  # size: a power of two
    if 12 * row.parameters > free_bytes:  # weights, gradients and one moment: Muon's state, AdamW needs more
        return None
    while size:
        config = replace(row.config, batch_size=size)
        parts = trace_memory(config, "cuda", dtype)
        memory, activations = sum(parts.values()), parts["activations and gradients"]
        if memory <= limit:
            return row._replace(config=config, memory=memory)
        size //= 2
        while size and memory - activations * (1 - size / config.batch_size) > limit:  # not less: gradients stay
            size //= 2
    return None


def best(rows: list[Row]) -> int:
    """The number of the row with the lowest loss to expect; a row for which none is known counts by its rank."""
    return min(range(len(rows)), key=lambda i: rows[i].loss.loss if rows[i].loss else rows[i].rank)


def table(rows: list[Row], chosen: int) -> list[str]:
    """The rows for a person; the chosen one is marked."""
    lines = ["  layers x width  parameters   tokens  a parameter  micro batch   memory  hours  val loss"]
    for i, row in enumerate(rows):
        c = row.config
        loss = row.loss or "not known"
        lines.append(
            f"{'*' if i == chosen else ' '} {c.n_layer:>6} x {c.n_embd:<6} {row.parameters / 1e6:>9.1f}M "
            f"{row.tokens / 1e9:>7.2f}B {row.tokens / row.parameters:>11.0f} {c.batch_size:>12} "
            f"{row.memory / GiB:>6.1f}GiB {row.hours:>6.1f}  {loss}"
        )
    return lines


def write_config(path: str, row: Row, card_name: str) -> None:
    """Writes the row as a config file. Raises BudgetError if it cannot be written."""
    c, file = row.config, Path(path)
    loss = f"Expect a val loss of {row.loss} on FineWeb." if row.loss else "No loss is expected."
    text = f'''"""{row.parameters / 1e6:.1f}M parameters on {row.tokens / 1e9:.2f}B tokens.

    python train.py {file.as_posix()}

About {row.hours:.1f} hours on {card_name}, modelled, not measured. {loss}
learning_rate is the usual one at this size (onecard/law.py).
"""

'''
    values = dict(out_dir=f"out/{file.stem}") | {name: getattr(c, name) for name in WRITTEN.split()}
    text += "".join(f"{name} = {value!r}\n" for name, value in values.items())
    try:
        with replacing(file) as handle:
            handle.write(text.encode())
    except OSError as error:
        raise BudgetError(f"write_config={path}: cannot be written ({error.strerror}); give another path") from None

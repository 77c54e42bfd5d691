"""Multiple-choice tests: which of several endings does a network think likeliest?

    items = read_items("hellaswag_val.jsonl")          # HellaSwag's own format, or prompt, choices, answer
    result = choose(model, tokenizer, items, batch_size=8)
    result["acc"], result["acc_norm"]

As in lm-evaluation-harness: an item is right if its answer has the largest log-likelihood of all choices (acc), or the
largest log-likelihood per character (acc_norm). The one thing to know: the document separator stands before each
prompt, as before every training document.
"""

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from model import GPT, IGNORE
from onecard import UserError
from onecard.tokenizer import Tokenizer, load_tokenizer
from onecard.writing import read_text


class Item(NamedTuple):
    prompt: str
    choices: list[str]  # each continues the prompt after a space
    answer: int  # number of the right choice


def read_items(path: str | Path) -> list[Item]:
    """The items of a .jsonl file. Raises UserError."""
    lines = read_text("choices", str(path)).split("\n")  # strings may hold other line separators
    items = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
            item = hellaswag(found) if "endings" in found else plain(found)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            wanted = 'write {"prompt": "...", "choices": ["...", "..."], "answer": 0}, or use HellaSwag\'s format'
            raise UserError(f"choices: line {number} of {path} is not an item ({error!r}); {wanted}") from None
        if not 0 <= item.answer < len(item.choices):
            raise UserError(f"choices: line {number} of {path}: there is no choice {item.answer}; count from 0")
        if not item.prompt.strip() or not all(item.choices):
            raise UserError(f"choices: line {number} of {path}: the prompt or a choice is empty; write one")
        items.append(item)
    if not items:
        raise UserError(f"choices: {path} is empty; give a .jsonl file with items")
    return items


def plain(found: dict) -> Item:
    return Item(str(found["prompt"]), [str(choice) for choice in found["choices"]], int(found["answer"]))


def hellaswag(found: dict) -> Item:
    """HellaSwag (Zellers et al. 2019), its texts cleaned as lm-evaluation-harness does."""

    def clean(text):
        text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
        return text.replace("  ", " ")

    prompt = clean(f"{found['activity_label']}: {found['ctx_a']} {found['ctx_b'].capitalize()}")
    return Item(prompt, [clean(ending) for ending in found["endings"]], int(found["label"]))


def rows_of(item: Item, tokenizer: Tokenizer, separator: bool) -> list[tuple[list[int], int]]:
    """For each choice: the ids of prompt and choice, and how many ids at the end are the choice's.

    The whole text is encoded at once. The spaces at the end of a prompt belong to the choice.
    """
    begin = [tokenizer.eot] if separator and tokenizer.eot is not None else []
    before = len(tokenizer.encode(item.prompt.rstrip()))
    rows = [tokenizer.encode(f"{item.prompt} {choice}").tolist() for choice in item.choices]
    return [(begin + ids, len(ids) - before) for ids in rows]


@torch.no_grad()
def choose(
    model: GPT, tokenizer: Tokenizer, items: list[Item], batch_size: int = 8, separator: bool = True
) -> dict[str, float | list]:
    """acc, acc_norm and their standard errors; choice and choice_norm: of each item the choice that was taken.

    A text longer than block_size loses its beginning.
    """
    rows = [row for item in items for row in rows_of(item, tokenizer, separator)]
    block_size, device = model.config.block_size, model.lm_head.weight.device
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))  # little padding
    likelihoods = torch.zeros(len(rows), dtype=torch.float64)
    for first in tqdm(range(0, len(rows), batch_size), desc="choices", delay=5, leave=False, disable=None):
        batch = order[first : first + batch_size]
        inputs, targets = [], []
        for ids, count in (rows[i] for i in batch):
            kept = torch.tensor(ids[-(block_size + 1) :])
            inputs.append(kept[:-1])
            targets.append(kept[1:].clone())
            targets[-1][: max(0, len(kept) - 1 - count)] = IGNORE  # the prompt
        idx = pad_sequence(inputs, batch_first=True).to(device)  # (B, T)
        predicted = pad_sequence(targets, batch_first=True, padding_value=IGNORE).to(device)
        losses = model(idx, predicted, reduction="none")  # (B, T)
        likelihoods[batch] = -losses.double().sum(1).cpu()
    return accuracies(items, likelihoods.numpy())


def evaluate(run: Any) -> dict:
    """Accuracies of a training run (train.py's Run) on its items: choices_acc, choices_acc_norm and their errors.

    If they cannot be measured, a line says so, the result is {} and the run goes on.
    """
    run.model.eval()
    try:
        with run.runtime.autocast():
            result = choose(run.model, run.tokenizer or load_tokenizer(), run.items, run.batch_size)
    except Exception as error:
        run.runtime.print0(f"choices_file: not measured: {' '.join(str(error).split())[:200]}")
        return {}
    finally:
        run.model.train()
    return {f"choices_{name}": value for name, value in result.items() if isinstance(value, float)}


def accuracies(items: list[Item], likelihoods: np.ndarray) -> dict[str, float | list]:
    lengths = [len(choice) for item in items for choice in item.choices]
    ends = np.cumsum([len(item.choices) for item in items])
    result: dict[str, float | list] = {}
    for end, scores in (("", likelihoods), ("_norm", likelihoods / lengths)):
        taken = [int(found.argmax()) for found in np.split(scores, ends[:-1])]
        mean = sum(choice == item.answer for choice, item in zip(taken, items, strict=True)) / len(items)
        error = math.sqrt(mean * (1 - mean) / max(1, len(items) - 1))
        result |= {f"choice{end}": taken, f"acc{end}": mean, f"acc{end}_error": error}
    return result

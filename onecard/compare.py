"""Compares runs: their losses at equal steps and at equal tokens, with the error where it is known, and their keys.

    for name, text in compare([a, b, c]): print(name, text)          # the verdict first; b and c, each with a

Runs with two tokenizers are compared in bits per byte. The last loss of a run is set beside the last of another only
where both schedules have ended, and then with the tokens of each.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import pairwise

import numpy as np

from onecard.curve import Curve, finite
from onecard.diagnosis import Finding
from onecard.run import Run

PLACE = ("out_dir", "overwrite", "wandb_run_name", "resume_from")  # keys that change no result


def compare(runs: Sequence[Run]) -> Iterator[Finding]:
    """The verdict, the last losses of each run, and how each differs from the first one, "a"."""
    letters = [chr(ord("a") + i) for i in range(len(runs))]
    lines = [list(compare_two(runs[0], run, letter)) for run, letter in zip(runs[1:], letters[1:], strict=True)]
    verdict = lines[0].pop(0) if len(runs) == 2 else ranking(runs, letters)
    broken = [f" {letter}: {run.broken[1]}" for letter, run in zip(letters, runs, strict=True) if run.broken]
    yield Finding("verdict", verdict + "".join(broken))
    for letter, run in zip(letters, runs, strict=True):
        yield Finding(letter, f"{run.name}: {last_losses(run)}.")
    for letter, run, found in zip(letters[1:], runs[1:], lines, strict=True):
        yield from (Finding(f"{letter} and a", line) for line in found)
        if runs[0].config and run.config:
            pairs = zip(asdict(runs[0].config).items(), asdict(run.config).values(), strict=True)
            changes = [f"{n} {old!r} -> {new!r}" for (n, old), new in pairs if old != new and n not in PLACE]
            yield Finding(f"keys of {letter}", f"{', '.join(changes) or 'The same as of a'}.")


def last_losses(run: Run) -> str:
    """The last val loss, perplexity and, if known, bits per byte, which compare across tokenizers."""
    of = f" of {run.config.max_iters:,}" if run.config else ""
    if not len(run.evals["step"]):
        return f"step {run.step:,}{of}, no evaluation"
    loss, bits = run.evals["val"][-1], run.evals["bits_per_byte"][-1]
    text = f"val loss {loss:.4f}" if math.isfinite(loss) else "val loss not finite"
    text += f", perplexity {math.exp(loss):,.2f}" if loss < 20 else ""
    text += f", {bits:.4f} bits per byte" if math.isfinite(bits) else ""
    return f"{text} at step {run.evals['step'][-1]:,.0f}{of}"


def ranking(runs, letters):
    """Which of several runs has the lowest loss at the last step that all of them have reached."""
    name, unit = measure(runs)
    curves = [finite(run.evals["step"], run.evals[name]) for run in runs]
    if not all(len(steps) for steps, _ in curves):
        return f"These runs cannot be ranked: not all have {missing(unit)}."
    at = min(steps[-1] for steps, _ in curves)
    losses = [np.interp(at, *curve) for curve in curves]
    (loss, best), *others = sorted(zip(losses, letters, strict=True))
    text = f"At step {at:,.0f}, the last that all have reached, {best} is lowest with {loss:.4f}{unit}"
    text += f" ({', '.join(f'{letter} {loss:.4f}' for loss, letter in others)})."
    if len({run.config.step_tokens for run in runs if run.config}) > 1:
        text += " Not all have as many tokens in a step."
    if any(annealed(runs[0], run, at, at, "") for run in runs):
        text += " Not all are as far in their schedules."
    return text


def measure(runs):
    """What to compare: (a key of Run.evals, its unit in a sentence)."""
    return ("val", "") if all(same_tokenizer(a, b) for a, b in pairwise(runs)) else ("bits_per_byte", " bits per byte")


def missing(unit):
    return "bits per byte, and their tokenizers differ" if unit else "a val loss"


def same_tokenizer(a: Run, b: Run) -> bool:
    """By what was saved of the tokenizers; else by the sizes of the vocabularies, which may differ in padding."""
    saved = [run.about.get("tokenizer") for run in (a, b)]
    if all(saved):
        return saved[0].get("sha256") == saved[1].get("sha256")
    sizes = [run.config.vocab_size if run.config else 0 for run in (a, b)]
    return not all(sizes) or (max(sizes) < min(sizes) + 1024 and max(sizes) < 1.1 * min(sizes))


def compare_two(a: Run, b: Run, letter: str) -> Iterator[str]:
    """Sentences on b, called `letter`, and a: at equal steps, at equal tokens, at the ends of both schedules."""
    name, unit = measure([a, b])
    curves = [finite(run.evals["step"], run.evals[name]) for run in (a, b)]
    if not all(len(steps) for steps, _ in curves):
        yield f"{letter} and a cannot be compared: not both have {missing(unit)}."
        return
    tokens = [run.config.step_tokens if run.config else 0 for run in (a, b)]

    def sentence(where, at_a, at_b, change):
        found = difference(a, b, at_a, at_b, change, unit)
        return f"{where}, {letter} is {found}.{annealed(a, b, at_a, at_b, letter)}"

    at, change = last_common(*curves)
    each = f", {amount(at * tokens[0])} tokens each" if all(tokens) and tokens[0] == tokens[1] else ""
    yield sentence(f"At step {at:,.0f}{each}", at, at, change)
    if all(tokens) and tokens[0] != tokens[1]:
        used, change = last_common(*(Curve(steps * n, loss) for (steps, loss), n in zip(curves, tokens, strict=True)))
        at_a, at_b = used / tokens[0], used / tokens[1]
        where = f"At {amount(used)} tokens (a: step {at_a:,.0f}, {letter}: step {at_b:,.0f})"
        yield sentence(where, at_a, at_b, change)
    if all(tokens) and a.finished and b.finished:
        yield from compare_ends(letter, curves, tokens, unit)


def amount(tokens: float) -> str:
    unit, letter = (1e9, "B") if tokens >= 1e9 else (1e6, "M") if tokens >= 1e6 else (1e3, "k")
    return f"{tokens / unit:.3g}{letter}"


def last_common(a: Curve, b: Curve) -> tuple[float, float]:
    """The last place that both curves have or pass, and the loss of b less that of a there.

    It is a place of both where one is near the end; else one of either, and the other is interpolated.
    """
    end, shared = min(a[0][-1], b[0][-1]), np.intersect1d(a[0], b[0])
    places = shared if len(shared) and shared[-1] > 0.8 * end else np.union1d(a[0], b[0])
    at = float(places[places <= end][-1])
    return at, float(np.interp(at, *b) - np.interp(at, *a))


def difference(a, b, at_a, at_b, change, unit):
    """ "lower by 0.0123 +- 0.0040", with what is known of its error."""
    pairs = None if unit else window_pairs(a, b, at_a, at_b)
    change = change if pairs is None else pairs.mean()
    text = f"{'lower' if change < 0 else 'higher'} by {abs(change):.4f}{unit}" if change else "equal"
    if pairs is None:
        reason = "" if unit else ": not evaluated on the same windows"
        return f"{text} (error unknown{reason})"
    error = np.std(pairs, ddof=1) / math.sqrt(len(pairs))
    chance = "; the difference may be chance" if 0 < abs(change) <= 2 * error else ""
    return f"{text} +- {error:.4f} ({len(pairs)} pairs of the same val windows){chance}"


def window_pairs(a, b, at_a, at_b):
    """Differences (n,) of the losses of the same groups of val windows at these steps; None if they are not known."""
    groups = []
    for run, step in ((a, at_a), (b, at_b)):
        at = np.flatnonzero(run.evals["step"] == step)
        if not len(at) or len(run.groups) != len(run.evals["step"]) or not val_windows(run):
            return None
        groups.append(run.groups[at[0]])
    same = val_windows(a) == val_windows(b) and len(groups[0]) == len(groups[1]) >= 8
    return np.subtract(groups[1], groups[0]) if same else None


def val_windows(run):
    """What decides which val windows are in each group of an evaluation; None if that is not known."""
    fingerprint, c = run.about.get("data", {}).get("val_fingerprint"), run.config
    return (fingerprint, c.block_size, c.eval_tokens or c.eval_iters * c.batch_size) if fingerprint and c else None


def annealed(a, b, at_a, at_b, letter):
    """A sentence where the learning rate of one run has fallen further: a part of the difference is annealing."""
    if not a.rates or not b.rates:
        differ = abs(a.step - b.step) > 0.1 * max(a.step, b.step)
        return " Learning rates are not known: the run nearer to its end has had more annealing." if differ else ""
    shares = [run.rates[min(int(at), len(run.rates) - 1)] / max(run.rates) for run, at in ((a, at_a), (b, at_b))]
    if abs(shares[0] - shares[1]) < 0.1 or all(at >= run.config.max_iters for run, at in ((a, at_a), (b, at_b))):
        return ""
    return (
        f" The learning rate of a is {shares[0]:.2f} of its peak there, that of {letter} {shares[1]:.2f}: "
        "the run with the lower one has more of its annealing behind it."
    )


def compare_ends(letter, curves, tokens, unit):
    """The last losses of two finished runs of different length; how early the better run had the other's last loss."""
    names, steps, losses = ("a", letter), [c[0][-1] for c in curves], [c[1][-1] for c in curves]
    used = [step * n for step, n in zip(steps, tokens, strict=True)]
    better, worse = (1, 0) if losses[1] < losses[0] else (0, 1)
    gain = f"{losses[worse] - losses[better]:.4f}{unit}"
    if used[0] != used[1]:
        share = f"{used[better] / used[worse]:.2f} of the tokens of {names[worse]}"
        where = f"step {steps[better]:,.0f}, {names[worse]}: step {steps[worse]:,.0f}"
        yield f"At their ends, {names[better]} is lower by {gain}, with {share} ({where})."
    reached = np.flatnonzero(curves[better][1] <= losses[worse])[0]
    share = curves[better][0][reached] * tokens[better] / used[worse]
    if share < 0.95:
        text = f"{names[better]} has the last loss of {names[worse]} ({losses[worse]:.4f}{unit}) by step"
        yield f"{text} {curves[better][0][reached]:,.0f}, with {1 - share:.0%} fewer tokens."

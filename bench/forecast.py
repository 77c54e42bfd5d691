"""How far plan.py's expectations and forecasts are off, and what diagnosis.py makes of curves whose fault is known.

    python bench/forecast.py              (a minute on one core; --seeds=100)

Expected losses against the rows of llm.c and both anchors; forecasts of the anchors' ends from their beginnings; curves
made with one fault each (tests/curves.py): a diagnosis is right if it names that fault and nothing else.
"""

import sys
from collections import Counter
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from curves import ANCHORS, CAUSES, anchor, config, made  # noqa: E402

from onecard import plan  # noqa: E402
from onecard.diagnosis import PROBLEMS, diagnose  # noqa: E402

OTHERS = {  # recipes that the law is not of, by modded-nanogpt's records: parameters, tokens, val loss
    "AdamW, rotary positions, trapezoid": (124.4e6, 5.00e9, 3.2760),
    "AdamW, rotary, QK norm, squared ReLU": (124.4e6, 2.95e9, 3.2790),
    "the same with Muon": (124.4e6, 1.70e9, 3.2787),
}


def expected_table():
    print("| run | parameters | tokens | expected | measured | error |\n|---|---|---|---|---|---|")
    measured = [("llm.c, GPT-2 124M (the law is shifted to meet it)", *plan.ANCHOR)]
    for name, keys in ANCHORS.items():
        c, (steps, *splits) = config(**keys), anchor(name)
        n, d = plan.parameters(c)["total"], int(steps[-1]) * plan.step_tokens(c)
        for split, losses in zip(("train", "val of 5,500 tokens"), splits, strict=True):
            measured.append((f"anchor {name}, {split}, step {steps[-1]:,}", n, d, losses[-3:].mean()))
    measured += [(f"no expectation is given: {name}", *figures) for name, figures in OTHERS.items()]
    for name, n, d, loss in measured:
        error = plan.law(n, d) - loss
        print(f"| {name} | {n / 1e6:.1f}M | {d / 1e9:.2f}B | {plan.law(n, d):.3f} | {loss:.3f} | {error:+.3f} |")


def forecast_table():
    """Each of the anchors cut at every evaluation from half of its schedule on."""
    print("\n| log | cut at | forecast | band | truth | error |\n|---|---|---|---|---|---|")
    inside = total = 0
    for name, keys in ANCHORS.items():
        rates, (steps, *splits) = plan.rates(config(**keys)), anchor(name)
        for split, losses in zip(("train", "val"), splits, strict=True):
            for cut in steps[(steps >= len(rates) / 2) & (steps < steps[-1])]:
                use = steps <= cut
                found, _ = plan.forecast(steps[use], losses[use], rates)
                error = plan.follow(found, rates)[steps[-1]] - losses[-1]
                inside, total = inside + (abs(error) <= found["band"]), total + 1
                if cut in (10000, 12000, 14500) if name == "40m" else cut in (6000, 8000):
                    row = f"| {name}, {split} | {cut:,} | {losses[-1] + error:.3f} | {found['band']:.3f} "
                    print(f"{row}| {losses[-1]:.3f} | {error:+.3f} |")
    print(f"\nof {total} cuts, every 500 steps from half of the schedule on, {inside} have the truth inside the band")


def coverage_table(seeds):
    """The forecast of made curves that obey its law: here the band should be wide enough in more than 95 of 100."""
    print("\n| made curves, cut at | error of the forecast, rms | truth inside the band |\n|---|---|---|")
    for share in (0.5, 0.6, 0.75, 0.9):
        errors, inside = [], 0
        for seed in range(seeds):
            run = made("rate too low", seed)  # complete
            healthy = config(**{**vars(run.config), "learning_rate": 1e-3, "min_lr": 1e-4})
            rates, steps, rng = plan.rates(healthy), run.evals["step"].astype(int), np.random.default_rng(seed)
            s1, s2 = plan.annealing(rates)
            truth = 3.1 + rng.uniform(0.1, 0.4) * (np.maximum(s1, 5) / s1[-1]) ** -rng.uniform(0.4, 0.8)
            truth = truth - rng.uniform(0.05, 0.15) * s2 / s2[-1]
            seen = steps <= share * len(rates) + len(rates) // 40
            losses = truth[steps] + rng.normal(0, 0.006, len(steps))
            found, _ = plan.forecast(steps[seen], losses[seen], rates)
            errors.append(found["loss"] - losses[-1])
            inside += abs(errors[-1]) <= found["band"]
        print(f"| {share:.0%} of the schedule | {np.sqrt(np.mean(np.square(errors))):.3f} | {inside} of {seeds} |")


def diagnosis_table(seeds):
    print("\n| made with | named rightly, nothing else | what else was said |\n|---|---|---|")
    for cause, wanted in CAUSES.items():
        said = Counter()
        for seed in range(seeds):
            said[frozenset(f.name for f in diagnose(made(cause, seed)) if f.name in PROBLEMS)] += 1
        right = said.pop(frozenset(wanted), 0)
        wrong = "; ".join(f"{n} x {' + '.join(sorted(names)) or 'nothing'}" for names, n in said.most_common())
        print(f"| {cause} | {right} of {seeds} | {wrong} |", flush=True)


if __name__ == "__main__":
    seeds = int((sys.argv[1:] or ["--seeds=100"])[0].removeprefix("--seeds="))
    expected_table()
    forecast_table()
    coverage_table(seeds)
    diagnosis_table(seeds)

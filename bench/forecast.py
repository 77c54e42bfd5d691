"""How far off are forecasts of a run's end, and does the diagnosis name a fault that is known?

    python bench/forecast.py              # a minute on one core; --seeds=100

Forecasts are of the ends of both anchors, real runs, from their beginnings. Curves are made with one fault each
(tests/curves.py): a diagnosis is right if it names that fault and no other.
"""

import argparse
import sys
from collections import Counter

from common import ROOT, header, machine, row

sys.path.insert(0, str(ROOT / "tests"))
from curves import ANCHORS, CAUSES, anchor, config, learning_rates, made

from onecard.diagnosis import PROBLEMS, diagnose
from onecard.forecast import follow, forecast


def forecast_table():
    """Forecasts of each anchor's last evaluation from those up to a cut, every 500 steps from half of its schedule."""
    shown = {"40m": (10000, 12000, 14500), "124m": (6000, 8000)}
    inside = total = 0
    header("log", "cut at", "forecast", "band", "truth", "error")
    for name, keys in ANCHORS.items():
        rates, (steps, *splits) = learning_rates(config(**keys)), anchor(name)
        for split, losses in zip(("train", "val"), splits, strict=True):
            for cut in steps[(steps >= len(rates) / 2) & (steps < steps[-1])]:
                seen, truth = steps <= cut, losses[-1]
                fit, _ = forecast(steps[seen], losses[seen], rates)
                loss = follow(fit, rates)[steps[-1]]
                total += 1
                inside += abs(loss - truth) <= fit["band"]
                if cut in shown[name]:
                    numbers = f"{loss:.3f}", f"{fit['band']:.3f}", f"{truth:.3f}", f"{loss - truth:+.3f}"
                    row(f"{name}, {split}", f"{cut:,}", *numbers)
    print(f"\nThe truth is inside the band for {inside} of {total} cuts.")


def diagnosis_table(seeds):
    header("made with", "named rightly, nothing else", "what else was found")
    for cause, wanted in CAUSES.items():
        found = Counter(
            frozenset(finding.name for finding in diagnose(made(cause, seed)) if finding.name in PROBLEMS)
            for seed in range(seeds)
        )
        right = found.pop(frozenset(wanted), 0)
        wrong = (f"{count} x {' + '.join(sorted(names)) or 'nothing'}" for names, count in found.most_common())
        row(cause, f"{right} of {seeds}", "; ".join(wrong))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=100, help="made curves of each kind")
    seeds = parser.parse_args().seeds
    print(machine("numpy"))
    forecast_table()
    diagnosis_table(seeds)


if __name__ == "__main__":
    main()

"""How far off are forecasts of a run's end?

    python bench/forecast.py                # the curves of tests/data; a minute on one core
    python bench/forecast.py out/run ...    # and finished runs of train.py

Each curve is cut at shares of its schedule, and its last evaluation is forecast from those before the cut. The second
table has, for each run, constants that are fitted to the other runs only.
"""

import math
import sys
from functools import cache

import numpy as np
from common import ROOT, header, machine, row

sys.path.insert(0, str(ROOT / "tests"))
from curves import Curve, curves

from configurator import run_script
from onecard import UserError
from onecard.forecast import CONSTANTS, Constants, band, follow, forecast
from report import read_run

TENTHS, FINE = np.arange(0.5, 0.95, 0.1), np.arange(0.5, 0.985, 0.025)  # shares of the schedule
CURVES = {(curve.run, curve.split): curve for curve in curves()}
LAWS = [Constants((0.06, 0.1), (0.5, 1.0), power, slow) for power in (1.0, 1.1, 1.2) for slow in (0.35, 0.7)]


def score(curve: Curve, constants: Constants, shares: np.ndarray) -> list[dict]:
    """For each cut the errors of the forecast, of the last value, of a straight line in the logarithm of the step.

    Cuts begin at half of the schedule, of wsd a tenth into its decay.
    """
    found, truth, end, n = [], curve.losses[-1], curve.steps[-1], len(curve.rates)
    decay = n - np.argmax(np.flip(curve.rates) >= max(curve.rates))  # its first step
    first = (decay + 0.1 * (n - decay)) / n if curve.schedule == "wsd" else 0.0
    for share in shares[shares >= first - 1e-9]:
        seen = (curve.steps <= share * n + 1e-6) & (curve.steps < end)
        steps, losses = curve.steps[seen], curve.losses[seen]
        late = steps >= steps[-1] / 2
        line = np.polyval(np.polyfit(np.log(steps[late]), losses[late], 1), np.log(end))
        fit, _ = forecast(steps, losses, curve.rates, constants)
        loss = follow(fit, curve.rates)[end] if fit else math.nan  # withheld: neither inside nor without error
        errors = dict(law=loss - truth, last=losses[-1] - truth, line=line - truth)
        found.append(errors | dict(share=f"{share:.3f}", fit=fit, band=band(fit, loss) if fit else math.nan))
    return found


def rms(errors) -> float:
    return math.sqrt(np.mean(np.square(np.nan_to_num(list(errors), nan=1.0))))


def inside(scores: list[dict]) -> int:
    return sum(abs(s["law"]) <= s["band"] for s in scores)


@cache
def law_error(name: tuple[str, str], law: Constants) -> float:
    return rms(s["law"] for s in score(CURVES[name], law, TENTHS))


@cache
def fit_constants(left_out: str = "") -> Constants:
    """Constants from all runs but one: the law with the least error, what it finds in whole runs, the narrowest bands.

    Each schedule counts alike. C varies twice as much as found, because the runs are few.
    """
    use = {name: curve for name, curve in CURVES.items() if name[0] != left_out}
    kinds = sorted({curve.schedule for curve in use.values()})
    parts = [[name for name in use if use[name].schedule == kind] for kind in kinds]
    law = min(LAWS, key=lambda law: sum(rms(law_error(name, law) for name in part) for part in parts))
    fits = [fit for curve in use.values() if (fit := forecast(curve.steps, curve.losses, curve.rates, law)[0])]
    decays, exponents = [fit["b"][2] / fit["loss"] for fit in fits], np.log([fit["a"] for fit in fits])
    law = law._replace(decay=(round(float(np.mean(decays)), 3), round(2 * float(np.std(decays)), 3)))
    law = law._replace(exponent=(round(math.exp(exponents.mean()), 2), round(float(exponents.std()), 2)))
    for to_come in (0.04, 0.05, 0.06, 0.08, 0.1):
        law = law._replace(to_come=to_come)
        scores = [[s for name in part for s in score(use[name], law, FINE)] for part in parts]
        if all(inside(part) >= 0.97 * len(part) for part in scores):
            break
    return law


def table(constants_of) -> None:
    """Prints a row for each curve: error +- band at tenths, rms over finer cuts; then how many ends were inside."""
    header("run", *(f"{share:.0%}" for share in TENTHS), "rms", "last value", "straight line", "inside")
    found: dict[str, list[dict]] = {}  # by schedule
    for (run, split), curve in CURVES.items():
        scores = score(curve, constants_of(run), FINE)
        at = {s["share"]: f"{s['law']:+.3f} +- {s['band']:.3f}" for s in scores}
        errors = (f"{rms(s[kind] for s in scores):.4f}" for kind in ("law", "last", "line"))
        cells = (at.get(f"{share:.3f}", "") for share in TENTHS)
        row(f"{run}, {split}", *cells, *errors, f"{inside(scores)} of {len(scores)}")
        found.setdefault(curve.schedule, []).extend(scores)
    widths = [(s["share"], s["band"]) for part in found.values() for s in part]
    half, late = (np.mean([band for at, band in widths if at == share]) for share in ("0.500", "0.900"))
    print("\nInside the band:", *(f"{kind} {inside(part)} of {len(part)}," for kind, part in found.items()), end=" ")
    print(f"mean half-width {half:.3f} at 50%, {late:.3f} at 90%.")


def main() -> None:
    print(machine("numpy"), f"\n\n{CONSTANTS}")
    for path in sys.argv[1:]:
        run = read_run(path)
        if not run.config:
            raise UserError(f"{path}: its learning rates are not known; give the folder of a run of train.py")
        steps, losses = run.evals["step"].astype(int), run.evals["val"]
        CURVES[path, "val"] = Curve(path, "val", run.config.lr_schedule, steps, losses, run.rates)
    table(lambda run: CONSTANTS)
    print(f"\nFitted to all runs: {fit_constants()}\nFitted to all runs but that of the row:")
    table(fit_constants)


if __name__ == "__main__":
    run_script(main)

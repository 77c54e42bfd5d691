"""What the tests of report.py, compare.py and page.py share: folders with metrics as train.py writes them."""

import json
import math
from dataclasses import asdict

import numpy as np
from curves import config, learning_rates

SCHEDULE = dict(max_iters=4000, lr_decay_iters=4000, warmup_iters=100, eval_interval=100, eval_iters=0)


def loss_of(rates):
    """Made-up losses after 0 to n steps: a power of the rates' sum, and a share of what the rate has fallen by."""
    rates = np.asarray(rates) / max(rates)
    done = np.append(0.001, np.cumsum(rates) / 4000)
    return 3.2 + 0.2 * (done + 0.002) ** -0.5 - 0.1 * np.append(0, 1 - rates) * (done > 0.05)


def write_run(folder, difference=0.0, noise=0.0, fingerprint="f", last=None, bytes_per_token=4.0, about=(), **keys):
    """Writes folder/metrics.jsonl of a run up to step `last` -> folder. difference: added to its losses."""
    c = config(**(SCHEDULE | keys))
    truth, rng = loss_of(learning_rates(c)) + difference, np.random.default_rng(len(folder.name))
    each = np.linspace(-0.4, 0.4, 64)  # windows differ, in all runs alike
    data = dict(train_tokens=10**9, val_tokens=10**6, val_fingerprint=fingerprint)
    start = dict(kind="start", step=0, config=asdict(c), device="cpu", dtype="bfloat16", data=data)
    records = [start | dict(about)]
    line = dict(kind="train", grad_norm=0.5, lr=1e-3, skipped=0, ms_per_step=50.0, tokens_per_s=1e4)
    for step in range(0, (last or c.max_iters) + 1, 100):
        groups = truth[step] + each + rng.normal(0, noise, 64)
        loss = dict(train_loss=truth[step] - 0.01, val_loss=groups.mean(), val_groups=groups.tolist())
        loss |= dict(eval_seconds=1.0, bits_per_byte=groups.mean() / math.log(2) / bytes_per_token)
        records += [dict(line, step=step, loss=truth[step])] * (step > 0) + [dict(loss, kind="eval", step=step)]
    records.append(dict(kind="samples", step=last or c.max_iters, texts=["<b>Once</b> upon"]))
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder

"""profiling.py: the files and the table of train.py --profile=True."""

import gzip
import json
import re

import train


def test_a_profile_has_ten_steps_and_leaves_the_run_in_out_dir_as_it_was(flags, tmp_path, capsys):
    train.main(flags(max_iters=2))
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    capsys.readouterr()
    train.main(flags(max_iters=2, profile=True))  # the run is at its end: it is profiled nevertheless
    after = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    events = json.loads(gzip.decompress(after.pop("profile.json.gz")))["traceEvents"]
    assert after == before
    calls = re.search(r"^aten::mm +[\d.]+ +[\d.]+% +([\d.]+)$", capsys.readouterr().out, re.MULTILINE)
    products = 4 * 3 * (4 * 2 + 1)  # micro batches, forward and two of backward, matrices of two layers and the head
    assert float(calls[1]) == products == sum(event.get("name") == "aten::mm" for event in events) / 10

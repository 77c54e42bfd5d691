"""The scripts as a person runs them: the README's first command from an empty folder to text, and mistakes."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import train
from onecard.shards import ShardError

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def run(*arguments):
    """Runs a script of the clone -> what it printed."""
    command = [sys.executable, *map(str, arguments)]
    env = {**os.environ, "WANDB_MODE": "offline"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr, done.stderr
    return done.stdout


def test_the_readmes_first_command_ends_in_text(tmp_path):
    """All but its installation, in folders of their own and with fewer steps."""
    command = next(line for line in README.read_text().splitlines() if line.startswith("pip install -e . && "))
    prepare, training, sample = (part.removeprefix("python ").split() for part in command.split(" && ")[1:])
    assert [prepare[0], training[0], sample[0]] == ["prepare.py", "train.py", "sample.py"]
    assert "train" in run(*prepare, f"--data_dir={tmp_path}")
    training += [f"--data_dir={tmp_path}", f"--out_dir={tmp_path}/out"]
    run(*training, "--max_iters=30", "--eval_interval=30", "--eval_tokens=2048", "--batch_size=2")
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["val_loss"] for line in lines if line["kind"] == "eval"]
    assert 6.9 < losses[0] < 7.0 and losses[-1] < 6
    text = run(sample[0], tmp_path / "out", "--num_samples=2", "--max_new_tokens=30")
    assert text.count("---------------") == 2


@pytest.mark.parametrize("path", sorted(ROOT.glob("config/*.py")), ids=lambda path: path.stem)
def test_every_config_file_is_understood(path, tmp_path, capsys):
    """A missing dataset is noticed after the config has been read."""
    with pytest.raises(ShardError, match=r"none: no such folder.*prepare\.py"):
        train.main([str(path), "--dataset=none", "--device=cpu", f"--out_dir={tmp_path}"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train.py", "--learning_rat=1"], "learning_rate"),
        (["train.py", "config/none.py"], "config/none.py"),
        (["train.py", "config/quickstart.py", "--dataset=none"], "prepare.py"),
        (["sample.py", "--out_dir=none"], "none: there is no such file"),
        (["report.py", "none"], "none"),
        (["convert.py", "none", "--to=hf"], "none"),
        (["prepare.py", "none.parquet"], "none.parquet"),
    ],
    ids=" ".join,
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(arguments[0], run_name="__main__")
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and line.startswith(f"{arguments[0]}: ") and message in line


def test_commands_in_the_documents_name_only_scripts_configs_and_keys_that_exist():
    for page in (README, *ROOT.glob("docs/*.md")):
        for script, rest in re.findall(r"python (\w+\.py)([^\n`#&]*)", page.read_text(encoding="utf-8")):
            source = (ROOT / script).read_text(encoding="utf-8")
            missing = [
                path for path in re.findall(r"(?<!write_config=)config/\w+\.py", rest) if not (ROOT / path).exists()
            ]
            keys = set(re.findall(r"--(\w+)", rest)) - set(re.findall(r"^    (\w+): ", source, re.M))
            assert not missing and keys <= {"help"}, f"{page.name}: {script} {missing} {keys}"

"""The scripts as a person runs them: commands of the README, from an empty folder to text."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def run(*arguments, code=0, errors=True, **environment):
    """Runs one of the scripts in the clone; -> what it printed, on standard error too if `errors`."""
    environment = {**os.environ, "WANDB_MODE": "offline", **environment}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, env=environment, timeout=900
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr, done.stderr
    return done.stdout + done.stderr if errors else done.stdout


def test_the_readmes_main_command_ends_in_text(tmp_path):
    """The second to last commands of the README's first line, to folders of their own and with fewer steps."""
    command = next(line for line in README.read_text().splitlines() if line.startswith("pip install -e . && "))
    scripts = [part.removeprefix("python ").split() for part in command.split(" && ")[1:]]
    assert [part[0] for part in scripts] == ["prepare.py", "train.py", "sample.py"]
    said = run(*scripts[0], f"--data_dir={tmp_path}")
    assert "train" in said
    train = [*scripts[1], f"--data_dir={tmp_path}", f"--out_dir={tmp_path}/out", "--max_iters=30", "--eval_interval=15"]
    run(*train, "--eval_tokens=8192", "--batch_size=2")
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["val_loss"] for line in lines if line["kind"] == "eval"]
    assert 10.7 < losses[0] < 11.0 and losses[-1] < 9
    command = ("sample.py", f"--out_dir={tmp_path}/out", "--num_samples=2", "--max_new_tokens=30")
    text = run(*command, errors=False)
    assert text.count("---------------") == 2
    assert text == run(*command, errors=False)


def test_every_config_file_is_understood():
    for path in sorted(ROOT.glob("config/*.py")):
        # an unknown dataset is found out after the config has been read
        said = run("train.py", path, "--dataset=none", "--device=cpu", code=2)
        assert str(Path("data") / "none") in said, said


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train.py", "--learning_rat=1"], "learning_rate"),
        (["train.py", "config/none.py"], "config/none.py"),
        (["train.py", "config/quickstart.py", "--dataset=none"], "prepare.py"),
        (["sample.py", "--out_dir=none"], "none/ckpt.pt: there is no checkpoint here"),
        (["prepare.py", "none.parquet"], "none.parquet"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(arguments, message):
    said = run(*arguments, code=2)
    assert message in said.splitlines()[-1]


def test_the_readme_names_only_scripts_configs_and_keys_that_exist():
    text = README.read_text(encoding="utf-8")
    for script, rest in re.findall(r"python (\w+\.py)([^\n`#&]*)", text):
        source = (ROOT / script).read_text(encoding="utf-8")
        for config in re.findall(r"config/\w+\.py", rest):
            assert (ROOT / config).exists(), config
        for key in re.findall(r"--(\w+)", rest):
            assert key == "help" or re.search(rf"^    {key}: ", source, re.M), f"{script} --{key}"

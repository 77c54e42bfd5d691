"""The rules of the house that a machine can hold: who imports whom, what is never written, how a file is called."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "configurator": set(),
    "model": set(),
    "shards": {"durable"},
    "plan": set(),
    "tokenizer": set(),
    "metrics": set(),
    "durable": set(),
    "runtime": {"plan"},
    "checkpoint": {"model", "durable"},
    "resume": {"checkpoint", "plan", "configurator"},
    "sources": set(),
    "prepare": {"configurator", "shards", "sources", "tokenizer", "durable"},
    "generation": set(),
    "run": {"configurator", "model", "checkpoint", "resume", "plan", "metrics", "runtime", "durable", "shards"}
    | {"convert"},
    "train": {"run", "configurator", "model", "checkpoint", "plan", "metrics", "runtime", "durable", "shards"}
    | {"generation", "tokenizer", "convert"},
    "convert": {"configurator", "checkpoint", "model", "tokenizer", "durable"},
    "diagnosis": {"plan"},
    "report": {"configurator", "plan", "metrics", "diagnosis"},
    "sample": {"configurator", "checkpoint", "tokenizer", "runtime", "generation"},
}
SCRIPTS = ("prepare", "train", "sample", "convert")
NO_TORCH = (
    "configurator",
    "shards",
    "plan",
    "tokenizer",
    "metrics",
    "durable",
    "sources",
    "prepare",
    "diagnosis",
    "report",
)


def imports(path):
    """Every module that a file imports anywhere in it, by its first name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def test_the_rooms_are_the_ones_of_the_table():
    assert {path.stem for path in ROOT.glob("*.py")} == set(MAY_IMPORT)
    assert not list(ROOT.glob("config/__init__.py")) + list(ROOT.glob("data/__init__.py"))


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_imports_follow_the_table(name):
    ours = set(imports(ROOT / f"{name}.py")) & set(MAY_IMPORT)
    assert ours <= MAY_IMPORT[name]


@pytest.mark.parametrize("name", NO_TORCH)
def test_no_torch_where_processes_must_start_quickly(name):
    code = f"import sys, {name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_names_every_key_and_exits_with_0(name):
    done = subprocess.run([sys.executable, f"{name}.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    config = next(n for n in ast.parse((ROOT / f"{name}.py").read_text()).body if isinstance(n, ast.ClassDef))
    keys = [n.target.id for n in config.body if isinstance(n, ast.AnnAssign)]
    assert len(keys) > 3 and all(key in done.stdout for key in keys)


def test_no_registry_host_and_no_path_of_one_machine_is_named():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    forbidden = re.compile(r"pypi\.|/wo" + r"rk/|/ro" + r"ot/|index-" + r"url|find-" + r"links|download\.pyt" + "orch")
    for name in files:
        if name.endswith((".py", ".toml", ".md", ".yml")) or name == ".ci/run":
            found = forbidden.search((ROOT / name).read_text(encoding="utf-8"))
            assert not found, f"{name}: {found.group()}"

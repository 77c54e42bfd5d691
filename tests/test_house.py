"""The rules of docs/design.md that a machine can check: who imports whom, what a script does, what no file may name."""

import ast
import os
import re
import runpy
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = {"train", "prepare", "sample", "report", "convert"}
PATHS = {path.stem: path for path in ROOT.glob("*.py")}
PATHS |= {f"onecard.{path.stem}": path for path in ROOT.glob("onecard/*.py")}
PATHS["onecard"] = PATHS.pop("onecard.__init__")


def imports(path):
    """The modules that a file imports, also inside functions: "model", "onecard.plan", "torch.nn"."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in PATHS else node.module for name in names)


GRAPH = {name: set(imports(path)) for name, path in PATHS.items()}


def closure(name):
    """The module and all of ours that are imported with it."""
    found, new = set(), {name}
    while new:
        found |= new
        new = set().union(*(GRAPH[module] for module in new)) & set(PATHS) - found
    return found


def test_the_root_has_the_scripts_model_and_configurator_and_nothing_else():
    assert {path.stem for path in ROOT.glob("*.py")} == SCRIPTS | {"model", "configurator"}


def test_no_file_imports_a_script_but_report_imports_train():
    """So scripts import rooms, model and configurator; rooms import rooms, model and configurator."""
    for name, imported in GRAPH.items():
        assert imported & SCRIPTS == ({"train"} if name == "report" else set()), name


def test_imports_have_no_circle():
    TopologicalSorter({name: imported & set(PATHS) for name, imported in GRAPH.items()}).prepare()


def test_prepare_and_all_that_it_imports_never_import_torch():
    for name in closure("prepare"):
        assert not any(module.split(".")[0] == "torch" for module in GRAPH[name]), name
    command = [sys.executable, "-c", "import sys, prepare; sys.exit('torch' in sys.modules)"]
    assert subprocess.run(command, cwd=ROOT).returncode == 0


def test_what_a_worker_of_prepare_imports_of_ours_is_in_the_package():
    assert all(name.split(".")[0] == "onecard" for name in closure("onecard.units"))


def test_importing_a_script_does_nothing(tmp_path):
    command = [sys.executable, "-c", f"import {', '.join(SCRIPTS)}", "--no_such_key=1"]
    env = os.environ | dict(PYTHONPATH=str(ROOT))
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_help_names_every_key_and_exits_with_0(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(PATHS[name]), run_name="__main__")
    shown, errors = capsys.readouterr()
    keys = re.findall(r"^    (\w+): .* = key\(", PATHS[name].read_text(encoding="utf-8"), re.M)
    assert ended.value.code == 0 and errors == ""
    assert len(keys) > 3 and set(keys) <= set(re.findall(r"^  (?:--)?(\w+) ", shown, re.M))


def test_no_registry_host_and_no_path_of_one_machine_is_named():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    forbidden = re.compile(r"pypi\.|/wo" + r"rk/|/ro" + r"ot/|index-" + r"url|find-" + r"links|download\.pyt" + "orch")
    for path in map(ROOT.joinpath, files):
        if path.is_file():  # one that is being deleted is not
            found = forbidden.search(path.read_text(encoding="utf-8", errors="ignore"))
            assert not found, f"{path}: {found.group()}"

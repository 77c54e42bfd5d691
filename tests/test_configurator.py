"""configurator.py: which values are taken, which are refused, and what the messages name."""

import ast
import contextlib
import dataclasses
import itertools
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from configurator import ConfigError, changed, describe, evaluate, key, load_config, read_values, sources_of

ROOT = Path(__file__).resolve().parent.parent
INTEGER = "must be an integer, at least 1, at most 4096"
NUMBER = "must be a number, at least 0.0, not "
FINITE = "not a finite real number, or beyond 1.8e308"
CHOICES = "one of float16 bfloat16 float32 auto"


@dataclass(frozen=True)
class Config:
    out_dir: str = key("out", "folder of the run")
    dataset: str = key("quickstart", "folder in data/")
    batch_size: int = key(12, "sequences in a micro batch", low=1, high=4096)
    block_size: int = key(1024, "context in tokens", low=1)
    n_layer: int = key(12, "layers", low=1)
    n_head: int = key(12, "heads", low=1)
    n_embd: int = key(768, "width", low=1)
    dropout: float = key(0.0, "dropout", low=0.0, high=1.0)
    beta1: float = key(0.9, "decay rate", low=0.0, below=1.0)
    bias: bool = key(False, "biases")
    learning_rate: float = key(6e-4, "peak learning rate", low=0.0)
    max_iters: int = key(600_000, "steps", low=0)
    dtype: str = key("auto", "number format", choices=("float16", "bfloat16", "float32", "auto"))
    compile: bool = key(True, "torch.compile")
    start: str = key("\n", "prompt")
    seed: int = key(1337, "seed")

    def problems(self):
        remainder = self.n_embd % self.n_head
        return [f"n_embd={self.n_embd}: not a multiple of n_head={self.n_head}"] if remainder else []


@dataclass(frozen=True)
class FilesConfig:
    files: tuple[str, ...] = key((), "parquet files", inputs=True)
    workers: int = key(0, "processes", low=0)
    verify: bool = key(False, "verify only")


@dataclass(frozen=True)
class FolderConfig:
    out_dir: str = key("out", "folder of a run", inputs=True)
    start: str = key("", "prompt")
    top_k: int = key(200, "likeliest", low=0)
    json: bool = key(False, "a line of JSON")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(text, name="x.py"):
    Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return name


def problems(*argv, ConfigClass=Config):
    with pytest.raises(ConfigError) as error:
        load_config(ConfigClass, list(argv))
    return str(error.value).split("\n")


def problem(*argv, ConfigClass=Config):
    (line,) = problems(*argv, ConfigClass=ConfigClass)
    return line


def table(text):
    """The cells of a text whose lines and ` | ` separate them."""
    return text.strip().replace("\n", " | ").split(" | ")


def test_the_command_line_wins_over_files_and_later_files_over_earlier_ones_and_over_the_defaults(monkeypatch):
    a = write("batch_size = 2\nblock_size = 1\nn_layer = 1\nseed = 1\nseed = 5", "a.py")
    b = write("block_size = 2\nn_layer = 2\nmax_iters = batch_size * 5", "b.py")
    config = load_config(Config, ["--n_layer=3", a, b, "--dropout=0.5", "--dropout=0.25"])
    assert config == Config(batch_size=2, block_size=2, n_layer=3, seed=5, dropout=0.25, max_iters=10)
    places = dict(batch_size="a.py:1", block_size="b.py:1", seed="a.py:5", max_iters="b.py:3")
    assert sources_of(config) == places | dict(n_layer="command line", dropout="command line")
    assert load_config(Config, [b, a]).max_iters == 60  # the default of batch_size, times 5
    assert load_config(Config, []) == Config() and sources_of(load_config(Config, [])) == sources_of(Config()) == {}
    monkeypatch.setattr(sys, "argv", ["train.py", "--batch_size=3"])
    assert load_config(Config).batch_size == 3
    assert list(dataclasses.asdict(config)) == [field.name for field in dataclasses.fields(Config)]


def test_describe_shows_the_keys_that_were_set_with_value_and_source_in_aligned_lines():
    text = describe(load_config(Config, [write("out_dir = 'runs/a b'\nlearning_rate = 1e-3"), "--seed=1337"]))
    rows = text.splitlines()[:-1]
    assert [row.split()[0] for row in rows] == ["out_dir", "learning_rate", "seed"] and "'runs/a b'" in text
    assert len({row.index(source) for row, source in zip(rows, ("x.py:1", "x.py:2", "command"), strict=True)}) == 1
    assert len(describe(Config()).splitlines()) == 1
    files = describe(load_config(FilesConfig, [f"part_{i}.parquet" for i in range(500)]))
    assert len(files.splitlines()[0]) < 150


def test_a_value_of_the_command_line_is_taken_in_the_type_of_its_key():
    rows = {
        "--bias --bias=true --bias=True": True,
        "--compile=false --compile=False": False,
        "--batch_size=1e3 --batch_size=1_000 --batch_size=1000.0 --batch_size=5*8*25 --batch_size=2**10-24": 1000,
        "--seed=-1": -1,
        "--learning_rate=3e3 --learning_rate=3000 --learning_rate=6e3/2": 3000.0,
        "--dtype=float16": "float16",
    }
    for arguments, value in rows.items():
        for argument in arguments.split():
            got = getattr(load_config(Config, [argument]), argument[2:].partition("=")[0])
            assert got == value and type(got) is type(value), argument
    for text in ("42", "a=b", "", "--x", "'q'", "FILE:prompt.txt", "x.py", "# no comment", "two\nlines"):
        assert load_config(Config, ["--start=" + text]).start == text


def test_values_of_a_config_file_in_the_form_of_nanogpt_are_taken_in_the_type_of_their_keys():
    text = """\ufeff'''a
docstring'''
pass
bias = compile = False # override by flag
out_dir='out-' + dataset
dataset = ('a'
  'b')
start = 'ü€'
batch_size = 2; batch_size = batch_size + 1
block_size = batch_size * 1_000
n_layer = n_head = n_head + 1
n_embd = n_layer * 64
dropout = -0.5 + +1
learning_rate = 1
max_iters = 1e3
# seed = 1
"""
    expected = Config(
        bias=False, compile=False, out_dir="out-quickstart", dataset="ab", start="ü€", batch_size=3, block_size=3000,
        n_layer=13, n_head=13, n_embd=832, dropout=0.5, learning_rate=1.0, max_iters=1000,
    )  # fmt: skip
    for newline in ("\n", "\r\n", "\r"):
        got = load_config(Config, [write(text.replace("\n", newline))])
        assert repr(got) == repr(expected)  # repr tells 1.0 from 1
        assert set(sources_of(got)) == set(dataclasses.asdict(got)) - {"beta1", "dtype", "seed"}


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ("--batch_size=1.5 | --batch_size=abc | --batch_size=True | --batch_size= | --batch_size=block_size", INTEGER),
        ("--batch_size=8#4 | --batch_size='8' | --batch_size=8;9 | --batch_size=int(8) | --batch_size=1\0", INTEGER),
        ("--batch_size=" + "9" * 5000 + " | --batch_size=0 | --batch_size=1/0 | --batch_size=8,9", INTEGER),
        ("--batch_size=4097 | batch_size = 4097", INTEGER + ", not 4097"),
        ("batch_size = 1.5 | batch_size = 3 / 2", INTEGER + ", not 1.5"),
        ("batch_size = True", INTEGER + ", not True"),
        ("--seed=1e16", "must be an integer"),  # a float beyond 2**53 may not be the number that was written
        ("--learning_rate=inf | --learning_rate=nan | --learning_rate=1e999", NUMBER),
        ("--learning_rate=2**53+1", NUMBER),  # not exact as a float
        ("learning_rate = False | learning_rate = '0.1' | learning_rate = -1", NUMBER),
        ("dropout = 1.5", "at most 1.0"),
        ("beta1 = 1.0 | beta1 = 1 | --beta1=2", "at least 0.0, below 1.0, not "),
        ("--batch_size=10**10**10 | --batch_size=-(3**9**9**9)", INTEGER),  # at once
        ("--bias=1 | --bias=yes | --bias=TRUE | --bias= | bias = 1", "must be True or False, not "),
        ("start = 42 | start = None | start = ['a']", "must be text in quotes, not "),
        ("--dtype=bf16 | dtype = 'bf16'", CHOICES + ", not 'bf16'; did you mean bfloat16?"),
        ("--dtype=int3", CHOICES + ", not 'int3'; write one of these"),
        ("--start", "write --start=value"),
        ("bias = true", "did you mean True?"),
        ("n_layer = n_leyer", "did you mean n_layer?"),
        ("learning_rate = 1e999 | learning_rate = 1e308 * 10 | learning_rate = 1 / (1e308 * 10)", FINITE),
        ("learning_rate = (-8) ** 0.5 | learning_rate = 10.0 ** 400 | max_iters = 2 ** 1024", FINITE),
        ("max_iters = 10 ** 10 ** 10 | learning_rate = (-7) ** 9 ** 9 ** 9", FINITE),
        ("learning_rate = 0 ** -1 | learning_rate = 1 // 0 | learning_rate = 1 % 0", "division by zero"),
        ("max_iters = True + 1 | max_iters = -bias | start = 'a%d' % 9 | start = 'a' * 9", "no arithmetic on "),
    ],
)
def test_a_wrong_value_is_refused_in_one_line_with_place_key_value_and_remedy(values, reason):
    for text in values.split(" | "):
        option = text.startswith("--")
        line = problem(text if option else write("seed = 1\n" + text))
        assert line.startswith(("command line: " if option else "x.py:2: ") + text[:20].split("\0")[0])
        assert reason in line


def test_arithmetic_gives_what_python_gives_and_is_refused_where_that_is_not_finite():
    names, operators, refused = {"x": 12, "y": 0.25}, ["+", "-", "*", "/", "//", "%", "**"], 0
    numbers = ["0", "1", "2", "7", "1_000", "0.5", "1e3", "2.5e-3", "0x1f", "1e300", "x", "y"]
    numbers += [f"({sign}{number})" for sign in "+-" for number in numbers]
    parts = [*itertools.product(numbers, operators, numbers)]
    parts += itertools.product("07x", operators, "2y", operators, "3y")
    parts += itertools.product("07x", operators, ["(2", "(y"], operators, ["3)", "y)"])
    texts = set(map(" ".join, parts))
    for text in texts:
        expected = result = None
        with contextlib.suppress(ZeroDivisionError, OverflowError):
            value = eval(text, {}, names)
            expected = None if isinstance(value, complex) or not abs(value) <= sys.float_info.max else value
        with contextlib.suppress(ConfigError):
            result = evaluate(ast.parse(text, mode="eval").body, names)
        assert result == expected and type(result) is type(expected), text
        refused += expected is None
    assert len(texts) > 9_000 and 500 < refused < 2_000


def test_read_values_reads_a_file_of_another_program_whatever_its_keys_are():
    path = write("'''docstring'''\nsteps = 10\ndevice = 'mps'\nlr_decay_iters = steps * scale\nsteps = steps + 0.5")
    known = {"scale": 3, "lr": 1e-3}
    values = dict(scale=3, lr=1e-3, steps=10.5, device="mps", lr_decay_iters=30)
    assert read_values(path, known) == values and known == {"scale": 3, "lr": 1e-3}
    with pytest.raises(ConfigError, match=r"^x\.py:2: .*\nx\.py:3: [^\n]*$"):
        read_values(write("a = 1\nimport os\nb = c\nd = 1"), {})
    for path, reason in ((write("a = = 2"), "x.py:1: invalid syntax"), ("missing.py", "missing.py: No such file")):
        with pytest.raises(ConfigError, match="^" + reason):
            read_values(path, {})


CODE = """
import time | from os import path | for seed in (1, 2): pass | while True: pass | with open('x'): pass
seed = 1 if bias else 2 | start = dataset.upper() | start = dataset[0] | start = {'a': 1} | start = [*dataset]
seed += 1 | seed: int = 1 | batch_size: 8 | seed, n_layer = 1, 2 | start.x = 1 | start[0] = 1 | bias = not compile
bias = n_layer > 3 | bias = bias or compile | bias = (seed := 3) | seed = 1 << 3 | seed = ~1 | bias | ... | del seed
global seed | assert bias | raise ValueError | async def f(): pass | OPEN | seed = OPEN | start = f"{OPEN}"
import os; os.system('touch marker') | __import__('os').system('touch marker') | start = (lambda: OPEN)()
start = [OPEN for _ in (1,)] | seed: OPEN = 1 | def f(x=OPEN): pass | class A(OPEN): pass | @OPEN;def f(): pass
start = b'a' | seed = 1j | if OPEN: pass | start = 'a' + exec("OPEN") | start = ().__class__.__base__.__subclasses__()
"""


def test_code_in_a_config_file_is_never_run_and_is_refused_with_file_line_and_what_to_write_instead():
    for code in table(CODE):
        code = code.replace("OPEN", "open('marker', 'w')").replace(";def", "\ndef")
        line = problem(write("\nseed = 1\n" + code))
        place = f"x.py:{3 + code.count(chr(10))}: {code.splitlines()[-1]}: "
        assert line.startswith(place + "the config is parsed, not executed; write key = value")
        assert "must be an integer" in problem(f"--seed={code}")
        with pytest.raises(ConfigError, match="parsed, not executed"):
            read_values("x.py", {})
        assert not Path("marker").exists()


def test_a_file_that_cannot_be_parsed_or_read_is_one_line_with_its_place_the_reason_and_the_remedy():
    for data in (b"seed = = 2", b"  bias = True", b"start = 'abc", b"start = '\xff'", b"seed = " + b"(" * 5000):
        line = problem(write(b"seed = 1\n" + data))
        assert line.startswith("x.py:2: ") and "; write key = value lines in UTF-8" in line
    for sign, times in itertools.product("-(+", (5000, 100_000)):  # Python does not name the line of these
        assert problem(write(f"seed = {sign * times}1")).endswith("; write key = value lines in UTF-8")
        assert "must be an integer" in problem(f"--seed={sign * times}1")
    os.makedirs("config/folder.py")
    write("", "config/quickstart.py")
    line = problem("config/quickstrat.py")
    assert line.startswith("config/quickstrat.py: No such file") and "did you mean config/quickstart.py?" in line
    assert "check the path" in problem("nowhere/x.py")
    assert problem("config/folder.py").startswith("config/folder.py: Is a directory; ")


MEANT = """
learning_rate: lr learning_rte learningRate | batch_size: batch-size BATCH_SIZE micro_batch_size | n_head: n_heads
n_embd: hidden_size d_model | block_size: context_length seq_len | max_iters: steps | out_dir: output_dir
"""


def test_an_unknown_key_is_refused_with_its_place_and_the_right_key():
    for right, names in [cell.split(": ") for cell in table(MEANT)]:
        for wrong in names.split():
            reason = f"unknown key {wrong}; did you mean {right}?"
            assert problem(f"--{wrong}=1") == f"command line: --{wrong}=1: {reason}"
            if wrong.isidentifier():
                assert problem(write(f"\n{wrong} = 1")) == f"x.py:2: {wrong} = 1: {reason}"
    assert problem("--lr=1", ConfigClass=FilesConfig).endswith("unknown key lr; --help lists the keys")
    assert problem("--num_workers=1", ConfigClass=FilesConfig).endswith("did you mean workers?")
    assert problem("--no-compile").endswith("write compile=False")
    assert problem("--no_compile").endswith("write compile=False")


def test_an_argument_that_is_not_a_key_is_answered_with_how_a_key_is_written():
    for argument in ("8", "quickstart", "-b=8", "-batch_size=8", "-1", "-", "", "batch_size=8"):
        line = problem(argument)
        assert line.startswith("command line: " + argument) and "--key=value" in line


def test_a_value_may_follow_its_key_after_a_space():
    config = load_config(Config, ["--batch_size", "8", "--seed", "-3", "--dropout", ".5", "--bias", "--start", "-"])
    assert config == Config(batch_size=8, seed=-3, dropout=0.5, bias=True, start="-")
    assert set(sources_of(config).values()) == {"command line"}
    for argv in (["--learning_rate", "1e-3"], ["--learning_rate", "1/1000"], ["--max_iters", "5*8"]):
        assert load_config(Config, argv) == load_config(Config, ["=".join(argv)])
    for text in ("", "a b", "x.py", "8", "true", "-5 degrees", "a=b"):  # x.py is no config file here
        assert load_config(Config, ["--start", text]).start == text
    config = load_config(FilesConfig, ["a", "--workers", "2", "b", "--verify", "c", write("workers = 1")])
    assert config == FilesConfig(files=("a", "b", "c"), workers=2, verify=True)


def test_where_a_value_after_a_space_is_missing_or_could_mean_something_else_the_remedy_is_named():
    for argv in (["--batch_size"], ["--batch_size", "--seed=1"], ["--start", "--json"], ["--start", "-x"]):
        assert problems(*argv)[0] == f"command line: {argv[0]}: a value is needed; write {argv[0]}=value"
    for word in ("true", "False"):
        assert problem("--compile", word) == f"command line: --compile {word}: write --compile={word}"
        assert f"write --verify={word}" in problem("--verify", word, ConfigClass=FilesConfig)
    assert problem("--batchsize", "8").endswith("--batchsize=8: unknown key batchsize; did you mean batch_size?")
    assert problem("--batch_size", write("seed = 1")).startswith(f"command line: --batch_size=x.py: {INTEGER}")
    assert problem("--seed", "eight").startswith("command line: --seed=eight: must be an integer")
    assert problem("--seed", "1", "2").startswith("command line: 2: not understood")


def test_one_argument_without_dashes_goes_to_the_field_for_one_input():
    for argv in (["runs/a"], ["--out_dir=runs/a"], ["--out_dir", "runs/a"], [write("out_dir = 'runs/a'")]):
        config = load_config(FolderConfig, argv)
        assert config == FolderConfig(out_dir="runs/a") and list(sources_of(config)) == ["out_dir"]
    config = load_config(FolderConfig, ["--json", "runs/a", "--top_k", "5", "--start", "runs/b"])
    assert config == FolderConfig(out_dir="runs/a", json=True, top_k=5, start="runs/b")
    assert "a b: 2 arguments; give one out_dir" in problem("a", "b", ConfigClass=FolderConfig)
    assert "given twice, also as a; give one" in problem("a", "--out_dir=b", ConfigClass=FolderConfig)
    for argument in ("-x", "-1", ""):
        assert "--key=value" in problem(argument, ConfigClass=FolderConfig)


def test_a_changed_config_still_knows_where_its_keys_were_set():
    config = changed(load_config(Config, ["--seed=1"]), n_layer=2)
    assert config == Config(seed=1, n_layer=2) and sources_of(config) == {"seed": "command line"}
    assert "seed" in describe(config) and "n_layer" not in describe(config)


def test_all_problems_are_shown_at_once_one_a_line_in_their_order_whatever_is_in_them():
    path = write("import time\nlr = 1\nn_layer = 1.5\ndtype = 'bf16'\n")
    lines = problems(path, "missing.py", "--bias=1", "stray", "--n_head=7")
    places = ["x.py:1", "x.py:2", "x.py:3", "x.py:4", "missing.py", "command line", "command line", "n_embd=768"]
    assert [line.split(": ")[0] for line in lines] == places
    file = write("seed = '''a\nb'''")
    for argument in (file, "--seed=a\nb\r\nc", "--a\nb=1", "--seed=" + "x" * 10_000, "--" + "y" * 10_000):
        assert len(problem(argument)) < 400
    doubled = "start = 'a'\n" + "start = start + start\n" * 100  # would be 2**100 letters
    assert "x.py:15: start = start + start: no arithmetic on " in problems(write(doubled))[0]
    assert "x.py:1: seed = 1+1" in problem(write("seed = " + "1+" * 2000 + "1"))


def test_a_check_between_keys_is_not_made_on_a_key_that_was_refused():
    assert problem("--n_head=7").startswith("n_embd=768: not a multiple of n_head=7")
    assert "must be an integer" in problem("--n_head=7", "--n_embd=70o")
    assert "unknown key hidden_size" in problem("--n_head=7", "--hidden_size=70")
    assert "parsed, not executed" in problem("--n_head=7", write("n_embd += 2"))
    assert len(problems("--n_head=7", "--seed=x")) == 2


def test_arguments_without_dashes_go_to_the_field_for_inputs():
    config = load_config(FilesConfig, ["b.parquet", "--workers=2", "a.parquet", write("workers = 1")])
    assert config.files == ("b.parquet", "a.parquet") and config.workers == 2
    for text in ("files = ['a', 'b']", "files = ('a', 'b')", "files = 'a', 'b'"):
        assert load_config(FilesConfig, [write(text)]).files == ("a", "b")
        assert load_config(FilesConfig, [write(text), "c"]).files == ("c",)
    assert "must be a list of texts, not 'a'" in problem(write("files = 'a'"), ConfigClass=FilesConfig)
    assert "a list may hold texts only" in problem(write("files = ('a', 1)"), ConfigClass=FilesConfig)
    for option in ("--files=a", "--files"):
        assert "write these without dashes" in problem(option, ConfigClass=FilesConfig)


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["--nonsense", "8", "--help", "missing.py"]])
def test_help_lists_every_key_with_type_default_limits_and_help(argv, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["some/folder/train.py"])
    for ConfigClass in (FilesConfig, Config):
        with pytest.raises(SystemExit) as end:
            load_config(ConfigClass, argv)
        assert end.value.code == 0
    files_help, text = capsys.readouterr().out.split("usage: python train.py [config.py ...]")[1:]
    assert files_help.startswith(" [files ...] [--key=value ...]\n") and "\n  files " in files_help
    words = " ".join(text.split())
    for field in dataclasses.fields(Config):
        facts = f"{type(field.default).__name__}, default {field.default!r}"
        assert f"--{field.name} {field.metadata['help']} ({facts}" in words
    assert CHOICES + ")" in words and "at least 1, at most 4096" in words


SCRIPT = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from configurator import ConfigError, run_script
from onecard import UserError

def main():
    exec(sys.argv[1])
    print("line\\n" * int(sys.argv[2]))

run_script(main)
"""


def run(do, lines=0, stdout=subprocess.PIPE):
    """A script that does this statement and prints so many lines -> its exit code, stdout, stderr."""
    command = [sys.executable, write(SCRIPT, "script.py"), do, str(lines)]
    result = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60)
    return result.returncode, result.stdout, result.stderr


def test_mistakes_of_the_user_end_a_script_with_2_and_a_line_each_ctrl_c_with_130_and_bugs_with_a_traceback():
    for error in ("UserError", "ConfigError"):
        done = run(f"raise {error}('a.bin: bytes are missing\\nb.bin: too')")
        assert done == (2, "", "script.py: a.bin: bytes are missing\nscript.py: b.bin: too\n")
    code, _, err = run("raise ConfigError('\\n'.join(map(str, range(10_000))))")
    lines = err.splitlines()
    assert code == 2 and len(lines) == 11 and lines[9:] == ["script.py: 9", "script.py: and 9,990 more"]
    handler = "signal.signal(signal.SIGINT, signal.default_int_handler)"  # `pytest &` has it ignored
    code, _, err = run(f"{handler}; os.kill(os.getpid(), signal.SIGINT)")
    assert code == 130 and "Traceback" not in err
    for bug in ("KeyError", "BrokenPipeError"):  # this pipe is not stdout
        code, _, err = run(f"raise {bug}")
        assert code == 1 and "Traceback" in err and bug in err
    assert run("raise SystemExit(7)")[0] == 7 and run("pass") == (0, "\n", "")


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_closed_stdout_ends_a_script_with_141_and_no_message(lines):
    reader, writer = os.pipe()
    os.close(reader)
    code, _, err = run("pass", lines, stdout=writer)
    os.close(writer)
    assert code == 141 and err == ""

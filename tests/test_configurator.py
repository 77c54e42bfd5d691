"""The config: what is read, what is refused and how that is said. `python -m pytest tests/test_configurator.py`"""

from __future__ import annotations  # as the scripts may: the types of the fields are then strings

import ast
import dataclasses
import math
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from configurator import ConfigError, describe, evaluate, key, load_config

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Config:
    out_dir: str = key("out", "folder of the run")
    eval_interval: int = key(2000, "steps between evaluations", low=1)
    log_interval: int = key(1, "steps between log lines", low=1)
    eval_iters: int = key(0, "nanoGPT's measure of an evaluation", low=0)
    eval_only: bool = key(False, "evaluate and stop")
    always_save_checkpoint: bool = key(True, "save also where the loss is no better")
    init_from: str = key("scratch", "where the weights come from")
    wandb_log: bool = key(False, "log to wandb")
    wandb_project: str = key("onecard", "project at wandb")
    wandb_run_name: str = key("run", "name at wandb")
    dataset: str = key("quickstart", "folder in data/")
    gradient_accumulation_steps: int = key(40, "micro batches a step", low=1)
    batch_size: int = key(12, "sequences in a micro batch", low=1, high=4096)
    block_size: int = key(1024, "context in tokens", low=1)
    n_layer: int = key(12, "layers", low=1)
    n_head: int = key(12, "heads", low=1)
    n_embd: int = key(768, "width", low=1)
    dropout: float = key(0.0, "dropout", low=0.0, high=1.0)
    bias: bool = key(False, "biases")
    learning_rate: float = key(6e-4, "peak learning rate", low=0.0)
    max_iters: int = key(600_000, "steps", low=0)
    lr_decay_iters: int = key(600_000, "steps until the lowest learning rate", low=0)
    min_lr: float = key(6e-5, "lowest learning rate", low=0.0)
    warmup_iters: int = key(2000, "steps of warm-up", low=0)
    weight_decay: float = key(0.1, "weight decay", low=0.0)
    beta2: float = key(0.95, "Adam's second factor")
    dtype: str = key("auto", "number format", choices=("float16", "bfloat16", "float32", "auto"))
    compile: bool = key(True, "torch.compile")
    start: str = key("\n", "prompt")
    seed: int = key(1337, "seed")

    def problems(self):
        if self.n_embd % self.n_head:
            return [f"n_embd={self.n_embd}: not a multiple of n_head={self.n_head}; write n_embd={self.n_head * 64}"]
        return []


@dataclass(frozen=True)
class FilesConfig:
    files: tuple[str, ...] = key((), "parquet files", inputs=True)
    workers: int = key(0, "processes", low=0)
    verify: bool = key(False, "verify only")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(text, name="x.py"):
    Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return name


def from_file(text, ConfigClass=Config):
    return load_config(ConfigClass, [write(text)])


def problems(*argv, ConfigClass=Config):
    with pytest.raises(ConfigError) as error:
        load_config(ConfigClass, list(argv))
    return str(error.value).split("\n")


def problem(*argv, ConfigClass=Config):
    (line,) = problems(*argv, ConfigClass=ConfigClass)
    return line


# What wins, and where it is said to come from


def test_without_arguments_the_config_is_the_defaults():
    assert load_config(Config, []) == Config()


def test_the_command_line_is_read_where_no_argv_is_given(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--batch_size=3"])
    assert load_config(Config).batch_size == 3


def test_files_win_over_defaults_and_later_ones_over_earlier_and_the_command_line_over_all():
    a = write("batch_size = 1\nblock_size = 1\nn_layer = 1\nseed = 1\nseed = 5", "a.py")
    b = write("block_size = 2\nn_layer = 2", "b.py")
    config = load_config(Config, ["--n_layer=3", a, b, "--dropout=0.5", "--dropout=0.25"])
    assert (config.batch_size, config.block_size, config.n_layer, config.dropout) == (1, 2, 3, 0.25)
    lines = {line.split()[0]: line.split(maxsplit=2)[1:] for line in describe(config).splitlines()}
    assert lines["batch_size"] == ["1", "a.py:1"]
    assert lines["block_size"] == ["2", "b.py:1"]
    assert lines["n_layer"] == ["3", "command line"]
    assert lines["seed"] == ["5", "a.py:5"]


def test_the_config_is_frozen_and_its_dict_has_the_keys_and_nothing_else():
    config = load_config(Config, ["--seed=1"])
    assert list(dataclasses.asdict(config)) == [field.name for field in dataclasses.fields(Config)]
    assert config == Config(seed=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 2


def test_describe_shows_every_key_once_and_those_that_were_set_in_aligned_lines():
    text = describe(load_config(Config, [write("out_dir = 'runs/a b'\nlearning_rate = 1e-3"), "--seed=1337"]))
    for field in dataclasses.fields(Config):
        assert len([word for word in text.replace("=", " ").split() if word == field.name]) == 1
    rows = text.split("  defaults: ")[0].splitlines()
    assert [row.split()[0] for row in rows] == ["out_dir", "learning_rate", "seed"]
    assert len({row.index(source) for row, source in zip(rows, ("x.py:1", "x.py:2", "command"), strict=True)}) == 1
    assert "'runs/a b'" in text and all(len(line) <= 110 for line in text.splitlines())


def test_describe_works_for_a_config_that_was_made_by_hand():
    assert describe(dataclasses.replace(Config(), seed=3)).startswith("  seed  3  ")
    assert describe(Config()).startswith("  defaults: out_dir='out', ")


# Values


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("--start=42", "42"),
        ("--start=a=b", "a=b"),
        ("--start=", ""),
        ("--start=--x", "--x"),
        ("--start='q'", "'q'"),
        ("--start=FILE:prompt.txt", "FILE:prompt.txt"),
        ("--start=x.py", "x.py"),
        ("--start=# no comment", "# no comment"),
        ("--start=two\nlines", "two\nlines"),
        ("--batch_size=1e3", 1000),
        ("--batch_size=1_000", 1000),
        ("--batch_size=5*8", 40),
        ("--batch_size=2**10", 1024),
        ("--batch_size= 8 ", 8),
        ("--batch_size=1000.0", 1000),
        ("--seed=-1", -1),
        ("--learning_rate=1e3", 1000.0),
        ("--learning_rate=3", 3.0),
        ("--learning_rate=6e-4/2", 3e-4),
        ("--bias", True),
        ("--bias=true", True),
        ("--bias=True", True),
        ("--compile=false", False),
        ("--compile=False", False),
        ("--dtype=float16", "float16"),
    ],
)
def test_a_value_of_the_command_line_is_taken(argument, value):
    got = getattr(load_config(Config, [argument]), argument[2:].partition("=")[0])
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("argument", "hint"),
    [
        ("--batch_size=1.5", "a whole number is needed, not 1.5"),
        ("--batch_size=", "a whole number"),
        ("--batch_size=abc", "a whole number is needed, not 'abc'"),
        ("--batch_size=block_size", "a whole number"),
        ("--batch_size=8#4", "a whole number"),
        ("--batch_size=True", "a whole number is needed, not True"),
        ("--batch_size='8'", "a whole number"),
        ("--batch_size=8;9", "a whole number"),
        ("--batch_size=8,9", "onecard reads"),
        ("--batch_size=int(8)", "a whole number"),
        ("--batch_size=(lambda: 8)()", "onecard reads"),
        ("--batch_size=0", "write 1 or more"),
        ("--batch_size=4097", "write 4096 or less"),
        ("--batch_size=1/0", "division by zero"),
        ("--batch_size=1\0", "a whole number"),
        ("--batch_size=" + "-" * 100_000 + "1", "a whole number"),
        ("--batch_size=" + "9" * 5000, "a whole number"),
        ("--seed=1e16", "a whole number"),  # a float beyond 2**53 may not be the number that was written
        ("--learning_rate=inf", "a number is needed"),
        ("--learning_rate=nan", "a number is needed"),
        ("--learning_rate=1e999", "not a finite"),
        ("--learning_rate=-1", "write 0.0 or more"),
        ("--learning_rate=2**53+1", "a number is needed"),  # no float holds it
        ("--bias=1", "write true or false"),
        ("--bias=yes", "write true or false"),
        ("--bias=TRUE", "write true or false"),
        ("--bias=", "write true or false"),
        ("--dtype=bf16", "permitted are float16, bfloat16, float32, auto; did you mean bfloat16?"),
        ("--dtype=int3", "permitted are"),
        ("--batch_size", "write --batch_size=value"),
        ("--start", "write --start=value"),
    ],
)
def test_a_value_of_the_command_line_is_refused_in_one_line_that_says_what_to_write(argument, hint):
    line = problem(argument)
    assert line.startswith("command line: " + argument[:20].split("\0")[0]) and hint in line


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("learning_rate = 1", "learning_rate", 1.0),
        ("max_iters = 1e3", "max_iters", 1000),
        ("max_iters = 6_000 // 10", "max_iters", 600),
        ("batch_size = 2\nmax_iters = batch_size * 3", "max_iters", 6),
        ("max_iters = n_layer * 3", "max_iters", 36),  # a default
        ("batch_size = 2\nbatch_size = batch_size + 1", "batch_size", 3),
        ("max_iters = lr_decay_iters = 10", "lr_decay_iters", 10),
        ("seed = n_layer = seed + 1", "n_layer", 1338),
        ("max_iters = 1e3\nwarmup_iters = max_iters // 10", "warmup_iters", 100),
        ("out_dir = 'out-' + dataset", "out_dir", "out-quickstart"),
        ("out_dir = ('a'\n  'b')", "out_dir", "ab"),
        ("bias = wandb_log = True", "bias", True),
        ("'''a\ndocstring'''\npass\nseed = 1", "seed", 1),
        ("seed = 1; bias = True", "seed", 1),
        ("\ufeffseed = 1", "seed", 1),
        ("# ü\r\nseed = 1\r\n", "seed", 1),
        ("start = 'ü€'", "start", "ü€"),
        ("dropout = -0.5 + +1", "dropout", 0.5),
        ("learning_rate = 6e-4 * (batch_size / 12) ** 0.5", "learning_rate", 6e-4),
    ],
)
def test_a_value_of_a_config_file_is_taken(text, name, value):
    got = getattr(from_file(text), name)
    assert got == value and type(got) is type(value)


def test_names_have_the_values_of_earlier_files():
    a, b = write("batch_size = 2", "a.py"), write("max_iters = batch_size * 5", "b.py")
    assert load_config(Config, [a, b]).max_iters == 10
    assert load_config(Config, [b, a]).max_iters == 60


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("bias = 1", "True or False is needed, not 1"),
        ("batch_size = True", "a whole number is needed, not True"),
        ("learning_rate = False", "a number is needed"),
        ("learning_rate = '0.1'", "a number is needed, not '0.1'"),
        ("start = 42", "text in quotes is needed, not 42"),
        ("start = None", "text in quotes"),
        ("start = ['a']", "text in quotes"),
        ("start = b'a'", "text in quotes"),
        ("n_layer = 1.5", "a whole number is needed, not 1.5"),
        ("n_layer = 3 / 2", "a whole number is needed, not 1.5"),
        ("bias = true", "did you mean True?"),
        ("n_layer = n_leyer", "did you mean n_layer?"),
        ("dtype = 'flaot16'", "permitted are float16, bfloat16, float32, auto; did you mean float16?"),
        ("dropout = 1.5", "write 1.0 or less"),
        ("learning_rate = 1e999", "not a finite"),
        ("learning_rate = 1e308 * 10", "not a finite"),
        ("learning_rate = 1 / (1e308 * 10)", "not a finite"),
        ("learning_rate = 1j", "a number"),
        ("learning_rate = (-8) ** 0.5", "not a finite real number"),
        ("max_iters = 10 ** 10 ** 10", "beyond 1.8e308"),
        ("max_iters = 2 ** (2 ** 1023)", "beyond 1.8e308"),
        ("max_iters = 2 ** 1024", "beyond 1.8e308"),
        ("max_iters = 0x1" + "0" * 10_000, "beyond 1.8e308"),
        ("learning_rate = 10.0 ** 400", "beyond 1.8e308"),
        ("learning_rate = 0 ** -1", "division by zero"),
        ("learning_rate = 1 // 0", "division by zero"),
        ("learning_rate = 1 % 0", "division by zero"),
        ("max_iters = True + 1", "no arithmetic on True and 1"),
        ("max_iters = -bias", "no arithmetic on False"),
        ("start = 'a' * 9", "no arithmetic on 'a' and 9"),
        ("start = 'a' + 9", "no arithmetic on 'a' and 9"),
        ("start = 'a%d' % 9", "no arithmetic"),
    ],
)
def test_a_value_of_a_config_file_is_refused_with_file_line_and_remedy(text, hint):
    line = problem(write("seed = 1\n" + text))
    assert line.startswith("x.py:2: " + text[:20]) and hint in line


def test_a_text_cannot_be_doubled_until_memory_is_full():
    assert "longer than a page" in problems(write("start = 'aaaaaaaa'\n" + "start = start + start\n" * 60))[0]


def random_expression(rng, depth):
    if depth == 0 or rng.random() < 0.2:
        return rng.choice(["0", "1", "2", "3", "7", "10", "1_000", "0.5", "1e3", "2.5e-3", "0x1f", "1e300", "x", "y"])
    if rng.random() < 0.15:
        return rng.choice("+-") + "(" + random_expression(rng, depth - 1) + ")"
    operator = rng.choice(["+", "-", "*", "/", "//", "%", "**"])
    left, right = random_expression(rng, depth - 1), random_expression(rng, depth - 1)
    return f"({left}) {operator} ({right})" if rng.random() < 0.6 else f"{left} {operator} {right}"


def by_python(tree, names):
    """The value that Python gives, or None where that or a part of it is no finite real number of a float's range."""
    for node in reversed([node for node in ast.walk(tree) if isinstance(node, ast.expr)]):  # parts come first
        try:
            value = eval(compile(ast.Expression(node), "", "eval"), {}, names)
        except (ZeroDivisionError, OverflowError):
            return None
        if isinstance(value, complex) or not abs(value) <= sys.float_info.max:
            return None
    return value


def test_arithmetic_gives_what_python_gives_and_is_refused_where_that_is_not_finite():
    rng, names = random.Random(0), {"x": 12, "y": 0.25}
    taken = refused = 0
    while taken + refused < 10_000:
        text = random_expression(rng, rng.randint(1, 4))
        if text.count("**") > 1 or text.count("1_000") > 2:  # Python itself might not end
            continue
        tree = ast.parse(text, mode="eval").body
        truth = by_python(tree, names)
        try:
            value = evaluate(tree, names)
        except ConfigError:
            assert truth is None, text
            refused += 1
        else:
            assert value == truth and type(value) is type(truth), text
            taken += 1
    assert taken > 5_000 and refused > 500


# Statements: nanoGPT's shape is read, code is not run


def test_a_config_of_the_form_of_train_gpt2_is_read_unchanged():
    config = from_file("""# a small cluster's worth of settings
wandb_log = True
wandb_project = 'pages'
wandb_run_name='mini-gpt'

batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

# tokens
max_iters = 600000
lr_decay_iters = 600000

eval_interval = 1000
eval_iters = 200
log_interval = 10
weight_decay = 1e-1
""")
    assert config.gradient_accumulation_steps == 40 and config.weight_decay == 0.1
    assert config.wandb_run_name == "mini-gpt" and config.wandb_log is True and config.eval_iters == 200


def test_a_config_of_the_form_of_train_shakespeare_char_is_read_unchanged():
    config = from_file("""out_dir = 'out-letters'
eval_interval = 250 # often
always_save_checkpoint = False
wandb_log = False # override by flag
dataset = 'letters'
gradient_accumulation_steps = 1
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2
learning_rate = 1e-3
min_lr = 1e-4 # a tenth
beta2 = 0.99
warmup_iters = 100

# device = 'cpu'
# compile = False
""")
    assert (config.always_save_checkpoint, config.learning_rate, config.n_embd) == (False, 1e-3, 384)


def test_a_config_of_the_form_of_eval_gpt2_is_read_unchanged():
    config = from_file("batch_size = 8\neval_iters = 500\neval_only = True\nwandb_log = False\ninit_from = 'gpt2'\n")
    assert config.eval_only is True and config.init_from == "gpt2"


@pytest.mark.parametrize(
    ("code", "hint"),
    [
        ("import time", "write each value out as key = value"),
        ("from os import path", "write each value out"),
        ("def f(): pass", "write each value out"),
        ("class A: pass", "write each value out"),
        ("if bias: seed = 2", "write the value that this run needs"),
        ("for seed in (1, 2): pass", "write the value that this run needs"),
        ("while True: pass", "write the value that this run needs"),
        ("with open('x'): pass", "write the value that this run needs"),
        ("seed = 1 if bias else 2", "write the value that this run needs"),
        ("print('x')", "write the value that this gives"),
        ("seed = int('3')", "write the value that this gives"),
        ("start = dataset.upper()", "write the value that this gives"),
        ("start = dataset.__class__", "write the value that this gives"),
        ("start = dataset[0]", "write the value that this gives"),
        ("start = [x for x in 'ab']", "write the value that this gives"),
        ("start = f'{dataset}'", "join two strings with +"),
        ("seed += 1", "write key = key + value"),
        ("seed: int = 1", "without the type"),
        ("batch_size: 8", "without the type"),
        ("seed, n_layer = 1, 2", "write key = value"),
        ("start.x = 1", "write key = value"),
        ("start[0] = 1", "write key = value"),
        ("start = lambda: 0", "write key = value"),
        ("start = {'a': 1}", "write key = value"),
        ("start = ('a', 1)", "write key = value"),
        ("start = [*dataset]", "write key = value"),
        ("bias = not compile", "write key = value"),
        ("bias = n_layer > 3", "write key = value"),
        ("bias = wandb_log or compile", "write key = value"),
        ("bias = (seed := 3)", "write key = value"),
        ("seed = 1 << 3", "write key = value"),
        ("seed = ~1", "write key = value"),
        ("5", "write key = value"),
        ("...", "write key = value"),
        ("del seed", "write key = value"),
        ("global seed", "write key = value"),
        ("assert bias", "write key = value"),
        ("raise ValueError", "write key = value"),
        ("async def f(): pass", "write key = value"),
    ],
)
def test_code_is_refused_with_file_line_and_what_to_write_instead(code, hint):
    line = problem(write("\nseed = 1\n" + code))
    assert line.startswith(f"x.py:3: {code}: onecard reads config files and does not run them; ") and hint in line


MARKERS = [
    "open('marker', 'w')",
    "seed = open('marker', 'w')",
    "import os; os.system('touch marker')",
    "__import__('os').system('touch marker')",
    "start = f\"{open('marker', 'w')}\"",
    "start = [open('marker', 'w') for _ in (1,)]",
    "start = (lambda: open('marker', 'w'))()",
    "seed: open('marker', 'w') = 1",
    "@print(open('marker', 'w'))\nclass A: pass",
    "def f(x=open('marker', 'w')): pass",
    "start = 'a' + exec(\"open('marker', 'w')\")",
    "start = ().__class__.__base__.__subclasses__()",
    "if open('marker', 'w'): pass",
]


@pytest.mark.parametrize("code", MARKERS)
def test_a_config_file_with_code_in_it_runs_none_of_it(code):
    problems(write(code))
    assert not Path("marker").exists()
    problems(f"--seed={code}")
    assert not Path("marker").exists()


# Files that are no config files


@pytest.mark.parametrize(
    ("data", "start", "hint"),
    [
        (b"seed = 1\nseed = = 2", "x.py:2: ", "invalid syntax"),
        (b"seed = 1\n  bias = True", "x.py:2: ", "unexpected indent"),
        (b"seed = 1\nstart = 'abc", "x.py:2: ", "unterminated"),
        (b"seed = " + b"9" * 5000, "x.py:1: ", "lines of key = value"),
        (b"seed = 1\nstart = '\xff'", "x.py:2: ", "save the file as UTF-8"),
        ("seed = 1".encode("utf-16"), "x.py: ", "not a page of UTF-8 text"),
        (b"seed = 1\n\0", "x.py: ", "not a page of UTF-8 text"),
        (b"#" * 1_000_001, "x.py: ", "not a page of UTF-8 text"),
        (b"seed = " + b"-" * 100_000 + b"1", "x.py: ", "too deeply nested"),
        (b"seed = " + b"(" * 100_000, "x.py:1: ", "too many nested parentheses"),
        (b"seed = " + b"1+" * 90_000 + b"1", "x.py: ", "too deeply nested"),
        (b"start = dataset" + b".a" * 90_000, "x.py: ", "too deeply nested"),
    ],
)
def test_a_file_that_cannot_be_parsed_is_one_line_with_file_and_remedy(data, start, hint):
    line = problem(write(data))
    assert line.startswith(start) and hint in line and "; " in line


def test_an_expression_of_any_depth_is_a_value_or_a_problem():
    for terms in range(50, 1500, 50):
        path = write("max_iters = " + "1+" * terms + "1")
        try:
            assert load_config(Config, [path]).max_iters == terms + 1
        except ConfigError as error:
            assert "too deeply nested" in str(error)


def test_a_file_that_is_not_there_is_named_with_those_that_are():
    os.mkdir("config")
    write("", "config/quickstart.py")
    line = problem("config/quickstrat.py")
    assert line.startswith("config/quickstrat.py: ") and "nearest: config/quickstart.py" in line
    assert "check the path" in problem("nowhere/x.py")


def test_a_folder_and_a_file_that_may_not_be_read_are_named():
    os.mkdir("folder.py")
    assert problem("folder.py").startswith("folder.py: no config file (Is a directory)")
    os.chmod(write("seed = 1", "secret.py"), 0)
    if not os.access("secret.py", os.R_OK):  # root may read it
        assert problem("secret.py").startswith("secret.py: no config file (Permission denied)")


# Unknown keys, stray arguments, many problems


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("lr", "learning_rate"),
        ("learning_rte", "learning_rate"),
        ("learningRate", "learning_rate"),
        ("batch-size", "batch_size"),
        ("BATCH_SIZE", "batch_size"),
        ("micro_batch_size", "batch_size"),
        ("grad_accum_steps", "gradient_accumulation_steps"),
        ("accumulation_steps", "gradient_accumulation_steps"),
        ("n_layers", "n_layer"),
        ("num_layers", "n_layer"),
        ("n_heads", "n_head"),
        ("hidden_size", "n_embd"),
        ("d_model", "n_embd"),
        ("context_length", "block_size"),
        ("seq_len", "block_size"),
        ("ctx_len", "block_size"),
        ("steps", "max_iters"),
        ("max_steps", "max_iters"),
        ("wd", "weight_decay"),
        ("warmup_steps", "warmup_iters"),
        ("output_dir", "out_dir"),
    ],
)
def test_an_unknown_key_is_refused_with_its_place_and_the_right_key(wrong, right):
    assert problem(f"--{wrong}=1") == f"command line: --{wrong}=1: unknown key {wrong}; did you mean {right}?"
    if wrong.isidentifier():
        line = problem(write(f"\n{wrong} = 1"))
        assert line == f"x.py:2: {wrong} = 1: unknown key {wrong}; did you mean {right}?"


def test_a_key_is_suggested_only_where_the_class_has_it():
    assert problem("--lr=1", ConfigClass=FilesConfig).endswith("unknown key lr; --help lists the keys")
    assert problem("--num_workers=1", ConfigClass=FilesConfig).endswith("did you mean workers?")


def test_switching_off_by_name_is_answered_with_how_it_is_written():
    assert problem("--no-compile").endswith("write compile=false")
    assert problem("--no_compile").endswith("write compile=false")


@pytest.mark.parametrize("argument", ["8", "quickstart", "-b=8", "-batch_size=8", "-1", "-", ""])
def test_an_argument_that_is_no_key_is_answered_with_how_a_key_is_written(argument):
    line = problem(argument)
    assert line.startswith("command line: " + argument) and "--key=value" in line


def test_a_key_and_its_value_as_two_arguments_are_answered_with_how_it_is_written():
    first, second = problems("--batch_size", "8")
    assert "write --batch_size=value" in first and "8: not understood; write --key=value" in second
    assert "--key=value" in problem("--compile", "false")
    assert "--key=value" in problem("--verify", "False", ConfigClass=FilesConfig)


def test_all_problems_are_shown_at_once_one_a_line_in_their_order():
    path = write("import time\nlr = 1\nn_layer = 1.5\ndtype = 'bf16'\n")
    lines = problems(path, "missing.py", "--bias=1", "stray", "--n_head=7")
    starts = ["x.py:1: ", "x.py:2: ", "x.py:3: ", "x.py:4: ", "missing.py: "] + ["command line: "] * 2 + ["n_embd="]
    assert len(lines) == len(starts)
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=True))


def test_a_check_between_keys_is_not_made_on_a_key_that_was_refused():
    assert problem("--n_head=7").startswith("n_embd=768: not a multiple of n_head=7")
    assert "whole number" in problem("--n_head=7", "--n_embd=70o")
    assert "unknown key hidden_size" in problem("--n_head=7", "--hidden_size=70")
    assert len(problems("--n_head=7", "--seed=x")) == 2


def test_a_problem_stays_one_line_whatever_is_in_it():
    assert len(problems("--seed=a\nb\r\nc")) == 1
    assert len(problems("--a\nb=1")) == 1
    assert len(problems(write("seed = '''a\nb'''"))) == 1
    assert all(len(line) < 400 for line in problems("--seed=" + "x" * 10_000, "--" + "y" * 10_000))


# Inputs


def test_arguments_without_dashes_go_to_the_field_for_inputs():
    config = load_config(FilesConfig, ["b.parquet", "--workers=2", "a.parquet", write("workers = 1")])
    assert config.files == ("b.parquet", "a.parquet") and config.workers == 2
    assert "('b.parquet', 'a.parquet')  command line" in describe(config)


@pytest.mark.parametrize("text", ["files = ['a', 'b']", "files = ('a', 'b')", "files = 'a', 'b'"])
def test_a_config_file_may_list_the_inputs_and_the_command_line_wins(text):
    assert from_file(text, FilesConfig).files == ("a", "b")
    assert load_config(FilesConfig, [write(text), "c"]).files == ("c",)


def test_inputs_are_refused_as_one_text_or_as_a_key_with_dashes():
    assert "a list of texts is needed, not 'a'" in problem(write("files = 'a'"), ConfigClass=FilesConfig)
    assert "write these without dashes" in problem("--files=a", ConfigClass=FilesConfig)
    assert "write these without dashes" in problem("--files", ConfigClass=FilesConfig)


def test_many_inputs_take_one_line():
    text = describe(load_config(FilesConfig, [f"part_{i}.parquet" for i in range(500)]))
    assert "... 500 in all)" in text and len(text.splitlines()[0]) < 150


# Help, and how a script ends


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["--nonsense", "8", "--help", "missing.py"]])
def test_help_lists_every_key_with_type_default_choices_and_help(argv, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["some/folder/train.py"])
    with pytest.raises(SystemExit) as end:
        load_config(Config, argv)
    text = capsys.readouterr().out
    assert end.value.code == 0 and text.startswith("usage: python train.py [config.py ...] [--key=value ...]\n")
    words = " ".join(text.split())
    for field in dataclasses.fields(Config):
        line = f"--{field.name} {field.metadata['help']} ({field.type}, default {field.default!r}"
        assert line in words
    assert "one of float16 bfloat16 float32 auto)" in words and "at least 1, at most 4096" in words


def test_help_names_the_inputs(capsys):
    with pytest.raises(SystemExit):
        load_config(FilesConfig, ["--help"])
    text = capsys.readouterr().out
    assert "[config.py ...] [files ...] [--key=value ...]" in text and "\n  files " in text


SCRIPT = """
import os, signal, sys
sys.path.insert(0, {root!r})
from dataclasses import dataclass
from configurator import describe, key, load_config, run_script

class DiskError(ValueError): pass

@dataclass(frozen=True)
class Config:
    do: str = key("print", "what to do")
    lines: int = key(1, "how many")

def main(argv=None):
    config = load_config(Config, argv)
    if config.do == "disk": raise DiskError("a.bin: 3 bytes are missing; run prepare.py")
    if config.do == "bug": raise KeyError("x")
    if config.do == "exit": raise SystemExit(7)
    if config.do == "interrupt": os.kill(os.getpid(), signal.SIGINT)
    if config.do == "pipe": raise BrokenPipeError(32, "a worker is gone")
    print("line\\n" * config.lines)

if __name__ == "__main__":
    run_script(main, DiskError)
"""


def run(*argv):
    path = write(SCRIPT.format(root=str(ROOT)), "script.py")
    return subprocess.run([sys.executable, path, *argv], capture_output=True, text=True, timeout=60)


def test_a_script_ends_with_2_and_one_line_a_problem_for_a_mistake_of_the_user():
    result = run("--lines=x", "--doo=1")
    assert result.returncode == 2 and result.stdout == ""
    assert [line.split(": ")[:2] for line in result.stderr.splitlines()] == [["script.py", "command line"]] * 2
    result = run("--do=disk")
    assert (result.returncode, result.stderr) == (2, "script.py: a.bin: 3 bytes are missing; run prepare.py\n")


def test_a_script_ends_with_130_and_no_traceback_when_interrupted():
    result = run("--do=interrupt")
    assert result.returncode == 130 and "Traceback" not in result.stderr


def test_faults_of_the_program_keep_their_traceback_and_exits_their_code():
    assert "KeyError" in run("--do=bug").stderr and "BrokenPipeError" in run("--do=pipe").stderr
    assert run("--do=exit").returncode == 7 and run().returncode == 0


@pytest.mark.skipif(os.name == "nt", reason="Windows reports a closed pipe in another way")
@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_script_ends_quietly_when_nobody_reads_on(lines):
    path = write(SCRIPT.format(root=str(ROOT)), "script.py")
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, path, f"--lines={lines}"]
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert result.returncode != 0 and result.stderr == ""


def test_floats_of_the_command_line_are_pythons_own():
    rng = random.Random(1)
    for _ in range(200):
        value = math.ldexp(rng.random(), rng.randint(-300, 300))
        assert load_config(Config, [f"--learning_rate={value!r}"]).learning_rate == value

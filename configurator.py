"""The config of each script: a dataclass with the defaults, then config files, then --key=value. The last one wins.

    python train.py config/quickstart.py --batch_size=8          (python train.py --help lists every key)

`--batch_size 8` means the same. True and False need the equals sign, because `--compile` alone means True. A config
file holds `key = value` lines in Python syntax. It is parsed and never executed: a value is a literal, arithmetic, or
the name of a key. All mistakes are collected and raised as one ConfigError.
"""

import ast
import dataclasses
import difflib
import math
import os
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from glob import glob
from operator import add, floordiv, ge, gt, lt, mod, mul, neg, pos, pow, sub, truediv
from types import SimpleNamespace
from typing import Any, TypeVar

from onecard import UserError

Config = TypeVar("Config", bound=Any)
ALIASES = {  # names that other programs give to a key
    "learning_rate": "lr max_lr peak_lr",
    "gradient_accumulation_steps": "grad_accum grad_accum_steps accumulation_steps accumulate_grad_batches",
    "grad_clip": "clip_grad max_grad_norm gradient_clip_val",
    "weight_decay": "wd",
    "warmup_iters": "warmup warmup_steps num_warmup_steps",
    "max_iters": "steps max_steps num_steps train_steps iters num_iterations",
    "batch_size": "micro_batch_size micro_batch device_batch_size per_device_train_batch_size",
    "block_size": "context_length context ctx_len seq_len seq_length sequence_length n_ctx",
    "n_layer": "n_layers num_layers layers depth num_hidden_layers",
    "n_head": "n_heads num_heads heads num_attention_heads",
    "n_embd": "hidden_size d_model width embed_dim",
    "out_dir": "output_dir save_dir checkpoint_dir",
    "dtype": "precision",
    "start": "prompt",
    "max_new_tokens": "num_tokens max_tokens max_length",
    "workers": "num_workers num_proc",
}
BOOLS = {"true": True, "True": True, "false": False, "False": False}
TYPES = {bool: "True or False", int: "an integer", float: "a number", str: "text in quotes", tuple: "a list of texts"}
OPERATORS: dict[type, Callable[..., Any]] = {ast.Add: add, ast.Sub: sub, ast.Mult: mul, ast.Div: truediv}
TOO_DEEP = (MemoryError, RecursionError)  # what Python raises for thousands of signs or sums in one value
OPERATORS |= {ast.FloorDiv: floordiv, ast.Mod: mod, ast.Pow: pow, ast.UAdd: pos, ast.USub: neg}


class ConfigError(UserError):
    """Mistakes in a config: one line for each, with its place, the reason and the remedy."""


def key(default, help: str, *, choices=(), low=None, high=None, below=None, inputs: bool = False) -> Any:
    """A field of a config dataclass; all its fields must be made by this function. A key has the type of its default.

    choices: the permitted texts. low, high: inclusive bounds; below: exclusive. inputs=True: the field takes the
    command-line arguments without dashes that are no config files: any number if a tuple of texts, one if a text.
    """
    rules = dict(type=type(default), help=help, choices=choices, low=low, high=high, below=below, inputs=inputs)
    return dataclasses.field(default=default, metadata=rules)


def load_config(ConfigClass: type[Config], argv: Sequence[str] | None = None) -> Config:
    """The config of one run: defaults, then the .py files in argv in their order, then its --key=value.

    argv defaults to the command line. --help prints every key and raises SystemExit(0). Raises one ConfigError with all
    problems; ConfigClass may have a method problems() that returns those between its keys.
    """
    argv = sys.argv[1:] if argv is None else argv
    keys = {f.name: SimpleNamespace(default=f.default, **f.metadata) for f in dataclasses.fields(ConfigClass)}
    if "--help" in argv or "-h" in argv:
        print(help_text(keys))
        raise SystemExit(0)
    values = {name: key.default for name, key in keys.items()}
    sources: dict[str, str] = {}  # key -> the place where it is set
    problems: list[str] = []
    files, inputs, options = split_arguments(argv, problems, keys)
    for path in files:
        sources |= read_file(path, values, problems, keys)
    sources |= read_arguments(inputs, options, values, problems, keys)
    config = ConfigClass(**values)
    object.__setattr__(config, "_sources", sources)  # for describe(); not a field, so asdict() does not show it
    if hasattr(config, "problems"):
        refused = set(keys).intersection(re.findall(r"\w+", "\n".join(problems)))  # these still have an earlier value
        problems += [text for text in config.problems() if refused.isdisjoint(re.findall(r"\w+", text))]
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    return config


def read_values(path: str, known: dict) -> dict:
    """The values of a config file over those of `known`. Any key is permitted, and its value is not checked.

    Raises ConfigError with the file and line of each statement that cannot be read.
    """
    values = dict(known)
    problems: list[str] = []
    read_file(path, values, problems)
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    return values


def read_file(path, values, problems, keys=None):
    """Adds the values of a config file to `values`, checked if `keys` is given. Returns key -> file:line."""
    sources = {}
    for place, text, names, tree in parse_file(path, problems):
        try:
            value = evaluate(tree, values)
            for name in names:
                values[name] = checked(value, find_key(name, keys)) if keys else value
                sources[name] = place
        except (ConfigError, RecursionError) as error:
            problems.append(f"{place}: {text}: {error}")
    return sources


def parse_file(path, problems):
    """Yields (file:line, text, assigned names, syntax tree of the value) for each statement of a config file.

    For a statement other than `key = value`, the tree is the whole statement, and evaluate() refuses it.
    """
    try:
        with open(path, "rb") as file:
            data = file.read()
        statements = ast.parse(data).body
    except OSError as error:
        others = {*glob(os.path.join(os.path.dirname(path), "*.py"))} - {path}
        problems.append(f"{path}: {error.strerror}; {did_you_mean(path, others, 'check the path')}")
        return
    except (SyntaxError, ValueError, *TOO_DEEP) as error:  # ValueError: a zero byte
        line, reason = getattr(error, "lineno", None) or 1, getattr(error, "msg", error) or "too deep"
        problems.append(f"{path}:{line}: {reason}; write key = value lines in UTF-8")
        return
    lines = data.splitlines()
    for statement in statements:
        names, tree = [], statement
        match statement:
            case ast.Pass() | ast.Expr(value=ast.Constant(value=str())):  # a text alone is a docstring
                continue
            case ast.Assign(targets=targets) if all(isinstance(target, ast.Name) for target in targets):
                names, tree = [target.id for target in targets], statement.value
        text = lines[statement.lineno - 1].decode("utf-8-sig", errors="replace").strip()
        yield f"{path}:{statement.lineno}", shorten(text), names, tree


def split_arguments(argv, problems, keys):
    """argv -> (config files, other arguments without dashes, options). "--key", "value" become one option."""
    files, inputs, options, rest = [], [], [], list(argv)
    takes_inputs = any(key.inputs for key in keys.values())
    while rest:
        argument = rest.pop(0)
        key = keys.get(argument[2:])
        if argument[:1] not in ("", "-"):
            (files if argument.endswith(".py") else inputs if takes_inputs else options).append(argument)
        elif key and key.type is bool and rest and rest[0] in BOOLS:
            problems.append(f"command line: {argument} {rest[0]}: write {argument}={rest.pop(0)}")
        elif argument.startswith("--") and "=" not in argument and not (key and key.type in (bool, tuple)):
            options.append(f"{argument}={rest.pop(0)}" if rest and is_value(rest[0]) else argument)
        else:
            options.append(argument)
    return files, inputs, options


def is_value(argument):
    """Whether an argument after "--key" is its value, not the next option. A negative number is, and standard input."""
    return not argument.startswith("-") or argument == "-" or argument[1] in ".0123456789"


def read_arguments(inputs, options, values, problems, keys):
    """Adds the values of the command line to `values`. Returns key -> "command line"."""
    sources = {}
    for name in [name for name, key in keys.items() if key.inputs and inputs]:  # at most one
        is_list = keys[name].type is tuple
        values[name] = tuple(inputs) if is_list else inputs[0]
        sources[name] = "command line"
        if len(inputs) > 1 and not is_list:
            problems.append(f"command line: {shorten(' '.join(inputs))}: {len(inputs)} arguments; give one {name}")
    for option in options:
        try:
            if not option.startswith("--"):
                raise ConfigError("not understood; write --key=value (a config file ends in .py)")
            name, equals, text = option[2:].partition("=")
            key = find_key(name, keys)
            if key.type is tuple:
                raise ConfigError("write these without dashes")
            if key.inputs and inputs:
                raise ConfigError(f"{name} is given twice, also as {values[name]}; give one")
            if not equals and key.type is not bool:
                raise ConfigError(f"a value is needed; write --{name}=value")
            values[name] = checked(value_of(text, key) if equals else True, key)
            sources[name] = "command line"
        except ConfigError as error:
            problems.append(f"command line: {shorten(option)}: {error}")
    return sources


def value_of(text, key):
    """The value of --key=text. Where a number is needed and text is none, it is text, which checked() refuses."""
    if key.type is bool:
        return BOOLS.get(text, text)
    if key.type is str:
        return text
    try:
        return evaluate(ast.parse(f"({text})", mode="eval").body, {})  # in parentheses, a comment is a syntax error
    except (SyntaxError, ValueError, *TOO_DEEP):  # a ConfigError is a ValueError
        return text


def evaluate(node: ast.AST, names: dict) -> Any:
    """The value of a syntax tree: a literal, a name, or arithmetic as Python does it. Nothing is ever called."""
    match node:
        case ast.Constant(value=bool() | int() | float() | str() | None):
            value: Any = node.value
        case ast.Name(id=name):
            if name not in names:
                remedy = did_you_mean(name, [*names, "True", "False"], otherwise="write the value itself")
                raise ConfigError(f"the name {name} has no value; {remedy}")
            value = names[name]
        case ast.Tuple(elts=items) | ast.List(elts=items):
            value = tuple(evaluate(item, names) for item in items)
            if not all(isinstance(item, str) for item in value):
                raise ConfigError("a list may hold texts only; write each in quotes")
        case ast.UnaryOp(op=op, operand=operand) if type(op) in OPERATORS:
            value = calculate(op, evaluate(operand, names))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            value = calculate(op, evaluate(left, names), evaluate(right, names))
        case _:
            raise ConfigError("the config is parsed, not executed; write key = value with a literal or arithmetic")
    if isinstance(value, complex) or (isinstance(value, int | float) and not abs(value) <= sys.float_info.max):
        raise ConfigError("not a finite real number, or beyond 1.8e308; write the value itself")
    return value


def calculate(op, *operands):
    """The result for numbers, not for True and False; of two strings, only the sum, while it is short."""
    kinds = {type(operand) for operand in operands}
    texts = kinds == {str} and isinstance(op, ast.Add) and sum(map(len, operands)) <= 10_000
    if not kinds <= {int, float} and not texts:
        raise ConfigError(f"no arithmetic on {shorten(' and '.join(map(repr, operands)))}; write the value itself")
    if isinstance(op, ast.Pow) and kinds == {int} and (abs(operands[0]).bit_length() - 1) * operands[1] > 1024:
        return math.inf  # beyond 2**1024; Python would compute 10**10**10 to its last digit
    try:
        return OPERATORS[type(op)](*operands)
    except ZeroDivisionError:
        raise ConfigError("division by zero; write another divisor") from None
    except OverflowError:
        return math.inf  # evaluate() refuses it


def checked(value, key):
    """value in the type of the key, converted only where that is exact. Raises ConfigError if it is not permitted."""
    if key.type is float and type(value) is int and int(float(value)) == value:
        value = float(value)
    elif key.type is int and type(value) is float and value.is_integer() and abs(value) <= 2**53:
        value = int(value)
    if key.choices and value not in key.choices:
        remedy = did_you_mean(str(value), key.choices, otherwise="write one of these")
        raise ConfigError(f"must be {', '.join(limits(key))}, not {shorten(repr(value))}; {remedy}")
    bounds = ((lt, key.low), (gt, key.high), (ge, key.below))
    if type(value) is not key.type or any(limit is not None and beyond(value, limit) for beyond, limit in bounds):
        raise ConfigError(f"must be {', '.join([TYPES[key.type], *limits(key)])}, not {shorten(repr(value))}")
    return value


def limits(key):  # in words, such as ["at least 0", "at most 1"]
    rules = {"one of": " ".join(key.choices) or None, "at least": key.low, "at most": key.high, "below": key.below}
    return [f"{words} {limit}" for words, limit in rules.items() if limit is not None]


def find_key(name, keys):
    if name in keys:
        return keys[name]
    remedy = did_you_mean(name, keys, otherwise="--help lists the keys")
    if name.startswith(("no_", "no-")) and name[3:] in keys:
        remedy = f"write {name[3:]}=False"
    raise ConfigError(f"unknown key {shorten(name)}; {remedy}")


def did_you_mean(name, candidates, otherwise):
    plain = name.lower().replace("-", "_")
    near = [key for key, aliases in ALIASES.items() if key in candidates and plain in aliases.split()]
    near += difflib.get_close_matches(plain, candidates, n=1)
    return f"did you mean {near[0]}?" if near else otherwise


def shorten(text):
    text = text.replace("\n", "\\n").replace("\r", "\\r")  # a problem is one line
    return text if len(text) <= 100 else text[:97] + "..."


def help_text(keys):
    inputs = "".join(f" [{name}{' ...' * (key.type is tuple)}]" for name, key in keys.items() if key.inputs)
    lines = [f"usage: python {os.path.basename(sys.argv[0])} [config.py ...]{inputs} [--key=value ...]", ""]
    width = max(len(name) for name in keys) + 6
    for name, key in keys.items():
        label = f"  {name}" if key.type is tuple else f"  --{name}"
        facts = ", ".join([key.type.__name__, f"default {key.default!r}", *limits(key)])
        lines.append(textwrap.fill(f"{label:{width}}{key.help} ({facts})", 110, subsequent_indent=" " * width))
    return "\n".join(lines)


def changed(config: Config, **values) -> Config:
    """A copy of config with these values. It still knows where its keys were set."""
    copy = dataclasses.replace(config, **values)
    object.__setattr__(copy, "_sources", sources_of(config))
    return copy


def sources_of(config) -> dict[str, str]:
    """The keys that a file or the command line has set, and where."""
    return getattr(config, "_sources", {})


def describe(config) -> str:
    """A line for each key that a file or the command line has set, with its value and source."""
    sources = sources_of(config)
    width = max(map(len, sources), default=0)
    values = {name: shorten(repr(getattr(config, name))) for name in sources}
    lines = [f"  {name:{width}}  {values[name]:20}  {source}" for name, source in sources.items()]
    return "\n".join([*lines, "  all other keys have their defaults (see --help)"])


def run_script(main: Callable[[], Any]) -> None:
    """Calls main(). Of a UserError ten lines are printed on stderr, exit code 2. Ctrl-C: 130. Closed stdout: 141."""
    try:
        try:
            main()
        finally:
            sys.stdout.flush()
    except UserError as error:
        lines = str(error).splitlines()
        for line in lines[:10] + [f"and {len(lines) - 10:,} more"] * (len(lines) > 10):
            print(f"{os.path.basename(sys.argv[0])}: {line}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:
        try:
            print(flush=True)
        except BrokenPipeError:  # the reader of stdout, such as `head`, is gone; discard what is still buffered
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(141) from None
        raise  # another pipe is broken, which is a bug

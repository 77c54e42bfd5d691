"""One flat config for each script: a dataclass of defaults, then config files, then --key=value; the last wins.

    python train.py config/quickstart.py --batch_size=8          (python train.py --help lists every key)

A config file holds `key = value` lines of Python that are parsed and never executed: literals, arithmetic, and
names that have a value already. Whatever is wrong is collected and raised as one ConfigError.
"""

import ast
import dataclasses
import difflib
import glob
import math
import os
import re
import shutil
import sys
import textwrap
import typing
from operator import add, floordiv, mod, mul, neg, pos, pow, sub, truediv

ALIASES = {  # what a key is called elsewhere
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
NEEDS = {bool: "True or False is", int: "a whole number is", float: "a number is", str: "text in quotes is"}
OPERATORS = {ast.Add: add, ast.Sub: sub, ast.Mult: mul, ast.Div: truediv, ast.FloorDiv: floordiv, ast.Mod: mod}
OPERATORS |= {ast.Pow: pow, ast.UAdd: pos, ast.USub: neg}
NOT_READ = (  # and what to write instead
    (ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef, "write each value out as key = value"),
    (ast.If | ast.IfExp | ast.For | ast.While | ast.With | ast.Try, "write the value that this run needs"),
    (ast.Call | ast.Attribute | ast.Subscript | ast.ListComp, "write the value that this gives"),
    (ast.JoinedStr, "write the text out, or join two strings with +"),
    (ast.AugAssign, "write key = key + value"),
    (ast.AnnAssign, "write key = value, without the type"),
    (ast.AST, "write key = value, the value a number, True, False, text in quotes, or a list of texts"),
)
MAX_CHARS = 1_000_000  # of a config file, and of one text


class ConfigError(ValueError):
    """A mistake in the config; the text is the whole message, one line for each problem."""


def key(default, help, *, choices=None, low=None, high=None, inputs=False):
    """A field of a config dataclass: its default, its line of help, what is permitted.

    choices: tuple of values. low, high: inclusive bounds. inputs=True: the one field, a tuple[str, ...], that
    takes the arguments without dashes that are no config files.
    """
    rules = {"help": help, "choices": choices, "low": low, "high": high, "inputs": inputs}
    return dataclasses.field(default=default, metadata=rules)


def load_config(ConfigClass, argv=None):
    """The config of one run: defaults, then the .py files in argv, in order, then its --key=value.

    argv None is the command line. Raises ConfigError with all problems, those of ConfigClass.problems() too;
    --help prints the keys and raises SystemExit(0).
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if "--help" in argv or "-h" in argv:
        print(help_text(ConfigClass))
        raise SystemExit(0)
    fields = {field.name: field for field in dataclasses.fields(ConfigClass)}
    types = typing.get_type_hints(ConfigClass)
    assert {*types.values()} <= {*NEEDS, tuple[str, ...]}, "a key has a type that cannot be read"
    values = {name: field.default for name, field in fields.items()}
    sources, problems, refused = {}, [], set()

    files = [argument for argument in argv if argument.endswith(".py") and not argument.startswith("-")]
    settings = [setting for path in files for setting in read_file(path)]
    settings += read_arguments([argument for argument in argv if argument not in files], fields, types)
    for source, written, names, expression in settings:
        known = dict(values)  # in a = b = a + 1 both get the same
        for name in names:
            try:
                values[name] = resolve(name, expression, known, fields, types)
                sources[name] = source
            except ConfigError as error:
                problems.append(f"{source}: {written}{error}")
                refused |= {name, nearest_key(name, fields)}

    config = ConfigClass(**values)
    object.__setattr__(config, "_sources", sources)  # for describe(); no field, so asdict() is without it
    if hasattr(config, "problems"):  # a check on a refused key would judge a value that nobody asked for
        problems += [text for text in config.problems() if not refused & set(re.findall(r"\w+", text))]
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    return config


# A setting is (source, written, names, expression): where it stands, its words, the keys that it sets ("" for
# what sets none), and the parsed expression, or the ConfigError that it is.


def read_file(path):
    """The settings of one config file; it is parsed, never executed."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_CHARS + 1)
        if len(data) > MAX_CHARS or b"\0" in data:
            raise ConfigError("not a page of UTF-8 text; a config file is lines of key = value")
        text = data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        lines = text.encode().split(b"\n")
        return [read_statement(statement, path, lines) for statement in ast.parse(text, path).body]
    except OSError as error:
        others = set(glob.glob(os.path.join(glob.escape(os.path.dirname(path)), "*.py"))) - {path}
        near = difflib.get_close_matches(path, sorted(others), cutoff=0)
        problem = f"no config file ({error.strerror}); check the path (nearest: {', '.join(near) or 'none'})"
    except UnicodeDecodeError as error:
        path = f"{path}:{data[: error.start].count(10) + 1}"
        problem = "not UTF-8; save the file as UTF-8 text"
    except SyntaxError as error:
        path = f"{path}:{error.lineno or 1}"
        problem = f"{error.msg}; a config file is lines of key = value"
    except (RecursionError, MemoryError):
        problem = "too deeply nested to be read; write plain lines of key = value"
    except ConfigError as error:
        problem = str(error)
    return [(path, "", [""], ConfigError(problem))]


def read_statement(statement, path, lines):
    end = statement.end_col_offset if statement.end_lineno == statement.lineno else None
    written = lines[statement.lineno - 1][statement.col_offset : end].decode()
    names, expression = [""], not_read(statement.value if isinstance(statement, ast.Expr) else statement)
    match statement:
        case ast.Pass() | ast.Expr(value=ast.Constant(value=str())):
            names = []
        case ast.Assign(targets=targets) if all(isinstance(target, ast.Name) for target in targets):
            names, expression = [target.id for target in targets], statement.value
        case ast.AugAssign(target=ast.Name(id=name)) | ast.AnnAssign(target=ast.Name(id=name)):
            names = [name]
    return f"{path}:{statement.lineno}", shorten(written.rstrip(":")) + ": ", names, expression


def read_arguments(arguments, fields, types):
    """The settings of --key=value, of a bare --key (a bool), and of the inputs."""
    takes_inputs = [name for name, field in fields.items() if field.metadata.get("inputs")]
    settings, inputs = [], []
    for argument in arguments:
        name, equals, text = argument.removeprefix("--").partition("=")
        if argument.startswith("--"):
            expression = read_option(name, text if equals else None, types.get(name))
        elif takes_inputs and argument and argument[0] != "-" and argument not in BOOLS:
            inputs.append(ast.Constant(argument))
            continue
        else:
            name, expression = "", ConfigError("not understood; write --key=value (a config file ends in .py)")
        settings.append(("command line", shorten(argument or "''") + ": ", [name], expression))
    if inputs:
        settings.append(("command line", "", takes_inputs, ast.Tuple(inputs)))
    return settings


def read_option(name, text, kind):
    """The expression for --name=text, or for a bare --name (text None). A str is taken as it stands."""
    if kind is None:
        return None  # resolve() will say that there is no such key
    if kind is bool:
        known = text is None or text in BOOLS
        return ast.Constant(text is None or BOOLS[text]) if known else ConfigError("write true or false")
    if kind not in NEEDS:
        return ConfigError("write these without dashes")
    if text is None:
        return ConfigError(f"a value is needed; write --{name}=value")
    if kind is str:
        return ast.Constant(text)
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        if "#" not in text and not any(isinstance(node, ast.Name) for node in ast.walk(tree)):
            return tree
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        pass  # whatever it is, it is no number
    return ConfigError(f"{NEEDS[kind]} needed, not {shown(text)}; write --{name}=value")


def not_read(node):
    remedy = next(remedy for kind, remedy in NOT_READ if isinstance(node, kind))
    return ConfigError(f"onecard reads config files and does not run them; {remedy}")


def resolve(name, expression, known, fields, types):
    """The value that an expression gives to a key: of the key's type, and permitted. Raises ConfigError."""
    if isinstance(expression, ConfigError):
        raise expression
    if name not in fields:
        near = nearest_key(name, fields)
        remedy = f"did you mean {near}?" if near else "--help lists the keys"
        if name[:3] in ("no_", "no-") and types.get(name[3:]) is bool:
            remedy = f"write {name[3:]}=false"
        raise ConfigError(f"unknown key {shorten(name)}; {remedy}")
    try:
        value = coerce(evaluate(expression, known), types[name])
    except RecursionError:
        raise ConfigError("too deeply nested to be read; write the value itself") from None
    choices, low, high = (fields[name].metadata.get(rule) for rule in ("choices", "low", "high"))
    if choices is not None and value not in choices:
        permitted = [str(choice) for choice in choices]
        near = did_you_mean(str(value), permitted) or "write one of these"
        raise ConfigError(f"permitted are {', '.join(permitted)}; {near}")
    if low is not None and value < low:
        raise ConfigError(f"{shown(value)} is too small; write {low} or more")
    if high is not None and value > high:
        raise ConfigError(f"{shown(value)} is too large; write {high} or less")
    return value


def evaluate(node, names):
    """The value of an expression: literals, names, arithmetic by Python's rules. Nothing is ever called."""
    match node:
        case ast.Constant(value=bool() | int() | float() | str() | None):
            return bounded(node.value)
        case ast.Name(id=name):
            if name not in names:
                near = did_you_mean(name, [*names, "True", "False"])
                raise ConfigError(f"the name {name} has no value; {near or 'write the value itself'}")
            return names[name]
        case ast.Tuple(elts=items) | ast.List(elts=items):
            values = tuple(evaluate(item, names) for item in items)
            if all(type(value) is str for value in values):
                return values
        case ast.UnaryOp() | ast.BinOp() if type(node.op) in OPERATORS:
            parts = [node.operand] if isinstance(node, ast.UnaryOp) else [node.left, node.right]
            return calculate(OPERATORS[type(node.op)], [evaluate(part, names) for part in parts])
    raise not_read(node)


def calculate(function, values):
    """function(*values) for numbers (True is none), or + of two strings. Raises ConfigError."""
    kinds = {type(value) for value in values}
    if not kinds <= {int, float} and (function is not add or kinds != {str}):
        raise ConfigError(f"no arithmetic on {' and '.join(map(shown, values))}; write the value itself")
    try:
        if function is pow and kinds == {int} and (abs(values[0]).bit_length() - 1) * values[1] > 1024:
            return bounded(math.inf)  # without computing it
        return bounded(function(*values))
    except ZeroDivisionError:
        raise ConfigError("division by zero; write another divisor") from None
    except OverflowError:
        return bounded(math.inf)


def bounded(value):
    """value, if it is a finite real number of a float's range, or a text of a page's length. Raises ConfigError."""
    if isinstance(value, complex) or (type(value) in (int, float) and not abs(value) <= sys.float_info.max):
        raise ConfigError("not a finite real number, or beyond 1.8e308; write the value itself")
    if type(value) is str and len(value) > MAX_CHARS:
        raise ConfigError("longer than a page of text; write a shorter one")
    return value


def coerce(value, kind):
    """value as a `kind` where nothing is lost by it; a bool is no number. Raises ConfigError."""
    if type(value) is kind or (type(value) is tuple and kind not in NEEDS):
        return value
    if kind is float and type(value) is int and int(float(value)) == value:
        return float(value)
    if kind is int and type(value) is float and value.is_integer() and abs(value) <= 2**53:
        return int(value)
    raise ConfigError(f"{NEEDS.get(kind, 'a list of texts is')} needed, not {shown(value)}")


def nearest_key(name, fields):
    """The key that an unknown one was probably meant to be, or None."""
    plain = name.lower().replace("-", "_")
    aliases = [key for key, others in ALIASES.items() if plain in others.split() and key in fields]
    return (aliases + difflib.get_close_matches(plain, fields, n=1) + [None])[0]


def did_you_mean(name, candidates):
    near = difflib.get_close_matches(name, candidates, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else ""


def shown(value):
    if isinstance(value, tuple) and len(value) > 3:
        return f"({', '.join(map(repr, value[:3]))}, ... {len(value)} in all)"
    return shorten(repr(value))


def shorten(text, limit=100):
    text = text.replace("\n", "\\n").replace("\r", "\\r")  # a problem is one line
    return text if len(text) <= limit else text[: limit - 3] + "..."


def help_text(ConfigClass):
    """The usage line, then each key with its line of help, type, default and what is permitted."""
    fields, types = dataclasses.fields(ConfigClass), typing.get_type_hints(ConfigClass)
    inputs = "".join(f" [{field.name} ...]" for field in fields if field.metadata.get("inputs"))
    lines = [f"usage: python {os.path.basename(sys.argv[0])} [config.py ...]{inputs} [--key=value ...]", ""]
    indent = " " * (max(len(field.name) for field in fields) + 6)
    columns = max(60, min(110, shutil.get_terminal_size().columns))
    for field in fields:
        rules = {"default": shown(field.default), **field.metadata}
        if rules.get("choices") is not None:
            rules["choices"] = " ".join(map(str, rules["choices"]))
        words = {"default": "default", "choices": "one of", "low": "at least", "high": "at most"}
        facts = [f"{word} {rules[rule]}" for rule, word in words.items() if rules.get(rule) is not None]
        name = f"  {field.name}" if rules.get("inputs") else f"  --{field.name}"
        text = f"{rules.get('help', '')} ({', '.join([types[field.name].__name__, *facts])})"
        lines.append(textwrap.fill(text, columns, initial_indent=name.ljust(len(indent)), subsequent_indent=indent))
    return "\n".join(lines)


def given(config):
    """The names of the keys that a file or the command line has set."""
    return set(getattr(config, "_sources", {}))


def describe(config):
    """The resolved config: a line for each key that was set, and by what; then the keys at their defaults."""
    sources = getattr(config, "_sources", {})
    rows, defaults = [], []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in sources or value != field.default:
            rows.append((field.name, shown(value), sources.get(field.name, "this program")))
        else:
            defaults.append(f"{field.name}={shown(value)}")
    name_width, value_width = (min(40, max([len(row[i]) for row in rows], default=0)) for i in (0, 1))
    lines = [f"  {name:{name_width}}  {value:{value_width}}  {source}" for name, value, source in rows]
    text = textwrap.TextWrapper(110, "  ", "    ", break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines + text.wrap("defaults: " + ", ".join(defaults or ["none"])))


def run_script(main, *user_errors):
    """Call main(). ConfigError and user_errors are told on stderr, exit 2; Ctrl-C is exit 130, no traceback."""
    script = os.path.basename(sys.argv[0])
    try:
        try:
            main()
        except (ConfigError, *user_errors) as error:
            for line in str(error).splitlines():
                print(f"{script}: {line}", file=sys.stderr)
            raise SystemExit(2) from None
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:
        try:
            print(flush=True)
        except BrokenPipeError:  # `| head` has read enough; what is still buffered goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(141) from None
        raise  # it was another pipe, which is a fault of ours

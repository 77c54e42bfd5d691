"""One flat config for each script: a dataclass of defaults, then config files, then --key=value; the last wins.

    python train.py config/quickstart.py --batch_size=8          (python train.py --help lists every key)

A config file holds `key = value` lines of Python that are parsed and never executed: literals, arithmetic, and
names that have a value already. Whatever is wrong is collected and raised as one ConfigError.
"""

import ast
import dataclasses
import difflib
import glob
import operator
import os
import re
import shutil
import sys
import textwrap
import typing

ALIASES = {  # what a key is called elsewhere
    "learning_rate": "lr max_lr peak_lr",
    "gradient_accumulation_steps": "grad_accum grad_accum_steps accumulation_steps accumulate_grad_batches",
    "grad_clip": "clip_grad max_grad_norm gradient_clip_val",
    "weight_decay": "wd",
    "warmup_iters": "warmup warmup_steps num_warmup_steps",
    "lr_decay_iters": "decay_steps lr_decay_steps",
    "max_iters": "steps max_steps num_steps train_steps iters num_iterations",
    "batch_size": "micro_batch_size micro_batch bs device_batch_size per_device_train_batch_size",
    "block_size": "context_length context ctx_len seq_len seq_length sequence_length n_ctx",
    "n_layer": "n_layers num_layers layers depth num_hidden_layers",
    "n_head": "n_heads num_heads heads num_attention_heads",
    "n_embd": "hidden_size d_model width embed_dim",
    "out_dir": "output_dir save_dir checkpoint_dir",
    "dtype": "precision",
    "start": "prompt",
    "max_new_tokens": "num_tokens max_length max_tokens",
    "workers": "num_workers num_proc",
}
BOOLS = {"true": True, "True": True, "false": False, "False": False}
NEEDS = {bool: "True or False is", int: "a whole number is", float: "a number is", str: "text in quotes is"}
MAX_CHARS = 1_000_000  # of a config file, and of a text in it
CODE = (  # what is not read, what to write instead
    (ast.Import | ast.ImportFrom, "an import", "write each value out as key = value"),
    (ast.FunctionDef | ast.ClassDef | ast.Lambda, "a definition", "write each value out as key = value"),
    (ast.If | ast.IfExp | ast.For | ast.While | ast.With | ast.Try, "control flow", "write this run's value"),
    (ast.Call, "a call", "write the value that it gives"),
    (ast.Attribute | ast.Subscript, "a look-up", "write the value that it gives"),
    (ast.JoinedStr, "an f-string", "write the text out, or join two strings with +"),
    (ast.AugAssign, "an update", "write key = key + value"),
    (ast.AnnAssign, "an annotation", "write key = value without the type"),
    (ast.Assign, "more than one value", "write key = value, one key a line"),
    (ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp, "a comprehension", "write the values out"),
    (ast.Compare | ast.BoolOp | ast.UnaryOp, "a condition", "write True or False"),
    (ast.List | ast.Tuple, "a list of more than strings", "write ('a', 'b')"),
    (ast.AST, "not a value that a key can have", "write key = a number, True, False or text in quotes"),
)


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
                refused.update([name, nearest_key(name, fields)])

    config = ConfigClass(**values)
    object.__setattr__(config, "_sources", sources)  # for describe(); no field, so asdict() does not have it
    if hasattr(config, "problems"):  # a check on a refused key would judge a value that nobody asked for
        problems += [text for text in config.problems() if not refused & set(re.findall(r"\w+", text))]
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    return config


# A setting is (source, written, names, expression): where it stands, the words of it that open a message, the
# keys that it sets ("" for none that can be known), and a parsed expression or the ConfigError that it is.


def read_file(path):
    """The settings of one config file; it is parsed, never executed."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_CHARS + 1)
        if len(data) > MAX_CHARS or b"\0" in data:
            raise ConfigError("this is no page of text; a config file is lines of key = value")
        text = data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        lines = text.encode().split(b"\n")
        return [read_statement(statement, path, lines) for statement in ast.parse(text, path).body]
    except OSError as error:
        near = did_you_mean(path, glob.glob(os.path.join(glob.escape(os.path.dirname(path)), "*.py")))
        problem = ConfigError(f"cannot be read as a config file ({error.strerror}); {near or 'check the path'}")
    except UnicodeDecodeError as error:
        path = f"{path}:{data[: error.start].count(10) + 1}"
        problem = ConfigError("not UTF-8; save the file as UTF-8 text")
    except SyntaxError as error:
        path = f"{path}:{error.lineno or 1}"
        problem = ConfigError(f"{error.msg}; a config file is lines of key = value")
    except (RecursionError, MemoryError):
        problem = ConfigError("too deeply nested to be read; write plain lines of key = value")
    except ConfigError as error:
        problem = error
    return [(path, "", [""], problem)]


def read_statement(statement, path, lines):
    source = f"{path}:{statement.lineno}"
    end = statement.end_col_offset if statement.end_lineno == statement.lineno else None
    written = shorten(lines[statement.lineno - 1][statement.col_offset : end].decode()) + ": "
    match statement:
        case ast.Pass() | ast.Expr(value=ast.Constant(value=str())):
            return source, written, [], None
        case ast.Assign(targets=targets) if all(isinstance(target, ast.Name) for target in targets):
            return source, written, [target.id for target in targets], statement.value
        case ast.AugAssign(target=ast.Name(id=name)) | ast.AnnAssign(target=ast.Name(id=name)):
            return source, written, [name], not_read(statement)
        case ast.Expr(value=value):
            return source, written, [""], not_read(value)
    return source, written, [""], not_read(statement)


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
            name, expression = (
                "",
                ConfigError("not understood; write --key=value (a config file ends in .py)"),
            )
        settings.append(("command line", shorten(argument or "''") + ": ", [name], expression))
    if inputs:
        settings.append(("command line", "inputs: ", takes_inputs, ast.Tuple(inputs)))
    return settings


def read_option(name, text, kind):
    """The expression for --name=text, or for a bare --name (text None). A str is taken as it stands."""
    if kind is None:
        return None  # an unknown key
    if kind is bool:
        value = True if text is None else BOOLS.get(text)
        return ConfigError(f"write --{name}=true or --{name}=false") if value is None else ast.Constant(value)
    if text is None or kind not in NEEDS:
        return ConfigError(f"write --{name}=value" if kind in NEEDS else "write these without dashes")
    if kind is str:
        return ast.Constant(text)
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        if "#" not in text and not any(isinstance(node, ast.Name) for node in ast.walk(tree)):
            return tree
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        pass  # whatever it is, it is no number
    return ConfigError(f"{NEEDS[kind]} needed")


def not_read(node):
    what, instead = next(row[1:] for row in CODE if isinstance(node, row[0]))
    return ConfigError(f"{what}; onecard reads config files and does not run them: {instead}")


def resolve(name, expression, known, fields, types):
    """The value that an expression gives to a key: of its type, and permitted. Raises ConfigError."""
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
    rules = fields[name].metadata
    choices, low, high = (rules.get(rule) for rule in ("choices", "low", "high"))
    if choices is not None and value not in choices:
        permitted = [str(choice) for choice in choices]
        near = did_you_mean(str(value), permitted)
        raise ConfigError("; ".join(filter(None, ["permitted are " + ", ".join(permitted), near])))
    if (low is not None and value < low) or (high is not None and value > high):
        bounds = [f"{low} or more"] * (low is not None) + [f"{high} or less"] * (high is not None)
        raise ConfigError(f"{shown(value)} is out of bounds; write {' and '.join(bounds)}")
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
    texts = function is operator.add and all(type(value) is str for value in values)
    if not texts and not all(type(value) in (int, float) for value in values):  # True is no number here
        raise ConfigError(f"{' and '.join(map(shown, values))} do not go together; write the value itself")
    try:
        return bounded(function(*values))
    except ZeroDivisionError:
        raise ConfigError("division by zero; write another divisor") from None
    except OverflowError:
        raise ConfigError("larger than a float can be; write a smaller number") from None


def power(base, exponent):
    both_whole = type(base) is int and type(exponent) is int
    if both_whole and (abs(base).bit_length() - 1) * exponent > 1024:  # asked before it is computed
        raise OverflowError
    return base**exponent


OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: power,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


def bounded(value):
    """value, if it is a finite real number of a float's range, a text of a page's length, or no number."""
    if isinstance(value, complex):
        raise ConfigError("not a real number; write the value itself")
    if type(value) in (int, float) and not abs(value) <= sys.float_info.max:  # so is nan refused
        raise ConfigError("not finite, or larger than a float can be; write a smaller number")
    if type(value) is str and len(value) > MAX_CHARS:
        raise ConfigError("longer than a page of text; write a shorter text")
    return value


def coerce(value, kind):
    """value as a `kind` where nothing is lost by it; bool is no number. Raises ConfigError."""
    if type(value) is kind or (type(value) is tuple and kind not in NEEDS):
        return value
    if kind is float and type(value) is int and int(float(value)) == value:
        return float(value)
    if kind is int and type(value) is float and value.is_integer() and abs(value) <= 2**53:
        return int(value)
    raise ConfigError(f"{NEEDS.get(kind, 'a list of strings is')} needed, not {shown(value)}")


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
    left = max(len(field.name) for field in fields) + 6
    columns = max(60, min(110, shutil.get_terminal_size().columns))
    for field in fields:
        rules = field.metadata
        facts = [types[field.name].__name__, f"default {shown(field.default)}"]
        if rules.get("choices") is not None:
            facts.append("one of " + ", ".join(map(str, rules["choices"])))
        facts += [f"{rule} {rules[rule]}" for rule in ("low", "high") if rules.get(rule) is not None]
        name = field.name if rules.get("inputs") else f"--{field.name}"
        text = f"{rules.get('help', '')} [{'; '.join(facts)}]"
        lines.append(textwrap.fill(text, columns, initial_indent=f"  {name:{left - 2}}", subsequent_indent=" " * left))
    return "\n".join(lines)


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
    widths = [min(40, max(len(row[column]) for row in rows)) for column in (0, 1)] if rows else []
    lines = ["  {:{}}  {:{}}  {}".format(row[0], widths[0], row[1], widths[1], row[2]) for row in rows]
    if defaults:
        text = "defaults: " + ", ".join(defaults)
        wrapped = textwrap.wrap(text, 106, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
        lines += ["  " + line for line in wrapped]
    return "\n".join(lines)


def run_script(main, *user_errors):
    """Call main(). ConfigError and user_errors: told on stderr, exit 2. Ctrl-C: exit 130. Never a traceback."""
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
            sys.stdout.flush()
        except BrokenPipeError:  # such as `| head`: nobody reads what is left
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(141) from None
        raise  # another pipe: no quiet end

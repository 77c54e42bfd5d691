"""The JSON files of a dataset: written whole, and checked when they are read.

    write_json(path, sealed({"shards": [...]}))
    content = read_json(path, fits({"shards": [{"name": text, "tokens": count}]}), "delete it and run prepare.py again")

The one thing to know: a file that is cut, empty or edited is a ShardError, one line with the file's name. Its form is
checked, and its checksum if it has one.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from onecard import UserError
from onecard.durable import replacing, write_refused


class ShardError(UserError):
    """A file of a dataset that cannot be used: which one, why, and what to do."""


@contextlib.contextmanager
def refusals(path: str | Path, reading: bool = False) -> Iterator[None]:
    """Turns an OSError of the body, which writes or reads this file, into a ShardError."""
    try:
        yield
    except OSError as error:
        remedy = "check the disk; copy the file again, or delete what is there and run prepare.py again"
        unread = f"{path}: cannot be read ({error.strerror or error}); {remedy}"
        raise ShardError(unread if reading else write_refused(path, error)) from error


def count(value: Any) -> bool:
    return type(value) is int and value >= 0


def text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def counts(value: Any) -> bool:
    return isinstance(value, dict) and all(map(count, value.values()))


def check(value: Any, form: Any, name: str = "") -> None:
    """Raises ValueError if JSON data has not this form: a test, a list of one form, or a dict of forms by key."""
    if isinstance(form, dict):
        if not isinstance(value, dict):
            raise ValueError(f"{name or 'the file'} is not a JSON object")
        for key, part in form.items():
            if key not in value:
                raise ValueError(f"{name or 'the file'} has no {key}")
            check(value[key], part, f"{name}.{key}" if name else key)
    elif isinstance(form, list):
        if not isinstance(value, list):
            raise ValueError(f"{name} is not a list")
        for number, item in enumerate(value):
            check(item, form[0], f"{name}[{number}]")
    elif not form(value):
        raise ValueError(f"{name} is {value!r:.40}")


def checksum(content: dict) -> str:
    plain = json.dumps({name: value for name, value in content.items() if name != "checksum"}, sort_keys=True)
    return hashlib.sha256(plain.encode()).hexdigest()[:16]


def sealed(content: dict) -> dict:
    return content | {"checksum": checksum(content)}


def fits(form: dict) -> Callable[[Any], bool]:
    """A test of the content of a file: its form, and its checksum if it has one. Raises ValueError."""

    def test(content):
        check(content, form)
        if "checksum" in content and content["checksum"] != checksum(content):
            raise ValueError("its checksum differs, so it was edited")
        return True

    return test


def read_json(path: Path, fits: Callable[[Any], bool], remedy: str) -> Any:
    """The content of a JSON file, None if there is none. Raises ShardError if it is damaged.

    fits(content) returns False or raises ValueError, LookupError, TypeError or AttributeError if the content is wrong.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=int)  # int("NaN") raises ValueError
        check(content, {})
        if not fits(content):
            raise ValueError("its numbers do not fit together")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        reason = (error.strerror if isinstance(error, OSError) else str(error)) or type(error).__name__
        raise ShardError(f"{path}: damaged ({reason}); {remedy}") from error
    return content


def write_json(path: str | Path, content: dict) -> None:
    """Writes a JSON file whole or not at all: one line for each key, and for each item of a list (shards, sources)."""
    lines = []
    for key, value in content.items():
        items = ",\n  ".join(map(json.dumps, value)) if isinstance(value, list) else ""
        lines.append(f" {json.dumps(key)}: " + (f"[\n  {items}\n ]" if items else json.dumps(value)))
    with refusals(path), replacing(path) as file:
        file.write(("{\n" + ",\n".join(lines) + "\n}\n").encode())

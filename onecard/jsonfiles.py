"""The JSON files of a dataset: written whole, and checked when they are read.

    write_json(path, {"shards": [...]})
    content = read_json(path, lambda content: check(content, FORM), "delete it and run prepare.py again")

The one thing to know: a file that is cut, empty or edited is a ShardError, one line with the file's name. Its checksum
is compared if it has one; files of older versions have none.
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


def check(value: Any, form: Any, name: str = "") -> bool:
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
    return True


def checksum(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def sealed(content: dict) -> dict:
    return content | {"checksum": checksum(content)}


def parse(content: bytes, fits: Callable[[Any], bool]) -> dict:
    """A JSON object without its checksum. Raises ValueError if that differs, or if fits(object) is False or raises."""
    try:
        found = json.loads(content.decode(), parse_constant=int)  # int("NaN") raises ValueError
        check(found, {})
        if found.pop("checksum", None) not in (None, checksum(found)):
            raise ValueError("its checksum differs, so it was edited")
        if not fits(found):
            raise ValueError("its numbers do not fit together")
    except (LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    return found


def read_json(path: Path, fits: Callable[[Any], bool], remedy: str) -> Any:
    """What `parse` makes of a file, None if there is none. Raises ShardError if it is damaged."""
    try:
        return parse(path.read_bytes(), fits)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ShardError(f"{path}: damaged ({reason}); {remedy}") from error


def write_json(path: str | Path, content: dict) -> None:
    """Writes a JSON object with a checksum, whole or not at all: one line a key, and one an item of its lists."""
    lines = []
    for key, value in sealed(content).items():
        items = ",\n  ".join(map(json.dumps, value)) if isinstance(value, list) else ""
        lines.append(f" {json.dumps(key)}: " + (f"[\n  {items}\n ]" if items else json.dumps(value)))
    with refusals(path), replacing(path) as file:
        file.write(("{\n" + ",\n".join(lines) + "\n}\n").encode())

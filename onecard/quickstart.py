"""The quickstart's text: English prose that is part of every Python, as a parquet file like FineWeb's.

    write_quickstart(Path("data/quickstart/quickstart.parquet"))    (about 1 MB of text in seconds; no network)

It is the language manual that help() shows and the docstrings of the standard library, whose files are parsed and
never imported. Of these it keeps the paragraphs that are prose, without their marks, one a line. A paragraph with a
sentence that came before is left out, so none is in both splits. The text depends on the version of Python.
"""

import ast
import contextlib
import hashlib
import re
import sysconfig
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from onecard.durable import replacing
from onecard.tokenizer import load_tokenizer

LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "pydoc_data"}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

MARKS = re.compile(r":[\w:]+:(?=`)|`|\*+(?=\w)|(?<=\w)\*+|^(?:[*+-]|\d+\.|\(\w\)) ")  # of reStructuredText, in a line
LEAST_CHARACTERS = 40  # of a paragraph, and of a sentence that may not come twice
LEAST_LETTERS = 0.93  # share of letters, spaces, commas and full stops; formulas and signatures have less


def write_quickstart(path: Path) -> None:
    """Writes the text with FineWeb's columns. token_count is right for GPT-2's tokenizer."""
    seen: set[str] = set()
    tokenizer, rows = load_tokenizer(), []
    for name, text in (*manual(), *docstrings(Path(sysconfig.get_paths()["stdlib"]))):
        new = []
        for line in paragraphs(text):
            sentences = {part for part in re.split(r"(?<=[.!?]) ", line) if len(part) >= LEAST_CHARACTERS}
            if sentences and not sentences & seen:
                new.append(line)
            seen |= sentences
        if not new:
            continue
        text = "\n".join(new)
        identity = hashlib.sha256(text.encode()).hexdigest()
        row: dict = {"text": text, "id": identity, "dump": "python", "url": name, "date": "", "file_path": ""}
        row |= {"language": "en", "language_score": 1.0, "token_count": len(tokenizer.encode(text))}
        rows.append(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=1000)


def manual() -> list[tuple[str, str]]:
    """[(name, text)]: the topics of the language manual."""
    from pydoc_data.topics import topics

    return [(f"topics:{name}", topics[name]) for name in sorted(topics)]


def docstrings(library: Path) -> list[tuple[str, str]]:
    """[(name, text)]: the docstrings of each class, and of the rest of each file, below the folder `library`."""
    found = []
    for path in sorted(library.rglob("*.py")):
        place = path.relative_to(library)
        if LEFT_OUT & set(place.parts):
            continue
        with contextlib.suppress(SyntaxError, ValueError):  # templates and samples that are not Python
            tree = ast.parse(path.read_bytes())
            classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
            tree.body = [node for node in tree.body if node not in classes]
            for part in (tree, *classes):
                texts = [ast.get_docstring(node) for node in ast.walk(part) if isinstance(node, DOCUMENTED)]
                found.append((f"{place.as_posix()}:{getattr(part, 'name', '')}", "\n\n".join(filter(None, texts))))
    return found


def paragraphs(text: str) -> list[str]:
    """The paragraphs of a text that are prose: sentences with few other characters than letters. One line each."""
    lines = [MARKS.sub("", " ".join(block.split())) for block in re.split(r"\n\s*\n", text)]
    return [line for line in lines if is_prose(line)]


def is_prose(line: str) -> bool:
    if len(line) < LEAST_CHARACTERS or not line.isascii() or not line[0].isupper() or line[-1] not in ".!?":
        return False
    return sum(c.isalpha() or c in " ,." for c in line) >= LEAST_LETTERS * len(line)

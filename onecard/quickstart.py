"""The quickstart's text: English that is part of every Python, as a parquet file like FineWeb's.

    write_quickstart(Path("data/quickstart/quickstart.parquet"))    (about half a million tokens; no network)

It is the language manual that help() shows and the docstrings of the standard library, whose files are parsed and
never imported. The text depends on the version of Python.
"""

import ast
import contextlib
import hashlib
import sysconfig
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from onecard.durable import replacing
from onecard.tokenizer import load_tokenizer

LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "pydoc_data"}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def write_quickstart(path: Path) -> None:
    """Writes the text with FineWeb's columns, in row groups of 1000 documents; token_count is right."""
    from pydoc_data.topics import topics  # the manual, as {topic: text}

    texts = [(f"topics:{name}", topics[name]) for name in sorted(topics)]
    texts += docstrings(Path(sysconfig.get_paths()["stdlib"]))
    tokenizer, rows = load_tokenizer(), []
    for name, text in texts:
        identity = hashlib.sha256(text.encode()).hexdigest()
        row: dict = {"text": text, "id": identity, "dump": "python", "url": name, "date": "", "file_path": ""}
        row |= {"language": "en", "language_score": 1.0, "token_count": len(tokenizer.encode(text))}
        rows.append(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=1000)


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
    return [(name, text) for name, text in found if text]

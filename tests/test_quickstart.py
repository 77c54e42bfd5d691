"""The quickstart's text: what is kept of manual and docstrings, and that no paragraph is in both splits."""

import re
import sysconfig
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from onecard.quickstart import docstrings, manual, paragraphs, write_quickstart
from onecard.tokenizer import load_tokenizer

FINEWEB = ["text", "id", "dump", "url", "date", "file_path", "language", "language_score", "token_count"]


@pytest.fixture(scope="module", params=["email", pytest.param("", marks=pytest.mark.slow)])
def table(request, tmp_path_factory):
    """The file's table. By default with the docstrings of one package only."""
    path = tmp_path_factory.mktemp("quickstart") / "a" / "quickstart.parquet"
    library = Path(sysconfig.get_paths()["stdlib"], request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sysconfig, "get_paths", lambda *_: {"stdlib": library})
        write_quickstart(path)
    return pq.read_table(path)


def test_the_file_has_fineweb_s_columns_and_gpt2_s_token_counts(table):
    texts = table["text"].to_pylist()
    assert table.column_names == FINEWEB and str(table.schema.field("token_count").type) == "int64"
    assert table["token_count"].to_pylist() == [len(load_tokenizer().encode(text)) for text in texts]
    assert len(set(table["id"].to_pylist())) == len(texts) and 100_000 < sum(map(len, texts)) < 2_000_000


def test_no_paragraph_is_in_another_one_so_none_is_in_both_splits(table):
    lines = [line for text in table["text"].to_pylist() for line in text.split("\n")]
    text = "\n".join(lines)
    assert len(lines) > 300
    for line in lines:
        assert text.count(line) == 1 or len(line) < 100, line


def test_every_line_is_a_paragraph_of_prose_without_marks(table):
    text = "\n".join(table["text"].to_pylist())
    assert not re.search(r"\n\n|`|>>>|  |:\w+:", text)
    assert sum(c.isalpha() or c == " " for c in text) > 0.94 * len(text)
    for line in text.split("\n"):
        assert line[0].isupper() and line[-1] in ".!?" and len(line) >= 40, line


def test_a_paragraph_loses_its_marks_and_line_ends():
    prose = "* The :class:`Message` class\n  is a *container*: see ``walk()`` of this\n  class, or **parts**."
    code = "    >>> message = Message()\n    >>> message.walk()"
    short = "See also\n\nNames of the\n\n"
    plain = "The Message class is a container: see walk() of this class, or parts."
    assert paragraphs(f"{short}{prose}\n\n{code}\n\n{prose}") == [plain, plain]


def test_the_sources_are_the_manual_and_docstrings_of_files_that_are_never_imported(tmp_path):
    assert len(manual()) > 50 and all(text for _, text in manual())
    (tmp_path / "package" / "tests").mkdir(parents=True)
    source = '"""Of a."""\nclass B:\n    "Of B."\ndef c():\n    "Of c."\nraise OSError'
    (tmp_path / "package" / "a.py").write_text(source)
    (tmp_path / "package" / "tests" / "b.py").write_text('"""A test."""')
    (tmp_path / "broken.py").write_text("def")
    found = {name: text for name, text in docstrings(tmp_path)}
    assert found == {"package/a.py:": "Of a.\n\nOf c.", "package/a.py:B": "Of B."}

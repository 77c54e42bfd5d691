"""rows.py: the texts of a unit, against the values that were written; bad rows, --where, chats in JSON files."""

import itertools
import json
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from texts import rows_of, some_texts

from onecard import rows as rows_room
from onecard.documents import cut_text
from onecard.remote import DamagedError, SourceError
from onecard.where import parse_where

CHAT = "Anna: hi\nBob: hello there"
ARTICLES = [{"title": "t", "author": "me", "text": "one"}, {"title": "u", "author": "you", "text": "two"}]
PARTS = ["hel", {"type": "bold", "text": "lo"}, " there"]
NODES = [None, {"author": {"role": "user"}, "content": {"parts": ["hi"]}}, {"author": {"name": "Bob"}, "content": "ho"}]
EXPORTS = {
    "strings": (["one", "two"], ["one", "two"]),
    "objects": (ARTICLES, ["one", "two"]),
    "an object with a list": ({"version": 1, "data": ARTICLES}, ["one", "two"]),
    "messages": ([{"user": "Anna", "text": "hi"}, {"user": "Bob", "text": "", "body": "hello there"}, {}], [CHAT]),
    "Telegram": ({"name": "Bob", "messages": [{"from": "Anna", "text": "hi"}, {"from": "Bob", "text": PARTS}]}, [CHAT]),
    "ShareGPT": ([{"id": 1, "conversations": [{"from": "human", "value": "hi"}]}], ["human: hi"]),
    "ChatGPT": (
        [{"title": "x", "mapping": {str(i): {"message": node} for i, node in enumerate(NODES)}}] * 2,
        ["user: hi\nBob: ho"] * 2,
    ),
}
TEXTS = [*some_texts(50), None, "", "last"]
COLUMNS = {  # of each kind that holds TEXTS
    **{kind: pa.array(TEXTS).cast(getattr(pa, kind)()) for kind in ("string", "large_string", "string_view")},
    **{kind: pa.array(TEXTS).cast(getattr(pa, kind)()) for kind in ("binary", "large_binary")},
    "dictionary": pa.array(TEXTS).dictionary_encode(),
    "meta.text": pa.array([text if text is None else {"text": text, "n": 1} for text in TEXTS]),
    "meta.a.text": pa.array([{"a": {"text": text}} for text in TEXTS]),
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_every_kind_of_text_column_and_a_nested_field_give_the_same_texts(tmp_path, kind):
    name = kind if "." in kind else "text"
    pq.write_table(pa.table({name.split(".")[0]: COLUMNS[kind]}), tmp_path / "a.parquet", row_group_size=20)
    for shard_bytes in (1e9, 500):
        assert rows_of(tmp_path / "a.parquet", shard_bytes, text_column=name)[0] == list(enumerate(TEXTS))


@pytest.mark.parametrize("suffix", [".jsonl", ".JSONL.gz", ".jsonl.zst", ".json.gz"])
def test_jsonl_gives_its_texts_in_order_in_any_units_and_a_cut_compressed_file_is_named(tmp_path, suffix):
    texts, path = some_texts(300), tmp_path / f"a{suffix}"
    lines = [json.dumps({"id": 1, "meta": {"text": text}}) + "\n" * (1 + i % 2) for i, text in enumerate(texts)]
    write(path, "".join(lines).encode())
    rows, units = rows_of(path, 9000, text_column="meta.text")
    assert rows == list(zip(np.cumsum([0, *map(len, lines)]).tolist(), texts, strict=False))
    if suffix == ".jsonl":
        assert units > 5
        return
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(DamagedError, match=f"{path.as_posix()}: cannot be read"):
        rows_of(path, text_column="meta.text")


def write(path, content):
    """Writes a file with the compression that its name says."""
    kind = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    with pa.CompressedOutputStream(str(path), kind) if kind else path.open("wb") as file:
        file.write(content)


@pytest.mark.parametrize("parts", [1, 2, 7, 40])
def test_text_files_are_cut_into_whole_lines_and_lose_nothing_but_the_byte_order_mark(tmp_path, monkeypatch, parts):
    monkeypatch.setattr(rows_room, "TXT_BYTES", 100)
    draw, path = random.Random(parts), tmp_path / "a.txt"
    lines = ["".join(draw.choices("ab é\r", k=draw.randint(0, 30))) + "\n" for _ in range(500)]
    content = ("".join(lines) + "no end of line").encode()
    write(path, content)
    rows, units = rows_of(path, len(content) / parts)
    assert units == parts and "".join(text for _, text in rows).encode() == content
    assert rows_of(path, len(content) / parts, skip_bad_rows=True)[0] == rows
    assert [position for position, _ in rows] == np.cumsum([0, *(len(text.encode()) for _, text in rows)]).tolist()[:-1]
    assert max(len(text) for _, text in rows) <= 8 * 100 + 70 and len(rows) > 5
    write(path, b"\xef\xbb\xbf" + content)
    assert "".join(text for _, text in rows_of(path, 1e9)[0]).encode() == content


# ---- bad rows ------------------------------------------------------------------------------------------------

BAD_LINES = {
    "{broken": "not JSON",
    "[1]": "not JSON",
    '"text"': "not JSON",
    '{"a": ' + "[" * 100_000: "not JSON",
    '{"text": 5}': "not text",
    '{"a":' * 700 + "1" + "}" * 700: "nested too deep",
    b'{"text": "caf\xe9"}': "not UTF-8",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_is_named_by_file_and_byte_or_left_out_and_counted(tmp_path, line):
    line = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b'\n{"text": "too"}\n')
    reason = BAD_LINES.get(line) or BAD_LINES[line.decode()]
    with pytest.raises(DamagedError, match=rf"a\.jsonl: the line at byte 17 is {reason}.*--skip_bad_rows=True"):
        rows_of(tmp_path / "a.jsonl")
    skipped = {}
    rows, _ = rows_of(tmp_path / "a.jsonl", skipped=skipped, skip_bad_rows=True)
    assert [text for _, text in rows] == ["fine", "too"] and skipped == {reason: 1}


@pytest.mark.parametrize(
    "content", ["café".encode("latin-1"), "text".encode("utf-16"), b"good \n" * 300_000 + b"\xff\xd8\nend\n"]
)
def test_a_text_file_that_is_not_utf8_is_named_with_the_byte_or_loses_its_bad_lines(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    at = content.rfind(b"good") + 6 if b"good" in content else 0
    with pytest.raises(
        DamagedError, match=rf"a\.txt: the line at byte {at:,} is not UTF-8 .*save it as UTF-8.*--skip_bad"
    ):
        rows_of(tmp_path / "a.txt")
    skipped = {}
    rows, _ = rows_of(tmp_path / "a.txt", skipped=skipped, skip_bad_rows=True)
    assert skipped == {"not UTF-8": 1}
    assert "".join(text for _, text in rows).encode() == (content[:at] + b"end\n" if at else b"")


def test_bad_rows_of_parquet_are_named_or_left_out_and_counted(tmp_path):
    texts = [b"fine", b"caf\xe9", None, b"", "\ud800".encode("utf-8", "surrogatepass"), b"\xff", b"last"]
    pq.write_table(pa.table({"text": pa.array(texts, pa.binary())}), tmp_path / "a.parquet", row_group_size=3)
    skipped = {}
    rows, _ = rows_of(tmp_path / "a.parquet", skipped=skipped, skip_bad_rows=True)
    assert rows == [(0, "fine"), (2, None), (3, ""), (4, "\ud800"), (6, "last")] and skipped == {"not UTF-8": 2}
    with pytest.raises(DamagedError, match=r"a\.parquet: row 1 is not UTF-8 \(.*--skip_bad_rows=True"):
        rows_of(tmp_path / "a.parquet")


# ---- where ---------------------------------------------------------------------------------------------------

DRAW = random.Random(0)
TABLE = [
    {
        "text": text,
        "score": DRAW.choice([None, 0.5, 0.9, 0.95]),
        "lang": DRAW.choice("ab"),
        "meta": {"n": i},
        "ok": i > 9,
    }
    for i, text in enumerate(some_texts(200))
]
CONDITIONS = {
    "score > 0.9": lambda row: row["score"] == 0.95,
    "0.5 <= score < 0.95 and lang == 'a'": lambda row: row["score"] in (0.5, 0.9) and row["lang"] == "a",
    "not (score > 0.9)": lambda row: row["score"] in (0.5, 0.9),  # what is missing is neither
    "lang in ('b', 'c') or meta.n >= 150": lambda row: row["lang"] == "b" or row["meta"]["n"] >= 150,
    "lang not in ['b'] and -1 < meta.n != 7": lambda row: row["lang"] != "b" and row["meta"]["n"] != 7,
    "ok and not score == 0.5": lambda row: row["ok"] and row["score"] not in (0.5, None),
    "score > 2": lambda row: False,
}


@pytest.mark.parametrize("where", CONDITIONS)
def test_where_takes_the_same_rows_of_parquet_and_of_json_lines_and_counts_the_others(tmp_path, where):
    pq.write_table(pa.Table.from_pylist(TABLE), tmp_path / "a.parquet", row_group_size=30)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TABLE))
    expected = [(i, row["text"]) for i, row in enumerate(TABLE) if CONDITIONS[where](row)]
    for shard_bytes, name in itertools.product((1e9, 9000), ("a.parquet", "a.jsonl")):
        skipped = {}
        rows, _ = rows_of(tmp_path / name, shard_bytes, skipped=skipped, where=where)
        assert [text for _, text in rows] == [text for _, text in expected]
        assert skipped == {"where": len(TABLE) - len(expected)}
        assert name == "a.jsonl" or [row for row, _ in rows] == [row for row, _ in expected]


def test_where_refuses_what_is_no_comparison_with_its_place_and_what_has_no_such_column_with_those_there_are(tmp_path):
    refused = {"score >": 0, "f(score)": 1, "score > lang + 1": 9, "score in lang": 10, "score is None": 10, "1 < 2": 1}
    refused |= {"__import__('os')": 1, "score = 1": 0, "lang[0] == 'a'": 1, "score > 9" + "9" * 30: 0, "(" * 300: 0}
    for text, place in refused.items():
        with pytest.raises(SourceError, match=rf"where: character {place or ''}.*write comparisons") as error:
            parse_where(text)
        assert "\n" not in str(error.value)
    pq.write_table(pa.Table.from_pylist(TABLE), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TABLE))
    (tmp_path / "a.txt").write_text("text")
    for name, where in itertools.product(("a.parquet", "a.jsonl", "a.txt"), ("points > 1", "meta.points > 1")):
        with pytest.raises(SourceError, match=f"{name}: .*" + ("where" if name == "a.txt" else "score.*lang.*meta")):
            rows_of(tmp_path / name, where=where)
    with pytest.raises(SourceError, match=r"a\.parquet: .*lang \(string\)"):
        rows_of(tmp_path / "a.parquet", where="lang > 1")
    with pytest.raises(DamagedError, match=r"a\.jsonl: the line at byte 0 is not comparable"):
        rows_of(tmp_path / "a.jsonl", where="lang > 1")


# ---- JSON files and chats ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("export", "name"),
    [
        *itertools.product(EXPORTS, ("a.json", "a.JSON.zst")),
        *itertools.product(("objects", "ShareGPT", "ChatGPT"), ("lines.json", "a.jsonl")),
    ],
)
def test_json_files_of_texts_and_chats_give_their_documents(tmp_path, export, name):
    value, expected = EXPORTS[export]
    content = json.dumps(value, indent=1) if name in ("a.json", "a.JSON.zst") else "\n".join(map(json.dumps, value))
    write(tmp_path / name, content.encode())
    assert [text for _, text in rows_of(tmp_path / name)[0]] == expected


def test_a_long_chat_is_cut_into_documents_of_whole_messages(tmp_path):
    messages = [{"from": f"p{i % 3}", "text": f"message {i} " * 5} for i in range(2000)]
    (tmp_path / "a.json").write_text(json.dumps({"messages": messages}))
    texts = [text for _, text in rows_of(tmp_path / "a.json")[0]]
    assert "".join(texts).split("\n") == [f"{m['from']}: {m['text']}" for m in messages]
    assert len(texts) > 5 and all(text.startswith("p") for text in texts)


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_json_without_text_is_refused_with_its_keys_and_broken_json_is_damaged(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    for content in ('{"name": "x", "sizes": [1, 2], "tags": ["a", "b"]}', '{"name": {"sizes": [[{"deep": 1}]]}}'):
        path.write_text(content)
        with pytest.raises(SourceError, match=r"a\.jsonl?: no text in 'text'; its keys are name, .*--text_column="):
            rows_of(path)
    for content in ("{broken", '{"text": "x"} no', "[" * 100_000, '{"a":' * 700 + "1" + "}" * 700):
        path.write_text(content)
        with pytest.raises(DamagedError, match=r"a\.jsonl?: .*(JSON|nested)"):
            rows_of(path)


@pytest.mark.parametrize("mark", ["\n\n", "\n", " ", "x", "\r\n \r\n"])
def test_a_cut_text_loses_nothing_and_its_parts_end_at_blank_lines_line_ends_or_spaces(mark):
    draw = random.Random(0)
    text = mark.join("a" * draw.randint(1, 90) for _ in range(300))
    parts = list(cut_text(text, 200))
    assert "".join(parts) == text and all(200 <= len(part) <= 400 for part in parts[:-1]) and len(parts) > 20
    assert mark == "x" or all(part.endswith(mark[-1]) for part in parts[:-1])
    assert list(cut_text("", 200)) == [] and list(cut_text("short", 200)) == ["short"]

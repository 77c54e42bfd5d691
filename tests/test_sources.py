"""sources.py: which files there are and their rows, damaged files, and the hub, which is a server of our own."""

import http.server
import itertools
import json
import os
import random
import re
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlparse

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from texts import files_of, some_texts, write_parquet

import prepare
from onecard import rows as rows_room
from onecard.rows import cut_text, read_texts
from onecard.shards import read_manifest
from onecard.sources import DamagedError, SourceError, cut_groups, examine, find_files

TEXT = {"text_column": "text"}
ROOT = Path(__file__).resolve().parents[1]
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
REFUSALS = {"401": "401 Unauthorized", "403": "403 Forbidden", "429": "429 Too Many"}  # by name of the repository


def rows_of(path, shard_bytes=1e9):
    """[(position, value)] of all units of a file, and the number of units."""
    _, units = examine(path.as_posix(), TEXT, shard_bytes)
    batches = [batch for unit in units for batch in read_texts(path.as_posix(), unit, TEXT, {})]
    return [row for positions, values in batches for row in zip(positions, values, strict=True)], len(units)


def write(path, content):
    """Writes a file with the compression that its name says."""
    kind = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    with pa.CompressedOutputStream(str(path), kind) if kind else path.open("wb") as file:
        file.write(content)


def test_a_folder_has_all_formats_in_any_case_in_order_but_nothing_hidden_and_no_dataset(tmp_path, monkeypatch, capsys):
    names = ["a.TXT", "b.md", "c/d.json", "e.jsonl.GZ", "f.md.zst"]
    left_out = ".git/x.txt", "c/.hidden.md", "photo.jpg", "data/mine/.prepare/plan.json", "data/mine/part.parquet"
    for name in (*names, *left_out, "data/mine/own.txt", "data/mine/manifest.json", "data/mine/tokenizer.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert find_files([str(tmp_path)]) == [f"{tmp_path.as_posix()}/{name}" for name in names]
    monkeypatch.chdir(tmp_path)
    assert find_files(["."]) == names and find_files(["./b.md"]) == ["b.md"]
    (tmp_path / "data/mine/part.parquet").unlink()
    assert find_files(["data/mine"]) == ["data/mine/own.txt"]  # a text may lie beside what was made of it
    for name, message in (
        ("photo.jpg", r"photo\.jpg: does not end in .*\.txt"),
        ("data", "data: no file in this folder ends in"),
    ):
        with pytest.raises(SourceError, match=message):
            find_files([name])
    for name in ("b/1.parquet", "a/2.parquet", "a/10.Parquet"):
        write_parquet(tmp_path / name, ["x"])
    assert find_files(["."]) == ["a/10.Parquet", "a/2.parquet", "b/1.parquet"]
    assert "its 5 other files are left out" in capsys.readouterr().out and find_files(["**/2.*"]) == ["a/2.parquet"]


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary"])
def test_every_kind_of_string_column_gives_the_same_texts(tmp_path, kind):
    texts = [*some_texts(50), None, "", "last"]
    column = pa.array(texts).dictionary_encode() if kind == "dictionary" else pa.array(texts, getattr(pa, kind)())
    rows, _ = rows_of(write_parquet(tmp_path / "a.parquet", column))
    assert rows == list(enumerate(text if text is None else text.encode() for text in texts))


def test_units_cover_every_row_once_and_are_about_a_shard_each():
    draw = random.Random(0)
    for _ in range(300):
        groups = [(draw.randint(0, 50), draw.choice([0, 10, 100, 1000, 5000])) for _ in range(draw.randint(1, 40))]
        shard, starts = draw.choice([100, 1000, 3000]), np.cumsum([0, *(rows for rows, _ in groups)])
        units = cut_groups(groups, shard)
        places = [0] + [row for unit in units for row in unit["rows"]] + [starts[-1]]
        assert places[::2] == places[1::2]
        for unit in units:
            (first, last), (start, stop) = unit["row_groups"], unit["rows"]
            assert starts[first] <= start <= stop <= starts[last]
            assert unit["bytes"] <= 2 * shard or groups[first][0] < 50  # a row group is cut into its rows at most
    for count, shard_bytes, units in ((700, 467e6, 16), (9000, 467e6, 64), (14, 467e6, 14), (14, 9e6, 14), (1, 2e6, 2)):
        sizes = [unit["bytes"] for unit in cut_groups([(1000, 3_300_000)] * count, shard_bytes)]
        assert len(sizes) == units and max(sizes) <= 3_300_000 * count / units * 1.05  # a sixteenth, 4 MB or a shard


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_jsonl_gives_its_texts_in_order_in_any_units_and_a_cut_compressed_file_is_named(tmp_path, suffix):
    texts, path = some_texts(300), tmp_path / f"a{suffix}"
    lines = [json.dumps({"id": 1, "text": text}) + "\n" * (1 + i % 2) for i, text in enumerate(texts)]
    write(path, "".join(lines).encode())
    rows, units = rows_of(path, 9000)
    assert rows == list(zip(np.cumsum([0, *map(len, lines)]).tolist(), texts, strict=False))
    if suffix == ".jsonl":
        assert units > 5
        return
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(DamagedError, match=f"{path.as_posix()}: cannot be read"):
        rows_of(path)


@pytest.mark.parametrize("parts", [1, 2, 7, 40])
def test_text_files_are_cut_into_whole_lines_and_lose_nothing_but_the_byte_order_mark(tmp_path, monkeypatch, parts):
    monkeypatch.setattr(rows_room, "TXT_BYTES", 100)
    draw, path = random.Random(parts), tmp_path / "a.txt"
    lines = ["".join(draw.choices("ab é\r", k=draw.randint(0, 30))) + "\n" for _ in range(500)]
    content = ("".join(lines) + "no end of line").encode()
    write(path, content)
    rows, units = rows_of(path, len(content) / parts)
    assert units == parts and b"".join(text for _, text in rows) == content
    assert [position for position, _ in rows] == np.cumsum([0, *(len(text) for _, text in rows)]).tolist()[:-1]
    assert max(len(text) for _, text in rows) <= 8 * 100 + 70 and len(rows) > 5
    write(path, b"\xef\xbb\xbf" + content)
    assert b"".join(text for _, text in rows_of(path, 1e9)[0]) == content


@pytest.mark.parametrize("line", ["{broken", "[1]", '{"text": 5}', '"text"', '{"a": ' + "[" * 100_000])
def test_a_broken_or_deeply_nested_line_is_named_by_file_and_byte(tmp_path, line):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(DamagedError, match=r"a\.jsonl: .*line at byte 17"):
        rows_of(tmp_path / "a.jsonl")


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
    for content in ("{broken", '{"text": "x"} no', "[" * 100_000):
        path.write_text(content)
        with pytest.raises(DamagedError, match=r"a\.jsonl?: .*JSON"):
            rows_of(path)


@pytest.mark.parametrize(
    "content", ["café".encode("latin-1"), "text".encode("utf-16"), b"good \n" * 300_000 + b"\xff\xd8"]
)
def test_a_text_file_that_is_not_utf8_is_named_with_the_byte(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    at = content.decode("utf-8", "replace").index("\ufffd")
    with pytest.raises(DamagedError, match=rf"a\.txt: byte {at:,} is not UTF-8; save it as UTF-8"):
        rows_of(tmp_path / "a.txt")


@pytest.mark.parametrize("mark", ["\n\n", "\n", " ", "x", "\r\n \r\n"])
def test_a_cut_text_loses_nothing_and_its_parts_end_at_blank_lines_line_ends_or_spaces(mark):
    draw = random.Random(0)
    text = mark.join("a" * draw.randint(1, 90) for _ in range(300))
    parts = list(cut_text(text, 200))
    assert "".join(parts) == text and all(200 <= len(part) <= 400 for part in parts[:-1]) and len(parts) > 20
    assert mark == "x" or all(part.endswith(mark[-1]) for part in parts[:-1])
    assert list(cut_text("", 200)) == [] and list(cut_text("short", 200)) == ["short"]


def test_a_parquet_file_without_rows_has_none_and_a_column_named_twice_is_refused(tmp_path):
    assert rows_of(write_parquet(tmp_path / "empty.parquet", [])) == ([], 1)
    twice = pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["text", "text"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(DamagedError, match=r"twice\.parquet: .*2 columns 'text'"):
        rows_of(tmp_path / "twice.parquet")


class Hub(http.server.BaseHTTPRequestHandler):
    """What huggingface_hub asks for: the repository, its folders, ranges of its files. The first `failures` fail."""

    protocol_version = "HTTP/1.1"
    root, failures, asked = None, 0, 0

    def log_message(self, *_):
        pass

    def answer(self, content, code=200, **headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def entry(self, path):
        size, kind = (path.stat().st_size, "file") if path.is_file() else (0, "directory")
        return {"type": kind, "path": path.relative_to(self.root).as_posix(), "oid": "1" * 40, "size": size}

    def do_POST(self):
        asked = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())["paths"]
        self.answer([self.entry(self.root / name) for name in asked if (self.root / name).exists()])

    def do_GET(self):
        url, api = urlparse(self.path), "/api/datasets/org/data"
        path = unquote(url.path)
        if (code := path.split("/")[4]) in REFUSALS:
            return self.answer({"error": "refused"}, int(code))
        if path in (api, f"{api}/revision/main"):
            return self.answer({"id": "org/data", "sha": "a" * 40, "siblings": [], "tags": []})
        folder = self.root / path.removeprefix(f"{api}/tree/main").strip("/")
        if path.startswith(f"{api}/tree/main") and folder.is_dir():
            below = folder.rglob("*") if "recursive=true" in url.query.lower() else folder.glob("*")
            return self.answer([self.entry(p) for p in sorted(below)])
        if path.startswith("/datasets/org/data/resolve/"):
            return self.answer_range((self.root / path.split("/", 6)[-1]).read_bytes())
        return self.answer({"error": "not found"}, 404, X_Error_Code="EntryNotFound")

    def answer_range(self, content):
        type(self).asked += 1
        if self.asked <= self.failures:
            return self.answer({"error": "busy"}, 503)
        first, last = self.headers.get("Range", f"bytes=0-{len(content) - 1}").removeprefix("bytes=").split("-")
        part = content[int(first) : int(last or len(content)) + 1]
        where = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
        return self.answer(part, 206, Content_Range=where, ETag='"x"', X_Repo_Commit="a" * 40)

    do_HEAD = do_GET


@pytest.fixture
def hub(tmp_path):
    """(folder with the files of the repository org/data, a function that runs prepare.py with this server as the hub).

    prepare.py is a process of its own: huggingface_hub reads the address when it is imported.
    """
    pytest.importorskip("huggingface_hub")
    Hub.root, Hub.failures, Hub.asked = tmp_path / "hub", 0, 0
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        home = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home")}
        options = {"env": os.environ | home, "cwd": ROOT, "capture_output": True, "text": True, "timeout": 120}
        yield Hub.root, lambda *arguments: subprocess.run([sys.executable, "prepare.py", *arguments], **options)
        server.shutdown()


def test_a_glob_a_folder_and_a_name_on_the_hub_give_the_bytes_of_local_files_in_spite_of_failures(tmp_path, hub):
    folder, prepare_py = hub
    for number in range(2):
        write_parquet(folder / f"sample/10BT/{number:03d}.parquet", some_texts(120, number))
    for name in ("sample/readme.md", "data/other.parquet"):
        write_parquet(folder / name, ["x"])
    options = ["--shard_tokens=3000", "--encoder=tiktoken", "--workers=1", f"--data_dir={tmp_path / 'data'}"]
    prepare.main([str(folder / "sample"), *options, "--dataset=local"])
    Hub.failures, base = 2, "hf://datasets/org/data/sample"
    first, second = (f"{base}/10BT/{number:03d}.parquet" for number in range(2))
    done = prepare_py(f"{base}/10BT/*.parquet", base, second, *options, "--dataset=remote")
    assert done.returncode == 0 and Hub.asked > 4, done.stderr
    again = [line.strip() for line in done.stdout.splitlines() if "taken once" in line]
    assert again == [f"{path}: the same as {path}; taken once" for path in (first, second, second)]
    local, remote = (files_of(tmp_path / "data" / name) for name in ("local", "remote"))
    assert local.keys() == remote.keys() and len(local) > 3
    assert {name for name in local if local[name] != remote[name]} == {"manifest.json"}
    assert [source["path"] for source in read_manifest(tmp_path / "data/remote")["sources"]] == [first, second]


def test_what_is_not_on_the_hub_or_refused_by_it_is_named_with_the_cause(hub):
    missing = "hf://datasets/org/data/none/*.parquet", "hf://datasets/org/none/a.parquet"
    refused = [f"hf://datasets/org/{code}/*.parquet" for code in REFUSALS]
    done = hub[1](*missing, *refused, "--dataset=docs")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"{missing[0]}: no such file" in done.stderr and f"{missing[1]}: " in done.stderr
    for path, cause in zip(refused, REFUSALS.values(), strict=True):
        assert re.search(rf"{re.escape(path)}: cannot be read \(.*{cause}", done.stderr)


def test_reading_continues_after_its_last_row_when_the_connection_breaks(tmp_path, monkeypatch):
    """The hub's file breaks off in the middle of the second row group, twice."""
    texts = some_texts(100)
    path = write_parquet(tmp_path / "a.parquet", texts, row_group_size=25)
    _, units = examine(path.as_posix(), TEXT, 10**9)
    opened, real, waits = [], rows_room.parquet_batches, []

    def breaking(*arguments):
        opened.append(arguments)
        for count, batch in enumerate(real(*arguments)):
            if len(opened) < 3 and count == 1:
                raise ConnectionResetError("gone")
            yield batch

    monkeypatch.setattr(rows_room, "parquet_batches", breaking)
    monkeypatch.setattr(rows_room, "open_file", lambda name: path.open("rb"))
    monkeypatch.setattr(rows_room.time, "sleep", waits.append)
    found = [value.decode() for _, values in read_texts("hf://a.parquet", units[0], TEXT, {}) for value in values]
    assert found == texts and waits == [2, 2]

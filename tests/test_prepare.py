"""prepare.py: its ids against tiktoken's, its plan against sums by hand, its bytes against each other."""

import gzip
import hashlib
import http.server
import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlparse

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import prepare
from onecard import sources
from prepare import PrepareError, in_val, next_units
from onecard.shards import TokenBlocks, open_tokens, read_manifest
from onecard.sources import SourceError, cut_groups, examine, read_texts
from onecard.tokenizer import HARD_STRINGS, load_tokenizer

CORPUS = sorted(Path(__file__).resolve().parents[2].glob("shared/corpus/*.parquet"))
WORDS = ["the", "of", "and", "quick", "1234", "naïve", "—", "''", "don't", "<|endoftext|>", "日本", "\n\n", "", "x"]


def some_texts(count, seed=0, words=60):
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 2 * words))) + f" {seed}.{i}" for i in range(count)]


def write_parquet(path, texts, row_group_size=20, kind=None, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    column = texts if isinstance(texts, pa.Array) else pa.array(texts, kind or pa.string())
    pq.write_table(pa.table({"text": column, **columns}), path, row_group_size=row_group_size)
    return path


@pytest.fixture
def run(tmp_path, capsys):
    """prepare.py as a person calls it; returns (exit code, what it printed)."""

    def run(*arguments, dataset="docs"):
        code = 0
        try:
            arguments = ["--encoder=tiktoken", *map(str, arguments), f"--data_dir={tmp_path / 'data'}"]
            prepare.main([*arguments, f"--dataset={dataset}"] if dataset else arguments)
        except SystemExit as stop:
            code = stop.code
        return code, "".join(capsys.readouterr())

    return run


def files_of(folder):
    """{name: bytes} of a dataset, but for prepare's own state."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*")) if path.is_file()}


def documents_of(folder, split):
    """[ids] of each document of a split, in the order of the shards; each begins with 50256."""
    documents = []
    for shard in read_manifest(folder)["shards"]:
        if shard["split"] == split:
            tokens = np.array(open_tokens(folder / shard["name"]))
            starts = np.flatnonzero(tokens == 50256)
            assert starts[0] == 0 and len(starts) == shard["documents"]
            documents += np.split(tokens, starts[1:])
    return documents


def expected_documents(texts, split, val_fraction=0.005):
    encode = load_tokenizer().reference.encode_ordinary
    chosen = [text for text in texts if in_val(text.encode(), val_fraction) == (split == "val")]
    return [[50256, *encode(text)] for text in chosen]


# ---- the tokens --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", ["tiktoken", "fastokens"])
def test_every_document_has_tiktokens_ids_behind_one_separator(run, tmp_path, encoder):
    if encoder == "fastokens":
        pytest.importorskip("fastokens")
    texts = [text for text in HARD_STRINGS if text] + some_texts(150)
    write_parquet(tmp_path / "a.parquet", texts)
    code, _ = run(tmp_path / "a.parquet", "--val_fraction=0.2", f"--encoder={encoder}")
    assert code == 0
    for split in ("train", "val"):
        found = [ids.tolist() for ids in documents_of(tmp_path / "data/docs", split)]
        assert found == expected_documents(texts, split, 0.2) and found


@pytest.mark.skipif(not CORPUS, reason="../shared/corpus is not there")
def test_the_corpus_has_its_own_token_counts_and_tiktokens_ids(run, tmp_path):
    assert run(*CORPUS)[0] == 0
    folder = tmp_path / "data/docs"
    tables = [pq.read_table(path, columns=["text", "token_count"]) for path in CORPUS]
    counts = sum(sum(table["token_count"].to_pylist()) for table in tables)
    manifest = read_manifest(folder)
    assert manifest["tokens"] == counts + sum(map(len, tables))
    assert sum(TokenBlocks(folder, split, 1024).tokens for split in ("train", "val")) == manifest["tokens"]
    texts = [text for table in tables for text in table["text"].to_pylist()]
    found = documents_of(folder, "val") + documents_of(folder, "train")[::50]
    expected = expected_documents(texts, "val")
    encode = load_tokenizer().reference.encode_ordinary
    train = [text for text in texts if not in_val(text.encode(), 0.005)]
    expected += [[50256, *encode(text)] for text in train[::50]]
    assert len(found) == len(expected) and all(a.tolist() == b for a, b in zip(found, expected, strict=True))
    code, said = run("--verify")
    assert code == 0 and "right" in said and "token_count" not in said


def test_bytes_do_not_depend_on_workers_or_encoder_and_duplicates_share_a_split(run, tmp_path):
    for name in ("a", "b", "c"):
        write_parquet(tmp_path / "in" / f"{name}.parquet", some_texts(60, 0) + some_texts(60, ord(name)))
    options = (tmp_path / "in", "--val_fraction=0.3", "--shard_tokens=3000")
    folders = []
    for number, extra in enumerate((("--workers=1",), ("--workers=3",), ("--workers=2", "--encoder=auto"))):
        assert run(*options, *extra, dataset=f"d{number}")[0] == 0
        folders.append(files_of(tmp_path / "data" / f"d{number}"))
    assert len(folders[0]) > 8 and folders[0] == folders[1]
    different = {name for name in folders[0] if folders[0][name] != folders[2][name]}
    assert folders[0].keys() == folders[2].keys() and different <= {"manifest.json"}  # which names the encoder
    train = {tuple(ids.tolist()) for ids in documents_of(tmp_path / "data/d0", "train")}
    val = {tuple(ids.tolist()) for ids in documents_of(tmp_path / "data/d0", "val")}
    assert not train & val and len(val) > 20


def test_val_is_the_fraction_of_documents_that_was_asked_for():
    contents = [f"document {i}".encode() for i in range(100_000)]
    for fraction in (0.0, 0.005, 0.3):
        count = sum(in_val(content, fraction) for content in contents)
        deviation = (len(contents) * fraction * (1 - fraction)) ** 0.5
        assert abs(count - len(contents) * fraction) <= 4 * deviation


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary", "dictionary of large"])
def test_every_kind_of_string_column_gives_the_same_texts(tmp_path, kind):
    texts = [*some_texts(50), None, "", "last"]
    if kind.startswith("dictionary"):
        value = pa.large_string() if "large" in kind else pa.string()
        column = pa.array(texts, value).dictionary_encode()
    else:
        column = pa.array(texts, getattr(pa, kind)())
    path = write_parquet(tmp_path / "a.parquet", column).as_posix()
    _, units = examine(path, "text", 10**9)
    found = [value for unit in units for _, values, _ in read_texts(path, unit, "text") for value in values]
    assert found == [text if text is None else text.encode() for text in texts]


def test_null_and_empty_texts_are_skipped_and_counted(run, tmp_path):
    write_parquet(tmp_path / "a.parquet", ["one", None, "", "two", None, " "])
    code, said = run(tmp_path / "a.parquet")
    manifest = read_manifest(tmp_path / "data/docs")
    assert code == 0 and manifest["skipped"] == {"null": 2, "empty": 1} and manifest["documents"] == 3
    assert "2 null, 1 empty" in said and "no document fell into val" in said


def test_surrogates_are_replaced_and_counted(run, tmp_path):
    lines = [{"text": "a\ud800b"}, {"text": "\ud83d\ude00"}, {"text": "plain"}, {"text": None}, {"other": 1}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert run(tmp_path / "a.jsonl")[0] == 0
    manifest = read_manifest(tmp_path / "data/docs")
    assert (manifest["replaced"], manifest["documents"], manifest["skipped"]["null"]) == (1, 3, 2)
    found = [load_tokenizer().decode(ids[1:]) for ids in documents_of(tmp_path / "data/docs", "train")]
    assert found == ["a\ufffdb", "😀", "plain"]


def test_the_manifest_says_where_every_shard_comes_from(run, tmp_path):
    texts = some_texts(200)
    path = write_parquet(tmp_path / "a.parquet", texts, row_group_size=30)
    assert run(path, "--shard_tokens=4000", "--val_fraction=0.3")[0] == 0
    folder = tmp_path / "data/docs"
    manifest = read_manifest(folder)
    for shard in manifest["shards"]:
        content = (folder / shard["name"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == shard["sha256"] and len(content) == 1024 + 2 * shard["tokens"]
        first, last = shard["rows"]
        assert (shard["row_groups"][0] * 30, min(shard["row_groups"][1] * 30, 200)) == (first, last)
        chosen = [t for t in texts[first:last] if in_val(t.encode(), 0.3) == (shard["split"] == "val")]
        assert (shard["documents"], shard["text_bytes"]) == (len(chosen), sum(len(t.encode()) for t in chosen))
        assert shard["source"] == path.as_posix()
    assert manifest["tokenizer"]["n_vocab"] == 50257 and manifest["libraries"]["tiktoken"]
    assert manifest["settings"]["val_fraction"] == 0.3 and manifest["encoder"] in ("tiktoken", "fastokens")


# ---- the plan ----------------------------------------------------------------------------------------------


def test_units_cover_every_row_once_and_are_about_a_shard_each():
    draw = random.Random(0)
    for _ in range(300):
        groups = [(draw.randint(0, 50), draw.choice([0, 10, 100, 1000, 5000])) for _ in range(draw.randint(1, 40))]
        shard = draw.choice([100, 1000, 3000])
        units = cut_groups(groups, shard)
        starts = np.cumsum([0, *(rows for rows, _ in groups)])
        assert [unit["rows"][0] for unit in units[1:]] == [unit["rows"][1] for unit in units[:-1]]
        assert units[0]["rows"][0] == 0 and units[-1]["rows"][1] == starts[-1]
        for unit in units:
            (first, last), (start, stop) = unit["row_groups"], unit["rows"]
            assert starts[first] <= start <= stop <= starts[last]
            assert unit["bytes"] <= 2 * shard or all(groups[first][0] < 50 for _ in [0])
    assert len(cut_groups([(1000, 3_300_000)] * 700, 467_000_000)) == 5
    assert len({unit["bytes"] for unit in cut_groups([(1000, 3_300_000)] * 700, 467_000_000)}) == 1


def test_a_row_group_larger_than_a_shard_is_cut_by_its_rows(run, tmp_path):
    texts = some_texts(300)
    path = write_parquet(tmp_path / "a.parquet", texts, row_group_size=300)
    assert run(path, "--shard_tokens=2000")[0] == 0
    assert len(read_manifest(tmp_path / "data/docs")["shards"]) > 5
    found = [ids.tolist() for ids in documents_of(tmp_path / "data/docs", "train")]
    assert found == expected_documents(texts, "train")


def test_files_are_added_by_the_same_command_and_nothing_old_moves(run, tmp_path):
    paths = [write_parquet(tmp_path / f"{name}.parquet", some_texts(80, ord(name))) for name in "bca"]
    options = ("--val_fraction=0.2", "--shard_tokens=2000")
    assert run(paths[0], *options)[0] == 0
    before = files_of(tmp_path / "data/docs")
    code, said = run(*paths, *options)
    after = files_of(tmp_path / "data/docs")
    assert code == 0 and all(after[name] == before[name] for name in before if name != "manifest.json")
    assert len(after) > len(before) and "done already" in said
    assert run(*paths, *options, dataset="whole")[0] == 0
    assert files_of(tmp_path / "data/whole") == after


def test_a_finished_dataset_is_said_to_be_and_not_touched(run, tmp_path):
    path = write_parquet(tmp_path / "a.parquet", some_texts(100))
    run(path)
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "data/docs").rglob("*") if p.suffix != ".lock"}
    for arguments in ((path,), ()):
        code, said = run(*arguments)
        assert code == 0 and "is finished; nothing to do" in said
    assert all(p.stat().st_mtime_ns == before for p, before in times.items())
    moved = path.rename(tmp_path / "moved.parquet")
    assert "nothing to do" in run(moved)[1]
    assert read_manifest(tmp_path / "data/docs")["shards"][0]["source"] == moved.as_posix()


def test_files_are_known_by_their_content(run, tmp_path):
    one = write_parquet(tmp_path / "one/000.parquet", some_texts(50, 1))
    two = write_parquet(tmp_path / "two/000.parquet", some_texts(50, 2))
    copy = tmp_path / "copy.parquet"
    copy.write_bytes(one.read_bytes())
    code, said = run(one, two, copy, two)
    assert code == 0 and read_manifest(tmp_path / "data/docs")["documents"] == 100
    assert f"{copy.as_posix()}: the same as {one.as_posix()}; taken once" in said
    assert f"{two.as_posix()}: the same as {two.as_posix()}" in said
    write_parquet(one, some_texts(50, 3))
    with pytest.raises(PrepareError, match=r"one/000\.parquet: has changed"):
        run(one)


def test_settings_of_a_dataset_cannot_change(run, tmp_path):
    path = write_parquet(tmp_path / "a.parquet", some_texts(50))
    run(path, "--val_fraction=0.1")
    with pytest.raises(PrepareError) as error:
        run(path, "--val_fraction=0.2", "--shard_tokens=5000")
    lines = str(error.value).splitlines()
    assert len(lines) == 2 and "begun with 0.1, not 0.2" in lines[0] and "100000000, not 5000" in lines[1]
    with pytest.raises(PrepareError, match=r"begun with 0\.1, not 0\.005"):
        run(path)
    assert "nothing to do" in run()[1]  # without inputs, what was not said again holds
    with pytest.raises(PrepareError, match=r"begun with 0\.1, not 0\.3"):
        run("--val_fraction=0.3")


def minimal_prefix(texts, group, most):
    """How many rows the fewest whole row groups have that reach `most` tokens."""
    encode, total = load_tokenizer().reference.encode_ordinary, 0
    for start in range(0, len(texts), group):
        total += sum(1 + len(encode(text)) for text in texts[start : start + group])
        if total >= most:
            return min(start + group, len(texts)), total
    return len(texts), total


@pytest.mark.parametrize("most", [1, 700, 3000, 9000, 15_000, 10_000_000])
def test_max_tokens_takes_the_fewest_row_groups_in_order(run, tmp_path, most):
    texts = [*some_texts(100, 1), *some_texts(100, 2, words=5), *some_texts(100, 3)]
    for part in range(3):
        write_parquet(tmp_path / f"in/{part}.parquet", texts[100 * part : 100 * part + 100], row_group_size=10)
    rows, tokens = minimal_prefix(texts, 10, most)
    found = []
    for workers in (1, 3):
        assert run(tmp_path / "in", f"--max_tokens={most}", "--shard_tokens=2500", f"--workers={workers}",
                   dataset=f"d{workers}")[0] == 0  # fmt: skip
        found.append(files_of(tmp_path / f"data/d{workers}"))
    manifest = read_manifest(tmp_path / "data/d1")
    assert (manifest["documents"], manifest["tokens"]) == (rows, tokens)
    assert found[0] == found[1]


def test_max_tokens_can_grow_and_ends_as_if_it_had_been_so_from_the_start(run, tmp_path):
    path = write_parquet(tmp_path / "a.parquet", some_texts(200))
    for most in (500, 4000, 4000, 0):
        assert run(path, f"--max_tokens={most}", "--shard_tokens=3000")[0] == 0
    assert run(path, "--shard_tokens=3000", dataset="whole")[0] == 0
    assert files_of(tmp_path / "data/docs") == files_of(tmp_path / "data/whole")
    with pytest.raises(PrepareError, match=r"max_tokens: .* tokens already"):
        run(path, "--max_tokens=500", "--shard_tokens=3000")


def test_a_guess_that_was_wrong_is_taken_back():
    """A unit that ran whole although the limit turned out to lie inside it runs again, with that limit."""
    plan = {"units": [{"bytes": 4670}, {"bytes": 4670}, {"bytes": 4670}]}  # 1000 tokens each are expected
    owned = range(3)
    assert next_units(plan, {}, owned, (), {}, 0) == [(0, 0), (1, 0), (2, 0)]
    assert next_units(plan, {}, owned, (), {}, 2000) == [(0, 2000)]
    assert next_units(plan, {}, owned, (), {}, 3100) == [(0, 3100), (1, 0)]
    record = {"tokens": 2500, "complete": True, "limit": 3100}
    assert next_units(plan, {0: record}, owned, (1,), {}, 3100) == []
    whole = {"tokens": 2500, "complete": True, "limit": 0}
    assert next_units(plan, {0: record, 1: whole}, owned, (), {}, 3100) == [(1, 600)]
    cut = {"tokens": 650, "complete": False, "limit": 600}
    assert next_units(plan, {0: record, 1: cut, 2: whole}, owned, (), {}, 3100) == []
    assert next_units(plan, {0: record, 1: cut, 2: whole}, owned, (), {}, 0) == [(1, 0)]


# ---- tasks -------------------------------------------------------------------------------------------------


def test_tasks_and_a_merge_make_what_one_run_makes(run, tmp_path):
    for name in "abc":
        write_parquet(tmp_path / f"in/{name}.parquet", some_texts(80, ord(name)))
    options = (tmp_path / "in", "--shard_tokens=1500", "--val_fraction=0.2")
    for task in ("2/3", "1/3"):
        code, said = run(*options, f"--task={task}")
        assert code == 0 and "--merge" in said
    assert not (tmp_path / "data/docs/manifest.json").exists()
    with pytest.raises(PrepareError, match=r"units \[2, 5, .* are not done"):
        run("--merge")
    assert run(*options, "--task=3/3")[0] == 0
    assert run("--merge")[0] == 0
    assert run(*options, dataset="whole")[0] == 0
    assert files_of(tmp_path / "data/docs") == files_of(tmp_path / "data/whole")


@pytest.mark.parametrize("task", ["0/4", "5/4", "x", "1/0", "3"])
def test_a_task_that_is_none_is_refused(run, task):
    with pytest.raises(ValueError, match="1/16 to 16/16"):
        run("a.parquet", f"--task={task}")


# ---- sources -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_jsonl_gives_the_same_tokens_as_parquet(run, tmp_path, suffix):
    texts = some_texts(300)
    content = "".join(json.dumps({"id": 1, "text": text}) + "\n" * (1 + i % 2) for i, text in enumerate(texts)).encode()
    path = tmp_path / f"a{suffix}"
    if suffix.endswith("zst"):
        with pa.CompressedOutputStream(str(path), "zstd") as file:
            file.write(content)
    else:
        path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    assert run(path, "--shard_tokens=2000")[0] == 0
    assert len(read_manifest(tmp_path / "data/docs")["shards"]) > 5 or suffix != ".jsonl"
    found = [ids.tolist() for ids in documents_of(tmp_path / "data/docs", "train")]
    assert found == expected_documents(texts, "train")


@pytest.mark.parametrize("parts", [1, 2, 7, 40])
def test_text_files_are_cut_into_whole_lines_and_lose_nothing(tmp_path, monkeypatch, parts):
    monkeypatch.setattr(sources, "TXT_BYTES", 100)
    draw = random.Random(parts)
    lines = ["".join(draw.choices("ab é\r", k=draw.randint(0, 30))) + "\n" for _ in range(500)]
    content = ("".join(lines) + "no end of line").encode()
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    units = sources.cut_bytes(str(path), len(content), len(content) / parts)
    assert len(units) == parts
    rows = [
        row for unit in units for batch in read_texts(str(path), unit, "text") for row in zip(*batch[:2], strict=True)
    ]
    assert b"".join(text for _, text in rows) == content
    assert [position for position, _ in rows] == np.cumsum([0, *(len(text) for _, text in rows)]).tolist()[:-1]
    assert max(len(text) for _, text in rows) <= 8 * 100 + 70 and len(rows) > 5


def test_a_text_file_starts_without_its_byte_order_mark(run, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfHello world")
    assert run(tmp_path / "a.txt")[0] == 0
    assert documents_of(tmp_path / "data/docs", "train")[0].tolist() == [50256, 15496, 995]


def test_folders_and_globs_are_taken_in_the_order_of_their_names(tmp_path):
    for name in ("b/1.parquet", "a/2.parquet", "a/10.parquet", "a/x.jsonl", "a/readme.md"):
        write_parquet(tmp_path / name, ["x"])
    names = [p.removeprefix(f"{tmp_path.as_posix()}/") for p in sources.find_files([str(tmp_path)])]
    assert names == ["a/10.parquet", "a/2.parquet", "b/1.parquet"]
    assert sources.find_files([f"{tmp_path}/**/2.*"]) == [f"{tmp_path.as_posix()}/a/2.parquet"]


def test_wrong_inputs_are_all_named_before_any_work(run, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.md").write_text("x")
    good = write_parquet(tmp_path / "good.parquet", ["x"])
    with pytest.raises(SourceError) as error:
        run(good, *(tmp_path / name for name in ("none.parquet", "empty", "notes.md", "*.nothing")))
    lines = str(error.value).splitlines()
    assert len(lines) == 4
    for name, line in zip(("none.parquet", "empty", "notes.md", "*.nothing"), lines, strict=True):
        assert line.startswith(f"{tmp_path}/{name}: ")
    no_column = tmp_path / "other.parquet"
    pq.write_table(pa.table({"content": ["x"], "score": [1]}), no_column)
    with pytest.raises(PrepareError, match=r"other\.parquet: no column 'text' among content, score; .*--text_column="):
        run(good, no_column)
    with pytest.raises(PrepareError, match="column 'score' holds int64, not text"):
        run(no_column, "--text_column=score")
    assert run(no_column, "--text_column=content", dataset="other")[0] == 0
    with pytest.raises(PrepareError, match="nothing is prepared here yet"):
        run(dataset="unknown")
    assert not list(tmp_path.glob("data/docs/*.bin"))


# ---- the hub -----------------------------------------------------------------------------------------------


class Hub(http.server.BaseHTTPRequestHandler):
    """What huggingface_hub asks for: the repository, its folders, ranges of its files; some answers fail."""

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
        size = path.stat().st_size if path.is_file() else 0
        kind = "file" if path.is_file() else "directory"
        return {"type": kind, "path": path.relative_to(self.root).as_posix(), "oid": "1" * 40, "size": size}

    def do_POST(self):
        asked = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())["paths"]
        self.answer([self.entry(self.root / name) for name in asked if (self.root / name).exists()])

    def do_GET(self):
        url = urlparse(self.path)
        path, api = unquote(url.path), "/api/datasets/org/data"
        if path in (api, f"{api}/revision/main"):
            return self.answer({"id": "org/data", "sha": "a" * 40, "siblings": [], "tags": []})
        if path.startswith(f"{api}/tree/main"):
            folder = self.root / path.removeprefix(f"{api}/tree/main").strip("/")
            deep = "recursive=true" in url.query.lower()
            if folder.is_dir():
                return self.answer([self.entry(p) for p in sorted(folder.rglob("*") if deep else folder.glob("*"))])
        if path.startswith("/datasets/org/data/resolve/"):
            return self.send_range(self.root / path.split("/", 6)[-1])
        return self.answer({"error": "not found"}, 404, X_Error_Code="EntryNotFound")

    def send_range(self, path):
        type(self).asked += 1
        if self.asked <= self.failures:
            return self.answer({"error": "busy"}, 503)
        content = path.read_bytes()
        first, last = self.headers.get("Range", f"bytes=0-{len(content) - 1}").removeprefix("bytes=").split("-")
        part = content[int(first) : int(last or len(content)) + 1]
        where = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
        return self.answer(part, 206, Content_Range=where, ETag='"x"', X_Repo_Commit="a" * 40)

    do_HEAD = do_GET


@pytest.fixture
def hub(tmp_path):
    """(folder, command): a server for the repository org/data, whose files lie in that folder; and what runs
    prepare.py with it for Hugging Face's, in a process of its own, since the address is read at import."""
    pytest.importorskip("huggingface_hub")
    Hub.root, Hub.failures, Hub.asked = tmp_path / "hub", 0, 0
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    home = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}

    def command(*arguments):
        line = [sys.executable, "prepare.py", *map(str, arguments), f"--data_dir={tmp_path / 'data'}"]
        root = Path(prepare.__file__).parent
        return subprocess.run(line, cwd=root, env=os.environ | home, capture_output=True, text=True, timeout=120)

    yield Hub.root, command
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("name", ["sample/10BT/*.parquet", "sample", "sample/10BT/000.parquet"])
def test_hub_paths_give_the_bytes_of_local_files_in_spite_of_failures(run, tmp_path, hub, name):
    folder, command = hub
    for number in range(1 if "000" in name else 2):
        write_parquet(folder / f"sample/10BT/{number:03d}.parquet", some_texts(120, number))
    write_parquet(folder / "data/other.parquet", ["another"])
    assert run(folder / "sample", "--shard_tokens=3000", dataset="local")[0] == 0
    Hub.failures = 2
    done = command(f"hf://datasets/org/data/{name}", "--shard_tokens=3000", "--dataset=remote")
    assert done.returncode == 0 and Hub.asked > 4, done.stderr
    local, remote = (files_of(tmp_path / "data" / name) for name in ("local", "remote"))
    assert local.keys() == remote.keys() and len(local) > 3
    assert {name for name in local if local[name] != remote[name]} == {"manifest.json"}
    assert read_manifest(tmp_path / "data/remote")["sources"][0]["path"].startswith("hf://datasets/org/data/sample")


def test_hub_paths_that_are_not_there_are_named(hub):
    folder, command = hub
    write_parquet(folder / "a.parquet", ["x"])
    done = command("hf://datasets/org/data/none/*.parquet", "hf://datasets/org/none/a.parquet", "--dataset=docs")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "hf://datasets/org/data/none/*.parquet: no such file" in done.stderr
    assert "hf://datasets/org/none/a.parquet: " in done.stderr


def test_reading_goes_on_after_its_last_row_when_the_connection_breaks(tmp_path, monkeypatch):
    """The hub's file breaks off in the middle of the second row group, twice."""
    texts = some_texts(100)
    path = write_parquet(tmp_path / "a.parquet", texts, row_group_size=25)
    _, units = examine(path.as_posix(), "text", 10**9)
    state, real, waits = {"opened": 0}, sources.parquet_batches, []

    def breaking(file, name, unit, column, start):
        state["opened"] += 1
        for count, batch in enumerate(real(file, name, unit, column, start)):
            if state["opened"] < 3 and count == 1:
                raise ConnectionResetError("gone")
            yield batch

    monkeypatch.setattr(sources, "parquet_batches", breaking)
    monkeypatch.setattr(sources, "open_file", lambda name: path.open("rb"))
    monkeypatch.setattr(sources.time, "sleep", waits.append)
    found = [value.decode() for _, values, _ in read_texts("hf://a.parquet", units[0], "text") for value in values]
    assert found == texts and waits == [2, 2]


# ---- looking at a dataset ----------------------------------------------------------------------------------


def test_inspect_shows_counts_lengths_sources_and_texts(run, tmp_path):
    texts = [f"word{' word' * (i % 10)}" for i in range(200)]
    path = write_parquet(tmp_path / "a.parquet", ["FIRST document", *texts, "LAST document"])
    run(path, "--val_fraction=0.0")
    code, said = run("--inspect")
    assert code == 0
    for part in ("202", path.as_posix(), "first: FIRST document", "last: LAST document", "0 null, 0 empty"):
        assert part in said, part


def test_inspect_shows_a_dataset_of_one_long_document(run, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "long " * 30_000}))
    assert run(tmp_path / "a.jsonl")[0] == 0
    code, said = run("--inspect")
    assert code == 0 and "30,001, 30,001" in said and "last: long long" in said


def test_verify_compares_with_token_count(run, tmp_path):
    texts = some_texts(100)
    encode = load_tokenizer().reference.encode_ordinary
    counts = [len(encode(text)) for text in texts]
    right = write_parquet(tmp_path / "right.parquet", texts, token_count=pa.array(counts))
    assert run(right, "--shard_tokens=1500", "--max_tokens=4000")[0] == 0
    code, said = run("--verify")
    assert code == 0 and "are right" in said and "not compared" not in said
    counts[3] += 1
    wrong = write_parquet(tmp_path / "wrong.parquet", texts, token_count=pa.array(counts))
    run(wrong, dataset="wrong")
    code, said = run("--verify", dataset="wrong")
    assert code == 1 and f"rows 0 to 100 is {sum(counts):,}, not {sum(counts) - 1:,}" in said
    with pytest.raises(PrepareError, match="no finished dataset"):
        run("--verify", dataset="none")


def test_the_quickstart_is_half_a_million_tokens_of_english_with_fineweb_s_columns(run, tmp_path):
    code, said = run(dataset="")
    folder = tmp_path / "data/quickstart"
    table, manifest = pq.read_table(folder / "quickstart.parquet"), read_manifest(folder)
    columns = ["text", "id", "dump", "url", "date", "file_path", "language", "language_score", "token_count"]
    assert code == 0 and table.column_names == columns and str(table.schema.field("token_count").type) == "int64"
    assert manifest["tokens"] == sum(table["token_count"].to_pylist()) + len(table)
    assert 400_000 < manifest["tokens"] < 800_000
    val = TokenBlocks(folder, "val", 128).tokens
    assert 0.03 < val / manifest["tokens"] < 0.07 and "next: python train.py config/quickstart.py" in said
    code, said = run(dataset="")
    assert code == 0 and "nothing to do" in said

"""sources.py: which files there are, what identifies them, and how they are cut."""

import hashlib
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from texts import rows_of, some_texts, write_parquet

from onecard.remote import DamagedError, SourceError
from onecard.sources import TAIL_BYTES, cut_groups, examine, find_files

TEXT = {"text_column": "text"}


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
    assert [len(cut_groups([(10**6, 64_000_000)], shard_bytes)) for shard_bytes in (467e6, 5e6)] == [4, 13]


def test_a_parquet_file_is_identified_and_planned_by_its_footer_of_any_length(tmp_path):
    for rows, group in ((50, 20), (3000, 1)):
        path = write_parquet(tmp_path / "a.parquet", some_texts(rows), row_group_size=group)
        content = path.read_bytes()
        footer = content[-8 - int.from_bytes(content[-8:-4], "little") :]
        assert (len(footer) > TAIL_BYTES) == (group == 1)
        source, units = examine(str(path), TEXT, 5000)
        assert source["id"] == f"{len(content):x}-{hashlib.sha256(footer).hexdigest()}" and source["rows"] == rows
        known = pq.ParquetFile(path).metadata
        sizes = [known.row_group(i).column(0).total_uncompressed_size for i in range(known.num_row_groups)]
        assert sum(unit["bytes"] for unit in units) in range(sum(sizes) - len(units) * 3, sum(sizes) + 1)
        assert examine(str(path), TEXT, 5000) == (source, units)


def test_a_parquet_file_without_rows_has_no_units_and_one_that_is_none_or_has_a_column_twice_is_damaged(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [])
    assert examine(str(path), TEXT, 1e9)[1] == []
    pq.ParquetWriter(path, pa.schema({"text": pa.string()})).close()  # not even one row group
    assert examine(str(path), TEXT, 1e9)[1] == []
    twice = pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["text", "text"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    whole = write_parquet(tmp_path / "b.parquet", some_texts(50)).read_bytes()
    wrong = {"twice": (tmp_path / "twice.parquet").read_bytes(), "cut": whole[:-100], "short": b"PAR1", "none": b""}
    wrong |= {
        "text": b"just a text",
        "length": whole[:-8] + b"\xff\xff\xff\x7fPAR1",
        "footer": whole[:-20] + whole[-8:] * 2,
    }
    for name, content in (wrong | {"zeros": bytes(len(whole) - 12) + whole[-12:]}).items():
        (tmp_path / f"{name}.parquet").write_bytes(content)
        why = "2 columns 'text'; rename" if name == "twice" else "cannot be read .*copy it again"
        with pytest.raises(DamagedError, match=rf"{name}\.parquet: .*{why}"):
            rows_of(tmp_path / f"{name}.parquet")

"""dataset.py: plans of small and large datasets; train and val of a small text; a tokenizer of the inputs."""

import itertools
import json
import pickle
import random
import threading
import time
from pathlib import Path

import pytest
from texts import some_texts, write_parquet

from onecard import dataset
from onecard.dataset import bytes_per_token, plan_dataset
from onecard.records import STATE, PrepareError, read_plan, stamp, write_plan
from onecard.remote import SourceError
from onecard.sources import examine
from onecard.tokenizer import TokenizerError, check_round_trip, from_state, load_tokenizer, train_tokenizer
from onecard.units import new_record, read_documents

NOWHERE = Path("none/mine")  # a dataset that is planned only


def prose(size, seed=0):
    """So many characters in paragraphs of 1 to 120 words."""
    draw, parts, length = random.Random(seed), [], 0
    while length < size:
        parts.append(" ".join(f"w{draw.randint(0, 999)}" for _ in range(draw.randint(1, 120))) + "\n\n")
        length += len(parts[-1])
    return "".join(parts)[:size]


def settings_of(*paths, **asked):
    return plan_dataset([str(path) for path in paths], asked, NOWHERE)[0]["settings"]


def splits_of(path, settings):
    """{split: its text} of a file, from the documents that its units would write."""
    texts = {"train": "", "val": ""}
    for unit in examine(str(path), {"text_column": "text"}, 1e9)[1]:
        job = settings | {"paths": [str(path)], "unit": unit}
        for document in itertools.chain.from_iterable(read_documents(job, new_record())):
            texts[document.split] += document.text
    return texts


@pytest.mark.parametrize("size", [10_000, 48_000, 1_500_000])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", " "])
def test_a_text_of_any_size_gets_about_its_share_of_val_by_a_rule_of_its_content(tmp_path, size, line_end):
    """val: at least 1,200 bytes, which are more than a window of 257 tokens."""
    path = tmp_path / "a.txt"
    for seed in range(3):
        path.write_bytes(prose(size, seed).replace("\n", line_end).encode())
        settings, length = settings_of(path), path.stat().st_size
        assert settings == settings_of(path) and 0.1 <= settings["val_fraction"] <= 0.25
        texts = splits_of(path, settings)
        assert sum(map(len, texts.values())) == length
        assert 1200 < len(texts["val"]) < length / 2 and len(texts["val"]) / length > settings["val_fraction"] / 2


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_a_few_giant_documents_above_the_size_that_is_read_get_both_splits_too(tmp_path, monkeypatch, name):
    monkeypatch.setattr(dataset, "SMALL_BYTES", 1_000_000)
    texts, path = [prose(700_000, seed) for seed in range(3)], tmp_path / name
    objects = [{"text": text} for text in texts]
    if name == "a.parquet":
        write_parquet(path, texts)
    else:
        path.write_text(json.dumps(objects) if name == "a.json" else "\n".join(map(json.dumps, objects)))
    for asked in ({}, {"val_fraction": 0.001}):
        settings = settings_of(path, tokenizer="gpt2", **asked)
        assert settings["val_fraction"] == pytest.approx(40_000 / 2_100_000, rel=0.02)  # ten groups of 4,000 characters
        sizes = {split: len(text) for split, text in splits_of(path, settings).items()}
        assert sum(sizes.values()) == 2_100_000 and 10_000 < sizes["val"] < 100_000
    assert "paragraph_chars" not in settings_of(path, val_fraction=0.0)


def test_the_share_of_val_falls_with_the_size_and_documents_stay_whole_where_they_are_many(tmp_path):
    for count, share in ((400, 0.1), (4000, 0.0499)):
        path = tmp_path / f"{count}.jsonl"
        path.write_text("\n".join(json.dumps({"text": f"{i} " + "word " * 500}) for i in range(count)))
        settings = settings_of(path)
        assert settings["val_fraction"] == share and "paragraph_chars" not in settings
    for asked in (0.3, 0.0):
        assert settings_of(tmp_path / "400.jsonl", val_fraction=asked)["val_fraction"] == asked
    rows = write_parquet(tmp_path / "a.parquet", ["x " * 20] * 2000)
    assert settings_of(rows) == dataset.SETTINGS  # as for FineWeb's files


def test_a_fraction_that_is_less_than_a_paragraph_is_raised_and_too_little_text_is_refused(tmp_path, capsys):
    path = tmp_path / "a.txt"
    path.write_text(prose(48_000))
    assert settings_of(path, val_fraction=0.005)["val_fraction"] == 0.1
    assert "split by paragraphs, about 10.0% of the text is val" in capsys.readouterr().out
    for content, message in (
        ("hello " * 100, r"a\.txt: 600 bytes of text; at least 10,000 are needed"),
        ("", r"a\.txt: 0 bytes of text"),
        ("hello world\n" * 5000, r"a\.txt: too few different paragraphs"),
    ):
        path.write_text(content)
        with pytest.raises(PrepareError, match=message):
            settings_of(path)
    path.write_text("hello " * 100)
    assert settings_of(path, val_fraction=0.0)["val_fraction"] == 0


def test_small_files_are_one_unit_and_new_ones_join_it_in_their_order(tmp_path):
    for number in range(30):
        (tmp_path / f"{number:02d}.md").write_text(prose(1500, number))
    paths = sorted(map(str, tmp_path.glob("*.md")))
    whole, damaged, content = plan_dataset(paths, {}, NOWHERE)
    assert not damaged and not content and len(whole["sources"]) == 30
    assert whole["units"] == [{"source": 0, "files": 30, "bytes": 45_000}]
    folder = tmp_path / "data/mine"
    (folder / STATE).mkdir(parents=True)
    for count in (20, 30, 30):
        before = stamp(folder)
        plan, _, _ = plan_dataset(paths[:count], {}, folder)
        write_plan(plan, "", before, folder)
    assert read_plan(folder)["units"] == whole["units"] and read_plan(folder)["sources"] == whole["sources"]
    (tmp_path / "05.md").write_text("changed")
    with pytest.raises(PrepareError, match=rf"05\.md: has changed since {folder} was started; use another --data"):
        plan_dataset(paths, {}, folder)


def test_json_without_text_is_left_out_of_a_folder_but_refused_by_its_name(tmp_path, capsys):
    (tmp_path / "a.md").write_text(prose(20_000))
    (tmp_path / "package.json").write_text('{"name": "x", "keywords": ["a"]}')
    plan, _, _ = plan_dataset([str(tmp_path)], {}, NOWHERE)
    assert len(plan["sources"]) == 1 and "left out: " in capsys.readouterr().out
    with pytest.raises(SourceError, match=r"^where: character 3: [^\n]*$"):  # once for all files
        plan_dataset([str(tmp_path)] * 2, {"where": "x >"}, NOWHERE)
    with pytest.raises(PrepareError, match=r"package\.json: no text in 'text'; its keys are name, keywords"):
        plan_dataset([str(tmp_path / "package.json")], {}, NOWHERE)


def test_a_parquet_file_without_rows_is_left_out_and_alone_it_is_refused(tmp_path, capsys):
    none, some = write_parquet(tmp_path / "a.parquet", []), write_parquet(tmp_path / "b.parquet", some_texts(300))
    plan, damaged, _ = plan_dataset([str(none), str(some)], {}, NOWHERE)
    assert [source["path"] for source in plan["sources"]] == [str(some)] and not damaged
    assert f"left out: {none}: has no rows" in capsys.readouterr().out
    with pytest.raises(PrepareError, match="nothing to prepare; name files that have rows"):
        plan_dataset([str(none)], {}, NOWHERE)


def test_planning_that_is_interrupted_ends_at_once_while_a_request_is_repeated(tmp_path, monkeypatch):
    paths, waits = [str(write_parquet(tmp_path / f"{name}.parquet", ["x"])) for name in "ab"], threading.Event()
    monkeypatch.setattr(dataset, "examine", lambda path, *_: waits.wait(60) if path == paths[1] else 1 / 0)
    began = time.monotonic()
    with pytest.raises(ZeroDivisionError):
        plan_dataset(paths, {}, NOWHERE)
    assert time.monotonic() - began < 20
    waits.set()


def test_two_processes_that_plan_different_files_do_not_overwrite_each_other(tmp_path):
    folder = tmp_path / "mine"
    (folder / STATE).mkdir(parents=True)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(prose(20_000, ord(name[0])))
    one, same, other = (plan_dataset([str(tmp_path / name)], {}, folder)[0] for name in ("a.txt", "a.txt", "b.txt"))
    write_plan(one, "", None, folder)
    write_plan(same, "", None, folder)
    with pytest.raises(PrepareError, match="another process has changed its plan; run this command again"):
        write_plan(other, "", None, folder)


# ---- tokenizers


def test_bytes_per_token_lie_between_bytes_and_gpt2():
    sizes = [bytes_per_token({"train_tokenizer": ids}) for ids in (257, 1024, 8192, 50257)]
    assert sizes[0] == 1 and sizes[3] == bytes_per_token({}) == 4.67 and sizes == sorted(sizes)
    assert bytes_per_token({"tokenizer": {"n_vocab": 257}}) == 1


def test_little_text_of_text_files_gets_a_small_vocabulary_unless_one_is_given_and_other_inputs_get_gpt2(tmp_path):
    little, large, lines = tmp_path / "a.txt", tmp_path / "large.md", tmp_path / "a.jsonl"
    little.write_text(prose(20_000))
    large.write_text(prose(500_000) * 20)
    lines.write_text("\n".join(json.dumps({"text": text}) for text in some_texts(300)))
    assert settings_of(little)["tokenizer"]["name"] == "gpt2-1024"
    assert settings_of(little, tokenizer="bytes")["tokenizer"]["name"] == "bytes"
    for settings in (settings_of(little, tokenizer="gpt2"), settings_of(large), settings_of(lines, little)):
        assert "tokenizer" not in settings  # GPT-2's, as in the plans of older versions


def test_a_trained_tokenizer_depends_on_the_train_text_alone_and_on_a_sample_of_much(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tokenizers")
    texts = some_texts(3000, words=30)
    path = write_parquet(tmp_path / "a.parquet", texts, row_group_size=100)
    options = ([str(path)], {"train_tokenizer": 300, "shard_tokens": 5000, "val_fraction": 0.2}, NOWHERE)
    plan, _, content = plan_dataset(*options)
    assert plan_dataset(*options) == (plan, [], content) and len(plan["units"]) > 10
    state = plan["settings"]["tokenizer"]
    assert (state["kind"], state["n_vocab"], state["eot"], state["file"]) == ("bpe", 300, 299, "tokenizer.json")
    check_round_trip(from_state(state | {"content": content}), texts[:100])
    train = [text for text in texts if dataset.in_val(text.encode(), 0.2) is False]
    assert json.loads(content)["model"] == json.loads(train_tokenizer(train, 300))["model"]
    assert "300 ids, trained in" in capsys.readouterr().out
    monkeypatch.setattr(dataset, "SAMPLE_BYTES", 10_000)
    monkeypatch.setattr(dataset, "SAMPLE_UNITS", 4)
    read = []
    monkeypatch.setattr(dataset.Progress, "update", lambda self, size, tokens=0: read.append(size))
    assert plan_dataset(*options)[2] != content and 10_000 <= sum(read) < 25_000 and len(read) >= 4


def test_a_tokenizer_file_is_kept_with_its_separator_and_another_is_refused(tmp_path):
    pytest.importorskip("tokenizers")
    model, folder, text = tmp_path / "model" / "tokenizer.json", tmp_path / "mine", tmp_path / "a.txt"
    (folder / STATE).mkdir(parents=True)
    model.parent.mkdir()
    model.write_text(train_tokenizer([prose(5000)], 300).replace("<|endoftext|>", "<end>"))
    model.with_name("tokenizer_config.json").write_text('{"eos_token": "<end>"}')  # stays behind
    text.write_text(prose(20_000))
    asked, before = {"tokenizer": str(model)}, None
    for _ in range(2):  # the second time its file is missing
        plan, _, content = plan_dataset([str(text)], asked, folder)
        write_plan(plan, content, before, folder)
        assert (folder / "tokenizer.json").read_text() == content
        (folder / "tokenizer.json").unlink()
        before = stamp(folder)
    state = plan["settings"]["tokenizer"]
    assert (state["name"], state["eot"]) == ("model", load_tokenizer(model).eot) == ("model", 299)
    assert plan_dataset([str(text)], {}, folder)[0] == plan
    for other, message in (
        ({"tokenizer": "gpt2"}, r"tokenizer: .*mine was started with model \(\w{8}\), not gpt2 \(306cd27f\); leave"),
        ({"train_tokenizer": 8192}, r"train_tokenizer: .* with model \(\w{8}\), not 8192; leave out --train"),
    ):
        with pytest.raises(PrepareError, match=message):
            plan_dataset([str(text)], other, folder)


def test_a_tokenizer_that_loses_the_first_texts_or_has_no_separator_is_refused(tmp_path):
    pytest.importorskip("tokenizers")
    (tmp_path / "a.txt").write_text("The First words. " + prose(20_000))
    lower = json.loads(train_tokenizer([prose(5000)], 300)) | {"normalizer": {"type": "Lowercase"}}
    (tmp_path / "lower.json").write_text(json.dumps(lower))
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"itos": {0: "a"}, "stoi": {"a": 0}}))
    for name, message in (
        ("lower.json", r"loses text: .*'The First words.* comes back as 'the first"),
        ("meta.pkl", r"meta\.pkl: has no document separator"),
    ):
        with pytest.raises(TokenizerError, match=message):
            plan_dataset([str(tmp_path / "a.txt")], {"tokenizer": str(tmp_path / name)}, tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


def test_files_of_one_footer_are_one_source_only_if_all_their_bytes_are_the_same(tmp_path, capsys):
    """Without statistics a page is not in the footer: other letters of equal size give an equal footer."""
    one, other, same = (tmp_path / f"{name}.parquet" for name in ("one", "other", "same"))
    for path, letter in ((one, "a"), (other, "b"), (same, "a")):
        texts = [f"{letter * 50} {i}" for i in range(3000)]
        write_parquet(path, texts, compression="none", use_dictionary=False, write_statistics=False)
    ids = [examine(str(path), {"text_column": "text"}, 1e9)[0]["id"] for path in (one, other)]
    assert ids[0] == ids[1] and one.stat().st_size == other.stat().st_size
    folder = tmp_path / "mine"
    (folder / STATE).mkdir(parents=True)
    paths = [str(path) for path in (one, other, same)]
    plan, _, _ = plan_dataset(paths, {}, folder)
    assert [source["path"] for source in plan["sources"]] == paths[:2]
    assert f"{same}: the same as {one}; taken once" in capsys.readouterr().out
    write_plan(plan, "", None, folder)
    for some in (paths, paths[1:2], paths[:1]):  # known again, also alone
        again, _, _ = plan_dataset(some, {}, folder)
        assert again["sources"] == plan["sources"]
    one.unlink()
    assert [source["path"] for source in plan_dataset(paths[1:], {}, folder)[0]["sources"]] == [paths[2], paths[1]]

import codecs
import io
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from networks import save, tiny
from runs import write_characters

import sample
from configurator import ConfigError
from onecard import UserError, checkpoint, writing
from onecard.checkpoint import CheckpointError
from onecard.generation import generate
from onecard.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer()
SPECIAL = "--special_tokens=False", "--special_tokens=True"
HARD = "naïve 日本語のテキスト 👩\u200d👩\u200d👧 🏳️\u200d🌈 हिन्दी é"


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory):
    return save(tiny(block_size=32, n_layer=1, n_embd=16), tmp_path_factory.mktemp("run") / "out")


@pytest.fixture
def run(out_dir, capsys, monkeypatch):
    """Runs sample.main with these keys and returns what it wrote to standard output and standard error."""
    known = {"gpt2": TOKENIZER}
    monkeypatch.setattr(checkpoint, "load_tokenizer", lambda source: known.get(source) or load_tokenizer(source))

    def run(*arguments, stdin=b"", **keys):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        fixed = [f"--out_dir={out_dir}", "--device=cpu", "--dtype=float32"]
        sample.main([*fixed, *arguments, *[f"--{k}={v}" for k, v in keys.items()]])
        return capsys.readouterr()

    return run


@pytest.fixture
def script(monkeypatch):
    """Makes the network generate the given lists of ids, one for each text."""

    def script(*texts):
        remaining = iter(texts)

        def stream(model, prompts, max_new_tokens, ended, **_):
            rows = [next(remaining) for _ in prompts]
            for step in range(max_new_tokens):
                yield {i: row[step] for i, row in enumerate(rows) if i not in ended}

        monkeypatch.setattr(writing, "stream", stream)

    return script


def ids(text, end=True):
    return TOKENIZER.encode(text).tolist() + [TOKENIZER.eot] * end


def texts_of(out):
    assert out.endswith("\n---------------\n")
    return out.removesuffix("\n---------------\n").split("\n---------------\n")


def test_text_appears_in_whole_characters_as_it_is_made(run, script, monkeypatch):
    assert any("\ufffd" in TOKENIZER.decode([id]) for id in ids(HARD))  # some characters span several tokens
    script(ids(HARD))
    pieces = []
    monkeypatch.setattr("builtins.print", lambda *what, end="\n", **_: pieces.append("".join(what) + end))
    run(num_samples=1)
    shown = [piece for piece in pieces if piece and not piece.startswith(("\n-----", "step", "texts"))]
    assert "".join(shown) == HARD and len(shown) > 20


def test_an_incomplete_last_character_is_not_shown_and_invalid_bytes_do_not_stop_a_text(run, script):
    for n in range(1, 12):
        script(ids(HARD))
        (text,) = texts_of(run(num_samples=1, max_new_tokens=n).out)
        data = TOKENIZER.decode_bytes(ids(HARD)[:n])
        assert text == codecs.getincrementaldecoder("utf-8")().decode(data) and HARD.startswith(text)
    script([ids("日")[0], *ids(" and on")])
    assert texts_of(run(num_samples=1).out) == ["\ufffd and on"]


def test_texts_of_a_batch_are_whole_and_in_order_whichever_ends_first_each_after_its_prompt(run, script):
    texts = ["a long one that goes on and on", "short", "本", "one of middle length", "last"]
    script(*map(ids, texts))
    assert texts_of(run(start="日", num_samples=5, batch_size=3).out) == ["日" + text for text in texts]


@pytest.mark.parametrize("stop", ["\n\n", ". The", "c", "two.", "ee"])
def test_a_text_ends_before_stop_wherever_tokens_begin(run, script, stop):
    texts = ["one. two. Three\n\nfour. The end, ee", "one. two."]
    script(*map(ids, texts))
    found = texts_of(run(f"--stop={stop}", num_samples=2, max_new_tokens=50).out)
    assert found == [text.split(stop)[0] for text in texts]


def test_a_possible_beginning_of_stop_is_shown_once_it_is_none():
    text, shown = writing.Text("", [], 0, sample.SampleConfig(stop="<end>"), TOKENIZER), []
    for token in ("a<", "en", "d", "<", "end", ">"):
        for id in ids(token, end=False):
            text.add(id)
        shown.append(text.take_new())
    assert shown == ["a", "", "", "<end", "", ""] and (text.text, text.end) == ("a<end", "stop")


def test_json_says_why_a_text_ended(run, script):
    script(ids("a b"), ids("a. b"), ids("a b c d e f"))
    rows = [json.loads(line) for line in run("--json", "--stop=.", num_samples=3, max_new_tokens=4).out.splitlines()]
    assert [row["end"] for row in rows] == ["endoftext", "stop", "max_new_tokens"]
    assert [row["text"] for row in rows] == ["a b", "a", "a b c d"] and rows[0]["tokens"] == 3


def test_the_separator_in_a_text_is_a_token_only_where_that_is_asked_for(run, monkeypatch):
    read, text = [], "<|endoftext|>The card<|endoftext|>A"
    monkeypatch.setattr(writing, "stream", lambda model, prompts, n, ended, **_: read.extend(prompts) or iter([{0: 1}]))
    options = dict(num_samples=1, max_new_tokens=1, start=text)
    assert "read as" in run(**options).err and "read as" not in run("--special_tokens=True", **options).err
    eot, card = TOKENIZER.eot, TOKENIZER.encode("The card").tolist()
    assert read == [[eot, *TOKENIZER.encode(text).tolist()], [eot, *card, eot, *TOKENIZER.encode("A").tolist()]]
    scores = [json.loads(run("--json", special, score="-", stdin=text.encode()).out) for special in SPECIAL]
    assert [score["tokens"] for score in scores] == [len(TOKENIZER.encode(text)), len(card) + 3]


def test_interactive_reads_prompts_and_settings_and_continues_the_last_text(run):
    lines = b"The\n\n/max_new_tokens 2\n/temperature -1\n/top_k many\n/topk 3\n/seed\nA card\n"
    lines += b"/seed 1337\nThe\n/quit\nnever read\n"
    shown = run("--interactive=True", max_new_tokens=5, stdin=lines)
    first, second, third, again = texts_of(shown.out)
    assert first.startswith("The") and second.startswith(first) and len(second) > len(first)
    assert third.startswith("A card") and len(TOKENIZER.encode(third)) <= 4
    assert first.startswith(again) and shown.err.count("changes nothing") == 2
    assert "temperature" in shown.err and "'many'" in shown.err
    assert first == texts_of(run(start="The", num_samples=1, max_new_tokens=5).out)[0]


def test_ctrl_c_in_interactive_stops_the_text_alone(run, script, monkeypatch):
    def interrupted(*_, **__):
        yield {0: TOKENIZER.encode(" goes")[0].item()}
        raise KeyboardInterrupt

    monkeypatch.setattr(writing, "stream", interrupted)
    assert run("--interactive=True", stdin=b"It\nThey\n").out == "It goes\nThey goes\n"


def test_neither_batch_size_nor_json_changes_a_text_and_each_has_the_next_seed(run, tmp_path):
    (tmp_path / "prompts.txt").write_bytes("one\r\nzwei: ü\n日本\n".encode())
    options = dict(prompts=tmp_path / "prompts.txt", max_new_tokens=20)
    alone = texts_of(run(batch_size=1, **options).out)
    rows = [json.loads(line) for line in run("--json", batch_size=2, **options).out.splitlines()]
    found = [(row["prompt"], row["seed"], row["tokens"]) for row in rows]
    assert found == [("one", 1337, 20), ("zwei: ü", 1338, 20), ("日本", 1339, 20)]
    assert [row["prompt"] + row["text"] for row in rows] == alone
    assert len(set(texts_of(run(num_samples=5, max_new_tokens=40).out))) == 5


def test_the_text_is_what_generate_makes_after_endoftext(run, out_dir):
    model, _ = checkpoint.load_model(out_dir / checkpoint.LATEST)
    prompt = [TOKENIZER.eot, *ids("Hello there", end=False)]
    row = generate(model, [prompt], 30, seeds=[5], temperature=0.9, top_k=40, stop_id=TOKENIZER.eot)[0]
    options = dict(seed=5, temperature=0.9, top_k=40, max_new_tokens=30, num_samples=1)
    (text,) = texts_of(run(start="Hello there", **options).out)
    assert TOKENIZER.decode([id for id in row if id != TOKENIZER.eot]).startswith(text) and len(text) > 60


def test_prompts_come_unchanged_from_a_file_and_from_standard_input(run, tmp_path):
    (tmp_path / "start.txt").write_bytes("\ufeffLine\r\n\n 日".encode())  # with a byte order mark
    options = dict(num_samples=1, max_new_tokens=5)
    (text,) = texts_of(run(start=f"FILE:{tmp_path / 'start.txt'}", **options).out)
    assert text.startswith("Line\r\n\n 日")
    assert texts_of(run(start="-", stdin="Line\r\n\n 日".encode(), **options).out) == [text]
    assert [t[:5] for t in texts_of(run(prompts="-", stdin=b"first\nsecond", **options).out)] == ["first", "secon"]


def test_step_speed_and_a_prompt_longer_than_the_context_are_reported_on_standard_error_alone(run):
    start = " ".join(f"word{i}" for i in range(60))
    found = run(start=start, num_samples=2, max_new_tokens=10, dtype="auto")
    for part in ("step 7", "tokens 20", "tokens/s", f"{len(ids(start))} tokens, more than block_size=32", "16 to 32"):
        assert part in found.err and part not in found.out
    assert "block_size" not in run(start="word", max_new_tokens=1).err


MISTAKES = [
    (dict(start="FILE:none.txt"), "start: none.txt cannot be read (No such file or directory)"),
    (dict(start="FILE:{}"), "cannot be read (Is a directory)"),
    (dict(start="FILE:{}/empty.txt"), "empty.txt is empty"),
    (dict(start="FILE:{}/latin.txt"), "latin.txt is not UTF-8 (byte 3)"),
    (dict(start="a\udcff"), "start: character 2 is not UTF-8"),
    (dict(start="-"), "start: standard input is empty"),
    (dict(prompts="{}/gap.txt"), "prompts: line 2 of {}/gap.txt is empty"),
    (dict(score="none.txt"), "score: none.txt cannot be read"),
    (dict(start="a", prompts="b"), "start='a' and prompts='b' exclude each other"),
    (dict(top_p=1.5), "top_p"),
    (dict(checkpoint="best"), "its folder; leave out --checkpoint=best"),
]


@pytest.mark.parametrize("keys, message", MISTAKES)
def test_a_mistake_is_one_line(run, tmp_path, keys, message):
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "gap.txt").write_bytes(b"one\n\ntwo\n")
    keys = {k: v.format(tmp_path) if isinstance(v, str) else v for k, v in keys.items()}
    with pytest.raises(UserError) as error:
        run(**keys)
    assert message.format(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_nanogpts_checkpoint_needs_the_meta_pkl_of_its_dataset_which_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = dict(block_size=32, vocab_size=24, n_layer=1, n_head=2, n_embd=16, dropout=0.0, bias=False)
    weights = tiny(**args, gelu="none").state_dict()
    state = dict(model=weights, model_args=args, iter_num=5, best_val_loss=1.5, config=dict(dataset="letters"))
    (tmp_path / "out").mkdir()
    torch.save(state, tmp_path / "out/ckpt.pt")
    flags = ["--device=cpu", "--num_samples=2", "--max_new_tokens=40"]
    with pytest.raises(CheckpointError, match=r"vocab_size=24 is less than the 50,257.* data/letters/meta\.pkl"):
        sample.main(flags)
    write_characters(tmp_path / "data/letters", letters := "abcdefghijklmnopqrstuv\n ")
    sample.main(flags)
    texts = texts_of(capsys.readouterr().out)
    assert [len(text) for text in texts] == [40, 40] and set("".join(texts)) <= set(letters)
    line_end = sorted(letters).index("\n")
    model = tiny(**args, gelu="none")
    row = generate(model, [[line_end]], 40, seeds=[1337], temperature=0.8, top_k=200)[0]
    assert texts[0] == "".join(sorted(letters)[id] for id in row[1:])


@pytest.fixture
def ascii_state(tmp_path):
    """The state of a tokenizer of 96 characters; its meta.pkl is in tmp_path."""
    write_characters(tmp_path, "".join(map(chr, range(32, 128))))
    return load_tokenizer(tmp_path / "meta.pkl").state()


def test_an_old_checkpoint_without_a_tokenizer_needs_meta_pkl_which_is_named(run, tmp_path, ascii_state):
    shutil.copytree(Path(__file__).parent / "data/old_gpt2", out_dir := tmp_path / "old")
    missing = r"vocab_size=96 is less than .*put its dataset's meta\.pkl at .*/meta\.pkl"
    with pytest.raises(CheckpointError, match=missing):
        run(out_dir=out_dir)
    shutil.copy(tmp_path / "meta.pkl", out_dir)
    assert len(texts_of(run(out_dir=out_dir, num_samples=1, max_new_tokens=30).out)[0]) == 30


def test_a_tokenizer_that_is_damaged_or_missing_in_the_checkpoint_is_named(run, tmp_path, ascii_state):
    changed = ascii_state | dict(content=ascii_state["content"].replace("A", "Ä"))
    missing = {name: value for name, value in ascii_state.items() if name != "content"}
    for name, state in (("changed", changed), ("missing", missing)):
        out_dir = save(tiny(vocab_size=96), tmp_path / name, tokenizer=state)
        with pytest.raises(CheckpointError, match=rf"^{out_dir}/ckpt\.pt: tokenizer .*{name}.*copy it again"):
            run(out_dir=out_dir)


def test_a_folder_is_given_with_or_without_its_key_or_as_its_checkpoint(capsys, out_dir):
    flags = ["--device=cpu", "--num_samples=1", "--max_new_tokens=10"]
    texts = []
    for argv in ([str(out_dir)], [f"--out_dir={out_dir}"], ["--out_dir", str(out_dir)], [f"{out_dir}/ckpt.pt"]):
        sample.main([*argv, *flags])
        texts.append(capsys.readouterr().out)
    assert len(set(texts)) == 1
    with pytest.raises(ConfigError, match="write --json=false"):
        sample.main(["--json", "false"])


def test_the_score_of_equal_odds_is_the_logarithm_of_the_vocabulary_and_others_depend_on_the_stride(run, tmp_path):
    model = tiny(n_embd=8)
    with torch.no_grad():
        model.transformer.wte.weight.zero_()
    (tmp_path / "text.txt").write_bytes((text := "Some text, in UTF-8: ü 日本.\r\n" * 20).encode())
    options = dict(out_dir=save(model, tmp_path / "even"), score=tmp_path / "text.txt")
    found = json.loads(run("--json", **options).out)
    n, size = len(ids(text, end=False)), len(text.encode())
    assert (found["tokens"], found["bytes"], found["file"]) == (n, size, str(tmp_path / "text.txt"))
    assert found["loss"] == pytest.approx(math.log(50304), abs=1e-5)
    assert found["perplexity"] == pytest.approx(50304, rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(math.log2(50304) * n / size, rel=1e-5)
    printed = run(**options).out
    assert f"loss {math.log(50304):.4f}" in printed and f"over {n:,} tokens, {size:,} bytes" in printed
    text = Path(sample.__file__).read_bytes()[:1000]
    losses = [json.loads(run("--json", score="-", stdin=text, stride=n).out)["loss"] for n in (0, 32, 8)]
    assert losses[0] == losses[1] and abs(losses[2] - losses[0]) > 1e-4

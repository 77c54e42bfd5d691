import codecs
import io
import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from onecard import checkpoint
import sample
from configurator import ConfigError
from onecard.generation import GenerationError, generate
from model import GPT, GPTConfig
from onecard.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer()


@pytest.fixture(autouse=True)
def one_tokenizer(monkeypatch):
    monkeypatch.setattr(sample, "load_tokenizer", lambda: TOKENIZER)


def save(folder, model):
    folder.mkdir(exist_ok=True)
    state = dict(model=model.state_dict(), model_args=asdict(model.config), iter_num=7, best_val_loss=9.5)
    checkpoint.write(folder / checkpoint.LATEST, state)
    return folder


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory):
    """A folder with the checkpoint of a tiny network whose texts are lively."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, n_layer=1, n_head=2, n_embd=16))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return save(tmp_path_factory.mktemp("run") / "out", model)


@pytest.fixture
def run(out_dir, capsys):
    """Runs sample.main with these keys -> what stood on standard output and on standard error."""

    def run(*arguments, **keys):
        fixed = [f"--out_dir={out_dir}", "--device=cpu", "--dtype=float32"]
        sample.main([*fixed, *arguments, *[f"--{k}={v}" for k, v in keys.items()]])
        return capsys.readouterr()

    return run


@pytest.fixture
def script(monkeypatch):
    """Lets the network say what is given: a list of lists of ids, one for each text; they end as given."""

    def script(*texts):
        rows = iter(texts)

        def stream(model, prompts, max_new_tokens, ended, **_):
            mine = [next(rows) for _ in prompts]
            for step in range(min(max_new_tokens, max(map(len, mine)))):
                yield [row[step] if step < len(row) and i not in ended else None for i, row in enumerate(mine)]

        monkeypatch.setattr(sample, "stream", stream)

    return script


@pytest.fixture
def stdin(monkeypatch):
    def give(data):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))

    return give


def ids(text, end=True):
    return TOKENIZER.encode(text).tolist() + [TOKENIZER.eot] * end


def texts_of(out):
    assert out.endswith("\n---------------\n")
    return out.removesuffix("\n---------------\n").split("\n---------------\n")


# ---- texts as they are made


HARD = "naïve 日本語のテキスト 👩\u200d👩\u200d👧 🏳️\u200d🌈 हिन्दी é"


def test_text_appears_in_whole_characters_as_it_is_made(run, script, monkeypatch):
    assert any("\ufffd" in TOKENIZER.decode([id]) for id in ids(HARD))  # characters do span tokens
    script(ids(HARD))
    pieces = []
    monkeypatch.setattr("builtins.print", lambda *what, end="\n", **_: pieces.append("".join(what) + end))
    run(num_samples=1)
    shown = [piece for piece in pieces if piece and not piece.startswith(("\n-----", "step", "texts"))]
    assert "".join(shown) == HARD and len(shown) > 20


@pytest.mark.parametrize("n", range(1, 12))
def test_a_text_that_ends_within_a_character_ends_before_it(run, script, n):
    script(ids(HARD))
    (text,) = texts_of(run(num_samples=1, max_new_tokens=n).out)
    data = TOKENIZER.decode_bytes(ids(HARD)[:n])
    assert text == codecs.getincrementaldecoder("utf-8")().decode(data) and HARD.startswith(text)


def test_bytes_that_are_no_utf8_are_shown_as_such_and_do_not_stop_the_text(run, script):
    half = ids("日", end=False)[0]
    script([half, *ids(" and on")])
    assert texts_of(run(num_samples=1).out) == ["\ufffd and on"]


def test_texts_of_a_batch_stand_whole_and_in_order_whichever_ends_first(run, script):
    script(ids("a long one that goes on and on"), ids("short"), ids("one of middle length"), ids("last"))
    out = run(num_samples=4, batch_size=3).out
    assert texts_of(out) == ["a long one that goes on and on", "short", "one of middle length", "last"]


def test_a_text_ends_before_stop_however_tokens_lie(run, script):
    for stop in ("\n\n", ". The", "c", "two.", "ee"):
        text = "one. two. Three\n\nfour. The end, ee"
        script(ids(text), ids(text, end=False)[:4])
        expected = [text.split(stop)[0], "one. two.".split(stop)[0]]
        assert texts_of(run(f"--stop={stop}", num_samples=2, max_new_tokens=50).out) == expected


def test_what_may_be_the_beginning_of_stop_waits_until_it_is_not(run, script):
    text = sample.Text("", 0, "<end>", TOKENIZER)
    shown = []
    for token in ("a<", "en", "d", "<", "end", ">", "x"):
        for id in ids(token, end=False):
            text.add(id)
        shown.append(text.ready())
        if text.end:
            break
    assert shown == ["a", "", "", "<end", "", ""] and (text.text, text.end) == ("a<end", "stop")


def test_the_prompt_stands_before_each_text_once(run, script):
    script(ids("日本"), ids(" b"))  # the first token shows nothing yet
    assert texts_of(run(start="日", num_samples=2).out) == ["日日本", "日 b"]


# ---- the real network


def test_batch_size_changes_no_text_and_seeds_count_on(run):
    alone = texts_of(run(num_samples=5, max_new_tokens=40, batch_size=1).out)
    assert texts_of(run(num_samples=5, max_new_tokens=40, batch_size=3).out) == alone and len(set(alone)) == 5
    assert texts_of(run(num_samples=2, max_new_tokens=40, seed=1339).out) == alone[2:4]


def test_the_text_is_what_generate_makes_behind_endoftext(run, out_dir):
    model, _ = checkpoint.load_model(out_dir / checkpoint.LATEST)
    prompt = [TOKENIZER.eot, *ids("Hello there", end=False)]
    row = generate(model, [prompt], 30, seeds=[5], temperature=0.9, top_k=40, stop_id=TOKENIZER.eot)[0]
    options = dict(seed=5, temperature=0.9, top_k=40, max_new_tokens=30, num_samples=1)
    (text,) = texts_of(run(start="Hello there", **options).out)
    assert TOKENIZER.decode([id for id in row if id != TOKENIZER.eot]).startswith(text) and len(text) > 60


def test_json_lines_hold_the_same_texts(run, tmp_path):
    (tmp_path / "prompts.txt").write_bytes("one\r\nzwei: ü\n日本\n".encode())
    options = dict(prompts=tmp_path / "prompts.txt", max_new_tokens=20, batch_size=2)
    rows = [json.loads(line) for line in run("--json", **options).out.splitlines()]
    assert [row["prompt"] for row in rows] == ["one", "zwei: ü", "日本"]
    assert [row["prompt"] + row["text"] for row in rows] == texts_of(run(**options).out)
    assert [row["seed"] for row in rows] == [1337, 1338, 1339]
    assert all(row["tokens"] == 20 and row["end"] == "max_new_tokens" for row in rows)


def test_json_says_why_a_text_ended(run, script):
    script(ids("a b"), ids("a. b"), ids("a b c d e f", end=False))
    rows = [json.loads(line) for line in run("--json", "--stop=.", num_samples=3, max_new_tokens=4).out.splitlines()]
    assert [row["end"] for row in rows] == ["endoftext", "stop", "max_new_tokens"]
    assert [row["text"] for row in rows] == ["a b", "a", "a b c d"] and rows[0]["tokens"] == 3


def test_a_start_comes_from_a_file_and_from_standard_input_as_it_is(run, stdin, tmp_path):
    (tmp_path / "start.txt").write_bytes("\ufeffLine\r\n\n 日".encode())  # with a byte order mark
    options = dict(num_samples=1, max_new_tokens=5)
    (text,) = texts_of(run(start=f"FILE:{tmp_path / 'start.txt'}", **options).out)
    assert text.startswith("Line\r\n\n 日")
    stdin("Line\r\n\n 日".encode())
    assert texts_of(run(start="-", **options).out) == [text]
    stdin(b"first\nsecond")
    assert [t[:5] for t in texts_of(run(prompts="-", **options).out)] == ["first", "secon"]


def test_speed_and_step_stand_on_standard_error_alone(run):
    said = run(num_samples=2, max_new_tokens=10, dtype="auto")
    assert "tokens/s" in said.err and "tokens 20" in said.err and "step 7" in said.err
    assert "tokens/s" not in said.out and "step 7" not in said.out


def test_a_start_longer_than_the_context_is_said_and_its_end_is_read(run):
    start = " ".join(f"word{i}" for i in range(60))
    options = dict(num_samples=1, max_new_tokens=10, temperature=0)
    said = run(start=start, **options)
    assert f"{len(ids(start))} tokens, more than block_size=32: of a longer text the model reads the last 16 to 32" in (
        said.err
    )
    assert "more than block_size" not in run(start="word", **options).err


# ---- mistakes


@pytest.mark.parametrize(
    "keys, message",
    [
        (dict(start="FILE:none.txt"), "start: none.txt cannot be read (No such file or directory)"),
        (dict(start="FILE:{}"), "cannot be read (Is a directory)"),
        (dict(start="FILE:{}/empty.txt"), "empty.txt is empty"),
        (dict(start="FILE:{}/latin.txt"), "latin.txt is not UTF-8 (byte 3)"),
        (dict(start="a\udcff"), "start: character 2 is not UTF-8"),
        (dict(prompts="none.txt"), "prompts: none.txt cannot be read"),
        (dict(prompts="{}/empty.txt"), "empty.txt is empty"),
        (dict(prompts="{}/gap.txt"), "prompts: line 2 of {}/gap.txt is empty"),
        (dict(score="none.txt"), "score: none.txt cannot be read"),
        (dict(score="{}/latin.txt"), "latin.txt is not UTF-8"),
        (dict(start="a", prompts="b"), "start='a' and prompts='b' exclude each other"),
        (dict(start="a", score="b"), "start='a' and score='b' exclude each other"),
        (dict(temperature=-1), "temperature"),
        (dict(top_p=1.5), "top_p"),
        (dict(max_new_tokens=0), "max_new_tokens"),
    ],
)
def test_a_bad_prompt_is_a_sentence(run, tmp_path, keys, message):
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "gap.txt").write_bytes(b"one\n\ntwo\n")
    keys = {k: v.format(tmp_path) if isinstance(v, str) else v for k, v in keys.items()}
    with pytest.raises(ConfigError) as error:
        run(**keys)
    assert message.format(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_empty_standard_input_is_a_sentence(run, stdin):
    stdin(b"")
    with pytest.raises(ConfigError, match="standard input is empty"):
        run(start="-")


def test_a_network_of_another_vocabulary_is_refused(run, tmp_path):
    folder = save(tmp_path / "other", GPT(GPTConfig(block_size=8, vocab_size=96, n_layer=1, n_head=1, n_embd=8)))
    with pytest.raises(ConfigError, match="vocab_size=96"):
        run(f"--out_dir={folder}")


def test_weights_that_overflow_float16_are_a_sentence(run, tmp_path):
    model = GPT(GPTConfig(block_size=8, n_layer=1, n_head=1, n_embd=8))
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(1e7)
    with pytest.raises(GenerationError, match="not finite"):
        run(f"--out_dir={save(tmp_path / 'large', model)}", dtype="float16")


# ---- scores


def test_the_score_of_even_odds_is_the_logarithm_of_the_vocabulary(run, tmp_path):
    model = GPT(GPTConfig(block_size=16, n_layer=1, n_head=1, n_embd=8))
    with torch.no_grad():
        model.transformer.wte.weight.zero_()
    text = "Some text, in UTF-8: ü 日本.\r\n" * 20
    (tmp_path / "text.txt").write_bytes(text.encode())
    options = dict(out_dir=save(tmp_path / "even", model), score=tmp_path / "text.txt")
    found = json.loads(run("--json", **options).out)
    n, size = len(ids(text, end=False)), len(text.encode())
    assert (found["tokens"], found["bytes"], found["file"]) == (n, size, str(tmp_path / "text.txt"))
    assert found["loss"] == pytest.approx(math.log(50304), abs=1e-5)
    assert found["perplexity"] == pytest.approx(50304, rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(math.log2(50304) * n / size, rel=1e-5)
    said = run(**options).out
    assert f"loss {math.log(50304):.4f}" in said and f"over {n:,} tokens, {size:,} bytes" in said


def test_the_score_does_not_depend_on_the_batch_and_does_on_the_stride(run, stdin):
    text = Path(sample.__file__).read_bytes()[:2000]
    losses = []
    for keys in (dict(batch_size=1), dict(batch_size=7), dict(stride=32), dict(stride=4)):
        stdin(text)
        losses.append(json.loads(run("--json", score="-", **keys).out)["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6) == pytest.approx(losses[2], abs=1e-6)
    assert abs(losses[3] - losses[0]) > 1e-4

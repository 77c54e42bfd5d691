"""The tokenizers: against tiktoken read by its own loader, the library tokenizers used directly, and plain Python."""

import hashlib
import importlib
import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from tiktoken.load import load_tiktoken_bpe
from tiktoken_ext import openai_public

import convert
import onecard.tokenizer as ours
from onecard.shards import write_manifest
from onecard.tokenizer import HARD_STRINGS, TokenizerError, check_parity, from_state, load_tokenizer, train_tokenizer

ALPHABET = ["a", "Zé", "字", "1", "²", "!", "'s", "'ll", " ", "  ", "\n", "\r\n", "\t", "\u3000", "\x85", "\x1c", "😀"]
STORY = "The dog and the cat saw the dogs. Don't the cats see 12 dogs?\n"


@pytest.fixture(scope="module")
def reference():
    """tiktoken's gpt2, from the same file but by tiktoken's own loader, pattern and hash."""
    ranks = load_tiktoken_bpe(str(ours.VOCABULARY), expected_hash=ours.VOCABULARY_SHA256)
    special = {"<|endoftext|>": 50256}
    return tiktoken.Encoding("gpt2", pat_str=openai_public.r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)


@pytest.fixture(scope="module", params=["tiktoken", "fastokens"])
def tokenizer(request):
    pytest.importorskip(request.param)
    return load_tokenizer(encoder=request.param)


def random_text(length):
    return "".join(random.Random(length).choices(ALPHABET, k=length))


TEXTS = [*HARD_STRINGS, *map(random_text, range(1, 200, 7))]

# ---- GPT-2's vocabulary --------------------------------------------------------------------------------------


def test_the_vocabulary_is_gpt2s(tokenizer, reference):
    assert tokenizer.n_vocab == reference.n_vocab == 50257 and tokenizer.eot == reference.eot_token == 50256
    assert tokenizer.encode("Hello world").tolist() == [15496, 995]  # GPT-2's published example


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_tiktokens_ordinary_ones_and_decode_to_the_text(tokenizer, reference, text):
    ids = tokenizer.encode(text)  # HARD_STRINGS has <|endoftext|> in a text
    assert ids.dtype == np.uint16 and 50256 not in ids
    assert ids.tolist() == reference.encode_ordinary(text)
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("piece", [1, 2, 5, 17])
def test_a_cut_text_has_the_ids_of_the_whole(reference, monkeypatch, piece):
    monkeypatch.setattr(ours, "PIECE", piece)
    tokenizer = load_tokenizer()
    for length in range(60):
        text = random_text(length)
        assert "".join(ours.pieces(text)) == text
        assert tokenizer.encode(text).tolist() == reference.encode_ordinary(text)


@pytest.mark.parametrize("space", [" ", "\n", "\u3000", "\r\n\t"])
def test_a_million_spaces_before_a_letter_are_the_run_without_its_last_and_that_with_the_letter(tokenizer, space):
    """tiktoken itself fails on these (ValueError), so the ids are put together by the pattern's rule."""
    run = space * (1_000_000 // len(space))
    whole = tokenizer.encode(run + "a").tolist()
    assert whole == tokenizer.encode(run[:-1]).tolist() + tokenizer.encode(run[-1] + "a").tolist()
    assert tokenizer.decode(whole) == run + "a"


@pytest.mark.parametrize("thousand", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_millions_of_letters_and_of_words_have_exact_ids(tokenizer, thousand):
    content = "a" * (thousand * 1000)
    letters = tokenizer.encode(content)
    assert tokenizer.decode_bytes(letters) == content.encode()
    assert np.array_equal(letters, load_tokenizer().encode(content))
    words = "Some words, and a number: 1234.\n" * (thousand * 320)  # the slow one: a document of 100 MB
    assert tokenizer.encode(words).tolist() == tokenizer.encode(words[:32]).tolist() * (thousand * 320)


SURROGATES = {
    "a\ud800b": ("a\ufffdb", 1),
    "\udc00\ud800": ("\ufffd\ufffd", 2),
    "\ud83d\ude00\ufffd": ("😀\ufffd", 0),
    "é": ("é", 0),
}


def test_lone_surrogates_become_replacement_characters_and_pairs_their_character(tokenizer):
    for text, (valid, count) in SURROGATES.items():
        assert ours.replace_surrogates(text) == (valid, count)
        assert tokenizer.encode(text).tolist() == tokenizer.encode(valid).tolist()


def test_half_a_character_decodes_to_a_replacement_and_an_id_outside_the_vocabulary_is_refused(tokenizer):
    ids = tokenizer.encode("😀")
    assert len(ids) > 1 and tokenizer.decode(ids[:1]) == "\ufffd" and tokenizer.decode_bytes(ids) == "😀".encode()
    for wrong in ([50257], [-1], [0, 65535]):
        with pytest.raises(TokenizerError, match="50256"):
            tokenizer.decode(wrong)


def test_a_damaged_or_missing_vocabulary_is_refused(monkeypatch, tmp_path):
    content = bytearray(ours.VOCABULARY.read_bytes())
    content[1000] ^= 1
    monkeypatch.setattr(ours, "VOCABULARY", tmp_path / "gpt2.tiktoken")
    for message in ("No such file.*git checkout", r"gpt2\.tiktoken: damaged.*git checkout data/gpt2\.tiktoken"):
        with pytest.raises(TokenizerError, match=message):
            load_tokenizer()
        ours.VOCABULARY.write_bytes(content)


def test_an_encoder_with_other_ids_does_not_pass_the_parity_check(tokenizer):
    class Wrong(ours.GPT2Tokenizer):
        def encode_pieces(self, texts):
            return [ids[:-1] if ids.size > 30 else ids for ids in super().encode_pieces(texts)]

    check_parity(tokenizer, ["a text"])
    with pytest.raises(TokenizerError, match="other ids than tiktoken"):
        check_parity(Wrong(), [])


# ---- every kind ----------------------------------------------------------------------------------------------


def save(folder, content):
    """The path of a tokenizer.json in a folder of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tokenizer.json"
    path.write_text(content, encoding="utf-8")
    return path


def changed(content, **parts):
    """A tokenizer.json with other normalizer, pre_tokenizer, decoder ... as objects of the library tokenizers."""
    library = pytest.importorskip("tokenizers").Tokenizer.from_str(content)
    for name, part in parts.items():
        setattr(library, name, part)
    return library.to_str()


def llama_like(t):
    """SentencePiece's manner, as Llama 2 has it: spaces are letters, unknown characters are bytes."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(set(STORY) - {" ", "\n"})]
    tokens += ["▁", "▁t", "he", "▁the"]
    vocab, merges = {token: i for i, token in enumerate(tokens)}, [("▁", "t"), ("h", "e"), ("▁t", "he")]
    library = t.Tokenizer(t.models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    library.normalizer = t.normalizers.Sequence([t.normalizers.Prepend("▁"), t.normalizers.Replace(" ", "▁")])
    d = t.decoders
    library.decoder = d.Sequence([d.Replace("▁", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)])
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    return library.to_str()


def unigram(t):
    """A model that finds its own special token in a text, because the token is one of its pieces."""
    vocab = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in sorted(set(STORY) - {" "}))]
    library = t.Tokenizer(t.models.Unigram(vocab, 0, False))
    library.pre_tokenizer, library.decoder = t.pre_tokenizers.Metaspace(), t.decoders.Metaspace()
    library.add_special_tokens(["</s>"])
    return library.to_str()


def tokenizer_files(t):
    """{name: the text of a tokenizer.json}: trained ones, changed in one part each, and other models."""
    content, p = train_tokenizer([STORY] * 9, 280), t.pre_tokenizers
    words = p.Split(t.Regex(r" ?\p{L}+"), "isolated")
    level = p.ByteLevel(add_prefix_space=False, use_regex=False)
    named = t.Tokenizer.from_str(content)
    named.add_special_tokens(["<s>"])
    named.add_tokens(["the cat", t.AddedToken("dog", lstrip=True)])
    ends = t.processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 279)])
    return {
        "trained": content,
        "other_pattern": changed(content, pre_tokenizer=p.Sequence([p.Digits(True), words, level])),
        "adds_tokens": changed(content, post_processor=ends),
        "nfc": changed(content, normalizer=t.normalizers.NFC()),
        "prefix_space": changed(content, pre_tokenizer=p.ByteLevel(add_prefix_space=True)),
        "drops_spaces": changed(content, pre_tokenizer=p.Sequence([p.Split(" ", "removed"), level])),
        "added_tokens": named.to_str(),
        "not_special": content.replace('"special": true', '"special": false'),
        "llama_like": llama_like(t),
        "unigram": unigram(t),
    }


LOSSLESS = ["trained", "other_pattern", "adds_tokens"]
NAMES = [*LOSSLESS, "nfc", "prefix_space", "drops_spaces", "added_tokens", "not_special", "llama_like", "unigram"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """{name: path of a tokenizer.json}."""
    folder = tmp_path_factory.mktemp("tokenizers")
    library = pytest.importorskip("tokenizers")
    return {name: save(folder / name, content) for name, content in tokenizer_files(library).items()}


def chars_file(folder, text, **changes):
    """meta.pkl as nanoGPT's data/shakespeare_char/prepare.py writes it."""
    characters = sorted(set(text))
    stoi, itos = {c: i for i, c in enumerate(characters)}, dict(enumerate(characters))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "meta.pkl"
    path.write_bytes(pickle.dumps({"vocab_size": len(characters), "itos": itos, "stoi": stoi} | changes))
    return path


@pytest.fixture(scope="module", params=["gpt2", "gpt2-1024", "bytes", "chars", *NAMES])
def any_kind(request, tmp_path_factory):
    if request.param in ("gpt2", "gpt2-1024", "bytes"):
        return load_tokenizer(request.param)
    if request.param == "chars":
        return load_tokenizer(chars_file(tmp_path_factory.mktemp("chars"), STORY + "".join(TEXTS)))
    return load_tokenizer(request.getfixturevalue("files")[request.param])


def test_a_lossless_tokenizer_gives_every_text_back_and_ids_within_its_vocabulary(any_kind):
    assert any_kind.lossless == (any_kind.kind != "bpe" or any_kind.name in LOSSLESS)
    for text in TEXTS if any_kind.lossless else ():
        ids = any_kind.encode(text)
        assert ids.dtype == np.uint16 and ids.max(initial=0) < any_kind.n_vocab and any_kind.eot not in ids
        assert any_kind.decode(ids) == text and any_kind.decode_bytes(ids) == text.encode()
    for wrong in (-1, any_kind.n_vocab):
        with pytest.raises(TokenizerError, match=f"0 to {any_kind.n_vocab - 1}"):
            any_kind.decode([wrong])


def test_the_round_trip_check_passes_or_names_the_document_and_the_place(any_kind):
    loses = {
        "nfc": "cafe\u0301 au lait",
        "prefix_space": "no space before it",
        "drops_spaces": "the dog",
        "unigram": "the 字",
    }
    ours.check_round_trip(any_kind, [" the" if any_kind.name == "prefix_space" else "the"])
    if text := loses.get(any_kind.name):
        with pytest.raises(TokenizerError) as error:
            ours.check_round_trip(any_kind, [text])
        found = any_kind.decode(any_kind.encode(text))
        at = min(i for i in range(len(text)) if not found.startswith(text[: i + 1]))
        assert repr(text) in str(error.value) and f"at character {at}" in str(error.value)


def test_a_stream_of_ids_shows_the_characters_of_the_whole(any_kind):
    prompt = any_kind.encode("the").tolist()
    for text in TEXTS:
        if len(text) < 1000:
            ids = any_kind.encode(text).tolist()
            step = any_kind.decoder()
            assert "".join(map(step, ids)) == any_kind.decode(ids)
            step = any_kind.decoder(prompt)
            assert any_kind.decode(prompt) + "".join(map(step, ids)) == any_kind.decode(prompt + ids)


def test_a_stream_holds_back_the_bytes_of_an_incomplete_character(files):
    for tokenizer in (load_tokenizer(), load_tokenizer("bytes"), *map(load_tokenizer, files.values())):
        if tokenizer.name != "unigram":  # it has no bytes
            ids, step = tokenizer.encode("a😀").tolist(), tokenizer.decoder()
            shown = [step(id) for id in ids]
            assert len(ids) > 2 and "".join(shown) == tokenizer.decode(ids) and shown[-2:] == ["", "😀"]
            if tokenizer.eot is not None:  # a character that is never completed
                step = tokenizer.decoder()
                assert "".join(map(step, [*ids[:-1], *tokenizer.encode(" a").tolist()])).count("\ufffd") == 1


def test_a_state_survives_json_and_gives_the_same_tokenizer(any_kind):
    state = json.loads(json.dumps(any_kind.state()))
    again = from_state(state)
    assert again.state() == any_kind.state() and again.kind == any_kind.kind
    for text in TEXTS:
        assert np.array_equal(again.encode(text), any_kind.encode(text))
    with pytest.raises(TokenizerError, match=any_kind.name):
        from_state(state | {"sha256": "0" * 64})
    if "content" in state:
        del state["content"]
        with pytest.raises(TokenizerError, match=f"{any_kind.name}.*missing"):
            from_state(state)


def test_a_state_without_kind_is_gpt2s_and_an_unknown_kind_is_refused():
    old = dict(name="gpt2", sha256=ours.VOCABULARY_SHA256, n_vocab=50257, eot=50256)
    for state in (None, {}, old):
        assert from_state(state).kind == "gpt2"
    with pytest.raises(TokenizerError, match="kind=words"):
        from_state(old | {"kind": "words"})


# ---- tokenizer.json ------------------------------------------------------------------------------------------


def test_ids_are_those_of_the_library_used_directly(files):
    library = importlib.import_module("tokenizers")
    for path in files.values():
        tokenizer, direct = load_tokenizer(path), library.Tokenizer.from_file(str(path))
        for text in TEXTS:
            if "<" not in text:  # a special token
                assert tokenizer.encode(text).tolist() == direct.encode(text, add_special_tokens=False).ids


def test_a_special_token_in_a_text_is_ordinary_text(files):
    for path in files.values():
        tokenizer = load_tokenizer(path)
        for special in ("<s>", "</s>", "<unk>", "<|endoftext|>"):
            ids = tokenizer.encode(f"the{special} cat").tolist()
            assert tokenizer.eot not in ids
            if tokenizer.name != "unigram":  # its piece </s> is an ordinary one, so another separator was added
                assert tokenizer.library.token_to_id(special) not in ids


def test_gpt2s_vocabulary_as_a_tokenizer_json_has_tiktokens_ids(reference, tmp_path):
    pytest.importorskip("tokenizers")
    convert = importlib.import_module("convert")
    tokenizer = load_tokenizer(save(tmp_path, convert.tokenizer_json(load_tokenizer())))
    assert (tokenizer.n_vocab, tokenizer.eot, tokenizer.lossless) == (50257, 50256, True)
    assert tokenizer.token_bytes == load_tokenizer().token_bytes
    for text in TEXTS:
        assert tokenizer.encode(text).tolist() == reference.encode_ordinary(text)


@pytest.mark.parametrize("piece", [1, 5, 17])
def test_cut_texts_have_the_ids_of_the_whole_and_only_texts_with_gpt2s_pattern_are_cut(files, monkeypatch, piece):
    library = importlib.import_module("tokenizers")
    monkeypatch.setattr(ours, "PIECE", piece)
    for name, path in files.items():
        tokenizer, direct = load_tokenizer(path), library.Tokenizer.from_file(str(path))
        text = random_text(60)
        assert tokenizer.encode(text).tolist() == direct.encode(text, add_special_tokens=False).ids
        assert (len(tokenizer.pieces(text)) > 1) == (name in ("trained", "adds_tokens"))


def test_fastokens_has_the_ids_of_tokenizers_or_is_refused(files):
    pytest.importorskip("fastokens")
    for name, path in files.items():
        if name in ("trained", "adds_tokens"):
            tokenizer = load_tokenizer(path, "fastokens")
            assert tokenizer.encoder == "fastokens"
            check_parity(tokenizer, TEXTS)
        else:
            with pytest.raises(TokenizerError, match="GPT-2's splitting pattern only"):
                load_tokenizer(path, "fastokens")


def test_truncation_padding_and_dropout_of_a_file_are_switched_off(files, tmp_path):
    library = importlib.import_module("tokenizers").Tokenizer.from_file(str(files["trained"]))
    library.enable_truncation(5)
    library.enable_padding(length=50)
    library.model.dropout = 0.9
    path = save(tmp_path, library.to_str())
    expected = load_tokenizer(files["trained"]).encode(STORY)
    for _ in range(9):
        assert np.array_equal(load_tokenizer(path).encode(STORY), expected)


def test_the_separator_is_the_one_that_the_model_names_else_a_known_name_else_a_new_id(files, tmp_path):
    content = files["trained"].read_text(encoding="utf-8").replace("<|endoftext|>", "<stop>")
    path = save(tmp_path, content)
    added = load_tokenizer(path)
    assert (added.n_vocab, added.eot, added.decode([added.eot])) == (281, 280, "<|endoftext|>")
    assert from_state(added.state()).eot == 280 and added.content != content
    for name, eos in (("special_tokens_map.json", {"content": "<stop>"}), ("tokenizer_config.json", "<stop>")):
        (tmp_path / name).write_text(json.dumps({"eos_token": eos}), encoding="utf-8")
        named = load_tokenizer(path)
        assert (named.n_vocab, named.eot, named.content) == (280, 279, content)
        (tmp_path / name).unlink()
    (tmp_path / "tokenizer_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json.*remove it"):
        load_tokenizer(path)
    assert load_tokenizer(files["llama_like"]).eot == 2


def with_ids(t, count):
    """A tokenizer.json without a separator whose ids are 0 to count - 1."""
    return t.Tokenizer(t.models.WordLevel({f"w{i}": i for i in range(count)}, unk_token="w0")).to_str()


def test_ids_that_do_not_fit_into_16_bits_are_refused(tmp_path):
    library = pytest.importorskip("tokenizers")
    assert load_tokenizer(save(tmp_path, with_ids(library, 65535))).eot == 65535
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: has 65,537 ids; at most 65,536"):
        load_tokenizer(save(tmp_path, with_ids(library, 65536)))


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff\xfe", b'{"model": {"type": "BPE"}}', b"<html>"])
def test_a_file_that_is_no_tokenizer_json_is_refused(tmp_path, content):
    pytest.importorskip("tokenizers")
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: not a tokenizer\.json.*give") as error:
        load_tokenizer(path)
    assert "\n" not in str(error.value)


def test_a_source_that_cannot_be_read_is_refused_with_what_can_be_given(tmp_path):
    for source in ("byte", tmp_path / "missing.json", tmp_path):
        with pytest.raises(TokenizerError, match=r"gpt2.* bytes, or the path"):
            load_tokenizer(source)


def test_a_library_that_is_not_installed_comes_with_its_extra(monkeypatch, files):
    for module, extra, source in (("fastokens", "fast", "gpt2"), ("tokenizers", "tokenizers", files["trained"])):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(TokenizerError, match=rf"{module}.*pip install -e '\.\[{extra}\]'"):
                load_tokenizer(source, "fastokens")
            for kind in ("gpt2", "bytes"):
                assert load_tokenizer(kind).encode("a").size == 1


# ---- training ------------------------------------------------------------------------------------------------

TRAIN = """
import random, sys
from onecard.tokenizer import train_tokenizer
draw = random.Random(1)
words = ["".join(draw.choices("abcdeé字", k=draw.randint(1, 9))) for _ in range(200)]
sys.stdout.buffer.write(train_tokenizer((" ".join(draw.choices(words, k=200)) for _ in range(200)), 400).encode())
"""


def test_the_same_texts_give_the_same_file_in_every_process_and_with_any_number_of_threads():
    pytest.importorskip("tokenizers")
    root, found = Path(__file__).parent.parent, set()
    for threads, seed in (("1", "0"), ("2", "1"), ("2", "2")):
        env = os.environ | dict(RAYON_NUM_THREADS=threads, PYTHONHASHSEED=seed, PYTHONPATH=str(root))
        done = subprocess.run([sys.executable, "-c", TRAIN], env=env, capture_output=True, check=True)
        found.add(done.stdout)
    assert len(found) == 1 and len(json.loads(found.pop())["model"]["vocab"]) == 399


def test_a_trained_tokenizer_has_256_bytes_then_merges_and_the_separator_last(files):
    tokenizer = load_tokenizer(files["trained"])
    assert (tokenizer.kind, tokenizer.name, tokenizer.n_vocab, tokenizer.eot) == ("bpe", "trained", 280, 279)
    assert {*tokenizer.token_bytes[:256]} == {bytes([byte]) for byte in range(256)}
    assert tokenizer.decode([279]) == "<|endoftext|>" and b" the" in tokenizer.token_bytes[256:]
    assert tokenizer.sha256 == hashlib.sha256(files["trained"].read_bytes()).hexdigest()
    assert len(tokenizer.encode(STORY)) < len(STORY) / 2
    assert tokenizer.encode("").size == 0


def test_the_size_is_at_least_257_at_most_65536_and_smaller_where_no_pair_occurs_twice(tmp_path):
    pytest.importorskip("tokenizers")
    for size in (0, 256, 65537):
        with pytest.raises(TokenizerError, match="257 to 65,536"):
            train_tokenizer([STORY], size)
    only_bytes = load_tokenizer(save(tmp_path, train_tokenizer([], 257)))
    assert only_bytes.n_vocab == 257 and len(only_bytes.encode(STORY)) == len(STORY)
    few = load_tokenizer(save(tmp_path, train_tokenizer(["abab \ud800"], 1000)))
    assert few.n_vocab == 258 and b"ab" in few.token_bytes


# ---- nanoGPT's characters ------------------------------------------------------------------------------------


def test_characters_have_nanogpts_ids(tmp_path):
    text = "First Citizen:\nBefore we proceed, é字😀\n"
    tokenizer = load_tokenizer(chars_file(tmp_path / "shakespeare_char", text))
    stoi = {character: i for i, character in enumerate(sorted(set(text)))}
    assert tokenizer.encode(text).tolist() == [stoi[character] for character in text]
    assert (tokenizer.kind, tokenizer.name, tokenizer.eot) == ("chars", "shakespeare_char", None)
    assert tokenizer.n_vocab == len(stoi) and json.loads(tokenizer.content) == list(stoi)


def test_a_text_with_other_characters_is_refused_with_these(tmp_path):
    tokenizer = load_tokenizer(chars_file(tmp_path, "abc"))
    with pytest.raises(TokenizerError, match=r"2 characters.*'x' '😀'") as error:
        tokenizer.encode("axb😀x")
    assert "'a'" not in str(error.value)


class Attack:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def test_code_in_a_meta_pkl_is_not_run(tmp_path):
    run = tmp_path / "run"
    for attack in (Attack(os.mkdir, str(run)), Attack(exec, f"import os; os.mkdir({str(run)!r})"), Path(run)):
        path = chars_file(tmp_path, "abc", attack=attack)
        with pytest.raises(TokenizerError, match=r"meta\.pkl: .*code.*no code was run.*make it again") as error:
            load_tokenizer(path)
        assert not run.exists() and "\n" not in str(error.value)


def test_a_meta_pkl_that_is_none_is_refused(tmp_path):
    wrong = [
        dict(itos={0: "a", 1: "a"}),
        dict(itos={0: "ab"}, stoi={"ab": 0}),
        dict(itos={1: "a"}),
        dict(itos={}, stoi={}),
        dict(stoi={"a": 1}),
        dict(itos=dict(enumerate(map(chr, range(65537))))),
    ]
    for changes in wrong:
        with pytest.raises(TokenizerError, match=r"meta\.pkl: not nanoGPT's"):
            load_tokenizer(chars_file(tmp_path, "a", **changes))
    path = tmp_path / "meta.pkl"
    whole = chars_file(tmp_path, "abc").read_bytes()
    for content in (b"", b"text", whole[:-9], pickle.dumps(7), b"\x80\x04K\x01b."):
        path.write_bytes(content)
        with pytest.raises(TokenizerError, match=r"meta\.pkl: not nanoGPT's"):
            load_tokenizer(path)


# ---- the tokenizer of a dataset ------------------------------------------------------------------------------


def manifest_with(folder, tokenizer):
    folder.mkdir(exist_ok=True)
    write_manifest(folder, dict(version=1, tokenizer=tokenizer, shards=[], skipped={}, settings={}))


def test_a_dataset_has_the_tokenizer_that_its_manifest_names(tmp_path, files):
    manifest_with(tmp_path, dict(name="gpt2", sha256=ours.VOCABULARY_SHA256, n_vocab=50257, eot=50256))  # an old one
    assert ours.dataset_tokenizer(tmp_path).kind == "gpt2"
    manifest_with(tmp_path, load_tokenizer("bytes").state())
    assert ours.dataset_tokenizer(tmp_path).kind == "bytes"
    manifest_with(tmp_path, dict(name="of another program", sha256="0" * 64, n_vocab=300, eot=0))
    assert ours.dataset_tokenizer(tmp_path) is None

    state = load_tokenizer(files["trained"]).state()
    path = save(tmp_path, state.pop("content"))
    manifest_with(tmp_path, state | {"file": "tokenizer.json"})
    assert ours.dataset_tokenizer(tmp_path).state() == load_tokenizer(files["trained"]).state()
    path.write_text(path.read_text(encoding="utf-8") + " ", encoding="utf-8")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: .*changed.*prepare\.py"):
        ours.dataset_tokenizer(tmp_path)
    path.unlink()
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: .*missing.*prepare\.py"):
        ours.dataset_tokenizer(tmp_path)


def test_a_folder_without_a_manifest_has_nanogpts_characters_or_names_none(tmp_path):
    assert ours.dataset_tokenizer(tmp_path) is None
    chars_file(tmp_path, "abc")
    assert ours.dataset_tokenizer(tmp_path).kind == "chars"


def test_the_short_vocabularies_are_gpt2_s_merges_up_to_an_id_so_their_ids_are_what_tokenizers_gives():
    """The other reading of them: byte pair encoding with the first merges, from a tokenizer.json."""
    short, whole = load_tokenizer("gpt2-1024"), load_tokenizer()
    assert short.n_vocab == 1024 and short.eot == 1023 and short.token_bytes[:1023] == whole.token_bytes[:1023]
    other = pytest.importorskip("tokenizers").Tokenizer.from_str(convert.tokenizer_json(short))
    other.encode_special_tokens = True
    for text in (*HARD_STRINGS, "The quick brown fox jumps over the lazy dog. " * 20):
        assert short.encode(text).tolist() == other.encode(text).ids and short.decode(short.encode(text)) == text
    assert from_state(short.state()).state() == short.state() and "content" not in short.state()
    for source in ("gpt2-256", "gpt2-50257"):
        with pytest.raises(TokenizerError, match="gpt2-257 to gpt2-50256"):
            load_tokenizer(source)

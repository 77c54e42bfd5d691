"""The tokenizers: against tiktoken read by its own loader, the library tokenizers used directly, and plain Python."""

import hashlib
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
from runs import write_characters
from tiktoken.load import load_tiktoken_bpe
from tiktoken_ext import openai_public

import convert
import onecard.tokenizer as ours
from onecard.shards import write_manifest
from onecard.tokenizer import HARD_STRINGS, TokenizerError, check_parity, from_state, load_tokenizer, train_tokenizer

ALPHABET = ["a", "Zé", "字", "1", "²", "!", "'s", "'ll", " ", "  ", "\n", "\r\n", "\t", "\u3000", "\x85", "\x1c", "😀"]
STORY = "The dog and the cat saw the dogs. Don't the cats see 12 dogs?\n"


def random_text(length):
    return "".join(random.Random(length).choices(ALPHABET, k=length))


TEXTS = [*HARD_STRINGS, *map(random_text, range(1, 200, 7))]


@pytest.fixture(scope="module", params=["tiktoken", "fastokens"])
def tokenizer(request):
    pytest.importorskip(request.param)
    return load_tokenizer(encoder=request.param)


# ---- GPT-2's vocabulary --------------------------------------------------------------------------------------


def test_ids_are_tiktokens_ordinary_ones_and_decode_to_the_text(tokenizer):
    """tiktoken's gpt2, from the same file but by tiktoken's own loader, pattern and hash."""
    ranks = load_tiktoken_bpe(str(ours.VOCABULARY), expected_hash=ours.VOCABULARY_SHA256)
    special = {"<|endoftext|>": 50256}
    theirs = tiktoken.Encoding(
        "gpt2", pat_str=openai_public.r50k_pat_str, mergeable_ranks=ranks, special_tokens=special
    )
    assert tokenizer.n_vocab == theirs.n_vocab == 50257 and tokenizer.eot == theirs.eot_token == 50256
    assert tokenizer.encode("Hello world").tolist() == [15496, 995]  # GPT-2's published example
    for text in TEXTS:  # HARD_STRINGS has <|endoftext|> in a text
        ids = tokenizer.encode(text)
        assert ids.dtype == np.uint16 and 50256 not in ids
        assert ids.tolist() == theirs.encode_ordinary(text) and tokenizer.decode(ids) == text


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


@pytest.mark.parametrize("form", ["  {}b", "a{}'s"])
def test_every_character_has_the_ids_of_tiktoken_in_fastokens(form):
    """All of Unicode, in contexts where white space, letters and other characters are split in their own ways."""
    pytest.importorskip("fastokens")
    characters = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000]
    lines = ["".join(map(form.format, characters[i : i + 1000])) for i in range(0, len(characters), 1000)]
    fast = load_tokenizer(encoder="fastokens")
    for line, ids, expected in zip(lines, fast.encode_pieces(lines), fast.encode_reference(lines), strict=True):
        assert np.array_equal(ids, expected), f"U+{ord(line[form.index('{')]):04X} and the 999 after it"


def test_lone_surrogates_become_replacement_characters_and_pairs_their_character(tokenizer):
    valid_of = {"a\ud800b": ("a\ufffdb", 1), "\udc00\ud800": ("\ufffd\ufffd", 2), "\ud83d\ude00\ufffd": ("😀\ufffd", 0)}
    for text, (valid, count) in (valid_of | {"é": ("é", 0)}).items():
        assert ours.replace_surrogates(text) == (valid, count)
        assert tokenizer.encode(text).tolist() == tokenizer.encode(valid).tolist()


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


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """{name: path of a tokenizer.json}: a trained one, this one changed in one part each, and other models."""
    t, folder = pytest.importorskip("tokenizers"), tmp_path_factory.mktemp("tokenizers")
    content, p = train_tokenizer([STORY] * 9, 280), t.pre_tokenizers

    def changed(**parts):
        library = t.Tokenizer.from_str(content)
        for name, part in parts.items():
            setattr(library, name, part)
        return library.to_str()

    words = p.Split(t.Regex(r" ?\p{L}+"), "isolated")
    level = p.ByteLevel(add_prefix_space=False, use_regex=False)
    named = t.Tokenizer.from_str(content)
    named.add_special_tokens(["<s>"])
    named.add_tokens(["the cat", t.AddedToken("dog", lstrip=True)])
    ends = t.processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 279)])
    contents = {
        "trained": content,
        "other_pattern": changed(pre_tokenizer=p.Sequence([p.Digits(True), words, level])),
        "adds_tokens": changed(post_processor=ends),
        "nfc": changed(normalizer=t.normalizers.NFC()),
        "prefix_space": changed(pre_tokenizer=p.ByteLevel(add_prefix_space=True)),
        "drops_spaces": changed(pre_tokenizer=p.Sequence([p.Split(" ", "removed"), level])),
        "added_tokens": named.to_str(),
        "not_special": content.replace('"special": true', '"special": false'),
        "llama_like": llama_like(t),
        "unigram": unigram(t),
    }
    return {name: save(folder / name, content) for name, content in contents.items()}


GPT2_SPLIT = ["trained", "adds_tokens"]
LOSSLESS = [*GPT2_SPLIT, "other_pattern"]
NAMES = [*LOSSLESS, "nfc", "prefix_space", "drops_spaces", "added_tokens", "not_special", "llama_like", "unigram"]


@pytest.fixture(scope="module", params=["gpt2", "gpt2-1024", "bytes", "chars", *NAMES])
def any_kind(request, tmp_path_factory):
    if request.param in ("gpt2", "gpt2-1024", "bytes"):
        return load_tokenizer(request.param)
    if request.param == "chars":
        write_characters(folder := tmp_path_factory.mktemp("chars"), STORY + "".join([*TEXTS, *ALPHABET]))
        return load_tokenizer(folder / "meta.pkl")
    return load_tokenizer(request.getfixturevalue("files")[request.param])


def test_a_lossless_tokenizer_gives_every_text_back_and_ids_within_its_vocabulary(any_kind):
    assert any_kind.lossless == (any_kind.kind != "bpe" or any_kind.name in LOSSLESS)
    for text in TEXTS if any_kind.lossless else ():
        ids = any_kind.encode(text)
        assert ids.dtype == np.uint16 and ids.max(initial=0) < any_kind.n_vocab and any_kind.eot not in ids
        assert any_kind.decode(ids) == text and any_kind.decode_bytes(ids) == text.encode()
    for wrong in (-1, any_kind.n_vocab, 65535):
        with pytest.raises(TokenizerError, match=f"0 to {any_kind.n_vocab - 1}"):
            any_kind.decode([0, wrong])


def test_a_cut_text_has_the_ids_of_the_whole_and_other_patterns_are_not_cut(any_kind, monkeypatch):
    texts = [random_text(length) for length in range(61)]
    whole = any_kind.encode_pieces(texts)
    for piece in (1, 2, 5, 17):
        monkeypatch.setattr(ours, "PIECE", piece)
        for text, ids in zip(texts, whole, strict=True):
            assert "".join(any_kind.pieces(text)) == text and np.array_equal(any_kind.encode(text), ids)
        assert (len(any_kind.pieces(texts[60])) > 1) == (any_kind.kind != "bpe" or any_kind.name in GPT2_SPLIT)


LOSES = dict(nfc="cafe\u0301 au lait", prefix_space="no space before it", drops_spaces="the dog", unigram="the 字")


def test_the_round_trip_check_passes_or_names_the_document_and_the_place(any_kind):
    ours.check_round_trip(any_kind, [" the" if any_kind.name == "prefix_space" else "the"])
    if text := LOSES.get(any_kind.name):
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
            for before in ([], prompt):
                shown = "".join(map(any_kind.decoder(before), ids))
                assert any_kind.decode(before) + shown == any_kind.decode(before + ids)


def test_a_stream_holds_back_the_bytes_of_an_incomplete_character(any_kind):
    if any_kind.kind == "chars" or any_kind.name == "unigram":  # they have no bytes
        return
    ids, step = any_kind.encode("a😀").tolist(), any_kind.decoder()
    shown = [step(id) for id in ids]
    assert len(ids) > 2 and "".join(shown) == any_kind.decode(ids) and shown[-2:] == ["", "😀"]
    step = any_kind.decoder()  # a character that is never completed
    ids[-1:] = any_kind.encode(" a").tolist()
    assert "".join(map(step, ids)) == any_kind.decode(ids) and "\ufffd" in any_kind.decode(ids)


def test_a_state_survives_json_and_gives_the_same_tokenizer(any_kind):
    state = json.loads(json.dumps(any_kind.state()))
    again = from_state(state)
    assert again.state() == any_kind.state() and again.kind == any_kind.kind and again.identity == any_kind.identity
    assert ("content" in state) == (any_kind.kind in ("chars", "bpe"))
    for text in TEXTS:
        assert np.array_equal(again.encode(text), any_kind.encode(text))
    with pytest.raises(TokenizerError, match=any_kind.name):
        from_state(state | {"sha256": "0" * 64})
    if state.pop("content", None):
        with pytest.raises(TokenizerError, match=f"{any_kind.name}.*missing"):
            from_state(state)


def test_a_state_without_kind_is_gpt2s_and_an_unknown_kind_is_refused():
    old = dict(name="gpt2", sha256=ours.VOCABULARY_SHA256, n_vocab=50257, eot=50256)
    for state in (None, {}, old):
        assert from_state(state).kind == "gpt2"
    with pytest.raises(TokenizerError, match="kind=words"):
        from_state(old | {"kind": "words"})


@pytest.mark.parametrize("name", ["gpt2", "gpt2-1024"])
def test_gpt2s_vocabulary_and_the_first_ids_of_it_have_the_same_ids_as_a_tokenizer_json(name, tmp_path):
    pytest.importorskip("tokenizers")
    tokenizer, whole = load_tokenizer(name), load_tokenizer()
    other = load_tokenizer(save(tmp_path, convert.tokenizer_json(tokenizer)))
    assert tokenizer.n_vocab == tokenizer.eot + 1 == (50257 if name == "gpt2" else 1024)
    assert (other.n_vocab, other.eot, other.lossless) == (tokenizer.n_vocab, tokenizer.eot, True)
    assert other.token_bytes == tokenizer.token_bytes == [*whole.token_bytes[: tokenizer.eot], b"<|endoftext|>"]
    for text in (*TEXTS, "The quick brown fox jumps over the lazy dog. " * 20):
        assert np.array_equal(other.encode(text), tokenizer.encode(text))


# ---- tokenizer.json ------------------------------------------------------------------------------------------


def test_ids_are_those_of_the_library_used_directly_and_special_tokens_in_a_text_are_ordinary(files):
    library = pytest.importorskip("tokenizers")
    for path in files.values():
        tokenizer, direct = load_tokenizer(path), library.Tokenizer.from_file(str(path))
        for text in TEXTS:
            if "<" not in text:  # a special token
                assert tokenizer.encode(text).tolist() == direct.encode(text, add_special_tokens=False).ids
        for special in ("<s>", "</s>", "<unk>", "<|endoftext|>"):
            ids = tokenizer.encode(f"the{special} cat").tolist()
            assert tokenizer.eot not in ids
            if tokenizer.name != "unigram":  # its piece </s> is an ordinary one, so another separator was added
                assert tokenizer.library.token_to_id(special) not in ids


def test_fastokens_has_the_ids_of_tokenizers_or_is_refused(files):
    pytest.importorskip("fastokens")
    for name, path in files.items():
        if name in GPT2_SPLIT:
            tokenizer = load_tokenizer(path, "fastokens")
            assert tokenizer.encoder == "fastokens"
            check_parity(tokenizer, TEXTS)
        else:
            with pytest.raises(TokenizerError, match="GPT-2's splitting pattern only"):
                load_tokenizer(path, "fastokens")


def test_truncation_padding_and_dropout_of_a_file_are_switched_off(files, tmp_path):
    library = pytest.importorskip("tokenizers").Tokenizer.from_file(str(files["trained"]))
    library.enable_truncation(5)
    library.enable_padding(length=50)
    library.model.dropout = 0.9
    path = save(tmp_path, library.to_str())
    expected = load_tokenizer(files["trained"]).encode(STORY)
    for _ in range(9):
        assert np.array_equal(load_tokenizer(path).encode(STORY), expected)


def test_a_file_that_was_saved_again_has_the_same_identity_and_one_with_other_ids_has_not(files, tmp_path):
    transformers, first = pytest.importorskip("transformers"), load_tokenizer(files["trained"])
    transformers.PreTrainedTokenizerFast(tokenizer_file=str(files["trained"])).save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path / "tokenizer.json")
    assert again.sha256 != first.sha256 and again.identity == first.identity
    same_ids = {name for name, path in files.items() if load_tokenizer(path).identity == first.identity}
    assert same_ids == {*GPT2_SPLIT, "not_special"}  # the separator is special in any case
    content = json.loads(first.content)
    content["model"]["merges"][:2] = content["model"]["merges"][1::-1]
    assert load_tokenizer(save(tmp_path, json.dumps(content))).identity != first.identity


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


def test_ids_that_do_not_fit_into_16_bits_are_refused(tmp_path):
    t = pytest.importorskip("tokenizers")

    def with_ids(count):  # and without a separator, which is added
        return save(tmp_path, t.Tokenizer(t.models.WordLevel({f"w{i}": i for i in range(count)}, "w0")).to_str())

    assert load_tokenizer(with_ids(65535)).eot == 65535
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: has 65,537 ids; at most 65,536"):
        load_tokenizer(with_ids(65536))


def test_a_source_that_is_no_tokenizer_or_cannot_be_read_is_refused_with_what_can_be_given(tmp_path):
    pytest.importorskip("tokenizers")
    path = tmp_path / "tokenizer.json"
    for content in (b"", b"{}", b"[1]", b"\xff\xfe", b'{"model": {"type": "BPE"}}', b"<html>"):
        path.write_bytes(content)
        with pytest.raises(TokenizerError, match=r"tokenizer\.json: not a tokenizer\.json.*give") as error:
            load_tokenizer(path)
        assert "\n" not in str(error.value)
    for source in ("byte", tmp_path / "missing.json", tmp_path):
        with pytest.raises(TokenizerError, match=r"gpt2.* bytes, or the path"):
            load_tokenizer(source)
    for source in ("gpt2-256", "gpt2-50257"):
        with pytest.raises(TokenizerError, match="gpt2-257 to gpt2-50256"):
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
        found.add(subprocess.run([sys.executable, "-c", TRAIN], env=env, capture_output=True, check=True).stdout)
    assert len(found) == 1 and len(json.loads(found.pop())["model"]["vocab"]) == 399


def test_a_trained_tokenizer_has_256_bytes_then_merges_and_the_separator_last(files):
    tokenizer = load_tokenizer(files["trained"])
    assert (tokenizer.kind, tokenizer.name, tokenizer.n_vocab, tokenizer.eot) == ("bpe", "trained", 280, 279)
    assert {*tokenizer.token_bytes[:256]} == {bytes([byte]) for byte in range(256)}
    assert tokenizer.decode([279]) == "<|endoftext|>" and b" the" in tokenizer.token_bytes[256:]
    assert tokenizer.sha256 == hashlib.sha256(files["trained"].read_bytes()).hexdigest()
    assert len(tokenizer.encode(STORY)) < len(STORY) / 2


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


def test_characters_have_nanogpts_ids_and_others_are_refused_by_name(tmp_path):
    text = "First Citizen:\nBefore we proceed, é字😀\n"
    write_characters(tmp_path / "shakespeare_char", text)
    tokenizer = load_tokenizer(tmp_path / "shakespeare_char" / "meta.pkl")
    stoi = {character: i for i, character in enumerate(sorted(set(text)))}
    assert tokenizer.encode(text).tolist() == [stoi[character] for character in text]
    assert (tokenizer.kind, tokenizer.name, tokenizer.eot) == ("chars", "shakespeare_char", None)
    assert tokenizer.n_vocab == len(stoi) and json.loads(tokenizer.content) == list(stoi)
    with pytest.raises(TokenizerError, match=r"2 characters.*'x' '\U0001f44d'") as error:
        tokenizer.encode("ex\U0001f44drx")
    assert "'e'" not in str(error.value)


class Attack:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def test_code_in_a_meta_pkl_is_not_run(tmp_path):
    run, path = tmp_path / "run", tmp_path / "meta.pkl"
    for attack in (Attack(os.mkdir, str(run)), Attack(exec, f"import os; os.mkdir({str(run)!r})"), Path(run)):
        path.write_bytes(pickle.dumps(dict(itos={0: "a"}, stoi={"a": 0}, attack=attack)))
        with pytest.raises(TokenizerError, match=r"meta\.pkl: .*code.*no code was run.*make it again") as error:
            load_tokenizer(path)
        assert not run.exists() and "\n" not in str(error.value)


def test_a_meta_pkl_that_is_none_is_refused(tmp_path):
    a, many = {0: "a"}, [chr(i) for i in range(65537 + 2048) if not 0xD800 <= i < 0xE000]
    wrong = [
        dict(itos={0: "a", 1: "a"}, stoi={"a": 0}),
        dict(itos={0: "ab"}, stoi={"ab": 0}),
        dict(itos={1: "a"}, stoi={"a": 0}),
        dict(itos={}, stoi={}),
        dict(itos=a, stoi={"a": 1}),
        dict(itos=a),
        dict(itos=dict(enumerate(many)), stoi={character: i for i, character in enumerate(many)}),
    ]
    whole, path = pickle.dumps(dict(itos=a, stoi={"a": 0})), tmp_path / "meta.pkl"
    path.write_bytes(whole)
    assert load_tokenizer(path).n_vocab == 1
    for content in (*map(pickle.dumps, wrong), b"", b"text", whole[:-9], pickle.dumps(7), b"\x80\x04K\x01b."):
        path.write_bytes(content)
        with pytest.raises(TokenizerError, match=r"meta\.pkl: not nanoGPT's"):
            load_tokenizer(path)


# ---- the tokenizer of a dataset ------------------------------------------------------------------------------


def test_a_dataset_has_the_tokenizer_that_its_manifest_names_or_nanogpts_characters(tmp_path, files):
    def dataset_with(tokenizer):
        write_manifest(tmp_path, dict(version=1, tokenizer=tokenizer, shards=[], skipped={}, settings={}))
        return ours.dataset_tokenizer(tmp_path)

    assert ours.dataset_tokenizer(tmp_path) is None
    write_characters(tmp_path, "abc")
    assert ours.dataset_tokenizer(tmp_path).kind == "chars"
    old = dict(name="gpt2", sha256=ours.VOCABULARY_SHA256, n_vocab=50257, eot=50256)
    assert dataset_with(old).kind == "gpt2"
    assert dataset_with(load_tokenizer("bytes").state()).kind == "bytes"
    assert dataset_with(dict(name="of another program", sha256="0" * 64, n_vocab=300, eot=0)) is None

    state = load_tokenizer(files["trained"]).state()
    path = save(tmp_path, state.pop("content"))
    assert dataset_with(state | {"file": "tokenizer.json"}).state() == load_tokenizer(files["trained"]).state()
    path.write_text(path.read_text(encoding="utf-8") + " ", encoding="utf-8")
    remedy = rf"copy it again.*prepare\.py --dataset={tmp_path.name} --tokenizer=FILE.*another --dataset"
    with pytest.raises(TokenizerError, match=rf"tokenizer\.json: .*changed.*{remedy}"):
        ours.dataset_tokenizer(tmp_path)
    path.unlink()
    with pytest.raises(TokenizerError, match=rf"tokenizer\.json: .*missing.*{remedy}"):
        ours.dataset_tokenizer(tmp_path)

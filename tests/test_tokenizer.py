"""The vocabulary: against tiktoken read by its own loader, and against fastokens where it is installed."""

import random

import numpy as np
import pytest
import tiktoken
from tiktoken.load import load_tiktoken_bpe
from tiktoken_ext import openai_public

import tokenizer as ours
from onecard.tokenizer import HARD_STRINGS, TokenizerError, check_parity, load_tokenizer, mend, pieces

ALPHABET = ["a", "Zé", "字", "1", "²", "!", "'s", "'ll", " ", "  ", "\n", "\r\n", "\t", "\u3000", "\x85", "\x1c", "😀"]


@pytest.fixture(scope="module")
def reference():
    """tiktoken's gpt2, from the same file but by tiktoken's own loader, pattern and hash."""
    ranks = load_tiktoken_bpe(str(ours.VOCABULARY), expected_hash=ours.VOCABULARY_SHA256)
    special = {"<|endoftext|>": 50256}
    return tiktoken.Encoding("gpt2", pat_str=openai_public.r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)


@pytest.fixture(scope="module", params=["tiktoken", "fastokens"])
def tokenizer(request):
    if request.param == "fastokens":
        pytest.importorskip("fastokens")
    return load_tokenizer(request.param)


def random_text(length):
    return "".join(random.Random(length).choices(ALPHABET, k=length))


def test_the_vocabulary_is_gpt2s(reference):
    assert load_tokenizer().n_vocab == reference.n_vocab == 50257
    assert load_tokenizer().eot == reference.eot_token == 50256
    assert load_tokenizer().encode("Hello world").tolist() == [15496, 995]  # GPT-2's published example


@pytest.mark.parametrize("text", [*HARD_STRINGS, *map(random_text, range(1, 200, 7))])
def test_ids_are_tiktokens_and_decode_to_the_text(tokenizer, reference, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint16
    assert ids.tolist() == reference.encode_ordinary(text)
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("piece", [1, 2, 5, 17])
def test_a_cut_text_has_the_ids_of_the_whole(reference, monkeypatch, piece):
    monkeypatch.setattr(ours, "PIECE", piece)
    tokenizer = load_tokenizer()
    for length in range(60):
        text = random_text(length)
        assert "".join(pieces(text)) == text
        assert tokenizer.encode(text).tolist() == reference.encode_ordinary(text)


@pytest.mark.parametrize("space", [" ", "\n", "\u3000", "\r\n\t"])
def test_a_million_spaces_before_a_letter_are_the_run_without_its_last_and_that_with_the_letter(tokenizer, space):
    """tiktoken itself gives up on these (ValueError), so the ids are put together by the pattern's rule."""
    run = space * (1_000_000 // len(space))
    whole = tokenizer.encode(run + "a").tolist()
    assert whole == tokenizer.encode(run[:-1]).tolist() + tokenizer.encode(run[-1] + "a").tolist()
    assert tokenizer.decode(whole) == run + "a"


def test_a_million_letters_are_the_same_in_both_encoders():
    pytest.importorskip("fastokens")
    text = "a" * 1_000_000 + "b" * 1000
    assert np.array_equal(load_tokenizer().encode(text), load_tokenizer("fastokens").encode(text))


@pytest.mark.slow
def test_ten_million_letters_and_a_document_of_100_mb(tokenizer):
    letters = tokenizer.encode("a" * 10_000_000)
    assert tokenizer.decode_bytes(letters) == b"a" * 10_000_000
    words = "Some words, and a number: 1234.\n" * 3_200_000
    once = tokenizer.encode(words[:32]).tolist()
    assert tokenizer.encode(words).tolist() == once * 3_200_000


def test_endoftext_in_a_text_is_ordinary_text(tokenizer):
    ids = tokenizer.encode("a<|endoftext|>b")
    assert 50256 not in ids and tokenizer.decode(ids) == "a<|endoftext|>b"


@pytest.mark.parametrize(
    ("text", "mended", "count"),
    [
        ("a\ud800b", "a\ufffdb", 1),
        ("\udc00\ud800", "\ufffd\ufffd", 2),
        ("\ud83d\ude00\ufffd", "😀\ufffd", 0),
        ("é", "é", 0),
    ],
)
def test_lone_surrogates_become_replacement_characters_and_pairs_their_character(tokenizer, text, mended, count):
    assert mend(text) == (mended, count)
    assert tokenizer.encode(text).tolist() == tokenizer.encode(mended).tolist()


def test_half_a_character_decodes_to_a_replacement_and_bytes_stay_exact(tokenizer):
    ids = tokenizer.encode("😀")
    assert len(ids) > 1 and tokenizer.decode(ids[:1]) == "\ufffd"
    assert tokenizer.decode_bytes(ids) == "😀".encode()


@pytest.mark.parametrize("ids", [[50257], [-1], [0, 65535]])
def test_an_id_beyond_the_vocabulary_is_refused(ids):
    with pytest.raises(TokenizerError, match="50256"):
        load_tokenizer().decode(ids)


def test_a_damaged_or_missing_vocabulary_is_refused(monkeypatch, tmp_path):
    content = bytearray(ours.VOCABULARY.read_bytes())
    content[1000] ^= 1
    (tmp_path / "gpt2.tiktoken").write_bytes(content)
    monkeypatch.setattr(ours, "VOCABULARY", tmp_path / "gpt2.tiktoken")
    with pytest.raises(TokenizerError, match=r"gpt2\.tiktoken: damaged"):
        load_tokenizer()
    (tmp_path / "gpt2.tiktoken").unlink()
    with pytest.raises(TokenizerError, match="git checkout"):
        load_tokenizer()


def test_an_encoder_with_other_ids_does_not_pass_the_parity_check():
    class Wrong(ours.Tokenizer):
        def encode_pieces(self, texts):
            return [ids[:-1] if ids.size > 30 else ids for ids in super().encode_pieces(texts)]

    with pytest.raises(TokenizerError, match="other ids than tiktoken"):
        check_parity(Wrong(ours.VOCABULARY.read_bytes(), "tiktoken"), [])


def test_fastokens_that_is_not_installed_is_said(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "fastokens", None)
    with pytest.raises(TokenizerError, match=r"pip install -e '\.\[fast\]'"):
        load_tokenizer("fastokens")

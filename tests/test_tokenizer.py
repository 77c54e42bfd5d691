"""The vocabulary: against tiktoken read by its own loader, and against fastokens where it is installed."""

import random
import sys

import numpy as np
import pytest
import tiktoken
from tiktoken.load import load_tiktoken_bpe
from tiktoken_ext import openai_public

import onecard.tokenizer as ours
from onecard.tokenizer import HARD_STRINGS, TokenizerError, check_parity, load_tokenizer, pieces, replace_surrogates

ALPHABET = ["a", "Zé", "字", "1", "²", "!", "'s", "'ll", " ", "  ", "\n", "\r\n", "\t", "\u3000", "\x85", "\x1c", "😀"]


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


def test_the_vocabulary_is_gpt2s(tokenizer, reference):
    assert tokenizer.n_vocab == reference.n_vocab == 50257 and tokenizer.eot == reference.eot_token == 50256
    assert tokenizer.encode("Hello world").tolist() == [15496, 995]  # GPT-2's published example


@pytest.mark.parametrize("text", [*HARD_STRINGS, *map(random_text, range(1, 200, 7))])
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
        assert "".join(pieces(text)) == text
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
        assert replace_surrogates(text) == (valid, count)
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
    with pytest.raises(TokenizerError, match="has other ids than tiktoken"):
        check_parity(Wrong(), [])


def test_fastokens_that_is_not_installed_comes_with_a_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastokens", None)
    with pytest.raises(TokenizerError, match=r"pip install -e '\.\[fast\]'"):
        load_tokenizer(encoder="fastokens")

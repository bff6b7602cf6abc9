"""Text as it grows: no split characters, stop strings cut where they begin, spaces as in the whole text."""

from __future__ import annotations

import functools
import random

import pytest
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers.convert_slow_tokenizer import bytes_to_unicode

from specproxy.text import OutputText, TextStream, split_tokens

END = 256


@functools.cache
def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token per byte, and an end token."""
    table = {char: byte for byte, char in bytes_to_unicode().items()} | {"<eos>": END}
    inner = Tokenizer(BPE(table, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")


@functools.cache
def word_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Words that begin with a space, which the decoder drops where nothing stands before it; bytes for the rest."""
    words = ["\u2581the", "\u2581cat", "s", "<0xE2>", "<0x82>", "<0xAC>", "<unk>"]
    inner = Tokenizer(BPE({word: i for i, word in enumerate(words)}, merges=[], unk_token="<unk>"))
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


def test_characters_come_whole():
    tokenizer = byte_tokenizer()
    text = "a\u00e9\u20ac\U0001f600z"
    pieces = split_tokens(tokenizer, list(text.encode()))
    assert "".join(pieces) == text
    assert [piece for piece in pieces if piece] == list(text)
    assert pieces == ["a", "", "\u00e9", "", "", "\u20ac", "", "", "", "\U0001f600", "z"]


def test_any_bytes_give_the_text_of_the_whole():
    """Halves of characters, stray continuations, replacement characters of the text's own."""
    tokenizer, draw = byte_tokenizer(), random.Random(3)
    alphabet = [0x61, 0x20, 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x98, 0x80, 0xFF, END]
    for _ in range(300):
        ids = [draw.choice(alphabet) for _ in range(draw.randrange(1, 24))]
        if draw.random() < 0.3:
            ids += list("\ufffd\ufffdb".encode())
        assert "".join(split_tokens(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)
        stream, shown = TextStream(tokenizer), ""
        for i, token in enumerate(ids):
            shown += stream.push(token)
            assert tokenizer.decode(ids, skip_special_tokens=True).startswith(shown), (ids, i)


def test_spaces_and_bytes_follow_the_context():
    tokenizer = word_tokenizer()
    assert split_tokens(tokenizer, [0, 1, 2]) == ["the", " cat", "s"]
    assert [TextStream(tokenizer, context=[0]).push(1), TextStream(tokenizer).push(1)] == [" cat", "cat"]
    assert split_tokens(tokenizer, [0, 3, 4, 5, 1]) == ["the", "", "", "\u20ac", " cat"]
    assert split_tokens(tokenizer, [0, 3, 4, 1]) == ["the", "", "", "\ufffd\ufffd cat"]


def test_a_context_that_ends_inside_a_character():
    assert TextStream(byte_tokenizer(), context=[0x61, 0xC3]).push(0xA9) == "\u00e9"


def cut(tokens: list[int], stop: list[str], first: int = 0) -> tuple[str, str | None, int]:
    """What a whole text shows, what stopped it and after how many tokens; by looking at every prefix anew."""
    decode = byte_tokenizer().decode
    start = len(decode(tokens[:first]))
    for count in range(first + 1, len(tokens) + 1):
        text = decode(tokens[:count]).rstrip("\ufffd")
        found = [(at, -len(string), string) for string in stop if (at := text.find(string, start)) >= 0]
        if found:
            at, _, string = min(found)
            return text[:at], string, count
    return decode(tokens), None, len(tokens)


@pytest.mark.parametrize("first", [0, 4])
def test_stop_strings_cut_where_they_begin(first):
    draw = random.Random(5 + first)
    stopped = 0
    for _ in range(400):
        tokens = [draw.choice(b"aab\n") for _ in range(draw.randrange(1, 16))]
        stop = ["".join(draw.choice("ab\n") for _ in range(draw.randrange(1, 5))) for _ in range(draw.randrange(1, 4))]
        shown, by, count = cut(tokens, stop, first)
        output, got = OutputText(byte_tokenizer(), stop, min_tokens=first), []
        for number, token in enumerate(tokens, start=1):
            got.append(output.push(token))
            assert shown.startswith("".join(got)), "text behind the cut was shown"
            assert (output.stopped_by is not None) == (by is not None and number >= count)
        got.append(output.finish())
        assert ("".join(got), output.stopped_by) == (shown, by)
        stopped += by is not None
    assert 100 < stopped < 390


def test_text_that_may_begin_a_stop_string_is_held_back():
    output = OutputText(byte_tokenizer(), ["END", "D!"])
    assert [output.push(token) for token in b"aENx"] == ["a", "", "", "ENx"]
    assert [output.push(token) for token in b"EN"] == ["", ""]
    assert output.finish() == "EN"


@pytest.mark.parametrize(("shows", "text"), [(False, "ab"), (True, "ab\n\n")])
def test_the_stop_string_is_shown_on_demand(shows, text):
    output = OutputText(byte_tokenizer(), ["\n\n"], shows_stop=shows)
    assert "".join(output.push(token) for token in b"ab\n\ncd") + output.finish() == text


def test_end_tokens_show_no_text():
    output = OutputText(byte_tokenizer(), end_token_ids=frozenset({ord("b")}))
    assert [output.push(token) for token in b"abc"] == ["a", "", ""]
    assert output.stopped_by == ord("b")
    assert output.finish() == ""

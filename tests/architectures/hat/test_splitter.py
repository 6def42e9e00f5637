"""HAT's splitter against the official one's outputs, and its laws on any text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everytoken.architectures.hat.splitter import split
from everytoken.architectures.hat.tokenization_hat import HATTokenizer
from everytoken.core.errors import BadInputError

OFFICIAL = {
    "Hello, world!": ["Hello,", " world!"],
    "how_are_you": ["how_", "are_", "you"],
    "x = 3.14;": ["x", " =", " 3.", "14;"],
    "don't stop": ["don'", "t", " stop"],
    '"Quoted" (text)...': ['"', 'Quoted"', " (", "text)..."],
    "foo  (bar)": ["foo", "  ", "(", "bar)"],
    "HTMLParser v2": ["HTMLParser", " v2"],
    "  two\r\n a\t\tb \n": ["  ", "two", "\r\n", " a", "\t", "\t", "b", " ", "\n"],
    "日本語テキスト für Straße": ["日", "本", "語", "テキスト", " für", " Straße"],
    "a€ $5 ==> x": ["a", "€", " $", "5", " =", "=", ">", " x"],
    "Ab1C aB1c 1aB a1b2C": ["Ab1C", " a", "B1c", " 1a", "B", " a1b2C"],
    "b\n>}\x1c?1~": ["b", "\n", ">}", "\x1c?", "1", "~"],
    "aЖ'é1👩": ["a", "Ж'", "é1", "👩"],
    "👨‍👩‍👧 hi": ["👨‍👩‍👧", " hi"],
    "": [],
}


@pytest.mark.parametrize("text", OFFICIAL)
def test_official_outputs(text):
    assert split(text) == OFFICIAL[text]


def test_the_limit_by_hand():
    assert split("verylongword", 10) == [b"verylongwo", b"rd"]
    assert split("für", 2) == [b"f", "ü".encode(), b"r"]
    assert split("👩", 2) == [b"\xf0\x9f", b"\x91\xa9"]
    with pytest.raises(BadInputError, match="one byte at least"):
        split("word", 0)


# many scripts and all that joins or cuts; not every character, for libraries know other versions of Unicode
TEXT = st.text(alphabet="abAB1 _.,'\n\t\r\x1c=$é日ßЖж\u0301\u200d👩👧🇩🇪\u00a0\u3000«»—٣ーア한", max_size=20)


@settings(deadline=None, max_examples=100)
@given(TEXT)
def test_words_put_together_are_the_text(text):
    assert "".join(split(text)) == text
    limited = split(text, 5)
    assert b"".join(limited) == text.encode() and all(len(word) <= 5 for word in limited)


@settings(deadline=None, max_examples=50)
@given(TEXT)
def test_text_that_is_appended_only_lets_the_last_word_grow(text):
    whole = split(text)
    for end in range(1, len(text)):
        words = split(text[:end])
        assert words[:-1] == whole[: len(words) - 1]
        assert whole[len(words) - 1].startswith(words[-1])


@settings(deadline=None, max_examples=100)
@given(TEXT)
def test_the_official_wheel_says_the_same(text):
    official = pytest.importorskip("hat_splitter").HATSplitter()
    assert [word.encode() for word in split(text)] == list(official.split_with_limit(text, 10**6))


def test_the_tokenizer_gives_the_text_back(tmp_path):
    tokenizer = HATTokenizer(max_word_bytes=8)
    for text in (*OFFICIAL, "unbelievably long_words für 日本語"):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == 0xC0
        assert tokenizer.decode(ids) == text
        assert bytes(item for item in ids if item != 0xC0) == text.encode()
    closed = HATTokenizer(close=True)("two words")["input_ids"]
    assert closed[-1] == 0xC0 and closed[:-1] == HATTokenizer()("two words")["input_ids"]
    tokenizer.save_pretrained(tmp_path)
    again = HATTokenizer.from_pretrained(tmp_path)
    assert again.max_word_bytes == 8
    assert again("unbelievably")["input_ids"] == tokenizer("unbelievably")["input_ids"]
    batch = tokenizer(["a b", "longer text"], padding=True, padding_side="left")
    assert batch["input_ids"][0][0] == 0xC1
    assert batch["attention_mask"][0][0] == 0

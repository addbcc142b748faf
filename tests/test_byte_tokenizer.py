"""The tokenizer against Python's own codecs: `str.encode`, `bytes.decode`, and the operating system's argv."""

import doctest
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import byte_tokenizer
from byte_tokenizer import EOS_ID, VOCAB_SIZE, StreamDecoder, decode, encode, one_line, visible

ALL_BYTES = bytes(range(256))
# Well-formed, cut, overlong, too large, surrogate and stray sequences: what a decoder can trip over.
TRICKY = (
    b"a\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80\xf0\x90\x80a\xc0\xaf\xf5\x80\xed\xa0\x80\xfe\xff\x00\xef\xbb\xbf\xe2\x82"
)
# Any str that Python can hold: hypothesis leaves surrogates out unless told.
ANY_TEXT = st.text(st.characters(codec=None, exclude_categories=()))
# Bytes in which UTF-8 sequences, whole and broken, are frequent.
UTF8_LIKE = st.lists(
    st.sampled_from([b"a", b"\xc3", b"\xa9", b"\xe2", b"\x82", b"\xf0", b"\x9f", b"\x80", b"\xed\xa0"])
)


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    """Cuts `data` at the given offsets."""
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    return [data[start:end] for start, end in zip(edges, edges[1:], strict=False)]


def test_the_vocabulary_is_the_bytes_and_the_end_is_zero() -> None:
    assert VOCAB_SIZE == 256
    assert EOS_ID == 0
    assert encode("\0") == bytes([EOS_ID])


@given(st.text())
def test_text_becomes_its_utf8_bytes_and_comes_back(text: str) -> None:
    ids = encode(text)
    assert type(ids) is bytes
    assert ids == text.encode("utf-8")
    assert decode(ids) == text


@given(st.binary())
@example(ALL_BYTES)
def test_bytes_that_are_no_utf8_come_through_exactly(data: bytes) -> None:
    assert encode(data.decode("utf-8", "surrogateescape")) == data
    assert encode(decode(data, errors="surrogateescape")) == data


def test_bytes_from_a_command_line_come_through_exactly() -> None:
    data = bytes(range(1, 256))  # a command line cannot hold a zero
    code = "import sys, byte_tokenizer; sys.stdout.buffer.write(byte_tokenizer.encode(sys.argv[1]))"
    folder = str(byte_tokenizer.__file__).rpartition("/")[0]
    child = subprocess.run(
        [sys.executable, "-X", "utf8", "-c", code, data], capture_output=True, cwd=folder, check=True
    )
    assert child.stdout == data


@given(ANY_TEXT)
@example("a\ud800b")
@example("\udc7f\udd00")
@example("\udc80\udcff\udbff")
def test_a_surrogate_that_escapes_no_byte_becomes_the_replacement_character(text: str) -> None:
    expected = b"".join(
        bytes([ord(c) - 0xDC00])
        if 0xDC80 <= ord(c) <= 0xDCFF
        else "\ufffd".encode()
        if 0xD800 <= ord(c) <= 0xDFFF
        else c.encode()
        for c in text
    )
    assert encode(text) == expected


@given(st.binary() | UTF8_LIKE.map(b"".join), st.sampled_from(["replace", "ignore", "backslashreplace"]))
@example(TRICKY, "replace")
def test_decode_is_bytes_decode(data: bytes, errors: str) -> None:
    assert decode(data, errors) == data.decode("utf-8", errors)


def test_decode_passes_strict_on() -> None:
    with pytest.raises(UnicodeDecodeError):
        decode(b"\xff", errors="strict")


@pytest.mark.parametrize(
    "make",
    [
        bytes,
        bytearray,
        memoryview,
        list,
        tuple,
        iter,
        lambda data: (i for i in data),
        lambda data: np.frombuffer(data, dtype=np.uint8),
        lambda data: np.frombuffer(data, dtype=np.uint8).astype(np.int64),
        lambda data: list(np.frombuffer(data, dtype=np.uint8)),
        lambda data: torch.tensor(list(data)),
        lambda data: torch.tensor(list(data), dtype=torch.uint8),
        lambda data: list(torch.tensor(list(data))),
    ],
)
def test_every_kind_of_sequence_is_accepted(make) -> None:
    assert decode(make(TRICKY)) == TRICKY.decode("utf-8", "replace")
    assert decode(make(b"x")) == "x"
    assert StreamDecoder().feed(make("é".encode())) == "é"


@pytest.mark.parametrize("wrong", [256, -1, 257, 100_000, -(2**70)])
@pytest.mark.parametrize("wrap", [list, tuple, iter])
def test_an_id_outside_the_vocabulary_is_named(wrong: int, wrap) -> None:
    with pytest.raises(ValueError, match=f"token id {wrong} is outside 0..255"):
        decode(wrap([65, wrong, 66]))
    with pytest.raises(ValueError, match=f"token id {wrong} is outside 0..255"):
        StreamDecoder().feed(wrap([65, wrong, 66]))


def test_an_id_outside_the_vocabulary_is_named_in_tensors_and_arrays() -> None:
    with pytest.raises(ValueError, match="token id 256 "):
        decode(torch.tensor([1, 256]))
    with pytest.raises(ValueError, match="token id -7 "):
        decode(np.array([1, -7]))


@pytest.mark.parametrize("wrong", [5, None, "text", [1.0], [[1, 2]], np.ones((2, 2), dtype=int), torch.tensor(3)])
def test_values_other_than_ids_are_a_type_error(wrong) -> None:
    with pytest.raises(TypeError):  # and decode(5) is not five zeros
        decode(wrong)


@given(st.binary() | UTF8_LIKE.map(b"".join) | st.text().map(str.encode), st.lists(st.integers(0, 40)))
@example(TRICKY, list(range(len(TRICKY))))
def test_a_stream_gives_the_full_text_however_it_is_divided(data: bytes, cuts: list[int]) -> None:
    stream = StreamDecoder()
    for _ in range(2):  # the second time after a flush
        assert "".join([stream.feed(piece) for piece in pieces(data, cuts)] + [stream.flush()]) == decode(data)


@given(st.text(), st.lists(st.integers(0, 40)))
def test_a_stream_shows_each_character_as_soon_as_it_is_complete_and_no_sooner(text: str, cuts: list[int]) -> None:
    stream, shown, fed = StreamDecoder(), "", b""
    for piece in pieces(text.encode(), cuts):
        fed += piece
        shown += stream.feed(piece)
        assert shown == fed.decode("utf-8", "ignore")  # all whole characters: the text itself holds no errors


def test_a_flush_ends_a_cut_character_and_forgets_it() -> None:
    stream = StreamDecoder()
    assert stream.feed(b"a\xe2\x82") == "a"
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""
    assert stream.feed(b"\xac") == "\ufffd"
    assert stream.feed(b"b") == "b"


def test_a_refused_feed_leaves_the_stream_as_it_was() -> None:
    stream = StreamDecoder()
    stream.feed(b"\xe2\x82")
    with pytest.raises(ValueError, match="token id 300 "):
        stream.feed([0xAC, 300])
    assert stream.feed(b"\xac") == "€"


def test_the_examples_in_the_documentation() -> None:
    result = doctest.testmod(byte_tokenizer)
    assert result.attempted > 0
    assert result.failed == 0


@given(ANY_TEXT)
@example("a\x1b[31m\x07\x9b\u202eb\u2028\u2029\u200b\r\n\tc\x7f\U000e0041")
def test_no_character_that_controls_a_terminal_is_visible(text: str) -> None:
    kinds = {c: unicodedata.category(c) for c in visible(text)}
    assert not [c for c, kind in kinds.items() if kind in ("Cc", "Cf", "Zl", "Zp") and c not in "\n\t"]
    assert len(one_line(text).splitlines()) <= 1
    plain = "".join(c for c in text if c == " " or c.isprintable())
    assert visible(plain) == one_line(plain) == plain

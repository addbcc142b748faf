"""Text to bytes and back: the tokenizer of a model whose vocabulary is the 256 bytes.

A byte-level tokenizer has nothing to train and no table: the id of a token is the value of a byte, and text
becomes ids by being written as UTF-8. A Python `bytes` object already is an immutable sequence of integers from 0 to
255, so it is the token sequence, and `torch.frombuffer` or `numpy.frombuffer` reads it without a copy.

Two things remain:

* One character is one to four bytes, and a model emits one byte at a time, in any order. `StreamDecoder` holds back the
  start of a character until the rest of it arrives, so that text can be shown while it is generated.
* One id has to mean the end of a document. Byte 0 hardly ever occurs in text, so it is that id (`EOS_ID`): it stands
  between the documents of a corpus and ends a generation.
"""

import codecs
import operator
import re
import unicodedata
from collections.abc import Iterable

VOCAB_SIZE = 256
EOS_ID = 0

# Every surrogate that is not U+DC80..U+DCFF, the 128 by which "surrogateescape" carries a byte that is no UTF-8.
_LONE_SURROGATE = re.compile("[\ud800-\udc7f\udd00-\udfff]")


def encode(text: str) -> bytes:
    """Turns text into token ids: its UTF-8 bytes.

    Any `str` is accepted. Bytes which were no UTF-8 when the operating system handed them over (argv, stdin or file
    names, which Python escapes as U+DC80..U+DCFF) come out exactly as they came in. Every other surrogate stands for no
    character and for no byte, so it becomes U+FFFD, the replacement character, instead of an error.

    Args:
        text: The text; may be empty.

    Returns:
        The ids, each 0..255; between one and four per character. `decode` inverts this for text without surrogates,
        and `decode(..., errors="surrogateescape")` for escaped bytes as well.
    """
    return _LONE_SURROGATE.sub("\ufffd", text).encode("utf-8", "surrogateescape")


def decode(ids: Iterable[int] | bytes, errors: str = "replace") -> str:
    """Turns token ids into text.

    Args:
        ids: Ids 0..255: bytes, any iterable of integers, or a one-dimensional integer tensor or array.
        errors: How bytes that are no UTF-8 are treated, as in `bytes.decode`. By default each such sequence becomes
            U+FFFD, because a model may emit anything.

    Returns:
        The text.

    Raises:
        ValueError: An id is outside 0..255.
        TypeError: An id is no integer, or `ids` is no sequence of them.
    """
    return _to_bytes(ids).decode("utf-8", errors)


class StreamDecoder:
    """Decodes ids as they arrive, into complete characters.

    The outputs of `feed` and the final `flush` concatenate to `decode` of all ids, however these were divided.

    Example:
        >>> stream = StreamDecoder()
        >>> stream.feed(b"caf\\xc3"), stream.feed([0xA9]), stream.flush()
        ('caf', 'é', '')
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, ids: Iterable[int] | bytes) -> str:
        """Takes the next ids, of any number.

        Args:
            ids: As for `decode`.

        Returns:
            The text they complete; empty while a character is still unfinished.

        Raises:
            ValueError: An id is outside 0..255; none of these ids is taken then.
            TypeError: As for `decode`; none of these ids is taken then.
        """
        return self._decoder.decode(_to_bytes(ids))

    def flush(self) -> str:
        """Ends the text.

        Returns:
            U+FFFD if the ids stopped within a character, else an empty string. The decoder is as new afterwards.
        """
        return self._decoder.decode(b"", final=True)


def _to_bytes(ids: Iterable[int] | bytes) -> bytes:
    """Checks ids and packs them.

    Goes by way of `tolist` where there is one: tensors and arrays iterate slowly, and `bytes(array)` would give the
    bytes of the array's memory (eight per int64) instead of one byte per id.
    """
    if isinstance(ids, (bytes, bytearray)):
        return bytes(ids)
    values = [operator.index(value) for value in (ids.tolist() if hasattr(ids, "tolist") else ids)]
    try:
        return bytes(values)
    except ValueError:
        wrong = next(value for value in values if not 0 <= value < VOCAB_SIZE)
        raise ValueError(f"token id {wrong} is outside 0..{VOCAB_SIZE - 1}") from None


def visible(text: str) -> str:
    r"""Escapes the characters that would control a terminal or stay invisible: ESC becomes `\x1b`.

    These are the control characters except newline and tab, the format characters, which can reverse the direction of
    text, and Unicode's line and paragraph separators (categories Cc, Cf, Zl and Zp).
    """
    return "".join(
        c.encode("unicode_escape").decode("ascii")
        if c not in "\n\t" and unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp")
        else c
        for c in text
    )


def one_line(text: str) -> str:
    """Escapes like `visible`, and replaces newlines and tabs by spaces: a file's name that is quoted may hold them."""
    return visible(text).replace("\n", " ").replace("\t", " ")

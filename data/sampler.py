"""Which sequences a step trains on and an evaluation measures: functions of numbers, without a state or a table."""

import heapq
import math
import os
import zlib
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from command import shorten
from data.prepare import ByteFile, DataError, read_sequences

VAL_FRACTION = 0.1


class JoinedCorpus:
    """Several corpora behind each other, read as one."""

    def __init__(self, corpora: "Sequence[Corpus]"):
        self.corpora, self.sizes = corpora, [len(corpus) for corpus in corpora]
        self.begins = np.cumsum([0, *self.sizes]).tolist()

    def __len__(self) -> int:
        return self.begins[-1]

    def __getitem__(self, key: slice) -> np.ndarray:
        """Reads `data[start:stop]` into memory, uint8."""
        start, stop, _ = key.indices(len(self))
        return self.read(np.array([start]), max(stop - start, 0))[0]

    def read(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Reads sequences as `ByteFile.read` does."""
        rows = np.empty((len(starts), length), dtype=np.uint8)
        for row, start in zip(rows, starts.tolist(), strict=True):
            while len(row):  # until the end of the sequence, or of a corpus within it
                i = bisect_right(self.begins, start) - 1
                first = start - self.begins[i]
                values = self.corpora[i][first : first + len(row)]
                row[: len(values)] = values
                row, start = row[len(values) :], start + len(values)
        return rows


Corpus = ByteFile | np.ndarray | JoinedCorpus


class SequenceSampler:
    """Sequences of a corpus in a random order that is a function of `seed` and position.

    Each epoch cuts the corpus of `n_bytes` into sequences of `seq_len` targets (one more byte is read), at an offset of
    its own, and goes through all of them once in an order of its own. Positions count sequences from the start of
    training. The order is a permutation of 0..n-1: a Feistel network on the smallest even number of bits, applied again
    while its result is not below n ("cycle walking").
    """

    def __init__(self, n_bytes: int, seq_len: int, seed: int):
        self.last_start, self.seq_len, self.seed = n_bytes - 1 - seq_len, seq_len, seed
        # one more than fit side by side: the first and the last of a shifted cut overlap their neighbours
        self.n_sequences = -(-(n_bytes - 1) // seq_len) + 1
        self._half_bits = np.uint64(max(1, math.ceil(math.log2(self.n_sequences) / 2)))

    def starts(self, position: int, count: int) -> np.ndarray:
        """Returns the offsets of the sequences at `position` to `position + count - 1`, int64 (count,)."""
        first_epoch, first = divmod(position, self.n_sequences)  # of Python's integers, which do not overflow
        epochs, index = np.divmod(first + np.arange(count), self.n_sequences)
        starts = np.empty(count, dtype=np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            key = np.random.default_rng([self.seed, first_epoch + int(epoch)])
            offset = int(key.integers(self.seq_len))
            keys = key.integers(1 << 63, size=4, dtype=np.uint64)
            number = self._permute(index[chosen].astype(np.uint64), keys).astype(np.int64)
            starts[chosen] = np.clip((number - 1) * self.seq_len + offset, 0, self.last_start)
        return starts

    def _permute(self, x: np.ndarray, keys: np.ndarray) -> np.ndarray:
        x = self._feistel(x, keys)
        while (outside := x >= self.n_sequences).any():
            x[outside] = self._feistel(x[outside], keys)
        return x

    def _feistel(self, x: np.ndarray, keys: np.ndarray) -> np.ndarray:
        bits, mask = self._half_bits, (np.uint64(1) << self._half_bits) - np.uint64(1)
        left, right = x >> bits, x & mask
        for key in keys:
            mixed = (right + key) * np.uint64(0x9E3779B97F4A7C15)  # any odd number with well-spread bits
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
        return left << bits | right


class MixtureSampler:
    """Sequences of several corpora, each with its share at all times, in an order that follows from seed and position.

    Each corpus goes through its own sequences as in `SequenceSampler`. A binary tree assigns positions to corpora:
    of the first n sequences of a node, one child gets its share of n, rounded, and the other the rest. The tree is
    Huffman's, in which an inner node has at most 2/3 of its parent's weight, so rounding errors of the levels fade: no
    corpus is ever two sequences off its share, and of two corpora neither more than half of one.

    Args:
        sizes: Bytes of the corpora, which follow each other in a `JoinedCorpus`.
        weights: Their shares of the sequences, positive, in any unit; by default their sizes.
    """

    def __init__(self, sizes: Sequence[int], seq_len: int, seed: int, weights: Sequence[float] | None = None):
        self.seq_len = seq_len
        self._begins = np.cumsum([0, *sizes])
        # the first corpus has the order that it has alone, and two with the same content have different ones
        self._samplers = [SequenceSampler(size, seq_len, seed + (i << 64)) for i, size in enumerate(sizes)]
        nodes: list[Any] = [(Fraction(weight), i, i) for i, weight in enumerate(weights or sizes)]
        heapq.heapify(nodes)
        for i in range(len(sizes), 2 * len(sizes) - 1):  # the number decides between equal weights
            (light, _, left), (heavy, _, right) = heapq.heappop(nodes), heapq.heappop(nodes)
            heapq.heappush(nodes, (light + heavy, i, (light / (light + heavy), left, right)))
        self._root = nodes[0][2]

    def starts(self, position: int, count: int) -> np.ndarray:
        """Returns the offsets in the joined corpora of the sequences from `position` on, int64 (count,)."""
        starts = np.empty(count, dtype=np.int64)
        self._fill(starts, np.arange(count), self._root, position)
        return starts

    def _fill(self, starts: np.ndarray, places: np.ndarray, node: Any, position: int) -> None:
        """Fills in the sequences of a node from `position` on at `places`."""
        if isinstance(node, int):
            starts[places] = self._begins[node] + self._samplers[node].starts(position, len(places))
            return
        share, left, right = node
        up, down = share.as_integer_ratio()
        before = (2 * position * up + down) // (2 * down)  # rounded, in Python's integers, which do not overflow
        positions = range(position, position + len(places) + 1)
        is_left = np.diff([(2 * n * up + down) // (2 * down) - before for n in positions]) > 0
        self._fill(starts, places[is_left], left, before)
        self._fill(starts, places[~is_left], right, position - before)


class EvaluationBatches:
    """Batches of sequences that follow each other and cover a split, or `limit` of them, evenly spread over it.

    The rest at the end of the split is one shorter sequence, unless there is a limit. `n_targets` is the number of
    bytes that all batches together predict.
    """

    def __init__(self, n_bytes: int, seq_len: int, batch_size: int, limit: int | None = None):
        self.seq_len, self.batch_size = seq_len, batch_size
        self.n_available, self.rest = divmod(n_bytes - 1, seq_len)
        self.n_sequences = self.n_available
        if limit is not None and limit < self.n_available:
            self.n_sequences, self.rest = limit, 0
        self.n_targets = self.n_sequences * seq_len + self.rest

    def __len__(self) -> int:
        n_full = -(-self.n_sequences // self.batch_size)
        return n_full + 1 if self.rest else n_full

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        """Returns offsets in the split, int64 (sequences,), and the number of targets of each sequence."""
        first = i * self.batch_size
        if first >= self.n_sequences:
            return np.array([self.n_available * self.seq_len]), self.rest
        numbers = range(first, min(first + self.batch_size, self.n_sequences))
        gaps = max(self.n_sequences - 1, 1)  # as many as between all that there are, unless there is a limit
        return np.array([n * (self.n_available - 1) // gaps * self.seq_len for n in numbers]), self.seq_len


def read_bytes(data: Corpus, starts: np.ndarray, seq_len: int, device: str) -> torch.Tensor:
    """Reads sequences of a corpus with the byte after each, uint8 (len(starts), seq_len + 1)."""
    batch = torch.from_numpy(read_sequences(data, starts, seq_len + 1))
    if torch.device(device).type == "cuda":
        batch = batch.pin_memory()  # from other memory, a copy waits for what the GPU has to do before
    return batch.to(device, non_blocking=True)


def read_batch(data: Corpus, starts: np.ndarray, seq_len: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Reads sequences of a corpus: tokens and targets, int64 (len(starts), seq_len) each, one byte apart."""
    batch = read_bytes(data, starts, seq_len, device).long()  # widened on the device
    return batch[:, :-1], batch[:, 1:]


def split(data: Corpus | list[Corpus], seq_len: int, val_data: Corpus | None = None) -> tuple[Corpus, Corpus]:
    """Splits data for training and validation, which is the last tenth; of several corpora the last tenth of each.

    With `val_data`, that is validated on, and all of `data` trained on. Raises a DataError if something is too short.
    """
    corpora = data if isinstance(data, list) else [data]
    pairs = [_split(corpus, seq_len, VAL_FRACTION if val_data is None else 0.0) for corpus in corpora]
    train, val = ([pair[i] for pair in pairs] for i in range(2))
    return _join(train), _join(val) if val_data is None else val_data


def _split(corpus: Any, seq_len: int, val_fraction: float) -> tuple[Corpus, Corpus]:
    n_train = int((1 - val_fraction) * len(corpus))
    if n_train < seq_len + 1 or val_fraction and len(corpus) - n_train < 2:
        name = f"{shorten(os.fsdecode(corpus.path))}: " if isinstance(corpus, ByteFile) else ""
        where = "the first nine tenths" if val_fraction else "they"
        raise DataError(
            f"{name}{len(corpus)} bytes are too few: {where} must hold a sequence of {seq_len + 1}; "
            "use more data, or a config with a smaller max_seq_len"
        )
    return corpus.split(n_train) if isinstance(corpus, ByteFile) else (corpus[:n_train], corpus[n_train:])


def _join(corpora: list[Corpus]) -> Corpus:
    return corpora[0] if len(corpora) == 1 else JoinedCorpus(corpora)


def fingerprint(data: Corpus) -> int:
    """A CRC-32 of some pages of a corpus: 64 of 4 KiB, evenly spread, since 10 GB would take long to read."""
    if isinstance(data, JoinedCorpus):
        return zlib.crc32(repr([(len(corpus), fingerprint(corpus)) for corpus in data.corpora]).encode())
    offsets = np.linspace(0, max(len(data) - 4096, 0), 64).astype(np.int64).tolist()
    return zlib.crc32(b"".join(data[offset : offset + 4096].tobytes() for offset in offsets))

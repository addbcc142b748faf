"""Which sequences a step trains on and an evaluation measures: functions of numbers, without a state or a table."""

import math
import zlib

import numpy as np
import torch

from data.prepare import ByteFile, DataError, read_sequences

VAL_FRACTION = 0.1
Corpus = ByteFile | np.ndarray


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


class EvaluationBatches:
    """Batches of sequences that follow each other and cover a split, or `limit` of them, evenly spread over it.

    What remains at the end of the split is one shorter sequence, unless there is a limit. `n_targets` is the number of
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
        return -(-self.n_sequences // self.batch_size) + (self.rest > 0)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        """Returns offsets in the split, int64 (sequences,), and the number of targets of each sequence."""
        first = i * self.batch_size
        if first >= self.n_sequences:
            return np.array([self.n_available * self.seq_len]), self.rest
        numbers = range(first, min(first + self.batch_size, self.n_sequences))
        gaps = max(self.n_sequences - 1, 1)  # as many as between all that there are, unless there is a limit
        return np.array([n * (self.n_available - 1) // gaps * self.seq_len for n in numbers]), self.seq_len


def read_batch(data: Corpus, starts: np.ndarray, seq_len: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Reads sequences of a corpus: tokens and targets, int64 (len(starts), seq_len) each, one byte apart."""
    batch = torch.from_numpy(read_sequences(data, starts, seq_len + 1)).to(device).long()  # widened on the device
    return batch[:, :-1], batch[:, 1:]


def split(data: Corpus, seq_len: int) -> tuple[Corpus, Corpus]:
    """Splits a corpus for training and validation, which is its last tenth; a DataError if one is too short."""
    n_train = int((1 - VAL_FRACTION) * len(data))
    if n_train < seq_len + 1 or len(data) - n_train < 2:
        raise DataError(
            f"{len(data)} bytes are too few: the first nine tenths must hold a sequence of {seq_len + 1}; "
            "use more data, or a config with a smaller max_seq_len"
        )
    return data.split(n_train) if isinstance(data, ByteFile) else (data[:n_train], data[n_train:])


def fingerprint(data: Corpus) -> int:
    """A CRC-32 of some pages of a corpus: 64 of 4 KiB, evenly spread, since 10 GB would take long to read."""
    offsets = np.linspace(0, max(len(data) - 4096, 0), 64).astype(np.int64).tolist()
    return zlib.crc32(b"".join(data[offset : offset + 4096].tobytes() for offset in offsets))

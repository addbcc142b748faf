"""The order of sequences against brute force: every byte once an epoch, whatever the batches."""

import contextlib
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.prepare import DataError, open_bytes
from data.sampler import EvaluationBatches, SequenceSampler, fingerprint, read_batch, split

draws = settings(max_examples=60, deadline=None, derandomize=True, database=None)
corpora = st.integers(1, 40).flatmap(lambda seq_len: st.tuples(st.integers(seq_len + 1, 1500), st.just(seq_len)))


@draws
@given(corpora, st.integers(0, 2**40), st.integers(0, 5))
def test_each_epoch_goes_through_all_sequences_once(sizes: tuple[int, int], seed: int, epoch: int) -> None:
    n_bytes, seq_len = sizes
    sampler = SequenceSampler(n_bytes, seq_len, seed)
    n = sampler.n_sequences
    starts = sampler.starts(epoch * n, n)
    assert starts.dtype == np.int64 and starts.shape == (n,)
    assert starts.min() >= 0 and starts.max() + seq_len + 1 <= n_bytes
    # the sequences of a cut at some offset, each of them once, in any order
    cuts = [np.clip((np.arange(n) - 1) * seq_len + offset, 0, n_bytes - 1 - seq_len) for offset in range(seq_len)]
    assert any(np.array_equal(np.sort(starts), cut) for cut in cuts)
    targets = starts[:, None] + 1 + np.arange(seq_len)
    assert np.array_equal(np.unique(targets), np.arange(1, n_bytes))
    order = sampler._permute(np.arange(n, dtype=np.uint64), np.arange(4, dtype=np.uint64) + np.uint64(seed))
    assert np.array_equal(np.sort(order), np.arange(n, dtype=np.uint64))


@draws
@given(corpora, st.integers(0, 99), st.lists(st.integers(1, 50), min_size=1, max_size=8), st.integers(0, 10**6))
def test_batches_do_not_matter(sizes: tuple[int, int], seed: int, batches: list[int], position: int) -> None:
    at_once = SequenceSampler(*sizes, seed).starts(position, sum(batches))
    sampler, begins = SequenceSampler(*sizes, seed), position + np.cumsum([0, *batches[:-1]])
    parts = [sampler.starts(int(begin), count) for begin, count in zip(begins, batches, strict=True)]
    assert np.array_equal(np.concatenate(parts), at_once)


def test_epochs_and_seeds_differ() -> None:
    sampler = SequenceSampler(10_000, 10, 0)
    n = sampler.n_sequences
    orders = [tuple(sampler.starts(epoch * n, n)) for epoch in range(4)]
    orders += [tuple(SequenceSampler(10_000, 10, seed).starts(0, n)) for seed in range(1, 5)]
    assert len(set(orders)) == len(orders)
    offsets = {min(start for start in order if start > 0) for order in orders}
    assert len(offsets) > 2
    assert SequenceSampler(10_000, 10, 0).starts(0, n).tolist() == list(orders[0])


def test_order_looks_random() -> None:
    """No correlation between neighbours, and every part of the corpus equally often early in the epoch."""
    sampler = SequenceSampler(1_000_000, 10, 0)
    starts = sampler.starts(0, 20_000) / 1_000_000
    assert abs(np.corrcoef(starts[:-1], starts[1:])[0, 1]) < 0.03  # 4 sigma
    counts = np.histogram(starts, bins=20, range=(0, 1))[0]
    assert abs(counts - 1000).max() < 150  # 4.7 sigma


def test_huge_corpora_need_no_memory() -> None:
    tracemalloc.start()
    try:
        sampler = SequenceSampler(10**10, 128, 0)
        starts = sampler.starts(10**12, 1000)  # late as well
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert starts.min() >= 0 and starts.max() + 129 <= 10**10
    assert 4e9 < starts.mean() < 6e9 and len(set(starts.tolist())) > 990


def test_targets_are_a_byte_apart() -> None:
    data = np.arange(100, dtype=np.uint8)
    tokens, targets = read_batch(data, np.array([3, 90]), 9, "cpu")
    assert tokens.dtype == targets.dtype == torch.int64
    assert tokens.tolist() == [list(range(3, 12)), list(range(90, 99))]
    assert targets.tolist() == [list(range(4, 13)), list(range(91, 100))]


def test_validation_is_the_last_tenth() -> None:
    for n in [*range(40, 3000), 99_999, 10**6 + 1, 1_115_394, 10**8]:
        data = np.broadcast_to(np.zeros(1, np.uint8), n)
        first, last = split(data, 8)
        assert len(first) == n * 9 // 10 and len(first) + len(last) == n
    data = np.arange(200, dtype=np.uint8)
    assert np.concatenate(split(data, 8)).tolist() == data.tolist()


@pytest.mark.parametrize(("n_bytes", "fits"), [(36, False), (37, True), (10, False), (1, False)])
def test_too_short_a_corpus(n_bytes: int, fits: bool) -> None:
    data = np.zeros(n_bytes, np.uint8)
    with contextlib.nullcontext() if fits else pytest.raises(DataError, match=f"^{n_bytes} bytes .* 33[^\n]*$"):
        split(data, 32)


@draws
@given(st.integers(2, 600), st.integers(1, 40), st.integers(1, 9), st.one_of(st.none(), st.integers(1, 700)))
def test_evaluation_covers_a_split_once(n_bytes: int, seq_len: int, batch_size: int, limit: int | None) -> None:
    """Or so many sequences of it, evenly spread from the first to the last."""
    batches = EvaluationBatches(n_bytes, seq_len, batch_size, limit)
    every = np.arange((n_bytes - 1) // seq_len) * seq_len
    rest = (n_bytes - 1) % seq_len
    if limit is not None and limit < len(every):
        positions = [i * (len(every) - 1) // max(limit - 1, 1) for i in range(limit)]
        every, rest = every[positions], 0
    found = [batches[i] for i in range(len(batches))]
    assert all(len(starts) <= batch_size for starts, _ in found)
    full = [start for starts, length in found if length == seq_len for start in starts.tolist()]
    assert full == every.tolist()
    assert [(starts.tolist(), length) for starts, length in found if length != seq_len] == (
        [([n_bytes - 1 - rest], rest)] if rest else []
    )
    assert batches.n_targets == sum(len(starts) * length for starts, length in found)


def test_evaluation_of_terabytes_needs_no_memory() -> None:
    tracemalloc.start()
    try:
        for limit in (None, 1000, 3 * 10**9):
            batches = EvaluationBatches(2 * 10**12 + 7, 256, 32, limit)
            starts, length = batches[len(batches) // 2]
            assert length == 256 and 0.9e12 < starts.min() < starts.max() < 1.1e12
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_positions_have_no_bound() -> None:
    """A damaged state may have any step; integers of 64 bits would overflow."""
    sampler = SequenceSampler(10_000, 10, 0)
    starts = sampler.starts(10**25, 100)
    assert len(set(starts.tolist())) > 90 and starts.max() + 11 <= 10_000


def test_files_and_arrays_are_read_alike(tmp_path: Path) -> None:
    content = np.random.default_rng(0).integers(256, size=50_000, dtype=np.uint8)
    (tmp_path / "data").write_bytes(content.tobytes())
    file = open_bytes(tmp_path / "data")
    assert fingerprint(file) == fingerprint(content) != fingerprint(content[::-1])
    parts, expected = split(file, 32), split(content, 32)
    for part, array in zip(parts, expected, strict=True):
        starts = np.array([0, len(array) - 33, 7])
        for ours, theirs in zip(read_batch(part, starts, 32, "cpu"), read_batch(array, starts, 32, "cpu"), strict=True):
            assert torch.equal(ours, theirs)
    os.truncate(tmp_path / "data", 100)
    with pytest.raises(DataError, match="data"):
        read_batch(parts[0], np.array([90]), 32, "cpu")

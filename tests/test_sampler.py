"""The order of sequences against brute force: every byte once an epoch, whatever the batches."""

import contextlib
import math
import os
import sys
import tracemalloc
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.prepare import DataError, open_bytes
from data.sampler import (
    EvaluationBatches,
    JoinedCorpus,
    MixtureSampler,
    SequenceSampler,
    fingerprint,
    read_batch,
    split,
)

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


# --- Several corpora --------------------------------------------------------------------------------------------------

mixtures = st.lists(st.integers(30, 900), min_size=1, max_size=7).flatmap(
    lambda sizes: st.tuples(
        st.just(sizes), st.none() | st.lists(st.floats(1e-3, 1e3), min_size=len(sizes), max_size=len(sizes))
    )
)


def corpus_of(sizes: list[int], starts: np.ndarray) -> np.ndarray:
    return np.searchsorted(np.cumsum(sizes), starts, side="right")


@draws
@given(mixtures, st.integers(1, 20), st.integers(0, 99), st.sampled_from([0, 1, 10**6, 10**25]))
def test_a_mixture_keeps_its_shares_and_each_corpus_its_own_order(
    mixture: tuple[list[int], list[float] | None], seq_len: int, seed: int, position: int
) -> None:
    sizes, weights = mixture
    starts = MixtureSampler(sizes, seq_len, seed, weights).starts(position, 600)
    which, begins = corpus_of(sizes, starts), np.cumsum([0, *sizes])
    assert (corpus_of(sizes, starts + seq_len) == which).all()  # no sequence crosses from one into another
    shares = [Fraction(weight) for weight in weights or sizes]
    for i, size in enumerate(sizes):
        found = starts[which == i] - begins[i]
        # as many as its share of all before, to within two, from where it went on
        earlier = position * shares[i] / sum(shares)
        alone = SequenceSampler(size, seq_len, seed + (i << 64))
        firsts = range(max(0, math.floor(earlier) - 2), math.ceil(earlier) + 3)
        assert any(np.array_equal(alone.starts(first, len(found)), found) for first in firsts)
        if position == 0:
            assert np.array_equal(alone.starts(0, len(found)), found)
            expected = np.arange(1, 601) * float(shares[i] / sum(shares))
            off = np.abs(np.cumsum(which == i) - expected).max()
            assert off < (2 if len(sizes) > 2 else 0.5 + 1e-9)


@draws
@given(mixtures, st.lists(st.integers(1, 50), min_size=1, max_size=8), st.integers(0, 10**6))
def test_batches_do_not_matter_to_a_mixture(mixture: tuple, batches: list[int], position: int) -> None:
    sizes, weights = mixture
    sampler, begins = MixtureSampler(sizes, 9, 5, weights), position + np.cumsum([0, *batches[:-1]])
    parts = [sampler.starts(int(begin), count) for begin, count in zip(begins, batches, strict=True)]
    assert np.array_equal(np.concatenate(parts), MixtureSampler(sizes, 9, 5, weights).starts(position, sum(batches)))


def test_many_equal_corpora_take_turns() -> None:
    for n in (2, 3, 10, 64, 100):
        which = corpus_of([50] * n, MixtureSampler([50] * n, 8, 0).starts(0, 20 * n))
        counts = np.cumsum(which[:, None] == np.arange(n), axis=0)
        assert np.abs(counts - np.arange(1, 20 * n + 1)[:, None] / n).max() < 1.5


def test_one_corpus_has_the_order_of_runs_before_there_were_mixtures() -> None:
    for weights in (None, [3.0]):
        ours = MixtureSampler([5000], 16, 7, weights).starts(12_345, 500)
        assert np.array_equal(ours, SequenceSampler(5000, 16, 7).starts(12_345, 500))
    pinned = [543, 1535, 9919, 3935, 351, 5407, 9855, 2943]  # by the sampler that was there before
    assert MixtureSampler([10_000], 32, 5).starts(1_000, 8).tolist() == pinned


def test_the_same_corpus_twice_is_not_the_same_order_twice() -> None:
    starts = MixtureSampler([9000, 9000], 8, 0).starts(0, 200)
    first, second = starts[starts < 9000], starts[starts >= 9000] - 9000
    assert len(first) == len(second) == 100 and len(set(first) & set(second)) < 30


def test_a_mixture_of_terabytes_is_cheap_late_in_a_run() -> None:
    sizes = [3 * 10**12, 10**4, 7 * 10**11]
    sampler = MixtureSampler(sizes, 128, 0, [1, 1e-9, 3])
    calls = []
    tracemalloc.start()
    sys.setprofile(lambda _, event, __: calls.append(event))
    try:
        starts = sampler.starts(10**15, 512)
    finally:
        sys.setprofile(None)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert len(calls) < 5000 and peak < 1 << 20
    assert np.abs(np.bincount(corpus_of(sizes, starts), minlength=3) - [128, 0, 384]).max() <= 2


@draws
@given(st.lists(st.integers(1, 60), min_size=1, max_size=6), st.data())
def test_joined_corpora_read_like_one_array(sizes: list[int], data: st.DataObject) -> None:
    parts = [np.random.default_rng(i).integers(256, size=n, dtype=np.uint8) for i, n in enumerate(sizes)]
    joined, whole = JoinedCorpus(parts), np.concatenate(parts)
    assert len(joined) == len(whole) and np.array_equal(joined[:], whole)
    length = data.draw(st.integers(0, len(whole)))
    starts = np.array(data.draw(st.lists(st.integers(0, len(whole) - length), max_size=5)), dtype=np.int64)
    rows = joined.read(starts, length)
    assert rows.shape == (len(starts), length)
    assert all(np.array_equal(row, whole[s : s + length]) for row, s in zip(rows, starts, strict=True))
    with pytest.raises(IndexError):
        joined.read(np.array([1]), len(whole))


def test_several_corpora_are_split_each(tmp_path: Path) -> None:
    arrays = [np.arange(n).astype(np.uint8) for n in (100, 57, 203)]
    train, val = split(list(arrays), 8)
    assert np.array_equal(train[:], np.concatenate([a[: len(a) * 9 // 10] for a in arrays]))
    assert np.array_equal(val[:], np.concatenate([a[len(a) * 9 // 10 :] for a in arrays]))
    assert train.sizes == [90, 51, 182]
    (tmp_path / "x").write_bytes(b"x" * 20)
    files = [open_bytes(tmp_path / "x"), arrays[0]]
    assert len(split(files, 8)[0]) == 108
    with pytest.raises(DataError, match=r"/x: 20 bytes are too few: the first nine tenths must hold .* 20;"):
        split(files, 19)
    train, val = split(files, 19, val_data=arrays[1])
    assert len(train) == 120 and val is arrays[1]
    with pytest.raises(DataError, match=r"/x: 20 bytes are too few: they must hold .* 21;"):
        split(files, 20, val_data=arrays[1])


def test_fingerprints_of_several_corpora_differ_by_any_of_them() -> None:
    a, b = np.zeros(10**6, np.uint8), np.zeros(5000, np.uint8)
    changed = b.copy()
    changed[2500] = 1
    joined = [JoinedCorpus(list(parts)) for parts in ([a, b], [b, a], [a, changed], [a, b[:-1]], [a[:-1], b])]
    assert len({fingerprint(corpus) for corpus in joined}) == 5
    assert fingerprint(JoinedCorpus([a.copy(), b.copy()])) == fingerprint(joined[0])

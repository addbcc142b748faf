"""Text from a checkpoint, byte by byte: one prompt, a file of prompts, or a conversation with the keyboard.

    python generate.py --ckpt-path runs/mine --prompt "To be"
    python generate.py --ckpt-path runs/mine --input-file prompts.txt --max-new-tokens 100 > results
    python generate.py --ckpt-path runs/mine --interactive

A language model gives the probabilities of the next byte after some bytes. Generation asks for them, draws one byte,
appends it and asks again, until byte 0 ends the document. Five ideas make that useful:

The cache. What attention computed for earlier positions stays valid, so each step runs the model on one new byte.
    `Batch` keeps this: texts of different lengths that advance together, one product for all of them.

The window. A text may outgrow the context. The model then sees the text from the first multiple of half a context from
    which it fits: more than half a context, always. When that start moves, the cache of the row is filled anew. The
    start depends on nothing but the length of the text, so that continuing a text in two calls or in one is the same.

Sampling. Temperature sharpens or flattens the probabilities, top-k keeps the k likeliest bytes, and top-p (nucleus,
    Holtzman et al. 2019) then keeps the fewest of these that together reach p. Each row draws from a random generator
    of its own, seeded by the seed and the row's number: what else is in the batch changes nothing but the rounding of
    the model's numbers, and equal prompts in different rows get different texts.

Speculation (Leviathan et al. 2023; DeepSeek-V3 report, section 5.4.3). The multi-token prediction modules draft the
    next bytes, one each, as they were trained to: a module takes the states of the one before it, and the byte that
    this one drafted. Past the last module, that one goes on from its own states. The model reads the drafts in one
    call, not much slower than for one byte, and keeps what it could have drawn itself: a byte x drafted with
    probability q(x) stays with min(1, p(x) / q(x)), and the first that does not is drawn anew from max(p - q, 0),
    normalised. That gives the model's own p exactly.

The stop string. It ends a text without being part of it, so that bytes which may be its beginning are held back until
    the next ones tell. It counts in what the model writes, not in the prompt.

The first half of this file is the engine: bytes in, bytes out. The second half is the command, which deals with
terminals: what a model writes is shown there, never obeyed.
"""

import argparse
import contextlib
import hashlib
import math
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO, NoReturn, TextIO

import numpy as np
import torch

import decode
import fp8_ops
import model as model_module
from byte_tokenizer import EOS_ID, VOCAB_SIZE, StreamDecoder, encode, one_line, visible
from command import is_local_rank_zero
from convert import load_model
from model import KVCache, ModelArgs, Transformer
from parallel import (
    CollectiveError,
    ParallelContext,
    ParallelError,
    abort,
    end,
    is_rank_zero,
    keep_freed_memory,
    pick_device,
    pick_dtype,
    process_group,
)

# Positions of one call while a prompt is read, all rows together: what bounds the memory that long prompts take.
PREFILL_POSITIONS = 4096
ONE_THREAD = 1 << 22  # numbers that a step of decoding multiplies, up to which one thread does it
RULE = "-" * 40
HERE = ("ckpt_path", "input_file", "seed")  # flags in which processes may differ; the seed is the first one's
EPILOG = """\
output:
  The prompt and what follows it go to standard output, the speed to standard error. A text ends at byte 0, before the
  --stop string, or after --max-new-tokens bytes.
  In a pipe, bytes come as they are. Each text of --input-file is followed by byte 0 (as texts may hold newlines), and
  so is each reply of --interactive, which does not repeat the line. --prompt adds nothing.
  On a terminal, control characters are shown as escapes such as \\x1b, and a rule follows each text of --input-file.

--input-file:
  Lines end with LF or CR LF. An empty line is an empty prompt: the beginning of a document. The lines are continued
  max_batch_size (of the model's config) at a time. Line number i, from 0, draws from --seed and i: its text does not
  depend on the other lines.

--interactive:
  Each line is added to the text so far, which is then continued; an empty line just goes on. /clear forgets the text,
  /exit or Ctrl-D ends, Ctrl-C stops the reply.

context:
  A text longer than the model's context is seen from the first multiple of half a context on from which it fits."""
WELCOME = "Each line is added to the text and continued. /clear forgets the text, /exit or Ctrl-D ends, Ctrl-C stops."


class GenerationError(ValueError):
    """The model cannot generate: the message is one line."""


@dataclass(frozen=True)
class Sampling:
    """How bytes are chosen, and how many.

    Attributes:
        temperature: Divides the logits; 0 always takes the likeliest byte.
        top_k: How many of the likeliest bytes may be drawn; 0 means all.
        top_p: Of these, the fewest that together have this probability; 1 means all.
        seed: Of the random generators. Equal seeds, equal texts.
        max_new_tokens: Bytes after which a text ends at the latest.
        stop: Bytes that end a text; empty for none.
        speculate: Bytes drafted ahead at a time, for a model with MTP modules; 0 for none. They change how fast a text
            comes and, above temperature 0, which one a seed gives; not how probable it is.

    Raises:
        ValueError: A number out of range.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    max_new_tokens: int = 256
    stop: bytes = b""
    speculate: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:  # so written, NaN fails too
            raise ValueError(f"temperature must be 0 (always the likeliest byte) or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top-p must be greater than 0 and at most 1 (off), got {self.top_p}")
        for name in ("top_k", "max_new_tokens", "seed", "speculate"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name.replace('_', '-')} must be 0 or more, got {getattr(self, name)}")


def distribution(logits: torch.Tensor, sampling: Sampling) -> np.ndarray:
    """Computes the probabilities that bytes are drawn with.

    Args:
        logits: Of the next byte, float (B, V), on any device.
        sampling: Temperature, top-k and top-p.

    Returns:
        Probabilities, float64 (B, V); rows sum to 1. Temperature 0 gives a single 1 a row.

    Raises:
        GenerationError: A row of logits without a finite maximum.
    """
    numbers = logits.detach().cpu().double().numpy()  # for so few, torch takes longer to begin than to compute
    best = numbers.max(axis=-1, keepdims=True)
    if not np.isfinite(best).all():
        raise GenerationError("the model's output is not a number: its weights are damaged or its training diverged")
    if sampling.temperature == 0:
        return (np.arange(numbers.shape[-1]) == numbers.argmax(axis=-1)[:, None]).astype(np.float64)
    with np.errstate(over="ignore"):  # what is divided by nearly nothing
        probs = np.exp((numbers - best) / sampling.temperature)  # less the best: no overflow however cold
    probs /= probs.sum(axis=-1, keepdims=True)
    if 0 < sampling.top_k < probs.shape[-1] or sampling.top_p < 1:
        probs = _truncate(probs, sampling.top_k or probs.shape[-1], sampling.top_p)
    return probs


def _truncate(probs: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """Keeps the `top_k` likeliest bytes, then the fewest of them that reach `top_p`; among equals, the lower byte."""
    order = (-probs).argsort(axis=-1, kind="stable")
    ranked = np.take_along_axis(probs, order, axis=-1)
    ranked[..., top_k:] = 0
    ranked /= ranked.sum(axis=-1, keepdims=True)
    if top_p < 1:
        # a byte is needed while those before it fall short; nothing is before the first
        ranked[..., 1:][ranked.cumsum(axis=-1)[..., :-1] >= top_p] = 0
        ranked /= ranked.sum(axis=-1, keepdims=True)
    kept = np.zeros_like(probs)
    np.put_along_axis(kept, order, ranked, axis=-1)
    return kept


Generators = Sequence[torch.Generator | None]


def draw(probs: np.ndarray, generators: Generators) -> list[int]:
    """Draws a byte for each row, on the CPU: equal probabilities give equal bytes on every device.

    Args:
        probs: Probabilities, float64 (B, V).
        generators: A CPU generator for each row, which gives one number; None takes the likeliest byte.

    Returns:
        B ids.
    """
    if not any(generators):
        return probs.argmax(axis=-1).tolist()
    # where the running sum first exceeds a uniform number is a byte drawn with its probability, never one of 0
    upto = probs.cumsum(axis=-1)
    numbers = np.array([uniform(generator) for generator in generators])[:, None]
    return (upto <= numbers * upto[:, -1:]).sum(axis=-1).tolist()


def uniform(generator: torch.Generator | None) -> float:
    """A random number from 0 to 1, without 1; of no generator, always the same."""
    return 0.5 if generator is None else torch.rand(1, generator=generator, dtype=torch.float64).item()


def accept(
    p: np.ndarray, q: np.ndarray, drafts: Sequence[int], generator: torch.Generator | None
) -> tuple[int, np.ndarray]:
    """Decides how many of a row's drafted bytes stay (Leviathan et al. 2023, algorithm 1).

    Args:
        p: The model's probabilities of each drafted byte, and of the one after, float64 (n + 1 or more, V).
        q: Those that the drafts were drawn with, float64 (n or more, V).
        drafts: The n bytes drafted.
        generator: Gives one number for each draft up to the first that does not stay.

    Returns:
        The number of drafts that stay, and the distribution (V,) of the byte after them.
    """
    for i, byte in enumerate(drafts):
        if uniform(generator) * q[i, byte] >= p[i, byte]:
            missing = np.maximum(p[i] - q[i], 0)
            return i, missing / missing.sum()
    return len(drafts), p[len(drafts)]


def row_generator(seed: int, row: int) -> torch.Generator:
    """Makes the random generator of a row; hashed, because torch would use no more than 32 bits of the seed."""
    digest = hashlib.sha256(f"{seed} {row}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


def window_start(length: int, context: int) -> int:
    """Returns where in a text of `length` bytes the model starts to read: see "The window" above."""
    half = max(context // 2, 1)
    return max(0, -((context - length) // half)) * half


class Batch:
    """Texts that advance together, any lengths, any number of bytes: the model's view of them.

    Args:
        model: The model.
        texts: What the rows begin with. An empty one begins with byte 0, as a document does.
        sampling: How to choose, how many bytes a row can get, and how many are drafted at a time.

    Attributes:
        texts: The rows' bytes so far, all of them.
        starts: Where in each text the model starts to read.
        cache: What it remembers from there on.
        probs: Probabilities of each row's next byte, float64 (B, V).
        drafts: Bytes drafted at a time; 0 without an MTP module.
        drafted: How many of the bytes last drafted could have been accepted, in all rows.
        depth: How many MTP modules draft.
        states: The model's states (B, S, dim) of the bytes it read last, the drafts among them.
        seen: For each row, how many positions the first module has seen: those before the first of `states`. Module k,
            from 0, needs k bytes more after each, so of the last k it has seen those whose drafts stayed. -1: the
            modules have to see all positions again.
        ahead: The last k + 1 states of each module k but the last, one of which is where the module after it goes on:
            (B, depth - 1, depth - 1, dim).
        fresh: For each row, how many of the drafts were accepted: the last of `states` to mean anything.
    """

    @torch.inference_mode()
    def __init__(self, model: Transformer, texts: Sequence[bytes], sampling: Sampling):
        self.model = model
        self.sampling = sampling
        self.drafts = min(sampling.speculate, model.args.max_seq_len - 1) if model.args.n_mtp_layers else 0
        self.depth = min(self.drafts, model.args.n_mtp_layers)
        self.texts = [bytearray(text or [EOS_ID]) for text in texts]
        self.starts = self._starts()
        capacity = min(model.args.max_seq_len, max(map(len, self.texts)) + sampling.max_new_tokens)
        self.cache = model.new_cache(len(texts), capacity, self.drafts)
        self.seen = [len(text) - start - 1 for text, start in zip(self.texts, self.starts, strict=True)]
        self.fresh = [0] * len(texts)
        last = self._fill(list(range(len(texts))))[:, 1:]
        self.ahead = last.unsqueeze(2).repeat(1, 1, last.shape[1], 1)
        self.probs = self._read([[text[-1]] for text in self.texts])[:, 0]

    @torch.inference_mode()
    def append(self, ids: Sequence[int], generators: Generators, left: Sequence[int]) -> list[list[int]]:
        """Appends one id to each row, and of the bytes drafted after it those that are accepted, which it returns.

        `generators` are as for `draw`; `left` is how many more bytes each row may get.
        """
        for text, i in zip(self.texts, ids, strict=True):
            text.append(i)
        before, self.starts = self.starts, self._starts()
        # each byte is read through the window that it has without drafts; and the last one is never a draft
        room = [
            max(0, min(self.drafts, self.model.args.max_seq_len - (len(text) - start), most - 1))
            for text, start, most in zip(self.texts, self.starts, left, strict=True)
        ]
        unseen = [n > 0 and seen < self.depth - 1 for n, seen in zip(room, self.seen, strict=True)]
        anew = [row for row, start in enumerate(self.starts) if start != before[row] or unseen[row]]
        if anew:
            self._fill_anew(anew)
        ready = [seen >= self.depth - 1 for seen in self.seen]
        limits = [n if is_ready else 0 for n, is_ready in zip(room, ready, strict=True)]
        self.drafted = sum(limits)
        if not any(limits):
            self.seen, self.fresh = [-1] * len(ids), [0] * len(ids)
            self.probs = self._read([[i] for i in ids])[:, 0]
            return [[] for _ in ids]
        drafts, q = self._draft(generators, limits)
        lengths = self.cache.lengths
        p = self._read([[i, *row] for i, row in zip(ids, drafts, strict=True)])
        drafts = [row[:limit] for row, limit in zip(drafts, limits, strict=True)]
        kept = [accept(*row) for row in zip(p, q, drafts, generators, strict=True)]
        self.probs = np.stack([after for _, after in kept])
        self.fresh = [n for n, _ in kept]
        self.cache.lengths = [length + 1 + n for length, n in zip(lengths, self.fresh, strict=True)]
        self.seen = [length if is_ready else -1 for length, is_ready in zip(lengths, ready, strict=True)]
        accepted = [row[:n] for row, n in zip(drafts, self.fresh, strict=True)]
        for text, row in zip(self.texts, accepted, strict=True):
            text += bytes(row)
        return accepted

    @torch.inference_mode()
    def keep(self, rows: list[int]) -> None:
        """Drops all rows but these."""
        for name in ("texts", "starts", "seen", "fresh"):
            setattr(self, name, [getattr(self, name)[row] for row in rows])
        self.cache.lengths = [self.cache.lengths[row] for row in rows]
        for layer in self.cache.layers:
            layer[:] = [tensor[rows] for tensor in layer]
        self.probs, self.ahead = self.probs[rows], self.ahead[rows]
        self.states = self.states[rows]

    def _starts(self) -> list[int]:
        return [window_start(len(text), self.model.args.max_seq_len) for text in self.texts]

    def _fill_anew(self, rows: list[int]) -> None:
        """Fills the cache of some rows, of which the last byte is about to be read and the modules are to go on."""
        self.seen = list(self.seen)
        for row in rows:
            self.seen[row], self.fresh[row] = max(len(self.texts[row]) - self.starts[row] - 2, 0), 0
        last = self._fill(rows)
        if self.drafts:
            self.states[rows, 0], self.ahead[rows] = last[:, 0], last[:, 1:, None]

    def _fill(self, rows: list[int]) -> torch.Tensor:
        """Fills the cache of some rows with their windows, apart from the last byte; returns what `prefill` does."""
        windows = [self.texts[row][self.starts[row] :] for row in rows]
        longest = max(map(len, windows)) - 1
        everything = len(rows) == len(self.texts)
        cache = self.cache if everything else self.model.new_cache(len(rows), longest)
        last = prefill(self.model, windows, cache, self.depth, [self.seen[row] for row in rows])
        if not everything:
            for ours, theirs in zip(self.cache.layers, cache.layers, strict=True):
                for tensor, part in zip(ours, theirs, strict=True):
                    tensor[rows, :longest] = part
            self.cache.lengths = list(self.cache.lengths)
            for row, length in zip(rows, cache.lengths, strict=True):
                self.cache.lengths[row] = length
        return last

    def _read(self, tokens: list[list[int]]) -> np.ndarray:
        """Runs the model on the next bytes (B, S) and returns the probabilities of those after them, (B, S, V)."""
        ids = torch.tensor(tokens, device=self.model.head.weight.device)
        self.states, logits = self.model.forward_with_hidden(ids, self.cache)
        self.cache.lengths = [length + ids.shape[1] for length in self.cache.lengths]
        return distribution(logits.flatten(0, 1), self.sampling).reshape(*ids.shape, -1)

    def _draft(self, generators: Generators, limits: Sequence[int]) -> tuple[list[list[int]], np.ndarray]:
        """Drafts the largest limit's number of bytes for each row; by chance, the row's own.

        Returns:
            The drafts (B, n), and the probabilities that they were drawn with, float64 (B, n, V).
        """
        model, cache, lengths = self.model, self.cache, self.cache.lengths
        rows, ends = torch.arange(len(self.texts)), torch.tensor(self.fresh)
        width, stayed = max(self.fresh) + 1, min(self.fresh)
        certain = [list(text[-1 - n :]) for text, n in zip(self.texts, self.fresh, strict=True)]
        states, drafts, q = self.states[:, :width], [], []
        for i in range(max(limits)):
            if i < self.depth:
                # it goes over again what it made of drafts that did not stay in every row
                over = max(i - stayed, 0)
                cache.lengths = [max(seen - over, 0) for seen in self.seen]
                after = [
                    [*known, *(ids[row] for ids in drafts)][i - over :] + [EOS_ID] * (width - len(known))
                    for row, known in enumerate(certain)
                ]
                new, logits = model.mtp_forward(i, states, torch.tensor(after, device=states.device), cache)
                h, logits = new[rows, ends + over, None], logits[rows, ends + over]
                if i < self.depth - 1:
                    states = new if i < stayed else torch.cat([self.ahead[:, i, stayed, None], new], dim=1)
                    last = ends[:, None] + torch.arange(over - i, over + 1)
                    self.ahead[:, i, : i + 1] = new[rows[:, None], last]
            else:
                cache.lengths = [length + i - self.depth for length in lengths]
                after = torch.tensor(drafts[-1], device=h.device)[:, None]
                h, logits = model.mtp_forward(self.depth - 1, h, after, cache)
                logits = logits[:, 0]
            q.append(distribution(logits, self.sampling))
            drawing = [generator if i < limit else None for generator, limit in zip(generators, limits, strict=True)]
            drafts.append(draw(q[-1], drawing))
        cache.lengths = lengths
        return [list(row) for row in zip(*drafts, strict=True)], np.stack(q, axis=1)


def prefill(
    model: Transformer, texts: Sequence[bytes | bytearray], cache: KVCache, depth: int = 0, seen: Sequence[int] = ()
) -> torch.Tensor:
    """Reads texts, apart from the last byte of each, into the rows of a cache, from its beginning.

    This goes by a bounded number of positions at a time. Shorter rows are padded on the right: the padding comes after
    what it could disturb, and is forgotten at the end.

    Args:
        model: The model.
        texts: The rows' texts.
        cache: The cache, with room for them.
        depth: How many MTP modules read as well.
        seen: With them, how many positions of each row are behind the first one.

    Returns:
        States (B, depth, dim): the model's at position `seen`, the first module's at the one before that, and so on;
        undefined where that was not read.
    """
    longest = max(map(len, texts))
    ids = torch.zeros(len(texts), longest + depth, dtype=torch.int64)  # a module reads that many bytes ahead
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(list(text), dtype=torch.int64)
    ids = ids.to(model.head.weight.device)
    cache.lengths = [0] * len(texts)
    last = ids.new_zeros(len(texts), depth, model.args.dim, dtype=model.compute_dtype)
    chunk = max(PREFILL_POSITIONS // len(texts), 1)
    for start in range(0, longest - 1, chunk):
        end = min(start + chunk, longest - 1)
        h, _ = model.forward_with_hidden(ids[:, start:end], cache)
        for i in range(depth):
            for row, n in enumerate(seen):
                if start <= n - i < end:
                    last[row, i] = h[row, n - i - start]
            h, _ = model.mtp_forward(i, h, ids[:, start + 1 + i : end + 1 + i], cache)
        cache.lengths = [end] * len(texts)
    cache.lengths = [len(text) - 1 for text in texts]
    return last


class HoldBack:
    """Lets bytes through up to a stop string, holding back those that may be its beginning.

    Attributes:
        found: Whether the stop string has come.
    """

    def __init__(self, stop: bytes):
        self.stop = stop
        self.held = b""
        self.found = False

    def feed(self, data: bytes) -> bytes:
        """Takes the next bytes and returns those that are certainly text."""
        data = self.held + data
        end = data.find(self.stop) if self.stop else -1
        if self.found or end >= 0:
            text, self.held, self.found = (b"" if self.found else data[:end]), b"", True
            return text
        longest = min(len(data), len(self.stop) - 1)
        held = next((n for n in range(longest, 0, -1) if data.endswith(self.stop[:n])), 0)
        self.held = data[len(data) - held :]
        return data[: len(data) - held]

    def flush(self) -> bytes:
        """Ends the text and returns what was held back."""
        held, self.held = self.held, b""
        return held


@dataclass
class Tally:
    """How many bytes were drafted for rows that could take them, and how many of these were accepted."""

    drafted: int = 0
    accepted: int = 0


def generate(
    model: Transformer, prompts: Sequence[bytes], sampling: Sampling, tally: Tally | None = None
) -> Iterator[tuple[int, bytes]]:
    """Continues prompts, `max_batch_size` of them at a time.

    Args:
        model: The model. What `model.attn_impl` says while this runs is how it attends.
        prompts: Any number of prompts of any length. An empty one stands for the beginning of a document.
        sampling: How to choose, and when to end.
        tally: Counts the drafts.

    Yields:
        A prompt's number and the bytes that come next in its text, as soon as they are certain. Prompts of a batch take
        turns. An empty piece ends a text: each prompt gets one, as its last.

    Raises:
        GenerationError: The model's output is not a number.
    """
    if sampling.max_new_tokens == 0:
        yield from ((row, b"") for row in range(len(prompts)))
        return
    size = model.args.max_batch_size
    for first in range(0, len(prompts), size):
        yield from _generate_batch(model, first, prompts[first : first + size], sampling, tally or Tally())


def _generate_batch(
    model: Transformer, first: int, prompts: Sequence[bytes], sampling: Sampling, tally: Tally
) -> Iterator[tuple[int, bytes]]:
    """`generate` for prompts that fit a batch, the first of which has number `first`. Rows leave as they end."""
    rows = [Row(first + i, sampling) for i in range(len(prompts))]
    batch = Batch(model, prompts, sampling)
    numbers = model.n_params()[1] * (1 + batch.drafts)
    accepted: list[list[int]] = [[] for _ in rows]
    while True:
        drawn = draw(batch.probs, [row.generator for row in rows])
        going = []  # places in the batch of the rows that go on
        for i, row in enumerate(rows):
            piece = row.take([*accepted[i], drawn[i]])
            if piece:
                yield row.number, piece
            if row.ended:
                yield row.number, b""
            else:
                going.append(i)
        if not going:
            return
        if len(going) < len(rows):
            rows = [rows[i] for i in going]
            batch.keep(going)
        with threads_for(numbers * len(rows)):
            accepted = batch.append(
                [drawn[i] for i in going], [row.generator for row in rows], [row.left for row in rows]
            )
        tally.drafted += batch.drafted
        tally.accepted += sum(map(len, accepted))


@contextlib.contextmanager
def threads_for(numbers: int) -> Iterator[None]:
    """Stays on one CPU thread for so few numbers whose sharing out saves little, or on a busy machine costs much."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if numbers <= ONE_THREAD else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Row:
    """One text of a batch: its random generator (None at temperature 0), how many bytes are left, and where it ends."""

    def __init__(self, number: int, sampling: Sampling):
        self.number = number
        self.generator = row_generator(sampling.seed, number) if sampling.temperature > 0 else None
        self.text = HoldBack(sampling.stop)
        self.left = sampling.max_new_tokens
        self.ended = False

    def take(self, ids: Sequence[int]) -> bytes:
        """Takes the next bytes, up to where the text ends, and returns those that are certain."""
        piece = b""
        for i in ids:
            self.left -= 1
            piece += b"" if i == EOS_ID else self.text.feed(bytes([i]))
            self.ended = i == EOS_ID or self.text.found or self.left == 0
            if self.ended:
                return piece + self.text.flush()
        return piece


def complete(model: Transformer, prompt: bytes, sampling: Sampling) -> bytes:
    """Returns what follows one prompt: all pieces of `generate`, without the prompt."""
    return b"".join(piece for _, piece in generate(model, [prompt], sampling))


class PipeWriter:
    """Writes texts to a file or another program: every byte as it is.

    Args:
        stream: Where to.
        mark: What follows each text.
    """

    def __init__(self, stream: BinaryIO, mark: bytes):
        self.stream = stream
        self.mark = mark

    def write(self, data: bytes) -> None:
        """Adds bytes to the text, at once."""
        self.stream.write(data)
        self.stream.flush()

    def end(self) -> None:
        """Ends the text."""
        self.write(self.mark)


class TerminalWriter:
    """Shows texts to a human: whole characters, as they come, and control characters made visible.

    Args:
        stream: The terminal.
        mark: What follows each text, on a line of its own.
    """

    def __init__(self, stream: TextIO, mark: str):
        self.stream = stream
        self.mark = mark
        self.decoder = StreamDecoder()
        self.line_open = False

    def write(self, data: bytes) -> None:
        """Adds bytes to the text; a character appears with its last byte."""
        self._show(visible(self.decoder.feed(data)))

    def end(self) -> None:
        """Ends the text, and its last line."""
        self._show(visible(self.decoder.flush()))
        self._show(("\n" if self.line_open else "") + self.mark)

    def _show(self, text: str) -> None:
        if text:
            encoding = self.stream.encoding or "ascii"
            self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            self.stream.flush()
            self.line_open = not text.endswith("\n")


Writer = PipeWriter | TerminalWriter


class Meter:
    """Counts the bytes that `generate` yields, and the time they take."""

    def __init__(self) -> None:
        self.bytes = 0
        self.seconds = 0.0
        self.tally = Tally()

    def measure(self, pieces: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
        """Passes on the pieces."""
        start = time.perf_counter()
        try:
            for row, piece in pieces:
                self.bytes += len(piece)
                yield row, piece
        finally:
            self.seconds += time.perf_counter() - start

    def __str__(self) -> str:
        speed = f"{self.bytes:,} bytes in {self.seconds:.1f} s: {self.bytes / max(self.seconds, 1e-9):,.1f} bytes/s"
        if not self.tally.drafted:
            return speed
        return f"{speed}, {self.tally.accepted / self.tally.drafted:.0%} of {self.tally.drafted:,} drafts accepted"


def write_results(
    model: Transformer, prompts: Sequence[bytes], sampling: Sampling, writer: Writer, meter: Meter
) -> None:
    """Writes each prompt and its continuation, in order: the first that is not over as it comes, those after it later.

    Args:
        model: The model.
        prompts: The prompts.
        sampling: How to continue them.
        writer: Where to.
        meter: Counts.
    """
    waiting = {row: bytearray(prompt) for row, prompt in enumerate(prompts)}  # not written yet
    over, current = set(), 0
    writer.write(waiting.pop(current))
    for row, piece in meter.measure(generate(model, prompts, sampling, meter.tally)):
        if not piece:
            over.add(row)
        elif row == current:
            writer.write(piece)
        else:
            waiting[row] += piece
        while current in over:
            writer.end()
            current += 1
            writer.write(waiting.pop(current, b""))


def interact(
    model: Transformer, sampling: Sampling, writer: Writer, meter: Meter, read_line: Callable[[], bytes | None]
) -> None:
    """Continues what the user types, line by line, as one growing text.

    Args:
        model: The model.
        sampling: How to continue. Each line has a seed of its own.
        writer: Where to; it gets what the model adds.
        meter: Counts.
        read_line: Returns the next line without its end, or None at the end of the input.
    """
    text, turn, warned = b"", 0, False
    on_terminal = isinstance(writer, TerminalWriter)
    while (line := read_line()) is not None and line != b"/exit":
        if line == b"/clear":
            text, warned = b"", False
            continue
        text += line
        warned = warned or warn_if_too_long([text], model.args.max_seq_len)
        try:
            turned = replace(sampling, seed=sampling.seed + turn)
            for _, piece in meter.measure(generate(model, [text], turned, meter.tally)):
                text += piece
                writer.write(piece)
        except KeyboardInterrupt:
            if not on_terminal:  # nobody is there to type the next line
                raise
        writer.end()
        turn += 1


def keyboard_line() -> bytes | None:
    """Asks for a line on the terminal; None after Ctrl-D or Ctrl-C."""
    try:
        return encode(input("> "))
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def piped_line() -> bytes | None:
    """Reads a line of standard input that is no terminal; None at its end."""
    line = sys.stdin.buffer.readline()
    return without_newline(line) if line else None


def without_newline(line: bytes) -> bytes:
    """Takes one line ending off, LF or CR LF."""
    return line.removesuffix(b"\n").removesuffix(b"\r")


def read_prompts(path: str) -> list[bytes]:
    """Reads a file of prompts, one a line, at least one.

    Raises:
        ValueError: The file cannot be read, or is empty.
    """
    try:
        data = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read --input-file {path}: {getattr(error, 'strerror', None) or error}") from None
    if not data:
        raise ValueError(f"--input-file {path} is empty; write one prompt a line (an empty line is an empty prompt)")
    return [without_newline(line) for line in data.removesuffix(b"\n").split(b"\n")]


def choose_attn_impl(args: ModelArgs, wanted: str | None) -> str:
    """Decides how attention decodes: through the latent if there is one, unless told otherwise.

    Raises:
        ValueError: "absorb" for a model that has no latent.
    """
    if wanted == "absorb" and args.kv_lora_rank == 0:
        raise ValueError("--attn-impl absorb needs a model with a latent, this one has kv_lora_rank 0; use naive")
    return wanted or ("absorb" if args.kv_lora_rank else "naive")


def load(arguments: argparse.Namespace, ctx: ParallelContext) -> Transformer:
    """Loads the model and sets how it multiplies and attends.

    Weights stored in FP8 stay so where the hardware multiplies them or --gemm-impl fp8 asks for it; else they are
    dequantised once.

    Raises:
        ValueError: No device, no checkpoint, or none that fits.
    """
    device = ctx.device
    fast = fp8_ops.multiplies_fp8(torch.device(device))
    keep_fp8 = fast if arguments.gemm_impl is None else arguments.gemm_impl == "fp8"
    dtype = pick_dtype(torch.device(device).type, arguments.dtype)
    with ctx.collective_section():
        model = load_model(arguments.ckpt_path, device, dtype, keep_fp8, ctx.build, ctx)
        if model.args.vocab_size != VOCAB_SIZE:
            raise ValueError(
                f"{arguments.ckpt_path}: vocab_size is {model.args.vocab_size}, no model of bytes; "
                f"take one with {VOCAB_SIZE}, as train.py makes them"
            )
    stored = any(layer.scale is not None for layer in model.fp8_layers())
    fp8_ops.gemm_impl = arguments.gemm_impl or ("fp8" if stored else "bf16")
    if fp8_ops.gemm_impl == "fp8" and not stored:
        model.quantize_weights()
    model_module.attn_impl = choose_attn_impl(model.args, arguments.attn_impl)
    warning = decode.attach(model, keep_attn_impl=arguments.attn_impl is not None)
    if warning is not None:
        print(f"generate.py: warning: {warning}", file=sys.stderr)
    return model


def warn_if_too_long(prompts: Sequence[bytes], context: int) -> bool:
    """Says on stderr which prompts the model cannot see whole; returns whether there are any."""
    long = [(i, len(prompt)) for i, prompt in enumerate(prompts, 1) if len(prompt) > context]
    if long:
        number, length = long[0]
        seen = length - window_start(length, context)
        others = f"; {len(long) - 1:,} more are too long as well" if len(long) > 1 else ""
        print(
            f"generate.py: warning: prompt {number} is longer than the context of {context:,} bytes: "
            f"the model sees only the last {seen:,} of its {length:,} bytes{others}",
            file=sys.stderr,
        )
    return bool(long)


class _Parser(argparse.ArgumentParser):
    """Reports a mistake as a ValueError, which `main` prints in one line like every other."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def make_parser() -> argparse.ArgumentParser:
    """Makes the parser of the command line."""
    parser = _Parser(
        prog="generate.py",
        description="Continue text with a trained model.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--ckpt-path", required=True, metavar="DIR", help="a checkpoint, or the folder of a run")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", help="the text to continue; empty: the beginning of a document")
    source.add_argument("--input-file", metavar="FILE", help="a file of prompts, one a line")
    source.add_argument("--interactive", action="store_true", help="continue what you type, line by line")
    default = Sampling()
    how = parser.add_argument_group("sampling")
    how.add_argument(
        "--max-new-tokens", type=int, default=default.max_new_tokens, metavar="N", help="default %(default)s"
    )
    how.add_argument(
        "--temperature", type=float, default=default.temperature, metavar="T", help="default %(default)s; 0: no chance"
    )
    how.add_argument("--top-k", type=int, default=default.top_k, metavar="K", help="the K likeliest bytes; 0: all")
    how.add_argument(
        "--top-p", type=float, default=default.top_p, metavar="P", help="the fewest bytes that reach P; 1: all"
    )
    how.add_argument("--seed", type=int, metavar="N", help="for the same text again; default: a new one each time")
    how.add_argument(
        "--speculate",
        type=int,
        metavar="N",
        help="bytes drafted at a time by MTP modules, for speed; default: one each, or 1 for several texts; 0: none",
    )
    how.add_argument("--stop", metavar="STRING", help="ends a text; not printed")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--attn-impl", choices=("naive", "absorb"), help="default: absorb where there is a latent")
    machine.add_argument(
        "--gemm-impl",
        choices=("bf16", "fp8"),
        help="default: fp8 for weights stored in FP8 where the hardware multiplies them, else bf16",
    )
    machine.add_argument("--device", choices=("cuda", "mps", "cpu"), help="default: the best there is")
    machine.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto", help="default: auto")
    return parser


def make_sampling(arguments: argparse.Namespace) -> Sampling:
    """Makes the sampling from the arguments; without --seed it gets a new one.

    Raises:
        ValueError: A number out of range, or an empty --stop.
    """
    if arguments.stop == "":
        raise ValueError("--stop must not be empty; leave it out to have none")
    return Sampling(
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=secrets.randbits(32) if arguments.seed is None else arguments.seed,
        max_new_tokens=arguments.max_new_tokens,
        stop=encode(arguments.stop or ""),
        speculate=arguments.speculate or 0,
    )


def make_writer(mark: bytes, terminal_mark: str) -> Writer:
    """Makes the writer for standard output, whatever that is."""
    if sys.stdout.isatty():
        return TerminalWriter(sys.stdout, terminal_mark)
    return PipeWriter(sys.stdout.buffer, mark)


def join(arguments: argparse.Namespace) -> ParallelContext:
    """Joins the processes that torchrun started: each is a part of the model, and must have been told the same."""
    ctx = ParallelContext.join(pick_device(arguments.device), int(os.environ.get("WORLD_SIZE", "1")))
    ctx.require_equal({name: value for name, value in vars(arguments).items() if name not in HERE})
    return ctx


def run(
    model: Transformer, arguments: argparse.Namespace, prompts: list[bytes], sampling: Sampling, ctx: ParallelContext
) -> None:
    """Does what was asked for, and reports the speed on stderr."""
    meter = Meter()
    if arguments.interactive:
        read_line = piped_line
        if is_rank_zero() and sys.stdin.isatty() and sys.stdout.isatty():
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  gives input() editing and history; only here, as it talks to the terminal
            sys.stdin.reconfigure(errors="surrogateescape")
            print(WELCOME, file=sys.stderr)
            read_line = keyboard_line
        shared_line = partial(ctx.broadcast_bytes, read_line)
        interact(model, sampling, make_writer(b"\0", ""), meter, shared_line)
    else:
        warn_if_too_long(prompts, model.args.max_seq_len)
        one = arguments.prompt is not None
        write_results(model, prompts, sampling, make_writer(*((b"", "") if one else (b"\0", RULE + "\n"))), meter)
    seed = f", seed {sampling.seed}" if sampling.temperature > 0 else ""
    print(f"{meter}{seed}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: The arguments; those of the process if None.

    Returns:
        The exit code: 0, 1 when another process is gone, 2 for a user's mistake, 130 after Ctrl-C, 141 when nobody
        reads the output any more.
    """
    with process_group(report):
        return command(argv)


def command(argv: Sequence[str] | None) -> int:
    """Runs the command as `main` does, all but leaving the processes that it joins."""
    try:
        arguments = make_parser().parse_args(argv)
        sampling = make_sampling(arguments)
    except ValueError as error:
        return report(str(error)) if is_local_rank_zero() else 2  # the same in every process
    try:
        if arguments.interactive:
            prompts = []
        elif arguments.prompt is not None:
            prompts = [encode(arguments.prompt)]
        else:
            prompts = read_prompts(arguments.input_file)
        keep_freed_memory()
        ctx = join(arguments)
        sampling = replace(sampling, seed=int(ctx.broadcast_bytes(lambda: str(sampling.seed).encode())))
        ctx.require_equal({"the prompts": hashlib.sha256(b"\n".join(prompts)).hexdigest()})
        model = load(arguments, ctx)
        if arguments.speculate is None:  # of several texts a call reads many bytes anyway, and more cost more
            sampling = replace(sampling, speculate=1 if len(prompts) > 1 else model.args.n_mtp_layers)
    except (ValueError, OSError, MemoryError) as error:
        if is_local_rank_zero() or not isinstance(
            error, (CollectiveError, ParallelError)
        ):  # else the first here tells it
            report(str(error))
        if not isinstance(error, (CollectiveError, ParallelError)):
            abort(2)
        return 2
    except KeyboardInterrupt:
        abort(130)
        return 130
    try:
        with contextlib.ExitStack() as stack:
            if not is_rank_zero():  # it computes its part, and has nothing to say but its errors
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
                stack.enter_context(contextlib.redirect_stderr(nowhere))
            run(model, arguments, prompts, sampling, ctx)
    except (GenerationError, MemoryError) as error:
        return report(str(error) or "not enough memory") if is_rank_zero() else 2
    except KeyboardInterrupt:
        abort(130)
        return 130
    except OSError as error:
        # what is still buffered cannot be written either, and the interpreter would say so as it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141 if isinstance(error, BrokenPipeError) else report(f"cannot write the output: {error.strerror}")
        abort(code)
        return code
    return 0


def report(error: str) -> int:
    """Prints an error in one line and returns the exit code."""
    print(f"generate.py: error: {one_line(error)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    end(main())

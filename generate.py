"""Text from a checkpoint, byte by byte: one prompt, a file of prompts, or a conversation with the keyboard.

    python generate.py --ckpt-path runs/mine --prompt "To be"
    python generate.py --ckpt-path runs/mine --input-file prompts.txt --max-new-tokens 100 > results
    python generate.py --ckpt-path runs/mine --prompt - --logprobs < letter.txt
    python generate.py --ckpt-path runs/mine --interactive

In Python:

    from generate import complete, load_model
    print(complete(load_model("runs/mine"), "To be"))

Five ideas make drawing one byte after another, until byte 0 ends the document, useful:

The KV cache: what attention computed for earlier positions stays valid. `Batch` keeps it, for texts of different
    lengths that advance together; where one ends, the next one waiting begins (continuous batching).
The context: of a text that outgrows it, the model sees what follows the first multiple of half a context from which the
    text fits. So the cache is filled anew only when that start moves, and continuing a text in two calls is as in one.
Sampling: temperature, then top-k, then top-p (Holtzman et al. 2019). Each text draws from a generator of its own,
    seeded by the seed and the text's number: nothing depends on what else is in the batch.
Speculation (Leviathan et al. 2023; DeepSeek-V3 report, section 5.4.3): MTP modules draft the next bytes, one each, and
    the last goes on from its own hidden states. The model verifies the drafts in one forward pass, by which texts have
    exactly the model's own probabilities. `step` is all of it; `Drafter` is the modules' side.
The stop string: it ends a text and is left out of it, so bytes that may be its beginning wait until that is
    certain. It counts in what the model writes, not in the prompt.
"""

if __name__ == "__main__":
    import command

    command.start()  # before torch is imported, which takes seconds

import argparse
import contextlib
import errno
import hashlib
import itertools
import json
import math
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

import command
import decode
import fp8_ops
import model as model_module
import parallel
from byte_tokenizer import EOS_ID, VOCAB_SIZE, StreamDecoder, encode, visible
from byte_tokenizer import decode as decode_text
from convert import load_model
from metrics import MemoryReads, Tally
from model import ConfigError, ModelArgs, Transformer
from parallel import ParallelContext, is_rank_zero
from safetensors_io import CheckpointError, read_regular

MAX_PROMPT_BYTES = 1 << 28  # of a file of prompts, and of a line that is piped in
MAX_DRAFTS = 256
MAX_TEXTS = 10**7  # of one call, which are listed
LOCAL_FLAGS = ("ckpt_path", "input_file", "seed")  # in which processes may differ; the seed is the first one's
NOT_A_NUMBER = "the model's output is not a number: its weights are damaged or its training diverged"
EPILOG = """\
output:
  The prompt and what follows it go to standard output, the speed to standard error. A text ends at byte 0, before the
  --stop string, or after --max-new-tokens bytes.
  In a pipe, bytes come as they are. Each text of --input-file is followed by byte 0 (as texts may hold newlines), and
  so is each reply of --interactive, which does not repeat the line. --prompt adds nothing.
  On a terminal, control characters are shown as escapes such as \\x1b, and a rule follows each text of --input-file.
  The MBU after the speed is the share of this device's memory bandwidth, measured at the end, at which decoding read
  weights and KV cache. A text of few bytes has none.

--input-file:
  Lines end with LF or CR LF. An empty line is an empty prompt: the beginning of a document. Up to --max-batch-size
  lines are continued at a time; as one ends, the next begins. Line number i, from 0, draws from --seed and i: its text
  does not depend on the other lines.

--num-samples:
  The N texts of a prompt, each with the prompt, follow each other as lines of --input-file do. Sample number i, from 0,
  draws from --seed, the line's number and i; the first one is the text of a single sample.

--logprobs:
  A line of JSON for each byte: the numbers of its prompt and sample, its position in the text, whether it is new, the
  byte, and the natural logarithm of its probability under the model, before temperature, top-k and top-p (null: of the
  first byte of a prompt, and up to the first of its context). Byte 0 that ends a text has a line, a stop string has
  none. "--logprobs all --max-new-tokens 0" scores texts.

--interactive:
  Each line is added to the text so far, which is then continued; an empty line just goes on. On a terminal, the line
  begins on a line of its own. /clear forgets the text, /exit or Ctrl-D ends, Ctrl-C stops the reply."""
WELCOME = "Each line is added to the text and continued. /clear forgets the text, /exit or Ctrl-D ends, Ctrl-C stops."


class GenerationError(parallel.CollectiveError):
    """The model cannot generate, on all of its ranks: the message is one line."""


MISTAKES = (CheckpointError, ConfigError, parallel.DeviceError, parallel.ParallelError, parallel.CollectiveError)
Generators = Sequence[torch.Generator | None]
Logprobs = dict[int, list[tuple[int, float]]]  # by a text's number: its new bytes, each with its log-probability


@dataclass(frozen=True)
class Sampling:
    """How bytes are chosen, and how many. A number out of range raises a ValueError."""

    temperature: float = 0.8  # divides the logits; 0 always takes the likeliest byte
    top_k: int = 0  # how many of the likeliest bytes may be drawn; 0: all
    top_p: float = 1.0  # of these, the fewest that together have this probability; 1: all
    seed: int = 0  # of the random generators: equal seeds, equal texts
    max_new_tokens: int = 256  # bytes after which a text ends at the latest
    stop: bytes = b""  # bytes that end a text; empty: none
    speculate: int = 0  # bytes that MTP modules draft at a time: above temperature 0, a seed then gives another text

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:  # so written, NaN fails too
            raise ValueError(f"temperature must be 0 (always the likeliest byte) or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top-p must be greater than 0 and at most 1 (off), got {self.top_p}")
        if not isinstance(self.stop, bytes):
            raise ValueError(f"stop must be bytes, got {self.stop!r}")
        for name in ("top_k", "max_new_tokens", "seed", "speculate"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name.replace('_', '-')} must be 0 or more, got {getattr(self, name)}")


def distribution(logits: torch.Tensor, sampling: Sampling) -> np.ndarray:
    """Computes the probabilities that bytes are drawn with, float64 (B, V), from logits, float (B, V), on any device.

    At temperature 0, the likeliest byte has probability 1. A row without a finite maximum raises a GenerationError.
    """
    numbers = _below_best(logits)
    if sampling.temperature == 0:
        return (np.arange(numbers.shape[-1]) == numbers.argmax(axis=-1)[:, None]).astype(np.float64)
    with np.errstate(over="ignore"):  # what is divided by nearly nothing
        probs = np.exp(numbers / sampling.temperature)
    probs /= probs.sum(axis=-1, keepdims=True)
    if 0 < sampling.top_k < probs.shape[-1] or sampling.top_p < 1:
        probs = _truncate(probs, sampling.top_k or probs.shape[-1], sampling.top_p)
    return probs


def log_probabilities(logits: torch.Tensor, ids: Sequence[int]) -> list[float]:
    """Returns the model's own log-probability (nats) of each byte, from logits, float (n, V): before any temperature.

    A row without a finite maximum raises a GenerationError.
    """
    numbers = _below_best(logits)
    return (numbers[range(len(ids)), list(ids)] - np.log(np.exp(numbers).sum(axis=-1))).tolist()


def _below_best(logits: torch.Tensor) -> np.ndarray:
    """Logits less the largest of each row, float64: no exponential of them overflows, however cold."""
    numbers = logits.detach().cpu().double().numpy()  # for so few, torch takes longer to begin than to compute
    best = numbers.max(axis=-1, keepdims=True)
    if not np.isfinite(best).all():
        raise GenerationError(NOT_A_NUMBER)
    return numbers - best


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


def draw(probs: np.ndarray, generators: Generators) -> list[int]:
    """Draws a byte for each row of probabilities, float64 (B, V); without generators, each gets its likeliest byte."""
    if not any(generators):
        return probs.argmax(axis=-1).tolist()
    # where the running sum first exceeds a uniform number is a byte drawn with its probability, never one of 0
    cumulative = probs.cumsum(axis=-1)
    numbers = np.array([uniform(generator) for generator in generators])[:, None]
    return (cumulative <= numbers * cumulative[:, -1:]).sum(axis=-1).tolist()


def uniform(generator: torch.Generator | None) -> float:
    """A random number from 0 to 1, without 1; of no generator, always the same."""
    return 0.5 if generator is None else torch.rand(1, generator=generator, dtype=torch.float64).item()


def accept(
    p: np.ndarray, q: np.ndarray, drafts: Sequence[int], generator: torch.Generator | None
) -> tuple[int, np.ndarray]:
    """Decides how many of a row's n drafts are accepted (Leviathan et al. 2023, algorithm 1).

    The model has the probabilities `p` of them and of the byte after, float64 (n + 1 or more, V); they were drawn with
    `q`, (n or more, V). Returns the number of accepted drafts, and the distribution (V,) of the byte after them.
    """
    for i, byte in enumerate(drafts):
        if uniform(generator) * q[i, byte] >= p[i, byte]:
            missing = np.maximum(p[i] - q[i], 0)
            return i, missing / missing.sum()
    return len(drafts), p[len(drafts)]


def row_generator(seed: int, row: int, sample: int = 0) -> torch.Generator:
    """Makes the generator of a sample of prompt `row`; hashed, as torch would use no more than 32 bits of the seed."""
    numbers = (seed, row, sample) if sample else (seed, row)
    digest = hashlib.sha256(" ".join(map(str, numbers)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


def context_start(length: int, max_seq_len: int) -> int:
    """Returns where in a text of `length` bytes the model's context starts: see "The context" above."""
    half = max(max_seq_len // 2, 1)
    return max(0, -((max_seq_len - length) // half)) * half


class Batch:
    """Texts of any lengths that advance together, and the KV cache of their contexts.

    Its rows are the first `max_batch_size` of the given texts; the cache has room for any of the others in their place.

    Attributes:
        texts: All bytes of each row. Between two steps, the cache lacks the last one.
        cache: The KV cache, of the model and of its MTP modules.
        stale: Rows whose cache has to be filled before anything is forwarded.
        n_drafts: How many drafted bytes can follow the last byte of a row in a forward pass.
        n_active: How many weights a position goes through.
    """

    def __init__(self, model: Transformer, texts: Sequence[bytes], sampling: Sampling):
        self.model, self.n_active = model, model.n_params()[1]
        self.texts = [bytearray()] * min(len(texts), model.args.max_batch_size)
        self.n_drafts = min(sampling.speculate, model.args.max_seq_len - 1) if model.args.n_mtp_layers else 0
        capacity = min(model.args.max_seq_len, max(1, max(map(len, texts))) + sampling.max_new_tokens)
        self.cache = model.new_cache(len(self.texts), capacity, self.n_drafts)
        self.stale: list[int] = []
        for row, text in enumerate(texts[: len(self.texts)]):
            self.restart(row, text)

    def context(self, row: int) -> bytearray:
        """Returns the bytes of a row that the model sees."""
        text = self.texts[row]
        return text[context_start(len(text), self.model.args.max_seq_len) :]

    def append(self, row: int, ids: Sequence[int]) -> None:
        """Appends bytes to a row, which becomes stale when its context starts elsewhere from now on."""
        text, context = self.texts[row], self.model.args.max_seq_len
        if context_start(len(text), context) != context_start(len(text) + len(ids), context):
            self.stale.append(row)
        text += bytes(ids)

    def restart(self, row: int, text: bytes) -> None:
        """Puts another text in the place of a row's."""
        self.texts[row] = bytearray(text or [EOS_ID])  # byte 0 begins a document
        self.stale.append(row)

    def keep(self, rows: list[int]) -> None:
        """Drops all rows but these."""
        self.texts = [self.texts[row] for row in rows]
        self.cache.lengths = [self.cache.lengths[row] for row in rows]
        for layer in self.cache.layers:
            layer[:] = [tensor[rows] for tensor in layer]


class Drafter:
    """Drafts the next bytes of a batch by the model's MTP modules.

    At position i, module k (from 0) reads hidden state i of module k-1, or of the model, and byte i+k+1. It gives its
    own hidden state i and the logits of byte i+k+2. If the last byte of a row is at position n, all modules run up to
    position n-1, where module k reads the draft of the module before it. Positions that read a rejected draft are
    forwarded again the next time; so the hidden states of the last positions are kept.

    Attributes:
        depth: How many MTP modules draft.
        hidden: The hidden states that each module reads, (depth, B, ring, dim). That of position i is at i % ring.
        lengths: MTP cache lengths: of each module and row, up to which position its cache is that of the text.
    """

    def __init__(self, batch: Batch):
        model, n_rows = batch.model, len(batch.texts)
        self.batch = batch
        self.depth = min(batch.n_drafts, model.args.n_mtp_layers)
        # room for what is drafted, and before it for the positions that read rejected drafts
        shape = (self.depth, n_rows, batch.n_drafts + self.depth, model.args.dim)
        self.hidden = torch.zeros(shape, dtype=model.compute_dtype, device=model.head.weight.device)
        self.lengths = [[0] * n_rows for _ in range(self.depth)]

    def limits(self, wanted: Sequence[int]) -> list[int]:
        """Returns how many drafts each row can take, of which no more than these are wanted."""
        context, limits = self.batch.model.args.max_seq_len, []
        for row, most in enumerate(wanted):
            length = len(self.batch.context(row))
            # accepted bytes must not move the context
            limits.append(min(self.batch.n_drafts, context - length, most) if length > self.depth else 0)
        return limits

    def draft(
        self, sampling: Sampling, generators: Generators, limits: Sequence[int]
    ) -> tuple[list[list[int]], np.ndarray]:
        """Drafts as many bytes for each row as the largest limit; those beyond a row's own are of no use.

        Returns the drafts (B, n), and the probabilities that they were drawn with, float64 (B, n, V).
        """
        model, cache, ends = self.batch.model, self.batch.cache, self.batch.cache.lengths
        probs: list[np.ndarray] = []
        drafts: list[list[int]] = [[] for _ in limits]
        for i in range(max(limits)):
            if i < self.depth:
                h, logits = self._forward_module(i, ends, drafts)
            else:  # the last module goes on from its own hidden state
                cache.lengths = [end + i - self.depth for end in ends]
                last = torch.tensor([row[-1:] for row in drafts], device=h.device)
                h, logits = model.mtp_forward(self.depth - 1, h, last, cache)
            probs.append(distribution(logits[:, 0], sampling))
            drawing = [generator if i < limit else None for generator, limit in zip(generators, limits, strict=True)]
            for row, byte in zip(drafts, draw(probs[-1], drawing), strict=True):
                row.append(byte)
        cache.lengths = ends
        return drafts, np.stack(probs, axis=1) if probs else np.empty((len(limits), 0))

    def _forward_module(
        self, k: int, ends: Sequence[int], drafts: Sequence[Sequence[int]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs module k up to the positions before `ends`; returns its hidden states and logits there, (B, 1, ...)."""
        # at least the last position; and a row that takes no drafts may lack more positions than there is room for
        most = self.batch.n_drafts + 1
        starts = [max(min(length, end - 1), end - most, 0) for length, end in zip(self.lengths[k], ends, strict=True)]
        counts = [end - start for start, end in zip(starts, ends, strict=True)]
        width = max(counts)
        tokens = []
        for row, start in enumerate(starts):
            known = [*self.batch.context(row)[start:], *drafts[row]][k + 1 :]
            tokens.append(known + [EOS_ID] * (width - len(known)))  # padding comes after what it could disturb
        slots = self._slots(starts, width)
        self.batch.cache.lengths = starts
        ids = torch.tensor(tokens, device=self.hidden.device)
        h, logits = self.batch.model.mtp_forward(k, self.hidden[k][slots], ids, self.batch.cache)
        if k + 1 < self.depth:
            self.hidden[k + 1][slots] = h
        rows, last = range(len(counts)), [count - 1 for count in counts]
        return h[rows, last, None], logits[rows, last, None]

    def _slots(self, starts: Sequence[int], width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the rows, and where in `hidden` their `width` positions from `starts` on are."""
        positions = torch.tensor(starts)[:, None] + torch.arange(width)
        return torch.arange(len(starts))[:, None], positions % self.hidden.shape[2]

    def update(self, hidden: torch.Tensor, n_drafted: int, n_accepted: Sequence[int]) -> None:
        """Takes the model's hidden states of the bytes just forwarded, and how many drafts of each row it accepted."""
        ends = self.batch.cache.lengths
        if self.depth:
            self.hidden[0][self._slots(ends, hidden.shape[1])] = hidden
        for k in range(min(self.depth, n_drafted)):
            # module k has read k drafts: as many of its last positions are wrong as drafts were rejected
            self.lengths[k] = [max(end + min(n - k, 0), 0) for end, n in zip(ends, n_accepted, strict=True)]

    def keep(self, rows: list[int]) -> None:
        """Drops all rows but these."""
        self.hidden = self.hidden[:, rows]
        self.lengths = [[lengths[row] for row in rows] for lengths in self.lengths]


def fill_stale(batch: Batch, drafter: Drafter) -> None:
    """Fills the cache of the stale rows, the modules' as well, with all but the last byte of their contexts."""
    model, cache, contexts = batch.model, batch.cache, {row: batch.context(row) for row in batch.stale}
    batch.stale = []
    for k, lengths in enumerate(drafter.lengths):
        for row, context in contexts.items():
            lengths[row] = max(len(context) - 1 - k, 0)
    if len(contexts) == len(batch.texts):
        return decode.prefill(model, [contexts[row] for row in range(len(contexts))], cache, drafter.hidden)
    rows = sorted(contexts, key=lambda row: len(contexts[row]))
    while rows:  # into a small cache first, as many as one call can read
        longest = len(contexts[rows[-1]])
        n = max(decode.PREFILL_POSITIONS // longest, 1)
        group, rows = rows[-n:], rows[:-n]
        filled, hidden = model.new_cache(len(group), longest), drafter.hidden[:, group]
        decode.prefill(model, [contexts[row] for row in group], filled, hidden)
        drafter.hidden[:, group] = hidden
        for layer, others in zip(cache.layers, filled.layers, strict=True):
            for tensor, other in zip(layer, others, strict=True):
                tensor[group, :longest] = other
        for row, length in zip(group, filled.lengths, strict=True):
            cache.lengths[row] = length
    return None


@torch.inference_mode()
def step(
    batch: Batch, drafter: Drafter, sampling: Sampling, generators: Generators, limits: Sequence[int]
) -> tuple[list[list[int]], np.ndarray, torch.Tensor]:
    """Forwards the last byte of each row, and drafts of the bytes after it, in one pass.

    The cache of the batch gets the accepted drafts, its texts do not. `limits` is how many drafts each row can take.
    Returns the accepted drafts of each row, the probabilities of the byte after them, float64 (B, V), and the model's
    logits of the drafts and of the byte after, float32 (B, n + 1, V).
    """
    fill_stale(batch, drafter)
    drafts, q = drafter.draft(sampling, generators, limits)
    # verify
    tokens = [[text[-1], *row] for text, row in zip(batch.texts, drafts, strict=True)]
    hidden, logits = batch.model.forward_with_hidden(torch.tensor(tokens, device=drafter.hidden.device), batch.cache)
    p = distribution(logits.flatten(0, 1), sampling).reshape(logits.shape)
    # accept
    drafts = [row[:limit] for row, limit in zip(drafts, limits, strict=True)]
    verdicts = [accept(*row) for row in zip(p, q, drafts, generators, strict=True)]
    n_accepted = [n for n, _ in verdicts]
    drafter.update(hidden, max(limits), n_accepted)
    # roll the cache back
    batch.cache.lengths = [length + 1 + n for length, n in zip(batch.cache.lengths, n_accepted, strict=True)]
    accepted = [row[:n] for row, n in zip(drafts, n_accepted, strict=True)]
    return accepted, np.stack([after for _, after in verdicts]), logits


class Row:
    """One text of a batch, sample number % num_samples of a prompt: how it is drawn, and where it ends."""

    def __init__(self, number: int, sampling: Sampling, num_samples: int = 1):
        self.number = number
        generator = row_generator(sampling.seed, *divmod(number, num_samples))
        self.generator = generator if sampling.temperature > 0 else None
        self.left = sampling.max_new_tokens  # bytes that it can still get
        self.n_taken = 0
        self.ended = False
        self._stop = sampling.stop
        self._pending = b""  # what may be the beginning of the stop string

    @property
    def wanted_drafts(self) -> int:
        """How many bytes to draft at most: the last byte of a text is no draft, nor is the first."""
        return self.left - 1 if self.n_taken else 0

    def take(self, ids: Sequence[int]) -> bytes:
        """Takes the next bytes, up to where the text ends, and returns those that certainly belong to it.

        -1 stands for a byte where the model's output was no number, which raises a GenerationError.
        """
        certain = b""
        for i in ids:
            if i < 0:
                raise GenerationError(NOT_A_NUMBER)
            self.left, self.n_taken = self.left - 1, self.n_taken + 1
            self._pending += b"" if i == EOS_ID else bytes([i])
            is_stopped = bool(self._stop) and self._pending.endswith(self._stop)
            self.ended = is_stopped or i == EOS_ID or self.left == 0
            if self.ended:
                return certain + (self._pending.removesuffix(self._stop) if is_stopped else self._pending)
            longest = min(len(self._pending), len(self._stop) - 1)
            n = next((n for n in range(longest, 0, -1) if self._pending.endswith(self._stop[:n])), 0)
            n_certain = len(self._pending) - n
            certain, self._pending = certain + self._pending[:n_certain], self._pending[n_certain:]
        return certain


def choose_attn_impl(model: Transformer, wanted: str | None = None) -> Any:
    """Returns how attention is computed: as wanted, else "absorb", if `decode.attach` found that to be the model."""
    if wanted == "absorb" and model.args.kv_lora_rank == 0:
        raise GenerationError("--attn-impl absorb needs a model with a latent, this one has kv_lora_rank 0; use naive")
    return wanted or ("absorb" if model.absorbs else "naive")


def generate(
    model: Transformer, prompts: Sequence[bytes], sampling: Sampling, tally: Tally | None = None,
    attn_impl: str | None = None, num_samples: int = 1, logprobs: Logprobs | None = None,
) -> Iterator[tuple[int, bytes]]:  # fmt: skip
    """Continues prompts, `max_batch_size` texts at a time; an empty one stands for the beginning of a document.

    Text i is sample i % num_samples of prompt i // num_samples, and depends on these, the prompt and `sampling` alone.
    `attn_impl` is "naive" or "absorb"; None: see `choose_attn_impl`. Yields a text's number and the bytes that come
    next in it, as soon as they are certain. Texts of a batch take turns; as one ends, the next begins. An empty piece
    ends a text: each gets one, as its last. `logprobs` gets all bytes that are drawn before they are yielded, and those
    that end a text, such as byte 0 or the stop string, too.
    """
    texts = [prompt for prompt in prompts for _ in range(num_samples)]
    if sampling.max_new_tokens == 0 or not texts:
        yield from ((number, b"") for number in range(len(texts)))
        return
    tally, attn_impl = tally or Tally(), choose_attn_impl(model, attn_impl)
    with decode.step_settings(attn_impl, math.inf):  # the cache is made for one way of attention
        batch = Batch(model, texts, sampling)
    drafter = Drafter(batch)
    blocks = decode.blocks(model, batch, sampling, attn_impl) if logprobs is None else None
    waiting = (Row(number, sampling, num_samples) for number in range(len(texts)))
    rows = list(itertools.islice(waiting, len(batch.texts)))
    while rows:
        new, logits = _advance(batch, drafter, sampling, rows, tally, attn_impl, blocks)
        for row, ids, row_logits in zip(rows, new, logits, strict=True):
            if logprobs is not None:
                nats = log_probabilities(row_logits[: len(ids)], ids)
                logprobs.setdefault(row.number, []).extend(zip(ids, nats, strict=True))
            if piece := row.take(ids):
                yield row.number, piece
            if row.ended:
                yield row.number, b""
        before, rows = rows, [next(waiting, row) if row.ended else row for row in rows]
        going = [i for i, row in enumerate(rows) if not row.ended]
        if 0 < len(going) < len(rows):
            batch.keep(going)
            drafter.keep(going)
        for i, old in enumerate(going):
            if rows[old] is before[old]:
                batch.append(i, new[old])
            else:  # it has just come
                batch.restart(i, texts[rows[old].number])
        rows = [rows[i] for i in going]


def _advance(
    batch: Batch, drafter: Drafter, sampling: Sampling, rows: list[Row], tally: Tally, attn_impl: str,
    blocks: decode.Blocks | None,
) -> tuple[list[list[int]], Sequence[torch.Tensor | None] | torch.Tensor]:  # fmt: skip
    """Draws the next bytes of each row, at least one; returns them and their logits, (B, n or more, V).

    `blocks` has none of a row that has just come, and no logits.
    """
    if blocks is not None:
        with decode.step_settings(attn_impl, math.inf):
            return blocks.advance(rows, partial(fill_stale, batch, drafter), tally.reads), [None] * len(rows)
    generators, limits = [row.generator for row in rows], drafter.limits([row.wanted_drafts for row in rows])
    only_decodes, start = not batch.stale, time.perf_counter()
    n_multiplied = batch.n_active * len(rows) * (1 + batch.n_drafts) if only_decodes else math.inf
    with decode.step_settings(attn_impl, n_multiplied):
        accepted, probs, logits = step(batch, drafter, sampling, generators, limits)
    if only_decodes and tally.reads:
        tally.reads.count(batch.cache, max(limits), time.perf_counter() - start)
    tally.drafted += sum(limits)
    tally.accepted += sum(map(len, accepted))
    return [[*ids, byte] for ids, byte in zip(accepted, draw(probs, generators), strict=True)], logits


def complete(model: Transformer, prompt: str | bytes, sampling: Sampling | None = None, **options: Any) -> Any:
    """Returns what follows a prompt, without the prompt: str for str (U+FFFD for what is no UTF-8), bytes for bytes.

    Without `sampling` it is that of `Sampling()`, whose seed is 0; `options` are fields of it that differ, such as
    `temperature=0, max_new_tokens=100`. After `decode.attach(model)` it is faster.
    """
    sampling = replace(sampling or Sampling(), **options)
    if isinstance(prompt, str):
        return decode_text(complete(model, encode(prompt), sampling))
    return b"".join(piece for _, piece in generate(model, [prompt], sampling))


# --- The command -----------------------------------------------------------------------------------------------------


class Writer:
    """Writes texts to stdout: every byte as it is in a pipe; complete and visible characters on a terminal.

    After each text comes `mark` in a pipe, or `rule` on a terminal, on a line of its own.
    """

    def __init__(self, mark: bytes = b"", rule: str = ""):
        self.is_terminal = is_rank_zero() and sys.stdout.isatty()
        self.mark, self.rule, self.decoder, self.line_open = mark, rule, StreamDecoder(), False

    def write(self, data: bytes | bytearray) -> None:
        """Adds bytes to the text; on a terminal, a character appears with its last byte."""
        if self.is_terminal:
            self._show(self.decoder.feed(data))
        elif is_rank_zero():  # the other processes compute their part, and have nothing to write
            command.write(bytes(data))

    def end(self) -> None:
        """Ends the text, and on a terminal its last line."""
        if self.is_terminal:
            self._show(self.decoder.flush())
            self._show(("\n" if self.line_open else "") + self.rule)
        else:
            self.write(self.mark)

    def _show(self, text: str) -> None:
        if text:
            command.write(visible(text).encode(sys.stdout.encoding or "ascii", "backslashreplace"))
            self.line_open = not text.endswith("\n")


class LogprobWriter:
    """Writes, in place of the bytes of texts, a line of JSON for each: see `EPILOG`.

    `logprobs` is what `generate` fills; with `scorer`, bytes of prompts get lines, too, scored by this model.
    """

    def __init__(self, prompts: Sequence[bytes], num_samples: int, logprobs: Logprobs, scorer: Transformer | None):
        self.prompts, self.num_samples, self.logprobs, self.scorer = prompts, num_samples, logprobs, scorer
        self.number, self.position = 0, 0  # of the text, and of its next byte in it
        self.of_prompt: list[float | None] = []

    def write(self, data: bytes | bytearray) -> None:
        """Adds bytes to the text, those of its prompt first."""
        row, sample = divmod(self.number, self.num_samples)
        n_prompt = len(self.prompts[row])
        if self.scorer is not None and data and self.position == sample == 0:
            self.of_prompt = prompt_logprobs(self.scorer, self.prompts[row])
        for position, byte in enumerate(data, self.position):
            is_new = position >= n_prompt
            line: dict[str, Any] = {"prompt": row, "sample": sample, "position": position, "new": is_new, "byte": byte}
            if is_new:
                _, line["logprob"] = self.logprobs[self.number][position - n_prompt]
            elif self.scorer is not None:
                line["logprob"] = self.of_prompt[position]
            if is_rank_zero() and "logprob" in line:
                command.write(json.dumps(line).encode() + b"\n")
        self.position += len(data)

    def end(self) -> None:
        """Ends the text: byte 0 gets a line if it ended it, a stop string does not."""
        n_new = self.position - len(self.prompts[self.number // self.num_samples])
        drawn = [byte for byte, _ in self.logprobs.get(self.number, [])[n_new:]]
        if drawn[:1] == [EOS_ID]:
            self.write(bytes(drawn[:1]))
        self.logprobs.pop(self.number, None)
        self.number, self.position = self.number + 1, 0


@torch.inference_mode()
def prompt_logprobs(model: Transformer, prompt: bytes) -> list[float | None]:
    """Returns the log-probability of each byte of a prompt; None of the first in its context and of those before."""
    start = context_start(len(prompt), model.args.max_seq_len)
    context, nats = prompt[start:], []
    cache = model.new_cache(1, len(context))
    for first in range(0, len(context) - 1, decode.PREFILL_POSITIONS):
        last = min(first + decode.PREFILL_POSITIONS, len(context) - 1)
        nats += log_probabilities(model(context[first:last], cache), context[first + 1 : last + 1])
    return [None] * (start + 1) + nats


def write_results(
    model: Transformer, prompts: Sequence[bytes], sampling: Sampling, writer: Writer | LogprobWriter, tally: Tally,
    num_samples: int = 1, logprobs: Logprobs | None = None,
) -> None:  # fmt: skip
    """Writes each prompt and its continuations, in order: the first that is not over as it comes, others later."""
    waiting: dict[int, bytearray] = {}  # by a text's number: what came before its turn
    over, current = set[int](), 0
    writer.write(prompts[0])
    pieces = generate(model, prompts, sampling, tally, model_module.attn_impl, num_samples, logprobs)
    for number, piece in tally.measure(pieces):
        if not piece:
            over.add(number)
        elif number == current:
            writer.write(piece)
        else:
            waiting.setdefault(number, bytearray()).extend(piece)
        while current in over:
            over.remove(current)
            writer.end()
            current += 1
            if current < len(prompts) * num_samples:
                writer.write(prompts[current // num_samples] + waiting.pop(current, b""))


def interact(
    model: Transformer, sampling: Sampling, writer: Writer, tally: Tally, read_line: Callable[[], bytes | None]
) -> None:
    """Continues what the user types, line by line, as one growing text, and writes what the model adds.

    `read_line` returns the next line without its end, or None at the end of the input. Each line has a seed of its own.
    """
    text, turn, warned = b"", 0, False
    while (line := read_line()) is not None and line != b"/exit":
        if line == b"/clear":
            text, warned = b"", False
            continue
        if writer.is_terminal and line and text and not text.endswith(b"\n"):
            text += b"\n"  # as the terminal shows it: what is typed begins below the reply
        text += line
        warned = warned or warn_if_too_long([text], model.args.max_seq_len)
        turned = replace(sampling, seed=sampling.seed + turn)
        turn += 1
        try:
            for _, piece in tally.measure(generate(model, [text], turned, tally, model_module.attn_impl)):
                text += piece
                writer.write(piece)
        except KeyboardInterrupt as interrupt:  # Ctrl-C stops the reply, if somebody is there to type the next line
            if not writer.is_terminal or isinstance(interrupt, command.Terminated):
                raise
        writer.end()


def write_all(
    model: Transformer, prompts: Sequence[bytes], sampling: Sampling, tally: Tally, arguments: argparse.Namespace
) -> None:
    """Continues prompts, and writes the texts or their log-probabilities, as the flags say."""
    warn_if_too_long(prompts, model.args.max_seq_len)
    num_samples, writer = arguments.num_samples or 1, cast(Writer | LogprobWriter, Writer())
    logprobs: Logprobs | None = {} if arguments.logprobs else None
    if logprobs is not None:
        writer = LogprobWriter(prompts, num_samples, logprobs, model if arguments.logprobs == "all" else None)
    elif arguments.input_file is not None or num_samples > 1:
        writer = Writer(b"\0", "-" * 40 + "\n")
    write_results(model, prompts, sampling, writer, tally, num_samples, logprobs)


def keyboard_line() -> bytes | None:
    """Asks for a line on the terminal; None after Ctrl-D or Ctrl-C."""
    try:
        return encode(input("> "))
    except command.Terminated:
        raise
    except (EOFError, KeyboardInterrupt):
        command.write(b"\n")
        return None


def read_stdin(read: Callable[[int], bytes], what: str) -> bytes:
    """Reads a bounded number of bytes of standard input by one of its buffer's methods."""
    try:
        data = read(MAX_PROMPT_BYTES + 1)
    except OSError as error:
        raise OSError(error.errno, error.strerror, "standard input") from None
    if len(data) > MAX_PROMPT_BYTES:
        raise OSError(errno.EFBIG, f"{what} of more than {MAX_PROMPT_BYTES:,} bytes; divide it", "standard input")
    return data


def piped_line() -> bytes | None:
    """Reads a line of standard input that is no terminal; None at its end."""
    line = read_stdin(sys.stdin.buffer.readline, "a line")
    return line.removesuffix(b"\n").removesuffix(b"\r") if line else None


def piped_prompt() -> bytes:
    """Reads all of standard input as it is."""
    if sys.stdin.isatty():
        command.note("Type the prompt. Ctrl-D on a line of its own ends it.")
    return read_stdin(sys.stdin.buffer.read, "a prompt")


def read_prompts(path: str) -> list[bytes]:
    """Reads a file of prompts, one a line, at least one; raises a GenerationError if it cannot."""
    try:
        data = read_regular(Path(path), MAX_PROMPT_BYTES, GenerationError, follow=True)
    except ValueError as error:  # also of a path that cannot be one
        raise GenerationError(f"--input-file: {error}; write the prompts to a file, one a line") from None
    if not data:
        raise GenerationError(f"--input-file {path} is empty; write one prompt a line (an empty line: an empty prompt)")
    return [line.removesuffix(b"\r") for line in data.removesuffix(b"\n").split(b"\n")]


def choose_speculate(args: ModelArgs, wanted: int | None, n_prompts: int) -> int:
    """Returns how many bytes are drafted at a time: as wanted, else what is fast."""
    if wanted and args.n_mtp_layers == 0:
        raise GenerationError(f"--speculate {wanted} needs a model with MTP modules, this one has none; leave it out")
    if wanted is not None:
        return wanted
    return 1 if n_prompts > 1 else args.n_mtp_layers  # several texts are many bytes to forward anyway


def choose_dtypes(arguments: argparse.Namespace, device: str) -> tuple[torch.dtype | None, torch.dtype]:
    """Returns the dtype of the matrices, None for that of the activations, and the latter.

    On a CPU, a byte takes as long as reading the weights, and rounding them to bfloat16 hardly changes the loss.
    """
    if arguments.weights == "fp8" and device == "mps":
        raise GenerationError("--weights fp8 needs a CPU or a CUDA GPU; take --weights bf16")
    if arguments.weights == "fp32":
        if arguments.dtype == "bf16":
            raise GenerationError("--weights fp32 is of no use in products of bfloat16; leave out --dtype bf16")
        return torch.float32, torch.float32
    narrow = "bf16" if device == "cpu" and arguments.gemm_impl != "fp8" else None
    weight_dtype = {None: None, "bf16": torch.bfloat16, "fp8": fp8_ops.E4M3}[arguments.weights or narrow]
    return weight_dtype, parallel.pick_dtype(device, arguments.dtype)


def load(arguments: argparse.Namespace, ctx: ParallelContext) -> Transformer:
    """Loads the model and sets how it multiplies and attends."""
    device, build = torch.device(ctx.device), partial(parallel.build, ctx)
    multiplies_fp8, is_cpu = fp8_ops.multiplies_fp8(device), device.type == "cpu"
    weight_dtype, dtype = choose_dtypes(arguments, device.type)
    # weights stored in FP8 stay so where the hardware multiplies them, decode.c reads them or the user asks for it
    fast = multiplies_fp8 if arguments.gemm_impl is None else arguments.gemm_impl == "fp8"
    keep_fp8 = arguments.weights is None and (fast or (is_cpu and ctx.mp_size == 1))
    model = load_model(arguments.ckpt_path, ctx.device, dtype, keep_fp8, build, ctx, weight_dtype)
    if (size := model.args.vocab_size) != VOCAB_SIZE:
        raise GenerationError(f"{arguments.ckpt_path}: vocab_size is {size}; a model of bytes has {VOCAB_SIZE}")
    stored = any(layer.scale is not None for layer in model.fp8_layers())
    quantizes = stored and multiplies_fp8 and not decode.KernelDecoder.suits(model)  # which reads FP8 weights itself
    fp8_ops.gemm_impl = arguments.gemm_impl or ("fp8" if quantizes else "bf16")
    if fp8_ops.gemm_impl == "fp8" and not stored:
        model.quantize_weights()
    model_module.attn_impl = choose_attn_impl(model, arguments.attn_impl)
    if warning := decode.attach(model, keep_attn_impl=arguments.attn_impl is not None):
        command.warn("generate.py", warning)
    model_module.attn_impl = choose_attn_impl(model, arguments.attn_impl)  # with what was found
    return model


def warn_if_too_long(prompts: Sequence[bytes], max_seq_len: int) -> bool:
    """Warns of prompts that are longer than the context; returns whether there are any."""
    long = [(i, len(prompt)) for i, prompt in enumerate(prompts, 1) if len(prompt) > max_seq_len]
    if long and is_rank_zero():
        number, length = long[0]
        seen = f"the model sees only the last {length - context_start(length, max_seq_len):,} of its {length:,} bytes"
        text = f"prompt {number} is longer than the context of {max_seq_len:,} bytes: {seen}"
        command.warn("generate.py", text + (f"; {len(long) - 1:,} more are too long" if len(long) > 1 else ""))
    return bool(long)


def build_parser() -> command.Parser:
    """Makes the parser of the command line."""
    integer, real, form = command.integer, command.real, argparse.RawDescriptionHelpFormatter
    about = "Continue text with a trained model."
    parser = command.Parser("generate.py", description=about, epilog=EPILOG, formatter_class=form)
    parser.add_argument("--ckpt-path", required=True, metavar="DIR", help="a checkpoint, or the folder of a run")
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    add("--prompt", metavar="TEXT", help="the text to continue; empty: the beginning of a document; -: read from stdin")
    add("--input-file", metavar="FILE", help="a file of prompts, one a line")
    add("--interactive", action="store_true", help="continue what you type, line by line")
    add = parser.add_argument_group("sampling").add_argument
    add("--max-new-tokens", type=integer(0), metavar="N", help="default %(default)s")
    add("--temperature", type=real(0), metavar="T", help="default %(default)s; 0: always the likeliest byte")
    add("--top-k", type=integer(0), metavar="K", help="the K likeliest bytes; 0: all")
    add("--top-p", type=real(0, 1, open_low=True), metavar="P", help="the fewest bytes that reach P; 1: all")
    add("--seed", type=integer(0, 2**64 - 1), metavar="N", help="for the same text again; default: a new one each time")
    drafts = (
        "bytes drafted at a time by MTP modules, for speed; default: none on a GPU, else one each, or 1 for several"
    )
    add("--speculate", type=integer(0, MAX_DRAFTS), metavar="N", help=drafts)
    add("--stop", type=stop_string, metavar="STRING", help="ends a text; not printed")
    add("--num-samples", type=integer(1, 10**6), metavar="N", help="texts for each prompt; default: 1")
    lines = "JSON lines instead of text: the log-probability of each new byte (new, the default), or also of prompts'"
    add("--logprobs", nargs="?", const="new", choices=("new", "all"), help=lines)
    parser.set_defaults(**asdict(Sampling()) | {"seed": None, "speculate": None})
    add = parser.add_argument_group("machine").add_argument
    most = "texts at a time, as many as the KV cache has room for; default: max_batch_size of the model's config"
    add("--max-batch-size", type=integer(1, 1 << 20), metavar="N", help=most)
    add("--attn-impl", choices=("naive", "absorb"), help="default: absorb where there is a latent")
    gemm = "default: bf16; fp8 for weights stored in FP8 that the hardware multiplies and no kernel of decoding reads"
    add("--gemm-impl", choices=("bf16", "fp8"), help=gemm)
    add("--device", choices=("cuda", "mps", "cpu"), help="default: the best there is")
    add("--dtype", choices=("auto", "fp32", "bf16"), default="auto", help="default: auto")
    weights = "width that weights are read at; default on a CPU: bf16, or fp8 as stored; on a GPU: that of --dtype"
    add("--weights", choices=("fp32", "bf16", "fp8"), help=weights)
    return parser


def stop_string(text: str) -> bytes:
    """The argparse type of --stop."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty; leave it out to have none")
    return encode(text)


def converse(model: Transformer, sampling: Sampling, tally: Tally, ctx: ParallelContext) -> None:
    """Continues what comes from standard input, typed or piped."""
    read_line = piped_line
    if is_rank_zero() and sys.stdin.isatty() and sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  gives input() editing and history; only here, as it talks to the terminal
        cast(TextIOWrapper, sys.stdin).reconfigure(errors="surrogateescape")
        command.note(WELCOME)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # stops a reply, as often as it is pressed
        read_line = keyboard_line
    interact(model, sampling, Writer(b"\0"), tally, partial(ctx.broadcast_bytes, read_line))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command, by default with the process's arguments; returns the exit code: see `command.run`."""
    return command.run("generate.py", lambda: run(argv), MISTAKES)


def run(argv: Sequence[str] | None) -> None:
    """Parses the flags, loads the model, writes the texts, and reports the speed on stderr."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if arguments.interactive and (arguments.num_samples is not None or arguments.logprobs is not None):
        parser.error("--num-samples and --logprobs go with --prompt or --input-file, not with --interactive")
    with parallel.process_group("generate.py", MISTAKES):
        prompts = [] if arguments.prompt is None else [encode(arguments.prompt)]
        if arguments.input_file is not None:
            prompts = read_prompts(arguments.input_file)
        if (n_texts := len(prompts) * (arguments.num_samples or 1)) > MAX_TEXTS:
            raise GenerationError(f"{n_texts:,} texts, at most {MAX_TEXTS:,} at a time; lower --num-samples, or divide")
        parallel.keep_freed_memory()
        # each process that torchrun starts has shards of the model, and must have the same flags
        ctx = ParallelContext.join(parallel.pick_device(arguments.device), parallel.read_launch().world_size)
        ctx.require_equal({name: value for name, value in vars(arguments).items() if name not in LOCAL_FLAGS})
        ctx.require_equal({"the prompts": hashlib.sha256(b"\n".join(prompts)).hexdigest()})
        if arguments.prompt == "-":
            prompts = [cast(bytes, ctx.broadcast_bytes(piped_prompt))]
        seed = secrets.randbits(32) if arguments.seed is None else arguments.seed
        seed = int(ctx.broadcast_bytes(lambda: str(seed).encode()))
        with ctx.collective_section():
            model = load(arguments, ctx)
            # steps without drafts need no Python between them, where kernels choose the bytes
            wanted = 0 if isinstance(model.decoder, decode.KernelDecoder) else None
            wanted = wanted if arguments.speculate is None else arguments.speculate
            speculate = choose_speculate(model.args, wanted, len(prompts))
        model.args.max_batch_size = arguments.max_batch_size or model.args.max_batch_size
        reads = MemoryReads(model)
        tally = Tally(reads=reads)
        given = {field.name: getattr(arguments, field.name) for field in fields(Sampling)}
        sampling = Sampling(**given | {"seed": seed, "speculate": speculate})
        if arguments.interactive:
            converse(model, sampling, tally, ctx)
        else:
            write_all(model, prompts, sampling, tally, arguments)
        if is_rank_zero():
            seed_used = f"seed {seed}" if sampling.temperature > 0 else ""
            command.note(", ".join(filter(None, [str(tally), reads.mbu(model.head.weight.device), seed_used])))


if __name__ == "__main__":
    sys.exit(main())

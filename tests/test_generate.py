"""Generation against the uncached model, brute force and real processes: in a pipe, on a terminal, interrupted."""

import contextlib
import io
import itertools
import json
import math
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import checkpoint as checkpoints
import command
import decode
import fp8_ops
import generate
import metrics
import model as model_module
from generate import (
    Batch,
    Drafter,
    Row,
    Sampling,
    accept,
    complete,
    context_start,
    distribution,
    row_generator,
    visible,
)
from model import ModelArgs, Transformer

FOLDER = Path(generate.__file__).parent
CONTEXT = 16
TINY = {
    "max_batch_size": 3,
    "max_seq_len": CONTEXT,
    "original_seq_len": CONTEXT,
    "dtype": "fp32",
    "dim": 16,
    "inter_dim": 24,
    "moe_inter_dim": 8,
    "n_layers": 2,
    "n_heads": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_activated_experts": 2,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_mtp_layers": 1,
}
GREEDY = Sampling(temperature=0, max_new_tokens=50)
PROMPTS = [b"a", b"", b"some longer one", b"\xff\xfe", b"longer than the context is", b"x" * CONTEXT, b"yz" * 40]
# What a hostile model would write: ESC[31m, BEL, CR, DEL, C1's CSI (U+009B) and a right-to-left override (U+202E), with
# a character of two bytes before them. No byte occurs twice, for `parrot` to know which comes next.
HOSTILE = "Sä\x1b[31m\x07\r\x7f\x9b\u202e!".encode()
SHOWN = r"Sä\x1b[31m\x07\r\x7f\x9b\u202e!"


def tiny(**changes: int) -> Transformer:
    """A model with random weights everywhere, whose next byte depends on all bytes before."""
    model = Transformer(ModelArgs.from_dict(TINY | changes))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (1.0 if p.ndim == 1 else 2 * p.shape[-1] ** -0.5))
        model.head.weight[0] = 0  # else it ends too soon
    return with_decoder(model.eval().requires_grad_(False))


def with_decoder(model: Transformer) -> Transformer:
    """The same model, as `decode.attach` leaves it: it decodes by "absorb" where there is a latent, and then in C."""
    model.absorbs = model.args.kv_lora_rank > 0
    if decode.CDecoder.suits(model) and decode.library() is not None:
        model.decoder = decode.CDecoder(model)
    return model


def parrot() -> Transformer:
    """A model that writes HOSTILE after its first byte and then ends, and after "a" writes "bcabcabc..." for ever.

    Blocks that add nothing leave the embedding as it is: each byte's own direction. The head maps it to the next byte.
    """
    assert len(set(HOSTILE + b"abc")) == len(HOSTILE) + 3
    model = Transformer(ModelArgs.from_dict(TINY | {"dim": 256}))
    model.init_weights(0)
    with torch.no_grad():
        model.embed.weight.copy_(torch.eye(256))
        for this, following in zip(HOSTILE + b"abc", HOSTILE[1:] + b"\0bca", strict=True):
            model.head.weight[following, this] = 10
    return model.eval().requires_grad_(False)


class Script:
    """Stands in for a model: row r of the batch gets the bytes of `scripts[r]` after its prompt, for certain."""

    def __init__(self, scripts: dict[bytes, bytes], batch_size: int = 4):
        self.args = SimpleNamespace(max_seq_len=10**6, max_batch_size=batch_size, n_mtp_layers=0, dim=1, kv_lora_rank=0)
        self.compute_dtype, self.absorbs, self.decoder = torch.float32, False, None
        self.head = SimpleNamespace(weight=torch.zeros(1))
        self.scripts = scripts  # by the first byte of the prompt, which is one byte

    def n_params(self) -> tuple[int, int]:
        return 0, 0

    def new_cache(self, batch_size: int, capacity: int, spare: int = 0) -> SimpleNamespace:
        return SimpleNamespace(lengths=[0] * batch_size, layers=[[torch.zeros(batch_size, capacity)]])

    def forward_with_hidden(self, tokens: torch.Tensor, cache: SimpleNamespace) -> tuple[torch.Tensor, torch.Tensor]:
        memory = cache.layers[0][0]
        for row, ids in enumerate(tokens.tolist()):
            memory[row, cache.lengths[row] : cache.lengths[row] + len(ids)] = torch.tensor(ids).float()
        logits = torch.full((*tokens.shape, 256), -50.0)
        if tokens.shape[1] == 1:  # else a prompt is read, and nobody looks
            for row, length in enumerate(cache.lengths):
                script = self.scripts[bytes([int(memory[row, 0])])]
                logits[row, 0, (script + b"\0")[length]] = 50.0
        return torch.zeros(*tokens.shape, self.args.dim), logits


def sample(logits: torch.Tensor, sampling: Sampling, generators: list[torch.Generator]) -> list[int]:
    """The next byte of each row."""
    return generate.draw(
        distribution(logits, sampling), generators if sampling.temperature > 0 else [None] * len(logits)
    )


def by_hand(model: Transformer, prompt: bytes, sampling: Sampling, row: int = 0) -> bytes:
    """The documented rules without cache, batch and hold-back: the whole window through the model for every byte."""
    text, generator = prompt or b"\0", row_generator(sampling.seed, row)
    new, context = b"", model.args.max_seq_len
    while len(new) < sampling.max_new_tokens:
        start = next(s for s in range(0, len(text), max(context // 2, 1)) if len(text) - s <= context)
        logits = model(torch.tensor([list(text[start:])]))[:, -1]
        (drawn,) = sample(logits, sampling, [generator])
        if drawn == 0:
            break
        text, new = text + bytes([drawn]), new + bytes([drawn])
        if sampling.stop and sampling.stop in new:
            return new[: new.index(sampling.stop)]
    return new


def collect(model: Transformer, prompts: list[bytes], sampling: Sampling) -> list[bytes]:
    """The texts of `generate`, after checking that each row ends once, with an empty piece."""
    texts, over = [b""] * len(prompts), set()
    absorbs = model is not None and model_module.attn_impl == "absorb" and model.args.kv_lora_rank
    attn_impl = "absorb" if absorbs else "naive"  # the test's choice
    for row, piece in generate.generate(model, prompts, sampling, attn_impl=attn_impl):
        assert row not in over
        texts[row] += piece
        if not piece:
            over.add(row)
    assert over == set(range(len(prompts)))
    return texts


@pytest.fixture(autouse=True)
def attn_impl_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_module, "attn_impl", "naive")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Such small products only lose by being shared, and by far on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models() -> dict[str, Transformer]:
    return {"latent": tiny(), "plain": tiny(kv_lora_rank=0), "odd": tiny(max_seq_len=7), "one": tiny(max_seq_len=1)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints by name."""
    folder = tmp_path_factory.mktemp("checkpoints")
    checkpoints.save_model(tiny(), folder / "tiny")
    checkpoints.save_model(tiny(kv_lora_rank=0), folder / "plain")
    checkpoints.save_model(tiny(vocab_size=300), folder / "foreign")
    without = tiny(n_mtp_layers=0)
    without.load_state_dict(tiny().state_dict(), strict=False)
    checkpoints.save_model(without, folder / "no-mtp")
    checkpoints.save_model(parrot(), folder / "parrot")
    damaged = tiny()
    damaged.head.weight[5:7] = torch.tensor([[1e38], [-1e38]])  # finite, but what comes out is not
    damaged.norm.weight.fill_(1e30)
    checkpoints.save_model(damaged, folder / "damaged")
    (folder / "empty").mkdir()
    (folder / "nothing").touch()
    os.mkfifo(folder / "pipe")
    with open(folder / "huge", "wb") as file:
        file.truncate(generate.MAX_PROMPT_BYTES + 1)  # on most file systems, it takes no room
    checkpoints.save_model(tiny(), folder / "cut")
    weights = folder / "cut" / "model0-mp1.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return folder


# --- the engine ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "attn_impl", "temperature"), [
    ("latent", "naive", 1.0), ("latent", "absorb", 0), ("plain", "absorb", 1.0), ("odd", "naive", 0),
    ("odd", "absorb", 1.0), ("one", "naive", 1.0), ("one", "absorb", 0),
])  # fmt: skip
def test_batches_equal_the_uncached_model_past_the_context(
    models: dict[str, Transformer], name: str, attn_impl: str, temperature: float
) -> None:
    model_module.attn_impl = attn_impl
    sampling = replace(GREEDY, temperature=temperature, seed=3, max_new_tokens=30)
    texts = collect(models[name], PROMPTS, sampling)
    assert texts == [by_hand(models[name], prompt, sampling, row) for row, prompt in enumerate(PROMPTS)]
    assert sum(map(len, texts)) > 100


def test_greedy_is_the_argmax_of_the_uncached_model(models: dict[str, Transformer]) -> None:
    text = b"ab"
    for _ in range(CONTEXT - 2):
        text += bytes([models["latent"](torch.tensor([list(text)]))[0, -1].argmax()])
    assert complete(models["latent"], b"ab", replace(GREEDY, max_new_tokens=CONTEXT - 2)) == text[2:]


def test_rows_that_end_leave_the_others_alone(models: dict[str, Transformer]) -> None:
    model = models["latent"]
    stop = by_hand(model, PROMPTS[0], GREEDY)[10:11]
    sampling = replace(GREEDY, stop=stop)
    expected = [by_hand(model, prompt, sampling) for prompt in PROMPTS]
    assert len({len(text) for text in expected}) > 2
    assert collect(model, PROMPTS, sampling) == expected


def test_a_text_does_not_depend_on_neighbours_or_batch_size(models: dict[str, Transformer]) -> None:
    sampling = replace(GREEDY, temperature=1.0, seed=9)
    together = collect(models["latent"], PROMPTS, sampling)
    assert collect(models["latent"], PROMPTS[:1], sampling) == together[:1]
    others = [*PROMPTS[:3], b"something else", b"", *PROMPTS[5:]]
    changed = collect(models["latent"], others, sampling)
    assert [changed[i] == together[i] for i in range(len(PROMPTS))] == [True] * 3 + [False] * 2 + [True] * 2


def test_rows_of_one_prompt_differ_and_seeds_repeat(models: dict[str, Transformer]) -> None:
    sampling = replace(GREEDY, temperature=1.0)
    texts = collect(models["latent"], [b"same"] * 4, sampling)
    assert len(set(texts)) == 4
    assert collect(models["latent"], [b"same"] * 4, sampling) == texts
    assert complete(models["latent"], b"same", replace(sampling, seed=2**32)) not in texts


@pytest.mark.parametrize("chunk", [1, 5, 10_000])
def test_long_prompts_are_read_in_chunks(
    models: dict[str, Transformer], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "PREFILL_POSITIONS", chunk)
    assert collect(models["latent"], PROMPTS[:3], GREEDY) == [by_hand(models["latent"], p, GREEDY) for p in PROMPTS[:3]]


def test_the_cache_and_the_positions_of_a_call_are_bounded() -> None:
    widths = []

    class Watched(Script):
        def forward_with_hidden(
            self, tokens: torch.Tensor, cache: SimpleNamespace
        ) -> tuple[torch.Tensor, torch.Tensor]:
            widths.append(tokens.numel())
            return super().forward_with_hidden(tokens, cache)

    model = Watched({b"a": b"a" * 99_999})
    sampling = Sampling(max_new_tokens=5)
    batch = Batch(model, [b"a" * 9_000, b"a"], sampling)
    generate.step(batch, Drafter(batch), sampling, [None, None], [0, 0])
    assert max(widths) <= decode.PREFILL_POSITIONS
    assert batch.cache.layers[0][0].shape == (2, 9_005)
    assert batch.cache.lengths == [9_000, 1]


@given(st.integers(1, 300), st.integers(1, 40))
def test_the_window_fits_and_holds_more_than_half_a_context(length: int, context: int) -> None:
    start, half = context_start(length, context), max(context // 2, 1)
    assert start % half == 0
    assert 1 <= length - start <= context
    assert start == 0 or length - (start - half) > context  # an earlier start would not fit
    assert (start == 0) == (length <= context)


def test_continuing_in_two_calls_is_continuing_in_one(models: dict[str, Transformer]) -> None:
    whole = complete(models["odd"], b"to be", GREEDY)
    for cut in (1, 2, 3, 17):
        assert complete(models["odd"], b"to be" + whole[:cut], replace(GREEDY, max_new_tokens=50 - cut)) == whole[cut:]


def test_no_new_bytes_never_run_the_model() -> None:
    assert collect(None, [b"a", b"b"], replace(GREEDY, max_new_tokens=0)) == [b"", b""]
    assert collect(None, [], GREEDY) == []


class Counted(Script):
    """Counts the calls that decode, and keeps the batch sizes of all."""

    def __init__(self, *given: Any):
        super().__init__(*given)
        self.n_steps, self.sizes = 0, set()

    def forward_with_hidden(self, tokens: torch.Tensor, cache: SimpleNamespace) -> tuple[torch.Tensor, torch.Tensor]:
        self.n_steps += 1  # prompts of one byte are not forwarded before
        self.sizes.add(len(tokens))
        return super().forward_with_hidden(tokens, cache)


@given(st.lists(st.integers(0, 12), min_size=1, max_size=12), st.integers(1, 5))
def test_a_text_begins_as_soon_as_another_ends(lengths: list[int], size: int) -> None:
    scripts = {bytes([100 + i]): b"x" * n for i, n in enumerate(lengths)}
    model = Counted(scripts, size)
    assert collect(model, list(scripts), Sampling(temperature=0)) == list(scripts.values())
    free = [0] * min(size, len(lengths))  # the step at which each row can take the next text
    for n in lengths:
        free[free.index(min(free))] += n + 1  # byte 0 takes a step, too
    assert model.n_steps == max(free)
    assert max(model.sizes) <= size


def test_uneven_texts_take_fewer_steps_than_batch_by_batch() -> None:
    scripts = {bytes([100 + i]): b"x" * (40 if i % 4 == 0 else 2) for i in range(16)}
    together, by_batch = Counted(scripts, 4), Counted(scripts, 4)
    prompts = list(scripts)
    texts = collect(together, prompts, GREEDY)
    assert texts == [text for i in range(0, 16, 4) for text in collect(by_batch, prompts[i : i + 4], GREEDY)]
    assert (together.n_steps, by_batch.n_steps) == (18 + 41, 4 * 41)  # the last long text begins after 18 steps


@settings(max_examples=4, deadline=None, derandomize=True, database=None)  # rounding decides now and then
@given(st.integers(0, 10**6), st.integers(2, 4), st.integers(0, 3), st.sampled_from([0.0, 1.0]), st.booleans())
def test_texts_that_begin_among_others_are_as_alone(
    seed: int, size: int, speculate: int, temperature: float, absorbs: bool
) -> None:
    """Prompts of one byte beside long ones, drafts, contexts that move, texts that end in the midst of others."""
    model = guessing(seed, n_mtp_layers=2, max_batch_size=size)
    model_module.attn_impl = "absorb" if absorbs else "naive"
    model.head.weight[0] = model.head.weight[ord("a")] / 2  # byte 0 ends some of them
    prompts = [b"abcd"[: i % 5] * (1 + 5 * (i % 2)) for i in range(7)]
    sampling = Sampling(temperature, 4, max_new_tokens=18, speculate=speculate, stop=b"dd")
    texts = collect(model, prompts, sampling)
    model.args.max_batch_size = 1
    assert texts == collect(model, prompts, sampling)
    if temperature == 0:
        assert texts == [collect(model, [prompt], sampling)[0] for prompt in prompts]


def test_the_cache_has_the_rows_of_a_batch_and_no_more(models: dict[str, Transformer]) -> None:
    caches, model = [], models["latent"]
    with pytest.MonkeyPatch.context() as patch:
        new_cache = model.new_cache
        patch.setattr(model, "new_cache", lambda *given: caches.append(given[:2]) or new_cache(*given))
        patch.setattr(decode, "PREFILL_POSITIONS", 20)
        collect(model, PROMPTS * 3, replace(GREEDY, stop=b"a"))
    (first, *others) = caches
    assert first == (3, CONTEXT) and others
    assert all(n_rows * length <= 20 for n_rows, length in others)  # while prompts are read


# --- samples of a prompt --------------------------------------------------------------------------------------------


def samples(model: Transformer, prompts: list[bytes], sampling: Sampling, n: int) -> list[list[bytes]]:
    """The samples of each prompt."""
    texts = [b""] * n * len(prompts)
    for number, piece in generate.generate(model, prompts, sampling, num_samples=n):
        texts[number] += piece
    return [texts[i : i + n] for i in range(0, len(texts), n)]


def test_a_sample_depends_on_its_number_alone() -> None:
    model, sampling = tiny(), replace(GREEDY, temperature=1.0, top_k=4, max_new_tokens=12)
    many = samples(model, PROMPTS[:4], sampling, 5)
    assert [first for first, *_ in many] == collect(model, PROMPTS[:4], sampling)
    for size in (1, 2, 50):
        model.args.max_batch_size = size
        assert samples(model, PROMPTS[:4], sampling, 3) == [texts[:3] for texts in many]
    assert len({text for texts in many for text in texts}) == 20
    assert samples(model, [b"ab"], replace(sampling, temperature=0), 3) == [[complete(model, b"ab", GREEDY)[:12]] * 3]


def test_no_two_samples_share_a_generator() -> None:
    drawn = {generate.uniform(row_generator(*numbers)) for numbers in itertools.product(range(12), repeat=3)}
    assert len(drawn) == 12**3


# --- log-probabilities ----------------------------------------------------------------------------------------------


def expected_logprobs(model: Transformer, prompt: bytes, new: bytes) -> list[float | None]:
    """Of each byte by a forward pass over its context, without a cache; None where that has none before it."""
    model_module.attn_impl = "naive"
    given, context, passes, nats = prompt or b"\0", model.args.max_seq_len, {}, []
    text = given + new
    for end, byte in enumerate(text):
        seen = max(end, len(given))  # of the prompt, the model sees what its first new byte sees
        start = next(s for s in range(0, seen, context // 2) if seen - s <= context)
        if start not in passes:
            logits = model(torch.tensor([list(text[start : start + context])]))
            passes[start] = logits[0].double().log_softmax(-1)
        nats.append(passes[start][end - start - 1, byte].item() if end > start else None)
    return nats if prompt else nats[1:]


@settings(max_examples=8, deadline=None)
@given(
    st.integers(0, 10**6), st.lists(st.lists(st.sampled_from(b"abcd"), max_size=40).map(bytes), min_size=1, max_size=4),
    st.integers(0, 3), st.integers(1, 3), st.sampled_from([0.0, 0.7]), st.sampled_from([b"", b"bd"]),
    st.sampled_from(["naive", "absorb"]),
)  # fmt: skip
def test_logprobs_are_those_of_a_forward_pass_over_the_text(
    seed: int, prompts: list[bytes], speculate: int, n: int, temperature: float, stop: bytes, attn_impl: str
) -> None:
    """Before temperature and top-k, whatever drafts, batches, samples and stop strings there are."""
    model = guessing(seed, max_batch_size=3)
    model.head.weight[0] = model.head.weight[ord("a")] / 2  # byte 0 ends some of them
    model.head.weight.mul_(0.1)  # logits as small as a trained model's, and with them float32's rounding
    model_module.attn_impl = attn_impl
    sampling = Sampling(temperature, 3, max_new_tokens=20, stop=stop, speculate=speculate)
    output, logprobs, texts = io.BytesIO(), {}, samples(model, prompts, sampling, n)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(output))
        patch.setattr(generate.model_module, "attn_impl", attn_impl)
        writer = generate.LogprobWriter(prompts, n, logprobs, model)
        generate.write_results(model, prompts, sampling, writer, generate.Tally(), n, logprobs)
        lines = [json.loads(line) for line in output.getvalue().splitlines()]
    assert logprobs == {}
    for row, prompt in enumerate(prompts):
        for sample, text in enumerate(texts[row]):
            ours = [line for line in lines if (line["prompt"], line["sample"]) == (row, sample)]
            assert bytes(line["byte"] for line in ours) in (prompt + text, prompt + text + b"\0")
            assert [line["position"] for line in ours] == list(range(len(ours)))
            assert [line["new"] for line in ours] == [i >= len(prompt) for i in range(len(ours))]
            new = bytes(line["byte"] for line in ours if line["new"])
            for line, nats in zip(ours, expected_logprobs(model, prompt, new), strict=True):
                assert line["logprob"] == (None if nats is None else pytest.approx(nats, abs=1e-5))
    order = [(line["prompt"], line["sample"], line["position"]) for line in lines]
    assert order == sorted(order)


@given(
    st.lists(st.lists(st.sampled_from(b"ab\0"), max_size=12).map(bytes), min_size=1, max_size=6),
    st.lists(st.sampled_from(b"ab"), max_size=4).map(bytes),
    st.integers(0, 14),
)
def test_each_row_ends_at_its_own_end_stop_or_limit(scripts: list[bytes], stop: bytes, limit: int) -> None:
    prompts = [bytes([100 + i]) for i in range(len(scripts))]
    texts = collect(
        Script(dict(zip(prompts, scripts, strict=True))), prompts, Sampling(stop=stop, max_new_tokens=limit)
    )
    expected = [script.split(b"\0")[0][:limit] for script in scripts]
    assert texts == [text.split(stop)[0] if stop else text for text in expected]


@given(st.lists(st.lists(st.sampled_from(b"ab"), max_size=5).map(bytes)), st.lists(st.sampled_from(b"ab")).map(bytes))
def test_a_row_gives_all_that_is_certain_and_no_more(pieces: list[bytes], stop: bytes) -> None:
    row, given_out, taken = Row(0, Sampling(stop=stop)), b"", b""
    for piece in pieces:
        if row.ended:
            break
        given_out, taken = given_out + row.take(piece), taken + piece
        text, found, _ = taken.partition(stop) if stop else (taken, b"", b"")
        assert row.ended == bool(found)
        # what could still become the stop string is its longest prefix that the text ends with
        open_ends = [n for n in range(len(stop)) if text.endswith(stop[:n])]
        assert given_out == (text if found else text[: len(text) - max(open_ends, default=0)])
    given_out += b"" if row.ended else row.take([0])
    assert row.ended and given_out == (taken.split(stop)[0] if stop else taken)


def test_a_stop_string_in_the_prompt_is_none() -> None:
    assert complete(Script({b"a": b"ab--b"}), b"a", Sampling(stop=b"aa")) == b"ab--b"
    assert complete(Script({b"a": b"ab--b"}), b"a", Sampling(stop=b"--")) == b"ab"


def test_a_prompt_may_be_text_and_needs_nothing_else(
    models: dict[str, Transformer], monkeypatch: pytest.MonkeyPatch
) -> None:
    caches = []
    new_cache = models["latent"].new_cache
    monkeypatch.setattr(models["latent"], "new_cache", lambda *given: caches.append(new_cache(*given)) or caches[-1])
    for name in ("latent", "plain"):
        text = complete(models[name], "é")
        assert text == complete(models[name], "é".encode()).decode("utf-8", "replace")
    assert text == complete(models["plain"], "é", Sampling(seed=0)) != complete(models["plain"], "é", Sampling(seed=1))
    few = complete(models["plain"], "é", Sampling(seed=1), max_new_tokens=5, temperature=0)
    assert few == complete(models["plain"], "é", Sampling(temperature=0, max_new_tokens=5))
    with pytest.raises(TypeError, match="max_tokens"):
        complete(models["plain"], "é", max_tokens=5)
    with pytest.raises(ValueError, match="stop must be bytes, got '.'"):
        complete(models["plain"], "é", stop=".")
    assert caches and all(len(layer) == 1 for cache in caches for layer in cache.layers)  # the latent is cached
    assert model_module.attn_impl == "naive"  # as before
    with pytest.raises(generate.GenerationError, match="kv_lora_rank 0"):
        next(generate.generate(models["plain"], [b"a"], GREEDY, attn_impl="absorb"))


def test_a_model_whose_absorbed_attention_is_another_is_not_decoded_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a REPL, too, once `decode.attach` has found it."""
    model = guessing(3, max_seq_len=200, original_seq_len=200)
    text = complete(model, b"ab", GREEDY)
    absorbed = model_module.MLA._attend_absorbed
    changed = lambda *given: (1.5 * (out := absorbed(*given))[0], out[1])  # noqa: E731
    monkeypatch.setattr(model_module.MLA, "_attend_absorbed", changed)
    assert "absorbed attention differs" in str(decode.attach(model))
    assert complete(model, b"ab", GREEDY) == text
    model_module.attn_impl = "absorb"  # whatever that is for another model
    assert complete(model, b"ab", GREEDY) == text
    monkeypatch.undo()
    decode.attach(model)
    assert generate.choose_attn_impl(model) == "absorb"


def test_a_sliding_window_in_a_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing has compared them, text is that of the attention which is trained."""
    checkpoints.save_model(tiny(max_seq_len=200, original_seq_len=200), tmp_path / "model")
    model, text = generate.load_model(tmp_path / "model"), bytearray(b"to be or not to be")

    def attend(mla: Any, q: Any, k: Any, v: Any, positions: Any, cache: Any) -> torch.Tensor:
        if cache is not None:
            k, v = cache.update(mla.layer_id, positions.index, k, v)
        every = torch.arange(k.shape[1])
        last = every[-q.shape[1] :, None] if positions.mask is None else positions.index[:, None, :, None]
        scores = torch.einsum("bshd,bthd->bhst", q, k).masked_fill((every > last) | (every < last - 3), -math.inf)
        return torch.einsum("bhst,bthd->bshd", (mla.softmax_scale * scores).softmax(-1), v)

    monkeypatch.setattr(model_module.MLA, "_attend", attend)
    written = complete(model, bytes(text), replace(GREEDY, max_new_tokens=20))
    with torch.no_grad():
        for byte in written:
            assert model(bytes(text))[-1].argmax() == byte
            text.append(byte)
    assert len(written) == 20


@pytest.mark.slow
def test_the_readmes_example_runs_in_a_new_python(folder: Path) -> None:
    """The Python of its section for a REPL, with another checkpoint."""
    (code,) = re.findall(r"REPL.*?```python\n(.*?)```", (FOLDER / "README.md").read_text(), re.DOTALL)
    assert code.count('"out/nano"') == 1 and '"import "' in code
    code = code.replace('"out/nano"', repr(str(folder / "parrot"))).replace('"import "', '"ab"')
    done = subprocess.run([sys.executable, "-c", code], cwd=FOLDER, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("Transformer(\n") and done.stderr == ""
    assert done.stdout.partition("\n)\n")[2].startswith("cabcab")


# --- sampling -----------------------------------------------------------------------------------------------------


def brute_force(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """Probabilities of one row, from the definitions."""
    probs = np.exp((logits - logits.max()) / temperature)
    ranking = sorted(range(len(probs)), key=lambda i: (-probs[i], i))
    kept = ranking[: top_k or None]
    total = sum(probs[i] for i in kept)
    nucleus, reached = [], 0.0
    for i in kept:
        nucleus.append(i)
        reached += probs[i] / total
        if reached >= top_p and top_p < 1:
            break
    result = np.zeros_like(probs)
    result[nucleus] = probs[nucleus] / probs[nucleus].sum()
    return result


@given(
    st.integers(0, 10**6),
    st.sampled_from([0.1, 1.0, 3.0]),
    st.sampled_from([0, 1, 2, 5, 100, 255, 256, 999]),
    st.sampled_from([1e-9, 0.1, 0.5, 0.9, 0.999, 1.0]),
)
def test_the_distribution_is_that_of_the_definitions(seed: int, temperature: float, top_k: int, top_p: float) -> None:
    logits = np.random.default_rng(seed).normal(size=(2, 256)) * 2
    logits[1] = logits[1].round()  # ties
    probs = distribution(torch.tensor(logits), Sampling(temperature, top_k, top_p))
    expected = [brute_force(row, temperature, top_k, top_p) for row in logits]
    np.testing.assert_allclose(probs, expected, rtol=1e-9, atol=1e-15)
    np.testing.assert_array_equal(probs > 0, np.array(expected) > 0)


def test_the_nucleus_is_the_smallest_set_that_reaches_p() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    sizes = [
        int((distribution(logits, Sampling(1.0, 0, p)) > 0).sum()) for p in (0.1, 0.49, 0.6, 0.74, 0.76, 0.88, 1.0)
    ]
    assert sizes == [1, 1, 2, 2, 3, 4, 4]
    exact = np.array([[0.25, 0.5, 0.125, 0.125]])
    assert [int((generate._truncate(exact, 4, p) > 0).sum()) for p in (0.5, 0.75, 0.875)] == [1, 2, 3]
    # top-k first: of 0.5 and 0.25, the first has two thirds
    assert int((distribution(logits, Sampling(1.0, 2, 0.6)) > 0).sum()) == 1


@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"top_p": 0.8}, {"temperature": 2.0, "top_k": 6, "top_p": 0.9}])
def test_draws_come_with_their_probabilities(settings: dict[str, float]) -> None:
    sampling = Sampling(**{"temperature": 1.0, **settings})
    n = 20_000
    logits = torch.tensor(np.random.default_rng(5).normal(size=8)).float().expand(n, -1)
    drawn = sample(logits, sampling, [torch.Generator().manual_seed(7)] * n)
    counts = np.bincount(drawn, minlength=8)
    probs = brute_force(logits[0].double().numpy(), sampling.temperature, sampling.top_k, sampling.top_p)
    assert (counts[probs == 0] == 0).all()
    expected = n * probs[probs > 0]
    chi_square = ((counts[probs > 0] - expected) ** 2 / expected).sum()
    assert chi_square < 30  # seven degrees of freedom at most: less than one in 10,000 seeds fails


def test_a_byte_of_no_probability_is_never_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 1.0, -math.inf]])
    for uniform, drawn in [(0.0, 1), (1 - 2**-53, 3)]:
        number = torch.tensor([uniform], dtype=torch.float64)
        monkeypatch.setattr(torch, "rand", lambda *_, number=number, **__: number)
        assert sample(logits, Sampling(1.0), [torch.Generator()]) == [drawn]


@pytest.mark.parametrize("temperature", [5e-324, 1e-30, 1e300])
def test_no_temperature_overflows(temperature: float) -> None:
    logits = torch.tensor([[1e30, -1e30, 0.0, -math.inf]])
    probs = distribution(logits, Sampling(temperature))
    assert probs.sum() == pytest.approx(1)
    assert probs[0, 3] == 0
    assert probs[0, 0] == (1 if temperature < 1 else pytest.approx(1 / 3))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_logits_that_are_no_numbers_are_refused(value: float, temperature: float) -> None:
    with pytest.raises(generate.GenerationError, match="not a number"):
        sample(torch.tensor([[0.0, 1.0], [value, 1.0]]), Sampling(temperature), [torch.Generator()] * 2)


# --- speculation ------------------------------------------------------------------------------------------------------


def guessing(seed: int, **changes: int) -> Transformer:
    """A random model of four likely bytes, "abcd", so that its MTP module's drafts are right now and then."""
    model = tiny(**changes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape, generator=generator) * 2 * p.shape[-1] ** -0.5)
        a, b = torch.randn(2, model.args.dim, generator=generator)
        model.head.weight.zero_()[torch.tensor(list(b"abcd"))] = torch.stack([a, -a, b / 2, -b / 2])
    return with_decoder(model)


@st.composite
def speculations(draw: st.DrawFn) -> tuple[Transformer, list[bytes], Sampling]:
    """A model, prompts and a sampling with drafts."""
    changes = {"n_mtp_layers": draw(st.integers(1, 3)), "max_seq_len": draw(st.sampled_from([1, 2, 5, 16, 40]))}
    changes |= {"kv_lora_rank": draw(st.sampled_from([0, 8])), "q_lora_rank": draw(st.sampled_from([0, 6]))}
    prompts = draw(st.lists(st.lists(st.sampled_from(b"abcd"), max_size=30).map(bytes), min_size=1, max_size=4))
    sampling = Sampling(
        seed=draw(st.integers(0, 9)),
        max_new_tokens=draw(st.integers(1, 45)),
        stop=draw(st.lists(st.sampled_from(b"abcd"), max_size=3).map(bytes)),
        speculate=draw(st.integers(1, 6)),
    )
    return guessing(draw(st.integers(0, 10**6)), **changes), prompts, sampling


@settings(max_examples=15, deadline=None)
@given(speculations(), st.sampled_from(["naive", "absorb"]))
def test_greedy_text_is_the_same_with_drafts(
    speculation: tuple[Transformer, list[bytes], Sampling], attn_impl: str
) -> None:
    model, prompts, sampling = speculation
    model_module.attn_impl = attn_impl
    sampling = replace(sampling, temperature=0)
    assert collect(model, prompts, sampling) == collect(model, prompts, replace(sampling, speculate=0))


@settings(max_examples=8, deadline=None)
@given(speculations())
def test_sampled_text_with_drafts_depends_on_prompt_seed_and_row_alone(
    speculation: tuple[Transformer, list[bytes], Sampling],
) -> None:
    model, prompts, sampling = speculation
    texts = collect(model, prompts, sampling)
    assert collect(model, prompts, sampling) == texts
    assert collect(model, prompts[:1], sampling) == texts[:1]


def test_drafts_are_right_now_and_then_and_save_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    model_module.attn_impl = "absorb"
    model, calls, tally = guessing(3, max_seq_len=512), [], generate.Tally()
    forward = model.forward_with_hidden
    monkeypatch.setattr(model, "forward_with_hidden", lambda *given: calls.append(given) or forward(*given))
    sampling = replace(GREEDY, max_new_tokens=200, speculate=3)
    text = b"".join(piece for _, piece in generate.generate(model, [b"ab"], sampling, tally))
    assert 20 < tally.accepted < tally.drafted
    assert len(calls) == 2 + (len(text) - 1 - tally.accepted)  # the prompt in two, then once for each byte not drafted


@pytest.mark.parametrize(("attn_impl", "depth"), [("naive", 1), ("absorb", 2), ("naive", 3)])
def test_drafts_come_from_all_states_and_bytes_before(
    attn_impl: str, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was drafted, rejected, refilled and left meanwhile, each module drafts what training would predict."""
    model_module.attn_impl = attn_impl
    model = guessing(5, max_seq_len=24, original_seq_len=24, n_mtp_layers=depth)
    checked = [0] * depth
    draft = Drafter.draft

    def checking(drafter: Drafter, *given: object) -> tuple[list[list[int]], np.ndarray]:
        drafts, q = draft(drafter, *given)
        for row, (drafted, limit) in enumerate(zip(drafts, given[2], strict=True)):
            if limit == 0:
                continue
            context = drafter.batch.context(row)
            window, n = torch.tensor([[*context, *drafted]]), len(context) - 1
            h, _ = model.forward_hidden(window[:, :n])
            for i, module in enumerate(model.mtp[:limit]):
                h, _ = module(h, model.embed(window[:, i + 1 : i + 1 + n]), model.positions(n, None), None)
                assert drafted[i] == model.head(h)[0, -1].argmax()
                checked[i] += 1
        return drafts, q

    monkeypatch.setattr(Drafter, "draft", checking)
    prompts = [b"abca", b"b", b"abcdabcdab"]
    collect(model, prompts, replace(GREEDY, speculate=3, max_new_tokens=60))
    assert min(checked) > 30


def test_accepted_and_redrawn_bytes_have_the_models_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over all drafts and chances: sum_x q(x) · (stays(x) · [x] + (1 - stays(x)) · anew(x)) = p."""
    rng = np.random.default_rng(0)
    chance = [0.0]
    monkeypatch.setattr(generate, "uniform", lambda generator: chance[0])
    for trial in range(50):
        p, q = rng.dirichlet(np.full(6, 0.5), size=(2, 2))
        if trial % 3 == 0:
            p[0, :2], q[0, 1:3] = 0, 0
            p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
        total = np.zeros(6)
        for x in q[0].nonzero()[0]:
            stays = min(1.0, float(p[0, x] / q[0, x]))
            total[x] += q[0, x] * stays
            for chance[0], expected in ((stays - 1e-9, 1), (stays + 1e-9, 0)):
                if not 0 <= chance[0] < 1:
                    continue
                n, after = accept(p, q, [x], None)
                assert n == expected
                if n == 0:
                    total += q[0, x] * (1 - stays) * after
                else:
                    np.testing.assert_array_equal(after, p[1])
        np.testing.assert_allclose(total, p[0], rtol=0, atol=1e-12)


def exact(model: Transformer, prompt: bytes, sampling: Sampling, n: int) -> dict[bytes, float]:
    """The probability of each text of up to `n` bytes, by going through all of them."""
    if n == 0:
        return {b"": 1.0}
    (probs,) = distribution(model(torch.tensor([list(prompt)]))[:, -1], sampling)
    texts = {b"": float(probs[0])}
    for byte in range(1, len(probs)):
        for rest, p in exact(model, prompt + bytes([byte]), sampling, n - 1).items() if probs[byte] > 0 else ():
            texts[bytes([byte]) + rest] = float(probs[byte]) * p
    return texts


@pytest.mark.parametrize(("speculate", "how"), [
    (1, {}), (1, {"top_k": 2}), (3, {"top_p": 0.7}), (3, {"temperature": 1.7, "top_k": 3, "top_p": 0.9}),
])  # fmt: skip
def test_texts_with_drafts_come_with_their_exact_probabilities(how: dict[str, float], speculate: int) -> None:
    model_module.attn_impl = "absorb"
    model, n = tiny(vocab_size=4, max_batch_size=1000, n_mtp_layers=min(speculate, 2)), 6000
    sampling = Sampling(**{"temperature": 1.0, "seed": 1} | how, max_new_tokens=4, speculate=speculate)
    tally, texts = generate.Tally(), [b""] * n
    for row, piece in generate.generate(model, [b"\1\2"] * n, sampling, tally):
        texts[row] += piece
    assert 0.2 < tally.accepted / tally.drafted < 0.95
    expected = {text: p * n for text, p in exact(model, b"\1\2", sampling, 4).items() if p > 0}
    counts = Counter(texts)
    assert set(counts) <= set(expected)
    rare = [text for text, e in expected.items() if e < 5]
    pairs = [(counts[text], e) for text, e in expected.items() if e >= 5]
    pairs += [(sum(counts[text] for text in rare), sum(expected[text] for text in rare))] if rare else []
    chi_square = sum((count - e) ** 2 / e for count, e in pairs if e > 0)
    freedom = len(pairs) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)  # four standard deviations


def test_the_command_drafts_by_default(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    outputs = []
    for checkpoint, flags, told in [
        ("tiny", [], True),
        ("tiny", ["--speculate", "1"], True),
        ("tiny", ["--speculate", "0"], False),
        ("no-mtp", [], False),
    ]:
        assert generate.main(flags_for(folder, checkpoint, "--prompt", "x", "--temperature", "0", *flags)) == 0
        out, err = capfd.readouterr()
        assert (re.search(r"bytes/s, \d+% of [\d,]+ drafts accepted\n", err) is not None) == told
        outputs.append(out)
    assert len(set(outputs)) == 1


# --- memory that decoding reads -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bytes_to_read_are_those_of_the_tensors_that_are_used(dtype: torch.dtype) -> None:
    """Each tensor by its name; each way in which even routing can choose experts, as often as the others."""
    model = Transformer(ModelArgs.from_dict(TINY | {"n_mtp_layers": 2, "n_layers": 3, "score_func": "sigmoid"}), dtype)
    args, model = model.args, model.to(dtype)
    assert args.n_routed_experts == 4 and args.n_activated_experts == 2
    pairs = list(itertools.combinations(range(4), 2))

    def of(prefixes: tuple[str, ...], n_positions: int) -> float:
        total, ways = 0.0, list(itertools.product(pairs, repeat=n_positions))
        reached = sum(len(set().union(*way)) for way in ways) / len(ways)
        for name, tensor in model.state_dict().items():
            if name.startswith(prefixes):
                total += tensor.nbytes * (reached / 4 if ".experts." in name else 1)
        return total

    for n_rows, n_drafted in [(1, 0), (2, 0), (1, 1), (1, 3), (2, 1)]:
        cache = model.new_cache(n_rows, 40, 3)
        cache.lengths = [5, 17][:n_rows]
        kept = {  # bytes of the positions that are cached, of each layer
            i: sum(tensor[row, :length].nbytes for tensor in layer for row, length in enumerate(cache.lengths))
            for i, layer in enumerate(cache.layers)
        }
        expected = of(("layers.", "norm.", "head."), n_rows * (1 + n_drafted)) + sum(kept[i] for i in range(3))
        for module in [0, 1, 1][:n_drafted]:  # the last module goes on
            expected += of((f"mtp.{module}.", "head."), n_rows) + kept[3 + module]
        reads = metrics.MemoryReads(model)
        reads.count(cache, n_drafted, 0.5)
        assert reads.bytes == pytest.approx(expected, rel=1e-12)
    dense = metrics.MemoryReads(tiny(n_routed_experts=0, kv_lora_rank=0))
    assert all(routed == 0 for _, routed in dense.sizes)


def test_weights_that_decoding_has_in_another_width_count_as_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    (always, routed), _ = metrics.MemoryReads(model).sizes
    model.quantize_weights()
    assert metrics.MemoryReads(model).sizes[0] == (always, routed)
    with monkeypatch.context() as patch:
        patch.setattr(fp8_ops, "gemm_impl", "fp8")
        quantized = metrics.MemoryReads(model).sizes[0]
    model = tiny()
    if model.decoder is None:
        pytest.skip("no C compiler")
    for p in model.parameters():
        p.copy_(p.bfloat16())
    with_decoder(model)  # which keeps what bfloat16 holds as that
    narrow = metrics.MemoryReads(model).sizes[0]
    assert quantized[1] == pytest.approx(routed / 4, rel=0.1) and quantized[0] < always
    assert narrow[1] == pytest.approx(routed / 2, rel=0.1) and narrow[0] == pytest.approx(always / 2, rel=0.1)


def test_decoding_steps_are_counted_and_their_mbu_is_printed(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "read_bandwidth", lambda device: 10e9)
    counts = []
    count = metrics.MemoryReads.count
    monkeypatch.setattr(metrics.MemoryReads, "count", lambda self, *given: counts.append(self) or count(self, *given))
    flags = flags_for(folder, "parrot", "--prompt", "a", "--temperature", "0", "--max-new-tokens", "9")
    for most, told in [(100, False), (1, True)]:
        monkeypatch.setattr(metrics, "MBU_STEPS", most)
        counts.clear()
        assert generate.main([*flags, "--speculate", "0"]) == 0
        assert len(counts) == 8  # the first byte comes with the prompt
        assert bool(re.search(r"bytes/s, MBU \d+% of 10\.0 GB/s\n$", capfd.readouterr().err)) == told


def test_bandwidth_is_that_of_the_fastest_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.accumulate([0, 3, 1, 2, 1, 4] + 10 * [1, 5])  # the second pass takes two seconds
    monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    assert metrics.read_bandwidth(torch.device("cpu")) == 2**27 / 2
    monkeypatch.setattr(torch, "ones", lambda *_, **__: failing())
    assert metrics.read_bandwidth(torch.device("cpu")) is None


def failing() -> None:
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory")


# --- the command --------------------------------------------------------------------------------------------------


def flags_for(folder: Path, checkpoint: str, *arguments: str) -> list[str]:
    short = ["--device", "cpu", "--weights", "fp32", "--max-new-tokens", "60"]
    return ["--ckpt-path", str(folder / checkpoint), *short, *arguments]


def test_a_pipe_gets_the_bytes_as_they_are(folder: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    assert generate.main(flags_for(folder, "parrot", "--prompt", "a\udcffS", "--temperature", "0")) == 0
    out, err = capfdbinary.readouterr()
    assert out == b"a\xff" + HOSTILE
    assert err.count(b"\n") == 1
    assert err.startswith(b"%d bytes in " % (len(HOSTILE) - 1))


@pytest.mark.slow
def test_a_terminal_shows_the_text_of_a_pipe(folder: Path) -> None:
    with terminal(folder, "parrot", "--prompt", "\x1b]0;title\x07S", "--temperature", "0") as child:
        assert child.everything() == rf"\x1b]0;title\x07{SHOWN}" + "\r\n"
    assert child.returncode == 0


def test_the_prompt_alone_is_written_too(folder: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    assert generate.main(flags_for(folder, "tiny", "--prompt", "caf\udcc3", "--max-new-tokens", "0")) == 0
    assert capfdbinary.readouterr().out == b"caf\xc3"


def test_a_file_of_prompts_gives_each_result_in_order_and_a_zero(
    folder: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    file = tmp_path / "prompts"
    prompts = [b"one", b"", b"\xffthree\r", b"four", b"five", b"", b"a prompt longer than the context"]
    file.write_bytes(b"one\n\n\xffthree\r\r\nfour\nfive\n\na prompt longer than the context")
    assert generate.main(flags_for(folder, "tiny", "--input-file", str(file), "--seed", "4")) == 0
    out, err = capfdbinary.readouterr()
    texts = collect(tiny(), prompts, Sampling(seed=4, speculate=1, max_new_tokens=60))
    assert out == b"".join(prompt + text + b"\0" for prompt, text in zip(prompts, texts, strict=True))
    warning, speed = err.decode().splitlines()
    assert warning == (
        "generate.py: warning: prompt 7 is longer than the context of 16 bytes: "
        "the model sees only the last 16 of its 32 bytes"
    )
    assert speed.startswith(f"{sum(map(len, texts)):,} bytes in ")
    assert speed.endswith(", seed 4")


def test_samples_come_after_each_other_and_are_marked(
    folder: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    (tmp_path / "file").write_bytes(b"one\n\nthree\n")
    prompts, sampling = [b"one", b"", b"three"], Sampling(seed=4, top_k=4, speculate=1, max_new_tokens=60)
    texts = samples(tiny(), prompts, sampling, 3)
    flags = ["--input-file", str(tmp_path / "file"), "--top-k", "4", "--seed", "4", "--num-samples"]
    for n in ("3", "1"):
        assert generate.main(flags_for(folder, "tiny", *flags, n, "--max-batch-size", n)) == 0
        wanted = [p + text for p, row in zip(prompts, texts, strict=True) for text in row[: int(n)]]
        assert capfdbinary.readouterr().out == b"".join(text + b"\0" for text in wanted)
    assert generate.main(flags_for(folder, "tiny", "--prompt", "one", *flags[2:], "2")) == 0
    assert capfdbinary.readouterr().out == b"".join(b"one" + text + b"\0" for text in texts[0][:2])


def test_the_command_bounds_the_batch(
    folder: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"one\ntwo\nthree\nfour\nfive\n")
    sizes, outputs, step = [], [], generate.step
    monkeypatch.setattr(generate, "step", lambda batch, *given: sizes.append(len(batch.texts)) or step(batch, *given))
    for flags, most in [([], 3), (["--max-batch-size", "1"], 1), (["--max-batch-size", "1000"], 5)]:
        sizes.clear()
        assert (
            generate.main(
                flags_for(folder, "tiny", "--input-file", str(tmp_path / "file"), "--temperature", "0", *flags)
            )
            == 0
        )
        outputs.append(capfdbinary.readouterr().out)
        assert max(sizes) == most
    assert outputs[0] == outputs[1] == outputs[2]


def test_logprobs_are_lines_of_json(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def lines(*flags: str) -> list[dict[str, Any]]:
        assert generate.main(flags_for(folder, "parrot", "--prompt", "aS", "--temperature", "0", *flags)) == 0
        return [json.loads(line) for line in capfd.readouterr().out.splitlines()]

    new, everything = lines("--logprobs"), lines("--logprobs", "all", "--num-samples", "2")
    assert new[0] == {
        "prompt": 0,
        "sample": 0,
        "position": 2,
        "new": True,
        "byte": HOSTILE[1],
        "logprob": pytest.approx(new[0]["logprob"]),
    }
    assert bytes(line["byte"] for line in new) == HOSTILE[1:] + b"\0"
    assert [line for line in everything if line["new"] and line["sample"] == 0] == new
    for sample in range(2):
        (first, second, *others) = [line for line in everything if line["sample"] == sample]
        assert (first["byte"], first["logprob"], second["byte"]) == (ord("a"), None, ord("S"))
        assert second["logprob"] < -1 < new[0]["logprob"] <= 0 and len(others) == len(new)
    scored = lines("--logprobs", "all", "--max-new-tokens", "0")
    assert scored == everything[:2]


def stdin(monkeypatch: pytest.MonkeyPatch, data: bytes, is_terminal: bool = False) -> None:
    stream = io.TextIOWrapper(io.BytesIO(data))
    monkeypatch.setattr(stream, "isatty", lambda: is_terminal)
    monkeypatch.setattr(sys, "stdin", stream)


@pytest.mark.parametrize("prompt", [b"", b"ab\r\n", b"\xff\0\x1b\n\n", b"-"])
def test_a_prompt_from_stdin_is_taken_as_it_is(
    folder: Path, capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch, prompt: bytes
) -> None:
    text = complete(tiny(), prompt, replace(GREEDY, max_new_tokens=60))
    for is_terminal in (False, True):
        stdin(monkeypatch, prompt, is_terminal)
        assert generate.main(flags_for(folder, "tiny", "--prompt", "-", "--temperature", "0")) == 0
        out, err = capfdbinary.readouterr()
        assert out == prompt + text
        assert err.count(b"Ctrl-D") == int(is_terminal)


def test_a_prompt_from_stdin_is_bounded(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "MAX_PROMPT_BYTES", 1000)
    stdin(monkeypatch, b"x" * 1001)
    assert generate.main(flags_for(folder, "tiny", "--prompt", "-")) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1) and "1,000 bytes" in err and "standard input" in err


@pytest.mark.parametrize(
    ("content", "prompts"),
    [
        (b"\n", [b""]),
        (b"a", [b"a"]),
        (b"a\n", [b"a"]),
        (b"a\r\n", [b"a"]),
        (b"\na\n\n", [b"", b"a", b""]),
        ("a\u2028b\x85c\x0b\r d".encode(), ["a\u2028b\x85c\x0b\r d".encode()]),
    ],
)
def test_only_newlines_separate_prompts(tmp_path: Path, content: bytes, prompts: list[bytes]) -> None:
    (tmp_path / "file").write_bytes(content)
    assert generate.read_prompts(str(tmp_path / "file")) == prompts


def test_a_row_is_written_as_it_comes_and_later_ones_wait() -> None:
    model = Script({b"a": b"123", b"b": b"x", b"c": b"yz45"})
    events = []
    writer = SimpleNamespace(write=lambda data: events.append(data), end=lambda: events.append(None))
    generate.write_results(model, [b"a", b"b", b"c"], GREEDY, writer, generate.Tally())
    assert [e for e in events if e != b""] == [b"a", b"1", b"2", b"3", None, b"bx", None, b"cyz4", b"5", None]


def test_nothing_shown_is_obeyed() -> None:
    everything = "".join(map(chr, range(sys.maxunicode + 1)))
    left = {c for c in visible(everything) if unicodedata.category(c) in ("Cc", "Cf")}
    assert left == {"\n", "\t"}
    assert visible("aä€😀\n\t\x1b\x9b\u202e\U000e0041") == "aä€😀\n\t" + r"\x1b\x9b\u202e\U000e0041"


class FakeTerminal(io.TextIOWrapper):
    """A terminal that remembers what it shows."""

    def __init__(self, encoding: str = "utf-8"):
        super().__init__(io.BytesIO(), encoding=encoding)

    def isatty(self) -> bool:
        return True

    def shown(self) -> bytes:
        return self.buffer.getvalue()


@given(st.binary(), st.lists(st.integers(0, 20)))
def test_the_terminal_shows_the_same_however_the_bytes_arrive(data: bytes, cuts: list[int]) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sys, "stdout", screen := FakeTerminal())
        writer = generate.Writer()
        edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
        for start, end in zip(edges, edges[1:], strict=False):
            writer.write(data[start:end])
        writer.end()
    shown = visible(data.decode("utf-8", "replace"))
    assert screen.shown().decode() == (shown if shown.endswith("\n") or not shown else shown + "\n")


def test_a_terminal_that_knows_few_characters_gets_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", screen := FakeTerminal("ascii"))
    writer = generate.Writer(rule="---\n")
    writer.write("é".encode())
    writer.end()
    assert screen.shown() == b"\\xe9\n---\n"


def test_attention_is_absorbed_where_it_can_be(folder: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    seen, outputs = [], []
    for checkpoint, flags in [("tiny", []), ("plain", []), ("tiny", ["--attn-impl", "naive"])]:
        assert generate.main(flags_for(folder, checkpoint, "--prompt", "x", "--temperature", "0", *flags)) == 0
        seen.append(model_module.attn_impl)
        outputs.append(capfdbinary.readouterr().out)
    assert seen == ["absorb", "naive", "naive"]
    assert outputs[0] == outputs[2] != outputs[1]


def test_without_a_seed_texts_differ_and_the_printed_seed_repeats_one(
    folder: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    def run(*flags: str) -> tuple[bytes, str]:
        assert generate.main(flags_for(folder, "tiny", "--prompt", "x", "--temperature", "1", *flags)) == 0
        out, err = capfdbinary.readouterr()
        return out, err.decode().rpartition("seed ")[2].strip()

    (one, seed), (other, _) = run(), run()
    assert one != other
    assert run("--seed", seed) == (one, seed)


BAD = {
    "no source": ([], "--prompt"),
    "two sources": (["--prompt", "a", "--interactive"], "not allowed with"),
    "unknown flag": (["--prompt", "a", "--foo"], "--foo"),
    "no number": (["--prompt", "a", "--top-k", "many"], "--top-k"),
    "negative length": (
        ["--prompt", "a", "--max-new-tokens", "-1"],
        "--max-new-tokens: must be an integer, 0 or more, got '-1'",
    ),
    "negative top-k": (["--prompt", "a", "--top-k", "-1"], "--top-k: must be an integer, 0 or more"),
    "no samples": (["--prompt", "a", "--num-samples", "0"], "--num-samples: must be an integer from 1"),
    "too many texts": (
        ["--input-file", "{}/tiny/config.json", "--num-samples", "1000000"],
        "texts, at most 10,000,000",
    ),
    "samples of a conversation": (["--interactive", "--num-samples", "2"], "not with --interactive"),
    "logprobs of a conversation": (["--interactive", "--logprobs"], "not with --interactive"),
    "unknown logprobs": (["--prompt", "a", "--logprobs", "5"], "--logprobs"),
    "no batch": (["--prompt", "a", "--max-batch-size", "0"], "--max-batch-size: must be an integer from 1"),
    "negative drafts": (["--prompt", "a", "--speculate", "-1"], "--speculate: must be an integer from 0 to 256"),
    "negative seed": (["--prompt", "a", "--seed", "-5"], "--seed: must be an integer, 0 or more"),
    "top-p 0": (["--prompt", "a", "--top-p", "0"], "--top-p: must be a number above 0 to 1"),
    "top-p too large": (["--prompt", "a", "--top-p", "1.01"], "--top-p: must be"),
    "top-p nan": (["--prompt", "a", "--top-p", "nan"], "--top-p: must be"),
    "negative temperature": (["--prompt", "a", "--temperature", "-0.1"], "--temperature: must be a number from 0"),
    "temperature nan": (["--prompt", "a", "--temperature", "nan"], "--temperature: must be a number from 0"),
    "temperature inf": (["--prompt", "a", "--temperature", "inf"], "--temperature: must be a number from 0"),
    "empty stop": (["--prompt", "a", "--stop", ""], "--stop: must not be empty"),
    "unknown attention": (["--prompt", "a", "--attn-impl", "flash"], "--attn-impl"),
    "missing file": (["--input-file", "no/such\nfile\x1b"], r"no/such file\x1b: no such file"),
    "folder as file": (["--input-file", "."], "Is a directory"),
    "impossible file name": (["--input-file", "a\0b"], "null"),
    "empty file": (["--input-file", "{}/nothing"], "is empty; write one prompt a line"),
    "endless device as file": (["--input-file", "/dev/urandom"], "/dev/urandom"),
    "pipe that nobody writes to": (["--input-file", "{}/pipe"], "pipe"),
    "a huge file": (["--input-file", "{}/huge"], "huge"),
    "drafts without modules": (
        ["--ckpt-path", "{}/no-mtp", "--prompt", "a", "--speculate", "3"],
        "--speculate 3 needs",
    ),
    "escape as flag": (["--prompt", "a", "--\x1b]0;x\x07"], r"\x1b]0;x\x07"),
    "escape as argument": (["--prompt", "a", "\x1b[2J\n\u202e"], r"\x1b[2J"),
    "escape as path": (["--ckpt-path", "no/\x1b[31m\rred", "--prompt", "a"], r"no/\x1b[31m\rred"),
    "escape as choice": (["--prompt", "a", "--dtype", "\x9b1m"], r"\x9b1m"),
    "missing checkpoint": (["--ckpt-path", "no/such/folder", "--prompt", "a"], "no/such/folder"),
    "empty folder": (["--ckpt-path", "{}/empty", "--prompt", "a"], "empty"),
    "file as checkpoint": (["--ckpt-path", "{}/tiny/config.json", "--prompt", "a"], "config.json"),
    "cut checkpoint": (["--ckpt-path", "{}/cut", "--prompt", "a"], "cut"),
    "foreign vocabulary": (["--ckpt-path", "{}/foreign", "--prompt", "a"], "vocab_size is 300"),
    "nothing to absorb": (["--ckpt-path", "{}/plain", "--prompt", "a", "--attn-impl", "absorb"], "use naive"),
}


for flag in ("max-new-tokens", "temperature", "top-k", "top-p", "seed", "speculate"):
    for digits in (500, 5000):  # past float's range, and past the length that Python converts
        BAD[f"{digits} digits as {flag}"] = (["--prompt", "a", f"--{flag}", "7" * digits], f"--{flag}: must be a")


def exit_code(arguments: list[str]) -> int:
    """Runs the command in this process; the parser ends it by itself."""
    try:
        return generate.main(arguments)
    except SystemExit as stopped:
        return stopped.code


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_mistakes_get_one_line_and_nothing_on_stdout(
    folder: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    flags = [flag.replace("{}", str(folder)) for flag in arguments]
    assert exit_code(flags_for(folder, "tiny", *flags)) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("generate.py: error: ")
    assert err.count("\n") == 1 and len(err) < 1000
    assert message in err


def test_a_device_that_is_not_there_is_a_mistake(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    absent = next(d for d, there in [("cuda", torch.cuda.is_available()), ("mps", False)] if not there)
    if absent == "mps" and torch.backends.mps.is_available():
        pytest.skip("this machine has every device")
    assert generate.main(["--ckpt-path", str(folder / "tiny"), "--prompt", "a", "--device", absent]) == 2
    assert absent in capfd.readouterr().err


def test_a_damaged_model_is_reported(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert generate.main(flags_for(folder, "damaged", "--prompt", "a")) == 2
    err = capfd.readouterr().err
    assert err.startswith("generate.py: error: the model's output is not a number")
    assert err.count("\n") == 1


def test_help_explains_the_output(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        generate.main(["--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert "followed by byte 0" in out
    assert r"such as \x1b," in out


def test_a_config_that_is_no_model_is_a_mistake(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((folder / "tiny" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_layers": 0}))
    assert generate.main(["--ckpt-path", str(tmp_path), "--prompt", "a"]) == 2
    assert "n_layers" in capfd.readouterr().err


# --- a conversation -----------------------------------------------------------------------------------------------


def converse(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[bytes], lines: bytes, *flags: str
) -> tuple[list[bytes], bytes]:
    """Runs --interactive on piped lines: the replies, and stderr."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    assert generate.main(flags_for(folder, "tiny", "--interactive", "--max-new-tokens", "20", *flags)) == 0
    out, err = capfd.readouterr()
    assert out == b"" or out.endswith(b"\0")
    return out.split(b"\0")[:-1], err


def test_a_conversation_goes_on_until_it_is_cleared(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    lines = b"one\n\xfftwo\r\n\n/clear\none\n/exit\nnever\n"
    replies, err = converse(folder, monkeypatch, capfdbinary, lines, "--temperature", "0")
    sampling, text, expected = replace(GREEDY, max_new_tokens=20), b"", []
    for line in [b"one", b"\xfftwo", b""]:
        expected.append(complete(tiny(), text + line, sampling))
        text += line + expected[-1]
    assert replies == [*expected, expected[0]]
    assert err.count(b"warning") == 1  # the text outgrows the context once


def test_each_line_is_answered_with_its_own_chance(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    lines = b"one\n/clear\none"
    replies, _ = converse(folder, monkeypatch, capfdbinary, lines, "--seed", "1", "--temperature", "1")
    assert len(set(replies)) == 2
    assert converse(folder, monkeypatch, capfdbinary, lines, "--seed", "1", "--temperature", "1")[0] == replies


def test_a_line_that_is_piped_in_is_bounded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generate, "MAX_PROMPT_BYTES", 1000)
    with open("/dev/zero") as endless:
        monkeypatch.setattr(sys, "stdin", endless)
        assert generate.main(flags_for(folder, "tiny", "--interactive")) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1) and "1,000 bytes" in err and "standard input" in err


def test_no_lines_no_replies(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    assert converse(folder, monkeypatch, capfdbinary, b"")[0] == []


def test_ctrl_c_stops_a_reply_on_a_terminal_and_everything_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(model: object, prompts: list[bytes], *_: object) -> Iterator[tuple[int, bytes]]:
        asked.append(prompts[0])
        yield 0, b"x"
        raise KeyboardInterrupt

    asked = []
    monkeypatch.setattr(generate, "generate", interrupted)
    monkeypatch.setattr(sys, "stdout", screen := FakeTerminal())
    model = SimpleNamespace(args=SimpleNamespace(max_seq_len=99))
    lines = iter([b"a", b"b", b"", b"/clear", b"c", None])
    generate.interact(model, GREEDY, generate.Writer(), generate.Tally(), lambda: next(lines))
    # what was shown stays in the text, and what is typed then stands on a line of its own; an empty line just goes on
    assert asked == [b"a", b"ax\nb", b"ax\nbx", b"c"]
    assert screen.shown() == b"x\n" * 4
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO()))
    with pytest.raises(KeyboardInterrupt):
        generate.interact(model, GREEDY, generate.Writer(b"\0"), generate.Tally(), lambda: b"a")


def test_sigterm_ends_a_conversation_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    def terminated(*_: object) -> Iterator[tuple[int, bytes]]:
        yield 0, b"x"
        raise command.Terminated

    def at_the_prompt(_: str) -> str:
        raise command.Terminated

    monkeypatch.setattr(generate, "generate", terminated)
    monkeypatch.setattr("builtins.input", at_the_prompt)
    monkeypatch.setattr(sys, "stdout", FakeTerminal())
    model = SimpleNamespace(args=SimpleNamespace(max_seq_len=99))
    with pytest.raises(command.Terminated):
        generate.interact(model, GREEDY, generate.Writer(), generate.Tally(), iter([b"a", None]).__next__)
    with pytest.raises(command.Terminated):
        generate.keyboard_line()


# --- real processes -----------------------------------------------------------------------------------------------


class Terminal:
    """A process that has a terminal for its standard input and output."""

    def __init__(self, arguments: list[str]):
        self.master, slave = pty.openpty()
        environment = os.environ | {"TERM": "dumb", "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "generate.py", *arguments],
            cwd=FOLDER,
            env=environment,
            stdin=slave,
            stdout=slave,
            stderr=subprocess.PIPE,
            preexec_fn=lambda: take_terminal(0),
            start_new_session=True,
        )
        os.close(slave)
        self.seen = b""

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def read(self, wait: float = 60) -> bytes:
        """Returns what comes next; empty at the end."""
        if not select.select([self.master], [], [], wait)[0]:
            raise TimeoutError(f"nothing came; so far: {self.seen!r}")
        with contextlib.suppress(OSError):  # Linux reports the end of a terminal as an error
            data = os.read(self.master, 65536)
            self.seen += data
            return data
        return b""

    def until(self, condition: Callable[[bytes], bool]) -> None:
        while not condition(self.seen):
            assert self.read(), self.seen

    def everything(self) -> str:
        while self.read():
            pass
        return self.seen.decode()

    @property
    def returncode(self) -> int:
        return self.process.wait(60)


def take_terminal(descriptor: int) -> None:
    """Makes a terminal the one whose keyboard signals reach this process."""
    import fcntl
    import termios

    fcntl.ioctl(descriptor, termios.TIOCSCTTY, 0)


@contextlib.contextmanager
def terminal(folder: Path, checkpoint: str, *arguments: str) -> Iterator[Terminal]:
    child = Terminal(flags_for(folder, checkpoint, *arguments))
    try:
        yield child
    finally:
        if child.process.poll() is None and sys.exc_info()[0] is not None:
            child.process.kill()
        child.process.communicate()
        os.close(child.master)


@pytest.mark.slow
def test_a_conversation_on_a_terminal(folder: Path) -> None:
    with terminal(folder, "parrot", "--interactive", "--temperature", "0", "--max-new-tokens", "100000000") as child:
        child.until(lambda seen: seen.endswith(b"> "))
        child.type("S\n")
        child.until(lambda seen: seen.endswith(b"!\r\n> "))
        assert child.seen.decode() == f"> S\r\n{SHOWN[1:]}\r\n> "
        child.type("/clear\n")
        child.until(lambda seen: seen.endswith(b"/clear\r\n> "))
        child.type("\x10\x10\n")  # the history: two lines up
        child.until(lambda seen: seen.count(b"!\r\n> ") == 2)
        for _ in range(2):  # a second Ctrl-C does what the first did
            child.type("a\n")
            child.until(lambda seen: seen.endswith(b"bcabcabc"))
            child.type("\x03")  # Ctrl-C
            child.until(lambda seen: seen.endswith(b"\r\n> "))
        child.type("S\n")
        child.until(lambda seen: seen.count(b"!\r\n> ") == 3)
        child.type("\x04")  # Ctrl-D
        child.everything()
    assert child.returncode == 0
    assert child.seen.count(SHOWN[1:].encode()) == 3
    assert b"\x1b" not in child.seen


def test_ctrl_c_at_the_prompt_ends(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(prompt: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    assert generate.keyboard_line() is None
    assert capsys.readouterr().out == "\n"


def start(folder: Path, *arguments: str, stdout: int = subprocess.PIPE) -> subprocess.Popen:
    """Starts a generation that never ends."""
    flags = flags_for(folder, "parrot", "--prompt", "a", "--temperature", "0", "--max-new-tokens", "1000000000")
    return subprocess.Popen(
        [sys.executable, "generate.py", *flags, *arguments],
        cwd=FOLDER,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=stdout,
        stderr=subprocess.PIPE,
    )


@pytest.mark.slow
def test_an_interrupted_and_an_unread_generation_end_quietly(folder: Path) -> None:
    full = os.open("/dev/full", os.O_WRONLY) if os.path.exists("/dev/full") else None
    interrupted, unread = start(folder), start(folder)
    unwritable = start(folder, stdout=full) if full is not None else None
    assert interrupted.stdout.read(9) == b"abcabcabc"
    interrupted.send_signal(signal.SIGINT)
    rest, err = interrupted.communicate(timeout=60)
    assert (interrupted.returncode, err) == (130, b"")
    assert b"abcabcabc".startswith(rest[:9])  # what was written before stays
    assert unread.stdout.read(2) == b"ab"
    unread.stdout.close()
    assert (unread.wait(60), unread.stderr.read()) == (141, b"")
    if unwritable is not None:
        os.close(full)
        assert unwritable.wait(60) == 2
        assert (
            unwritable.stderr.read()
            == b"generate.py: error: cannot write to standard output: No space left on device\n"
        )


def is_prepared(pid: int) -> bool:
    """Whether a process has set its handler of SIGTERM: from then on, no signal may leave a traceback."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        (caught,) = re.findall(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
        return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)
    return False


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_any_moment_ends_quietly(folder: Path, signum: int) -> None:
    for delay in (0, 0.3, 1, 2.5):
        with start(folder, stdout=subprocess.DEVNULL) as process:
            while not is_prepared(process.pid):
                assert process.poll() is None
                time.sleep(0.002)
            time.sleep(delay)
            for _ in range(3):
                process.send_signal(signum)
            assert (process.wait(60), process.stderr.read()) == (130, b""), delay


@pytest.mark.slow
def test_a_signal_ends_a_conversation_in_a_pipe(folder: Path) -> None:
    flags = flags_for(folder, "parrot", "--interactive", "--temperature", "0", "--max-new-tokens", "1000000000")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "generate.py", *flags], cwd=FOLDER, **pipes) as process:
        process.stdin.write(b"a\n")
        process.stdin.flush()
        assert process.stdout.read(3) == b"bca"
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert (process.wait(60), process.stderr.read()) == (130, b"")


@pytest.mark.slow
def test_sigterm_ends_a_conversation_with_a_human(folder: Path) -> None:
    with terminal(folder, "parrot", "--interactive", "--temperature", "0") as child:
        child.until(lambda seen: seen.endswith(b"> "))
        while child.process.poll() is None:  # readline, which sees no signal between its prompt and its wait for keys
            child.process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
        child.everything()
        assert child.returncode == 130


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "redirection", "code", "out", "err"),
    [
        ("--prompt S", ">&-", 0, b"", rb"\d+ bytes in .*\n"),
        ("--prompt S", "2>/dev/full", 0, HOSTILE, b""),
        ("--prompt S", "<&- >&- 2>&-", 0, b"", b""),
        ("--input-file one", ">/dev/full", 2, b"", rb"generate.py: error: cannot write to standard output: No .*\n"),
        ("--input-file one", "<&-", 0, HOSTILE + b"\0", rb"\d+ bytes in .*\n"),
        ("--interactive", "<&-", 0, b"", rb"0 bytes in .*\n"),
        ("--interactive", "</dev/full >/dev/full", 2, b"", rb"generate.py: error: [^\n]+\n"),
        ("--help", ">/dev/full", 2, b"", rb"generate.py: error: cannot write to standard output: No .*\n"),
    ],
)
def test_standard_streams_may_be_closed_or_full(
    folder: Path, source: str, redirection: str, code: int, out: bytes, err: bytes
) -> None:
    (folder / "one").write_text("S\n")
    script = f'exec "$0" "$@" {source} {redirection}'
    flags = [*flags_for(folder, "parrot", "--temperature", "0"), "--max-new-tokens", "200"]
    done = subprocess.run(
        ["sh", "-c", script, sys.executable, FOLDER / "generate.py", *flags],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (code, out), done.stderr
    assert re.fullmatch(err, done.stderr), done.stderr


@pytest.mark.slow
def test_bfloat16_on_a_cpu_without_its_products(folder: Path) -> None:
    """As on one whose widest registers are AVX2's, where oneDNN packs no bfloat16 weights."""
    flags = [sys.executable, "generate.py", "--ckpt-path", folder / "tiny", "--prompt", "a", "--dtype", "bf16"]
    done = subprocess.run(
        [*flags, "--device", "cpu", "--temperature", "0", "--max-new-tokens", "20", "--speculate", "0"],
        cwd=FOLDER,
        env=os.environ | {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
        capture_output=True,
        timeout=120,
    )
    assert (done.returncode, len(done.stdout)) == (0, 21), done.stderr

"""Decoders against the modules of model.py, in C and by CUDA graphs; how they are compared, and how C is compiled."""

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import decode
import generate
import model as model_module
from model import KVCache, ModelArgs, Transformer

SHAPE = {"max_batch_size": 4, "max_seq_len": 700, "original_seq_len": 700, "dim": 40, "inter_dim": 70}
SHAPE |= {"moe_inter_dim": 26, "n_layers": 3, "n_heads": 3, "n_routed_experts": 6, "n_shared_experts": 1}
SHAPE |= {"n_activated_experts": 2, "kv_lora_rank": 44, "qk_nope_head_dim": 9, "qk_rope_head_dim": 6, "v_head_dim": 11}
SHAPE |= {"n_mtp_layers": 2, "score_func": "sigmoid", "route_scale": 1.5}


@pytest.fixture(autouse=True)
def absorbed() -> Iterator[None]:
    """Attention by latents, and afterwards what there was before; threads likewise."""
    before, threads = model_module.attn_impl, torch.get_num_threads()
    model_module.attn_impl = "absorb"
    yield
    model_module.attn_impl = before
    torch.set_num_threads(threads)


def make(stored: torch.dtype = torch.float32, **changes: Any) -> Transformer:
    """A model with random weights everywhere, each a number of dtype `stored`."""
    model = Transformer(ModelArgs.from_dict(SHAPE | changes))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            scale = 1.0 if p.ndim == 1 else 1.5 * p.shape[-1] ** -0.5
            p.copy_((torch.randn(p.shape, generator=generator) * scale).to(stored))
    for gate in model.gates():
        if gate.bias is not None:
            gate.bias.normal_(generator=generator)
    return model.eval().requires_grad_(False)


def attached(model: Transformer) -> Transformer:
    """The same model with a decoder."""
    assert decode.attach(model) is None and model.decoder is not None
    return model


def remembering(model: Transformer, lengths: list[int], size: float = 1.0) -> KVCache:
    """A cache full of chance, so many positions of each row filled."""
    cache = model.new_cache(len(lengths), model.args.max_seq_len - 1)
    for i, layer in enumerate(cache.layers):
        noise = torch.randn(layer[0].shape, generator=torch.Generator().manual_seed(i)) * size
        layer[0].copy_(noise.bfloat16())  # numbers that each dtype of a cache has
    cache.lengths = list(lengths)
    return cache


def outputs(
    model: Transformer, lengths: list[int], width: int, size: float = 1.0, before: list[torch.Tensor] | None = None
) -> list[torch.Tensor]:
    """The states and logits of the main model and of each MTP module, and the new entries of each layer's memory.

    A module makes them of the states before it: the model's own, or those of other outputs, `before`.
    """
    tokens = torch.randint(1, 256, (2, len(lengths), width), generator=torch.Generator().manual_seed(2))
    cache = remembering(model, lengths, size)
    for layer in cache.layers:
        layer[0][:, max(lengths) + width :] = float("nan")  # what is not there yet
    with torch.inference_mode():
        results = [*model.forward_with_hidden(tokens[0], cache)]
        for depth in range(len(model.mtp)):
            states = (before or results)[2 * depth].bfloat16().to(model.compute_dtype)  # as each dtype has them
            results += model.mtp_forward(depth, states, tokens[1], cache)
    return results + [torch.cat([layer[0][i, n : n + width] for i, n in enumerate(lengths)]) for layer in cache.layers]


def distances(results: list[torch.Tensor], expected: list[torch.Tensor]) -> list[float]:
    """How far results are from others, relative to these."""
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(results, expected, strict=True)]


def error(model: Transformer, lengths: list[int], width: int, threads: int, size: float = 1.0) -> float:
    """How far decode.c is from the modules, at most."""
    torch.set_num_threads(threads)
    expected = outputs(model, lengths, width, size)
    model.decoder = decode.CDecoder(model)
    return torch.tensor(distances(outputs(model, lengths, width, size, expected), expected)).max().item()  # or NaN


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.one_of(st.integers(0, 9), st.integers(0, 600)), min_size=1, max_size=4),
    st.integers(1, 16),
    st.integers(1, 5),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([0.1, 1.0, 10.0]),
)
@example([250], 16, 1, torch.float32, 1.0)  # some look at 256 positions, others at more
def test_memories_rows_and_threads(
    lengths: list[int], width: int, threads: int, stored: torch.dtype, size: float
) -> None:
    """Weights that bfloat16 holds are read as such, and change nothing; scores are small, or one outweighs all."""
    model = make(stored)
    # the rounding of scores grows with them
    assert error(model, lengths, width, threads, size) < 1e-5 * (1 + size)
    assert model.decoder.main.head.kind == (decode.BF16 if stored == torch.bfloat16 else decode.FP32)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "values",
    [
        {"kv_lora_rank": 64},
        {"kv_lora_rank": 32, "v_head_dim": 32, "dim": 64, "n_heads": 4},
        {"kv_lora_rank": 33, "qk_nope_head_dim": 300, "n_heads": 16},
    ],
)
@pytest.mark.parametrize(("lengths", "width"), [([3, 100, 302], 1), ([3, 100, 302], 3), ([301], 4)])
def test_bfloat16(values: dict[str, int], threads: int, lengths: list[int], width: int) -> None:
    """A model in bfloat16 is nearer to float32 by decode.c than by the modules, which round more often.

    Every expert is chosen: where rounding decides which, results are far apart by right.
    """
    values = {"n_activated_experts": 6} | values
    expected = outputs(make(torch.bfloat16, **values), lengths, width)
    model = make(torch.bfloat16, **values).to(torch.bfloat16)
    model.compute_dtype = torch.bfloat16
    theirs = distances(outputs(model, lengths, width, 1.0, expected), expected)
    torch.set_num_threads(threads)
    model.decoder = decode.CDecoder(model)
    results = outputs(model, lengths, width, 1.0, expected)
    assert [x.dtype for x in results[:4]] == [torch.bfloat16, torch.float32] * 2
    ours = distances(results, expected)
    assert min(ours) > 1e-4 and sum(ours) < sum(theirs)
    assert all(our < 1.5 * their for our, their in zip(ours, theirs, strict=True))  # chance has its part in each
    main = model.decoder.main
    assert main.head.kind == main.blocks[0].wo.kind == decode.PAIRS and main.blocks[1].gate.kind == decode.FP32


@pytest.mark.parametrize("values", [{}, {"q_lora_rank": 24}, {"n_routed_experts": 0}, {"n_shared_experts": 0}])
@pytest.mark.parametrize("act", ["silu", "gelu", "relu2"])
def test_kinds_of_layers(values: dict[str, int], act: str) -> None:
    assert error(make(hidden_act=act, **values), [70, 0], 2, 2) < 1e-5


def test_what_is_no_number_stays_visible() -> None:
    """A damaged weight gives states that are no numbers, as the modules do, and not a crash."""
    model = make()
    model.layers[1].ffn.gate.weight[2, 3] = float("nan")
    model.layers[0].attn.wo.weight[0] = float("inf")
    attached(model)
    with torch.inference_mode():
        h, logits = model.forward_with_hidden(torch.tensor([[65, 66]]), model.new_cache(1, 8))
    assert h.isnan().all() and logits.isnan().all()


@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7FC00001, 0x7FC00000])
def test_what_is_no_number_in_the_memory_stays_visible(bits: int) -> None:
    model = attached(make())
    cache = remembering(model, [5])
    cache.layers[1][0].view(torch.int32)[0, 3, 45] = bits  # of a rotary key: it goes through the softmax
    with torch.inference_mode():
        h, logits = model.forward_with_hidden(torch.tensor([[65]]), cache)
    assert h.isnan().all() and logits.isnan().all()


def test_tokens_out_of_range_are_refused() -> None:
    model = attached(make())
    with torch.inference_mode():
        for token in (-1, 256, 10**12):
            with pytest.raises(IndexError):
                model.forward_with_hidden(torch.tensor([[65, token]]), model.new_cache(1, 8))
        narrow, wide = (
            model.forward_with_hidden(torch.tensor([[65, 66]], dtype=d), model.new_cache(1, 8))[1]
            for d in (torch.int32, torch.int64)
        )
    assert torch.equal(narrow, wide)


def test_too_many_positions_are_refused() -> None:
    model = attached(make())
    with torch.inference_mode():
        for capacity, length, message in ((8, 7, "the cache holds 8"), (800, 699, "the context is")):
            cache = model.new_cache(1, capacity)
            cache.lengths = [length]
            with pytest.raises(ValueError, match=message):
                model.forward_with_hidden(torch.tensor([[65, 66]]), cache)
            with pytest.raises(ValueError, match=message):
                model.mtp_forward(0, torch.zeros(1, 2, 40), torch.tensor([[65, 66]]), cache)


def test_many_positions_and_plain_attention_stay_with_the_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    model = attached(make())
    monkeypatch.setattr(model.decoder, "forward_with_hidden", lambda *_: pytest.fail("decode.c was called"))
    with torch.inference_mode():
        model(torch.full((2, 40), 65), model.new_cache(2, 50))
    plain = make(kv_lora_rank=0)
    assert decode.attach(plain) is None and plain.decoder is None


def test_where_a_thread_was_late_one_does_it_all_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where other programs want the processors too, threads that wait for each other are many times slower."""
    model, threads, late = attached(make()), [], [False]
    run = decode.library().run

    def watched(*given: Any) -> int:
        threads.append(given[2]._obj.threads)
        assert run(*given) <= 0  # whatever else runs here meanwhile
        return -late[0]

    monkeypatch.setattr(decode, "library", lambda: SimpleNamespace(run=watched))
    torch.set_num_threads(2)

    def calls(n: int) -> list[int]:
        threads.clear()
        with torch.inference_mode():
            for _ in range(n):
                model.forward_with_hidden(torch.tensor([[65]]), model.new_cache(1, 8))
        return threads

    assert calls(3) == [2, 2, 2]
    late[0] = True
    assert calls(1 + 32 + 1 + 64 + 1) == [2] + [1] * 32 + [2] + [1] * 64 + [2]  # twice as long each time
    assert calls(20_000).count(2) <= 25
    late[0] = False
    assert calls(1024 + 2000)[-1000:] == [2] * 1000
    late[0] = True
    assert calls(1 + 32 + 1)[1:] == [1] * 32 + [2], "what was long ago is forgotten"


# --- the compiler -----------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache folder, and nothing loaded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    decode.library.cache_clear()
    yield tmp_path / "bytegpt"
    decode.library.cache_clear()


def test_compiles_once(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert decode.library() is not None
    (made,) = fresh.iterdir()
    time = made.stat().st_mtime_ns
    decode.library.cache_clear()
    assert decode.library() is not None
    assert list(fresh.iterdir()) == [made] and made.stat().st_mtime_ns == time


def test_several_at_a_time(fresh: Path) -> None:
    """Processes that start together each find a whole file."""
    command = [sys.executable, "-c", "import decode; assert decode.library()"]
    processes = [subprocess.Popen(command, cwd=Path(decode.__file__).parent) for _ in range(3)]
    assert [process.wait(120) for process in processes] == [0, 0, 0]
    assert len(list(fresh.iterdir())) == 1


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false", "true", 'cc "-O2', "cc -no-such-flag", "cat"])
def test_without_a_compiler_the_modules_decode(compiler: str, fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", compiler)
    model = make(n_mtp_layers=1)
    warning = decode.attach(model)
    assert warning is not None and "no C compiler" in warning and "CC" in warning
    assert model.decoder is None and decode.library() is None
    assert not fresh.exists() or not list(fresh.iterdir())
    text = generate.complete(model, b"ab", generate.Sampling(0, max_new_tokens=5, speculate=1))
    assert len(text) <= 5


@pytest.mark.parametrize("damage", ["cut", "zeros", "empty", "folder"])
def test_damaged_files_are_made_anew(damage: str, fresh: Path) -> None:
    assert decode.library() is not None
    (made,) = fresh.iterdir()
    content = made.read_bytes()
    made.unlink()  # the process has it mapped: no byte of it may change
    if damage == "folder":
        made.mkdir()
    else:
        zeros = content[:0x2000] + bytes(0x2000) + content[0x4000:]
        made.write_bytes({"cut": content[:4096], "zeros": zeros, "empty": b""}[damage])
    decode.library.cache_clear()
    assert decode.library() is not None
    assert error(make(), [3], 1, 1) < 1e-5
    assert damage == "folder" or made.read_bytes() == content


def test_what_cannot_be_loaded_is_not_kept(fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "compiler"
    for program in ("echo garbage", "echo 'int x;' | cc -shared -x c - -o /dev/stdout"):
        last = 'for last; do :; done\ncase "$*" in *-shared*) ' + program + ' > "$last" ;; *) exec cc "$@" ;; esac\n'
        compiler.write_text("#!/bin/sh\n" + last)
        compiler.chmod(0o755)
        monkeypatch.setenv("CC", str(compiler))
        decode.library.cache_clear()
        assert decode.library() is None and not list(fresh.iterdir())


def test_without_openmp(fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As with Apple's compiler: one thread does it all."""
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\nfor flag; do [ "$flag" = -fopenmp ] && exit 1; done\nexec cc "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    assert error(make(), [100, 3], 2, 3) < 1e-5
    assert len(list(fresh.iterdir())) == 1


def test_cache_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(decode.tempfile, "tempdir", str(tmp_path))
    decode.library.cache_clear()
    assert decode.library() is not None
    decode.library.cache_clear()
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "nothing is left behind"


def test_two_threads_of_one_process() -> None:
    """Each call has its own memory: what two threads decode at once is what they decode in turn."""
    model = attached(make())
    texts = [bytes([65 + i]) * 5 for i in range(4)]
    sampling = generate.Sampling(0, max_new_tokens=30)
    expected = [generate.complete(model, text, sampling) for text in texts]
    results: dict[int, bytes] = {}
    threads = [
        threading.Thread(target=lambda i=i: results.update({i: generate.complete(model, texts[i], sampling)}))
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[i] for i in range(4)] == expected


# --- CUDA graphs: what is recorded, on any device, and recording itself on a GPU --------------------------------------

GRAPHED = {"max_seq_len": 200, "original_seq_len": 200, "dim": 64, "inter_dim": 96, "moe_inter_dim": 32, "n_heads": 4}
GRAPHED |= {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0), reason="needs a Hopper GPU"
)


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(0, 150), min_size=1, max_size=4), st.integers(1, 5), st.sampled_from(["naive", "absorb"]))
def test_what_is_recorded_is_what_the_modules_do(lengths: list[int], width: int, impl: str) -> None:
    model_module.attn_impl = impl
    model = make(**GRAPHED)
    tokens = torch.randint(1, 256, (2, len(lengths), width), generator=torch.Generator().manual_seed(2))
    results = []
    for decoder in (None, decode.GraphDecoder(model)):
        model.decoder = decoder
        cache = model.new_cache(len(lengths), 190)
        for i, layer in enumerate(cache.layers):
            for tensor in layer:
                tensor.normal_(generator=torch.Generator().manual_seed(i))
        cache.lengths = list(lengths)
        with torch.inference_mode():
            outputs = [*model.forward_with_hidden(tokens[0], cache)]
            for depth in range(2):
                outputs += model.mtp_forward(depth, outputs[2 * depth], tokens[1], cache)
        results.append(outputs + [tensor for layer in cache.layers for tensor in layer])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_nothing_is_recorded_off_a_gpu() -> None:
    assert not decode.GraphDecoder.suits(make())


@needs_gpu
@pytest.mark.parametrize("impl", ["naive", "absorb"])
@pytest.mark.parametrize("speculate", [0, 1, 3])
def test_recording_changes_no_byte(impl: str, speculate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model_module.attn_impl = impl
    model = make(**GRAPHED).to("cuda", torch.bfloat16)
    model.compute_dtype = torch.bfloat16
    model.head.weight[0] = 0  # else it ends too soon
    assert decode.GraphDecoder.suits(model)
    prompts = [b"ab", b"", b"abcdefgh" * 5]
    for temperature in (0.0, 0.8):
        sampling = replace(generate.Sampling(), temperature=temperature, max_new_tokens=150, speculate=speculate)
        texts = []
        for repeats in (10**9, 2):
            monkeypatch.setattr(decode, "REPEATS", repeats)
            model.decoder = decode.GraphDecoder(model)
            texts.append([generate.complete(model, prompt, sampling) for prompt in prompts])
            together = [b""] * 3
            for row, piece in generate.generate(model, prompts, sampling):
                together[row] += piece
            texts[-1] += together
            assert bool(model.decoder.graphs) == (repeats == 2)
        assert texts[0] == texts[1] and min(map(len, texts[0])) > 20

"""Fast decoding: calls of a few positions by C on a CPU, by CUDA graphs on a GPU.

When a byte is decoded, each weight is read for two operations. The modules of model.py then take several times as long
as memory needs: on a CPU because of torch's products and the Python between them, on a GPU because Python launches each
of some hundred small kernels by itself.

`CDecoder` has decode.c run all layers and the head in one call. decode.c is compiled when it is first needed, for this
machine, and kept in the user's cache folder. Weights stay where they are, unless bfloat16 holds them without loss: then
half as much is read. The structures below are those of decode.c, field by field.

`GraphDecoder` records the modules' kernels with all their arguments and replays them by one command. Addresses, shapes
and numbers known to Python are part of a recording. So positions are a tensor instead of slices, and attention goes
over a length that changes seldom, the next power of two, with what is not there yet masked.

decode.c is a second implementation of the model, and even the modules have several: attention with and without a cache,
naive and absorbed. `attach` compares them, so that whoever changes one of them does not get another model's text.
"""

import contextlib
import copy
import ctypes
import hashlib
import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from ctypes import POINTER, c_float, c_int32, c_void_p
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

import command
import fp8_ops
import model as model_module
from model import FEW_POSITIONS, MLP, Block, Experts, KVCache, Linear, ModelArgs, MoE, Positions, RMSNorm, Transformer

MAX_PROBE, MIN_PROBE = 512, 192  # positions of the text that implementations are compared on
PROBE_WORK = {"cpu": 5_000_000_000, "cuda": 200_000_000_000}  # products of one pass over it, between these ends
PERTURBATION = 1e-5  # of embeddings: several times float32's rounding, and so is what becomes of it
TOLERANCE = 1e-4  # relative, in float32, for a model that does not amplify it
NOISE = (3, 0.01)  # in bfloat16, what one way may differ by: so many times another's rounding, and so much
MEDIAN, LOW, LEAST = 0.5, 0.2, 0.0  # which position counts: in bfloat16, rounding changes the experts of many

FP32, BF16, PAIRS = range(3)  # decode.c's kinds of matrices
ACTIVATIONS = ("silu", "gelu", "relu2")  # that decode.c has, by their numbers there
SHORT_RETREAT, LONG_RETREAT = 32, 1024  # calls by one thread, where others had no processor
SOURCE = Path(__file__).with_name("decode.c")
FLAGS = ["-O3", "-std=gnu11", "-ffp-contract=fast", "-fno-math-errno", "-fno-strict-aliasing"]
COMPILER_SECONDS = 60.0  # of one command; the first that takes longer is the last
STALE_SECONDS = 3600.0  # after which a folder of a compiler is left over from a process that was killed
MAX_LIBRARY_BYTES = 1 << 26

MIN_LENGTH = 64  # that attention of a recorded call goes over
REPEATS = 4  # calls of a kind before it is recorded, which takes as long as some calls
MAX_GRAPHS = 64  # kept at a time, each with memory of its own


def attach(model: Transformer, keep_attn_impl: bool = False) -> str | None:
    """Attaches the fastest decoder that suits a model and its device, if it computes what the modules compute.

    To be called when `fp8_ops.gemm_impl` and `model.attn_impl` are set. The modules' own attention with a cache is
    compared with training's, too: where "absorb" differs from it, `model.attn_impl` becomes "naive".

    The model's weights must not change any more, or `model.decoder` be set to None before they do.

    Args:
        model: The model, in its evaluation mode.
        keep_attn_impl: Leave `model.attn_impl` as it is, since the user asked for it.

    Returns:
        A warning for the user, one line, or None.
    """
    model.decoder = None
    probe, warnings, impl = _Probe(model), [], model_module.attn_impl
    if not probe.modules_agree():
        model_module.attn_impl = impl if keep_attn_impl else "naive"
        if model_module.attn_impl != impl and probe.modules_agree():
            warnings += ["absorbed attention differs from training's in this model.py, so decoding is naive, slower"]
        else:
            warnings += [
                "attention with a cache differs from training's in this model.py, so text is not what was trained; "
                "bring MLA's branches, Transformer.positions and KVCache in line"
            ]
    for decoder in (GraphDecoder, CDecoder):
        if fp8_ops.gemm_impl == "bf16" and model_module.attn_impl in decoder.attn_impls and decoder.suits(model):
            warnings += filter(None, [_attach(model, decoder, probe)])
    return "; ".join(warnings) or None


def _attach(model: Transformer, decoder: type["CDecoder"] | type["GraphDecoder"], probe: "_Probe") -> str | None:
    """Attaches a decoder of this class if it is right; returns a warning if it is not."""
    if decoder is CDecoder and library() is None:
        return "no C compiler that works, so decoding is slower; install one, or name it in CC"
    try:
        model.decoder = probe.checked(decoder)
        reason = "it computes something else"
    except Exception as error:  # whatever a changed model makes of it, the modules still decode
        reason = command.shorten(str(error) or type(error).__name__)
    if model.decoder is not None:
        return None
    return f"{decoder.source} does not fit this model.py ({reason}), so the modules decode, slower"


@contextlib.contextmanager
def _settings(model: Transformer, dtype: torch.dtype, attn_impl: str) -> Iterator[None]:
    """Has a model compute in `dtype` for a while, with products that are not quantised."""
    before = model.compute_dtype, model_module.attn_impl, fp8_ops.gemm_impl
    model.compute_dtype, model_module.attn_impl, fp8_ops.gemm_impl = dtype, attn_impl, "bf16"
    try:
        with torch.inference_mode():
            yield
    finally:
        model.compute_dtype, model_module.attn_impl, fp8_ops.gemm_impl = before


class _Probe:
    """Compares implementations of one model: training's on a random text, and those with a cache at places in it.

    The mathematics is compared in float32, whatever the model computes in, since rounding hides little there. Rounding
    also decides now and then which expert is chosen, and then a position differs by right: what counts are medians
    over positions, and how far they move when the embeddings are changed by about as much as rounding does. In the
    model's own dtype, one implementation may be several times as far from float32 as another.

    Args:
        model: The model. What is compared goes by its `attn_impl`.
    """

    def __init__(self, model: Transformer):
        self.model, device = model, model.head.weight.device
        work = PROBE_WORK.get(device.type, PROBE_WORK["cuda"]) // max(model.n_params()[1], 1)
        n = min(model.args.max_seq_len, max(MIN_PROBE, min(MAX_PROBE, work)))
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(model.args.vocab_size, (n,), generator=generator).to(device)
        width = min(n, FEW_POSITIONS // 8)
        # rows of a batch look back as far as they can, most of them; one alone; and a prompt
        rows = [int((n - width) * share) for share in (1, 0.95, 0.85, 0.4)]
        singles = [([n - 1 - i], 1) for i in range(min(n, 3))]
        self.groups = [singles, [(rows, 1)], [(rows, width)], [([0], min(n, FEW_POSITIONS // 2))]]
        self.dtypes = list(dict.fromkeys([torch.float32, model.compute_dtype]))
        self.caches: dict[torch.dtype, KVCache] = {}
        self.steps: dict[torch.dtype, list[list[torch.Tensor]]] = {}  # by the modules
        self.training = {dtype: self._train(dtype) for dtype in self.dtypes}
        self.tolerance = max(TOLERANCE, 3 * self._sensitivity())

    def modules_agree(self) -> bool:
        """Whether the modules compute with a cache what they compute in training."""
        for dtype in self.dtypes:
            with _settings(self.model, dtype, model_module.attn_impl):
                self.caches[dtype] = cache = self.model.new_cache(1, len(self.tokens))
                prefill = self._run(self.model, self._positions([0], len(self.tokens)), cache)
                self.steps[dtype] = self._step(self.model, cache)
            exact = [self.training[torch.float32]]
            if dtype == torch.float32:
                results, exact = [prefill, *self.steps[dtype]], exact + self._training_steps()
                agree = _distance(results, exact, MEDIAN) <= self.tolerance
            else:
                ours, theirs = _distance([prefill], exact, LOW), _distance([self.training[dtype]], exact, LOW)
                agree &= _is_rounding(ours, theirs) and _is_rounding(theirs, ours)
        return agree

    def checked(self, kind: type["CDecoder"] | type["GraphDecoder"]) -> "CDecoder | GraphDecoder | None":
        """Makes a decoder and returns it if it computes what the modules do, which `modules_agree` has run."""
        decoder, exact, dtype = None, self.steps[torch.float32], self.model.compute_dtype
        for dtype in self.dtypes:
            with _settings(self.model, dtype, model_module.attn_impl):
                decoder = kind(self.model)
                passes = kind.passes if dtype == self.dtypes[-1] else 1
                results = self._step(decoder, self.caches[dtype], passes)
            if dtype == torch.float32:
                is_right = _distance(results, exact, MEDIAN) <= self.tolerance
            else:
                is_right = _is_rounding(_distance(results, exact, LEAST), _distance(self.steps[dtype], exact, LEAST))
            if not is_right:
                return None
        if isinstance(decoder, GraphDecoder):
            decoder.reset()  # what was recorded holds memory
        return decoder

    def _run(
        self,
        target: "Transformer | CDecoder | GraphDecoder",
        index: torch.Tensor,
        kv_cache: KVCache | None,
        states: list[torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        """The states and logits of the main model and then of each MTP module, at positions `index` (B, S) of the text.

        An MTP module goes on from the states before it: the target's own, or those of the whole text in `states`.
        """
        outputs = [*target.forward_with_hidden(self.tokens[index], kv_cache)]
        for depth in range(len(self.model.mtp)):
            before = outputs[2 * depth]
            if states is not None:
                before = states[2 * depth][0, index].to(self.model.compute_dtype)
            ahead = self.tokens[(index + 1 + depth) % len(self.tokens)]
            outputs += target.mtp_forward(depth, before, ahead, kv_cache)
        return outputs

    def _positions(self, lengths: list[int], width: int) -> torch.Tensor:
        """The `width` positions after so many of each row, (B, width)."""
        starts = torch.tensor(lengths, device=self.tokens.device)
        return starts[:, None] + torch.arange(width, device=self.tokens.device)

    def _train(self, dtype: torch.dtype, n: int | None = None) -> list[torch.Tensor]:
        """What training computes: the first `n` positions at once, all of them if None, without a cache."""
        with _settings(self.model, dtype, "naive"):
            return self._run(self.model, self._positions([0], n or len(self.tokens)), None)

    def _training_steps(self) -> list[list[torch.Tensor]]:
        """What training computes where `_step` does, in float32."""
        indices = [torch.cat([self._positions(*call).flatten() for call in group]) for group in self.groups]
        return [[output[0, index] for output in self.training[torch.float32]] for index in indices]

    def _sensitivity(self) -> float:
        """How far results move when the embeddings are perturbed."""
        n = min(len(self.tokens), FEW_POSITIONS)
        noise = torch.randn(1, n, self.model.args.dim, generator=torch.Generator().manual_seed(1)) * PERTURBATION
        noise = noise.to(self.tokens.device)
        handle = self.model.embed.register_forward_hook(lambda *given: given[-1].float() * (1 + noise))
        try:
            perturbed = self._train(torch.float32, n)
        finally:
            handle.remove()
        return _distance([perturbed], [[output[:, :n] for output in self.training[torch.float32]]], MEDIAN)

    def _step(
        self, target: "Transformer | CDecoder | GraphDecoder", text: KVCache, passes: int = 1
    ) -> list[list[torch.Tensor]]:
        """Calls of few positions, after what a cache of the whole text has before them.

        Returns:
            For each group of calls the outputs, and the new entries of each layer's cache, a row for each position.
        """
        results = []
        for group in self.groups:
            calls = []
            for lengths, width in group:
                index, rows = self._positions(lengths, width), torch.arange(len(lengths))[:, None]
                kv_cache = self.model.new_cache(len(lengths), len(self.tokens))
                kv_cache.lengths = lengths
                tensors = [tensor for layer in kv_cache.layers for tensor in layer]
                for tensor, source in zip(tensors, (t for layer in text.layers for t in layer), strict=True):
                    tensor.copy_(source.expand_as(tensor))
                for _ in range(passes):
                    for tensor in tensors:
                        tensor[rows, index] = 0  # to see what is written there
                    outputs = self._run(target, index, kv_cache, self.training[torch.float32])
                calls.append(
                    [t.flatten(0, 1) for t in outputs + [tensor[rows, index].flatten(2) for tensor in tensors]]
                )
            results.append([torch.cat(outputs) for outputs in zip(*calls, strict=True)])
        return results


def _distance(results: list[list[torch.Tensor]], expected: list[list[torch.Tensor]], quantile: float) -> float:
    """How far groups of outputs (..., n) are from others: this quantile of the relative distances of an output's rows.

    Of all outputs, the largest counts.
    """
    largest = 0.0
    for group, wanted in zip(results, expected, strict=True):
        for a, b in zip(group, wanted, strict=False):  # training has no cache entries
            a, b = a.flatten(0, -2).float(), b.flatten(0, -2).float()
            relative = (a - b).norm(dim=-1) / b.norm(dim=-1).clamp(min=1e-30)
            # a damaged weight makes both no numbers; where one alone is none, they differ
            relative[~a.isfinite().all(-1) & ~b.isfinite().all(-1)] = 0
            relative = relative.nan_to_num(float("inf")).sort().values
            largest = max(largest, relative[int(quantile * (len(relative) - 1))].item())
    return largest


def _is_rounding(distance: float, other: float) -> bool:
    """Whether a distance from float32 is no more than rounding, given that of another implementation."""
    return distance <= NOISE[0] * other + NOISE[1]


# --- C on a CPU -------------------------------------------------------------------------------------------------------


@cache
def library() -> ctypes.CDLL | None:
    """Loads decode.c's library, compiled first where that was not done before; None where there is no compiler."""
    temporary = None
    with contextlib.suppress(subprocess.TimeoutExpired):  # a compiler that hangs does so with other flags, too
        with contextlib.suppress(OSError):
            if (loaded := _library_in(command.private_cache_folder())) is not None:
                return loaded
        with contextlib.suppress(OSError):  # a quota, for instance, is met by the compiler only
            temporary = _library_in(command.private_temporary_folder())
    return temporary


def _library_in(folder: Path) -> ctypes.CDLL | None:
    """Loads the library from a folder, compiled there if need be; None where no compiler can."""
    # Apple's compiler has no OpenMP: then one thread does it all; and some have another word for "native"
    for extra in (["-march=native", "-fopenmp"], ["-march=native"], ["-fopenmp"], []):
        flags = [*FLAGS, *extra]
        with contextlib.suppress(OSError, ValueError, AttributeError, subprocess.CalledProcessError):
            compiler = shlex.split(os.environ.get("CC") or "cc")
            # what "native" means here: a home folder may be shared by machines that differ
            macros = _call([*compiler, *flags, "-dM", "-E", "-x", "c", os.devnull])
            key = _digest(macros + SOURCE.read_bytes() + repr((compiler, flags)).encode())
            for path in folder.glob(f"decode-{key}-*.so"):
                with contextlib.suppress(OSError, AttributeError):
                    return _load(path)
            return _compile([*compiler, *flags, "-fPIC", "-shared", str(SOURCE), "-lm"], folder, key)
    return None


def _compile(compiler: list[str], folder: Path, key: str) -> ctypes.CDLL:
    """Compiles a library, tries it out in a process of its own, keeps it under its digest, and loads it."""
    for left in folder.glob("tmp*"):  # by a process that was killed
        if left.is_dir() and not left.is_symlink() and time.time() - left.lstat().st_mtime > STALE_SECONDS:
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / "decode.so"
        _call([*compiler, "-o", str(made)])
        made.chmod(0o600)
        named = made.with_name(f"decode-{key}-{_digest(made.read_bytes())}.so")
        made.rename(named)
        _try_in_child(named)
        loaded = _load(named)
        with contextlib.suppress(OSError):  # something stands in its way: then it is for this time only
            named.replace(folder / named.name)
        return loaded


def _load(path: Path) -> ctypes.CDLL:
    """Loads a library whose name ends with the digest of its content.

    Raises:
        OSError: It is damaged, no regular file, not this user's own, or others can write to it.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    info = os.fstat(descriptor)
    is_library = stat.S_ISREG(info.st_mode) and command.is_private(info) and info.st_size <= MAX_LIBRARY_BYTES
    with open(descriptor, "rb", closefd=False) as file:
        if not is_library or not path.stem.endswith(_digest(file.read())):
            os.close(descriptor)
            raise OSError(f"{path} is no library that this program has made")
    # what was checked is what is loaded; the descriptor stays open, since the loader knows libraries by their names
    checked = Path(f"/proc/self/fd/{descriptor}")
    loaded = ctypes.CDLL(str(checked if checked.exists() else path.absolute()))
    loaded.run.restype = ctypes.c_int
    return loaded


def _call(arguments: list[str]) -> bytes:
    """Runs a command that may neither wait for input nor for ever, and returns what it writes.

    Raises:
        OSError, subprocess.CalledProcessError: It cannot run, or it fails.
        subprocess.TimeoutExpired: It took too long, and was killed with its children.
    """
    process = subprocess.Popen(
        arguments,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # so that its children are known
    )
    try:
        output, _ = process.communicate(timeout=COMPILER_SECONDS)
    except BaseException:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    finally:
        if process.stdout is not None:
            process.stdout.close()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, arguments)
    return output


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _try_in_child(path: Path) -> None:
    """Runs `_try_out` in a process of its own, which a library may crash.

    Raises:
        As `_call` does, if that fails.
    """
    _call([sys.executable, str(Path(__file__).resolve()), str(path)])


def _try_out(path: Path) -> bool:
    """Whether a new library computes what the modules do."""
    loaded = _load(path)
    globals()["library"] = lambda: loaded
    model_module.attn_impl = "absorb"
    for dtype in (torch.float32, torch.bfloat16):
        args = ModelArgs(
            max_seq_len=300, dim=64, inter_dim=80, moe_inter_dim=32, n_layers=2, n_heads=3, n_routed_experts=4,
            n_activated_experts=2, q_lora_rank=24, kv_lora_rank=64, qk_nope_head_dim=16, qk_rope_head_dim=16,
            v_head_dim=20, n_mtp_layers=1,
        )  # fmt: skip
        model = Transformer(args, dtype).to(dtype)
        generator = torch.Generator().manual_seed(0)
        for p in model.requires_grad_(False).parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * p.shape[-1] ** -0.5 if p.ndim > 1 else 1.0)
        probe = _Probe(model.eval())
        if not probe.modules_agree() or probe.checked(CDecoder) is None:
            return False
    return True


class _Matrix(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("kind", c_int32), ("n_in", c_int32)]


class _Norm(ctypes.Structure):
    _fields_ = [("weight", c_void_p), ("eps", c_float), ("size", c_int32)]


class _MLP(ctypes.Structure):
    _fields_ = [*((name, _Matrix) for name in ("w1", "w2", "w3")), ("width", c_int32)]


class _Block(ctypes.Structure):
    _fields_ = [
        *((name, _Norm) for name in ("attn_norm", "q_norm", "kv_norm", "ffn_norm")),
        *((name, _Matrix) for name in ("wq_a", "wq_b", "wkv_a", "w_k", "w_v", "wo")),
        *((name, _MLP) for name in ("mlp", "experts")),
        ("gate", _Matrix),
        ("gate_bias", c_void_p),
    ]


class _Shape(ctypes.Structure):
    _fields_ = [
        *((name, c_int32) for name in ("vocab", "dim", "heads", "rank", "nope", "rope", "v", "context")),
        *((name, c_int32) for name in ("n_experts", "n_chosen", "n_groups", "n_limited", "is_softmax", "act")),
        ("route_scale", c_float),
        ("scale", c_float),
        ("cos", c_void_p),
        ("sin", c_void_p),
    ]


class _Stack(ctypes.Structure):
    _fields_ = [
        ("embed", _Matrix),
        ("enorm", _Norm),
        ("hnorm", _Norm),
        ("eh_proj", _Matrix),
        ("blocks", POINTER(_Block)),
        ("n_blocks", c_int32),
        ("norm", _Norm),
        ("head", _Matrix),
    ]


class _Call(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("tokens", "positions", "before", "states", "logits", "kv_caches")),
        *((name, c_int32) for name in ("n_rows", "n_each", "capacity", "kind", "threads")),
    ]


class CDecoder:
    """A model's layers and its MTP modules for a few positions at a time, by decode.c.

    Args:
        model: The model, one that `suits`.

    Raises:
        ValueError: decode.c has no such model.
    """

    attn_impls = ("absorb",)
    source = "decode.c"
    passes = 1

    @staticmethod
    def suits(model: Transformer) -> bool:
        """Whether decode.c has all that a model needs: it is whole, has a latent, and is on a CPU."""
        return model.head.weight.device.type == "cpu" and model.args.kv_lora_rank > 0 and model.is_unsharded()

    @torch.no_grad()
    def __init__(self, model: Transformer):
        self.model, self.dtype = model, model.compute_dtype
        self.n_alone = 0  # calls to come by one thread, as other programs want the processors
        self.retreat = SHORT_RETREAT  # how many calls that is the next time
        self.kept: list[torch.Tensor] = []  # what the pointers below point to
        self.args = args = model.args
        attn = model.layers[0].attn
        if args.hidden_act not in ACTIVATIONS:
            raise ValueError(f"it has no activation {args.hidden_act!r}")
        self.shape = _Shape(
            *(args.vocab_size, args.dim, args.n_heads, args.kv_lora_rank, attn.qk_nope_head_dim, attn.qk_rope_head_dim),
            *(args.v_head_dim, args.max_seq_len, args.n_routed_experts, args.n_activated_experts),
            *(args.n_expert_groups, args.n_limited_groups, args.score_func == "softmax"),
            *(ACTIVATIONS.index(args.hidden_act), args.route_scale, attn.softmax_scale),
        )
        ends = {
            "embed": self._matrix(model.embed.weight, args.vocab_size, args.dim),
            "head": self._matrix(model.head, args.vocab_size, args.dim),
        }
        self.main = _Stack(**ends, norm=self._norm(model.norm, args.dim), **self._blocks(*model.layers))
        self.mtp = [
            _Stack(
                **ends,
                **{name: self._norm(getattr(module, name), args.dim) for name in ("enorm", "hnorm", "norm")},
                eh_proj=self._matrix(module.eh_proj, args.dim, 2 * args.dim),
                **self._blocks(module.block),
            )
            for module in model.mtp
        ]

    def forward_with_hidden(self, tokens: torch.Tensor, cache: KVCache) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns what `Transformer.forward_with_hidden` returns."""
        return self._run(self.main, 0, tokens, cache, None)

    def mtp_forward(
        self, depth: int, h: torch.Tensor, tokens: torch.Tensor, cache: KVCache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns what `Transformer.mtp_forward` returns."""
        return self._run(self.mtp[depth], self.main.n_blocks + depth, tokens, cache, h.float().contiguous())

    def _run(
        self, stack: _Stack, first_layer: int, tokens: torch.Tensor, cache: KVCache, before: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        bsz, seqlen = tokens.shape
        layers = cache.layers[first_layer : first_layer + stack.n_blocks]
        kv_caches = (c_void_p * len(layers))(*(layer[0].data_ptr() for layer in layers))
        self.tables = self.model.rope_tables(min(max(cache.lengths) + seqlen, self.args.max_seq_len))
        self.shape.cos, self.shape.sin = (table.data_ptr() for table in self.tables)
        positions = (c_int32 * tokens.numel())(*(n + i for n in cache.lengths for i in range(seqlen)))
        tokens = tokens.long().contiguous()
        states, logits = torch.empty(bsz, seqlen, self.args.dim), torch.empty(bsz, seqlen, self.args.vocab_size)
        call = _Call(
            *(tokens.data_ptr(), ctypes.addressof(positions), None if before is None else before.data_ptr()),
            *(states.data_ptr(), logits.data_ptr(), ctypes.addressof(kv_caches), bsz, seqlen, cache.capacity),
            *(self._kind(cache.layers[0][0]), 1 if self.n_alone else torch.get_num_threads()),
        )
        result = library().run(ctypes.byref(self.shape), ctypes.byref(stack), ctypes.byref(call))
        if result > 0:
            raise MemoryError("not enough memory to decode") if result == 1 else IndexError("a token out of range")
        self._adapt_threads(is_late=result < 0)
        return states.to(self.dtype), logits

    def _adapt_threads(self, is_late: bool) -> None:
        """Where a thread was late, one does all work for some calls, and for twice as many the next time."""
        if self.n_alone:
            self.n_alone -= 1
        elif is_late:
            self.n_alone, self.retreat = self.retreat, min(2 * self.retreat, LONG_RETREAT)
        else:
            self.retreat = max(self.retreat - 1, SHORT_RETREAT)

    def _keep(self, tensor: torch.Tensor, *shape: int) -> int:
        """Keeps a contiguous tensor, whose shape decode.c relies on, and returns its address."""
        if tensor.shape != shape:
            raise ValueError(f"a weight of shape {tuple(tensor.shape)} where it has {shape}")
        self.kept.append(tensor.contiguous())
        return self.kept[-1].data_ptr()

    def _floats(self, tensor: torch.Tensor, *shape: int) -> int:
        return self._keep(tensor.detach().float(), *shape)

    def _kind(self, numbers: torch.Tensor) -> int:
        """How decode.c multiplies with these: a model in bfloat16 rounds the other side too."""
        return FP32 if numbers.dtype == torch.float32 else BF16 if self.dtype == torch.float32 else PAIRS

    def _norm(self, norm: RMSNorm, size: int) -> _Norm:
        return _Norm(self._floats(norm.weight, size), norm.eps, size)

    def _matrix(self, weight: torch.Tensor | Linear, *shape: int) -> _Matrix:
        """Keeps a weight (..., out, in) as the compute dtype has it, in bfloat16 where that loses nothing."""
        weight = weight.dense_weight(self.dtype) if isinstance(weight, Linear) else weight
        weight = _narrow(weight.detach(), self.dtype)
        return _Matrix(self._keep(weight, *shape), self._kind(weight), shape[-1])

    def _mlp(self, mlp: MLP, width: int, *stack: int) -> _MLP:
        dim = self.args.dim
        shapes = {"w1": (width, dim), "w2": (dim, width), "w3": (width, dim)}
        return _MLP(*(self._matrix(getattr(mlp, name), *stack, *shape) for name, shape in shapes.items()), width)

    def _blocks(self, *blocks: Block) -> dict[str, object]:
        return {"blocks": (_Block * len(blocks))(*map(self._block, blocks)), "n_blocks": len(blocks)}

    def _block(self, block: Block) -> _Block:
        args, attn, ffn = self.args, block.attn, block.ffn
        dim, heads, rank, rope = args.dim, args.n_heads, args.kv_lora_rank, attn.qk_rope_head_dim
        nope, v, q_rank = attn.qk_nope_head_dim, attn.v_head_dim, attn.q_lora_rank
        wkv_b = attn.wkv_b.dense_weight(self.dtype).unflatten(0, (heads, nope + v))
        w_k, w_v = wkv_b.split([nope, v], dim=1)
        out = _Block(
            attn_norm=self._norm(block.attn_norm, dim),
            kv_norm=self._norm(attn.kv_norm, rank),
            ffn_norm=self._norm(block.ffn_norm, dim),
            wq_b=self._matrix(attn.wq_b if q_rank else attn.wq, heads * (nope + rope), q_rank or dim),
            wkv_a=self._matrix(attn.wkv_a, rank + rope, dim),
            w_k=self._matrix(w_k.mT, heads, rank, nope),
            w_v=self._matrix(w_v, heads, v, rank),
            wo=self._matrix(attn.wo, dim, heads * v),
        )
        if q_rank:
            out.wq_a, out.q_norm = self._matrix(attn.wq_a, q_rank, dim), self._norm(attn.q_norm, q_rank)
        if not isinstance(ffn, MoE):
            out.mlp = self._mlp(ffn, args.inter_dim)
            return out
        if ffn.shared_experts is not None:
            out.mlp = self._mlp(ffn.shared_experts, args.n_shared_experts * args.moe_inter_dim)
        experts = args.n_routed_experts
        out.experts = self._mlp(ffn.experts, args.moe_inter_dim, experts)
        out.gate = _Matrix(self._floats(ffn.gate.weight, experts, dim), FP32, dim)  # routed in float32 throughout
        out.gate_bias = None if ffn.gate.bias is None else self._floats(ffn.gate.bias, experts)
        return out


def _narrow(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A weight in bfloat16 where that loses nothing, as it was stored so: half as much to keep, and to read."""
    if weight.dtype == torch.bfloat16:
        return weight
    weight = weight.to(dtype)
    narrow = weight.bfloat16()
    return narrow if torch.equal(narrow.to(dtype), weight) else weight


# --- CUDA graphs on a GPU ---------------------------------------------------------------------------------------------


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: list[torch.Tensor]
    outputs: tuple[torch.Tensor, ...]
    tables: tuple[torch.Tensor, ...]  # of rotary angles, which the kernels read also when the model has longer ones


class GraphDecoder:
    """The modules' kernels for a few positions at a time, recorded as CUDA graphs and replayed.

    Calls that were not recorded yet run the same kernels one by one, so that recording changes no bit of a text.

    Args:
        model: The model, whose weights must stay where they are.
    """

    attn_impls = ("naive", "absorb")
    source = "GraphDecoder of decode.py"
    passes = REPEATS + 1  # of a call, after which it has been recorded

    @staticmethod
    def suits(model: Transformer) -> bool:
        """Whether a model's calls can be recorded: it is whole, on a GPU, and its kernels ask Python nothing."""
        device = model.head.weight.device
        if device.type != "cuda" or not model.is_unsharded():
            return False
        stacks = [m.w1.weight for m in model.modules() if isinstance(m, Experts)]
        # the experts' products by torch's own kernel, as in fp8_ops.linear; others give Python each expert's row count
        grouped = model.compute_dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) >= (9, 0)
        return not stacks or (grouped and all(n % 8 == 0 for w in stacks for n in w.shape[1:]))

    def __init__(self, model: Transformer):
        self.model = model
        self.calls: Counter[tuple[object, ...]] = Counter()
        self.graphs: dict[tuple[object, ...], _Graph] = {}

    def forward_with_hidden(self, tokens: torch.Tensor, cache: KVCache) -> tuple[torch.Tensor, torch.Tensor]:
        """What `Transformer.forward_with_hidden` returns."""
        return self._run(-1, cache, tokens)

    def mtp_forward(
        self, depth: int, h: torch.Tensor, tokens: torch.Tensor, cache: KVCache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What `Transformer.mtp_forward` returns."""
        return self._run(depth, cache, tokens, h)

    def _run(self, depth: int, cache: KVCache, tokens: torch.Tensor, *before: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Runs MTP module `depth`, or -1: the main model."""
        seq_len = tokens.shape[1]
        end = max(cache.lengths) + seq_len
        length = min(cache.capacity, max(MIN_LENGTH, 1 << (end - 1).bit_length()))
        index = torch.tensor([[n + i for i in range(seq_len)] for n in cache.lengths], device=tokens.device)
        inputs = [tokens, index, *before]

        def compute(*given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self._compute(depth, cache, length, *given)

        where = tuple(tensor.data_ptr() for layer in cache.layers for tensor in layer)
        key = (depth, tuple(tokens.shape), length, where)
        self.calls[key] += 1
        if key not in self.graphs:
            if self.calls[key] <= REPEATS:
                return compute(*inputs)
            self.graphs[key] = self._record(compute, inputs)
        graph, recorded_inputs, outputs, _ = self.graphs[key]
        for recorded, value in zip(recorded_inputs, inputs, strict=True):
            recorded.copy_(value)
        graph.replay()
        return tuple(output.clone() for output in outputs)  # the next replay writes there

    def _record(self, compute: Callable[..., tuple[torch.Tensor, ...]], inputs: list[torch.Tensor]) -> _Graph:
        if len(self.graphs) >= MAX_GRAPHS:
            self.reset()
        graph, inputs = torch.cuda.CUDAGraph(), [value.clone() for value in inputs]
        with torch.cuda.graph(graph):
            outputs = compute(*inputs)
        return _Graph(graph, inputs, outputs, self.model.rope_tables(1))

    def reset(self) -> None:
        """Forgets all recordings, and frees their memory."""
        self.graphs.clear()
        self.calls.clear()

    def _compute(
        self, depth: int, cache: KVCache, length: int, tokens: torch.Tensor, index: torch.Tensor, *before: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """States and logits, by kernels that depend on nothing but shapes and `length`, that of the cache to attend to.

        `index` has the positions of the tokens in the cache, (B, S).
        """
        model = self.model
        angle = index.clamp(max=model.args.max_seq_len - 1)  # of a draft past the context, which nobody reads
        mask = torch.arange(length, device=index.device) <= index[:, None, :, None]
        cos, sin = model.rope_tables(min(length, model.args.max_seq_len))
        where = Positions(cos[angle], sin[angle], index, mask)
        still = copy.copy(cache)
        still.lengths = [length - tokens.shape[1]] * len(tokens)
        embedded = model.embed(tokens)
        if depth < 0:
            h = embedded.to(model.compute_dtype)
            for layer in model.layers:
                h, _ = layer(h, where, still)
            h = model.norm(h)
        else:
            h, _ = model.mtp[depth](before[0], embedded.to(before[0].dtype), where, still)
        return h, model.head(h).float()


if __name__ == "__main__":  # what `_try_in_child` starts
    sys.exit(not _try_out(Path(sys.argv[1])))

"""Fast decoding: calls of a few positions by C on a CPU, by kernels and CUDA graphs on a GPU.

When a byte is decoded, each weight is read for two operations. The modules of model.py then take several times as long
as memory needs: Python stands between torch's many small products.

`CDecoder` has decode.c run all layers and the head in one call. decode.c is compiled when it is first needed, for this
machine, and kept in the user's cache folder. Weights stay where they are, in float32, bfloat16 or FP8, unless bfloat16
holds those in float32 without loss: then half as much is read. The structures below are those of decode.c, field by
field.

`KernelDecoder` launches the kernels of kernel_decode.py, a few a layer, which read positions and addresses of caches on
the device and choose the byte there. So a step is one CUDA graph, recorded when the model is loaded, and `Blocks` has
the device do many steps while Python looks at those before.

`GraphDecoder` is for models that those kernels do not have. It records the modules' kernels with all their arguments,
and replays them by one command. Addresses, shapes and numbers known to Python are part of a recording. So positions are
a tensor instead of slices, and attention goes over a length that changes seldom, the next power of two, with what is
not there yet masked.

decode.c is a second implementation of the model, and even the modules have several: attention with and without a cache,
naive and absorbed. `attach` compares them, so that whoever changes one does not get another model's text.
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
from collections.abc import Callable, Iterator, Sequence
from ctypes import POINTER, c_float, c_int32, c_void_p
from dataclasses import replace
from functools import cache, cached_property, partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch

import command
import fp8_ops
import model as model_module
from model import (
    MLP,
    Block,
    Experts,
    Indexer,
    KVCache,
    Linear,
    ModelArgs,
    MoE,
    MTPModule,
    Positions,
    RMSNorm,
    Transformer,
)

MAX_PROBE, MIN_PROBE = 512, 176  # positions of the text that implementations are compared on
PROBE_WORK = {"cpu": 2_000_000_000}  # products of one pass over it, between these ends
FAR_PROBE, FAR_LAYERS = 2048, 2  # positions of a second text where the context is longer than the first, for few layers
PERTURBATION = 1e-5  # of embeddings: several times float32's rounding, and so is what becomes of it
TOLERANCE = 1e-4  # relative, in float32, for a model that does not amplify it
NOISE = (3, 0.01)  # in bfloat16, what one way may differ by: so many times another's rounding, and so much
MEDIAN, LOW = 0.5, 0.2  # which position counts: in bfloat16, rounding changes the experts of many

FP32, BF16, PAIRS, FP8, FP8_PAIRS = range(5)  # decode.c's kinds of matrices
ACTIVATIONS = ("silu", "gelu", "relu2")  # that decode.c has, by their numbers there
SHORT_RETREAT, LONG_RETREAT = 32, 1024  # calls by one thread, where others had no processor
SOURCE = Path(__file__).with_name("decode.c")
FLAGS = ["-O3", "-std=gnu11", "-ffp-contract=fast", "-fno-math-errno", "-fno-strict-aliasing"]
COMPILER_SECONDS = 150.0  # of one command; the first that takes longer is the last
STALE_SECONDS = 3600.0  # after which a folder of a compiler is left over from a process that was killed

Outputs = tuple[torch.Tensor, torch.Tensor]  # states (B, S, dim) and logits (B, S, vocab_size)
Dtypes = tuple[torch.dtype, torch.dtype | None]  # of activations and of KV caches, None: the same
EXACT: Dtypes = torch.float32, None

MIN_LENGTH = 64  # that attention of a recorded call goes over
# Positions of one call while prompts are read, all rows together: what bounds the memory that long prompts take.
PREFILL_POSITIONS = 4096
REPEATS = 4  # calls of a kind before it is recorded, which takes as long as some calls
MAX_GRAPHS = 64  # kept at a time, each with memory of its own

ONE_THREAD = 1 << 22  # numbers that a step of decoding multiplies, up to which one thread does it


def attach(model: Transformer, keep_attn_impl: bool = False) -> str | None:
    """Attaches the fastest decoder that suits a model and its device, if it computes what the modules compute.

    The modules' own attention with a cache is compared with training's, too. Where a latent's "absorb" differs from it,
    "naive" is tried, and `model.attn_impl` set to it. To be called when `fp8_ops.gemm_impl` is set. The model's weights
    must not change any more, or `model.decoder` be set to None before they do.

    On a CPU, decode.c reads weights that are stored in FP8 as they are. The modules, which forward long prompts, get
    dequantised ones, except where they compute in float32 beside decode.c: to this they cast for each call anyway.

    Args:
        model: The model, in its evaluation mode.
        keep_attn_impl: Compare the current `model.attn_impl` only, since the user asked for it.

    Returns:
        A warning for the user, one line, or None.
    """
    model.decoder = None
    # a KV cache is read at the width of the weights
    is_narrow = CDecoder.suits(model) and model.head.weight.dtype == torch.bfloat16
    model.cache_dtype = torch.bfloat16 if is_narrow else None
    warning = _choose(model, keep_attn_impl)
    if not (in_c := isinstance(model.decoder, CDecoder)):
        model.cache_dtype = None
    dequantizes = not in_c or model.compute_dtype == torch.bfloat16
    if dequantizes and fp8_ops.gemm_impl == "bf16" and model.head.weight.device.type == "cpu":
        _dequantize(model)
    return warning


def _dequantize(model: Transformer) -> None:
    """Turns the modules' weights back that are stored in FP8; a decoder keeps what it has."""
    for layer in model.fp8_layers():
        if layer.scale is not None:
            dense = layer.dense_weight(model.compute_dtype)
            layer.weight, layer.scale = torch.nn.Parameter(dense, requires_grad=False), None


def _choose(model: Transformer, keep_attn_impl: bool) -> str | None:
    """`attach`, with the dtype of KV caches set."""
    probes, impls = _probes(model), [model_module.attn_impl]
    if model.args.kv_lora_rank and not keep_attn_impl:
        impls = ["absorb", "naive"]
    impl = next((impl for impl in impls if all(probe.modules_agree(impl) for probe in probes)), None)
    model.absorbs = impl == "absorb" and model.args.kv_lora_rank > 0
    if impl != impls[0]:
        model_module.attn_impl = impls[-1]
    if impl is None:
        return (
            "attention with a cache differs from training's in this model.py, so text is not what was trained; "
            "bring MLA's branches, Transformer.positions and KVCache in line"
        )
    warnings = []
    if impl != impls[0]:
        warnings = ["absorbed attention differs from training's in this model.py, so decoding is naive, slower"]
    kinds = (KernelDecoder, GraphDecoder, CDecoder) if fp8_ops.gemm_impl == "bf16" else ()
    has_kernels = bool(kinds) and impl in KernelDecoder.attn_impls and KernelDecoder.has_all(model)
    if has_kernels and (lack := KernelDecoder.lacks(model)):
        warnings += [f"{lack}, so decoding is slower"]
    for decoder in kinds:
        if model.decoder is None and impl in decoder.attn_impls and decoder.suits(model):
            if decoder is CDecoder and library() is None:
                warnings += ["no C compiler that works, so decoding is slower; install one, or name it in CC"]
                continue
            reason = "it computes something else"
            try:
                if all(probe.checked(decoder) is not None for probe in probes[1:]):
                    model.decoder = probes[0].checked(decoder)
                if isinstance(model.decoder, KernelDecoder):
                    model.decoder.prepare()
                if isinstance(model.decoder, GraphDecoder):
                    model.decoder.reset()  # what was recorded holds memory
            except Exception as error:  # whatever a changed model makes of it, the modules still decode
                model.decoder = None
                reason = command.shorten(str(error) or type(error).__name__)
            if model.decoder is None:
                warnings += [f"{decoder.source} does not fit this model.py ({reason}), so the modules decode, slower"]
    return "; ".join(warnings) or None


@contextlib.contextmanager
def _settings(model: Transformer, dtypes: Dtypes, attn_impl: Literal["naive", "absorb"]) -> Iterator[None]:
    """Has a model compute in `dtypes` for a while, with products that are not quantised."""
    before = (model.compute_dtype, model.cache_dtype), model_module.attn_impl, fp8_ops.gemm_impl
    (model.compute_dtype, model.cache_dtype), model_module.attn_impl, fp8_ops.gemm_impl = dtypes, attn_impl, "bf16"
    try:
        with torch.inference_mode():
            yield
    finally:
        (model.compute_dtype, model.cache_dtype), model_module.attn_impl, fp8_ops.gemm_impl = before


def _probes(model: Transformer) -> "list[_Probe]":
    """Probes of the model, and where its context is longer of its first layers, over more of that."""
    work = PROBE_WORK.get(model.head.weight.device.type, 1 << 60) // max(model.n_params()[1], 1)
    near, far = max(MIN_PROBE, min(MAX_PROBE, work)), min(model.args.max_seq_len, FAR_PROBE)
    probes = [_Probe(model, min(model.args.max_seq_len, near))]
    if far > near:
        first = copy.copy(model)  # with the same weights
        first._modules = dict(model._modules)
        first.layers, first.mtp = model.layers[:FAR_LAYERS], torch.nn.ModuleList()
        first.args = replace(model.args, n_layers=len(first.layers), n_mtp_layers=0)
        probes.append(_Probe(first, far))
    return probes


class _Probe:
    """Compares implementations of one model with training's, on a random text: calls with a cache at places in it.

    The mathematics is compared in float32, whatever the model computes in, since rounding hides little there. Rounding
    also decides now and then which expert is chosen, and then a position differs by right: what counts are medians over
    positions, and how far they move when the embeddings are changed by about as much as rounding does. In the model's
    own dtypes, one implementation may be several times as far from float32 as another. All read the same weights.
    """

    def __init__(self, model: Transformer, n: int):
        self.model, device = model, model.head.weight.device
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(model.args.vocab_size, (n,), generator=generator).to(device)
        width = min(n, 5)
        # calls by what is before each row: one alone, at either place; a prompt; rows, most of which look back far
        rows = [int((n - width) * share) for share in (1, 0.95, 0.4)]
        many = rows * (4 if device.type == "cuda" else 1)  # there, each of kernel_decode.POSITIONS has its own kernels
        self.calls = [[([n - 1], 1), ([max(n - 2, 0)], 1)], [([0], width)], [(rows, 1)], [(many, width)]]
        self.impl: Literal["naive", "absorb"] = "naive"
        self.exact: list[torch.Tensor] = []  # training's outputs in float32
        self.exact = self._train(EXACT)
        own: Dtypes = model.compute_dtype, model.cache_dtype
        self.trained = {EXACT: self.exact, own: self.exact if own[0] == torch.float32 else self._train(own)}

    def modules_agree(self, attn_impl: Literal["naive", "absorb"]) -> bool:
        """Whether the modules compute with a cache what they compute in training."""
        self.impl, n = attn_impl, len(self.tokens)
        with _settings(self.model, EXACT, attn_impl):
            self.text = self.model.new_cache(1, n)
            prefill = self._run(self.model, torch.arange(n, device=self.tokens.device)[None], self.text)
        return self._is_exact(_relative(prefill, self.exact)) and self.checked(lambda model: model) is not None

    def checked(self, make: Callable[[Transformer], Any]) -> Any:
        """Returns the model or a decoder, made by `make`, if it computes by few positions what training computes."""
        for dtypes, trained in self.trained.items():
            with _settings(self.model, dtypes, self.impl):
                target = make(self.model)
                passes = getattr(target, "passes", 1) if dtypes == [*self.trained][-1] else 1
                if dtypes == EXACT:
                    step = partial(self._step, target, passes)
                    is_right = all(any(self._is_exact(step(*call)) for call in calls) for calls in self.calls)
                else:
                    ours = _quantile(self._step(target, passes, *self.calls[-1][0]), LOW)
                    theirs = _quantile(_relative(trained, self.exact), LOW)
                    is_right = max(ours, theirs) <= NOISE[0] * min(ours, theirs) + NOISE[1]
            if not is_right:
                return None
        return target

    def _run(self, target: Any, index: torch.Tensor, kv_cache: KVCache | None) -> list[torch.Tensor]:
        """The states and logits of the main model and then of each MTP module, at positions `index` (B, S) of the text.

        An MTP module goes on from the states that training has in float32.
        """
        outputs = [*target.forward_with_hidden(self.tokens[index], kv_cache)]
        for depth in range(len(self.model.mtp)):
            before = self.exact[2 * depth][0, index] if self.exact else outputs[2 * depth]
            ahead = self.tokens[(index + 1 + depth) % len(self.tokens)]
            outputs += target.mtp_forward(depth, before.to(self.model.compute_dtype), ahead, kv_cache)
        return outputs

    def _train(self, dtypes: Dtypes) -> list[torch.Tensor]:
        """Returns training's outputs: of all positions at once, without a cache."""
        with _settings(self.model, dtypes, "naive"):
            return self._run(self.model, torch.arange(len(self.tokens), device=self.tokens.device)[None], None)

    def _step(self, target: Any, passes: int, lengths: list[int], width: int) -> torch.Tensor:
        """How far a call is from training that has `lengths` positions of the text before its `width` in each row."""
        device, end = self.tokens.device, max(lengths)
        index = torch.tensor(lengths, device=device)[:, None] + torch.arange(width, device=device)
        kv_cache = self.model.new_cache(len(lengths), len(self.tokens))
        kv_cache.lengths, outputs = lengths, []
        for _ in range(passes):
            for layer, text in zip(kv_cache.layers, self.text.layers, strict=True):
                for tensor, source in zip(layer, text, strict=True):
                    tensor.zero_()
                    tensor[:, :end] = source[:, :end]
            outputs = self._run(target, index, kv_cache)
        return _relative(outputs, [output[0, index] for output in self.exact])

    def _is_exact(self, distances: torch.Tensor) -> bool:
        """Whether distances are those of rounding in float32."""
        distance = _quantile(distances, MEDIAN)
        return distance <= TOLERANCE or distance <= 3 * self.sensitivity

    @cached_property
    def sensitivity(self) -> float:
        """How far results move when the embeddings are perturbed."""
        noise = torch.randn(len(self.tokens), self.model.args.dim, generator=torch.Generator().manual_seed(1))
        factor = (1 + noise * PERTURBATION).to(self.tokens.device)
        handle = self.model.embed.register_forward_hook(lambda *given: given[-1].float() * factor)
        try:
            return _quantile(_relative(self._train(EXACT), self.exact), MEDIAN)
        finally:
            handle.remove()


def _relative(outputs: list[torch.Tensor], expected: list[torch.Tensor]) -> torch.Tensor:
    """The distances of outputs (B, S, ...) relative to others', (outputs, B·S)."""
    rows = []
    for a, b in zip(outputs, expected, strict=True):
        a, b = a.flatten(0, 1).double(), b.flatten(0, 1).double()  # squares of what float32 holds
        distances = (a - b).norm(dim=-1) / b.norm(dim=-1).clamp(min=1e-30)
        # a damaged weight makes both no numbers; where one alone is none, they differ
        distances[~a.isfinite().all(-1) & ~b.isfinite().all(-1)] = 0
        rows.append(distances.nan_to_num(float("inf")))
    return torch.stack(rows)


def _quantile(distances: torch.Tensor, quantile: float) -> float:
    """This quantile of the distances of each output's positions; of all outputs, the largest counts."""
    return distances.sort().values[:, int(quantile * (distances.shape[1] - 1))].max().item()


# --- C on a CPU -------------------------------------------------------------------------------------------------------


@cache
def library() -> ctypes.CDLL | None:
    """Loads decode.c's library, compiled first where that was not done before; None where there is no compiler."""
    with contextlib.suppress(subprocess.TimeoutExpired):  # a compiler that hangs does so with other flags, too
        # Apple's compiler has no OpenMP: then one thread does it all; and some have another word for "native"
        for extra in (["-march=native", "-fopenmp"], ["-march=native"], ["-fopenmp"], []):
            with contextlib.suppress(ValueError, subprocess.CalledProcessError):
                for folder in (command.private_cache_folder, command.private_temporary_folder):
                    with contextlib.suppress(OSError):
                        return _library_in(folder(), [*FLAGS, *extra])
    return None


def _library_in(folder: Path, flags: list[str]) -> ctypes.CDLL:
    """Loads the library from a folder, compiled there if need be, tried out, and kept under its digest."""
    compiler = [*shlex.split(os.environ.get("CC") or "cc"), *flags]
    # what "native" means here: a home folder may be shared by machines that differ
    macros = _call([*compiler, "-dM", "-E", "-x", "c", os.devnull])
    key = _digest(macros + SOURCE.read_bytes() + repr(compiler).encode())
    for path in folder.glob(f"decode-{key}-*.so"):
        with contextlib.suppress(OSError):
            return _load(path)
    for left in folder.glob("tmp*"):  # by a process that was killed
        if left.is_dir() and not left.is_symlink() and time.time() - left.lstat().st_mtime > STALE_SECONDS:
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / "decode.so"
        if sys.stderr is not None and sys.stderr.isatty():
            command.note("compiling decode.c, once for this machine")
        _call([*compiler, "-fPIC", "-shared", str(SOURCE), "-lm", "-o", str(made)])
        made.chmod(0o600)
        made = made.rename(made.with_name(f"decode-{key}-{_digest(made.read_bytes())}.so"))
        _try_in_child(made)
        loaded = _load(made)
        with contextlib.suppress(OSError):  # something stands in its way: then it is for this time only
            made.replace(folder / made.name)
        return loaded


def _load(path: Path) -> ctypes.CDLL:
    """Loads a library whose name ends with the digest of its content, and that only this user can have made."""
    info = path.lstat()
    is_own = stat.S_ISREG(info.st_mode) and command.is_private(info)
    if not is_own or not path.stem.endswith(_digest(path.read_bytes())):
        raise OSError(f"{path} is no library that this program has made")
    return ctypes.CDLL(str(path))


def _call(arguments: list[str]) -> bytes:
    """Returns the output of a command; one that takes too long is killed, with its children (TimeoutExpired)."""
    none, pipe = subprocess.DEVNULL, subprocess.PIPE
    with subprocess.Popen(arguments, stdin=none, stdout=pipe, stderr=none, start_new_session=True) as process:
        try:
            output, _ = process.communicate(timeout=COMPILER_SECONDS)
        except BaseException:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, arguments)
    return output


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _try_in_child(path: Path) -> None:
    """Runs `_try_out` in a process of its own, which a library may crash; raises what `_call` does if that fails."""
    _call([sys.executable, str(Path(__file__).resolve()), str(path)])


def _try_out(path: Path) -> bool:
    """Whether a new library computes what the modules do."""
    loaded = _load(path)
    globals()["library"] = lambda: loaded
    for dtype, is_fp8 in product((torch.float32, torch.bfloat16), (False, True)):
        args = ModelArgs(
            max_seq_len=300, dim=64, inter_dim=80, moe_inter_dim=32, n_layers=2, n_heads=3, n_routed_experts=4,
            n_activated_experts=2, q_lora_rank=24, kv_lora_rank=64, qk_nope_head_dim=16, qk_rope_head_dim=16,
            v_head_dim=20, n_mtp_layers=1,
        )  # fmt: skip
        model = Transformer(args, dtype, init=False).to(dtype).eval().requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * p.shape[-1] ** -0.5 + (p.ndim == 1))
        for layer in model.fp8_layers() if is_fp8 else []:
            layer.weight.data, layer.scale = fp8_ops.weight_quant(layer.weight)
        probe = _Probe(model, min(model.args.max_seq_len, MAX_PROBE))
        if not probe.modules_agree("absorb") or probe.checked(CDecoder) is None:
            return False
    return True


def _struct(name: str, *fields: tuple[Any, str]) -> type[ctypes.Structure]:
    names = [(field, kind) for kind, group in fields for field in group.split()]
    return type(name, (ctypes.Structure,), {"_fields_": names})


# fmt: off
_Matrix = _struct("Matrix", (c_void_p, "data scales"), (c_int32, "kind n_in height"))
_Norm = _struct("Norm", (c_void_p, "weight"), (c_float, "eps"), (c_int32, "size"))
_MLP = _struct("Mlp", (_Matrix, "w1 w2 w3"), (c_int32, "width"))
_Block = _struct(
    "Block", (_Norm, "attn_norm q_norm kv_norm ffn_norm"), (_Matrix, "wq_a wq_b wkv_a w_k w_v wo"),
    (_MLP, "mlp experts"), (_Matrix, "gate"), (c_void_p, "gate_bias"), (_Matrix, "index_q index_k index_weights"),
    (_Norm, "index_norm"), (c_void_p, "index_bias"),
)
_Shape = _struct(
    "Shape", (c_int32, "vocab dim heads rank nope rope v context"),
    (c_int32, "n_experts n_activated n_groups n_limited is_softmax act index_heads index_dim index_topk"),
    (c_float, "route_scale scale"), (c_void_p, "cos sin"),
)
_Stack = _struct(
    "Stack", (_Matrix, "embed"), (_Norm, "enorm hnorm"), (_Matrix, "eh_proj"), (POINTER(_Block), "blocks"),
    (c_int32, "n_blocks"), (_Norm, "norm"), (_Matrix, "head"),
)
_Call = _struct(
    "Call", (c_void_p, "tokens positions before states logits kv_caches index_caches"),
    (c_int32, "n_rows n_each capacity kind threads"),
)
# fmt: on


class CDecoder:
    """A model's layers and MTP modules for a few positions at a time, by decode.c.

    Raises:
        ValueError: decode.c has no such model.
    """

    attn_impls = ("absorb",)
    source = "decode.c"

    @staticmethod
    def suits(model: Transformer) -> bool:
        """Whether decode.c has all that a model needs: it is unsharded, has a latent, and is on a CPU."""
        return model.head.weight.device.type == "cpu" and model.args.kv_lora_rank > 0 and model.is_unsharded()

    @torch.no_grad()
    def __init__(self, model: Transformer):
        self.model, self.dtype = model, model.compute_dtype
        self.n_alone = 0  # calls to come by one thread, as other programs want the processors
        self.retreat = SHORT_RETREAT  # how many calls that is the next time
        self.kept: list[torch.Tensor] = []  # what the pointers below point to
        self.args = args = model.args
        layers, modules = cast(list[Block], model.layers), cast(list[MTPModule], model.mtp)
        attn = layers[0].attn
        if args.hidden_act not in ACTIVATIONS:
            raise ValueError(f"it has no activation {args.hidden_act!r}")
        self.shape = _Shape(
            *(args.vocab_size, args.dim, args.n_heads, args.kv_lora_rank, attn.qk_nope_head_dim, attn.qk_rope_head_dim),
            *(args.v_head_dim, args.max_seq_len, args.n_routed_experts, args.n_activated_experts),
            *(args.n_expert_groups, args.n_limited_groups, args.score_func == "softmax"),
            ACTIVATIONS.index(args.hidden_act),
            *((args.index_n_heads, args.index_head_dim, args.index_topk) if args.index_topk else (0, 0, 0)),
            *(args.route_scale, attn.softmax_scale),
        )
        ends = (self._matrix(weight, args.vocab_size, args.dim) for weight in (model.embed.weight, model.head))
        stack = partial(_Stack, **dict(zip(("embed", "head"), ends, strict=True)))
        self.main = stack(norm=self._norm(model.norm, args.dim), **self._blocks(*layers))
        self.mtp = []
        for module in modules:
            norms = {name: self._norm(getattr(module, name), args.dim) for name in ("enorm", "hnorm", "norm")}
            eh_proj = self._matrix(module.eh_proj, args.dim, 2 * args.dim)
            self.mtp.append(stack(eh_proj=eh_proj, **norms, **self._blocks(module.block)))

    def forward_with_hidden(self, tokens: torch.Tensor, cache: KVCache) -> Outputs:
        """Returns what `Transformer.forward_with_hidden` returns."""
        return self._run(self.main, 0, tokens, cache, None)

    def mtp_forward(self, depth: int, h: torch.Tensor, tokens: torch.Tensor, cache: KVCache) -> Outputs:
        """Returns what `Transformer.mtp_forward` returns."""
        return self._run(self.mtp[depth], self.main.n_blocks + depth, tokens, cache, h.float().contiguous())

    def _run(
        self,
        stack: ctypes.Structure,
        first_layer: int,
        tokens: torch.Tensor,
        cache: KVCache,
        before: torch.Tensor | None,
    ) -> Outputs:
        bsz, seqlen = tokens.shape
        layers = cache.layers[first_layer : first_layer + stack.n_blocks]
        kv_caches = (c_void_p * len(layers))(*(layer[0].data_ptr() for layer in layers))
        index_caches = (c_void_p * len(layers))(*(layer[-1].data_ptr() for layer in layers))
        self.tables = self.model.rope_tables(min(max(cache.lengths) + seqlen, self.args.max_seq_len))
        self.shape.cos, self.shape.sin = (table.data_ptr() for table in self.tables)
        positions = (c_int32 * tokens.numel())(*(n + i for n in cache.lengths for i in range(seqlen)))
        tokens = tokens.long().contiguous()
        states, logits = torch.empty(bsz, seqlen, self.args.dim), torch.empty(bsz, seqlen, self.args.vocab_size)
        call = _Call(
            *(tokens.data_ptr(), ctypes.addressof(positions), None if before is None else before.data_ptr()),
            *(states.data_ptr(), logits.data_ptr(), ctypes.addressof(kv_caches)),
            *(ctypes.addressof(index_caches) if self.args.index_topk else None, bsz, seqlen, cache.capacity),
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

    def _norm(self, norm: RMSNorm, size: int) -> ctypes.Structure:
        return _Norm(self._floats(norm.weight, size), norm.eps, size)

    def _matrix(self, weight: torch.Tensor | Linear, *shape: int) -> ctypes.Structure:
        """Keeps a weight (..., out, in) as the compute dtype has it, or narrower where that loses nothing."""
        if isinstance(weight, Linear) and weight.scale is not None:
            return self._fp8_matrix(weight.weight.detach(), weight.scale, *shape)
        weight = (weight.weight if isinstance(weight, Linear) else weight).detach()
        if weight.dtype != torch.bfloat16:
            weight = weight.to(self.dtype)
            narrow = weight.bfloat16()
            weight = narrow if torch.equal(narrow.to(self.dtype), weight) else weight
        return _Matrix(self._keep(weight, *shape), None, self._kind(weight), shape[-1], shape[-2])

    def _fp8_matrix(self, q: torch.Tensor, scales: torch.Tensor, *shape: int) -> ctypes.Structure:
        if q.isnan().any():
            raise ValueError("a weight in FP8 that is not a number")
        blocks = [-(-n // fp8_ops.BLOCK) for n in shape[-2:]]
        kind = FP8 if self.dtype == torch.float32 else FP8_PAIRS
        return _Matrix(self._keep(q, *shape), self._floats(scales, *shape[:-2], *blocks), kind, shape[-1], shape[-2])

    def _mlp(self, mlp: MLP, width: int, *stack: int) -> ctypes.Structure:
        dim = self.args.dim
        shapes = {"w1": (width, dim), "w2": (dim, width), "w3": (width, dim)}
        return _MLP(*(self._matrix(getattr(mlp, name), *stack, *shape) for name, shape in shapes.items()), width)

    def _blocks(self, *blocks: Block) -> dict[str, object]:
        return {"blocks": (_Block * len(blocks))(*map(self._block, blocks)), "n_blocks": len(blocks)}

    def _block(self, block: Block) -> ctypes.Structure:
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
        if attn.indexer is not None:
            self._index(out, attn.indexer)
        if not isinstance(ffn, MoE):
            out.mlp = self._mlp(ffn, args.inter_dim)
            return out
        if ffn.shared_experts is not None:
            out.mlp = self._mlp(ffn.shared_experts, args.n_shared_experts * args.moe_inter_dim)
        experts = args.n_routed_experts
        out.experts = self._mlp(ffn.experts, args.moe_inter_dim, experts)
        gate = self._floats(ffn.gate.weight, experts, dim)
        out.gate = _Matrix(gate, None, FP32, dim, experts)  # routed in float32 throughout
        bias = cast(torch.Tensor | None, ffn.gate.bias)
        out.gate_bias = None if bias is None else self._floats(bias, experts)
        return out

    def _index(self, out: ctypes.Structure, indexer: Indexer) -> None:
        """Fills in what decode.c reads of an indexer."""
        args, heads, size = self.args, indexer.n_heads, self.args.index_head_dim
        out.index_q = self._matrix(indexer.wq_b, heads * size, args.q_lora_rank)
        out.index_k = self._matrix(indexer.wk, size, args.dim)
        scaled = self._floats(indexer.weights_proj.weight.float() * indexer.weight_scale, heads, args.dim)
        out.index_weights = _Matrix(scaled, None, FP32, args.dim, heads)
        out.index_norm = _Norm(self._floats(indexer.k_norm.weight, size), indexer.k_norm.eps, size)
        out.index_bias = self._floats(indexer.k_norm.bias, size)


# --- Kernels on a GPU -------------------------------------------------------------------------------------------------


class KernelDecoder:
    """A model's layers, head and MTP modules for up to 64 positions at a time, by the kernels of kernel_decode.py.

    There is a CUDA graph for each number of positions that there are buffers for. The model's weights must stay where
    they are.

    Raises:
        ValueError: kernel_decode.py has no such model.
    """

    attn_impls = ("absorb",)
    source = "kernel_decode.py"

    @staticmethod
    def suits(model: Transformer) -> bool:
        """Whether the kernels have all that a model needs, and run on its GPU."""
        return KernelDecoder.has_all(model) and KernelDecoder.lacks(model) is None

    @staticmethod
    def has_all(model: Transformer) -> bool:
        """Whether the kernels have all that a model needs: it is unsharded, has a latent, and is on a CUDA GPU."""
        args, is_cuda = model.args, model.head.weight.device.type == "cuda"
        has_layers = args.hidden_act in ACTIVATIONS and args.kv_lora_rank > 0
        has_choice = args.index_topk == 0 or args.max_seq_len <= 1 << 15  # `kernel_sparse.MAX_WIDTH`
        return is_cuda and has_layers and has_choice and model.is_unsharded()

    @staticmethod
    def lacks(model: Transformer) -> str | None:
        """Describes what the kernels need that the model's GPU does not have; None if they run there."""
        least = (8, 9) if any(layer.scale is not None for layer in model.fp8_layers()) else (8, 0)
        found = torch.cuda.get_device_capability(model.head.weight.device)
        if found < least:
            return "this GPU has compute capability {}.{}, and kernel_decode.py needs {}.{}".format(*found, *least)
        return None if find_spec("triton") else "kernel_decode.py needs Triton, which is not installed"

    def __init__(self, model: Transformer):
        import kernel_decode  # which needs Triton: see `lacks`

        self.model, self.kernels = model, kernel_decode
        self.steps: dict[int, kernel_decode.Step] = {}
        self.replays: dict[tuple[int, int], Callable[[], None]] = {}
        self.user: object = None  # the `Blocks.key` of those whose texts the buffers have
        if model.head.weight.is_cuda:
            kernel_decode.compile_ahead(model)

    def forward_with_hidden(self, tokens: torch.Tensor, cache: KVCache) -> Outputs:
        """As `Transformer.forward_with_hidden`."""
        return self._run(-1, tokens, cache)

    def mtp_forward(self, depth: int, h: torch.Tensor, tokens: torch.Tensor, cache: KVCache) -> Outputs:
        """As `Transformer.mtp_forward`."""
        return self._run(depth, tokens, cache, h)

    @torch.inference_mode()
    def prepare(self) -> None:
        """Records all calls, and decodes a few bytes, so that a fault of this machine shows here.

        Raises:
            ValueError: The byte that is chosen is not the likeliest, to which top-k restricts it.
        """
        for n, depth in product(self.kernels.POSITIONS, range(-1, len(self.model.mtp))):
            self.recorded(n, depth)
        if self.model.args.vocab_size <= self.kernels.MAX_VOCAB:
            with step_settings("absorb", float("inf")):
                trial = _Trial(self.model)
            chosen = Blocks(self, trial, trial).advance([trial], lambda: None, None)[0][-1]
            logits = self.steps[1].logits[0]
            if chosen >= 0 and logits[chosen] < logits.max():  # -1: the model's output is no number
                raise ValueError("its choice of a byte is not the likeliest")

    def recorded(self, n: int, depth: int = -1) -> tuple[Any, Callable[[], None]]:
        """Returns the buffers for n positions, and a function that runs MTP module `depth`, or -1: the main model."""
        n = next(most for most in self.kernels.POSITIONS if most >= n)
        if n not in self.steps:
            with torch.inference_mode(False):  # its buffers are written in other calls, too
                self.steps[n] = self.kernels.Step(self.model, n)
        step = self.steps[n]
        if (n, depth) not in self.replays:
            launch = step.run if depth < 0 else partial(step.run_mtp, depth)
            self.replays[n, depth] = _recorded(launch, step) if step.on_gpu else launch
        return step, self.replays[n, depth]

    @torch.no_grad()
    def _run(self, depth: int, tokens: torch.Tensor, cache: KVCache, *before: torch.Tensor) -> Outputs:
        """Runs MTP module `depth`, or -1: the main model."""
        (bsz, seq_len), n = tokens.shape, tokens.numel()
        step, replay = self.recorded(n, depth)
        rows = [row for row in range(bsz) for _ in range(seq_len)]
        self.user = None
        step.place(cache, rows, [length + i for length in cache.lengths for i in range(seq_len)])
        step.tokens[:n] = tokens.flatten()
        for states in before:
            step.before[:n] = states.flatten(0, 1)
        replay()
        # the next replay writes there
        return step.states[:n].unflatten(0, tokens.shape).clone(), step.logits[:n].unflatten(0, tokens.shape).clone()


def _recorded(launch: Callable[[], None], step: Any) -> Callable[[], None]:
    """Returns a function that replays the launches of a step's kernels as one CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    step.counts.zero_()
    step.rows.fill_(-1)  # the launch must not write to a cache of earlier calls, which may be gone
    launch()  # which compiles the kernels
    with torch.cuda.graph(graph):
        launch()
    return graph.replay


class _Launched(NamedTuple):
    """Steps that have been launched: so many bytes of each row, in columns, once `done`."""

    rows: list[Any]
    n: int
    ids: torch.Tensor
    done: torch.cuda.Event | None


class Blocks:
    """Decodes the bytes of a `generate.Batch` on the device, up to MAX_STEPS steps at a time.

    While a block is awaited, the next one is launched. So a text's end is seen late, and the bytes after it are cut
    off; a text that comes in its place begins with the block after. Uniform numbers are drawn by each text's generator
    as in steps one by one.

    Args:
        decoder: The model's.
        batch: What is decoded; its cache is read and written.
        sampling: A `generate.Sampling`.
    """

    def __init__(self, decoder: KernelDecoder, batch: Any, sampling: Any):
        self.decoder, self.batch, self.key = decoder, batch, object()
        # a text that ends among others leaves its row idle for a block or two
        self.steps = max(decoder.kernels.MAX_STEPS // (1 if len(batch.texts) == 1 else 2), 1)
        top_k = min(sampling.top_k, batch.model.args.vocab_size)  # the device counts in int32
        self.how = torch.tensor([sampling.temperature, top_k, sampling.top_p], dtype=torch.float64)
        self.columns: list[Any] = []  # the texts in the order of the device's rows
        self.state = torch.empty(2, 0, dtype=torch.int64)  # their next tokens and positions
        self.next: _Launched | None = None
        self.finished, self.is_steady = 0.0, False

    @torch.inference_mode()
    def advance(self, rows: list[Any], fill: Callable[[], None], reads: Any) -> list[list[int]]:
        """Returns the next bytes of each of the `generate.Row`s, or none of one that has just come.

        `fill` fills the cache of the batch's stale rows. `reads`, a metrics.MemoryReads, counts steps where there was
        nothing else to do.
        """
        new, cache = [rows[i] for i in self.batch.stale], self.batch.cache
        if new:
            fill()
        self._arrange(rows, new)
        is_steady, current = self.is_steady and not new and self.next is not None, self.next
        current = self._launch(rows, None) if current is None else current
        if current is None:
            raise AssertionError("a text that goes on has room for a byte")
        self.next, self.is_steady = self._launch(rows, current), not new
        if current.done is not None:
            current.done.synchronize()
        now = time.perf_counter()
        if reads is not None and is_steady:
            reads.count(cache, 0, now - self.finished, current.n)
        self.finished = now
        columns = dict(zip(current.rows, current.ids.T.tolist(), strict=True))
        ids = [columns.get(row, []) for row in rows]
        cache.lengths = [length + len(more) for length, more in zip(cache.lengths, ids, strict=True)]
        return ids

    def _arrange(self, rows: list[Any], new: list[Any]) -> None:
        """Has the device's rows be these texts, of which `new` begin where the batch has them."""
        cache, n, device = self.batch.cache, len(rows), self.decoder.model.head.weight.device
        if rows == self.columns and not new and self.decoder.user is self.key:
            return
        places = {row: i for i, row in enumerate(self.columns) if row not in new}
        starts = torch.tensor([[text[-1] for text in self.batch.texts], cache.lengths]).to(device)
        if places:  # the others go on from where the device has them, which Python does not know yet
            index = torch.tensor([places.get(row, 0) for row in rows]).to(device)
            is_new = torch.tensor([row not in places for row in rows]).to(device)
            starts = starts.where(is_new, self.state[:, index])
        self.step, self.replay = self.decoder.recorded(n)
        self.step.place(cache, list(range(n)), cache.lengths)
        self.step.tokens[:n], self.step.positions[:n] = starts
        self.step.sampling.copy_(self.how)
        self.columns, self.state, self.decoder.user = list(rows), starts, self.key

    def _launch(self, rows: list[Any], before: _Launched | None) -> _Launched | None:
        """Launches as many steps as no row has too few bytes of context for; None if no text needs any."""
        ahead: dict[Any, int] = {} if before is None else dict.fromkeys(before.rows, before.n)
        needed = max(row.left - ahead.get(row, 0) for row in rows)
        context = self.batch.model.args.max_seq_len + 1  # a text's context starts elsewhere after as many bytes
        room = min(context - len(self.batch.context(i)) - ahead.get(row, 0) for i, row in enumerate(rows))
        if (n := min(needed, room, self.steps)) <= 0:
            return None
        if rows[0].generator is not None:
            numbers = [torch.rand(n, generator=row.generator, dtype=torch.float64) for row in rows]
            self.step.uniforms[:n, : len(rows)] = torch.stack(numbers, dim=1)
        self.step.counts.zero_()
        for _ in range(n):
            self.replay()
        is_gpu = self.step.on_gpu
        ids = torch.empty(n, len(rows), dtype=torch.int32, pin_memory=is_gpu)
        ids.copy_(self.step.chosen[:n, : len(rows)], non_blocking=True)
        self.state = torch.stack([self.step.tokens[: len(rows)], self.step.positions[: len(rows)]])
        done = torch.cuda.Event() if is_gpu else None
        if done is not None:
            done.record()
        return _Launched(list(rows), n, ids, done)


class _Trial:
    """As much of generate.py's `Batch`, of the `Row` in it and of the `Sampling` as `Blocks` reads."""

    temperature, top_k, top_p = 1.0, 1, 0.5

    def __init__(self, model: Transformer):
        self.model, self.texts, self.stale, self.cache = model, [b"\0"], [0], model.new_cache(1, 2)
        self.left, self.generator = 2, torch.Generator()

    def context(self, row: int) -> bytes:
        return self.texts[row]


# --- CUDA graphs of the modules ---------------------------------------------------------------------------------------


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: list[torch.Tensor]
    outputs: Outputs
    tables: Outputs  # of rotary angles, which the kernels read also when the model has longer ones


class GraphDecoder:
    """The modules' kernels for a few positions at a time, recorded as CUDA graphs and replayed.

    Calls that were not recorded yet run the same kernels one by one, so that recording changes no bit of a text. The
    model's weights must stay where they are.
    """

    attn_impls = ("naive", "absorb")
    source = "GraphDecoder of decode.py"
    passes = REPEATS + 1  # of a call, after which it has been recorded

    @staticmethod
    def suits(model: Transformer) -> bool:
        """Whether a model's calls can be recorded: it is unsharded, on a GPU, and its kernels run without Python."""
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

    def forward_with_hidden(self, tokens: torch.Tensor, cache: KVCache) -> Outputs:
        """As `Transformer.forward_with_hidden`."""
        return self._run(-1, cache, tokens)

    def mtp_forward(self, depth: int, h: torch.Tensor, tokens: torch.Tensor, cache: KVCache) -> Outputs:
        """As `Transformer.mtp_forward`."""
        return self._run(depth, cache, tokens, h)

    def _run(self, depth: int, cache: KVCache, tokens: torch.Tensor, *before: torch.Tensor) -> Outputs:
        """Runs MTP module `depth`, or -1: the main model."""
        seq_len = tokens.shape[1]
        end = max(cache.lengths) + seq_len
        length = min(cache.capacity, max(MIN_LENGTH, 1 << (end - 1).bit_length()))
        index = torch.tensor([[n + i for i in range(seq_len)] for n in cache.lengths], device=tokens.device)
        inputs, compute = [tokens, index, *before], partial(self._compute, depth, cache, length)
        where = tuple(tensor.data_ptr() for layer in cache.layers for tensor in layer)
        key = (depth, tuple(tokens.shape), length, cache.capacity, where)
        self.calls[key] += 1
        if key not in self.graphs:
            if self.calls[key] <= REPEATS:
                return compute(*inputs)
            if len(self.graphs) >= MAX_GRAPHS:
                self.reset()
            graph, kept = torch.cuda.CUDAGraph(), [value.clone() for value in inputs]
            with torch.cuda.graph(graph):
                outputs = compute(*kept)
            self.graphs[key] = _Graph(graph, kept, outputs, self.model.rope_tables(1))
        graph, recorded_inputs, outputs, _ = self.graphs[key]
        for recorded, value in zip(recorded_inputs, inputs, strict=True):
            recorded.copy_(value)
        graph.replay()
        return outputs[0].clone(), outputs[1].clone()  # the next replay writes there

    def reset(self) -> None:
        """Forgets all recordings, and frees their memory."""
        self.graphs.clear()
        self.calls.clear()

    def _compute(
        self, depth: int, cache: KVCache, length: int, tokens: torch.Tensor, index: torch.Tensor, *before: torch.Tensor
    ) -> Outputs:
        """States and logits, by kernels that depend on nothing but shapes and `length`, that of the cache to attend to.

        `index` has the positions of the tokens in the cache, (B, S).
        """
        model = self.model
        angle = index.clamp(max=model.args.max_seq_len - 1)  # of a draft past the context, which is discarded
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


def blocks(model: Transformer, batch: Any, sampling: Any, attn_impl: str) -> Blocks | None:
    """Returns the `Blocks` of a batch, if the model's decoder has the kernels, and no bytes are drafted."""
    decoder, n_rows = model.decoder, len(batch.texts)
    if not isinstance(decoder, KernelDecoder) or fp8_ops.gemm_impl != "bf16" or attn_impl not in decoder.attn_impls:
        return None
    has_room = n_rows <= model_module.FEW_POSITIONS and model.args.vocab_size <= decoder.kernels.MAX_VOCAB
    return Blocks(decoder, batch, sampling) if has_room and batch.n_drafts == 0 else None


# --- Prompts and steps ------------------------------------------------------------------------------------------------


def prefill(
    model: Transformer, texts: Sequence[bytes | bytearray], cache: KVCache, hidden: torch.Tensor | None = None
) -> None:
    """Forwards texts, apart from the last byte of each, into the rows of a cache, a bounded number of positions a time.

    Shorter rows are padded on the right, after what that could disturb. `hidden`, what MTP modules read at the last
    positions (see `Drafter`), is filled too; without it, no modules run.
    """
    depth, ring = (0, 0) if hidden is None else (hidden.shape[0], hidden.shape[2])
    longest = max(map(len, texts))
    ids = torch.zeros(len(texts), longest + depth, dtype=torch.int64)  # a module reads that many bytes ahead
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(list(text), dtype=torch.int64)
    ids = ids.to(model.head.weight.device)
    cache.lengths = [0] * len(texts)
    chunk = max(PREFILL_POSITIONS // len(texts), 1)
    for start in range(0, longest - 1, chunk):
        end = min(start + chunk, longest - 1)
        h, _ = model.forward_with_hidden(ids[:, start:end], cache)
        for k in range(depth):
            for row, text in enumerate(texts):
                if last := range(max(start, len(text) - 1 - ring), min(end, len(text) - 1)):
                    hidden[k, row, [i % ring for i in last]] = h[row, last.start - start : last.stop - start]
            h, _ = model.mtp_forward(k, h, ids[:, start + 1 + k : end + 1 + k], cache)
        cache.lengths = [end] * len(texts)
    cache.lengths = [len(text) - 1 for text in texts]


@contextlib.contextmanager
def step_settings(attn_impl: Any, n_multiplied: float) -> Iterator[None]:
    """Sets how attention is computed, and the number of CPU threads, for a step that multiplies so many numbers."""
    before, threads = model_module.attn_impl, torch.get_num_threads()
    model_module.attn_impl = attn_impl
    if n_multiplied <= ONE_THREAD:  # sharing out so few saves little, and on a busy machine costs much
        torch.set_num_threads(1)
    try:
        yield
    finally:
        model_module.attn_impl = before
        torch.set_num_threads(threads)


if __name__ == "__main__":  # what `_try_in_child` starts
    sys.exit(not _try_out(Path(sys.argv[1])))

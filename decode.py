"""Decoding on a CPU: the model for a few positions at a time, by decode.c.

When a byte is decoded, each weight is read for two operations. torch's products and the Python between them then take
several times as long as the memory needs to be read. decode.c has all layers and the head in one call instead, in the
same mathematics and with the same cache: it is compiled when it is first needed, for this machine, and kept in the
user's cache folder. Without a C compiler the modules of model.py do it all, more slowly.

This file compiles and calls it, and shows it the model: the structures below are those of decode.c, field by field.
Weights stay where they are, unless bfloat16 holds them without loss: then half as much is read.
"""

import contextlib
import ctypes
import hashlib
import os
import shlex
import subprocess
import tempfile
from ctypes import POINTER, c_float, c_int32, c_void_p
from functools import cache
from pathlib import Path

import torch

from model import ACTIVATIONS, MLP, Block, KVCache, Linear, MoE, RMSNorm, Transformer

FP32, BF16, PAIRS = range(3)  # decode.c's kinds of matrices
SHORT_RETREAT, LONG_RETREAT = 32, 1024  # calls by one thread, where others had no processor
SOURCE = Path(__file__).with_name("decode.c")
FLAGS = ["-O3", "-std=gnu11", "-ffp-contract=fast", "-fno-math-errno", "-fno-strict-aliasing"]


def suits(model: Transformer) -> bool:
    """Whether decode.c has all that a model needs: it is whole, has a latent, and is on a CPU."""
    return model.head.weight.device.type == "cpu" and model.args.kv_lora_rank > 0 and model.is_unsharded()


def attach(model: Transformer) -> Transformer:
    """Has a model decode by decode.c, if that suits it, and if there is a C compiler.

    The model's weights must not change any more, or `model.decoder` be set to None before they do.

    Returns:
        The same model.
    """
    model.decoder = Decoder(model) if suits(model) and library() is not None else None
    return model


@cache
def library() -> ctypes.CDLL | None:
    """Compiles decode.c, unless that was done before, and loads it; None where there is no compiler that can."""
    # Apple's compiler has no OpenMP: then one thread does it all; and some have another word for "native"
    for extra in (["-march=native", "-fopenmp"], ["-march=native"], ["-fopenmp"], []):
        flags = [*FLAGS, *extra]
        with contextlib.suppress(OSError, ValueError, AttributeError, subprocess.SubprocessError):
            compiler = shlex.split(os.environ.get("CC") or "cc")
            # what "native" means here: a home folder may be shared by machines that differ
            macros = _call([*compiler, *flags, "-dM", "-E", "-x", "c", os.devnull])
            key = _digest(macros + SOURCE.read_bytes() + repr((compiler, flags)).encode())
            return _load([*compiler, *flags, "-fPIC", "-shared", str(SOURCE), "-lm"], key)
    return None


def _load(command: list[str], key: str) -> ctypes.CDLL:
    """Loads what a command compiles, from the user's cache folder where it is there under this key.

    A file's name ends with the digest of its content: one that is damaged, or was not loaded once, is not loaded.
    """
    with contextlib.ExitStack() as stack:
        try:
            folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bytegpt"
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for path in folder.glob(f"decode-{key}-*.so"):
                if path.stem.endswith(_digest(path.read_bytes())):
                    return _open(path)
            scratch = stack.enter_context(tempfile.TemporaryDirectory(dir=folder))
        except (OSError, RuntimeError):  # no home, or one that cannot be written to: for this time only
            folder, scratch = None, stack.enter_context(tempfile.TemporaryDirectory())
        made = Path(scratch) / "decode.so"
        _call([*command, "-o", str(made)])
        loaded = _open(made)
        if folder is not None:
            made.replace(folder / f"decode-{key}-{_digest(made.read_bytes())}.so")
        return loaded


def _open(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path.absolute()))
    loaded.run.restype = ctypes.c_int
    return loaded


def _call(command: list[str]) -> bytes:
    """Runs a compiler, which may neither wait for input nor for ever, and returns what it writes."""
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True, timeout=60).stdout


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


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
        *((name, c_void_p) for name in ("tokens", "index", "before", "states", "logits", "memories")),
        *((name, c_int32) for name in ("n_texts", "n_each", "capacity", "kind", "threads")),
    ]


class Decoder:
    """A model's layers and its MTP modules for a few positions at a time.

    Args:
        model: The model, whole and on a CPU.
    """

    attn_impls = ("absorb",)

    @torch.no_grad()
    def __init__(self, model: Transformer):
        self.dtype = model.compute_dtype
        self.alone = 0  # calls to come by one thread, as other programs want the processors
        self.retreat = SHORT_RETREAT  # how many calls that is the next time
        self.kept: list[torch.Tensor] = []  # what the pointers below point to
        args, attn = model.args, model.layers[0].attn
        self.shape = _Shape(
            *(args.vocab_size, args.dim, args.n_heads, args.kv_lora_rank, attn.qk_nope_head_dim, attn.qk_rope_head_dim),
            *(args.v_head_dim, args.max_seq_len, args.n_routed_experts, args.n_activated_experts),
            *(args.n_expert_groups, args.n_limited_groups, args.score_func == "softmax"),
            *(list(ACTIVATIONS).index(args.hidden_act), args.route_scale, attn.softmax_scale),
            *(self._numbers(table) for table in (model.rope_cos, model.rope_sin)),
        )
        ends = {"embed": self._matrix(model.embed.weight), "head": self._matrix(model.head)}
        self.main = _Stack(**ends, norm=self._norm(model.norm), **self._blocks(*model.layers))
        self.mtp = [
            _Stack(
                **ends,
                **{name: self._norm(getattr(module, name)) for name in ("enorm", "hnorm", "norm")},
                eh_proj=self._matrix(module.eh_proj.weight),
                **self._blocks(module.block),
            )
            for module in model.mtp
        ]

    def forward_with_hidden(self, tokens: torch.Tensor, cache: KVCache) -> tuple[torch.Tensor, torch.Tensor]:
        """What `Transformer.forward_with_hidden` returns."""
        return self._run(self.main, 0, tokens, cache, None)

    def mtp_forward(
        self, depth: int, h: torch.Tensor, tokens: torch.Tensor, cache: KVCache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What `Transformer.mtp_forward` returns."""
        return self._run(self.mtp[depth], self.main.n_blocks + depth, tokens, cache, h.float().contiguous())

    def _run(
        self, stack: _Stack, first_layer: int, tokens: torch.Tensor, cache: KVCache, before: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        bsz, seqlen = tokens.shape
        layers = cache.layers[first_layer : first_layer + stack.n_blocks]
        memories = (c_void_p * len(layers))(*(layer[0].data_ptr() for layer in layers))
        index = (c_int32 * tokens.numel())(*(n + i for n in cache.lengths for i in range(seqlen)))
        tokens = tokens.long().contiguous()
        states, logits = torch.empty(bsz, seqlen, self.shape.dim), torch.empty(bsz, seqlen, self.shape.vocab)
        call = _Call(
            *(tokens.data_ptr(), ctypes.addressof(index), None if before is None else before.data_ptr()),
            *(states.data_ptr(), logits.data_ptr(), ctypes.addressof(memories), bsz, seqlen, cache.capacity),
            self._kind(cache.layers[0][0]),
            1 if self.alone else torch.get_num_threads(),
        )
        result = library().run(ctypes.byref(self.shape), ctypes.byref(stack), ctypes.byref(call))
        if result > 0:
            raise MemoryError("not enough memory to decode") if result == 1 else IndexError("a token out of range")
        self._share(is_late=result < 0)
        return states.to(self.dtype), logits

    def _share(self, is_late: bool) -> None:
        """Decides about threads: when one was late, one does it all for a while, and twice as long the next time."""
        if self.alone:
            self.alone -= 1
        elif is_late:
            self.alone, self.retreat = self.retreat, min(2 * self.retreat, LONG_RETREAT)
        else:
            self.retreat = max(self.retreat - 1, SHORT_RETREAT)

    def _numbers(self, tensor: torch.Tensor) -> int:
        """Keeps a tensor, as contiguous float32, and returns where its numbers are."""
        self.kept.append(tensor.detach().float().contiguous())
        return self.kept[-1].data_ptr()

    def _kind(self, numbers: torch.Tensor) -> int:
        """How decode.c multiplies with these: a model in bfloat16 rounds the other side too."""
        return FP32 if numbers.dtype == torch.float32 else BF16 if self.dtype == torch.float32 else PAIRS

    def _norm(self, norm: RMSNorm) -> _Norm:
        return _Norm(self._numbers(norm.weight), norm.eps, norm.weight.numel())

    def _matrix(self, weight: torch.Tensor | Linear) -> _Matrix:
        """Keeps a weight (..., out, in) in the compute dtype, and says where it is."""
        weight = weight.dense_weight(self.dtype) if isinstance(weight, Linear) else weight
        weight = narrowed(weight.detach().to(self.dtype).contiguous())
        self.kept.append(weight)
        return _Matrix(weight.data_ptr(), self._kind(weight), weight.shape[-1])

    def _mlp(self, mlp: MLP | None) -> _MLP:
        return _MLP(*map(self._matrix, (mlp.w1, mlp.w2, mlp.w3)), mlp.w1.weight.shape[-2]) if mlp else _MLP()

    def _blocks(self, *blocks: Block) -> dict[str, object]:
        return {"blocks": (_Block * len(blocks))(*map(self._block, blocks)), "n_blocks": len(blocks)}

    def _block(self, block: Block) -> _Block:
        attn, ffn = block.attn, block.ffn
        wkv_b = attn.wkv_b.dense_weight(self.dtype).unflatten(0, (attn.n_heads, -1))
        w_k, w_v = wkv_b.split([attn.qk_nope_head_dim, attn.v_head_dim], dim=1)
        out = _Block(
            **{name: self._norm(norm) for name, norm in block.named_children() if isinstance(norm, RMSNorm)},
            **{name: self._norm(norm) for name, norm in attn.named_children() if isinstance(norm, RMSNorm)},
            **{name: self._matrix(getattr(attn, name)) for name in ("wkv_a", "wo")},
            w_k=self._matrix(w_k.mT),
            w_v=self._matrix(w_v),
            wq_b=self._matrix(attn.wq_b if attn.q_lora_rank else attn.wq),
        )
        if attn.q_lora_rank:
            out.wq_a = self._matrix(attn.wq_a)
        if not isinstance(ffn, MoE):
            out.mlp = self._mlp(ffn)
            return out
        out.mlp, out.experts = self._mlp(ffn.shared_experts), self._mlp(ffn.experts)
        gate = ffn.gate.weight.float().contiguous()  # routed in float32 throughout
        self.kept.append(gate)
        out.gate = _Matrix(gate.data_ptr(), FP32, gate.shape[1])
        out.gate_bias = None if ffn.gate.bias is None else self._numbers(ffn.gate.bias)
        return out


def narrowed(weight: torch.Tensor) -> torch.Tensor:
    """A weight in bfloat16 where that loses nothing, as it was stored so: half as much to keep, and to read."""
    narrow = weight.bfloat16()
    return narrow if torch.equal(narrow.to(weight.dtype), weight) else weight

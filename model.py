"""DeepSeek-V3's architecture over bytes: multi-head latent attention, mixture of experts, multi-token prediction.

A block is `x + attn(attn_norm(x))` followed by `x + ffn(ffn_norm(x))`. Four ideas are not those of a plain GPT:

Multi-head latent attention (MLA; DeepSeek-V2 report, section 2.1). Keys and values of all heads are expanded from one
    small latent vector per position, `c = kv_norm(W_kv_a x)`, plus one rotary key that all heads share. Only these are
    cached. Two implementations give the same numbers:
      naive    expands keys and values, then attends as usual: few large products, for training.
      absorb   moves the expansion to the other side, `q·(W_k c) = (W_kᵀ q)·c`: queries and outputs are projected into
               the latent space, where all heads read the same cache: little memory to read, for decoding.
Mixture of experts (MoE; DeepSeek-V3 report, section 2.1.2). A router sends each position through the best
    `n_activated_experts` of `n_routed_experts` small MLPs, and through `n_shared_experts` that every position visits.
    A bias per expert, moved against its load after each batch, balances the choice without an auxiliary loss.
Multi-token prediction (MTP; section 2.2). Module k takes the model's state at position i and the byte at i+k, and
    predicts the byte at i+k+1 through one more block and the shared head: a denser training signal, and drafts for
    speculative decoding.

Sparse attention (DeepSeek-V3.2 report, section 2.1; with `index_topk`). Attention to all of a long context costs more
    than the rest of the model. So a lightning indexer, a few small heads without softmax or values, scores every
    earlier position, and MLA attends to the best `index_topk` alone, in the latent space. A choice has no gradient:
    the indexer learns to predict where attention goes, by the divergence from MLA's own distribution, first from
    dense attention to everything and then from that to the chosen positions. Nothing of this reaches the other weights.

The names are those of DeepSeek's own inference code. Shapes in comments: B batch, S positions of the call, T positions
to attend to, H heads, d their width, C `kv_lora_rank`, R `qk_rope_head_dim`, N = B·S, K experts a position or positions
chosen for a query, E experts.

This file is the mathematics for one device, without files and flags; `fp8_ops` has what differs by device.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fp8_ops
from fp8_ops import Activation

attn_impl: Literal["naive", "absorb"] = "naive"  # how MLA attends; generate.py sets it for a step of decoding

FEW_POSITIONS = 64  # calls of more positions run the modules even where `Transformer.decoder` is set: they are faster
EMBEDDING_STD = 0.3  # of initial embeddings; with 1, small models learn more slowly
LATENT_NORM_EPS = 1e-6  # of the norms within attention, whatever norm_eps is, in DeepSeek's code and in transformers
CHUNK_NUMBERS = 1 << 26  # of the largest tensor of sparse attention: it goes over so many queries at a time
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu2": lambda x: F.relu(x).square(),
}
_CHOICES: dict[str, Collection[str | None]] = {
    "dtype": ("fp32", "bf16", "fp8"),
    "scale_fmt": (None, "ue8m0"),
    "score_func": ("softmax", "sigmoid"),
    "hidden_act": ACTIVATIONS,
}
# The lowest and the highest value of each number: beyond any published model, and such that no weight has 2^63 bytes.
# fmt: off
_BOUNDS: dict[str, tuple[float, float]] = {
    "max_batch_size": (1, 1 << 20), "max_seq_len": (1, 1 << 30), "vocab_size": (1, 1 << 24), "dim": (1, 1 << 20),
    "inter_dim": (0, 1 << 20), "moe_inter_dim": (0, 1 << 20), "n_layers": (1, 1 << 12), "n_dense_layers": (0, 1 << 12),
    "moe_layer_freq": (1, 1 << 12), "n_heads": (1, 1 << 14), "n_routed_experts": (0, 1 << 16),
    "n_shared_experts": (0, 1 << 10), "n_activated_experts": (0, 1 << 16), "n_expert_groups": (0, 1 << 16),
    "n_limited_groups": (0, 1 << 16), "route_scale": (-1e6, 1e6), "bias_update_speed": (0, 1e6),
    "aux_loss_alpha": (0, 1e6), "q_lora_rank": (0, 1 << 20), "kv_lora_rank": (0, 1 << 20),
    "qk_nope_head_dim": (0, 1 << 14), "qk_rope_head_dim": (0, 1 << 14), "v_head_dim": (1, 1 << 14),
    "original_seq_len": (1, 1 << 30), "rope_theta": (1, 1e15), "rope_factor": (1, 1e6), "beta_fast": (1, 1 << 20),
    "beta_slow": (1, 1 << 20), "mscale": (0, 1e6), "norm_eps": (1e-30, 1), "n_mtp_layers": (0, 1 << 12),
    "mtp_loss_weight": (0, 1e6), "index_n_heads": (1, 1 << 14), "index_head_dim": (1, 1 << 14),
    "index_topk": (0, 1 << 30),
}
# fmt: on


class ConfigError(ValueError):
    """An impossible configuration: the message names the key of the config and the values that are possible."""


@dataclass
class ModelArgs:
    """The shape of a model: the fields of DeepSeek's `inference/configs/*.json`, and a few more.

    The defaults are DeepSeek's, but for `vocab_size`. A value of the wrong type or out of range, or sizes that do not
    fit each other, raise a ConfigError.
    """

    max_batch_size: int = 8  # sequences that generation decodes at a time
    max_seq_len: int = 4096 * 4  # context in positions
    dtype: str = "bf16"  # of the stored weights of linear layers; training keeps master weights in float32 anyway
    scale_fmt: str | None = None  # "ue8m0" rounds FP8 scales up to powers of two
    vocab_size: int = 256  # number of token ids; 256 for bytes
    dim: int = 2048  # width of the residual stream
    inter_dim: int = 10944  # hidden width of the dense MLPs
    moe_inter_dim: int = 1408  # hidden width of one expert
    n_layers: int = 27  # number of blocks
    n_dense_layers: int = 1  # how many of the first blocks are dense
    moe_layer_freq: int = 1  # distance between MoE blocks after those: 1 makes all of them MoE, 2 every other one
    n_heads: int = 16
    n_routed_experts: int = 64  # experts to choose from; with 0, every layer is dense
    n_shared_experts: int = 2  # experts that every position visits, computed as one MLP
    n_activated_experts: int = 6  # routed experts that a position visits
    n_expert_groups: int = 1  # groups that the experts are divided into
    n_limited_groups: int = 1  # groups that a position may choose its experts from
    score_func: str = "softmax"  # router scores: over all experts; "sigmoid": of each, normalised over the chosen ones
    gate_bias: bool | None = None  # choosing adds a bias per expert, which balances the load; None: with sigmoid only
    route_scale: float = 1.0  # factor of the routed experts' weights
    # Step of that bias after each batch (gamma in the V3 report, section 2.1.2; 0.001 there). None: in proportion to
    # how far the load is from the mean, for runs of any length.
    bias_update_speed: float | None = None
    aux_loss_alpha: float = 0.0001  # weight of the sequence-wise balance loss (alpha there, equation 17)
    hidden_act: str = "silu"  # activation of the gate in MLPs and experts: or "gelu", "relu2" (squared ReLU)
    q_lora_rank: int = 0  # rank of the query's compression; 0: a plain projection
    kv_lora_rank: int = 512  # rank of the latent of keys and values; 0: ordinary multi-head attention
    qk_nope_head_dim: int = 128  # width of a head's query and key without position
    qk_rope_head_dim: int = 64  # width of their rotary components
    v_head_dim: int = 128  # width of a head's value
    index_n_heads: int = 64  # heads of the indexer, which chooses the positions that a query attends to
    index_head_dim: int = 128  # their width, of which the first `qk_rope_head_dim` are rotary
    index_topk: int = 0  # positions that it chooses: a shorter context has dense attention; 0: no indexer, all dense
    original_seq_len: int = 4096  # context that the rotary frequencies are designed for
    # Whether YaRN stretches them for a longer one. None, as in DeepSeek's files: if `max_seq_len` is above
    # `original_seq_len`. The answer belongs to the weights: it is saved, and stays when `max_seq_len` changes.
    use_yarn: bool | None = None
    rope_theta: float = 10000.0  # base of the rotary frequencies
    rope_factor: float = 40.0  # how far YaRN stretches them
    beta_fast: int = 32  # rotations over `original_seq_len` above which YaRN leaves a frequency as it is
    beta_slow: int = 1  # rotations below which it is divided by `rope_factor` in full
    mscale: float = 1.0  # strength of YaRN's correction of the attention's temperature
    norm_eps: float = 1e-6  # of the RMS norms, those of the latent vectors excepted: `LATENT_NORM_EPS`
    n_mtp_layers: int = 0  # multi-token prediction modules, each looking one byte further ahead
    mtp_loss_weight: float = 0.3  # weight of their mean loss (lambda in the V3 report, equation 25)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelArgs":
        """Builds the arguments from a parsed JSON object, refusing keys that are not fields."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ConfigError(f"unknown key {unknown[0]!r}: no field of ModelArgs; remove it or correct its spelling")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as a flat object, ready for JSON."""
        return asdict(self)

    def __post_init__(self) -> None:
        for field in fields(self):
            setattr(self, field.name, check_field(field.name, getattr(self, field.name)))
        if self.gate_bias is None:
            self.gate_bias = self.score_func == "sigmoid"
        if self.use_yarn is None:
            self.use_yarn = self.max_seq_len > self.original_seq_len
        if self.beta_fast < self.beta_slow:
            raise ConfigError(f"beta_fast must be at least beta_slow ({self.beta_slow}), got {self.beta_fast}")
        if self.rope_theta == 1:
            raise ConfigError("rope_theta must be greater than 1, got 1.0")
        if self.qk_rope_head_dim % 2 != 0:
            raise ConfigError(f"qk_rope_head_dim must be even (rotary pairs), got {self.qk_rope_head_dim}")
        if self.qk_nope_head_dim == self.qk_rope_head_dim == 0:
            raise ConfigError("qk_nope_head_dim and qk_rope_head_dim cannot both be 0")
        if self.index_topk > 0 and not (self.q_lora_rank and self.kv_lora_rank):
            raise ConfigError("index_topk needs q_lora_rank and kv_lora_rank above 0, whose latents an indexer reads")
        if self.index_topk > 0 and self.index_head_dim < self.qk_rope_head_dim:
            least = f"qk_rope_head_dim ({self.qk_rope_head_dim})"
            raise ConfigError(f"index_head_dim must be at least {least}, got {self.index_head_dim}")
        if self.inter_dim == 0 and not all(self.is_moe(i) for i in range(self.n_layers + self.n_mtp_layers)):
            raise ConfigError("inter_dim must be greater than 0, since the model has dense layers")
        if self.n_routed_experts > 0:
            self._check_experts()

    def _check_experts(self) -> None:
        """Raises a ConfigError if the sizes of the mixture of experts do not fit each other."""
        experts, groups = self.n_routed_experts, self.n_expert_groups
        topk, limited = self.n_activated_experts, self.n_limited_groups
        if self.moe_inter_dim == 0:
            raise ConfigError("moe_inter_dim must be greater than 0, got 0")
        if not 1 <= topk <= experts:
            raise ConfigError(f"n_activated_experts must be 1 to n_routed_experts ({experts}), got {topk}")
        if groups < 1 or experts % groups > 0:
            raise ConfigError(f"n_expert_groups must divide n_routed_experts ({experts}), got {groups}")
        if not 1 <= limited <= groups:
            raise ConfigError(f"n_limited_groups must be 1 to n_expert_groups ({groups}), got {limited}")
        most = experts // groups * limited  # the experts of the groups that a position may choose from
        if topk > most:
            raise ConfigError(
                f"n_activated_experts must be at most {most}, the experts of n_limited_groups groups, got {topk}"
            )
        if self.gate_bias and groups > 1 and experts // groups < 2:
            raise ConfigError("n_expert_groups must leave two experts a group, whose best two scores rank it")

    def is_moe(self, layer_id: int) -> bool:
        """Whether block `layer_id` is a mixture of experts; MTP modules count on from `n_layers`."""
        after = layer_id - self.n_dense_layers
        return self.n_routed_experts > 0 and after >= 0 and after % self.moe_layer_freq == 0

    def cache_numbers_per_position(self) -> tuple[int, int]:
        """Numbers cached per position by the main layers, and those that plain multi-head attention would cache."""
        plain = self.n_heads * (self.qk_nope_head_dim + self.qk_rope_head_dim + self.v_head_dim)
        latent = self.kv_lora_rank + self.qk_rope_head_dim if self.kv_lora_rank else plain
        latent += self.index_head_dim if self.index_topk else 0
        return self.n_layers * latent, self.n_layers * plain


def check_field(name: str, value: Any) -> Any:
    """Checks a value of a field of `ModelArgs` by itself: its type, its bounds, the choices that there are.

    Returns the value, an integer as a float where the field is one, or raises a ConfigError that names the field.
    """
    wanted: Any = ModelArgs.__dataclass_fields__[name].type
    shown = f"{value!r:.100}" if type(value) is not int or value.bit_length() < 100 else "a number of many digits"
    if type(value) is int and wanted in (float, float | None) and value.bit_length() < 64:
        value = float(value)
    # bool is a subclass of int, and `true` is no number of layers
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted in (int, float)):
        raise ConfigError(f"{name} must be of type {getattr(wanted, '__name__', wanted)}, got {shown}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name} must be finite, got {shown}")
    if name in _BOUNDS and value is not None and not _BOUNDS[name][0] <= value <= _BOUNDS[name][1]:
        raise ConfigError(f"{name} must be from {_BOUNDS[name][0]} to {_BOUNDS[name][1]}, got {shown}")
    if name in _CHOICES and value not in _CHOICES[name]:
        raise ConfigError(f"{name} must be one of {', '.join(map(str, _CHOICES[name]))}, got {shown}")
    return value


class KVCache:
    """Keys and values of a batch of sequences, which may differ in length.

    Under "absorb" a layer keeps one tensor (B, capacity, C + R); under "naive", keys (B, capacity, H, qk_head_dim) and
    values (B, capacity, H, v_head_dim). With an indexer it is the former under both, and the index keys (B, capacity,
    index_head_dim). `lengths` is the number of filled positions of each sequence: entries after them are never read, so
    that lowering it drops positions. `n_heads` is H of this process; `spare` positions past the context may be
    computed, to be discarded.
    """

    def __init__(
        self, args: ModelArgs, batch_size: int, capacity: int, n_heads: int, dtype: torch.dtype,
        device: torch.device | str | None = None, spare: int = 0,
    ):  # fmt: skip
        if args.kv_lora_rank and (attn_impl == "absorb" or args.index_topk):
            shapes: list[tuple[int, ...]] = [(args.kv_lora_rank + args.qk_rope_head_dim,)]
            shapes += [(args.index_head_dim,)] if args.index_topk else []
        else:
            shapes = [(n_heads, args.qk_nope_head_dim + args.qk_rope_head_dim), (n_heads, args.v_head_dim)]
        self.capacity = capacity + spare
        self.spare = spare
        self.lengths = [0] * batch_size
        self.layers = [
            [torch.zeros(batch_size, self.capacity, *shape, dtype=dtype, device=device) for shape in shapes]
            for _ in range(args.n_layers + args.n_mtp_layers)
        ]

    def positions(self, seq_len: int, device: torch.device) -> torch.Tensor | slice:
        """Returns the positions that the next `seq_len` tokens take: (B, seq_len), or a slice if equal in all rows."""
        start, end = min(self.lengths), max(self.lengths) + seq_len
        if end == start + seq_len:
            return slice(start, end)
        return torch.tensor(self.lengths, device=device)[:, None] + torch.arange(seq_len, device=device)

    def update(self, layer_id: int, positions: torch.Tensor | slice, *new: torch.Tensor) -> list[torch.Tensor]:
        """Writes a layer's new entries (B, S, ...) at `positions` and returns all that may be read (B, T, ...)."""
        end = max(self.lengths) + new[0].shape[1]
        rows: torch.Tensor | slice = slice(None)
        if isinstance(positions, torch.Tensor):
            rows = torch.arange(len(positions), device=positions.device)[:, None]
        for tensor, entries in zip(self.layers[layer_id], new, strict=True):
            tensor[rows, positions] = entries.to(tensor.dtype)
        return [tensor[:, :end] for tensor in self.layers[layer_id]]


class Positions(NamedTuple):
    """The positions of a call's tokens: computed once, used by every layer."""

    cos: torch.Tensor  # of the rotary angles, float32 (S, 1, R/2), or (B, S, 1, R/2) where rows differ
    sin: torch.Tensor
    # in the cache: (B, S), or a slice equal in all rows; None without a cache
    index: torch.Tensor | slice | None = None  # type: ignore[assignment]  # tuples have a method of this name
    mask: torch.Tensor | None = None  # True where a query may attend, (B or 1, 1, S, T); None: causal, or one query
    dense: bool = False  # whether an indexer learns from attention to all positions, and chooses none

    def of_queries(self) -> torch.Tensor:
        """The position of each query, the last that it may attend to: integers (B or 1, S)."""
        if isinstance(self.index, torch.Tensor):
            return self.index
        start, stop = (0, len(self.cos)) if self.index is None else (self.index.start, self.index.stop)
        return torch.arange(start, stop, device=self.cos.device).unsqueeze(0)


class Routing(NamedTuple):
    """The statistics of one block over a batch: of its mixture of experts, and of its indexer."""

    load: torch.Tensor | None = None  # positions that each expert got, float32 (E,); None without experts
    balance_loss: torch.Tensor | None = None  # sequence-wise, times its weight; a float32 scalar
    index_loss: torch.Tensor | None = None  # of the indexer, a float32 scalar; None where it does not learn


class Losses(NamedTuple):
    """The training loss and its terms, scalars in nats, and the load of the experts."""

    total: torch.Tensor  # to minimise: next_byte + mtp_loss_weight · mtp + balance + indexer
    next_byte: torch.Tensor  # mean cross-entropy of the next byte, as evaluations quote it
    mtp: torch.Tensor  # mean cross-entropy of the MTP modules; 0 without any
    balance: torch.Tensor  # sum of the layers' balance losses
    load: torch.Tensor  # positions per expert, float32 (MoE layers, E)
    indexer: torch.Tensor  # sum of the layers' divergences of the indexer from attention; 0 without indexers


class Linear(nn.Module):
    """A matrix without bias (no layer of the architecture has one), or a stack of them, one for each routed expert.

    A trained weight is kept in the parameter's own precision; for FP8 products, `quantize` keeps a quantised copy,
    once a step. A weight stored in FP8, as in a checkpoint, is itself the parameter, and `scale` holds its scales.
    `stack` is the number of matrices; None: a single one. With `high_precision` it is never in FP8 (V3 report, section
    3.3.1: embedding, head, router and norms are not).
    """

    scale: torch.Tensor | None

    def __init__(
        self, args: ModelArgs, in_features: int, out_features: int,
        stack: int | None = None, high_precision: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.scale_fmt = args.scale_fmt
        self.high_precision = high_precision
        shape = (out_features, in_features) if stack is None else (stack, out_features, in_features)
        self.weight = nn.Parameter(torch.empty(shape))
        self.register_buffer("scale", None)
        for name in fp8_ops.QuantizedWeight._fields:
            self.register_buffer(f"weight_{name}", None, persistent=False)

    def forward(self, x: Activation, offsets: torch.Tensor | None = None) -> torch.Tensor:
        return project(x, self, offsets=offsets)[0]

    def extra_repr(self) -> str:
        return " × ".join(map(str, self.weight.shape)) + ("" if self.scale is None else ", stored in FP8")

    def store_fp8(self) -> None:
        """Replaces the weight by one stored in FP8; its values are undefined until they are loaded."""
        blocks = [-(-n // fp8_ops.BLOCK) for n in self.weight.shape[-2:]]
        self.weight = nn.Parameter(torch.empty_like(self.weight, dtype=fp8_ops.E4M3), requires_grad=False)
        self.scale = self.weight.new_empty(*self.weight.shape[:-2], *blocks, dtype=torch.float32)

    @torch.no_grad()
    def quantize(self) -> None:
        """Quantises the weight for the next products, in place of an earlier call's copy."""
        if self.scale is not None:  # it is stored in FP8
            return
        out = None if self.weight_q is None else self.quantized()
        for name, tensor in fp8_ops.quantize(self.weight, self.scale_fmt, out)._asdict().items():
            setattr(self, f"weight_{name}", tensor)

    def quantized(self) -> fp8_ops.QuantizedWeight:
        """The weight for FP8 products: the copy of `quantize`, or as it is stored, or else quantised now."""
        if self.scale is not None:
            return fp8_ops.QuantizedWeight(self.weight, self.scale, self.weight.mT)
        if self.weight_q is not None:
            return fp8_ops.QuantizedWeight(*(getattr(self, f"weight_{n}") for n in fp8_ops.QuantizedWeight._fields))
        return fp8_ops.quantize(self.weight, self.scale_fmt)

    def dense_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight in `dtype`, or as it is where the product casts it."""
        return self.weight if self.scale is None else fp8_ops.weight_dequant(self.weight, self.scale, dtype=dtype)


def project(x: Activation, *layers: Linear, offsets: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
    """Applies several layers, all in FP8 or none, to one input (..., in_features); returns (..., out_features) of each.

    `offsets` (matrices of a stack,) has the end of each one's rows in `x`; see `fp8_ops.linear`.
    """
    if fp8_ops.gemm_impl == "fp8" and not layers[0].high_precision:
        quantized = [layer.quantized() for layer in layers]  # FP8 quantises, and keeps, the input once for all
        return fp8_ops.fp8_linear(x, [layer.weight for layer in layers], quantized, offsets, layers[0].scale_fmt)
    if len(layers) > 1 and fp8_ops.kernels(x):
        return project_joined(x, *layers, offsets=offsets).split([layer.weight.shape[-2] for layer in layers], dim=-1)
    return tuple(fp8_ops.linear(x, layer.dense_weight(x.dtype), offsets) for layer in layers)


def project_joined(x: torch.Tensor, *layers: Linear, offsets: torch.Tensor | None = None) -> torch.Tensor:
    """`project` as one product, not in FP8: the results lie side by side, (..., sum of out_features)."""
    weights = [layer.dense_weight(x.dtype) for layer in layers]
    return fp8_ops.linear(x, fp8_ops.concat_weights(weights, x.dtype), offsets)


class RMSNorm(nn.Module):
    """Root mean square normalisation over the last dimension, with a learned scale."""

    def __init__(self, dim: int, eps: float, readers: str = "plain", scale_fmt: str | None = None):
        super().__init__()
        self.eps = eps
        self.readers = readers  # of the norm: only "fp8" layers, which may get it quantised, or "mixed" ones
        self.scale_fmt = scale_fmt
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> Activation:
        return self.add(x)[1]

    def add(self, x: torch.Tensor, update: torch.Tensor | None = None) -> tuple[torch.Tensor, Activation]:
        """Returns `x + update` (`x` without one) and its norm: a residual stream needs both."""
        if self.readers != "plain" and fp8_ops.fuses_fp8(x):
            return fp8_ops.add_rms_norm(x, update, self.weight, self.eps, self.scale_fmt, self.readers == "mixed")
        if kernel := fp8_ops.kernels(x):
            return kernel.add_rms_norm(x, update, self.weight, self.eps)
        x = x if update is None else x + update
        return x, F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}"


def rope_frequencies(args: ModelArgs) -> torch.Tensor:
    """Returns the rotary frequencies in radians per position, float32 (R/2,), stretched by YaRN where it applies.

    YaRN (Peng et al. 2023, section 3.2) divides the slow frequencies by `rope_factor`, leaves the fast ones alone and
    ramps between them; slow and fast are counted in rotations over the original context.
    """
    half = args.qk_rope_head_dim // 2
    freqs = args.rope_theta ** (-torch.arange(half, dtype=torch.float32, device="cpu") / max(half, 1))
    if not args.use_yarn or not half:
        return freqs

    def index_of(rotations: float) -> float:
        """The (fractional) index of the frequency that turns `rotations` times over the original context."""
        return half * math.log(args.original_seq_len / (rotations * 2 * math.pi)) / math.log(args.rope_theta)

    low = max(math.floor(index_of(args.beta_fast)), 0)
    high = min(math.ceil(index_of(args.beta_slow)), args.qk_rope_head_dim - 1)
    width = high - low or 0.001  # negative where the clamps above cross, which DeepSeek's code lets pass
    ramp = ((torch.arange(half, dtype=torch.float32, device="cpu") - low) / width).clamp(0, 1)
    return freqs / args.rope_factor * ramp + freqs * (1 - ramp)


def apply_rotary_emb(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the last R numbers of x (B, S, H, d), pairs (x0, x1), (x2, x3), ..., by angles (B or none, S, 1, R/2).

    The result has the pairs' first numbers in front and the second ones behind. Queries and keys are laid out alike, so
    their products are the same, and putting the pairs back together would cost a pass over memory.
    """
    if cos.ndim == 3 and (kernel := fp8_ops.kernels(x)):
        return kernel.rope(x, cos, sin)
    nope, pe = x.split([x.shape[-1] - 2 * cos.shape[-1], 2 * cos.shape[-1]], dim=-1)
    even, odd = pe[..., 0::2].float(), pe[..., 1::2].float()  # in float32: bfloat16 has 8 bits for the angle
    pe = torch.cat([even * cos - odd * sin, odd * cos + even * sin], dim=-1).to(x.dtype)
    return torch.cat([nope, pe], dim=-1) if nope.shape[-1] else pe


class IndexVectors(NamedTuple):
    """What an indexer computes of each position."""

    q: torch.Tensor  # (B, S, h, d), h `index_n_heads`, d `index_head_dim`
    k: torch.Tensor  # (B, S, d), or all that are cached (B, T or more, d)
    weights: torch.Tensor  # of the heads, float32 (B, S, h)


class Indexer(nn.Module):
    """The lightning indexer (V3.2 report, equation 1): the positions whose latents a query attends to.

    A position's score is `sum_h w_h relu(q_h·k)`, with one key for all heads; it chooses the best `index_topk`.
    """

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.n_heads = args.index_n_heads
        self.topk = args.index_topk
        self.wq_b = Linear(args, args.q_lora_rank, args.index_n_heads * args.index_head_dim)
        self.wk = Linear(args, args.dim, args.index_head_dim)
        self.k_norm = nn.LayerNorm(args.index_head_dim, LATENT_NORM_EPS)
        self.weights_proj = Linear(args, args.dim, args.index_n_heads, high_precision=True)
        self.weight_scale = (args.index_n_heads * args.index_head_dim) ** -0.5
        self.sum_over_ranks: Callable[[torch.Tensor], torch.Tensor] = lambda x: x  # where processes divide the heads

    def forward(self, x: Activation, latent: Activation, angles: tuple[torch.Tensor, torch.Tensor]) -> IndexVectors:
        """From a block's normed state and the query's latent; gradients end here."""
        x, latent = (fp8_ops.replace_values(t, torch.Tensor.detach) for t in (x, latent))
        q, k = self.wq_b(latent).unflatten(-1, (self.n_heads, -1)), self.wk(x)
        norm = self.k_norm.weight.float(), self.k_norm.bias.float()
        k = F.layer_norm(k.float(), norm[0].shape, *norm, self.k_norm.eps).to(k.dtype)
        weights = self.weights_proj(fp8_ops.values_of(x).float()) * self.weight_scale
        return IndexVectors(rotate_halves(q, *angles), rotate_halves(k.unsqueeze(2), *angles).squeeze(2), weights)

    @torch.no_grad()
    def choose(self, index: IndexVectors, n_keys: int, seen: torch.Tensor) -> torch.Tensor:
        """The positions with the best scores for each query, int32 (B, S, K).

        The first `n_keys` of `index.k` are filled, and the last position that a query may attend to is `seen` (B or 1,
        S): one that sees fewer than K gets all of them, and some after it.
        """
        (bsz, seqlen), chosen = index.q.shape[:2], []
        for part in query_chunks(seqlen, bsz * self.n_heads * n_keys):
            end = max(self.topk, n_keys - (seqlen - part.stop))  # no query of the chunk sees more
            scores = index_scores(index.q[:, part], index.k[:, :end], index.weights[:, part])
            keys = torch.arange(end, device=seen.device)
            scores += keys * 1e-30  # of several that no head looks for, with a score of 0, the last ones
            hidden = keys > seen[:, part, None]
            chosen.append(scores.masked_fill(hidden, float("-inf")).topk(self.topk, sorted=False).indices.int())
        return torch.cat(chosen, dim=1)

    def divergence(self, attention: torch.Tensor, scores: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """The loss (V3.2 report, equations 3 and 4), summed over queries: KL(attention ‖ softmax of the scores).

        From probabilities of some positions, summed over heads, and their scores, (B, S, T); `hidden` ones have none.
        """
        attention = self.sum_over_ranks(attention.detach())
        target = attention / attention.sum(dim=-1, keepdim=True)
        return F.kl_div(scores.masked_fill(hidden, -1e30).log_softmax(dim=-1), target, reduction="sum")


def index_scores(q: torch.Tensor, k: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Scores of keys (B, T, d), or of other ones for each query (B, S, T, d): float32 (B, S, T)."""
    q, k = q.float(), k.float()  # a rounding error could choose another position
    products = (q.flatten(1, 2) @ k.mT).unflatten(1, q.shape[1:3]) if k.ndim == 3 else q @ k.mT  # (B, S, h, T)
    return (weights.unsqueeze(-2) @ F.relu(products)).squeeze(-2)


def rotate_halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the first R numbers of x (B, S, h, d), pairs (x0, x_{R/2}), (x1, x_{R/2+1}), ..., in an indexer."""
    half = cos.shape[-1]
    a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    a, b = a.float(), b.float()
    return torch.cat([(a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype), rest], dim=-1)


def query_chunks(length: int, numbers: int) -> list[slice]:
    """Divides queries into chunks, equal but for the last, for whose tensors of `numbers` for each there is room."""
    size = -(-length // min(-(-length * numbers // CHUNK_NUMBERS), length))  # divided by the number of chunks
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def gather_rows(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows (B, S, K) of x (B, T, d): (B, S, K, d)."""
    first = torch.arange(len(x), device=x.device, dtype=rows.dtype) * x.shape[1]
    return F.embedding(rows + first[:, None, None], x.flatten(0, 1))  # whose gradient no order of additions changes


def recomputed(function: Callable[..., Any], *inputs: Any) -> Any:
    """Calls a function of which the backward pass keeps the inputs alone, and computes it again."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


class MLA(nn.Module):
    """Multi-head latent attention (DeepSeek-V2 report, equations 9 to 19); plain attention where the ranks are 0.

    With an indexer, calls that write to a cache or attend to chosen positions are absorbed under both implementations.
    """

    def __init__(self, layer_id: int, args: ModelArgs):
        super().__init__()
        self.layer_id = layer_id
        self.n_heads = args.n_heads
        self.q_lora_rank = args.q_lora_rank
        self.kv_lora_rank = args.kv_lora_rank
        self.qk_nope_head_dim = args.qk_nope_head_dim
        self.qk_rope_head_dim = args.qk_rope_head_dim
        self.qk_head_dim = args.qk_nope_head_dim + args.qk_rope_head_dim
        self.v_head_dim = args.v_head_dim
        if args.q_lora_rank == 0:
            self.wq = Linear(args, args.dim, args.n_heads * self.qk_head_dim)
        else:
            self.wq_a = Linear(args, args.dim, args.q_lora_rank)
            self.q_norm = RMSNorm(args.q_lora_rank, LATENT_NORM_EPS, "fp8", args.scale_fmt)
            self.wq_b = Linear(args, args.q_lora_rank, args.n_heads * self.qk_head_dim)
        if args.kv_lora_rank == 0:
            self.wk = Linear(args, args.dim, args.n_heads * self.qk_head_dim)
            self.wv = Linear(args, args.dim, args.n_heads * args.v_head_dim)
        else:
            self.wkv_a = Linear(args, args.dim, args.kv_lora_rank + args.qk_rope_head_dim)
            self.kv_norm = RMSNorm(args.kv_lora_rank, LATENT_NORM_EPS, "mixed", args.scale_fmt)
            self.wkv_b = Linear(args, args.kv_lora_rank, args.n_heads * (args.qk_nope_head_dim + args.v_head_dim))
        self.wo = Linear(args, args.n_heads * args.v_head_dim, args.dim)
        self.indexer = Indexer(args) if args.index_topk else None
        self.softmax_scale = self.qk_head_dim**-0.5
        if args.use_yarn:
            mscale = 0.1 * args.mscale * math.log(args.rope_factor) + 1.0
            self.softmax_scale *= mscale * mscale

    def forward(
        self, x: Activation, positions: Positions, cache: KVCache | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """From the normed state to what is added to it, (B, S, dim); and the indexer's loss where it learns."""
        angles = positions.cos, positions.sin
        wq = self.wq_a if self.q_lora_rank else self.wq  # in one `project` with the others: they read the same x
        q, *kv = project(x, wq, *((self.wkv_a,) if self.kv_lora_rank else (self.wk, self.wv)))
        q = self.q_norm(q) if self.q_lora_rank else q
        index = None if self.indexer is None else self.indexer(x, q, angles)
        q = (self.wq_b(q) if self.q_lora_rank else q).unflatten(-1, (self.n_heads, self.qk_head_dim))
        q = apply_rotary_emb(q, *angles)  # (B, S, H, d)
        if self.kv_lora_rank == 0:  # ordinary multi-head attention
            k, v = (t.unflatten(-1, (self.n_heads, -1)) for t in kv)  # (B, S, H, d), (B, S, H, v_head_dim)
            return self.wo(self._attend(q, apply_rotary_emb(k, *angles), v, positions, cache).flatten(2)), None
        latent, k_pe = kv[0].split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        latent = self.kv_norm(latent)  # (B, S, C)
        learns = index is not None and cache is None and self.training and torch.is_grad_enabled()
        is_dense = index is None or q.shape[1] <= self.indexer.topk or (learns and positions.dense)
        if cache is not None and index is not None or not is_dense or (attn_impl == "absorb" and not learns):
            k_pe = apply_rotary_emb(k_pe.unsqueeze(2), *angles).squeeze(2)  # (B, S, R), for all heads
            latent = torch.cat([fp8_ops.values_of(latent), k_pe], dim=-1)  # (B, S, C + R): this is what is cached
            out, loss = self._attend_absorbed(q, latent, index, positions, cache, learns)
            return self.wo(out.flatten(2)), loss
        kv = self.wkv_b(latent).unflatten(-1, (self.n_heads, -1))  # (B, S, H, qk_nope_head_dim + v_head_dim)
        if positions.cos.ndim == 3 and (kernel := fp8_ops.kernels(kv)):
            k, v = kernel.keys_and_values(kv, k_pe, *angles, self.qk_nope_head_dim)
        else:
            k, v = self._keys_and_values(kv, apply_rotary_emb(k_pe.unsqueeze(2), *angles))
        out = self.wo(self._attend(q, k, v, positions, cache).flatten(2))
        return out, self._index_loss(q.detach(), k.detach(), index) if learns else None

    def _keys_and_values(self, kv: torch.Tensor, k_pe: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Each head's keys (B, S, H, d) and values, from `wkv_b`'s output by heads and the rotated key (B, S, 1, R)."""
        k_nope, v = kv.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        return torch.cat([k_nope, k_pe.expand(-1, -1, self.n_heads, -1)], dim=-1), v

    def _attend_absorbed(
        self, q: torch.Tensor, latent: torch.Tensor, index: IndexVectors | None, positions: Positions,
        cache: KVCache | None, learns: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        """Attends through the latents, one key of C + R for all heads. Returns (B, S, H, v_head_dim), and the loss."""
        bsz, seqlen, dtype, loss = *latent.shape[:2], q.dtype, None
        stored = [latent] if index is None else [latent, index.k]
        if cache is not None:
            latent = cache.update(self.layer_id, positions.index, *stored)[0]  # (B, T, C + R)
            stored = cache.layers[self.layer_id]
        n_keys, wkv_b = latent.shape[1], self.wkv_b.dense_weight(dtype).to(dtype)
        is_dense = index is None or n_keys <= self.indexer.topk
        # Each head multiplies `wider` more numbers for a query and a position than with expanded keys and values, which
        # cost C·(qk_nope_head_dim + v_head_dim) a position: from some number of queries on, expanding costs less.
        wider = 2 * self.kv_lora_rank - self.qk_nope_head_dim - self.v_head_dim
        if is_dense and seqlen * wider > self.kv_lora_rank * (self.qk_nope_head_dim + self.v_head_dim):
            kv, k_pe = latent.to(dtype).split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
            k, v = self._keys_and_values(F.linear(kv, wkv_b).unflatten(-1, (self.n_heads, -1)), k_pe.unsqueeze(2))
            return self._attend(q, k, v, positions, None), None
        w_k, w_v = wkv_b.view(self.n_heads, -1, self.kv_lora_rank).split([self.qk_nope_head_dim, self.v_head_dim], 1)
        q_nope, q_pe = q.flatten(0, 1).split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        q = torch.bmm(q_nope.transpose(0, 1), w_k).transpose(0, 1)  # W_kᵀ q: (B·S, H, C)
        q = torch.cat([q, q_pe], dim=-1).unflatten(0, (bsz, seqlen)) * self.softmax_scale  # (B, S, H, C + R)
        if is_dense:
            out = self._attend_to_latents(q, latent.to(dtype), positions.mask)
        else:
            out, loss = self._attend_to_chosen(q, stored[0], index._replace(k=stored[1]), n_keys, positions, learns)
        out = torch.bmm(out.reshape(bsz * seqlen, self.n_heads, -1).transpose(0, 1), w_v.mT)  # (H, B·S, v_head_dim)
        return out.transpose(0, 1).unflatten(0, (bsz, seqlen)), loss

    def _attend_to_latents(self, q: torch.Tensor, latent: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Attends to all latents (B, T, C + R) by absorbed queries (B, S, H, C + R): (B, S·H, C)."""
        seqlen = q.shape[1]
        scores = torch.bmm(q.flatten(1, 2), latent.mT)  # (B, S·H, T): no copy of the cache, and no cast
        if mask is not None or seqlen > 1:
            mask = torch.ones(1, 1, seqlen, seqlen, dtype=torch.bool, device=q.device).tril() if mask is None else mask
            scores = scores.unflatten(1, (seqlen, -1)).masked_fill(~mask.transpose(1, 2), float("-inf")).flatten(1, 2)
        return torch.bmm(scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype), latent[..., : self.kv_lora_rank])

    def _attend_to_chosen(
        self, q: torch.Tensor, latent: torch.Tensor, index: IndexVectors, n_keys: int, positions: Positions,
        learns: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        """Attends to the latents that the indexer chooses of the first `n_keys`: (B, S, H, C), and the indexer's loss.

        So the work for a query, and the gradients, are those of `index_topk` positions however long the context is.
        """
        bsz, seqlen, dtype, seen = *q.shape[:2], q.dtype, positions.of_queries()
        if kernel := fp8_ops.sparse_kernels(q):
            return kernel.attend_to_chosen(q, latent, index, n_keys, seen, self.indexer, self.kv_lora_rank, learns)
        chosen = self.indexer.choose(index, n_keys, seen)  # (B, S, K)

        def attend(q: torch.Tensor, latent: torch.Tensor, rows: torch.Tensor, hidden: torch.Tensor, *index: Any) -> Any:
            keys = gather_rows(latent, rows).to(dtype)  # (B, s, K, C + R), s queries of the chunk
            scores = (q @ keys.mT).masked_fill(hidden.unsqueeze(2), float("-inf"))  # (B, s, H, K)
            p = scores.softmax(dim=-1, dtype=torch.float32)
            out = p.to(dtype) @ keys[..., : self.kv_lora_rank]
            if not learns:
                return out, None
            index_q, index_k, weights = index
            index_p = index_scores(index_q, gather_rows(index_k, rows), weights)
            return out, self.indexer.divergence(p.sum(dim=2), index_p, hidden)

        if torch.is_grad_enabled():  # the gradients of many queries for one position are summed in float32
            latent, index = latent.float(), index._replace(k=index.k.float())
        parts = []
        for part in query_chunks(seqlen, bsz * chosen.shape[-1] * latent.shape[-1]):
            rows, chunk = chosen[:, part], (index.q[:, part], index.k, index.weights[:, part])
            parts.append(recomputed(attend, q[:, part], latent, rows, rows > seen[:, part, None], *chunk))
        out = torch.cat([out for out, _ in parts], dim=1)
        return out, torch.stack([loss for _, loss in parts]).sum() / (bsz * seqlen) if learns else None

    def _index_loss(self, q: torch.Tensor, k: torch.Tensor, index: IndexVectors) -> torch.Tensor:
        """The indexer's loss where attention is dense, of queries `q` and keys `k` (B, S, H, d)."""
        bsz, seqlen, heads, _ = q.shape
        if kernel := fp8_ops.sparse_kernels(q, widest=256):
            return kernel.dense_index_loss(q, k, index, self.softmax_scale, self.indexer.sum_over_ranks)

        def diverge(q: torch.Tensor, k: torch.Tensor, *index: torch.Tensor) -> torch.Tensor:
            n_queries, n_keys = q.shape[1], k.shape[1]
            hidden = torch.ones(n_queries, n_keys, dtype=torch.bool, device=q.device).triu(n_keys - n_queries + 1)
            scores = torch.matmul(q.transpose(1, 2) * self.softmax_scale, k.permute(0, 2, 3, 1))  # (B, H, s, T)
            p = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1, dtype=torch.float32)
            return self.indexer.divergence(p.sum(dim=1), index_scores(*index), hidden)

        losses = []
        for part in query_chunks(seqlen, bsz * max(heads, self.indexer.n_heads) * seqlen):
            chunk = index.q[:, part], index.k[:, : part.stop], index.weights[:, part]
            losses.append(recomputed(diverge, q[:, part], k[:, : part.stop], *chunk))
        return torch.stack(losses).sum() / (bsz * seqlen)

    def _attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: Positions, cache: KVCache | None
    ) -> torch.Tensor:
        """Softmax attention of `q` (B, S, H, d) over `k` and `v` (B, T, H, ...), and over what `cache` holds."""
        if cache is not None:
            k, v = (t.to(q.dtype) for t in cache.update(self.layer_id, positions.index, k, v))
        return fp8_ops.attention(q, k, v, positions.mask, self.softmax_scale)


class MLP(nn.Module):
    """The gated feed-forward layer: `w2(act(w1 x) * w3 x)`."""

    def __init__(self, args: ModelArgs, inter_dim: int, stack: int | None = None):
        super().__init__()
        self.w1 = Linear(args, args.dim, inter_dim, stack)
        self.w2 = Linear(args, inter_dim, args.dim, stack)
        self.w3 = Linear(args, args.dim, inter_dim, stack)
        self.hidden_act = args.hidden_act
        self.act = ACTIVATIONS[args.hidden_act]

    def forward(
        self, x: Activation, offsets: torch.Tensor | None = None, is_here: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(..., dim) to the same; of stacks, `offsets` is `project`'s, `is_here` (N, 1) False in rows after those."""
        if fp8_ops.fuses_fp8(x):
            layers = self.w1, self.w2, self.w3
            weights, quantized = [layer.weight for layer in layers], [layer.quantized() for layer in layers]
            return fp8_ops.fp8_mlp(x, weights, quantized, self.hidden_act, offsets, self.w1.scale_fmt)
        if (kernel := fp8_ops.kernels(x)) and fp8_ops.gemm_impl != "fp8":
            gate_up = project_joined(x, self.w1, self.w3, offsets=offsets)  # (N, 2·inter_dim)
            gate_up = gate_up if is_here is None else gate_up.where(is_here, 0)
            return self.w2(kernel.glu(gate_up, self.hidden_act), offsets)
        gate, up = project(x, self.w1, self.w3, offsets=offsets)
        if is_here is not None:
            gate, up = gate.where(is_here, 0), up.where(is_here, 0)
        return self.w2(self.act(gate) * up, offsets)


class Gate(nn.Module):
    """The router: which experts a position visits, and with what weight (V3 report, equations 12 to 16)."""

    bias: torch.Tensor | None

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.topk = args.n_activated_experts
        self.n_groups = args.n_expert_groups
        self.topk_groups = args.n_limited_groups
        self.score_func = args.score_func
        self.route_scale = args.route_scale
        self.weight = nn.Parameter(torch.empty(args.n_routed_experts, args.dim))
        self.register_buffer("bias", torch.zeros(args.n_routed_experts) if args.gate_bias else None)

    def forward(self, x: torch.Tensor, logits: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """From x (N, dim) or its logits: weights float32 (N, K), experts int64 (N, K), all scores float32 (N, E)."""
        logits = fp8_ops.router_logits(x, self.weight)[1] if logits is None else logits
        scores = logits.softmax(dim=-1) if self.score_func == "softmax" else logits.sigmoid()
        if kernel := fp8_ops.kernels(scores):
            indices = kernel.route(scores.detach(), self.bias, self.n_groups, self.topk_groups, self.topk)
        else:
            indices = self.route(scores.detach())
        weights = scores.gather(1, indices)  # without the bias, which only chooses
        if self.score_func == "sigmoid":
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return weights * self.route_scale, indices, scores

    def route(self, scores: torch.Tensor) -> torch.Tensor:
        """The experts (N, K) with the highest scores (N, E) plus bias, out of the best groups."""
        choice = scores if self.bias is None else scores + self.bias
        if self.n_groups > 1:
            choice = choice.view(-1, self.n_groups, choice.shape[-1] // self.n_groups)
            # DeepSeek-V2 ranks a group by its best expert, V3, which has the bias, by its best two
            rank = choice.amax(dim=-1) if self.bias is None else choice.topk(2, dim=-1).values.sum(dim=-1)
            best = rank.topk(self.topk_groups, dim=-1).indices
            excluded = torch.ones_like(rank, dtype=torch.bool).scatter_(1, best, False)
            choice = choice.masked_fill(excluded.unsqueeze(-1), float("-inf")).flatten(1)
        return choice.topk(self.topk, dim=-1).indices

    def extra_repr(self) -> str:
        n, dim = self.weight.shape
        return f"{dim} -> {self.topk} of {n}, from {self.topk_groups} of {self.n_groups} groups"


class Experts(MLP):
    """The routed experts: one MLP whose weights are stacks, so that each step of it is one grouped product."""

    def __init__(self, args: ModelArgs):
        super().__init__(args, args.moe_inter_dim, stack=args.n_routed_experts)
        self.n_experts = args.n_routed_experts
        self.first_expert = 0  # number of the first one in this process, where processes divide them

    def forward(  # type: ignore[override]
        self, rows: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor, x: Activation, shared: MLP | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sends each row of x through its experts: rows are sorted by expert once, so an idle expert costs nothing.

        The weights of the choices are float32 (N, K). Returns the weighted sums (N, dim), over the experts of this
        process, plus the output of the `shared` ones, and the load of all experts, float32 (E,).
        """
        here = len(self.w1.weight)
        choices = (indices - self.first_expert) % self.n_experts  # this process's experts come first
        # (N·K, dim), where each choice stands there (N, K), and where each expert's rows end (E,)
        sent, places, ends, rows = fp8_ops.sort_by_expert(rows, choices, self.n_experts, here, self.w1.scale_fmt)
        offsets, is_here = ends[:here], None
        if here < self.n_experts:  # the others' rows come last: a grouped product leaves them undefined
            is_here = (torch.arange(places.numel(), device=rows.device) < offsets[-1]).unsqueeze(1)
        h = super().forward(sent, offsets, is_here)
        h = h if is_here is None else h.where(is_here, 0)
        base = None if shared is None else shared(fp8_ops.replace_values(x, rows.view_as)).flatten(0, 1)
        load = ends.diff(prepend=ends.new_zeros(1)).roll(self.first_expert).float()
        return fp8_ops.combine(h, places, weights, base), load


class MoE(nn.Module):
    """Mixture of experts: routed experts by choice, shared ones for all."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.aux_loss_alpha = args.aux_loss_alpha
        self.gate = Gate(args)
        self.experts = Experts(args)
        shared_dim = args.n_shared_experts * args.moe_inter_dim
        self.shared_experts = MLP(args, shared_dim) if shared_dim else None

    def forward(self, x: Activation) -> tuple[torch.Tensor, Routing]:
        rows, logits = fp8_ops.router_logits((values := fp8_ops.values_of(x)).flatten(0, 1), self.gate.weight)
        weights, indices, scores = self.gate(rows, logits)
        y, load = self.experts(rows, weights, indices, x, self.shared_experts)
        balance_loss = scores.new_zeros(())
        if self.training and self.aux_loss_alpha > 0:
            balance_loss = self.aux_loss_alpha * sequence_balance_loss(scores, indices, values.shape[0])
        return y.view_as(values), Routing(load, balance_loss)


def sequence_balance_loss(scores: torch.Tensor, indices: torch.Tensor, batch_size: int) -> torch.Tensor:
    """The complementary sequence-wise balance loss (V3 report, equations 17 to 20), before its weight alpha.

    From all scores (B·S, E) and the chosen (B·S, K): the mean over sequences of `sum_i f_i P_i`, 1 at perfect balance.
    """
    n_experts, k = scores.shape[1], indices.shape[1]
    chosen = torch.zeros_like(scores).scatter_(1, indices, 1.0)
    fraction = chosen.unflatten(0, (batch_size, -1)).mean(dim=1) * (n_experts / k)  # f: (B, E)
    probability = (scores / scores.sum(dim=-1, keepdim=True)).unflatten(0, (batch_size, -1)).mean(dim=1)  # P: (B, E)
    return (fraction * probability).sum(dim=-1).mean()


class Block(nn.Module):
    """One transformer block: attention, then a dense MLP or a mixture of experts, each behind a norm."""

    def __init__(self, layer_id: int, args: ModelArgs):
        super().__init__()
        self.attn = MLA(layer_id, args)
        self.ffn = MoE(args) if args.is_moe(layer_id) else MLP(args, args.inter_dim)
        self.attn_norm = RMSNorm(args.dim, args.norm_eps, "mixed" if args.index_topk else "fp8", args.scale_fmt)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps, "mixed" if args.is_moe(layer_id) else "fp8", args.scale_fmt)

    def forward(
        self, x: torch.Tensor, positions: Positions, cache: KVCache | None
    ) -> tuple[torch.Tensor, Routing | None]:
        x, h = self.attn_norm.add(x)  # the same x, but its gradient and that of its norm are summed in one kernel
        h, index_loss = self.attn(h, positions, cache)
        x, h = self.ffn_norm.add(x, h)  # x + attention, and its norm
        y, routing = self.ffn(h) if isinstance(self.ffn, MoE) else (self.ffn(h), None)
        if index_loss is not None:
            routing = (routing or Routing())._replace(index_loss=index_loss)
        return x + y, routing


class MTPModule(nn.Module):
    """One multi-token prediction module (V3 report, equations 21 to 23); embedding and head are the main model's."""

    def __init__(self, layer_id: int, args: ModelArgs):
        super().__init__()
        self.enorm = RMSNorm(args.dim, args.norm_eps)
        self.hnorm = RMSNorm(args.dim, args.norm_eps)
        self.eh_proj = Linear(args, 2 * args.dim, args.dim, high_precision=True)
        self.block = Block(layer_id, args)
        self.norm = RMSNorm(args.dim, args.norm_eps)

    def forward(
        self, h: torch.Tensor, embedded: torch.Tensor, positions: Positions, cache: KVCache | None
    ) -> tuple[torch.Tensor, Routing | None]:
        """Returns states for the head and the next module from `h`, of the model or the module before, (B, S, dim).

        `embedded` are embeddings of the byte after the last one that `h` depends on.
        """
        x = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(h)], dim=-1))
        x, routing = self.block(x, positions, cache)
        return self.norm(x), routing


def draw_weight(name: str, index: int, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Draws an initial parameter from a generator of its own: the same for every layout and device.

    Matrices are normal with standard deviation 1/sqrt(fan-in), so that activations keep their scale. Those that write
    into the residual stream, and the head, start at zero: each block begins as the identity and each byte as equally
    likely. Norms start at one, the bias of an indexer's at zero. `name`, `index` and `shape` are those in the full
    model. Returns float32 on the CPU.
    """
    if len(shape) == 1:
        return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    if name.endswith(("wo.weight", "w2.weight", "head.weight")):
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
    std = EMBEDDING_STD if name == "embed.weight" else shape[-1] ** -0.5
    return torch.randn(shape, generator=generator, device="cpu") * std


class Transformer(nn.Module):
    """The full model.

    Weights keep the dtype they were created or loaded in; `compute_dtype` is that of the activations, and every product
    casts its weight to it. So float32 masters train in bfloat16, and weights stored in bfloat16 are used as they are.
    With `fp8_weights` there is room for weights stored in FP8 and their scales, as an FP8 checkpoint has them. Without
    `init`, and on the meta device, weights are undefined: to be loaded; else `init_weights` draws them.
    """

    def __init__(
        self, args: ModelArgs, compute_dtype: torch.dtype = torch.float32, fp8_weights: bool = False, init: bool = True
    ):
        super().__init__()
        self.args, self.compute_dtype = args, compute_dtype
        self.cache_dtype: torch.dtype | None = None  # of KV caches; None: `compute_dtype`
        self.gradient_checkpointing = False  # whether the backward pass computes each block again, which saves memory
        self.decoder: Any = None  # a faster path for calls of few positions under its `attn_impls`: see decode.py
        self.dense_attention = False  # in training, whatever `index_topk` is: indexers learn from all positions
        self.indexer_only = False  # whether their loss alone has gradients
        self.absorbs = False  # in decoding, once `decode.attach` has found that it does not change the model
        weight = torch.empty(args.vocab_size, args.dim)  # an Embedding would draw its own
        self.embed = nn.Embedding(args.vocab_size, args.dim, _weight=weight)
        self.layers: Any = nn.ModuleList(Block(i, args) for i in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.head = Linear(args, args.dim, args.vocab_size, high_precision=True)
        self.mtp = nn.ModuleList(MTPModule(args.n_layers + k, args) for k in range(args.n_mtp_layers))
        self._rope_cos: torch.Tensor = nn.Buffer(torch.empty(0, 1, args.qk_rope_head_dim // 2), persistent=False)
        self._rope_sin: torch.Tensor = nn.Buffer(self._rope_cos.clone(), persistent=False)  # grown by `rope_tables`
        if fp8_weights:
            for layer in self.fp8_layers():
                layer.store_fp8()
        elif init and self.head.weight.device.type != "meta":
            self.init_weights()

    def init_weights(self, seed: int = 0) -> None:
        """Draws the initial weights, each by `draw_weight`."""
        with torch.no_grad():
            for i, (name, p) in enumerate(self.named_parameters()):
                p.copy_(draw_weight(name, i, p.shape, seed))
        for gate in self.gates():
            if gate.bias is not None:
                gate.bias.zero_()

    def rope_tables(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of the rotary angles of the first `length` positions, or of more: float32 (·, 1, R/2)."""
        if len(self._rope_cos) < length:
            longer = max(length, 1024, 3 * len(self._rope_cos) // 2)  # so that decoding seldom computes them anew
            with torch.inference_mode(False):  # training uses the tables that an evaluation has computed
                positions = torch.arange(min(longer, max(length, self.args.max_seq_len)), device="cpu").float()
                angles = torch.outer(positions, rope_frequencies(self.args)).unsqueeze(1)
                self._rope_cos, self._rope_sin = (t.to(self._rope_cos.device) for t in (angles.cos(), angles.sin()))
        return self._rope_cos, self._rope_sin

    def fp8_layers(self) -> list[Linear]:
        """The layers that multiply in FP8 if `fp8_ops.gemm_impl` is "fp8"."""
        return [m for m in self.modules() if isinstance(m, Linear) and not m.high_precision]

    def quantize_weights(self) -> None:
        """Quantises the weights for FP8 products, which otherwise do it at each use: to be called once a step."""
        for layer in self.fp8_layers():
            layer.quantize()

    def gates(self) -> list[Gate]:
        """The routers, in the order of the layers, MTP modules last: the rows of `Losses.load`."""
        return [m for m in self.modules() if isinstance(m, Gate)]

    def is_unsharded(self) -> bool:
        """Whether all heads are in this process."""
        return self.layers[0].attn.n_heads == self.args.n_heads

    def n_params(self) -> tuple[int, int]:
        """Numbers of parameters: all, and those that one position goes through (of routed experts, its own alone)."""
        total = sum(p.numel() for p in self.parameters())
        routed = sum(p.numel() for m in self.modules() if isinstance(m, Experts) for p in m.parameters())
        active = self.args.n_activated_experts / self.args.n_routed_experts if routed else 0
        return total, round(total - routed * (1 - active))

    def flops_per_position(self, seq_len: int) -> int:
        """Floating-point operations of a training step for one position, forward and backward.

        Six for each weight that it meets, as in PaLM's report (appendix B), and attention to half of the sequence, the
        mean under a causal mask, where that report counts all of it; or to the positions that an indexer chooses.
        Recomputation is not counted.
        """
        args, heads = self.args, 1 + len(self.mtp)  # each MTP module goes through the head as well
        weights = self.n_params()[1] - self.embed.weight.numel() + (heads - 1) * self.head.weight.numel()
        widths = args.n_heads * (args.qk_nope_head_dim + args.qk_rope_head_dim + args.v_head_dim)
        attention = 6 * widths * seq_len // 2
        if 0 < args.index_topk < seq_len:
            indexer = args.index_n_heads * args.index_head_dim  # scores all, without a gradient, and learns from some
            widths = args.n_heads * (2 * args.kv_lora_rank + args.qk_rope_head_dim) + indexer
            chosen = args.index_topk - args.index_topk**2 / (2 * seq_len)  # the mean number
            attention = round(6 * widths * chosen) + 2 * indexer * seq_len // 2
        return 6 * weights + (args.n_layers + len(self.mtp)) * attention

    def new_cache(self, batch_size: int, capacity: int, spare: int = 0) -> KVCache:
        """Returns an empty cache of `capacity` positions for `batch_size` sequences, under the current `attn_impl`."""
        n_heads, device = self.layers[0].attn.n_heads, self.head.weight.device
        return KVCache(self.args, batch_size, capacity, n_heads, self.cache_dtype or self.compute_dtype, device, spare)

    def forward(self, tokens: torch.Tensor | bytes, cache: KVCache | None = None) -> torch.Tensor:
        """Computes the logits of the next token at every position, float32 (B, S, vocab_size).

        `tokens` are integers (B, S); or of one sequence, (S,) or bytes: then the logits are (S, vocab_size). They are
        appended to `cache`, whose `lengths` advance by S; for rows whose last tokens were padding, the caller lowers
        them again. Raises a ValueError for other shapes, or more positions than the context or the cache has.
        """
        if isinstance(tokens, (bytes, bytearray)):
            tokens = torch.tensor(list(tokens), dtype=torch.int64, device=self.head.weight.device)
        shape, dtype = getattr(tokens, "shape", ()), getattr(tokens, "dtype", type(tokens).__name__)
        if dtype not in (torch.uint8, torch.int32, torch.int64) or len(shape) not in (1, 2) or list(shape) == [0]:
            given = f"{dtype} {list(shape)}"
            raise ValueError(f"tokens must be bytes, or integers (batch, sequence) or (sequence,), got {given}")
        if tokens.ndim == 1:
            return self.forward(tokens.unsqueeze(0), cache).squeeze(0)
        _, logits = self.forward_with_hidden(tokens.long(), cache)
        if cache is not None:
            cache.lengths = [length + tokens.shape[1] for length in cache.lengths]
        return logits

    def forward_with_hidden(
        self, tokens: torch.Tensor, cache: KVCache | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """States (B, S, dim) and `forward`'s logits; `cache.lengths` stays, so that `mtp_forward` can follow."""
        if self._decodes(tokens, cache):
            return self.decoder.forward_with_hidden(tokens, cache)
        h, _ = self.forward_hidden(tokens, cache)
        return h, self.head(h).float()

    def forward_hidden(self, tokens: torch.Tensor, cache: KVCache | None = None) -> tuple[torch.Tensor, list[Routing]]:
        """Runs the main layers: the states (B, S, dim) after the last norm, and the statistics of each MoE layer."""
        positions = self.positions(tokens.shape[1], cache)
        h, routings = self.embed(tokens).to(self.compute_dtype), []
        for layer in self.layers:
            h, routing = self._run(layer, h, positions, cache)
            if routing is not None:
                routings.append(routing)
        return self.norm(h), routings

    def mtp_forward(
        self, depth: int, h: torch.Tensor, tokens: torch.Tensor, cache: KVCache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs MTP module `depth` (from 0) at the positions after `cache.lengths`.

        `h` are states of `forward_with_hidden` or of an earlier call, (B, S, dim), `tokens` the bytes after them, int64
        (B, S). Returns the module's states and the logits of the byte after each of `tokens`, float32.
        """
        if self._decodes(tokens, cache):
            return self.decoder.mtp_forward(depth, h, tokens, cache)
        positions = self.positions(tokens.shape[1], cache)
        h, _ = self.mtp[depth](h, self.embed(tokens).to(h.dtype), positions, cache)
        return h, self.head(h).float()

    def _decodes(self, tokens: torch.Tensor, cache: KVCache | None) -> bool:
        """Whether the decoder takes a call; if so, there is room for it, or a ValueError is raised."""
        if self.decoder is None or cache is None or tokens.numel() > FEW_POSITIONS or torch.is_grad_enabled():
            return False
        if fp8_ops.gemm_impl != "bf16" or attn_impl not in self.decoder.attn_impls:
            return False
        self.require_room(tokens.shape[1], cache)
        return True

    def require_room(self, seq_len: int, cache: KVCache | None) -> int:
        """Returns where the next `seq_len` tokens end in the longest row, or raises a ValueError for too many."""
        end, spare = (seq_len, 0) if cache is None else (max(cache.lengths) + seq_len, cache.spare)
        if cache is not None and end > cache.capacity:
            raise ValueError(f"the cache holds {cache.capacity} positions, {end} are needed")
        if end > self.args.max_seq_len + spare:
            raise ValueError(f"{end} positions, but the context is max_seq_len = {self.args.max_seq_len}")
        return end

    def positions(self, seq_len: int, cache: KVCache | None) -> Positions:
        """The positions of the next `seq_len` tokens: from 0 on, or after those in `cache`."""
        end = self.require_room(seq_len, cache)
        cos, sin = self.rope_tables(min(end, self.args.max_seq_len))
        if cache is None:
            return Positions(cos[:seq_len], sin[:seq_len], dense=self.dense_attention)
        index = cache.positions(seq_len, cos.device)
        mask, every = None, torch.arange(end, device=cos.device)
        if isinstance(index, torch.Tensor):
            mask = every <= index[:, None, :, None]
        elif index.start > 0 and seq_len > 1:
            mask = every <= every[None, None, index, None]
        angle = every[index].clamp(max=self.args.max_seq_len - 1) if end > self.args.max_seq_len else index
        return Positions(cos[angle], sin[angle], index, mask)

    def _run(self, layer: nn.Module, *inputs: Any) -> tuple[torch.Tensor, Routing | None]:
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
        return layer(*inputs)

    def loss(self, tokens: torch.Tensor, targets: torch.Tensor) -> Losses:
        """The training loss of tokens and the targets after them, int64 (B, S): means over all positions with a target.

        Raises a ValueError for sequences so short that an MTP module has no target.
        """
        if targets.shape[1] <= len(self.mtp):
            raise ValueError(f"{len(self.mtp)} MTP modules need longer sequences, got {targets.shape[1]}")
        h, routings = self.forward_hidden(tokens)
        next_byte = self._cross_entropy(h, targets)
        mtp = []
        for k, module in enumerate(self.mtp, 1):
            # module k joins the state at i with the byte at i+k, `targets[i+k-1]`, to predict `targets[i+k]`
            inputs, wanted = targets[:, k - 1 : -1], targets[:, k:]
            positions = self.positions(wanted.shape[1], None)
            h, routing = self._run(module, h[:, : wanted.shape[1]], self.embed(inputs).to(h.dtype), positions, None)
            if routing is not None:
                routings.append(routing)
            mtp.append(self._cross_entropy(h, wanted))
        mtp_loss = torch.stack(mtp).mean() if mtp else torch.zeros_like(next_byte)
        balances = [r.balance_loss for r in routings if r.balance_loss is not None]
        balance = torch.stack(balances).sum() if balances else torch.zeros_like(next_byte)
        loads = [r.load for r in routings if r.load is not None]
        load = torch.stack(loads) if loads else next_byte.new_zeros(0, 0)
        divergences = [r.index_loss for r in routings if r.index_loss is not None]
        index = torch.stack(divergences).sum() if divergences else torch.zeros_like(next_byte)
        total = next_byte + self.args.mtp_loss_weight * mtp_loss + balance
        total = total * 0.0 if self.indexer_only else total  # gradients of zero: every layout has as many as before
        return Losses(total + index, next_byte.detach(), mtp_loss.detach(), balance.detach(), load, index.detach())

    def next_byte_loss(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The mean cross-entropy of the next byte alone, in nats, as an evaluation measures it."""
        return self._cross_entropy(self.forward_hidden(tokens)[0], targets)

    def _cross_entropy(self, h: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.head(h).float().flatten(0, 1), targets.flatten())

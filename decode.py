"""Decoding on a CPU: the model for a few positions at a time, where weights are read once for very little arithmetic.

The mathematics is `model.py`'s, and so are the numbers, to rounding, and the cache. What differs is its layout, chosen
once for a model that does not change any more:

Weights are packed by oneDNN in the order in which its products read them, which is then nearly the speed of memory. As
    they lie in the modules, each call would first have to rearrange them, or jump from row to row. Weights of a small
    model stay as they are, since oneDNN would take longer to begin than to multiply.
Products of the same input are one: queries and the latent, gate and up projection, all routed experts.
    With few experts to read anyway, a mixture is a single wide MLP whose hidden units are weighed by their expert's
    weight, 0 for those not chosen: two products instead of three for each expert. Where most experts would be read for
    nothing, each position visits its own.
With --compile, calls of a few positions become one program without Python between the operations, whose products are
    loops over the weights, in bfloat16 if they were stored so: to compute in float32 makes the numbers no other.
Rotary pairs are laid out as halves in the weights, and what stays the same from byte to byte is computed here once.

Shapes in comments: N positions of all rows, H heads, C `kv_lora_rank`, R `qk_rope_head_dim`, K experts a position.
"""

import math
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F

import fp8_ops
import model as model_module
from model import MLP, Block, Cache, Linear, MoE, Positions, RMSNorm, Transformer, causal_mask

FEW_POSITIONS = 64  # of a call, up to which the modules are slower
COMPILED = 4  # positions of a call of a single text, up to which --compile compiles it
SMALL = 1 << 18  # multiplications of a product in float32 that are less work than to call oneDNN
LONG = 1024  # positions of a cache from which it is read faster from its own side than from the queries'

Rotary = tuple[torch.Tensor, torch.Tensor]


def attach(model: Transformer, compiles: bool = False) -> Transformer:
    """Has a model decode through a `Decoder`, if there is one for its kind: whole, with a latent, on a CPU.

    The model's weights must not change any more, or `model.decoder` be set to None before they do.

    Args:
        model: The model.
        compiles: Whether calls of one to four positions of one text go through torch.compile, which needs a C++
            compiler, and seconds before the first of each size.

    Returns:
        The same model.
    """
    args, device = model.args, model.head.weight.device
    whole = model.layers[0].attn.n_heads == args.n_heads
    model.decoder = Decoder(model, compiles) if device.type == "cpu" and args.kv_lora_rank and whole else None
    return model


class Product:
    """The product `x @ weight.T` of a fixed weight (out, in) with rows `x`.

    Args:
        weight: The weight, float32 or bfloat16.
    """

    def __init__(self, weight: torch.Tensor):
        self.weight = narrowed(weight.contiguous())
        self.plain: torch.Tensor | None = None  # in the dtype to compute in, from the first use on
        self.ordered: torch.Tensor | None = None  # and in oneDNN's order

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return torch.stack([rows_times(row, self.weight) for row in x])  # fused: all rows at one reading
        # on one thread is decoded what is small and stays in the cache
        small = torch.get_num_threads() == 1 and len(x) * self.weight.numel() <= SMALL
        if (small and x.dtype == torch.float32) or not packs(x.dtype):
            if self.plain is None:
                self.plain = self.weight.to(x.dtype)
            return F.linear(x, self.plain)
        # what torch.compile makes of a linear layer with frozen weights; torch has no public name for it
        if self.ordered is None:
            self.ordered = torch.ops.mkldnn._reorder_linear_weight(self.weight.to(x.dtype))
        return torch.ops.mkldnn._linear_pointwise(x, self.ordered, None, "none", [], "")


def narrowed(weight: torch.Tensor) -> torch.Tensor:
    """A weight in bfloat16 where that loses nothing, as it was stored so: half as much to keep, and to read."""
    narrow = weight.bfloat16()
    return narrow if torch.equal(narrow.to(weight.dtype), weight) else weight


@cache
def packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN is there and multiplies numbers of this dtype on this CPU: bfloat16 wants AVX-512 or its like."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def rows_times(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`(x * weight).sum(-1)`: compiled, one loop over the weights at the speed of memory, those gathered not copied."""
    return (x.float() * weight.float()).sum(dim=-1).to(x.dtype)


class Decoder:
    """A model's layers and its first MTP module for a few positions at a time.

    Args:
        model: The model, whole and on a CPU. Its weights are copied, in its compute dtype.
        compiles: Whether to compile the smallest calls.
    """

    @torch.no_grad()
    def __init__(self, model: Transformer, compiles: bool = False):
        dtype, self.compiles = model.compute_dtype, compiles
        self.compiled: dict[str, Callable[..., torch.Tensor]] = {}
        self.blocks = [DecoderBlock(block, dtype) for block in model.layers]
        self.norm = DecoderNorm(model.norm)
        self.embedding = model.embed.weight.to(dtype)
        if len(model.mtp):
            module = model.mtp[0]
            self.mtp_block = DecoderBlock(module.block, dtype)
            self.enorm, self.hnorm, self.mtp_norm = map(DecoderNorm, (module.enorm, module.hnorm, module.norm))
            self.eh_proj = Product(module.eh_proj.weight.to(dtype))

    @staticmethod
    def takes(tokens: torch.Tensor, cache: Cache | None) -> bool:
        """Whether a call with these tokens (B, S) and this cache is one for the decoder."""
        few = cache is not None and tokens.numel() <= FEW_POSITIONS
        return (
            few and fp8_ops.gemm_impl == "bf16" and model_module.attn_impl == "absorb" and not torch.is_grad_enabled()
        )

    def hidden(self, tokens: torch.Tensor, where: Positions, cache: Cache) -> torch.Tensor:
        """The states that `Transformer.hidden` returns, (B, S, dim)."""
        return self._call(self._layers, (tokens,), where, cache).unflatten(0, tokens.shape)

    def look_ahead(self, h: torch.Tensor, tokens: torch.Tensor, where: Positions, cache: Cache) -> torch.Tensor:
        """The states that `Transformer.look_ahead` returns, (B, S, dim)."""
        return self._call(self._mtp, (tokens, h.flatten(0, 1)), where, cache).unflatten(0, tokens.shape)

    def _layers(self, tokens: torch.Tensor, where: Positions, latents: list[torch.Tensor]) -> torch.Tensor:
        x, rotary = F.embedding(tokens.flatten(), self.embedding), self._rotary(where, len(tokens))
        for block in self.blocks:
            x = block(x, where, rotary, latents)
        return self.norm(x)

    def _mtp(
        self, tokens: torch.Tensor, h: torch.Tensor, where: Positions, latents: list[torch.Tensor]
    ) -> torch.Tensor:
        embedded = F.embedding(tokens.flatten(), self.embedding)
        x = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(h)], dim=-1))
        return self.mtp_norm(self.mtp_block(x, where, self._rotary(where, len(tokens)), latents))

    def _call(
        self, run: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...], where: Positions, cache: Cache
    ) -> torch.Tensor:
        """Runs layers as they are, or compiled: then positions are a tensor, and the whole cache is read, masked."""
        tokens = inputs[0]
        if not self.compiles or len(tokens) > 1 or tokens.shape[1] > COMPILED:
            end = max(cache.lengths) + tokens.shape[1]
            return run(*inputs, where, [layer[0][:, :end] for layer in cache.layers])
        index = torch.tensor(cache.lengths).unsqueeze(1) + torch.arange(tokens.shape[1])
        mask = torch.arange(cache.capacity) <= index[:, None, :, None]
        if run.__name__ not in self.compiled:
            self.compiled[run.__name__] = torch.compile(run)
        latents = [layer[0] for layer in cache.layers]
        return self.compiled[run.__name__](*inputs, where._replace(index=index, mask=mask), latents)

    @staticmethod
    def _rotary(where: Positions, bsz: int) -> Rotary:
        """Cosines (N, 1, 1, R/2) and sines (N, 1, 2, R/2), the first of the two with a minus."""
        cos, sin = where.cos.unsqueeze(-2), torch.stack([-where.sin, where.sin], dim=-2)
        if where.cos.ndim == 4:  # a position of its own for each row
            return cos.flatten(0, 1), sin.flatten(0, 1)
        return (cos, sin) if bsz == 1 or len(cos) == 1 else (cos.repeat(bsz, 1, 1, 1), sin.repeat(bsz, 1, 1, 1))


class DecoderNorm:
    """An RMSNorm in four operations: sqrt(mean(x²) + eps) = sqrt(|x|² + n·eps) / sqrt(n)."""

    def __init__(self, norm: RMSNorm):
        size = norm.weight.numel()
        self.weight = norm.weight.float() * math.sqrt(size)
        self.floor = torch.tensor(math.sqrt(size * norm.eps))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        norm = torch.linalg.vector_norm(x, 2, -1, True, dtype=torch.float32)
        return (x / norm.hypot_(self.floor)).mul(self.weight).to(x.dtype)


class DecoderBlock:
    """One `Block`; see `Decoder`."""

    def __init__(self, block: Block, dtype: torch.dtype):
        attn, ffn = block.attn, block.ffn
        self.layer_id, self.n_heads, self.scale = attn.layer_id, attn.n_heads, attn.softmax_scale
        self.nope, self.rope, self.latent = attn.qk_nope_head_dim, attn.qk_rope_head_dim, attn.kv_lora_rank
        self.attn_norm, self.ffn_norm = DecoderNorm(block.attn_norm), DecoderNorm(block.ffn_norm)
        self.kv_norm = DecoderNorm(attn.kv_norm)
        self.q_norm = DecoderNorm(attn.q_norm) if attn.q_lora_rank else None
        wkv_b = dense(attn.wkv_b, dtype).view(self.n_heads, -1, self.latent)
        self.w_k, self.w_v = wkv_b[:, : self.nope].contiguous(), wkv_b[:, self.nope :].mT.contiguous()
        self.wo = Product(dense(attn.wo, dtype))
        wq = [attn.wq_a, attn.wq_b] if attn.q_lora_rank else [attn.wq]
        self._join_inputs(*(dense(layer, dtype) for layer in (attn.wkv_a, *wq)))
        self.ffn = DecoderMoE(ffn, dtype) if isinstance(ffn, MoE) else DecoderMLP(ffn, dtype)

    def _join_inputs(self, wkv_a: torch.Tensor, *wq: torch.Tensor) -> None:
        """One matrix for the queries, or their latent, and the latent of keys and values, rotary parts side by side."""
        kv, k_pe = wkv_a.split([self.latent, self.rope])
        q_nope, q_pe = wq[-1].unflatten(0, (self.n_heads, -1)).split([self.nope, self.rope], dim=1)
        q = [q_nope.flatten(0, 1), torch.cat([q_pe[:, 0::2], q_pe[:, 1::2]], dim=1).flatten(0, 1)]
        k_pe = torch.cat([k_pe[0::2], k_pe[1::2]])
        self.wq_b = Product(torch.cat(q)) if self.q_norm else None
        w_in = torch.cat([wq[0], k_pe, kv] if self.q_norm else [*q, k_pe, kv])
        first = len(wq[0]) if self.q_norm else len(q[0])
        self.w_in, self.widths = Product(w_in), [first, len(w_in) - first - self.latent, self.latent]

    def __call__(self, x: torch.Tensor, where: Positions, rotary: Rotary, latents: list[torch.Tensor]) -> torch.Tensor:
        """From the residual stream (N, dim) to the residual stream; `latents` are the cache's, (B, T, C + R) each."""
        x = x + self._attend(self.attn_norm(x), where, rotary, latents[self.layer_id])
        return x + self.ffn(self.ffn_norm(x))

    def _attend(self, h: torch.Tensor, where: Positions, rotary: Rotary, latent: torch.Tensor) -> torch.Tensor:
        """`MLA.forward` in the latent space."""
        rows, heads, bsz = len(h), self.n_heads, len(latent)
        q, pe, kv = self.w_in(h).split(self.widths, dim=1)
        if self.q_norm:
            q, q_pe = self.wq_b(self.q_norm(q)).split([heads * self.nope, heads * self.rope], dim=1)
            pe = torch.cat([q_pe, pe], dim=1)
        pe = pe.unflatten(1, (heads + 1, 2, self.rope // 2))
        pe = torch.addcmul(pe * rotary[0], pe.flip(2), rotary[1]).flatten(2).to(h.dtype)
        new = torch.cat([self.kv_norm(kv), pe[:, heads]], dim=1)
        Cache.write(latent, where.index, new.unflatten(0, (bsz, -1)))
        q = torch.bmm(q.unflatten(1, (heads, self.nope)).transpose(0, 1), self.w_k).transpose(0, 1)
        q = torch.cat([q, pe[:, :heads]], dim=-1).view(bsz, -1, latent.shape[-1]) * self.scale
        # a long memory by itself: a batched product in bfloat16 would first copy all of them
        is_long = latent.shape[1] > LONG and (bsz == 1 or h.dtype == torch.bfloat16)
        if is_long:
            scores = torch.stack([torch.mm(memory, queries.t()).t() for memory, queries in zip(latent, q, strict=True)])
        else:
            scores = torch.bmm(q, latent.mT)
        if rows > bsz or where.mask is not None:
            mask = causal_mask(rows // bsz, h.device) if where.mask is None else where.mask
            scores = scores.unflatten(1, (-1, heads)).masked_fill(~mask.transpose(1, 2), float("-inf")).flatten(1, 2)
        probs, values = scores.softmax(dim=-1, dtype=torch.float32).to(h.dtype), latent[..., : self.latent]
        out = torch.stack(list(map(torch.mm, probs, values))) if is_long else torch.bmm(probs, values)
        out = torch.bmm(out.view(rows, heads, self.latent).transpose(0, 1), self.w_v)
        return self.wo(out.transpose(0, 1).flatten(1))


class DecoderMLP:
    """One `MLP`, in two products."""

    def __init__(self, mlp: MLP, dtype: torch.dtype):
        self.w13 = Product(torch.cat([dense(mlp.w1, dtype), dense(mlp.w3, dtype)]))
        self.w2, self.act = Product(dense(mlp.w2, dtype)), mlp.act

    def __call__(self, h: torch.Tensor) -> torch.Tensor:
        """From (N, dim) to (N, dim)."""
        gate, up = self.w13(h).chunk(2, dim=1)
        return self.w2(self.act(gate) * up)


class DecoderMoE:
    """One `MoE`: a single wide MLP over all experts for many positions, the chosen experts alone for few."""

    def __init__(self, moe: MoE, dtype: torch.dtype):
        self.gate, self.act = moe.gate, moe.experts.act
        w1, w2, w3 = (dense(w, dtype) for w in (moe.experts.w1, moe.experts.w2, moe.experts.w3))
        w13, w2 = torch.cat([w1, w3], dim=1), w2.contiguous()  # (E, 2 · width, dim), (E, dim, width)
        self.each = [(Product(w13_e), Product(w2_e)) for w13_e, w2_e in zip(w13, w2, strict=True)]
        self.w13, self.w2 = narrowed(w13), narrowed(w2)
        self.all: tuple[Product, Product] | None = None  # from the first use on
        self.shared = moe.shared_experts and DecoderMLP(moe.shared_experts, dtype)

    def __call__(self, h: torch.Tensor) -> torch.Tensor:
        """From (N, dim) to (N, dim)."""
        weights, indices, scores = self.gate.forward(h)
        weights = weights.to(h.dtype)
        if torch.compiler.is_compiling():
            y = self._gathered(h, weights, indices)
        elif 2 * indices.numel() >= len(self.each):  # one large product is read faster than several small ones
            y = self._wide(h, torch.zeros_like(scores, dtype=h.dtype).scatter_(1, indices, weights))
        else:
            y = self._chosen(h, weights, indices)
        return y if self.shared is None else y + self.shared(h)

    def _gathered(self, h: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Chosen experts by index, for the compiler to read in place."""
        gate, up = rows_times(h[:, None, None], self.w13[indices]).chunk(2, dim=-1)  # (N, K, width)
        hidden = self.act(gate) * up * weights.unsqueeze(-1)
        return rows_times(hidden.unsqueeze(2), self.w2[indices]).sum(dim=1)

    def _wide(self, h: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """All experts, `weights` (N, E) being 0 for most."""
        if self.all is None:
            w1, w3 = self.w13.to(h.dtype).chunk(2, dim=1)
            w2 = self.w2.to(h.dtype).transpose(0, 1).flatten(1)
            self.all = Product(torch.cat([w1.flatten(0, 1), w3.flatten(0, 1)])), Product(w2)
        gate, up = self.all[0](h).chunk(2, dim=1)
        hidden = (self.act(gate) * up).unflatten(1, (len(self.each), -1)) * weights.unsqueeze(-1)
        return self.all[1](hidden.flatten(1))

    def _chosen(self, h: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Each position's own experts, one after the other."""
        parts = []
        for row, weight, experts in zip(h.split(1), weights.split(1), indices.tolist(), strict=True):
            gate, up = torch.cat([self.each[e][0](row) for e in experts]).chunk(2, dim=1)
            hidden = (self.act(gate) * up * weight.t()).split(1)
            parts.append(sum(self.each[e][1](x) for e, x in zip(experts, hidden, strict=True)))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def dense(layer: Linear, dtype: torch.dtype) -> torch.Tensor:
    """A layer's weight as numbers of the dtype to multiply in."""
    return layer.dense_weight(dtype).to(dtype)

"""Decoding on a CUDA GPU: calls of a few positions, recorded once and then replayed.

A decoded byte keeps a GPU busy for a fraction of a millisecond, and Python for ten: each of some hundred kernels is
launched by itself. A CUDA graph is the list of these kernels with all their arguments, which the GPU then runs by one
command. So whatever a kernel is told has to stay: addresses, shapes, and numbers known to Python. This is how a step
gets there: positions are a tensor instead of slices, and attention goes over a length that changes seldom, the next
power of two, with what is not there yet masked.

Calls that were not recorded yet do the same, kernel by kernel, so that recording changes no bit of a text.
"""

import copy
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch

from model import Experts, KVCache, Positions, Transformer

SHORTEST = 64  # length that attention goes over at least
REPEATS = 4  # calls of a kind before it is recorded, which takes as long as some calls
MOST_GRAPHS = 64  # kept at a time, each with memory of its own


def suits(model: Transformer) -> bool:
    """Whether a model's calls can be recorded: it is whole, on a GPU, and its kernels ask Python nothing."""
    device = model.head.weight.device
    if device.type != "cuda" or not model.is_unsharded():
        return False
    stacks = [m.w1.weight for m in model.modules() if isinstance(m, Experts)]
    # the experts' products by torch's own kernel, as fp8_ops.linear takes it; others tell Python how many rows each has
    grouped = model.compute_dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) >= (9, 0)
    return not stacks or (grouped and all(n % 8 == 0 for w in stacks for n in w.shape[1:]))


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: list[torch.Tensor]
    outputs: tuple[torch.Tensor, ...]


class Recorder:
    """Runs a model's calls of few positions, by graphs where it has them: to be `model.decoder`.

    Args:
        model: The model, whose weights must stay where they are.
    """

    attn_impls = ("naive", "absorb")

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
        length = min(cache.capacity, max(SHORTEST, 1 << (end - 1).bit_length()))
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
        graph, places, outputs = self.graphs[key]
        for place, value in zip(places, inputs, strict=True):
            place.copy_(value)
        graph.replay()
        return tuple(output.clone() for output in outputs)  # the next replay writes there

    def _record(self, compute: Callable[..., tuple[torch.Tensor, ...]], inputs: list[torch.Tensor]) -> _Graph:
        if len(self.graphs) >= MOST_GRAPHS:
            self.graphs.clear()
            self.calls.clear()
        graph, places = torch.cuda.CUDAGraph(), [value.clone() for value in inputs]
        with torch.cuda.graph(graph):
            outputs = compute(*places)
        return _Graph(graph, places, outputs)

    def _compute(
        self, depth: int, cache: KVCache, length: int, tokens: torch.Tensor, index: torch.Tensor, *before: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """States and logits, by kernels that depend on nothing but shapes and `length`, that of the memory to look at.

        `index` has the positions of the tokens in the memory, (B, S).
        """
        model = self.model
        angle = index.clamp(max=model.args.max_seq_len - 1)  # of a draft past the context, which nobody reads
        mask = torch.arange(length, device=index.device) <= index[:, None, :, None]
        where = Positions(model.rope_cos[angle], model.rope_sin[angle], index, mask)
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

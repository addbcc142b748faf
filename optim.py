"""Muon, the parameter groups (matrices are trained by Muon or AdamW, all else by AdamW), their rate; a training step.

A training step, `TrainingStep`, is all between bytes on the device and new weights there. No shape in it depends on
data and nothing in it waits for the device, so that a GPU can record it once, as a CUDA graph, and replay it: some
thousand kernels, each of a few microseconds, which Python would launch more slowly than the GPU runs them. The routing
biases, which no gradient trains, are moved at its end.
"""

import fnmatch
import math
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import command
import fp8_ops
import model as model_module
import parallel
from command import shorten
from model import ConfigError, Losses, Transformer
from parallel import ParallelContext, is_matrix

NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Muon's Newton-Schulz iteration, and how many of them
NS_STEPS = 5
STATE_KEYS = {"Muon": ["momentum_buffer"], "AdamW": ["step", "exp_avg", "exp_avg_sq"]}  # of a parameter
ROUTER_LR_DIM = 128  # width above which the routers' learning rate falls
LAUNCHED_STEPS = 3  # of each shape, before a step is recorded as a CUDA graph
BALANCE_GAIN, BALANCE_GAINS = 0.05, (1e-4, 0.2)  # step of an expert's bias per relative error: at first, and bounds
BALANCE_ADAPTATION = 0.1  # how quickly gains change
BALANCE_CORRELATION = -0.1  # of an expert's successive errors, where its gain stays


class Muon(Optimizer):
    """Muon (Jordan et al. 2024): momentum whose update is replaced by the nearest orthogonal matrix.

    Equals `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"`, so that AdamW's rates fit, but takes stacks of
    matrices (..., rows, columns) too and orthogonalises all matrices of a shape in one batch, divided among the
    processes: each matrix is orthogonalised once.

    Args:
        params: Parameters of two dimensions or more.
        lr, momentum, weight_decay: As torch's; Nesterov's look-ahead is on.
        dtype: What to orthogonalise in; bfloat16 is precise enough.
        ctx: The processes that hold shards or replicas of the matrices.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.bfloat16,
        ctx: ParallelContext | None = None,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype, self.ctx = dtype, ctx or ParallelContext()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override] # without torch's closures
        """Updates all parameters that have a gradient."""
        for group in self.param_groups:
            batches: dict[Any, list[tuple[nn.Parameter, torch.Tensor]]] = {}  # one per shape and way of sharding
            for p in group["params"]:
                if p.grad is not None:
                    update, key = self._momentum(p, group["momentum"])
                    batches.setdefault(key, []).append((p, update))
            sent: tuple[Any, ...] | None = None  # the batch before, whose updates are on their way between processes
            for (_, shards, full_shape), pairs in batches.items():
                stacked = torch.cat([update for _, update in pairs])
                updates, exchange = parallel.map_full_matrices(shards, stacked, orthogonalize)
                if sent is not None:
                    self._apply_batch(group, *sent)
                sent = pairs, updates, exchange, full_shape
                if exchange is None:  # nothing is on its way, and the next batch needs the memory
                    self._apply_batch(group, *sent)
                    sent = None
            if sent is not None:
                self._apply_batch(group, *sent)

    def _apply_batch(self, group: dict[str, Any], pairs: Any, updates: torch.Tensor, exchange: Any, shape: Any) -> None:
        """Waits for the updates of a batch, pairs of a parameter and its update before, and applies them."""
        if exchange is not None:
            exchange.wait()
        scale = 0.2 * math.sqrt(max(shape))  # an update has the root mean square of AdamW's
        for (p, _), update in zip(pairs, updates.split([len(u) for _, u in pairs]), strict=True):
            self._apply(p, update, group["lr"], group["weight_decay"], scale)

    def _momentum(self, p: nn.Parameter, momentum: float) -> tuple[torch.Tensor, Any]:
        """Advances the running mean; returns the Nesterov update (matrices, rows, columns) and the key of its batch."""
        if "momentum_buffer" not in self.state[p]:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffer, grad = (self.ctx.local_shard(t)[0] for t in (self.state[p]["momentum_buffer"], p.grad))
        if (kernel := fp8_ops.kernels(grad)) and grad.numel():
            update = torch.empty(grad.shape, dtype=self.dtype, device=grad.device)
            kernel.momentum_update(grad, buffer, update, momentum)
        else:
            buffer.lerp_(grad, 1 - momentum)
            update = grad.lerp(buffer, momentum).to(self.dtype)
        shards, full_shape = parallel.matrix_shards(self.ctx, p)
        local = parallel.local_matrices(self.ctx, p, update)
        return local, (local.shape[1:], tuple(shards), full_shape)

    def _apply(self, p: nn.Parameter, update: torch.Tensor, lr: Any, decay: float, scale: float) -> None:
        """Decays a parameter and subtracts its scaled update, of which this process may hold a shard."""
        here, _ = self.ctx.local_shard(p)
        update = update.reshape(-1, *here.shape[1:])[: len(here)]  # without the padding of FSDP's last shards
        if (kernel := fp8_ops.kernels(here)) and here.numel():
            rate = lr if isinstance(lr, torch.Tensor) else torch.full((), lr, device=here.device)
            kernel.apply_update(here, update.contiguous(), rate, decay, scale)
        else:
            here.mul_(1 - lr * decay).add_(update, alpha=-(lr * scale))


def orthogonalize(x: torch.Tensor) -> torch.Tensor:
    """Pushes the singular values of matrices (n, rows, columns) towards 1 by Newton-Schulz iterations."""
    is_aligned = len(x) > 0 and all(n % 8 == 0 for n in x.shape[1:])  # TMA refuses tensors without elements, too
    if (kernel := fp8_ops.kernels(x)) and x.dtype == torch.bfloat16 and is_aligned:
        return kernel.newton_schulz(x, NS_COEFFICIENTS, NS_STEPS)
    a, b, c = NS_COEFFICIENTS
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(NS_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def is_hidden_matrix(name: str, p: nn.Parameter) -> bool:
    """Whether a parameter is one of those that `--optimizer` is for."""
    return is_matrix(name, p.shape) and name not in ("embed.weight", "head.weight")


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are not frozen, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def freeze(model: nn.Module, patterns: list[str]) -> None:
    """Excludes parameters from training: those whose name matches one of some shell-style patterns.

    The routing bias of a gate is no parameter: it stays when the gate's weight does.

    Raises:
        ConfigError: A pattern matches nothing, or nothing is left to train.
    """
    params = dict(model.named_parameters())
    for pattern in patterns:
        matches = [name for name in params if fnmatch.fnmatchcase(name, pattern)]
        if not matches:
            some = ", ".join(list(params)[:: -(-len(params) // 5)])
            raise ConfigError(f"--freeze {shorten(pattern)} matches no parameter; some of them are {some}")
        for name in matches:
            params[name].requires_grad_(False)
    if not any(p.requires_grad for p in params.values()):
        raise ConfigError("--freeze leaves no parameter to train; narrow its patterns")


def make_optimizers(
    model: Transformer, flags: Any, dtype: torch.dtype, ctx: ParallelContext | None = None
) -> list[Optimizer]:
    """Divides the parameters: hidden matrices by `--optimizer`; embedding, head, router and norms by AdamW.

    Only hidden matrices decay: a norm's scale or an embedding that rarely gets a gradient should not shrink. Frozen
    parameters are left out. `flags` are `TrainFlags`. A group has the "name" of its rate in the metrics, and its
    "peak_lr"; indexers, which may learn alone, have groups of their own, whose names begin with "index".
    """
    params: dict[str, list[nn.Parameter]] = {"matrices": [], "routers": [], "others": []}
    params |= {"index matrices": [], "index others": []}
    for name, p in trainable(model).items():
        is_router, owner = name.endswith("gate.weight"), "index " if ".indexer." in name else ""
        params[owner + ("matrices" if is_hidden_matrix(name, p) else "routers" if is_router else "others")].append(p)
    # AdamW moves each of a row's `dim` weights by the rate: at 1,024, scores would leap faster than biases balance
    router_lr = flags.lr * min(1.0, ROUTER_LR_DIM / model.args.dim)
    groups: list[dict[str, Any]] = [{"name": "lr", "params": params["others"], "lr": flags.lr, "weight_decay": 0.0}]
    groups += [{"name": "router_lr", "params": params["routers"], "lr": router_lr, "weight_decay": 0.0}]  # may be none
    matrices = [{"name": "matrix_lr", "params": params["matrices"]}]
    if model.args.index_topk:
        groups.append({"name": "index_lr", "params": params["index others"], "lr": flags.lr, "weight_decay": 0.0})
        matrices.append({"name": "index_matrix_lr", "params": params["index matrices"]})
    matrices = [group for group in matrices if group["params"]]
    optimizers: list[Optimizer] = []
    if flags.optimizer == "muon" and matrices:
        optimizers.append(Muon(matrices, flags.matrix_lr, flags.momentum, flags.weight_decay, dtype, ctx))
    elif flags.optimizer == "adamw":
        groups += [group | {"lr": flags.matrix_lr, "weight_decay": flags.weight_decay} for group in matrices]
    optimizers.append(torch.optim.AdamW(groups, betas=(flags.beta1, flags.beta2), eps=1e-10, fused=True))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


class GateBalance:
    """Moves the routing biases against the load of the experts, so that no auxiliary loss has to balance them.

    With `bias_update_speed`, each bias moves by that much after each step (V3 report, section 2.1.2), which suits runs
    of 100,000 steps. Without it, each moves by a gain of its own times `1 - load / mean`, for runs of any length: the
    same bias moves few positions where an expert's scores are spread widely, and most of them where its sigmoids are
    near 0. So a gain rises while the errors of successive steps have one sign, since the bias lags behind, and falls
    while they alternate, since it overshoots; it stays where they alternate a little.

    All of it is computed on the device, in place: `state` (2, gates, experts) are the gains and the last errors.
    """

    def __init__(self, model: Transformer):
        self.gates, self.speed, n_experts = model.gates(), model.args.bias_update_speed, model.args.n_routed_experts
        self.moves = [gate.bias is not None and gate.weight.requires_grad for gate in self.gates]  # no frozen router
        self.state = torch.zeros(2, len(self.gates), n_experts, device=model.head.weight.device)
        self.gains, self.errors = self.state
        self.gains.fill_(BALANCE_GAIN)

    @torch.no_grad()
    def update(self, load: torch.Tensor) -> None:
        """Moves the biases once, by the load (gates, experts) of a step: `Losses.load`, summed over all its batches."""
        if not any(self.moves):
            return
        mean = load.mean(dim=-1, keepdim=True)
        steps = self._own_steps(1 - load / mean) if self.speed is None else self.speed * torch.sign(mean - load)
        for gate, moves, step in zip(self.gates, self.moves, steps, strict=True):
            if moves:
                gate.bias += step

    def _own_steps(self, errors: torch.Tensor) -> torch.Tensor:
        """Adapts the gains to the relative errors (gates, experts) of the load; returns the steps of the biases."""
        errors = errors.nan_to_num().clamp(min=-1)  # without any load, 0; at most 1, so it is symmetric
        sizes = errors.square().mean(dim=-1, keepdim=True) * self.errors.square().mean(dim=-1, keepdim=True)
        correlations = (errors * self.errors / sizes.sqrt().clamp(min=1e-12)).clamp(-2, 2)
        self.gains.mul_(torch.exp(BALANCE_ADAPTATION * (correlations - BALANCE_CORRELATION))).clamp_(*BALANCE_GAINS)
        self.errors.copy_(errors)
        return self.gains * errors


def optimizer_tensors(model: nn.Module, optimizers: list[Optimizer]) -> dict[str, dict[str, torch.Tensor]]:
    """Returns the optimizers' state of each parameter, by the parameter's name."""
    names: dict[torch.Tensor, str] = {p: name for name, p in model.named_parameters()}
    return {names[p]: dict(state) for optimizer in optimizers for p, state in optimizer.state.items()}


@torch.no_grad()
def load_optimizer_tensors(
    model: nn.Module, optimizers: list[Optimizer], read: Callable[..., dict[str, torch.Tensor]], ctx: ParallelContext
) -> None:
    """Puts back what `optimizer_tensors` returned, which `read` knows of each parameter; see `checkpoint.load_run`."""
    owner = {p: optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for name, p in trainable(model).items():
        for key, tensor in read(name, p, STATE_KEYS[type(owner[p]).__name__]).items():
            owner[p].state[p][key] = state = torch.zeros_like(p) if tensor.ndim else tensor.to(p.device)
            ctx.local_shard(state)[0].copy_(tensor)


def schedule(progress: float, kind: str, warmup: float, decay: float) -> float:
    """The learning rate as a fraction of its peak, when `progress` of training is done, 0 to 1.

    It warms up linearly; "wsd" then stays, and falls linearly to 0 in the last fraction `decay`; "cosine" falls as one.
    """
    if progress < warmup:
        return progress / warmup
    if kind == "wsd":
        return min(1.0, (1 - progress) / decay) if decay > 0 else 1.0
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / max(1 - warmup, 1e-9))))


def rate(progress: float, settings: dict[str, Any]) -> float:
    """The learning rate of all but the hidden matrices, when `progress` of the schedule is done."""
    return settings["lr"] * schedule(progress, settings["schedule"], settings["warmup"], settings["decay"])


def stretch(progress: float, begin: float, done: float) -> float:
    """How much of the schedule is done when `progress` of the run is, if `done` of it was when `begin` of the run was.

    So the rest of one goes with the rest of the other; with zeros, the two are the same.
    """
    return min(1.0, done + (1 - done) * max(0.0, (progress - begin) / (1 - begin)))


# --- A training step -------------------------------------------------------------------------------------------------


class Figures:
    """What a step found, on its way from the device: losses, the gradient's norm, the load of the experts."""

    def __init__(self, ctx: ParallelContext, values: torch.Tensor, load_shape: torch.Size):
        self._ctx, self._values, self._shape = ctx, values, load_shape
        self._event: torch.cuda.Event | None = None
        if values.is_cuda:
            self._values = torch.empty(values.shape, pin_memory=True).copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> tuple[list[float], torch.Tensor]:
        """Waits for them: losses (next byte, MTP, balance, indexers) and norm, and the load (MoE layers, experts)."""
        if self._event is not None:
            self._ctx.wait_for(self._event)
        return self._values[:5].tolist(), self._values[5:].view(self._shape)


class TrainingStep:
    """Forward, backward and update of one step, on whatever device; on a GPU, replayed as a CUDA graph.

    A graph repeats what was recorded, on the same memory: numbers that Python computes stay as they were then, so the
    learning rates are tensors. Each length of sequences, and each stage of training an indexer, has its own recording,
    after a few steps as usual, in which kernels are compiled and the optimizers' state is allocated. With `replays`, a
    step is taken even if its losses or gradient are not finite, which only the figures show: the caller must end the
    run when it reads them, before anything is saved. Collectives are in the graph too: all processes record, or none.

    Args:
        ctx, model, optimizers: Of this process.
        loss: Tokens and targets to `Losses`.
        grad_clip: Largest norm of the gradient, `math.inf` for none.
        replays: Whether to record and replay; see `can_replay`.
    """

    def __init__(
        self, ctx: ParallelContext, model: Transformer, loss: Callable[[torch.Tensor, torch.Tensor], Losses],
        optimizers: list[Optimizer], grad_clip: float, replays: bool = False,
    ):  # fmt: skip
        self.ctx, self.model, self.loss, self.optimizers = ctx, model, loss, optimizers
        self.grad_clip, self.replays, self.balance = grad_clip, replays, GateBalance(model)
        self.graph: torch.cuda.CUDAGraph | None = None
        self._batches = self._figures = torch.empty(0)  # what a graph reads and writes
        self._n_launched = 0  # steps of this shape without a graph
        self._stage = False, False  # of training an indexer
        self._load_shape = torch.Size([0, 0])
        if replays:
            model.rope_tables(model.args.max_seq_len)  # which else move when they get longer
            for group in self._groups():
                group["lr"] = torch.tensor(group["lr"], device=ctx.device)
                group["capturable"] = True  # of AdamW: its step count stays on the device

    def compile_ahead(self, n_bytes: int, *lengths: int) -> None:
        """Compiles the kernels of steps, evaluations and samples in parallel: else each would wait for the one before.

        Batches of this process have `n_bytes`, in sequences of the `lengths`, the first of which evaluations have too.
        One process of a machine compiles, and the others find it in Triton's cache.
        """
        weight = self.model.head.weight
        for is_turn in (True, False) if fp8_ops.kernels(weight) else ():
            if is_turn == command.is_local_rank_zero():
                import kernel

                capability = fp8_ops.capability(weight.device)
                with kernel.compiling_ahead(weight.device), fp8_ops.meta_tensors_of(capability), torch.device("meta"):
                    self._run_on_meta(n_bytes, lengths)
            self.ctx.all_reduce_max(0)

    def _run_on_meta(self, n_bytes: int, lengths: tuple[int, ...]) -> None:
        """Does what steps, evaluations and samples do with a copy of the model, of which there are shapes alone."""
        ctx = ParallelContext("meta", self.ctx.mp_size, self.ctx.mp_rank, self.ctx.mp_size)  # it does not communicate
        model, learns = parallel.build(ctx, self.model.args, self.model.compute_dtype).train(), trainable(self.model)
        model.gradient_checkpointing = self.model.gradient_checkpointing
        for name, p in model.named_parameters():
            p.requires_grad_(name in learns)
        parallel.quantize_weights(ctx, model)
        matrices = [p for name, p in trainable(model).items() if is_hidden_matrix(name, p)]
        kinds = {type(block.ffn): block for block in model.layers}
        model.layers = nn.ModuleList([model.layers[0], *kinds.values()])  # the first, whose input may be frozen

        def batch(size: int, length: int) -> list[torch.Tensor]:
            return [torch.zeros(size // length, length, dtype=torch.int64)] * 2

        stages = {False, model.args.index_topk > 0}  # of training an indexer
        chunk, model_module.CHUNK_NUMBERS = model_module.CHUNK_NUMBERS, 1 << 62  # tensors without memory: one chunk
        try:
            for length, model.dense_attention in product(set(lengths), stages):
                model.loss(*batch(n_bytes, length)).total.backward()
            with torch.no_grad():
                model.eval().next_byte_loss(*batch(4 * n_bytes, lengths[0]))
                model(batch(1, 1)[0], model.new_cache(1, 2))
        finally:
            model_module.CHUNK_NUMBERS = chunk
        for optimizer in self.optimizers:
            if isinstance(optimizer, Muon):
                Muon(matrices, 0.0, dtype=optimizer.dtype).step()

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def set_rates(self, factor: float) -> dict[str, float]:
        """Sets the learning rates to `factor` of their peaks; returns them by their names in the metrics."""
        rates = {}
        for group in self._groups():
            learns = group["name"].startswith("index") or not self.model.indexer_only
            rate = group["peak_lr"] * factor if learns else 0.0
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
            if group["params"]:
                rates[group["name"]] = rate
        return rates

    def __call__(self, batches: torch.Tensor) -> Figures:
        """Takes a step on sequences with the byte after them, uint8 (batches, B, S + 1): their mean gradient.

        Without `replays`, the step was not taken if its losses or norm are not finite.
        """
        return Figures(self.ctx, self._launch(batches), self._load_shape)

    def _launch(self, batches: torch.Tensor) -> torch.Tensor:
        if not self.replays:
            return self._run(batches)
        stage = self.model.dense_attention, self.model.indexer_only
        if batches.shape != self._batches.shape or stage != self._stage:
            self.graph, self._n_launched, self._stage = None, 0, stage
            self._batches, self._figures = torch.empty_like(batches), torch.empty(0)
        self._batches.copy_(batches)
        if self.graph is None and self._n_launched >= LAUNCHED_STEPS:
            self._record()
        if self.graph is None:
            self._n_launched += 1
            return self._run(self._batches)
        self.graph.replay()
        return self._figures

    def _record(self) -> None:
        """Records a step, without running it; if one process cannot, all go on without a graph."""
        graph, reason = torch.cuda.CUDAGraph(), None
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL has a thread that asks for events
                self._figures = self._run(self._batches)
        except RuntimeError as error:
            reason = ValueError(str(error.__context__ or error).partition("\n")[0])  # why it could not end either
        try:
            self.ctx.raise_if_any_failed(reason)
        except ValueError as error:
            self._go_on_launching(error)
            return
        self.graph = graph
        if self.ctx.world_size > 1:
            parallel.graphs.add(graph)

    def _go_on_launching(self, error: ValueError) -> None:
        """Clears what is left of a recording that failed, and warns of it."""
        self.replays = False
        parallel.forget_step(self.ctx, self.model)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        if command.is_local_rank_zero():
            command.warn("train.py", f"the step cannot be a CUDA graph ({shorten(error)}), which is faster; going on")

    def _run(self, batches: torch.Tensor) -> torch.Tensor:
        losses, load = self._accumulate_gradients(batches)
        norm = parallel.clip_grad_norm(self.ctx, self.model, self.grad_clip)
        figures, self._load_shape = torch.cat([losses, norm.view(1), load.flatten()]), load.shape
        is_taken = self.replays or math.isfinite(figures.sum())  # which waits for the device
        for optimizer in self.optimizers:
            if is_taken:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if is_taken:
            if not self.model.indexer_only:
                self.balance.update(load)
            parallel.quantize_weights(self.ctx, self.model)
        return figures

    def _accumulate_gradients(self, batches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs a step forward and backward; returns mean losses (next byte, MTP, balance, indexers) and the load."""
        ctx, n_batches = self.ctx, len(batches)
        means, load = torch.zeros(4, device=ctx.device), torch.zeros((), device=ctx.device)
        for i, batch in enumerate(batches):
            tokens, ctx.averages_gradients = batch.long(), i == n_batches - 1
            losses = self.loss(tokens[:, :-1], tokens[:, 1:])
            (losses.total / n_batches).backward()
            means = means + torch.stack([losses.next_byte, losses.mtp, losses.balance, losses.indexer]) / n_batches
            load = load + losses.load
        parallel.finish_gradients(ctx, self.model)
        return ctx.all_reduce_dp(means / ctx.dp_size), ctx.all_reduce_dp(load)


def can_replay(ctx: ParallelContext, model: Transformer) -> bool:
    """Whether a step can be a CUDA graph: on GPUs that have kernels of Muon, and of grouped products for experts.

    And in one process: graphs of several, their collectives included, are tested with stand-ins for GPUs alone.
    """
    weight = next(model.parameters())
    if ctx.world_size > 1 or fp8_ops.kernels(weight) is None:
        return False
    return not model.gates() or not fp8_ops.grouped_products_wait(weight.device, model.compute_dtype)

"""Training speed: the share of this machine's matrix products that it reaches, and against transformers.

    python tests/bench/bench_train.py [--config configs/small.json] [--compile] [--steps 3] [--rounds 5]

All train the same shape, as a `DeepseekV3ForCausalLM` on transformers' side: MoE in every block after the first ones,
without MTP modules. Each step is forward, backward, clipping and AdamW on the same random windows, in the dtype that
train.py picks. That is done in two ways by transformers: with weights in float32 under autocast, as its Trainer does
and as train.py keeps them, and with weights and optimizer in that dtype as well, which is faster and trains worse.
All take turns; the first step of each turn does not count, and medians are printed. FLOPs are the model's own
(`Transformer.flops_per_position`) for all, and the peak is what train.py measures when it starts.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import convert  # noqa: E402
from checkpoint import read_config, save_model  # noqa: E402
from convert import load_model  # noqa: E402
from metrics import measure_peak  # noqa: E402
from model import Transformer  # noqa: E402
from parallel import keep_freed_memory, pick_device, pick_dtype  # noqa: E402


def stepper(model: nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], float]:
    """A function that takes one training step and returns its loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> float:
        value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.item()

    return step


def theirs(folder: Path, device: str, dtype: torch.dtype, tokens: torch.Tensor, mixed: bool) -> Callable[[], float]:
    """Training by transformers, with weights in float32 (`mixed`) or in `dtype`."""
    import transformers

    transformers.logging.set_verbosity_error()
    weights = torch.float32 if mixed else dtype
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=weights).to(device).train()
    assert type(model).__name__ == "DeepseekV3ForCausalLM"

    def loss() -> torch.Tensor:
        with torch.autocast(device, dtype, enabled=mixed and dtype != weights):
            return model(tokens, labels=tokens, use_cache=False).loss

    return stepper(model, loss)


def main() -> None:
    """Trains in each way and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "small.json")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--compile", action="store_true", help="train ours with torch.compile, as train.py --compile")
    parser.add_argument("--steps", type=int, default=3, help="in each round")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    keep_freed_memory()
    device = pick_device(None)
    dtype = pick_dtype(torch.device(device).type, "auto")
    shape, _ = read_config(options.config)
    shape = replace(shape, moe_layer_freq=1, n_mtp_layers=0, aux_loss_alpha=0.0, dtype="fp32")
    with tempfile.TemporaryDirectory() as folder:
        model = Transformer(shape)
        model.init_weights(0)
        save_model(model, Path(folder) / "native")
        convert.convert(Path(folder) / "native", Path(folder) / "hf", is_hf=True)
        ours = load_model(Path(folder) / "native", device, dtype).float().requires_grad_(True).train()
        tokens = torch.randint(1, 256, (options.batch_size, shape.max_seq_len + 1), device=device)
        loss = torch.compile(ours.loss, fullgraph=True) if options.compile else ours.loss
        ways = {
            "ByteGPT": stepper(ours, lambda: loss(tokens[:, :-1], tokens[:, 1:]).total),
            "transformers": theirs(Path(folder) / "hf", device, dtype, tokens, True),
        }
        if dtype != torch.float32:
            ways[f"transformers, all in {str(dtype)[6:]}"] = theirs(Path(folder) / "hf", device, dtype, tokens, False)
    times: dict[str, list[float]] = {name: [] for name in ways}
    losses = {name: step() for name, step in ways.items()}
    assert max(losses.values()) - min(losses.values()) < 0.02, losses
    for _ in range(options.rounds):
        for name, step in ways.items():
            step()  # not counted: it finds caches as the other left them
            began = time.perf_counter()
            for _ in range(options.steps):
                step()
            times[name].append((time.perf_counter() - began) / options.steps)
    positions = options.batch_size * shape.max_seq_len
    peak = measure_peak(device, dtype)
    flops = ours.flops_per_position(shape.max_seq_len) * positions
    print(f"\n{options.config.name}, {device}, {dtype}, products at {peak / 1e12:.3g} TFLOP/s at most\n")
    print("| | bytes/s | share of peak | ByteGPT's speed |\n|---|---|---|---|")
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    for name, seconds in medians.items():
        ratio = seconds / medians["ByteGPT"]
        print(f"| {name} | {positions / seconds:,.0f} | {flops / seconds / peak:.0%} | {ratio:.2f} times |")


if __name__ == "__main__":
    main()

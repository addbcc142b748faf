"""How fast text is decoded, as ratios of what takes turns within one run: the median of each.

    python tests/bench/bench_decode.py [--only NAME ...] [--ckpt-path DIR] [--minutes M] [--repeat N] …

transformers  its `generate`, one and sixteen texts at a time, of what train.py saves: the checkpoint of --ckpt-path, or
              17 million weights in float32; with --weights fp32, greedy texts are the same
weights       a byte after 64 others by weights in float32, bfloat16 and FP8 (configs/bytegpt.json: beyond any cache)
context       a byte after 4,096 others, against one after 64 (configs/small.json)
sparse        likewise, after 16,384 and after 2,048, of which it attends to 512 (configs/long.json)
prefill       reading 1,024 bytes into the cache, against the forward pass of training; weights as above
loss          of the next byte, by weights and KV caches of each width: --ckpt-path, on the end of the standard library
attach        comparing a decoder with the modules when it is attached, in milliseconds (configs/nano.json, small.json)
speculation   drafting so many bytes at a time by the MTP modules, against not: the checkpoint of --ckpt-path continues
              beginnings of lines of Python, or else nano.json with a module, after --minutes on the standard library
gpu           on a GPU, random models of --config: bytes/s and MBU of one and of 64 texts, by weights in bfloat16 and
              FP8; how many greedy texts are those of the modules; and a byte after 16,384 others (configs/small.json)
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT)]


import convert  # noqa: E402
import decode  # noqa: E402
import fp8_ops  # noqa: E402
import generate  # noqa: E402
import metrics  # noqa: E402
import model as model_module  # noqa: E402
import parallel  # noqa: E402
from checkpoint import save_model  # noqa: E402
from data import prepare  # noqa: E402
from generate import Sampling, Tally  # noqa: E402
from model import ModelArgs, Transformer  # noqa: E402

BEGINNINGS = [b"def ", b"class ", b"import ", b"    if ", b"# The ", b"return ", b"    def __init__(self", b"for "]
SHAPE = {"dim": 384, "inter_dim": 1024, "moe_inter_dim": 256, "n_layers": 6, "n_dense_layers": 1, "n_heads": 6}
SHAPE |= {"n_routed_experts": 8, "n_shared_experts": 1, "n_activated_experts": 2, "score_func": "sigmoid"}
SHAPE |= {"kv_lora_rank": 128, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 64, "max_seq_len": 1024}
SHAPE |= {"max_batch_size": 16, "dtype": "fp32"}


def seconds(repeat: int, *actions: Callable[[], object]) -> list[float]:
    """The median time of each of several actions, which take turns after a first time that does not count."""
    times: list[list[float]] = [[] for _ in actions]
    for turn in range(repeat + 1):
        for action, results in zip(actions, times, strict=True):
            begin = time.perf_counter()
            action()
            if turn > 0:
                results.append(time.perf_counter() - begin)
    return [statistics.median(results) for results in times]


def print_table(*rows: tuple[object, ...]) -> None:
    """Prints rows, of which the first is the head."""
    for i, row in enumerate(rows):
        print("|", " | ".join(f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row), "|")
        if i == 0:
            print("| --- " * len(row) + "|")
    print(flush=True)


def random_model(args: ModelArgs) -> Transformer:
    """A model with random weights that never ends a text."""
    model = Transformer(args)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(
                torch.ones(p.shape) if p.ndim == 1 else torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5
            )
        model.head.weight[0] = 0
    return model.eval().requires_grad_(False)


def config_of(name: str, **changes: Any) -> ModelArgs:
    """The shape of `configs/NAME.json`."""
    config = json.loads((ROOT / "configs" / f"{name}.json").read_text())
    config.pop("train")
    return ModelArgs.from_dict(config | changes)


def load(path: Path, *flags: str) -> Transformer:
    """What generate.py loads from a checkpoint."""
    given = ["--ckpt-path", str(path), "--prompt", "", "--device", "cpu", *flags]
    return generate.load(generate.build_parser().parse_args(given), parallel.ParallelContext())


def by_weights(options: argparse.Namespace, folder: Path, args: ModelArgs) -> dict[str, Transformer]:
    """A random model, by the width of its weights; float32 is not an operand of products in bfloat16."""
    save_model(random_model(args), folder / "random")
    widths = ["bf16", "fp8"] if parallel.pick_dtype("cpu", options.dtype) == torch.bfloat16 else ["bf16", "fp8", "fp32"]
    return {width: load(folder / "random", "--weights", width, "--dtype", options.dtype) for width in widths}


def attached(model: Transformer) -> Transformer:
    """The same model with its decoder."""
    if (warning := decode.attach(model)) is not None:
        print(f"warning: {warning}", file=sys.stderr)
    return model


def prompts(n: int) -> list[bytes]:
    """Prompts of 16 bytes."""
    return [bytes([65 + i]) * 16 for i in range(n)]


def write(model: Transformer, texts: list[bytes], sampling: Sampling, tally: Tally | None = None) -> list[bytes]:
    """Continues texts, all at a time."""
    more = [b""] * len(texts)
    for row, piece in generate.generate(model, texts, sampling, tally):
        more[row] += piece
    return more


def write_theirs(model: Any, n_rows: int, sampling: Sampling) -> list[bytes]:
    """The same by transformers."""
    ids, n = torch.tensor([list(prompt) for prompt in prompts(n_rows)]), sampling.max_new_tokens
    chance: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        chance = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0}
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n, pad_token_id=0, **chance
    )
    return [bytes(row[16:].tolist()) for row in out]


def bench_transformers(options: argparse.Namespace, folder: Path) -> None:
    """Against `generate` of transformers."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    path = options.ckpt_path or folder / "random"
    if options.ckpt_path is None:
        save_model(random_model(ModelArgs.from_dict(SHAPE)), path)
    convert.convert(path, folder / "hf", is_hf=True)
    ours = load(path, "--dtype", options.dtype, *(["--weights", options.weights] if options.weights else []))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32).eval()
    rows: list[tuple[object, ...]] = [("texts", "choice", "bytes/s", "transformers", "ratio", "same text")]
    n = options.bytes
    for n_rows in (1, 16):
        for temperature in (0.0, 0.8):
            sampling = Sampling(temperature, max_new_tokens=n)
            actions = partial(write, ours, prompts(n_rows), sampling), partial(write_theirs, theirs, n_rows, sampling)
            one, other = seconds(options.repeat, *actions)
            text, their_text = (action() for action in actions)
            written, same = sum(map(len, text)), "–" if temperature else str(text == their_text)
            speed, theirs_speed = written / one, n_rows * n / other
            how = "sampled" if temperature else "greedy"
            rows.append((n_rows, how, f"{speed:.0f}", f"{theirs_speed:.0f}", speed / theirs_speed, same))
    print_table(*rows)


@torch.inference_mode()
def step(model: Transformer, cache: model_module.KVCache, length: int) -> None:
    """Decodes 16 bytes after so many others; they differ, as in a text, and so do the experts that they need."""
    for i in range(16):
        cache.lengths = [length + i] * len(cache.lengths)
        model(torch.randint(1, 256, (len(cache.lengths), 1)), cache)


def bench_weights(options: argparse.Namespace, folder: Path) -> None:
    """A byte by weights of each width."""
    models = by_weights(options, folder, config_of("bytegpt"))
    rows: list[tuple[object, ...]] = [("texts", *(f"ms in {width}" for width in models), "bf16 to fp8")]
    for n_rows in (1, 4):
        caches = [model.new_cache(n_rows, 128) for model in models.values()]
        actions = (partial(step, *pair, 64) for pair in zip(models.values(), caches, strict=True))
        times = [t / 16 * 1e3 for t in seconds(3 * options.repeat, *actions)]
        rows.append((n_rows, *times, times[0] / times[1]))
    print_table(*rows)


def bench_context(
    options: argparse.Namespace, folder: Path, name: str = "small", near: int = 64, far: int = 4096
) -> None:
    """A byte late in the context against one early."""
    args = config_of(name, max_seq_len=far + 64, original_seq_len=far + 64)
    rows: list[tuple[object, ...]] = [("weights", "texts", f"ms after {near:,} bytes", f"ms after {far:,}", "ratio")]
    for width, model in by_weights(options, folder, args).items():
        for n_rows in (1, 4):
            cache = model.new_cache(n_rows, far + 64)
            for tensor in (tensor for layer in cache.layers for tensor in layer):
                tensor.normal_()
            early, late = seconds(3 * options.repeat, *(partial(step, model, cache, length) for length in (near, far)))
            rows.append((width, n_rows, early / 16 * 1e3, late / 16 * 1e3, late / early))
    print_table(*rows)


@torch.inference_mode()
def forward(model: Transformer, text: bytes) -> None:
    """Computes what training computes."""
    model_module.attn_impl = "naive"
    model(text)
    model_module.attn_impl = "absorb"


def bench_prefill(options: argparse.Namespace, folder: Path) -> None:
    """Reading a prompt against the forward pass of training."""
    models, text = by_weights(options, folder, config_of("bytegpt")), bytes(range(65, 129)) * 16
    read = [lambda m=m: decode.prefill(m, [text + b"."], m.new_cache(1, 1024)) for m in models.values()]
    with torch.inference_mode():
        *times, other = seconds(options.repeat, *read, partial(forward, models["bf16"], text))
    rows: list[tuple[object, ...]] = [
        ("weights", "prefill of 1,024 bytes, bytes/s", "training's forward pass", "ratio")
    ]
    for width, time_ in zip(models, times, strict=True):
        rows.append((width, f"{len(text) / time_:.0f}", f"{len(text) / other:.0f}", other / time_))
    print_table(*rows)


@torch.inference_mode()
def bench_loss(options: argparse.Namespace, folder: Path) -> None:
    """What narrower weights and KV caches cost."""
    path = options.ckpt_path or train(options, folder, {})
    with open(prepare.resolve("stdlib"), "rb") as file:
        file.seek(-(1 << 18), os.SEEK_END)  # of the validation split
        ids = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8).long()
    rows: list[tuple[object, ...]] = [("weights", "KV cache", "nats per byte", "more, in %")]
    first = 0.0
    for width in ("fp32", "bf16", "fp8"):
        model = load(path, "--weights", width, "--dtype", "fp32")
        n = model.args.max_seq_len
        texts = ids.unfold(0, n + 1, n)[:32]
        for dtype in (torch.float32, torch.bfloat16):
            model.cache_dtype, total = dtype, 0.0
            cache = model.new_cache(len(texts), n)
            for i in range(0, n, 2):  # few positions: by decode.c
                logits = model(texts[:, i : i + 2], cache).flatten(0, 1)
                total += F.cross_entropy(logits, texts[:, i + 1 : i + 3].flatten(), reduction="sum").item()
            loss = total / len(texts) / n
            first = first or loss
            rows.append((width, str(dtype)[6:], f"{loss:.5f}", f"{100 * (loss / first - 1):.3f}"))
    print_table(*rows)


def bench_attach(options: argparse.Namespace, folder: Path) -> None:
    """What the comparison takes."""
    rows: list[tuple[object, ...]] = [("model", "computes in", "ms to attach")]
    for name in ("nano", "small"):
        for dtype in (torch.float32, torch.bfloat16):
            model = random_model(config_of(name)).to(dtype)
            model.compute_dtype = dtype
            rows.append((name, str(dtype)[6:], seconds(options.repeat, partial(attached, model))[0] * 1e3))
    print_table(*rows)


def bench_speculation(options: argparse.Namespace, folder: Path) -> None:
    """With drafts against without."""
    path = options.ckpt_path or train(options, folder, {"n_mtp_layers": 1})
    for width in [options.weights] if options.weights else ["bf16", "fp8"]:
        print(f"weights in {width}\n")
        _bench_drafts(options, load(path, "--weights", width, "--dtype", options.dtype))


def train(options: argparse.Namespace, folder: Path, changes: dict[str, Any]) -> Path:
    """Trains nano.json, with changes, for --minutes on the standard library."""
    config = json.loads((ROOT / "configs" / "nano.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    command = [
        "train.py",
        "--config",
        folder / "config.json",
        "--save-path",
        folder / "run",
        "--minutes",
        options.minutes,
    ]
    subprocess.run(list(map(str, [sys.executable, *command])), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return folder / "run"


def _bench_drafts(options: argparse.Namespace, model: Transformer) -> None:
    for at_once in (1, min(len(BEGINNINGS), model.args.max_batch_size)):
        rows: list[tuple[object, ...]] = [("texts", "choice", "drafts", "bytes/s", "without", "ratio", "accepted")]
        groups = [BEGINNINGS[i : i + at_once] for i in range(0, len(BEGINNINGS), at_once)]
        for temperature in (0.0, 0.8):
            drafts = range(1 + max(3, model.args.n_mtp_layers))
            ways = [Sampling(temperature, max_new_tokens=options.bytes, speculate=n) for n in drafts]
            tallies = [Tally() for _ in ways]
            actions = [partial(write_all, model, groups, *pair) for pair in zip(ways, tallies, strict=True)]
            counts = [action() for action in actions]
            speeds = [n / time for n, time in zip(counts, seconds(options.repeat, *actions), strict=True)]
            for n, tally, speed in list(zip(drafts, tallies, speeds, strict=True))[1:]:
                how, accepted = "sampled" if temperature else "greedy", tally.accepted / max(tally.drafted, 1)
                figures = f"{speed:.0f}", f"{speeds[0]:.0f}", speed / speeds[0], f"{accepted:.0%}"
                rows.append((at_once, how, n, *figures))
        print_table(*rows)


def write_all(model: Transformer, groups: list[list[bytes]], sampling: Sampling, tally: Tally) -> int:
    """Continues groups of texts, one group after the other; returns how many bytes that gave."""
    return sum(len(text) for group in groups for text in write(model, group, sampling, tally))


def gpu_model(args: ModelArgs, width: str) -> Transformer:
    """A random model on a GPU that never ends a text, with its decoder; linear layers' weights are in `width`."""
    with torch.device("cuda"):
        model = Transformer(args, torch.bfloat16, init=False).eval().requires_grad_(False)
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        p.data = torch.ones_like(p) if p.ndim == 1 else torch.randn_like(p) * p.shape[-1] ** -0.5
        if p.ndim > 1 and "gate" not in name:
            p.data = p.data.bfloat16()
    model.head.weight *= 4
    model.head.weight[0] = 0
    for layer in model.fp8_layers() if width == "fp8" else []:
        layer.weight.data, layer.scale = fp8_ops.weight_quant(layer.weight)
    start = time.perf_counter()
    attached(model)
    print(f"{width}: attached {type(model.decoder).__name__} in {time.perf_counter() - start:.1f} s", flush=True)
    return model


def same_bytes(model: Transformer) -> str:
    """How many of 64 greedy texts the modules continue by the same 16 bytes."""
    starts = [bytes([65 + i % 60, 60 + i // 2]) * 20 for i in range(64)]
    sampling = Sampling(0, max_new_tokens=16)
    ours, decoder, model.decoder = write(model, starts, sampling), model.decoder, None
    theirs, model.decoder = write(model, starts, sampling), decoder
    return f"{sum(a == b for a, b in zip(ours, theirs, strict=True))} of 64"


def bench_gpu(options: argparse.Namespace, folder: Path) -> None:
    """What a GPU's decoder writes in a second."""
    if not torch.cuda.is_available():
        print("no GPU\n")
        return
    print(torch.cuda.get_device_name(), flush=True)
    rows: list[tuple[object, ...]] = [
        ("config", "weights", "texts", "choice", "bytes/s", "MBU", "texts as the modules'")
    ]
    for name in options.config:
        for width in ("bf16", "fp8"):
            model = gpu_model(config_of(name, max_batch_size=64), width)
            same = same_bytes(model)
            for n_texts, temperature in ((1, 0.0), (1, 0.8), (64, 0.0), (64, 0.8)):
                tally = Tally(reads=metrics.MemoryReads(model))
                sampling = Sampling(temperature, max_new_tokens=options.bytes)
                action = partial(write, model, prompts(n_texts), sampling, tally)
                n = sum(map(len, action()))
                speed = n / seconds(options.repeat, action)[0]
                mbu = tally.reads.mbu(torch.device("cuda"))
                how = "sampled" if temperature else "greedy"
                rows.append((name, width, n_texts, how, f"{speed:.0f}", mbu, same))
            del model
    print_table(*rows)
    model = gpu_model(config_of("small", max_seq_len=16384 + 64, original_seq_len=16384 + 64), "bf16")
    step, replay = model.decoder.recorded(1)
    cache, times = model.new_cache(1, 16384 + 64), []
    for length in (64, 16384):
        for _ in range(2):
            step.place(cache, [0], [length])
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(metrics.MBU_STEPS // 4):
                replay()
            torch.cuda.synchronize()
            took = time.perf_counter() - start
        times.append(took / (metrics.MBU_STEPS // 4) * 1e6)
    print_table(("us after 64", "us after 16,384", "ratio"), (*times, times[1] / times[0]))


BENCHES = {
    "transformers": bench_transformers,
    "weights": bench_weights,
    "context": bench_context,
    "sparse": partial(bench_context, name="long", near=2048, far=16384),
    "prefill": bench_prefill,
    "loss": bench_loss,
    "attach": bench_attach,
    "speculation": bench_speculation,
    "gpu": bench_gpu,
}


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=BENCHES, default=list(BENCHES), help="which (default: all)")
    parser.add_argument("--ckpt-path", type=Path, help="what train.py saved; for drafts, with MTP modules")
    parser.add_argument("--config", nargs="+", default=["small", "base", "large"], help="whose shapes a GPU decodes")
    parser.add_argument("--minutes", type=float, default=3.0, help="of training where there is none (default: 3)")
    parser.add_argument("--bytes", type=int, default=64, help="to write at a time (default: 64)")
    parser.add_argument("--repeat", type=int, default=5, help="turns, of which the median counts (default: 5)")
    parser.add_argument("--dtype", choices=["auto", "fp32", "bf16"], default="auto", help="as generate.py's")
    parser.add_argument(
        "--weights", choices=["fp32", "bf16", "fp8"], help="likewise, against transformers and of drafts"
    )
    parser.add_argument("--threads", type=int, help="of torch (default: torch's own choice)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    model_module.attn_impl = "absorb"
    for name in options.only:
        print(f"{name}, {torch.get_num_threads()} threads\n")
        with tempfile.TemporaryDirectory() as folder:
            BENCHES[name](options, Path(folder))


if __name__ == "__main__":
    main()

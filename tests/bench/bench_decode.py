"""How fast text is decoded, as ratios of what takes turns within one run: the median of each.

    python tests/bench/bench_decode.py [--only NAME ...] [--ckpt-path DIR] [--minutes M] [--repeat N] …

transformers  its `generate`, one and sixteen texts at a time, both from one checkpoint of 17 million random weights in
              bfloat16, as models are published; with --dtype fp32, greedy texts are the same
context       a byte after 4,096 others, against one after 64 (configs/small.json)
prefill       reading 4,096 bytes into the cache, against the forward pass of training
attach        comparing a decoder with the modules when it is attached, in milliseconds (configs/nano.json, small.json)
speculation   drafting so many bytes at a time by the MTP modules, against not: the checkpoint of --ckpt-path continues
              beginnings of lines of Python, or else nano.json with a module, after --minutes on the standard library
fp8           an FP8 checkpoint, against the same in float32 and bfloat16
graphs        on a GPU, calls that were recorded against launching their kernels one by one (configs/small.json)
"""

import argparse
import json
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

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT)]


import convert  # noqa: E402
import decode  # noqa: E402
import generate  # noqa: E402
import model as model_module  # noqa: E402
import parallel  # noqa: E402
from checkpoint import save_model  # noqa: E402
from convert import load_model  # noqa: E402
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


def small(max_seq_len: int, device: str = "cpu") -> Transformer:
    """`configs/small.json` with another context and random weights, in the dtype that generate.py would take."""
    config = json.loads((ROOT / "configs" / "small.json").read_text())
    config.pop("train")
    args = ModelArgs.from_dict(config | {"max_seq_len": max_seq_len, "original_seq_len": max_seq_len})
    model, dtype = random_model(args), parallel.pick_dtype(device)
    model.compute_dtype = dtype
    return attached(model.to(device, dtype))


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
    dtype = parallel.pick_dtype("cpu", options.dtype)
    save_model(random_model(ModelArgs.from_dict(SHAPE)), folder / "random")
    convert.convert(folder / "random", folder / "hf", is_hf=True, dtype="bf16")
    ours = attached(load_model(folder / "hf", "cpu", dtype))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=dtype).eval()
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


def bench_context(options: argparse.Namespace, folder: Path) -> None:
    """A byte late in the context against one early."""
    model = small(4096 + 64)
    rows: list[tuple[object, ...]] = [("texts", "ms after 64 bytes", "ms after 4,096", "ratio")]
    for n_rows in (1, 4):
        cache = model.new_cache(n_rows, 4096 + 64)
        for layer in cache.layers:
            layer[0].normal_()

        early, late = seconds(3 * options.repeat, *(partial(step, model, cache, length) for length in (64, 4096)))
        rows.append((n_rows, early / 16 * 1e3, late / 16 * 1e3, late / early))
    print_table(*rows)


def bench_prefill(options: argparse.Namespace, folder: Path) -> None:
    """Reading a prompt against the forward pass of training."""
    model, text = small(4096), bytes(range(65, 129)) * 64

    @torch.inference_mode()
    def read() -> None:
        generate.prefill(model, [text], model.new_cache(1, 4096))

    @torch.inference_mode()
    def forward() -> None:
        model_module.attn_impl = "naive"
        model(torch.tensor([list(text)]))
        model_module.attn_impl = "absorb"

    one, other = seconds(options.repeat, read, forward)
    print_table(
        ("prefill of 4,096 bytes, bytes/s", "training's forward pass", "ratio"),
        (f"{len(text) / one:.0f}", f"{len(text) / other:.0f}", other / one),
    )


def bench_attach(options: argparse.Namespace, folder: Path) -> None:
    """What the comparison takes."""
    rows: list[tuple[object, ...]] = [("model", "computes in", "ms to attach")]
    for name in ("nano", "small"):
        config = json.loads((ROOT / "configs" / f"{name}.json").read_text())
        config.pop("train")
        for dtype in (torch.float32, torch.bfloat16):
            model = random_model(ModelArgs.from_dict(config)).to(dtype)
            model.compute_dtype = dtype
            rows.append((name, str(dtype)[6:], seconds(options.repeat, partial(attached, model))[0] * 1e3))
    print_table(*rows)


def bench_speculation(options: argparse.Namespace, folder: Path) -> None:
    """With drafts against without."""
    path = options.ckpt_path
    if path is None:
        path = folder / "run"
        config = json.loads((ROOT / "configs" / "nano.json").read_text()) | {"n_mtp_layers": 1}
        (folder / "config.json").write_text(json.dumps(config))
        train = ["train.py", "--config", folder / "config.json", "--save-path", path, "--minutes", options.minutes]
        subprocess.run(list(map(str, [sys.executable, *train])), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    dtype = parallel.pick_dtype("cpu", options.dtype)
    model = attached(load_model(path, "cpu", dtype))
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


def bench_fp8(options: argparse.Namespace, folder: Path) -> None:
    """An FP8 checkpoint against others of the same weights."""
    save_model(random_model(ModelArgs.from_dict(SHAPE)), folder / "plain")
    convert.convert(folder / "plain", folder / "fp8", dtype="fp8")
    sampling = Sampling(0, max_new_tokens=options.bytes)
    rows: list[tuple[object, ...]] = [("texts", "computes in", "bytes/s of FP8", "of float32", "ratio")]
    for dtype in (torch.float32, torch.bfloat16):
        models = [attached(load_model(folder / name, "cpu", dtype)) for name in ("fp8", "plain")]
        for n_rows in (1, 16):
            times = seconds(options.repeat, *(partial(write, model, prompts(n_rows), sampling) for model in models))
            speeds = [n_rows * options.bytes / t for t in times]
            rows.append((n_rows, str(dtype)[6:], *(f"{speed:.0f}" for speed in speeds), speeds[0] / speeds[1]))
    print_table(*rows)


def bench_graphs(options: argparse.Namespace, folder: Path) -> None:
    """On a GPU, with recorded calls against without."""
    if not torch.cuda.is_available() or not decode.GraphDecoder.suits(model := small(512, "cuda")):
        print("no GPU on which calls can be recorded\n")
        return
    rows: list[tuple[object, ...]] = [("texts", "bytes/s", "kernel by kernel", "ratio")]
    for n_rows in (1, 8):
        sampling, recorder = Sampling(0, max_new_tokens=256), decode.GraphDecoder(model)

        def decode_by(decoder: decode.GraphDecoder | None, n_rows: int = n_rows, sampling: Sampling = sampling) -> None:
            model.decoder = decoder
            write(model, prompts(n_rows), sampling)

        times = seconds(options.repeat, partial(decode_by, recorder), partial(decode_by, None))
        one, other = (n_rows * sampling.max_new_tokens / t for t in times)
        rows.append((n_rows, f"{one:.0f}", f"{other:.0f}", one / other))
    print_table(*rows)


BENCHES = {
    "transformers": bench_transformers,
    "context": bench_context,
    "prefill": bench_prefill,
    "attach": bench_attach,
    "speculation": bench_speculation,
    "fp8": bench_fp8,
    "graphs": bench_graphs,
}


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=BENCHES, default=list(BENCHES), help="which (default: all)")
    parser.add_argument("--ckpt-path", type=Path, help="a trained model with an MTP module")
    parser.add_argument("--minutes", type=float, default=3.0, help="of training where there is none (default: 3)")
    parser.add_argument("--bytes", type=int, default=64, help="to write at a time (default: 64)")
    parser.add_argument("--repeat", type=int, default=5, help="turns, of which the median counts (default: 5)")
    parser.add_argument(
        "--dtype", choices=["fp32", "bf16"], default="fp32", help="against transformers, of both; and of speculation"
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

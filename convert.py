"""Converts a checkpoint: cuts it for a number of processes, to Hugging Face's format or back, to another dtype.

    python convert.py --ckpt-path SRC --save-path DST [--model-parallel N] [--format native|hf] [--dtype fp32|bf16|fp8]

Every conversion copies rectangles: it reads a band of rows from wherever its pieces are, changes its dtype if need be,
and writes its parts to wherever they belong. Nothing larger than a band is in memory, each byte is read and written
once, and several tensors are on their way at a time. What is where before and after, headers alone tell: the plan is
made, and refused if it must be, before any tensor is read.
"""

import argparse
import math
import os
import re
import shutil
import sys
import threading
from collections.abc import Set
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from checkpoint import (
    CONFIG_DTYPES,
    CONFIG_FILE,
    GENERATION_FILE,
    INDEX_FILE,
    STATE_FILE,
    Checkpoint,
    check_parallel,
    cut,
    holders,
    is_matrix,
    native_file,
    open_checkpoint,
    run_command,
    scale_name,
)
from fp8_ops import BLOCK, E4M3
from huggingface import byte_tokenizer, hf_config, hf_name, mtp_copies
from model import ConfigError, ModelArgs
from tensor_files import (
    DTYPE_NAMES,
    Box,
    CheckpointError,
    Entry,
    Output,
    Piece,
    Stored,
    inside,
    is_aligned,
    naming,
    new_folder,
    read_json,
    resolved,
    temporary_path,
    write_all,
    write_json,
)

MAX_FILE_BYTES = 5 * 10**9  # of a Hugging Face checkpoint's files
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}


@dataclass
class Job:
    """A tensor on its way.

    Attributes:
        source: Where it is.
        dtype: What it becomes.
        parts: Where it goes: rectangles in files to be written.
    """

    source: Stored
    dtype: torch.dtype
    parts: list[Piece] = field(default_factory=list)


def make_plan(
    checkpoint: Checkpoint, world: int = 1, is_hf: bool = False, dtype: str | None = None
) -> tuple[list[Output], list[Job], dict[str, dict[str, Any]]]:
    """Lays out a conversion, for which no tensor need be read.

    Args:
        checkpoint: What to convert.
        world: Into how many shards, for the native format.
        is_hf: Into Hugging Face's format, which has no shards.
        dtype: What the linear layers become: "fp32", "bf16", "fp8", or None: what they are.

    Returns:
        The files of tensors, what goes into them, and the JSON files beside them.

    Raises:
        CheckpointError: The model cannot be cut so, or has a dtype that must be changed.
        ConfigError: No class of transformers is like this model.
    """
    args = checkpoint.args
    jobs = {name: Job(source, _new_dtype(checkpoint, name, dtype)) for name, source in checkpoint.tensors.items()}
    is_fp8 = any(job.dtype == E4M3 for job in jobs.values())
    matrices = [job.dtype for name, job in jobs.items() if is_matrix(name, job.source.shape) and job.dtype != E4M3]
    rest = max(matrices, key=lambda dtype: dtype.itemsize)  # a model is loaded in one dtype, and all must fit into it
    if is_hf:
        with naming(checkpoint.folder / CONFIG_FILE):
            config = hf_config(args, rest, is_fp8)
        _check_blocks(jobs)
    else:
        check_parallel(args, world)
        config = args.to_dict() | {"dtype": "fp8" if is_fp8 else CONFIG_DTYPES[rest]}
    outputs = _lay_out(jobs, args, world, is_hf)
    texts = {CONFIG_FILE: config}
    if is_hf:
        ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
        if args.vocab_size == 256:
            texts |= byte_tokenizer(args.max_seq_len)
        else:  # of a tokenizer that only the source knows
            ids = {key: checkpoint.config.get(key) for key in ids}
            if (path := checkpoint.folder / GENERATION_FILE).exists():
                ids |= {key: value for key, value in read_json(path, ConfigError).items() if value is not None}
            config |= {key: checkpoint.config.get(key, ids[key]) for key in config.keys() & ids.keys()}
        texts |= {INDEX_FILE: make_index(outputs), GENERATION_FILE: ids}
    return outputs, list(jobs.values()), texts


def _lay_out(jobs: dict[str, Job], args: ModelArgs, world: int, is_hf: bool) -> list[Output]:
    """Lays out the files of tensors, and tells the jobs where in them their parts go."""
    names = {name: [hf_name(name, args) if is_hf else name] for name in jobs}
    for name, copy in mtp_copies(args) if is_hf else ():
        names[name].append(copy)
    parts = []
    contents: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{} for _ in range(world)]
    for name, job in jobs.items():
        shape = job.source.shape
        for rank in holders(name, args.n_routed_experts, world):
            box = cut(name, shape, args.n_routed_experts, rank, world)
            for known in names[name]:
                parts.append((job, box, rank, known))
                contents[rank][known] = job.dtype, box.shape[-len(shape) :]
                if job.dtype == E4M3:
                    scales = tuple(-(-n // BLOCK) for n in box.shape)
                    contents[rank][scale_name(known, is_hf)] = torch.float32, scales
    if is_hf:
        outputs = _split(contents[0])
        entries = [{name: entry for output in outputs for name, entry in output.entries.items()}]
    else:
        outputs = [Output(native_file(rank, world), content) for rank, content in enumerate(contents)]
        entries = [output.entries for output in outputs]
    for job, box, rank, known in parts:
        job.parts.append(Piece(entries[rank][known], box, entries[rank].get(scale_name(known, is_hf))))
    return outputs


def _check_blocks(jobs: dict[str, Job]) -> None:
    """Refuses FP8 weights that transformers would dequantise with the scales of other blocks.

    It takes a block for as large as rows divided by rows of scales, which in 192 rows with two is 96 and not 128. Where
    that division has a remainder, as in the 576 rows that DeepSeek-V3 has itself, it does not dequantise but says so,
    and its FP8 kernels know of blocks of 128.
    """
    for job in jobs.values():
        shape = job.source.shape
        if job.dtype == E4M3 and any(n > BLOCK and n % BLOCK and n % -(-n // BLOCK) == 0 for n in shape):
            raise CheckpointError(
                f"{job.source.pieces[0].entry} {list(shape)} would be misread by transformers in FP8, which wants sizes"
                f" that are multiples of {BLOCK}; take --dtype bf16"
            )


def _new_dtype(checkpoint: Checkpoint, name: str, wanted: str | None) -> torch.dtype:
    """What a tensor becomes: norms and the router keep their precision, unless all is to be fp32."""
    source = checkpoint.tensors[name]
    if wanted == "fp8" and name in checkpoint.fp8_layers:
        return E4M3
    if wanted == "bf16" and is_matrix(name, source.shape):
        return torch.bfloat16
    if wanted is None and source.dtype not in CONFIG_DTYPES:
        raise CheckpointError(
            f"{source.pieces[0].entry} is {DTYPE_NAMES[source.dtype]}: choose a --dtype for the new one"
        )
    return torch.float32 if wanted == "fp32" or source.dtype not in CONFIG_DTYPES else source.dtype


def _split(tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> list[Output]:
    """Deals tensors out to files of at most 5 GB, in their order."""
    groups, size = [], MAX_FILE_BYTES
    for name, (dtype, shape) in tensors.items():
        n_bytes = math.prod(shape) * dtype.itemsize + len(name) + 150  # with what the header says
        if size + n_bytes > MAX_FILE_BYTES:
            groups.append({})
            size = 0
        groups[-1][name] = dtype, shape
        size += n_bytes
    return [Output(f"model-{i:05d}-of-{len(groups):05d}.safetensors", group) for i, group in enumerate(groups, 1)]


def make_index(outputs: list[Output]) -> dict[str, Any]:
    """The index of a Hugging Face checkpoint: the size of its tensors and the file of each."""
    total = sum(entry.n_bytes for output in outputs for entry in output.entries.values())
    where = {name: output.name for output in outputs for name in output.entries}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}


def write_tensors(folder: Path, outputs: list[Output], jobs: list[Job], scale_fmt: str | None, progress: bool) -> None:
    """Writes files of tensors, several tensors at a time; the first error stops all.

    Args:
        folder: Where to.
        outputs: The files.
        jobs: What goes into them.
        scale_fmt: Format of new scales, as in `ModelArgs`.
        progress: Whether to show a bar on stderr, if that is a terminal.
    """
    for output in outputs:
        output.create(folder)
    total = sum(entry.n_bytes for output in outputs for entry in output.entries.values())
    with (
        tqdm(total=total, unit="B", unit_scale=True, disable=None if progress else True, dynamic_ncols=True) as bar,
        ThreadPoolExecutor(min(8, os.cpu_count() or 1), initializer=torch.set_num_threads, initargs=(1,)) as executor,
    ):
        transfer = _Transfer(folder, scale_fmt, bar)
        try:
            futures = [executor.submit(transfer.run, job) for job in jobs]
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                future.result()
        finally:
            transfer.stop.set()
            executor.shutdown(cancel_futures=True)


class _Transfer:
    """How a tensor gets into its files, in any of several threads.

    Attributes:
        stop: Set to have all threads end soon.
    """

    def __init__(self, folder: Path, scale_fmt: str | None, bar: tqdm):
        self.folder, self.scale_fmt, self.bar = folder, scale_fmt, bar
        self.stop, self._lock = threading.Event(), threading.Lock()

    def run(self, job: Job) -> None:
        """Reads a tensor band by band, each as what it becomes, and writes all of its parts."""
        source, scales = job.source, []
        quantises = job.dtype == E4M3 != source.dtype
        # blocks are counted over the whole tensor if they can be cut, else over each part
        whole = not quantises or all(is_aligned(part.box) for part in job.parts)
        for region in [source.box] if whole else dict.fromkeys(part.box for part in job.parts):
            found = []
            for band in source.bands(region, 1 if job.dtype == source.dtype else BLOCK):
                if self.stop.is_set():
                    return
                if quantises:
                    data, s = source.read_fp8(band, self.scale_fmt)
                    found.append(s)
                elif job.dtype == source.dtype:
                    data = source.read_bytes(band)
                else:
                    data = source.read(band, job.dtype)
                    _check_finite(source, band, data)
                self._place(job, band, data.view(torch.uint8))
            if quantises:
                scales.append((region, torch.cat(found)))
                if not scales[-1][1].isfinite().all():
                    raise CheckpointError(f"{source.pieces[0].entry} holds NaN or infinity")
        if job.dtype == E4M3:
            scales = scales or source.read_scales()
            for part in job.parts:
                self._write(part.scale, 0, source.scales(scales, part.box))

    def _place(self, job: Job, band: Box, data: torch.Tensor) -> None:
        """Writes what the parts have of a band, which is uint8 (rows, bytes of a row)."""
        size = job.dtype.itemsize
        for part in job.parts:
            if (shared := part.box.meet(band)) is not None:
                rows, cols = shared.within(band)
                start = (shared.top - part.box.top) * part.box.shape[1] * size
                self._write(part.entry, start, data[rows, cols.start * size : cols.stop * size])

    def _write(self, entry: Entry, offset: int, data: torch.Tensor) -> None:
        with open(self.folder / entry.path, "r+b", buffering=0) as file:
            file.seek(entry.offset + offset)
            write_all(file, data)
        with self._lock:
            self.bar.update(data.nbytes)


def _check_finite(source: Stored, band: Box, data: torch.Tensor) -> None:
    """Refuses numbers that have become infinite in their new dtype."""
    if data.sum().isfinite():  # as almost always; the quickest to compute that tells
        return
    before = 0 if source.dtype == E4M3 else source.read_bytes(band).view(source.dtype).isinf().sum()
    if data.isinf().sum() > before:
        dtype = str(data.dtype).removeprefix("torch.")
        raise CheckpointError(f"{source.pieces[0].entry} has numbers that are too large for {dtype}")


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    world: int = 1,
    is_hf: bool = False,
    dtype: str | None = None,
    progress: bool = False,
) -> None:
    """Converts a checkpoint; `target` appears when it is complete, or not at all.

    Args:
        source: A checkpoint's folder, of either format, or a run's, of which the best checkpoint is taken.
        target: The folder to make; it must not exist, or be empty.
        world: Into how many shards, for the native format.
        is_hf: Into Hugging Face's format instead.
        dtype: What the linear layers become: "fp32", "bf16", "fp8", or None: what they are.
        progress: Whether to show a bar on stderr.

    Raises:
        CheckpointError: The source is damaged or cannot be converted so, or the target cannot be written.
        ConfigError: The source's config is not one of a model, or not one that transformers has.
    """
    check_paths(Path(source), Path(target))
    checkpoint = open_checkpoint(source)
    outputs, jobs, texts = make_plan(checkpoint, world, is_hf, dtype)
    with new_folder(Path(target)) as folder:
        if checkpoint.args.vocab_size != 256:  # its tokenizer goes with it, whatever files that has
            copy_files(checkpoint.folder, folder, {CONFIG_FILE, INDEX_FILE, STATE_FILE})
        for name, text in texts.items():
            write_json(folder / name, text)
        write_tensors(folder, outputs, jobs, checkpoint.args.scale_fmt, progress)


def check_paths(source: Path, target: Path) -> None:
    """Refuses a target that is the source, or within it, or is made where the source is.

    Raises:
        CheckpointError: With what is wrong.
    """
    home, end = resolved(source), resolved(target)
    if end == home or home in end.parents:
        raise CheckpointError(f"{target} is {source} or inside it; choose another path")
    if end.name and temporary_path(end) in (home, *home.parents):
        raise CheckpointError(f"{source} is where {target} would be made; choose another path")


def copy_files(source: Path, target: Path, skipped: Set[str]) -> None:
    """Copies a folder's files, but for those with weights, and some by name."""
    for path in source.iterdir():
        if path.is_file() and path.suffix not in WEIGHT_SUFFIXES and path.name not in skipped:
            shutil.copyfile(inside(source, path.name), target / path.name)


def _shards(text: str) -> int:
    if not re.fullmatch("[1-9][0-9]{0,3}", text):
        raise argparse.ArgumentTypeError(f"must be a number from 1 to 9999, got {text[:20]!r}")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        description="Converts a checkpoint: cuts it for a number of processes, to Hugging Face's format or back, to "
        "another dtype. The source may be in either format, cut or not, FP8 or not: that is found out."
    )
    parser.add_argument("--ckpt-path", type=Path, required=True, metavar="SRC", help="a checkpoint's or a run's folder")
    parser.add_argument("--save-path", type=Path, required=True, metavar="DST", help="the folder to make")
    parser.add_argument("--model-parallel", type=_shards, default=1, metavar="N", help="number of shards (default: 1)")
    parser.add_argument("--format", choices=("native", "hf"), default="native", help="(default: native)")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp8"), help="of linear layers (default: as they are)")
    args = parser.parse_args(argv)
    is_hf = args.format == "hf"
    if is_hf and args.model_parallel > 1:
        parser.error("--model-parallel is for --format native; transformers cuts a model by itself")
    return run_command(
        "convert.py", lambda: convert(args.ckpt_path, args.save_path, args.model_parallel, is_hf, args.dtype, True)
    )


if __name__ == "__main__":
    sys.exit(main())

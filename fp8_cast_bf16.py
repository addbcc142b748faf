"""FP8 checkpoint to BF16 checkpoint, in Hugging Face's layout, as DeepSeek publishes its models.

    python fp8_cast_bf16.py --input-fp8-hf-path DIR --output-bf16-hf-path DIR

An FP8 weight is stored with a scale for each block of 128×128, in a tensor named `…weight_scale_inv` that may be in
another file than the weight. The number meant is the product, and that is what is written. A stack of experts (n, rows,
columns) has scales (n, ⌈rows/128⌉, ⌈columns/128⌉). Everything else stays as it is: the files and their names, the
tensors in other dtypes, the tokenizer. The scales are left out, and with them their entries in the index, files that
have nothing else, and the `quantization_config`.

It works in bands of some rows, several tensors at a time, so that memory does not grow with the checkpoint, and on the
CPU, which is about as fast at this as at copying. The output folder appears when it is complete; after an interruption
the next run starts over.

Unlike convert.py, which does the same with `--dtype bf16` to a model that it knows, this looks at names and dtypes only
and so takes a model of any architecture.
"""

if __name__ == "__main__":
    import command

    command.start()

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from checkpoint import CONFIG_FILE, INDEX_FILE
from command import Parser
from convert import (
    Job,
    check_paths,
    check_quantization,
    copy_files,
    hf_scale_name,
    make_index,
    read_hf_headers,
    run_conversion,
    shown_dict,
    write_tensors,
)
from fp8_ops import E4M3
from model import ConfigError
from safetensors_io import (
    DTYPE_NAMES,
    CheckpointError,
    SafetensorsWriter,
    ShardedTensor,
    ShardSlice,
    TensorInfo,
    naming,
    new_folder,
    read_json,
    read_metadata,
    shard_slice,
    write_json,
)

MAX_STACK = 1 << 16  # matrices in a stack, each of which is a task of its own


def cast(source: Path, target: Path, progress: bool = False) -> None:
    """Casts a checkpoint; `target` appears when it is complete, or not at all.

    Args:
        source: A folder with config.json, safetensors files, and their index if there are several.
        target: The folder to make; it must not exist, or be empty.
        progress: Whether to show a bar on stderr.

    Raises:
        CheckpointError: The source is damaged or has nothing to cast, or the target cannot be written.
        ConfigError: The config is damaged, or has another quantisation.
    """
    config = read_json(source / CONFIG_FILE, ConfigError)
    with naming(source / CONFIG_FILE):
        _remove_quantization(config)
    check_paths(source, target)
    outputs, jobs = plan(read_hf_headers(source))
    index, has_index = make_index(outputs), (source / INDEX_FILE).exists()
    if has_index:
        with naming(source / INDEX_FILE):
            before = shown_dict("metadata", read_json(source / INDEX_FILE, CheckpointError).get("metadata") or {})
        index["metadata"] = before | index["metadata"]
    with new_folder(target) as folder:
        copy_files(source, folder, set())
        write_json(folder / CONFIG_FILE, config)
        if has_index:
            write_json(folder / INDEX_FILE, index)
        write_tensors(folder, outputs, jobs, None, progress)


def _remove_quantization(config: dict[str, Any]) -> None:
    """Removes the `quantization_config` of a config, and of those within it; refuses one that is not of FP8."""
    check_quantization(config.pop("quantization_config", None))
    for value in config.values():
        if isinstance(value, dict):
            _remove_quantization(value)


def plan(infos: dict[str, TensorInfo]) -> tuple[list[SafetensorsWriter], list[Job]]:
    """Lays the new files out, for which no tensor need be read.

    Args:
        infos: The tensors that there are.

    Returns:
        The files, with the names that they have now, and what goes into them.

    Raises:
        CheckpointError: A weight without scale, a scale without weight, a wrong shape or dtype; or nothing is FP8.
    """
    scales = {name: info for name, info in infos.items() if name.endswith("_scale_inv")}
    weights = {name: info for name, info in infos.items() if name not in scales}
    jobs: dict[str, list[Job]] = {}
    contents: dict[Path, dict[str, tuple[torch.dtype, tuple[int, ...]]]] = {}
    for name, info in weights.items():
        is_fp8 = info.dtype == E4M3
        dtype = torch.bfloat16 if is_fp8 else info.dtype
        pairs = _matrices(info, scales.pop(hf_scale_name(name), None)) if is_fp8 else [(info, None)]
        jobs[name] = [Job(_one_file(matrix, scale), dtype) for matrix, scale in pairs]
        contents.setdefault(info.path, {})[name] = dtype, info.shape
    for name, info in scales.items():
        weight = weights.get(name.removesuffix("_scale_inv"))
        if weight is None:
            raise CheckpointError(f"{info} is the scale of a weight that is missing")
        raise CheckpointError(
            f"{info} is the scale of a weight in {DTYPE_NAMES[weight.dtype]}; only F8_E4M3 has scales"
        )
    if all(info.dtype != E4M3 for info in weights.values()):
        raise CheckpointError("no tensor of the checkpoint is FP8 (F8_E4M3): there is nothing to cast")
    outputs = [SafetensorsWriter(path.name, tensors, read_metadata(path)) for path, tensors in contents.items()]
    for output in outputs:
        for name, place in output.infos.items():
            for i, job in enumerate(jobs[name]):
                place_of_job = _nth_matrix(place, i) if len(jobs[name]) > 1 else place
                job.parts.append(ShardSlice(place_of_job, job.source.box))
    return outputs, [job for several in jobs.values() for job in several]


def _matrices(info: TensorInfo, scale: TensorInfo | None) -> Iterator[tuple[TensorInfo, TensorInfo | None]]:
    """The matrices of an FP8 tensor, which is one or a stack of them, each with its scales."""
    if len(info.shape) == 2:
        yield info, scale
        return
    if len(info.shape) != 3 or info.shape[0] > MAX_STACK:
        wanted = f"a matrix or a stack of at most {MAX_STACK} matrices"
        raise CheckpointError(f"{info} is FP8 of shape {list(info.shape)}; an FP8 weight must be {wanted}")
    if scale is None or len(scale.shape) != 3 or scale.shape[0] != info.shape[0]:
        got = "missing" if scale is None else f"of shape {list(scale.shape)}"
        raise CheckpointError(f"{info} is a stack {list(info.shape)} in FP8, but its scale is {got}")
    for i in range(info.shape[0]):
        yield _nth_matrix(info, i), _nth_matrix(scale, i)


def _nth_matrix(stack: TensorInfo, i: int) -> TensorInfo:
    shape = stack.shape[1:]
    return stack._replace(shape=shape, offset=stack.offset + i * math.prod(shape) * stack.dtype.itemsize)


def _one_file(info: TensorInfo, scale: TensorInfo | None) -> ShardedTensor:
    """A tensor that is in one file, as a source."""
    source = ShardedTensor(info.name, info.shape, info.dtype)
    source.shards.append(shard_slice(info, source.box, scale))
    return source


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser("fp8_cast_bf16.py", description="Casts an FP8 checkpoint in Hugging Face's layout to BF16.")
    parser.add_argument("--input-fp8-hf-path", type=Path, required=True, metavar="DIR", help="the checkpoint's folder")
    parser.add_argument("--output-bf16-hf-path", type=Path, required=True, metavar="DIR", help="the folder to make")
    args = parser.parse_args(argv)
    return run_conversion("fp8_cast_bf16.py", lambda: cast(args.input_fp8_hf_path, args.output_bf16_hf_path, True))


if __name__ == "__main__":
    sys.exit(main())

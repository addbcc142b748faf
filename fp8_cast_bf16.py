"""FP8 checkpoint to BF16 checkpoint, in Hugging Face's layout, as DeepSeek publishes its models.

    python fp8_cast_bf16.py --input-fp8-hf-path DIR --output-bf16-hf-path DIR

An FP8 weight is stored with a scale for each block of 128×128, in a tensor named `…weight_scale_inv` that may be in
another file than the weight; a stack of experts (n, rows, columns) has scales (n, ⌈rows/128⌉, ⌈columns/128⌉). The
product is written. The scales are left out, and with them their entries in the index, files that have nothing else, and
the `quantization_config`. Everything else stays as it is.

It works on the CPU, in bands of some rows, several tensors at a time, so that memory does not grow with the checkpoint.
The output folder appears when it is complete. Unlike `convert.py --dtype bf16`, this takes a model of any architecture.
"""

if __name__ == "__main__":
    import command

    command.start()

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from checkpoint import CONFIG_FILE, INDEX_FILE
from command import Parser
from convert import (
    Job,
    build_index,
    check_paths,
    check_quantization,
    copy_files,
    hf_scale_name,
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
    """Casts the checkpoint in a folder; `target`, a new folder, appears when it is complete, or not at all.

    Raises:
        CheckpointError: The source is damaged or has nothing to cast, or the target cannot be written.
        ConfigError: The config is damaged, or has another quantisation.
    """
    config = read_json(source / CONFIG_FILE, ConfigError)
    with naming(source / CONFIG_FILE):
        _remove_quantization(config)
    check_paths(source, target)
    outputs, jobs = plan(read_hf_headers(source))
    index, has_index = build_index(outputs), (source / INDEX_FILE).exists()
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
    """Lays the new files out, from the tensors that there are: the files, and the jobs that fill them.

    Raises:
        CheckpointError: A weight without scale, a scale without weight, a wrong shape or dtype; or nothing is FP8.
    """
    scales = {name: info for name, info in infos.items() if name.endswith("_scale_inv")}
    weights = {name: info for name, info in infos.items() if name not in scales}
    if all(info.dtype != E4M3 for info in weights.values()):
        raise CheckpointError("no tensor of the checkpoint is FP8 (F8_E4M3): there is nothing to cast")
    contents: dict[Path, dict[str, tuple[torch.dtype, tuple[int, ...]]]] = {}
    for name, info in weights.items():
        dtype = torch.bfloat16 if info.dtype == E4M3 else info.dtype
        contents.setdefault(info.path, {})[name] = dtype, info.shape
    outputs = [SafetensorsWriter(path.name, tensors, read_metadata(path)) for path, tensors in contents.items()]
    jobs: list[Job] = []
    for name, target in (item for output in outputs for item in output.infos.items()):
        is_fp8 = weights[name].dtype == E4M3
        jobs += _jobs(weights[name], target, scales.pop(hf_scale_name(name), None) if is_fp8 else None)
    if scales:
        name, info = next(iter(scales.items()))
        weight = weights.get(name.removesuffix("_scale_inv"))
        has = "is missing" if weight is None else f"is {DTYPE_NAMES[weight.dtype]}; only F8_E4M3 has scales"
        raise CheckpointError(f"{info} is the scale of a weight that {has}")
    return outputs, jobs


def _jobs(info: TensorInfo, target: TensorInfo, scale: TensorInfo | None) -> Iterator[Job]:
    """Yields the jobs that write a tensor to `target`: one, or one for each matrix of a stack in FP8."""
    if info.dtype != E4M3 or len(info.shape) == 2:
        source = ShardedTensor(info.name, info.shape, info.dtype)
        source.shards.append(shard_slice(info, source.box, scale))
        yield Job(source, target.dtype, [ShardSlice(target, source.box)])
        return
    if len(info.shape) != 3 or info.shape[0] > MAX_STACK:
        wanted = f"a matrix or a stack of at most {MAX_STACK} matrices"
        raise CheckpointError(f"{info} is FP8 of shape {list(info.shape)}; an FP8 weight must be {wanted}")
    if scale is None or len(scale.shape) != 3 or scale.shape[0] != info.shape[0]:
        got = "missing" if scale is None else f"of shape {list(scale.shape)}"
        raise CheckpointError(f"{info} is a stack {list(info.shape)} in FP8, but its scale is {got}")
    for i in range(info.shape[0]):
        yield from _jobs(_nth_matrix(info, i), _nth_matrix(target, i), _nth_matrix(scale, i))


def _nth_matrix(stack: TensorInfo, i: int) -> TensorInfo:
    matrix = stack._replace(shape=stack.shape[1:])
    return matrix._replace(offset=stack.offset + i * matrix.nbytes)


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser("fp8_cast_bf16.py", description="Casts an FP8 checkpoint in Hugging Face's layout to BF16.")
    parser.add_argument("--input-fp8-hf-path", type=Path, required=True, metavar="DIR", help="the checkpoint's folder")
    parser.add_argument("--output-bf16-hf-path", type=Path, required=True, metavar="DIR", help="a new folder")
    args = parser.parse_args(argv)
    return run_conversion("fp8_cast_bf16.py", lambda: cast(args.input_fp8_hf_path, args.output_bf16_hf_path, True))


if __name__ == "__main__":
    sys.exit(main())

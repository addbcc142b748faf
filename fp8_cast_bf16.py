"""FP8 checkpoint to BF16 checkpoint, in Hugging Face's layout, as DeepSeek publishes its models.

    python fp8_cast_bf16.py --input-fp8-hf-path DIR --output-bf16-hf-path DIR

An FP8 weight is stored with a scale for each block of 128×128, in a tensor named `…weight_scale_inv` that may be in
another file than the weight. The number meant is the product, and that is what is written. Everything else stays as it
is: the files and their names, the tensors in other dtypes, the tokenizer. The scales go, and with them their infos in
the index, files that have nothing else, and the `quantization_config`.

It works in bands of some rows, several tensors at a time, so that memory does not grow with the checkpoint, and on the
CPU, which is about as fast at this as at copying. The output folder appears when it is complete; after an interruption
the next run starts over.

Unlike convert.py, which does the same with `--dtype bf16` to a model that it knows, this looks at names and dtypes only
and so takes a model of any architecture.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from checkpoint import CONFIG_FILE, INDEX_FILE
from convert import (
    Job,
    check_paths,
    check_quantization,
    copy_files,
    make_index,
    read_hf_headers,
    run_conversion,
    shown_dict,
    write_tensors,
)
from fp8_ops import E4M3
from model import ConfigError
from safetensors_io import (
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


def cast(source: Path, target: Path, progress: bool = False) -> None:
    """Casts a checkpoint; `target` appears when it is complete, or not at all.

    Args:
        source: A folder with config.json, safetensors files, and their index if there are several.
        target: The folder to make; it must not exist, or be empty.
        progress: Whether to show a bar on stderr.

    Raises:
        CheckpointError: The source is damaged or has nothing to cast, or the target cannot be written.
        ConfigError: The config is damaged, or speaks of another quantisation.
    """
    config = read_json(source / CONFIG_FILE, ConfigError)
    with naming(source / CONFIG_FILE):
        _remove_quantization(config)
    check_paths(source, target)
    outputs, jobs = plan(read_hf_headers(source))
    index = make_index(outputs)
    if (source / INDEX_FILE).exists():
        told = shown_dict("metadata", read_json(source / INDEX_FILE, CheckpointError).get("metadata") or {})
        index["metadata"] = told | index["metadata"]
    with new_folder(target) as folder:
        copy_files(source, folder, set())
        write_json(folder / CONFIG_FILE, config)
        if (source / INDEX_FILE).exists():
            write_json(folder / INDEX_FILE, index)
        write_tensors(folder, outputs, jobs, None, progress)


def _remove_quantization(config: dict[str, Any]) -> None:
    """Removes what a config, or the config of a part of the model within it, says of FP8; refuses what is not FP8."""
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
    left = dict(infos)
    contents: dict[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]] = {e.path.name: {} for e in infos.values()}
    jobs = {}
    for name, info in infos.items():
        is_fp8 = info.dtype == E4M3
        if name.endswith("_scale_inv"):
            continue
        if is_fp8 and len(info.shape) != 2:
            raise CheckpointError(f"{info} is FP8, but no matrix: {list(info.shape)}")
        stored = ShardedTensor(name, info.shape, info.dtype)
        scale = left.pop(name + "_scale_inv", None) if is_fp8 else None
        stored.shards.append(shard_slice(left.pop(name), stored.box, scale))
        jobs[name] = Job(stored, torch.bfloat16 if is_fp8 else info.dtype)
        contents[info.path.name][name] = jobs[name].dtype, info.shape
    for info in left.values():
        raise CheckpointError(f"{info} is the scale of no FP8 tensor")
    paths = {info.path.name: info.path for info in infos.values()}
    outputs = [
        SafetensorsWriter(file, tensors, read_metadata(paths[file])) for file, tensors in contents.items() if tensors
    ]
    for output in outputs:
        for name, place in output.infos.items():
            jobs[name].parts.append(ShardSlice(place, jobs[name].source.box))
    if all(job.dtype == job.source.dtype for job in jobs.values()):
        raise CheckpointError("no tensor of the checkpoint is FP8: there is nothing to cast")
    return outputs, list(jobs.values())


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description="Casts an FP8 checkpoint in Hugging Face's layout to BF16.")
    parser.add_argument("--input-fp8-hf-path", type=Path, required=True, metavar="DIR", help="the checkpoint's folder")
    parser.add_argument("--output-bf16-hf-path", type=Path, required=True, metavar="DIR", help="the folder to make")
    args = parser.parse_args(argv)
    return run_conversion("fp8_cast_bf16.py", lambda: cast(args.input_fp8_hf_path, args.output_bf16_hf_path, True))


if __name__ == "__main__":
    sys.exit(main())

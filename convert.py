"""Checkpoints: the one place that knows what files a model is kept in, and what its tensors are called there.

A native checkpoint is a folder:

    config.json              the `ModelArgs`
    model0-mp1.safetensors   the weights, in the names of DeepSeek's native inference format
    state.json               where training stood; only in the checkpoints of a run
    state0-mp1.safetensors   the optimizer's tensors, likewise

A run's folder holds checkpoints `step-00000500`, and `checkpoints.json` that says which of them is the last and which
the best. Whatever takes a checkpoint takes a run's folder too, and means its best.

Nothing here is ever seen half-written. A folder is filled under a temporary name, flushed to disk and renamed; then
`checkpoints.json` is replaced; only then is an older checkpoint removed. A crash between any two of these leaves a
`checkpoints.json` that names complete folders, and litter that the next save sweeps up.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from model import ConfigError, ModelArgs, Transformer

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model0-mp1.safetensors"
STATE_FILE = "state.json"
STATE_TENSORS_FILE = "state0-mp1.safetensors"
POINTER_FILE = "checkpoints.json"


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or of another model: the message names the file and the remedy."""


def read_config(path: str | os.PathLike) -> tuple[ModelArgs, dict[str, Any]]:
    """Reads a config file.

    Args:
        path: A JSON file of `ModelArgs` fields; its nested key "train" holds defaults for train.py's flags.

    Returns:
        The model's shape, and the object under "train" (empty without one).

    Raises:
        ConfigError: The file is missing or no JSON object, or a key of it is wrong; the message names both.
    """
    values = _read_json(Path(path), ConfigError)
    train = values.pop("train", {})
    if not isinstance(train, dict):
        raise ConfigError(f"{path}: train must be an object of flags, got {train!r}")
    try:
        return ModelArgs.from_dict(values), train
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def save_model(model: Transformer, path: str | os.PathLike) -> None:
    """Writes a model as a native checkpoint; `path` appears when it is complete, or not at all.

    Raises:
        CheckpointError: `path` exists, or cannot be written.
    """
    with _new_folder(Path(path)) as folder:
        _write_weights(model, folder)


def load_model(path: str | os.PathLike, device: str = "cpu", compute_dtype: torch.dtype = torch.float32) -> Transformer:
    """Loads a model for inference: its matrices are cast once, to the dtype that they compute in.

    Args:
        path: A checkpoint's folder, or a run's, of which the best checkpoint is taken.
        device: Where the model goes.
        compute_dtype: Dtype of activations and of the matrices; the router's stay in float32.

    Raises:
        CheckpointError: No checkpoint there, or one that does not fit its own config.
        ConfigError: Its config is not one of a model.
    """
    folder = _resolve(Path(path), "best")
    args, _ = read_config(folder / CONFIG_FILE)
    model = Transformer(args, compute_dtype)
    _read_weights(model, folder)
    for name, p in model.named_parameters():
        if p.ndim >= 2 and not name.endswith("gate.weight"):
            p.data = p.data.to(compute_dtype)
    return model.to(device).eval().requires_grad_(False)


def has_run(run: Path) -> bool:
    """Whether a folder holds a run that can be resumed."""
    return (run / POINTER_FILE).exists()


def save_run(
    run: Path, model: Transformer, tensors: dict[str, torch.Tensor], state: dict[str, Any], is_best: bool
) -> Path:
    """Writes a checkpoint of a training run, points to it, and removes those that are neither last nor best any more.

    Args:
        run: The run's folder; made if there is none.
        model: The model.
        tensors: What else training needs to go on, by name: the optimizer's state.
        state: The rest of it, ready for JSON; "step" gives the checkpoint its name.
        is_best: Whether this is the best checkpoint so far.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: It cannot be written. What was there before is still whole.
    """
    path = run / f"step-{state['step']:08d}"
    pointer = _read_json(run / POINTER_FILE, CheckpointError) if has_run(run) else {}
    if path.name in pointer.values():  # saved before it was evaluated: the tensors are these
        with _reported(path):
            _replace_json(path / STATE_FILE, state)
    else:
        shutil.rmtree(path, ignore_errors=True)  # complete, but never pointed to: the leftover of a crash
        with _new_folder(path) as folder:
            _write_weights(model, folder)
            save_file(tensors, folder / STATE_TENSORS_FILE, metadata={"format": "pt"})
            _write_json(folder / STATE_FILE, state)
    pointer["last"] = path.name
    if is_best or "best" not in pointer:
        pointer["best"] = path.name
    with _reported(run):
        _replace_json(run / POINTER_FILE, pointer)
    for old in [*run.glob("step-*"), *run.glob(".step-*.tmp")]:
        if old.name not in pointer.values():
            shutil.rmtree(old, ignore_errors=True)
    return path


def load_run(run: Path, model: Transformer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Loads the last checkpoint of a run into `model`; returns the tensors and the state that `save_run` was given.

    Raises:
        CheckpointError: There is none, it is damaged, or it is one of another model.
    """
    folder = _resolve(run, "last")
    args, _ = read_config(folder / CONFIG_FILE)
    ours, theirs = model.args.to_dict(), args.to_dict()
    for key in ours:
        if ours[key] != theirs[key] and key not in ("dtype", "max_batch_size"):
            raise CheckpointError(
                f"{folder} was trained with {key} = {theirs[key]}, the config says {ours[key]}; "
                "resume with the config it began with, or choose another --save-path"
            )
    _read_weights(model, folder)
    with _opened(folder / STATE_TENSORS_FILE) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    return tensors, _read_json(folder / STATE_FILE, CheckpointError)


def _resolve(path: Path, which: str) -> Path:
    """The checkpoint's folder that `path` means: itself, or the "last" or "best" of a run."""
    if (path / CONFIG_FILE).is_file():
        return path
    if has_run(path):
        name = _read_json(path / POINTER_FILE, CheckpointError).get(which)
        for folder in path.iterdir():  # a name that leads elsewhere is not among these
            if folder.name == name and (folder / CONFIG_FILE).is_file():
                return folder
        raise CheckpointError(f"{path / POINTER_FILE} names {name!r}, which is no checkpoint beside it")
    if not path.exists():
        raise CheckpointError(f"{path}: no such folder; train.py --save-path {path} makes one")
    raise CheckpointError(f"{path} holds no checkpoint: neither {CONFIG_FILE} nor {POINTER_FILE} is in it")


def _native_tensors(model: Transformer) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's tensors in native names: those of stacked experts one by one, as views."""
    for name, tensor in model.state_dict().items():
        owner, is_routed, leaf = name.partition(".experts.")
        if is_routed:
            for e, matrix in enumerate(tensor):
                yield f"{owner}.experts.{e}.{leaf}", matrix
        else:
            yield name, tensor


def _write_weights(model: Transformer, folder: Path) -> None:
    args = model.args.to_dict() | {"dtype": "fp32" if model.head.weight.dtype == torch.float32 else "bf16"}
    _write_json(folder / CONFIG_FILE, args)
    # safetensors takes no views into shared memory, hence the copies of single experts
    tensors = {name: t.clone() if t._is_view() else t for name, t in _native_tensors(model)}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def _read_weights(model: Transformer, folder: Path) -> None:
    path = folder / WEIGHTS_FILE
    wanted = dict(_native_tensors(model))
    with _opened(path) as file, torch.no_grad():
        names = set(file.keys())
        for name in sorted(wanted.keys() ^ names):
            what = "is missing" if name in wanted else "has no place in this model"
            raise CheckpointError(f"{path}: tensor {name} {what}; the file and {CONFIG_FILE} are not of one model")
        for name, target in wanted.items():
            tensor = file.get_tensor(name)
            if tensor.shape != target.shape:
                shapes = f"{list(tensor.shape)}, {CONFIG_FILE} wants {list(target.shape)}"
                raise CheckpointError(f"{path}: tensor {name} has shape {shapes}")
            target.copy_(tensor)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Opens a safetensors file; whatever is wrong with it becomes a CheckpointError that names it."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; the checkpoint is incomplete") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from None


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    """Turns a failing write into a CheckpointError that names `path`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {path}: {error}") from None


@contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder that becomes `path` at the end; after an error nothing of it remains."""
    temporary = path.with_name(f".{path.name}.tmp")
    with _reported(path):
        if path.exists():
            raise CheckpointError(f"{path} exists; choose a path that does not")
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            for file in temporary.iterdir():
                _fsync(file)
            _fsync(temporary)
            temporary.rename(path)
            _fsync(path.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _fsync(path: Path) -> None:
    """Forces a file or a folder's entries to disk; Windows lets neither be opened for that."""
    if os.name != "nt":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _replace_json(path: Path, value: dict[str, Any]) -> None:
    """Writes a JSON file so that a crash leaves the old one or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    _write_json(temporary, value)
    _fsync(temporary)
    temporary.replace(path)
    _fsync(path.parent)


def _read_json(path: Path, error_type: type[ValueError]) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error_type(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise error_type(f"{path} is not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise error_type(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value

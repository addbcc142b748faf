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
from collections.abc import Callable, Iterator, Set
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import command
from checkpoint import (
    CONFIG_DTYPES,
    CONFIG_FILE,
    GENERATION_FILE,
    INDEX_FILE,
    STATE_FILE,
    Checkpoint,
    collect_tensors,
    load_weights,
    native_file,
    native_scale_name,
    open_native,
    resolve_run,
    too_large,
)
from command import shorten
from fp8_ops import BLOCK, E4M3
from model import ConfigError, ModelArgs, Transformer
from parallel import ParallelContext, check_model_parallel, is_matrix, keep_freed_memory, native_slice, ranks_with
from safetensors_io import (
    DTYPE_NAMES,
    CheckpointError,
    SafetensorsWriter,
    ShardedTensor,
    ShardSlice,
    Slice2D,
    TensorInfo,
    inside,
    is_block_aligned,
    naming,
    new_folder,
    read_header,
    read_json,
    resolved,
    temporary_path,
    write_all,
    write_json,
)

MAX_FILE_BYTES = 5 * 10**9  # of a Hugging Face checkpoint's files
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}


# --- Hugging Face's formats ------------------------------------------------------------------------------------------

MAX_LAYERS = 10_000  # more in a config are not worth a try
HF_CLASSES = {"deepseek_v3": "DeepseekV3", "deepseek_v2": "DeepseekV2", "glm4_moe_lite": "Glm4MoeLite"}
# fmt: off
HF_KEYS = {
    "vocab_size": "vocab_size", "dim": "hidden_size", "inter_dim": "intermediate_size",
    "n_heads": "num_attention_heads",
    "moe_inter_dim": "moe_intermediate_size", "n_layers": "num_hidden_layers", "n_routed_experts": "n_routed_experts",
    "n_shared_experts": "n_shared_experts", "n_activated_experts": "num_experts_per_tok", "n_expert_groups": "n_group",
    "n_limited_groups": "topk_group", "route_scale": "routed_scaling_factor", "hidden_act": "hidden_act",
    "q_lora_rank": "q_lora_rank", "kv_lora_rank": "kv_lora_rank", "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim", "v_head_dim": "v_head_dim", "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
}
HF_ROPE_KEYS = {
    "rope_factor": "factor", "original_seq_len": "original_max_position_embeddings", "mscale": "mscale_all_dim",
    "beta_fast": "beta_fast", "beta_slow": "beta_slow",
}
HF_NAMES = {
    "embed": "embed_tokens", "attn": "self_attn", "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "wq": "q_proj", "wq_a": "q_a_proj", "q_norm": "q_a_layernorm", "wq_b": "q_b_proj", "wkv_a": "kv_a_proj_with_mqa",
    "kv_norm": "kv_a_layernorm", "wkv_b": "kv_b_proj", "wo": "o_proj", "ffn": "mlp", "w1": "gate_proj",
    "w2": "down_proj", "w3": "up_proj", "bias": "e_score_correction_bias",
}
# What changes nothing in what a model computes; and what must be said, if anything is, since it is always so here.
HF_IGNORED = {
    "architectures", "auto_map", "bos_token_id", "bytegpt", "chunk_size_feed_forward", "dtype", "eos_token_id",
    "id2label", "initializer_range", "label2id", "model_type", "output_attentions", "output_hidden_states",
    "pad_token_id", "problem_type", "return_dict", "router_aux_loss_coef", "seq_aux", "torch_dtype",
    "transformers_version", "use_cache", "_name_or_path",
}
HF_NEUTRAL = {
    "attention_bias": False, "attention_dropout": 0.0, "ep_size": 1, "is_encoder_decoder": False, "mlp_bias": False,
    "moe_layer_freq": 1, "output_router_logits": False, "partial_rotary_factor": 1.0, "pretraining_tp": 1,
    "rope_interleave": True, "tie_word_embeddings": False, "truncate": True,
}
HF_FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
# fmt: on


def args_from_hf(config: dict[str, Any]) -> ModelArgs:
    """Translates the config of a DeepSeek-V2, DeepSeek-V3, Kimi-K2 or GLM-4-MoE-Lite model.

    Fields of `ModelArgs` that such a config cannot tell are in an object "bytegpt", where an export puts them.

    Args:
        config: What config.json says.

    Raises:
        ConfigError: A field is missing, or there is no counterpart for it here; the message names it.
    """
    derived, extra = _derive(config), shown_dict("bytegpt", config.get("bytegpt", {}))
    with _their_names(extra):
        args = ModelArgs.from_dict(derived | extra)
    again = _derive(hf_config(args, torch.float32, False)) if extra else derived
    for key in derived:
        if derived[key] != again[key] and key != "scale_fmt":
            raise ConfigError(f"bytegpt contradicts the other fields, which mean {key} = {shorten(derived[key])}")
    return args


@contextmanager
def _their_names(kept: dict[str, Any]) -> Iterator[None]:
    """Has what a ConfigError says of our fields say it of Hugging Face's, but for those of "bytegpt"."""
    names = HF_KEYS | {key: f"rope_scaling.{name}" for key, name in HF_ROPE_KEYS.items()}
    names |= {"n_dense_layers": "first_k_dense_replace", "n_mtp_layers": "num_nextn_predict_layers"}
    try:
        yield
    except ConfigError as error:
        rename = lambda match: match[0] if match[0] in kept else names.get(match[0], match[0])  # noqa: E731
        raise ConfigError(re.sub(r"\w+", rename, str(error))) from None


def _derive(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of `ModelArgs` that a Hugging Face config tells."""
    left = {key: value for key, value in config.items() if key not in HF_IGNORED}
    kind = "deepseek_v3" if config["model_type"] == "kimi_k2" else config["model_type"]
    if not isinstance(kind, str) or kind not in HF_CLASSES:
        raise ConfigError(f"model_type {shorten(kind)} is not one of {', '.join(HF_CLASSES)}, kimi_k2")
    is_v2 = kind == "deepseek_v2"
    values: dict[str, Any] = {"score_func": "softmax" if is_v2 else "sigmoid"}
    nothing = {"q_lora_rank": 0, "n_shared_experts": 0, "n_expert_groups": 1, "n_limited_groups": 1}
    for ours, theirs in HF_KEYS.items():
        if theirs not in left:
            raise ConfigError(f"{theirs} is missing")
        value = left.pop(theirs)
        values[ours] = value = nothing.get(ours) if value is None else value
        if type(getattr(ModelArgs, ours)) is int and (type(value) is not int or abs(value) >= 1 << 40):
            raise ConfigError(f"{theirs} must be an integer, got {shorten(value)}")
    if values["n_layers"] > MAX_LAYERS:
        raise ConfigError(f"num_hidden_layers must be at most {MAX_LAYERS}, got {values['n_layers']}")
    values["n_mtp_layers"] = _agreed(0, left, "num_nextn_predict_layers", "num_mtp_layers")
    values["aux_loss_alpha"] = left.pop("aux_loss_alpha", ModelArgs.aux_loss_alpha)
    values |= _derive_layout(left, values["n_layers"])
    values |= _derive_rope(left, values["max_seq_len"])
    values["scale_fmt"] = check_quantization(left.pop("quantization_config", None))
    method = left.pop("topk_method", None)
    if is_v2 and method in (None, "greedy"):  # the groups are there, but not looked at
        values |= {"n_expert_groups": 1, "n_limited_groups": 1}
    elif method != ("group_limited_greedy" if is_v2 else "noaux_tc") and (is_v2 or method is not None):
        raise ConfigError(f"topk_method {shorten(method)} has no counterpart here with model_type {kind}")
    neutral = {
        "scoring_func": values["score_func"],
        "norm_topk_prob": not is_v2,
        "num_experts": values["n_routed_experts"],
    }
    neutral |= {"num_key_value_heads": values["n_heads"], "head_dim": values["qk_rope_head_dim"]}
    neutral |= {"qk_head_dim": values["qk_nope_head_dim"] + values["qk_rope_head_dim"]}
    _check_neutral(left, HF_NEUTRAL | neutral | {"num_local_experts": values["n_routed_experts"]})
    return values


def _check_neutral(left: dict[str, Any], neutral: dict[str, Any], where: str = "") -> None:
    """Refuses fields that have no counterpart here, unless they say what is always so."""
    for key, value in left.items():
        if key not in neutral or value is not None and value != neutral[key]:
            must = f"; it can only be {neutral[key]!r}" if key in neutral else ""
            raise ConfigError(f"{where}{shorten(key)} = {shorten(value)} has no counterpart here{must}")


def _agreed(default: Any, left: dict[str, Any], *names: str) -> Any:
    """Takes the value of a field that has several names."""
    found = {name: value for name in names if (value := left.pop(name, None)) is not None}
    if any(value != next(iter(found.values())) for value in found.values()):
        raise ConfigError(" and ".join(f"{name} = {shorten(value)}" for name, value in found.items()) + " differ")
    return next(iter(found.values()), default)


def _derive_layout(left: dict[str, Any], n_layers: int) -> dict[str, Any]:
    """Which layers are MoE: by a list of all, or by the number of dense ones at the start."""
    types, first = left.pop("mlp_layer_types", None), left.pop("first_k_dense_replace", None)
    if first is None and types is None:
        raise ConfigError("first_k_dense_replace is missing")
    if first is not None and (type(first) is not int or first < 0):
        raise ConfigError(f"first_k_dense_replace must be a number of layers, got {shorten(first)}")
    if types is None:
        return {"n_dense_layers": first, "moe_layer_freq": 1}
    if not isinstance(types, list) or len(types) != n_layers or not all(kind in ("dense", "sparse") for kind in types):
        raise ConfigError(f"mlp_layer_types must have dense or sparse for each of {n_layers} layers")
    sparse, dense = [i for i, kind in enumerate(types) if kind == "sparse"], first
    first, second = [*sparse, n_layers, n_layers + 1][:2]
    if dense is not None and min(dense, n_layers) != first:
        raise ConfigError(f"mlp_layer_types has {first} dense layers first, first_k_dense_replace = {dense}")
    if sparse != list(range(first, n_layers, second - first)):
        raise ConfigError(
            "mlp_layer_types has no counterpart here: from one sparse layer to the next it must be as far"
        )
    return {"n_dense_layers": first, "moe_layer_freq": second - first}


def _derive_rope(left: dict[str, Any], max_seq_len: int) -> dict[str, Any]:
    """The rotary frequencies, which older and newer configs have in different places."""
    places = {"rope_theta": left.pop("rope_theta", None)}
    found = []
    for place in ("rope_parameters", "rope_scaling"):
        if (value := left.pop(place, None)) is not None:
            found.append(rope := shown_dict(place, value))
            places[f"{place}.rope_theta"] = rope.pop("rope_theta", None)
            rope["type"] = _agreed("default", rope, "rope_type", "type")
    if found[1:] and found[0] != found[1]:
        raise ConfigError("rope_parameters and rope_scaling differ; remove the one that does not hold")
    rope = dict(found[0]) if found else {"type": "default"}
    theta, kind = _agreed(None, places, *places), rope.pop("type")
    if theta is None:
        raise ConfigError("rope_theta is missing")
    if kind == "default":
        _check_neutral(rope, HF_NEUTRAL, "rope_scaling.")
        return {"rope_theta": theta, "original_seq_len": max_seq_len}
    rope = {"beta_fast": 32, "beta_slow": 1, "mscale": None, "mscale_all_dim": 0.0, "attention_factor": None} | rope
    if kind != "yarn" or not {"factor", "original_max_position_embeddings"} <= rope.keys():
        raise ConfigError("rope_scaling must be of type yarn, with factor and original_max_position_embeddings")
    values = {ours: rope.pop(theirs) for ours, theirs in HF_ROPE_KEYS.items()}
    for key in ("beta_fast", "beta_slow", "original_seq_len"):
        values[key] = (
            int(values[key]) if isinstance(values[key], float) and values[key] == int(values[key]) else values[key]
        )
    mscale, attention = rope.pop("mscale"), rope.pop("attention_factor")
    if attention != 1 and (attention is not None or not mscale or mscale != values["mscale"]):
        raise ConfigError("rope_scaling.mscale must equal mscale_all_dim, or attention_factor be 1")
    if type(values["original_seq_len"]) is not int or max_seq_len <= values["original_seq_len"]:
        raise ConfigError("max_position_embeddings must exceed rope_scaling.original_max_position_embeddings")
    _check_neutral(rope, HF_NEUTRAL, "rope_scaling.")
    return values | {"rope_theta": theta}


def check_quantization(quantization: Any) -> str | None:
    """Refuses a `quantization_config` other than FP8 in blocks of 128×128; returns its scale format.

    Raises:
        ConfigError: It is another; the message names the field.
    """
    left = shown_dict("quantization_config", HF_FP8 if quantization is None else quantization)
    for key in ("modules_to_not_convert", "ignored_layers", "dequantize"):  # the tensors tell
        left.pop(key, None)
    scale_fmt = left.pop("scale_fmt", None)
    _check_neutral({"quant_method": None} | left, HF_FP8, "quantization_config.")
    return scale_fmt


def shown_dict(name: str, value: Any) -> dict[str, Any]:
    """A copy of an object of a config, or an error if it is none."""
    if not isinstance(value, dict):
        raise ConfigError(f"{name} must be an object, got {shorten(value)}")
    return dict(value)


def hf_config(args: ModelArgs, dtype: torch.dtype, is_fp8: bool) -> dict[str, Any]:
    """Translates a model's shape into the config of a class of transformers.

    Args:
        args: The shape.
        dtype: What the weights that are not FP8 are stored in.
        is_fp8: Whether the others are.

    Raises:
        ConfigError: No class computes the same; the message names the field and the reason.
    """
    layout = [args.is_moe(i) for i in range(args.n_layers)]
    has_moe = any(args.is_moe(i) for i in range(args.n_layers + args.n_mtp_layers))
    first = layout.index(True) if any(layout) else args.n_layers
    groups = 1 if args.n_limited_groups == args.n_expert_groups else args.n_expert_groups
    kind = "deepseek_v3" if all(layout[first:]) else "glm4_moe_lite"
    kind = "deepseek_v2" if has_moe and args.score_func == "softmax" else kind
    is_v2 = kind == "deepseek_v2"
    # fmt: off
    reasons = {
        "kv_lora_rank = 0, plain attention": args.kv_lora_rank == 0,
        "qk_rope_head_dim = 0": args.qk_rope_head_dim == 0,
        "MoE layers without shared experts": has_moe and args.n_shared_experts == 0,
        "gate_bias with score_func softmax": is_v2 and args.gate_bias,
        "score_func sigmoid without gate_bias": has_moe and not is_v2 and not args.gate_bias,
        "fewer than two experts in a group": has_moe and not is_v2 and args.n_routed_experts // groups < 2,
        "moe_layer_freq above 1 with score_func softmax": is_v2 and not all(layout[first:]),
        "n_heads that does not divide dim, with score_func softmax": is_v2 and args.dim % args.n_heads,
        "an odd qk_nope_head_dim with score_func softmax": is_v2 and args.qk_nope_head_dim % 2,
        "an odd kv_lora_rank with score_func softmax": is_v2 and args.kv_lora_rank % 2,
    }
    # fmt: on
    for reason, is_so in reasons.items():
        if is_so:
            raise ConfigError(f"this model cannot be exported: no class of transformers has {reason}")
    config: dict[str, Any] = {"architectures": [HF_CLASSES[kind] + "ForCausalLM"], "model_type": kind}
    config |= {theirs: getattr(args, ours) for ours, theirs in HF_KEYS.items()}
    config |= {"q_lora_rank": args.q_lora_rank or None, "num_key_value_heads": args.n_heads, "n_group": groups}
    config |= {"topk_group": min(groups, args.n_limited_groups), "num_nextn_predict_layers": args.n_mtp_layers}
    config |= {"aux_loss_alpha": args.aux_loss_alpha, "attention_bias": False, "tie_word_embeddings": False}
    config |= {"bos_token_id": 0, "eos_token_id": 0, "torch_dtype": str(dtype).removeprefix("torch.")}
    config |= {
        "scoring_func": "softmax" if is_v2 else "sigmoid",
        "norm_topk_prob": not is_v2,
        "topk_method": "noaux_tc",
    }
    if is_v2:
        config["topk_method"] = "group_limited_greedy" if groups > 1 else "greedy"
    if kind == "glm4_moe_lite":
        config["mlp_layer_types"] = ["sparse" if is_moe else "dense" for is_moe in layout]
    else:
        config |= {"first_k_dense_replace": first, "moe_layer_freq": 1}
    config |= {"rope_theta": args.rope_theta, "rope_scaling": None}
    if args.max_seq_len > args.original_seq_len:
        rope = {theirs: getattr(args, ours) for ours, theirs in HF_ROPE_KEYS.items()} | {"mscale": args.mscale}
        rope |= {"rope_type": "yarn", "type": "yarn"} | ({} if args.mscale else {"attention_factor": 1.0})
        config["rope_scaling"] = rope
    if is_fp8:
        config["quantization_config"] = HF_FP8 | ({"scale_fmt": args.scale_fmt} if args.scale_fmt else {})
    plain = ModelArgs.from_dict(_derive(config)).to_dict()
    extra = {key: value for key, value in args.to_dict().items() if value != plain[key] and key != "dtype"}
    if "score_func" in extra:  # on which the other one depends, where nothing is said of it
        extra["gate_bias"] = args.gate_bias
    again = ModelArgs.from_dict(_derive(config) | extra)
    if again.to_dict() | {"dtype": args.dtype} != args.to_dict():
        raise ConfigError("this model cannot be exported: no config of transformers has all that is in its own")
    return config | ({"bytegpt": extra} if extra else {})


def hf_name(name: str, args: ModelArgs) -> str:
    """The Hugging Face name of a weight."""
    parts = name.split(".")
    if parts[0] == "head":
        return "lm_head.weight"
    if parts[0] == "mtp":
        inner = {"block": [], "norm": ["shared_head", "norm"]}.get(parts[2], [parts[2]])
        parts = ["layers", str(args.n_layers + int(parts[1])), *inner, *parts[3:]]
    return ".".join(["model", *(HF_NAMES.get(part, part) for part in parts)])


def mtp_copies(args: ModelArgs) -> Iterator[tuple[str, str]]:
    """The copies of embedding and head that DeepSeek's files have in each MTP module, so ours too: both their names."""
    for layer in range(args.n_layers, args.n_layers + args.n_mtp_layers):
        yield "embed.weight", f"model.layers.{layer}.embed_tokens.weight"
        yield "head.weight", f"model.layers.{layer}.shared_head.head.weight"


def byte_tokenizer(max_seq_len: int) -> dict[str, dict[str, Any]]:
    """The files from which transformers makes a tokenizer whose ids are the bytes of UTF-8, and 0 ends a text.

    It is BPE without merges over GPT-2's alphabet of a visible character for each byte. Only byte 0 stands for itself:
    as the special token it is looked for in the text, before that is spelled in the alphabet.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {byte: chr(byte) for byte in visible}
    letters |= {byte: chr(256 + i) for i, byte in enumerate(sorted(set(range(256)) - set(visible)))}
    end = {"id": 0, "content": "\0", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    vocab = {letters[byte] if byte else "\0": byte for byte in range(256)}
    tokenizer = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [end | {"special": True}]}
    tokenizer |= {"normalizer": None, "pre_tokenizer": level, "post_processor": None, "decoder": level}
    tokenizer["model"] = {"type": "BPE", "vocab": vocab, "merges": []}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "\0", "pad_token": "\0"}
    config |= {"clean_up_tokenization_spaces": False, "model_max_length": max_seq_len}
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": config}


# --- Opening either format --------------------------------------------------------------------------------------------


def open_checkpoint(path: str | os.PathLike, which: str = "best") -> Checkpoint:
    """Finds a checkpoint's tensors and checks them against its config; reads none of them.

    Args:
        path: A checkpoint's folder, native of any number of shards or Hugging Face's; or a run's.
        which: Which checkpoint of a run, the "best" or the "last".

    Raises:
        CheckpointError: There is none, or something in it does not fit.
        ConfigError: Its config is not one of a model.
    """
    folder = resolve_run(Path(path), which)
    config = read_json(folder / CONFIG_FILE, ConfigError)
    if "model_type" not in config:
        return open_native(folder)
    with naming(folder / CONFIG_FILE):
        args = args_from_hf(config)
    header = read_hf_headers(folder)
    for layer in range(args.n_layers + args.n_mtp_layers):  # older ones keep the rotary frequencies
        header.pop(f"model.layers.{layer}.self_attn.rotary_emb.inv_freq", None)
    names = partial(hf_name, args=args)
    found = collect_tensors(folder, args, [folder / INDEX_FILE], [header], names, hf_scale_name, mtp_copies(args))
    return replace(found, config=config)


def hf_scale_name(name: str) -> str:
    """The Hugging Face name of a weight's scales."""
    return name + "_scale_inv"


def read_hf_headers(folder: Path) -> dict[str, TensorInfo]:
    """Reads the headers of a Hugging Face checkpoint's files, by its index if it has one.

    Raises:
        CheckpointError: The index leads out of the folder, or it and the files contradict each other.
    """
    index = folder / INDEX_FILE
    found = {path.name for path in folder.glob("*.safetensors")}
    if index.exists():
        where = read_json(index, CheckpointError).get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
            raise CheckpointError(f"{index} has no weight_map that names a file for each tensor")
    elif found == {"model.safetensors"}:
        where = dict.fromkeys(read_header(inside(folder, "model.safetensors")), "model.safetensors")
    else:
        raise CheckpointError(f"{folder} needs {INDEX_FILE}, or model.safetensors and no other such file")
    for name, file in where.items():
        if file != Path(file).name or not file.endswith(".safetensors") or not file.isprintable():
            raise CheckpointError(
                f"{index}: tensor {shorten(name)} is in {shorten(file)}, which is no file of the folder"
            )
    infos: dict[str, TensorInfo] = {}
    for file in sorted(found | set(where.values())):
        if file not in where.values():
            raise CheckpointError(f"{folder / file} is none of the files that {INDEX_FILE} names; remove it")
        for name, info in read_header(inside(folder, file)).items():
            if where.get(name) != file:
                raise CheckpointError(f"{info} is in it, but not in {INDEX_FILE}")
            infos[name] = info
    for name in where.keys() - infos.keys():
        raise CheckpointError(f"{folder / where[name]}: tensor {shorten(name)} is not in it, but in {INDEX_FILE}")
    return infos


def load_model(
    path: str | os.PathLike,
    device: str = "cpu",
    compute_dtype: torch.dtype = torch.float32,
    keep_fp8: bool = False,
    make: Callable[..., Transformer] = Transformer,
    ctx: ParallelContext | None = None,
) -> Transformer:
    """Loads a model for inference: its matrices are cast once, while they are read, to the dtype they compute in.

    Args:
        path: A checkpoint's folder, native of any number of shards or Hugging Face's; or a run's, of which the best
            checkpoint is taken.
        device: Where the model goes.
        compute_dtype: Dtype of activations and of the matrices; the router's stay in float32.
        keep_fp8: Keep weights that are stored in FP8 in it. By default they are dequantised.
        make: Makes the model from its shape, `compute_dtype` and whether it has FP8 weights.
        ctx: The processes over which `make` spreads it; this one reads its part only.

    Raises:
        CheckpointError: No checkpoint there, or one that does not fit its own config.
        ConfigError: Its config is not one of a model.
    """
    ctx = ctx or ParallelContext()
    checkpoint = open_checkpoint(path)
    check_model_parallel(checkpoint.args, ctx.mp_size, "the number of processes")
    try:
        model = make(checkpoint.args, compute_dtype, fp8_weights=keep_fp8 and checkpoint.is_fp8)
    except (RuntimeError, OverflowError, MemoryError) as error:
        raise too_large(checkpoint.folder, error) from None
    for name, p in model.named_parameters():
        if is_matrix(name, p.shape) and p.dtype != E4M3:
            p.data = torch.empty_like(p, dtype=compute_dtype)
    load_weights(model, checkpoint, ctx)
    return model.to(device).eval().requires_grad_(False)


# --- Conversions ------------------------------------------------------------------------------------------------------


@dataclass
class Job:
    """A tensor on its way.

    Attributes:
        source: Where it is.
        dtype: What it becomes.
        parts: Where it goes: rectangles in files to be written.
    """

    source: ShardedTensor
    dtype: torch.dtype
    parts: list[ShardSlice] = field(default_factory=list)


def make_plan(
    checkpoint: Checkpoint, world: int = 1, is_hf: bool = False, dtype: str | None = None
) -> tuple[list[SafetensorsWriter], list[Job], dict[str, dict[str, Any]]]:
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
        check_model_parallel(args, world)
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


def _lay_out(jobs: dict[str, Job], args: ModelArgs, world: int, is_hf: bool) -> list[SafetensorsWriter]:
    """Lays out the files of tensors, and tells the jobs where in them their parts go."""
    names = {name: [hf_name(name, args) if is_hf else name] for name in jobs}
    for name, copy in mtp_copies(args) if is_hf else ():
        names[name].append(copy)
    parts = []
    contents: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{} for _ in range(world)]
    for name, job in jobs.items():
        shape = job.source.shape
        for rank in ranks_with(name, args.n_routed_experts, world):
            box = native_slice(name, shape, args.n_routed_experts, rank, world)
            for known in names[name]:
                parts.append((job, box, rank, known))
                contents[rank][known] = job.dtype, box.shape[-len(shape) :]
                if job.dtype == E4M3:
                    scales = tuple(-(-n // BLOCK) for n in box.shape)
                    contents[rank][(hf_scale_name if is_hf else native_scale_name)(known)] = torch.float32, scales
    if is_hf:
        outputs = _split(contents[0])
        infos = [{name: info for output in outputs for name, info in output.infos.items()}]
    else:
        outputs = [SafetensorsWriter(native_file(rank, world), content) for rank, content in enumerate(contents)]
        infos = [output.infos for output in outputs]
    for job, box, rank, known in parts:
        job.parts.append(
            ShardSlice(infos[rank][known], box, infos[rank].get((hf_scale_name if is_hf else native_scale_name)(known)))
        )
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
                f"{job.source.shards[0].info} {list(shape)} would be misread by transformers in FP8, which wants sizes"
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
            f"{source.shards[0].info} is {DTYPE_NAMES[source.dtype]}: choose a --dtype for the new one"
        )
    return torch.float32 if wanted == "fp32" or source.dtype not in CONFIG_DTYPES else source.dtype


def _split(tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> list[SafetensorsWriter]:
    """Deals tensors out to files of at most 5 GB, in their order."""
    groups, size = [], MAX_FILE_BYTES
    for name, (dtype, shape) in tensors.items():
        n_bytes = math.prod(shape) * dtype.itemsize + len(name) + 150  # with what the header says
        if size + n_bytes > MAX_FILE_BYTES:
            groups.append({})
            size = 0
        groups[-1][name] = dtype, shape
        size += n_bytes
    return [
        SafetensorsWriter(f"model-{i:05d}-of-{len(groups):05d}.safetensors", group) for i, group in enumerate(groups, 1)
    ]


def make_index(outputs: list[SafetensorsWriter]) -> dict[str, Any]:
    """The index of a Hugging Face checkpoint: the size of its tensors and the file of each."""
    total = sum(info.nbytes for output in outputs for info in output.infos.values())
    where = {name: output.name for output in outputs for name in output.infos}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}


def write_tensors(
    folder: Path, outputs: list[SafetensorsWriter], jobs: list[Job], scale_fmt: str | None, progress: bool
) -> None:
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
    total = sum(info.nbytes for output in outputs for info in output.infos.values())
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
        whole = not quantises or all(is_block_aligned(part.box) for part in job.parts)
        for region in [source.box] if whole else dict.fromkeys(part.box for part in job.parts):
            found = torch.empty([-(-n // BLOCK) for n in region.shape] if quantises else 0)
            for band in source.bands(region, 1 if job.dtype == source.dtype else BLOCK):
                if self.stop.is_set():
                    return
                if quantises:
                    data, s = source.read_fp8(band, self.scale_fmt)
                    rows, cols = band.within(region)
                    found[rows.start // BLOCK :, cols.start // BLOCK :][: s.shape[0], : s.shape[1]] = s
                elif job.dtype == source.dtype:
                    data = source.read_bytes(band)
                else:
                    data = source.read(band, job.dtype)
                    _check_finite(source, band, data)
                self._place(job, band, data.view(torch.uint8))
            if quantises:
                scales.append((region, found))
                if not scales[-1][1].isfinite().all():
                    raise CheckpointError(f"{source.shards[0].info} holds NaN or infinity")
        if job.dtype == E4M3:
            scales = scales or source.read_scales()
            for part in job.parts:
                self._write(part.scale, 0, source.scales(scales, part.box))

    def _place(self, job: Job, band: Slice2D, data: torch.Tensor) -> None:
        """Writes what the parts have of a band, which is uint8 (rows, bytes of a row)."""
        size = job.dtype.itemsize
        for part in job.parts:
            if (shared := part.box.meet(band)) is not None:
                rows, cols = shared.within(band)
                piece, width = data[rows, cols.start * size : cols.stop * size], part.box.shape[1]
                start = (shared.top - part.box.top) * width + shared.left - part.box.left
                for i, lines in enumerate([piece] if shared.shape[1] == width else piece):
                    self._write(part.info, (start + i * width) * size, lines)

    def _write(self, info: TensorInfo, offset: int, data: torch.Tensor) -> None:
        with open(self.folder / info.path, "r+b", buffering=0) as file:
            file.seek(info.offset + offset)
            write_all(file, data)
        with self._lock:
            self.bar.update(data.nbytes)


def _check_finite(source: ShardedTensor, band: Slice2D, data: torch.Tensor) -> None:
    """Refuses numbers that have become infinite in their new dtype."""
    if data.sum().isfinite():  # as almost always; the quickest to compute that tells
        return
    before = 0 if source.dtype == E4M3 else source.read_bytes(band).view(source.dtype).isinf().sum()
    if data.isinf().sum() > before:
        dtype = str(data.dtype).removeprefix("torch.")
        raise CheckpointError(f"{source.shards[0].info} has numbers that are too large for {dtype}")


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


def run_conversion(prog: str, body: Callable[[], None]) -> int:
    """Runs a command that streams tensors; returns its exit code."""
    torch.set_num_threads(1)  # several tensors are on their way at a time
    keep_freed_memory()
    return command.run(prog, body, (CheckpointError, ConfigError))


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
    return run_conversion(
        "convert.py", lambda: convert(args.ckpt_path, args.save_path, args.model_parallel, is_hf, args.dtype, True)
    )


if __name__ == "__main__":
    sys.exit(main())

"""Every way from one checkpoint to another: to another number of shards, to Hugging Face's format or back, to a dtype.

    python convert.py --ckpt-path SRC --save-path DST [--model-parallel N] [--format native|hf] [--dtype fp32|bf16|fp8]

The two formats hold the same matrices under other names, beside a config in other words. The config becomes a
`ModelArgs`, from which the name, shape and sharding of every tensor follow, and the headers of the source's files give
the place of each: so the whole conversion is planned, and refused if need be, before any tensor is read. Of a Hugging
Face config, fields with a counterpart in `ModelArgs` are translated, those that would change the mathematics must have
the one value that they have here, and only fields that change nothing are ignored. The way back uses the same tables,
and is checked by reading its own result.

A conversion copies rectangles: it reads a tensor in bands of rows from wherever its slices are, changes the dtype if
need be, and writes to wherever they belong. Nothing larger than a band is in memory, each byte is read and written
once, and several tensors are converted at a time.
"""

if __name__ == "__main__":
    import command

    command.start()

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
import torch.nn.functional as F
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
from model import ACTIVATIONS, ConfigError, ModelArgs, Transformer, check_field
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
SINGLE_FILE = "model.safetensors"  # of a Hugging Face checkpoint without index


# --- Hugging Face's names and fields ---------------------------------------------------------------------------------

# fmt: off
HF_CLASSES = {  # model_type: architecture
    "deepseek_v3": "DeepseekV3ForCausalLM",  # sigmoid routing, the first layers dense
    "deepseek_v32": "DeepseekV32ForCausalLM",  # the same with an indexer, and a list of which layers are dense
    "deepseek_v2": "DeepseekV2ForCausalLM",  # softmax routing, the first layers dense
    "glm4_moe_lite": "Glm4MoeLiteForCausalLM",  # sigmoid routing, a list of which layers are dense
    "ernie4_5": "Ernie4_5ForCausalLM",  # a plain GPT: Llama's, but for rotary pairs side by side, as they are here
}
HF_ALIASES = {"kimi_k2": "deepseek_v3"}
HF_KEYS = {  # field of ModelArgs: field of DeepSeek's classes
    "vocab_size": "vocab_size", "dim": "hidden_size", "inter_dim": "intermediate_size",
    "moe_inter_dim": "moe_intermediate_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
    "n_routed_experts": "n_routed_experts", "n_shared_experts": "n_shared_experts",
    "n_activated_experts": "num_experts_per_tok", "n_expert_groups": "n_group", "n_limited_groups": "topk_group",
    "route_scale": "routed_scaling_factor", "hidden_act": "hidden_act", "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank", "qk_nope_head_dim": "qk_nope_head_dim", "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim", "max_seq_len": "max_position_embeddings", "norm_eps": "rms_norm_eps",
}
HF_INDEX_KEYS = {key: key for key in ("index_n_heads", "index_head_dim", "index_topk")}  # of deepseek_v32 alone
HF_PLAIN = {  # fields of ModelArgs, and their values in an ernie4_5: plain attention and dense layers
    "q_lora_rank": 0, "kv_lora_rank": 0, "qk_nope_head_dim": 0, "n_routed_experts": 0, "n_shared_experts": 0,
}
HF_PLAIN_KEYS = {  # field of ModelArgs: field of ernie4_5
    "vocab_size": "vocab_size", "dim": "hidden_size", "inter_dim": "intermediate_size", "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads", "hidden_act": "hidden_act", "qk_rope_head_dim": "head_dim",
    "v_head_dim": "head_dim", "max_seq_len": "max_position_embeddings", "norm_eps": "rms_norm_eps",
}
HF_PLAIN_DEFAULTS = {"num_key_value_heads": 2, "tie_word_embeddings": True}  # of ernie4_5, where a config lacks them
HF_NULLS = {"q_lora_rank": 0, "n_shared_experts": 0, "n_expert_groups": 1, "n_limited_groups": 1}  # the value for null
HF_ROPE_KEYS = {  # field of ModelArgs: field of rope_scaling
    "rope_factor": "factor", "original_seq_len": "original_max_position_embeddings", "mscale": "mscale_all_dim",
    "beta_fast": "beta_fast", "beta_slow": "beta_slow",
}
HF_ROPE_DEFAULTS = {"beta_fast": 32, "beta_slow": 1, "mscale": 0.0, "mscale_all_dim": 0.0, "attention_factor": None}
HF_FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
HF_ROUTING = {  # score_func: fields of the classes that have it
    "sigmoid": {"scoring_func": "sigmoid", "norm_topk_prob": True},
    "softmax": {"scoring_func": "softmax", "norm_topk_prob": False},
}
HF_FIXED = {  # fields that would change the mathematics, and the value that they have in every model here
    "attention_bias": False, "attention_dropout": 0.0, "ep_size": 1, "is_causal": True, "is_encoder_decoder": False,
    "mlp_bias": False, "moe_layer_freq": 1, "output_router_logits": False, "partial_rotary_factor": 1.0,
    "pretraining_tp": 1, "rope_interleave": True, "tie_word_embeddings": False, "truncate": True, "use_bias": False,
}
HF_IGNORED = set("""architectures auto_map bytegpt chunk_size_feed_forward dtype finetuning_task gradient_checkpointing
    id2label initializer_range label2id model_type num_labels output_attentions output_hidden_states problem_type
    return_dict router_aux_loss_coef seq_aux task_specific_params tokenizer_class torch_dtype torchscript
    transformers_version use_bfloat16 use_cache use_return_dict _name_or_path _commit_hash _attn_implementation
    attn_implementation _attn_implementation_autoset _experts_implementation experts_implementation
    bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id forced_bos_token_id forced_eos_token_id
    max_length min_length max_new_tokens min_new_tokens do_sample temperature top_k top_p min_p typical_p epsilon_cutoff
    eta_cutoff num_beams num_beam_groups diversity_penalty early_stopping repetition_penalty encoder_repetition_penalty
    length_penalty exponential_decay_length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    suppress_tokens begin_suppress_tokens stop_strings num_return_sequences output_scores output_logits
    return_dict_in_generate remove_invalid_values renormalize_logits penalty_alpha guidance_scale cache_implementation
    """.split())  # of training, storage, generation or the classes of transformers themselves # noqa: SIM905
HF_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {  # as transformers computes them
    "gelu": F.gelu, "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"), "mish": F.mish, "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(), "sigmoid": F.sigmoid, "silu": F.silu, "tanh": F.tanh,
}
HF_NAMES = {  # part of a native tensor's name: part of Hugging Face's
    "embed": "embed_tokens", "attn": "self_attn", "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm", "wq": "q_proj", "wq_a": "q_a_proj", "q_norm": "q_a_layernorm",
    "wq_b": "q_b_proj", "wk": "k_proj", "wv": "v_proj", "wkv_a": "kv_a_proj_with_mqa", "kv_norm": "kv_a_layernorm",
    "wkv_b": "kv_b_proj", "wo": "o_proj", "ffn": "mlp", "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj",
    "bias": "e_score_correction_bias",
}
# fmt: on


def hf_name(name: str, args: ModelArgs) -> str:
    """Returns the Hugging Face name of a tensor with a native name."""
    parts = name.split(".")
    if parts[0] == "head":
        return "lm_head.weight"
    if parts[0] == "mtp":
        inner = {"block": [], "norm": ["shared_head", "norm"]}.get(parts[2], [parts[2]])
        parts = ["layers", str(args.n_layers + int(parts[1])), *inner, *parts[3:]]
    end = parts.index("indexer") if "indexer" in parts else len(parts)  # whose own names are those of transformers
    return ".".join(["model", *(HF_NAMES.get(part, part) for part in parts[:end]), *parts[end:]])


def hf_scale_name(name: str) -> str:
    """Returns the Hugging Face name of a weight's scales."""
    return name + "_scale_inv"


def mtp_copies(args: ModelArgs) -> Iterator[tuple[str, str]]:
    """Yields the copies of embedding and head that DeepSeek's files have in each MTP module: native and stored name."""
    for layer in range(args.n_layers, args.n_layers + args.n_mtp_layers):
        yield "embed.weight", f"model.layers.{layer}.embed_tokens.weight"
        yield "head.weight", f"model.layers.{layer}.shared_head.head.weight"


# --- Config: from Hugging Face ---------------------------------------------------------------------------------------


def args_from_hf(config: dict[str, Any]) -> ModelArgs:
    """Translates the config.json of a DeepSeek-V2, -V3 or -V3.2, Kimi-K2, GLM-4-MoE-Lite or ERNIE-4.5 model.

    Fields of `ModelArgs` that such a config has no place for are in an object "bytegpt", where an export puts them.

    Raises:
        ConfigError: A field is missing, or there is no counterpart for it here; the message names it.
    """
    derived, extra = _derive(config), shown_dict("bytegpt", config.get("bytegpt", {}))
    if derived["use_yarn"]:  # of a model exported without YaRN, with YaRN added later: it replaces these
        extra = {key: value for key, value in extra.items() if key not in HF_ROPE_KEYS}
    with _in_hf_names(HF_KEYS if derived["kv_lora_rank"] else HF_PLAIN_KEYS, extra):
        args = ModelArgs.from_dict(derived | extra)
    again = _derive(hf_config(args, torch.float32, False)) if extra else derived
    for key, value in derived.items():
        if key != "scale_fmt" and again.get(key) != value:
            raise ConfigError(f"bytegpt contradicts the other fields, which mean {key} = {shorten(value)}")
    return args


def _derive(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of `ModelArgs` that follow from a Hugging Face config without its object "bytegpt"."""
    kind = config.get("model_type")
    kind = HF_ALIASES.get(kind, kind) if isinstance(kind, str) else None
    if kind not in HF_CLASSES:
        known = ", ".join([*HF_CLASSES, *HF_ALIASES])
        raise ConfigError(f"model_type {shorten(config.get('model_type'))} is not one of {known}")
    left = {key: value for key, value in config.items() if key not in HF_IGNORED}
    values: dict[str, Any] = {"aux_loss_alpha": _agreed(ModelArgs.aux_loss_alpha, left, "aux_loss_alpha")}
    is_plain = kind == "ernie4_5"
    keys = HF_PLAIN_KEYS if is_plain else HF_KEYS | HF_INDEX_KEYS if kind == "deepseek_v32" else HF_KEYS
    for ours, theirs in keys.items():
        if theirs not in left:
            raise ConfigError(f"{theirs} is missing")
        value = HF_NULLS.get(ours) if left[theirs] is None else left[theirs]
        with _in_hf_names(keys):
            values[ours] = check_field(ours, value)
    left = {key: value for key, value in left.items() if key not in keys.values()}
    if not _is_activation_of_hf(values["hidden_act"]):
        raise ConfigError(f"hidden_act {values['hidden_act']} is not computed here as transformers does")
    values["n_mtp_layers"] = _agreed(0, left, "num_nextn_predict_layers", "num_mtp_layers")
    values |= _derive_rope(left, values["max_seq_len"], is_plain)
    if is_plain:
        values, left = values | HF_PLAIN, HF_PLAIN_DEFAULTS | left
    else:
        values |= _derive_layout(left, values["n_layers"]) | _derive_routing(left, kind)
    values["scale_fmt"] = check_quantization(left.pop("quantization_config", None))
    sizes = {"num_key_value_heads": values["n_heads"], "head_dim": values["qk_rope_head_dim"]}
    sizes |= dict.fromkeys(("num_experts", "num_local_experts"), values["n_routed_experts"])
    sizes["qk_head_dim"] = values["qk_nope_head_dim"] + values["qk_rope_head_dim"]
    if kind == "deepseek_v32" and left.get("layer_types"):
        sizes["layer_types"] = ["indexed_attention"] * values["n_layers"]
    _check_fixed(left, HF_FIXED | sizes)
    return values


def _derive_routing(left: dict[str, Any], kind: str) -> dict[str, Any]:
    """Takes the router's fields; those of a class have one value, but for DeepSeek-V2's two ways to choose experts."""
    score_func, methods = "sigmoid", [None, "noaux_tc"]
    if kind == "deepseek_v2":
        score_func, methods = "softmax", [None, "greedy", "group_limited_greedy"]
    if (method := left.pop("topk_method", None)) not in methods:
        raise ConfigError(f"topk_method {shorten(method)} has no counterpart here with model_type {kind}")
    _check_fixed({key: left.pop(key) for key in HF_ROUTING[score_func] if key in left}, HF_ROUTING[score_func])
    if score_func == "sigmoid" or method == "group_limited_greedy":
        return {"score_func": score_func}
    return {"score_func": score_func, "n_expert_groups": 1, "n_limited_groups": 1}  # "greedy" ignores groups


def _derive_layout(left: dict[str, Any], n_layers: int) -> dict[str, Any]:
    """Takes the fields that place the MoE layers: a list of all layers, or the number of dense ones at the start."""
    types, n_dense = left.pop("mlp_layer_types", None), left.pop("first_k_dense_replace", None)
    if n_dense is not None:
        _check_hf_field("n_dense_layers", n_dense)
    elif types is None:
        raise ConfigError("first_k_dense_replace is missing")
    if types is None:
        return {"n_dense_layers": n_dense, "moe_layer_freq": 1}
    if not isinstance(types, list) or len(types) != n_layers or not all(kind in ("dense", "sparse") for kind in types):
        raise ConfigError(f"mlp_layer_types must have dense or sparse for each of {n_layers} layers")
    sparse = [i for i, kind in enumerate(types) if kind == "sparse"]
    first = sparse[0] if sparse else n_layers
    step = sparse[1] - first if len(sparse) > 1 else max(1, n_layers - first)
    if n_dense is not None and min(n_dense, n_layers) != first:
        raise ConfigError(f"mlp_layer_types has {first} dense layers first, first_k_dense_replace = {n_dense}")
    if sparse != list(range(first, n_layers, step)):
        raise ConfigError("mlp_layer_types has no counterpart here: the sparse layers must be equally far apart")
    return {"n_dense_layers": first, "moe_layer_freq": step}


def _derive_rope(left: dict[str, Any], max_seq_len: int, is_plain: bool) -> dict[str, Any]:
    """Takes the fields of the rotary frequencies: whether YaRN stretches them does not depend on the context."""
    theta, rope = _take_rope(left)
    kind = rope.pop("type")
    if kind == "default":
        _check_fixed(rope, HF_FIXED, "rope_scaling.")
        return {"rope_theta": theta, "original_seq_len": max_seq_len, "use_yarn": False}
    if kind != "yarn" or not {"factor", "original_max_position_embeddings"} <= rope.keys():
        raise ConfigError("rope_scaling must be of type yarn, with factor and original_max_position_embeddings")
    for key, value in HF_ROPE_DEFAULTS.items():
        rope[key] = value if rope.get(key) is None else rope[key]
    values = {ours: rope.pop(theirs) for ours, theirs in HF_ROPE_KEYS.items()}
    for ours, value in values.items():
        if type(getattr(ModelArgs, ours)) is int and isinstance(value, float) and value.is_integer():
            value = int(value)  # some configs have 32.0
        values[ours] = _check_hf_field(ours, value)
    mscale, attention = rope.pop("mscale"), rope.pop("attention_factor")
    if is_plain and attention is None and not (mscale and values["mscale"]):
        values["mscale"] = 1.0  # which is then the default of transformers
    elif is_plain:
        if attention != (wanted := _attention_factor(values["mscale"], values["rope_factor"])):
            given = f"rope_scaling.attention_factor = {shorten(attention)}"
            raise ConfigError(f"{given} is not {wanted}, as factor and mscale_all_dim have it")
    elif attention != 1 and (attention is not None or not mscale or mscale != values["mscale"]):
        raise ConfigError("rope_scaling.mscale must equal mscale_all_dim, or attention_factor be 1")
    _check_fixed(rope, HF_FIXED, "rope_scaling.")
    return values | {"rope_theta": theta, "use_yarn": True}


def _take_rope(left: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Takes the base of the rotary frequencies and the object about them, which stand in either of two places."""
    thetas, found = {"rope_theta": left.pop("rope_theta", None)}, []
    for place in ("rope_parameters", "rope_scaling"):
        if (value := left.pop(place, None)) is not None:
            found.append(rope := shown_dict(place, value))
            thetas[f"{place}.rope_theta"] = rope.pop("rope_theta", None)
            rope["type"] = _agreed("default", rope, "rope_type", "type")
    if len(found) == 2 and found[0] != found[1]:
        raise ConfigError("rope_parameters and rope_scaling differ; remove the one that does not hold")
    theta = _agreed(None, thetas, *thetas)
    if theta is None:
        raise ConfigError("rope_theta is missing")
    return theta, found[0] if found else {"type": "default"}


def check_quantization(quantization: Any) -> str | None:
    """Returns the scale format of a `quantization_config`; a ConfigError if it is not FP8 in blocks of 128×128."""
    left = shown_dict("quantization_config", HF_FP8 if quantization is None else quantization)
    for key in ("modules_to_not_convert", "ignored_layers", "dequantize"):  # the tensors' dtypes show that
        left.pop(key, None)
    scale_fmt = left.pop("scale_fmt", None)
    _check_fixed(left, HF_FP8, "quantization_config.")
    return scale_fmt


def _check_fixed(left: dict[str, Any], fixed: dict[str, Any], where: str = "") -> None:
    """Refuses fields with another than their fixed value, and unknown ones that are not null, false, zero or empty.

    Null is the default of a field, which transformers takes for false where it asks whether to do something.
    """
    for key, value in left.items():
        wanted = fixed.get(key)
        if key in fixed and value != wanted and (value is not None or wanted is True):
            raise ConfigError(f"{where}{key} = {shorten(value)} has no counterpart here; it can only be {wanted!r}")
        if key not in fixed and value:
            raise ConfigError(f"{where}{shorten(key)} = {shorten(value)} has no counterpart here")


def _agreed(default: Any, left: dict[str, Any], *names: str) -> Any:
    """Takes the value of a field that has several names."""
    found = {name: value for name in names if (value := left.pop(name, None)) is not None}
    first = next(iter(found.values()), default)
    if any(value != first for value in found.values()):
        raise ConfigError(" and ".join(f"{name} = {shorten(value)}" for name, value in found.items()) + " differ")
    return first


def shown_dict(name: str, value: Any) -> dict[str, Any]:
    """Returns a copy of an object of a config, or raises a ConfigError if it is none."""
    if not isinstance(value, dict):
        raise ConfigError(f"{name} must be an object, got {shorten(value)}")
    return dict(value)


@contextmanager
def _in_hf_names(keys: dict[str, str] = HF_KEYS, kept: Set[str] | dict[str, Any] = frozenset()) -> Iterator[None]:
    """Renames the fields of `ModelArgs` in a ConfigError to Hugging Face's, by `keys`, but for those in `kept`."""
    names = keys | {key: f"rope_scaling.{name}" for key, name in HF_ROPE_KEYS.items()}
    names |= {"n_dense_layers": "first_k_dense_replace", "n_mtp_layers": "num_nextn_predict_layers"}
    names = {ours: theirs for ours, theirs in names.items() if ours not in kept}
    try:
        yield
    except ConfigError as error:
        text = re.sub(r"\w+", lambda word: names.get(word[0], word[0]), str(error))
        raise ConfigError(text) from None


def _check_hf_field(ours: str, value: Any) -> Any:
    with _in_hf_names():
        return check_field(ours, value)


def _is_activation_of_hf(name: str) -> bool:
    """Returns whether transformers has an activation of this name, and computes it as `ACTIVATIONS` does."""
    x = torch.linspace(-8, 8, 257, dtype=torch.float64)
    ours: Any = ACTIVATIONS
    return name in HF_ACTIVATIONS and torch.allclose(ours[name](x), HF_ACTIVATIONS[name](x), 1e-6, 1e-9)


# --- Config: to Hugging Face -----------------------------------------------------------------------------------------


def hf_config(args: ModelArgs, dtype: torch.dtype, is_fp8: bool) -> dict[str, Any]:
    """Translates a model's shape into the config of a class of transformers; `dtype` is that of all but FP8.

    Raises:
        ConfigError: No class computes the same; the message names the field and the reason.
    """
    layout = [args.is_moe(i) for i in range(args.n_layers)]
    n_dense = layout.index(True) if any(layout) else args.n_layers
    has_moe = any(args.is_moe(i) for i in range(args.n_layers + args.n_mtp_layers))
    is_contiguous, is_v2 = all(layout[n_dense:]), args.score_func == "softmax" and has_moe
    kind = "deepseek_v2" if is_v2 else "deepseek_v3" if is_contiguous else "glm4_moe_lite"
    kind = "deepseek_v32" if args.index_topk else kind if args.kv_lora_rank else "ernie4_5"
    # to choose from all groups is the same as having one
    groups = 1 if args.n_limited_groups == args.n_expert_groups else args.n_expert_groups
    if obstacles := _obstacles(args, has_moe, is_v2, is_contiguous, groups):
        raise ConfigError(f"this model cannot be exported: no class of transformers has {obstacles[0]}")
    keys = HF_KEYS if args.kv_lora_rank else HF_PLAIN_KEYS
    keys = keys | HF_INDEX_KEYS if args.index_topk else keys
    config: dict[str, Any] = {theirs: getattr(args, ours) for ours, theirs in keys.items()}
    config |= {"architectures": [HF_CLASSES[kind]], "model_type": kind, "num_key_value_heads": args.n_heads}
    config |= {"torch_dtype": str(dtype).removeprefix("torch."), "num_nextn_predict_layers": args.n_mtp_layers}
    config |= {"tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0}
    config |= {"rope_theta": args.rope_theta, "rope_scaling": _rope_scaling(args) if args.use_yarn else None}
    if kind == "ernie4_5":
        config["use_bias"] = False
    else:
        config |= {"q_lora_rank": args.q_lora_rank or None, "attention_bias": False, "n_group": groups}
        config |= {"topk_group": min(groups, args.n_limited_groups), "aux_loss_alpha": args.aux_loss_alpha}
        config["topk_method"] = "noaux_tc" if not is_v2 else "group_limited_greedy" if groups > 1 else "greedy"
        config |= HF_ROUTING["softmax" if is_v2 else "sigmoid"]
        types = {"mlp_layer_types": ["sparse" if is_moe else "dense" for is_moe in layout]}
        config |= {} if kind == "glm4_moe_lite" else {"first_k_dense_replace": n_dense, "moe_layer_freq": 1}
        config |= types if kind in ("glm4_moe_lite", "deepseek_v32") else {}
    if is_fp8:
        config["quantization_config"] = HF_FP8 | ({"scale_fmt": args.scale_fmt} if args.scale_fmt else {})
    extra = _fields_without_place(args, config)
    return config | ({"bytegpt": extra} if extra else {})


def _obstacles(args: ModelArgs, has_moe: bool, is_v2: bool, is_contiguous: bool, groups: int) -> list[str]:
    """Lists the reasons why a model is none of transformers' classes; contiguous MoE layers go on to the last."""
    is_plain, plain = args.kv_lora_rank == 0, "plain attention (kv_lora_rank = 0) that rotates neighbouring pairs, with"
    reasons = {
        "qk_rope_head_dim = 0": args.qk_rope_head_dim == 0,
        f"{plain} MoE layers": is_plain and has_moe,
        f"{plain} q_lora_rank above 0": is_plain and args.q_lora_rank > 0,
        f"{plain} qk_nope_head_dim above 0": is_plain and args.qk_nope_head_dim > 0,
        f"{plain} a v_head_dim that is not qk_rope_head_dim": is_plain and args.v_head_dim != args.qk_rope_head_dim,
        "MoE layers without shared experts": has_moe and args.n_shared_experts == 0,
        "gate_bias with score_func softmax": is_v2 and args.gate_bias,
        "score_func sigmoid without gate_bias": has_moe and not is_v2 and not args.gate_bias,
        "fewer than two experts in a group": has_moe and not is_v2 and args.n_routed_experts // groups < 2,
        "moe_layer_freq above 1 with score_func softmax": is_v2 and not is_contiguous,
        "n_heads that does not divide dim, with score_func softmax": is_v2 and args.dim % args.n_heads,
        "an odd qk_nope_head_dim with score_func softmax": is_v2 and args.qk_nope_head_dim % 2,
        "an indexer with score_func softmax": is_v2 and args.index_topk > 0,
        "an odd kv_lora_rank with score_func softmax": is_v2 and args.kv_lora_rank % 2,
    }
    return [reason for reason, holds in reasons.items() if holds]


def _attention_factor(mscale: float, factor: float) -> float:
    """Returns the factor of cosines and sines by which YaRN corrects the temperature of plain attention."""
    return 0.1 * mscale * math.log(factor) + 1.0


def _rope_scaling(args: ModelArgs) -> dict[str, Any]:
    rope = {theirs: getattr(args, ours) for ours, theirs in HF_ROPE_KEYS.items()}
    rope |= {"rope_type": "yarn", "type": "yarn"}  # older versions read "type"
    if args.kv_lora_rank == 0:
        return rope | {"attention_factor": _attention_factor(args.mscale, args.rope_factor)}
    rope["mscale"] = args.mscale
    return rope if args.mscale else rope | {"attention_factor": 1.0}


def _fields_without_place(args: ModelArgs, config: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of `ModelArgs` that cannot be read back from a config, and checks that all others can."""
    plain = ModelArgs.from_dict(_derive(config)).to_dict()
    extra = {key: value for key, value in args.to_dict().items() if value != plain[key] and key != "dtype"}
    if "score_func" in extra:
        extra["gate_bias"] = args.gate_bias  # whose default depends on it
    again = ModelArgs.from_dict(_derive(config) | extra)
    if again.to_dict() | {"dtype": args.dtype} != args.to_dict():
        raise ConfigError("this model cannot be exported: no config of transformers has all that is in its own")
    return extra


def tokenizer_files(max_seq_len: int) -> dict[str, dict[str, Any]]:
    """Builds the files of a transformers tokenizer whose ids are the bytes of UTF-8, and 0 ends a text.

    It is BPE without merges over GPT-2's alphabet of a visible character for each byte. Only byte 0 stands for itself:
    as the special token it is looked for in the text, before that is spelled in the alphabet.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {byte: chr(byte) for byte in visible}
    letters |= {byte: chr(256 + i) for i, byte in enumerate(sorted(set(range(256)) - set(visible)))}
    end = {"id": 0, "content": "\0", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    vocab = {letters[byte] if byte else "\0": byte for byte in range(256)}
    tokenizer: dict[str, Any] = {"version": "1.0", "truncation": None, "padding": None}
    tokenizer |= {"added_tokens": [end | {"special": True}], "normalizer": None, "pre_tokenizer": level}
    tokenizer |= {"post_processor": None, "decoder": level, "model": {"type": "BPE", "vocab": vocab, "merges": []}}
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "\0", "pad_token": "\0"}
    config |= {"clean_up_tokenization_spaces": False, "model_max_length": max_seq_len}
    config["padding_side"] = "left"  # so that every row of a batch goes on where its prompt ends
    # nothing between messages: a base model has only one text to go on with
    config["chat_template"] = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": config}


# --- Opening either format -------------------------------------------------------------------------------------------


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
    args = _without_lost_modules(args, header, folder / CONFIG_FILE)
    where = folder / (INDEX_FILE if (folder / INDEX_FILE).exists() else SINGLE_FILE)

    def stored_name(name: str) -> str:
        stored = hf_name(name, args)
        if name.startswith("mtp.") and stored not in header:
            has = f"num_nextn_predict_layers = {args.n_mtp_layers}, of which a part is there"
            raise CheckpointError(f"{where}: tensor {stored} is missing; {CONFIG_FILE} has {has}")
        return stored

    found = collect_tensors(folder, args, [where], [header], stored_name, hf_scale_name, mtp_copies(args))
    return replace(found, config=config)


def _without_lost_modules(args: ModelArgs, header: dict[str, TensorInfo], config_path: Path) -> ModelArgs:
    """Returns the shape without MTP modules if none of their tensors is there: transformers drops them on loading."""
    names = (re.match(r"model\.layers\.(\d{1,9})\.", name) for name in header)
    if not args.n_mtp_layers or any(name and int(name[1]) >= args.n_layers for name in names):
        return args
    if command.is_local_rank_zero():
        has = f"num_nextn_predict_layers is {args.n_mtp_layers}, but no tensor of an MTP module is there"
        command.warn(str(config_path), f"{has}; read as a model without MTP modules")
    return replace(args, n_mtp_layers=0)


def read_hf_headers(folder: Path) -> dict[str, TensorInfo]:
    """Reads the headers of a Hugging Face checkpoint's files, by its index if it has one.

    Raises:
        CheckpointError: The index leads out of the folder, or it and the files contradict each other.
    """
    files = {path.name for path in folder.glob("*.safetensors")}
    if not (folder / INDEX_FILE).exists():
        if strays := sorted(files - {SINGLE_FILE}):
            reason = f"without {INDEX_FILE}, {SINGLE_FILE} must be the only such file"
            raise CheckpointError(f"{folder / strays[0]}: {reason}; remove it, or put the index there")
        if not files:
            raise CheckpointError(f"{folder} has neither {INDEX_FILE} nor {SINGLE_FILE}")
        return read_header(inside(folder, SINGLE_FILE))
    where = _read_index(folder / INDEX_FILE)
    if strays := sorted(files - set(where.values())):
        raise CheckpointError(f"{folder / strays[0]} is none of the files that {INDEX_FILE} names; remove it")
    infos: dict[str, TensorInfo] = {}
    for file in sorted(set(where.values())):
        for name, info in read_header(inside(folder, file)).items():
            if where.get(name) != file:
                has = f"has it in {shorten(where[name])}" if name in where else "does not have it"
                raise CheckpointError(f"{info} is in it, but {INDEX_FILE} {has}")
            infos[name] = info
    if lost := sorted(where.keys() - infos.keys()):
        file = where[lost[0]]
        raise CheckpointError(f"{folder / file}: tensor {shorten(lost[0])} is not in it, but in {INDEX_FILE}")
    return infos


def _read_index(index: Path) -> dict[str, str]:
    """Reads the file of each tensor from an index, once all are checked to be names of files beside it."""
    where = read_json(index, CheckpointError).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise CheckpointError(f"{index} has no weight_map that names a file for each tensor")
    for name, file in where.items():
        if file != Path(file).name or not file.endswith(".safetensors") or not file.isprintable():
            reason = f"is in {shorten(file)}, which is no file of the folder"
            raise CheckpointError(f"{index}: tensor {shorten(name)} {reason}")
    return where


def load_model(
    path: str | os.PathLike,
    device: str = "cpu",
    compute_dtype: torch.dtype = torch.float32,
    keep_fp8: bool = False,
    build: Callable[..., Transformer] = Transformer,
    ctx: ParallelContext | None = None,
    weight_dtype: torch.dtype | None = None,
) -> Transformer:
    """Loads a model in evaluation mode: its matrices are cast once, while they are read.

    Generate under `torch.inference_mode()`; after `.train()` it can be trained on.

    Args:
        path: As for `open_checkpoint`; of a run, the best checkpoint is taken.
        device: Where the model goes.
        compute_dtype: Dtype of activations.
        keep_fp8: Keep weights that are stored in FP8 in it. By default they are dequantised.
        build: Builds the model from its shape, `compute_dtype` and whether it has FP8 weights.
        ctx: The processes over which `build` shards it; this one reads its own shard only.
        weight_dtype: Dtype of the matrices, None: `compute_dtype`; the router's stay in float32. For float8_e4m3fn,
            the layers that FP8 checkpoints have in it are quantised, and the other matrices in bfloat16.

    Raises:
        CheckpointError: No checkpoint there, or one that does not fit its own config.
        ConfigError: Its config is not one of a model.
    """
    ctx = ctx or ParallelContext()
    checkpoint = open_checkpoint(path)
    check_model_parallel(checkpoint.args, ctx.mp_size, "the number of processes")
    try:
        is_fp8 = weight_dtype == E4M3 or (keep_fp8 and checkpoint.is_fp8)
        model = build(checkpoint.args, compute_dtype, fp8_weights=is_fp8)
    except (RuntimeError, OverflowError, MemoryError) as error:
        raise too_large(checkpoint.folder, error) from None
    for name, p in model.named_parameters():
        if is_matrix(name, p.shape) and p.dtype != E4M3:
            dtype = torch.bfloat16 if weight_dtype == E4M3 else weight_dtype or compute_dtype
            p.data = torch.empty_like(p, dtype=dtype)
    load_weights(model, checkpoint, ctx)
    return model.to(device).eval()


# --- Planning a conversion -------------------------------------------------------------------------------------------


@dataclass
class Job:
    """The conversion of one tensor to a dtype, and the rectangles in files where it goes."""

    source: ShardedTensor
    dtype: torch.dtype
    places: list[ShardSlice] = field(default_factory=list)


def make_plan(
    checkpoint: Checkpoint, world: int = 1, is_hf: bool = False, dtype: str | None = None
) -> tuple[list[SafetensorsWriter], list[Job], dict[str, dict[str, Any]]]:
    """Lays out a conversion, for which no tensor need be read; arguments as of `convert`.

    Returns:
        The files of tensors, the conversions that fill them, and the JSON files beside them.

    Raises:
        CheckpointError: The model cannot be sharded so, or has a dtype that must be changed.
        ConfigError: No class of transformers is like this model.
    """
    args = checkpoint.args
    jobs = {name: Job(source, _new_dtype(checkpoint, name, dtype)) for name, source in checkpoint.tensors.items()}
    is_fp8 = any(job.dtype == E4M3 for job in jobs.values())
    matrices = [job.dtype for name, job in jobs.items() if is_matrix(name, job.source.shape) and job.dtype != E4M3]
    widest = max(matrices, key=lambda dtype: dtype.itemsize)  # a model is loaded in one dtype, which must hold all
    if is_hf:
        with naming(checkpoint.folder / CONFIG_FILE):
            config = hf_config(args, widest, is_fp8)
        _check_blocks(jobs)
    else:
        check_model_parallel(args, world)
        config = args.to_dict() | {"dtype": "fp8" if is_fp8 else CONFIG_DTYPES[widest]}
    outputs = _lay_out(jobs, args, world, is_hf)
    texts = _texts_of_hf(checkpoint, config) | {INDEX_FILE: build_index(outputs)} if is_hf else {CONFIG_FILE: config}
    return outputs, list(jobs.values()), texts


def _texts_of_hf(checkpoint: Checkpoint, config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the JSON files of a Hugging Face checkpoint but the index: config, generation config, tokenizer.

    Bytes have a tokenizer of our own. That of another vocabulary is copied, and its special ids come from the source.
    """
    ids: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if checkpoint.args.vocab_size == 256:  # as generate.py samples; servers heed a request's temperature only with this
        ids |= {"do_sample": True, "temperature": 0.8, "top_k": 0}
        return {CONFIG_FILE: config, GENERATION_FILE: ids} | tokenizer_files(checkpoint.args.max_seq_len)
    ids = {key: checkpoint.config.get(key) for key in ids}
    if (path := checkpoint.folder / GENERATION_FILE).exists():
        ids |= {key: value for key, value in read_json(path, ConfigError).items() if value is not None}
    config = config | {key: checkpoint.config.get(key, ids[key]) for key in config.keys() & ids.keys()}
    return {CONFIG_FILE: config, GENERATION_FILE: ids}


def _new_dtype(checkpoint: Checkpoint, name: str, wanted: str | None) -> torch.dtype:
    """Returns the new dtype of a tensor: norms and the router keep their precision, unless all is to be fp32."""
    source = checkpoint.tensors[name]
    if wanted == "fp8" and name in checkpoint.fp8_layers:
        return E4M3
    if wanted == "bf16" and is_matrix(name, source.shape):
        return torch.bfloat16
    if wanted is None and source.dtype not in CONFIG_DTYPES:
        stored = DTYPE_NAMES[source.dtype]
        raise CheckpointError(f"{source.shards[0].info} is {stored}: choose a --dtype for the new one")
    return torch.float32 if wanted == "fp32" or source.dtype not in CONFIG_DTYPES else source.dtype


def _check_blocks(jobs: dict[str, Job]) -> None:
    """Refuses FP8 weights that transformers would dequantise with the scales of other blocks.

    It takes a block for as large as rows divided by rows of scales, which in 192 rows with two is 96 and not 128. Where
    that division has a remainder, as in DeepSeek-V3's 576 rows, it reports it, and its FP8 kernels have blocks of 128.
    """
    for job in jobs.values():
        shape = job.source.shape
        if job.dtype == E4M3 and any(n > BLOCK and n % BLOCK and n % -(-n // BLOCK) == 0 for n in shape):
            problem = f"{job.source.shards[0].info} {list(shape)} would be misread by transformers in FP8"
            raise CheckpointError(f"{problem}, which wants sizes that are multiples of {BLOCK}; take --dtype bf16")


def _lay_out(jobs: dict[str, Job], args: ModelArgs, world: int, is_hf: bool) -> list[SafetensorsWriter]:
    """Lays out the files of tensors, and sets the places of the jobs in them."""
    scale_name = hf_scale_name if is_hf else native_scale_name
    stored_names = {name: [hf_name(name, args) if is_hf else name] for name in jobs}
    for name, copy in mtp_copies(args) if is_hf else ():
        stored_names[name].append(copy)
    contents: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{} for _ in range(world)]
    targets = []  # job, rank, name and rectangle of each tensor in a file
    for name, job in jobs.items():
        for rank in ranks_with(name, args.n_routed_experts, world):
            box = native_slice(name, job.source.shape, args.n_routed_experts, rank, world)
            for stored in stored_names[name]:
                targets.append((job, rank, stored, box))
                contents[rank][stored] = job.dtype, box.shape[-len(job.source.shape) :]
                if job.dtype == E4M3:
                    contents[rank][scale_name(stored)] = torch.float32, tuple(-(-n // BLOCK) for n in box.shape)
    if is_hf:
        outputs = _split(contents[0])
        infos = [{name: info for output in outputs for name, info in output.infos.items()}]
    else:
        outputs = [SafetensorsWriter(native_file(rank, world), content) for rank, content in enumerate(contents)]
        infos = [output.infos for output in outputs]
    for job, rank, stored, box in targets:
        job.places.append(ShardSlice(infos[rank][stored], box, infos[rank].get(scale_name(stored))))
    return outputs


def _split(tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> list[SafetensorsWriter]:
    """Distributes tensors, in their order, over files of at most 5 GB."""
    groups: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = []
    size = MAX_FILE_BYTES
    for name, (dtype, shape) in tensors.items():
        n_bytes = math.prod(shape) * dtype.itemsize + len(name) + 150  # of its entry in the header
        if size + n_bytes > MAX_FILE_BYTES:
            groups.append({})
            size = 0
        groups[-1][name] = dtype, shape
        size += n_bytes
    names = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    return [SafetensorsWriter(name, group) for name, group in zip(names, groups, strict=True)]


def build_index(outputs: list[SafetensorsWriter]) -> dict[str, Any]:
    """Builds the index of a Hugging Face checkpoint: the size of its tensors and the file of each."""
    total = sum(info.nbytes for output in outputs for info in output.infos.values())
    where = {name: output.name for output in outputs for name in output.infos}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}


# --- Moving bytes ----------------------------------------------------------------------------------------------------


def write_tensors(
    folder: Path, outputs: list[SafetensorsWriter], jobs: list[Job], scale_fmt: str | None, progress: bool
) -> None:
    """Writes files of tensors into a folder, several tensors at a time; the first error stops all.

    Args:
        folder: Where to.
        outputs: The files.
        jobs: The conversions that fill them.
        scale_fmt: Format of new scales, as in `ModelArgs`.
        progress: Whether to show a bar on stderr, if that is a terminal.

    Raises:
        CheckpointError: A tensor cannot be read, has numbers that are not finite, or its blocks cannot be split so.
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
    """Runs jobs in any of several threads, all of which end soon once `stop` is set."""

    def __init__(self, folder: Path, scale_fmt: str | None, bar: tqdm):
        self.folder, self.scale_fmt, self.bar = folder, scale_fmt, bar
        self.stop, self._lock = threading.Event(), threading.Lock()

    def run(self, job: Job) -> None:
        """Reads a tensor band by band, each in its new dtype, and writes it to all of its places."""
        source, scales = job.source, []
        quantises = job.dtype == E4M3 != source.dtype
        # blocks are counted from the corner of the full tensor if all slices are aligned to them, else of each slice
        is_aligned = not quantises or all(is_block_aligned(place.box) for place in job.places)
        for region in [source.box] if is_aligned else dict.fromkeys(place.box for place in job.places):
            new_scales = torch.empty([-(-n // BLOCK) for n in region.shape] if quantises else 0)
            for band in source.bands(region, 1 if job.dtype == source.dtype else BLOCK):
                if self.stop.is_set():
                    return
                if quantises:
                    data, s = source.read_fp8(band, self.scale_fmt)
                    rows, cols = band.within(region)
                    new_scales[rows.start // BLOCK :, cols.start // BLOCK :][: s.shape[0], : s.shape[1]] = s
                elif job.dtype == source.dtype:
                    data = source.read_bytes(band)
                else:
                    data = source.read(band, job.dtype)
                self._write_band(job, band, data.view(torch.uint8))
            if quantises:
                scales.append((region, new_scales))
        if job.dtype == E4M3:
            scales = scales or source.read_scales()
            for place in job.places:
                self._write(place.scale, 0, source.scales(scales, place.box))

    def _write_band(self, job: Job, band: Slice2D, data: torch.Tensor) -> None:
        """Writes a band, uint8 (rows, bytes of a row), to the places that overlap it."""
        size = job.dtype.itemsize
        for place in job.places:
            if (shared := place.box.meet(band)) is not None:
                rows, cols = shared.within(band)
                block, width = data[rows, cols.start * size : cols.stop * size], place.box.shape[1]
                start = (shared.top - place.box.top) * width + shared.left - place.box.left
                for i, lines in enumerate([block] if shared.shape[1] == width else block):
                    self._write(place.info, (start + i * width) * size, lines)

    def _write(self, info: TensorInfo, offset: int, data: torch.Tensor) -> None:
        with open(self.folder / info.path, "r+b", buffering=0) as file:
            file.seek(info.offset + offset)
            write_all(file, data)
        with self._lock:
            self.bar.update(data.nbytes)


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
        target: A new folder; it must not exist, or be empty.
        world: Number of shards, for the native format.
        is_hf: Into Hugging Face's format instead.
        dtype: Dtype of the linear layers: "fp32", "bf16", "fp8", or None: as they are.
        progress: Whether to show a bar on stderr.

    Raises:
        CheckpointError: The source is damaged or cannot be converted so, or the target cannot be written.
        ConfigError: The source's config is not one of a model, or not one that transformers has.
    """
    check_paths(Path(source), Path(target))
    checkpoint = open_checkpoint(source)
    outputs, jobs, texts = make_plan(checkpoint, world, is_hf, dtype)
    with new_folder(Path(target)) as folder:
        if checkpoint.args.vocab_size != 256:  # its tokenizer goes with it, in files of any name
            copy_files(checkpoint.folder, folder, {CONFIG_FILE, INDEX_FILE, STATE_FILE})
        for name, text in texts.items():
            write_json(folder / name, text)
        write_tensors(folder, outputs, jobs, checkpoint.args.scale_fmt, progress)


def check_paths(source: Path, target: Path) -> None:
    """Raises a CheckpointError if a target is the source, or within it, or is written where the source is."""
    home, end = resolved(source), resolved(target)
    if end == home or home in end.parents:
        raise CheckpointError(f"{target} is {source} or inside it; choose another path")
    if end.name and temporary_path(end) in (home, *home.parents):
        raise CheckpointError(f"{source} is where {target} would be written; choose another path")


def copy_files(source: Path, target: Path, skipped: Set[str]) -> None:
    """Copies a folder's files, but for those with weights, and some by name."""
    for path in source.iterdir():
        if path.is_file() and path.suffix not in WEIGHT_SUFFIXES and path.name not in skipped:
            shutil.copyfile(inside(source, path.name), target / path.name)


# --- Command ---------------------------------------------------------------------------------------------------------


def run_conversion(prog: str, body: Callable[[], None]) -> int:
    """Runs a command that streams tensors; returns its exit code."""
    torch.set_num_threads(1)  # several tensors are converted at a time
    keep_freed_memory()
    return command.run(prog, body, (CheckpointError, ConfigError))


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = command.Parser(
        "convert.py",
        description="Converts a checkpoint: to another number of shards, to Hugging Face's format or back, to another "
        "dtype. The source may be in either format, sharded or not, FP8 or not: its files show that.",
    )
    parser.add_argument("--ckpt-path", type=Path, required=True, metavar="SRC", help="a checkpoint's or a run's folder")
    parser.add_argument("--save-path", type=Path, required=True, metavar="DST", help="a new folder")
    shards = command.integer(1, 9999)
    parser.add_argument("--model-parallel", type=shards, default=1, metavar="N", help="number of shards (default: 1)")
    parser.add_argument(
        "--format", choices=("native", "hf"), default="native", help="hf: for transformers (default: native)"
    )
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp8"), help="of linear layers (default: as they are)")
    args = parser.parse_args(argv)
    is_hf = args.format == "hf"
    if is_hf and args.model_parallel > 1:
        parser.error("--model-parallel is for --format native; transformers shards a model by itself")
    return run_conversion(
        "convert.py", lambda: convert(args.ckpt_path, args.save_path, args.model_parallel, is_hf, args.dtype, True)
    )


if __name__ == "__main__":
    sys.exit(main())

"""Hugging Face's formats: the configs, names and tokenizer by which transformers knows the models that are here.

Three of its classes compute what a `Transformer` does: DeepSeek-V3 (Kimi-K2 is one too), GLM-4-MoE-Lite, where MoE and
dense layers may alternate, and DeepSeek-V2 with its softmax routing. A config is translated in either direction, field
by field, and whatever has no counterpart is refused by its name rather than dropped.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fp8_ops import BLOCK
from model import ConfigError, ModelArgs
from tensor_files import shown

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
            raise ConfigError(f"bytegpt contradicts the other fields, which mean {key} = {shown(derived[key])}")
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
        raise ConfigError(f"model_type {shown(kind)} is not one of {', '.join(HF_CLASSES)}, kimi_k2")
    is_v2 = kind == "deepseek_v2"
    values: dict[str, Any] = {"score_func": "softmax" if is_v2 else "sigmoid"}
    nothing = {"q_lora_rank": 0, "n_shared_experts": 0, "n_expert_groups": 1, "n_limited_groups": 1}
    for ours, theirs in HF_KEYS.items():
        if theirs not in left:
            raise ConfigError(f"{theirs} is missing")
        value = left.pop(theirs)
        values[ours] = value = nothing.get(ours) if value is None else value
        if type(getattr(ModelArgs, ours)) is int and (type(value) is not int or abs(value) >= 1 << 40):
            raise ConfigError(f"{theirs} must be an integer, got {shown(value)}")
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
        raise ConfigError(f"topk_method {shown(method)} has no counterpart here with model_type {kind}")
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
            raise ConfigError(f"{where}{shown(key)} = {shown(value)} has no counterpart here{must}")


def _agreed(default: Any, left: dict[str, Any], *names: str) -> Any:
    """Takes the value of a field that has several names."""
    found = {name: value for name in names if (value := left.pop(name, None)) is not None}
    if any(value != next(iter(found.values())) for value in found.values()):
        raise ConfigError(" and ".join(f"{name} = {shown(value)}" for name, value in found.items()) + " differ")
    return next(iter(found.values()), default)


def _derive_layout(left: dict[str, Any], n_layers: int) -> dict[str, Any]:
    """Which layers are MoE: by a list of all, or by the number of dense ones at the start."""
    types, first = left.pop("mlp_layer_types", None), left.pop("first_k_dense_replace", None)
    if first is None and types is None:
        raise ConfigError("first_k_dense_replace is missing")
    if first is not None and (type(first) is not int or first < 0):
        raise ConfigError(f"first_k_dense_replace must be a number of layers, got {shown(first)}")
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
        raise ConfigError(f"{name} must be an object, got {shown(value)}")
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

"""Hugging Face's format: transformers computes the same from what is exported, and what it saves is read back."""

import json
import math
import shutil
import socket
import time
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from test_convert import TINY, TOKENS, assert_same, change, divisible, draws, logits, one_line, tensors_of, tiny
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline
from transformers.activations import ACT2FN

import checkpoint as checkpoints
import convert
import generate
import model as models
import parallel
from checkpoint import save_model
from convert import args_from_hf, hf_config, load_model, open_checkpoint
from model import ConfigError, ModelArgs, Transformer
from safetensors_io import CheckpointError

MISSING = [name for name in ("fastapi", "uvicorn", "openai", "pydantic") if find_spec(name) is None]  # of `serve`


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint to export."""
    save_model(tiny(), tmp_path / "saved")
    return tmp_path / "saved"


# --- Hugging Face -----------------------------------------------------------------------------------------------------

KINDS = {
    "DeepseekV3ForCausalLM": {"score_func": "sigmoid", "moe_layer_freq": 1},
    # heads enough that hardly a position has a score of 0, since which of several does is chosen by the way to sort
    "DeepseekV32ForCausalLM": {
        "score_func": "sigmoid",
        "moe_layer_freq": 2,
        "q_lora_rank": 8,
        "index_n_heads": 16,
        "index_head_dim": 16,
        "index_topk": 4,
    },
    "Glm4MoeLiteForCausalLM": {"score_func": "sigmoid", "moe_layer_freq": 2, "n_layers": 3, "n_dense_layers": 0},
    "DeepseekV2ForCausalLM": {"score_func": "softmax", "moe_layer_freq": 1, "kv_lora_rank": 140},
    "Ernie4_5ForCausalLM": {"n_routed_experts": 0, "q_lora_rank": 0, "kv_lora_rank": 0, "qk_nope_head_dim": 0},
}


@pytest.mark.parametrize("kind", KINDS)
@settings(draws, max_examples=5)
@given(st.data())
def test_logits_of_transformers(tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject) -> None:
    fixed = {"n_routed_experts": 8, "dim": 32} | KINDS[kind]
    if "n_dense_layers" not in fixed:
        fixed |= {"n_layers": 2, "n_dense_layers": data.draw(st.integers(0, 1))}
    if kind == "Ernie4_5ForCausalLM":  # heads of one width, which times n_heads need not be dim
        fixed |= dict.fromkeys(("qk_rope_head_dim", "v_head_dim"), data.draw(st.sampled_from([2, 4, 8, 32])))
    if kind == "DeepseekV32ForCausalLM":
        fixed |= {
            "index_topk": data.draw(st.integers(1, 14)),
            "index_head_dim": data.draw(st.sampled_from([8, 16, 21])),
        }
    tmp = tmp_path_factory.mktemp("hf")
    model = tiny(**data.draw(divisible(**fixed)))
    save_model(model, tmp / "a")
    convert.convert(tmp / "a", tmp / "hf", is_hf=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp / "hf")
    assert type(theirs).__name__ == kind and theirs.dtype == torch.float32
    with torch.no_grad():
        expected = model(TOKENS)
        torch.testing.assert_close(theirs(TOKENS).logits, expected, rtol=0, atol=1e-5 * max(1, expected.abs().max()))
    theirs.save_pretrained(tmp / "theirs")  # and back, as transformers itself writes it, which drops MTP modules
    torch.testing.assert_close(logits(tmp / "theirs"), expected, rtol=0, atol=1e-5 * max(1, expected.abs().max()))
    shutil.rmtree(tmp)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_of_the_pipeline(tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes], kind: str) -> None:
    shape = {"max_seq_len": 256, "original_seq_len": 256, "dim": 32, "n_mtp_layers": 0} | KINDS[kind]
    model = tiny(4, **shape)
    with torch.no_grad():
        model.head.weight[0] = 0.0  # byte 0 would end the text
    save_model(model, tmp_path / "a")
    convert.convert(tmp_path / "a", tmp_path / "hf", is_hf=True)
    flags = [
        "--prompt",
        "The ",
        "--temperature",
        "0",
        "--max-new-tokens",
        "200",
        "--device",
        "cpu",
        "--weights",
        "fp32",
    ]
    assert generate.main(["--ckpt-path", str(tmp_path / "hf"), *flags]) == 0
    ours = capsysbinary.readouterr().out
    writer = pipeline("text-generation", model=str(tmp_path / "hf"), device="cpu")
    theirs = writer("The ", max_new_tokens=200, do_sample=False)[0]["generated_text"]
    assert len(ours) >= 204 and ours.rstrip(b"\n").decode(errors="replace") == theirs.rstrip("\n")


def test_folder_is_complete(saved: Path, tmp_path: Path) -> None:
    convert.convert(saved, tmp_path / "hf", is_hf=True)
    names = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    names |= {"model-00001-of-00001.safetensors", "model.safetensors.index.json"}
    assert {path.name for path in (tmp_path / "hf").iterdir()} == names
    config = AutoConfig.from_pretrained(tmp_path / "hf")
    assert config.eos_token_id == 0 and config.dtype == torch.float32 and config.vocab_size == 256
    sampling = GenerationConfig.from_pretrained(tmp_path / "hf")
    assert (sampling.do_sample, sampling.temperature, sampling.top_k) == (True, generate.Sampling().temperature, 0)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    tensors = load_file(tmp_path / "hf" / "model-00001-of-00001.safetensors")
    assert index["weight_map"] == dict.fromkeys(tensors, "model-00001-of-00001.safetensors")
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    assert {"model.layers.3.enorm.weight", "model.layers.3.shared_head.norm.weight"} <= tensors.keys()
    assert torch.equal(tensors["model.layers.3.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    with safe_open(tmp_path / "hf" / "model-00001-of-00001.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_files_are_split_by_size(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "MAX_FILE_BYTES", 8000)
    convert.convert(saved, tmp_path / "hf", is_hf=True)
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors" and len(files) > 3
    assert all(file.stat().st_size <= 8000 or len(load_file(file)) == 1 for file in files)
    assert torch.equal(logits(tmp_path / "hf"), logits(saved))
    AutoModelForCausalLM.from_pretrained(tmp_path / "hf")


@settings(draws, max_examples=200)
@given(st.text())
def test_tokenizer_is_bytes(byte_tokenizer: Any, text: str) -> None:
    ids = byte_tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert byte_tokenizer.decode(ids) == text


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    tmp = tmp_path_factory.mktemp("tokenizer")
    save_model(tiny(), tmp / "a")
    convert.convert(tmp / "a", tmp / "hf", is_hf=True)
    return AutoTokenizer.from_pretrained(tmp / "hf")


def test_tokenizer_knows_all_bytes(byte_tokenizer: Any) -> None:
    every = "".join(map(chr, range(0x300))) + "\u0100\u0120 \uffff\U0010ffff"
    for text in (every, "\0", "a\0\0b", "\u0100", " a  b ,.\n", "<s></s><|endoftext|>", "a" * 10000):
        ids = byte_tokenizer(text)["input_ids"]
        assert ids == list(text.encode()) and byte_tokenizer.decode(ids) == text
    assert len(byte_tokenizer) == byte_tokenizer.vocab_size == 256
    assert sorted(byte_tokenizer.get_vocab().values()) == list(range(256))
    assert byte_tokenizer.eos_token_id == 0 and byte_tokenizer.pad_token_id == 0
    for value in range(1, 256):  # those too that are no UTF-8 by themselves
        assert byte_tokenizer.decode([value]) == bytes([value]).decode(errors="replace")


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_batch_go_on_as_each_alone(tmp_path: Path, kind: str) -> None:
    hf = exported(tmp_path, max_seq_len=64, original_seq_len=64, dim=32, **KINDS[kind])
    tokenizer, theirs = AutoTokenizer.from_pretrained(hf), AutoModelForCausalLM.from_pretrained(hf)
    prompts = ["a", "The quick brown fox", "\n", "é = 1"]
    batch = tokenizer(prompts, padding=True, return_tensors="pt")
    length = len(prompts[1])
    assert batch["input_ids"].tolist() == [[0] * (length - len(t.encode())) + list(t.encode()) for t in prompts]
    together = theirs.generate(**batch, max_new_tokens=16, do_sample=False)[:, length:]
    for prompt, row in zip(prompts, together.tolist(), strict=True):
        alone = theirs.generate(torch.tensor([list(prompt.encode())]), max_new_tokens=16, do_sample=False)
        new = alone[0, len(prompt.encode()) :].tolist()
        assert len(new) > 4 and row == new + [0] * (len(row) - len(new))


def test_chat_template_joins_contents(byte_tokenizer: Any, tmp_path: Path) -> None:
    messages = [{"role": "system", "content": " Grüße\n"}, {"role": "user", "content": "def f("}]
    messages += [{"role": "assistant", "content": "x):\n\n"}, {"role": "user", "content": "    return "}]
    text = " Grüße\ndef f(x):\n\n    return "
    byte_tokenizer.save_pretrained(tmp_path)  # the template becomes a file of its own
    for tokenizer in (byte_tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == text
        assert tokenizer.apply_chat_template(messages)["input_ids"] == list(text.encode())
        assert tokenizer.padding_side == "left"


@pytest.mark.slow
@pytest.mark.skipif(MISSING != [], reason=f"transformers[serving] is not installed: {', '.join(MISSING)} missing")
def test_chat_completion_of_transformers_serve(tmp_path: Path) -> None:
    model = tiny(max_seq_len=64, original_seq_len=64, n_mtp_layers=0)
    with torch.no_grad():
        model.head.weight[0] = model.head.weight[128:] = 0.0  # so that the answer is text and does not end
    save_model(model, tmp_path / "a")
    convert.convert(tmp_path / "a", tmp_path / "hf", is_hf=True)
    prompt = torch.tensor([list("Grüß dich,\n".encode())])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    expected = theirs.generate(prompt, max_new_tokens=24, do_sample=False)[0, prompt.shape[1] :]

    from transformers.cli.serve import Serve  # the command `transformers serve`, which can run beside a test

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    messages = [{"role": "user", "content": "Grüß dich,"}, {"role": "assistant", "content": "\n"}]
    request = {"model": str(tmp_path / "hf"), "messages": messages, "temperature": 0, "max_tokens": 24}
    server = Serve(str(tmp_path / "hf"), device="cpu", host="127.0.0.1", port=port, non_blocking=True)
    try:
        while not server.server.started:
            time.sleep(0.05)
        url, kind = f"http://127.0.0.1:{port}/v1/chat/completions", {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(url, json.dumps(request).encode(), kind)) as response:
            answer = json.load(response)
    finally:
        server.kill_server()
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": bytes(expected.tolist()).decode()}
    assert answer["choices"][0]["finish_reason"] == "length" and answer["usage"]["prompt_tokens"] == prompt.shape[1]


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"kv_lora_rank": 0}, "kv_lora_rank"),
        ({"qk_rope_head_dim": 0}, "qk_rope_head_dim"),
        ({"n_shared_experts": 0}, "shared experts"),
        ({"gate_bias": False}, "gate_bias"),
        ({"score_func": "softmax", "gate_bias": True}, "gate_bias"),
        ({"score_func": "softmax"}, "moe_layer_freq"),
        ({"score_func": "softmax", "moe_layer_freq": 1, "qk_nope_head_dim": 3}, "qk_nope_head_dim"),
        ({"score_func": "softmax", "moe_layer_freq": 1, "kv_lora_rank": 7}, "kv_lora_rank"),
        ({"score_func": "softmax", "moe_layer_freq": 1, "n_heads": 3}, "n_heads"),
        ({"n_routed_experts": 1, "n_activated_experts": 1}, "experts in a group"),
    ],
)
def test_export_refused_by_name(tmp_path: Path, changes: dict[str, Any], part: str) -> None:
    save_model(tiny(**changes), tmp_path / "a")
    with pytest.raises(ConfigError) as error:
        convert.convert(tmp_path / "a", tmp_path / "hf", is_hf=True)
    one_line(error, part, "no class of transformers")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention_bias", True),
        ("tie_word_embeddings", True),
        ("sliding_window", 128),
        ("rope_interleave", False),
        ("norm_topk_prob", False),
        ("scoring_func", "softmax"),
        ("topk_method", "greedy"),
        ("num_key_value_heads", 1),
        ("hidden_act", "swiglu"),
        ("model_type", "llama"),
        ("index_topk", 2048),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("rope_scaling", {"type": "yarn", "factor": 2.0}),
        ("rope_scaling", {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8, "mscale": 1.0}),
        ("rope_scaling", 3),
        ("hidden_size", "16"),
        ("hidden_size", 16.5),
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", None),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}),
        ("quantization_config", {"quant_method": "fp8", "weight_block_size": [64, 64]}),
        ("mlp_layer_types", ["dense"]),
        ("mlp_layer_types", ["sparse", "sparse", "dense"]),
        ("bytegpt", 3),
        ("bytegpt", {"dim": 32}),
        ("bytegpt", {"dimension": 32}),
    ],
)
def test_import_refused_by_name(saved: Path, tmp_path: Path, key: str, value: Any) -> None:
    convert.convert(saved, tmp_path / "hf", is_hf=True)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(ConfigError) as error:
        open_checkpoint(tmp_path / "hf")
    one_line(error, tmp_path / "hf" / "config.json", "dimension" if value == {"dimension": 32} else key)


@pytest.mark.parametrize("key", ["hidden_size", "n_group", "rope_theta", "mlp_layer_types", "rms_norm_eps"])
def test_import_wants_all_that_matters(saved: Path, tmp_path: Path, key: str) -> None:
    convert.convert(saved, tmp_path / "hf", is_hf=True)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    del config[key]
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError) as error:
        open_checkpoint(tmp_path / "hf")
    one_line(error, "missing", "first_k_dense_replace" if key == "mlp_layer_types" else key)


def test_mtp_copies_must_be_equal(saved: Path, tmp_path: Path) -> None:
    convert.convert(saved, tmp_path / "hf", is_hf=True)
    file = tmp_path / "hf" / "model-00001-of-00001.safetensors"
    change(file, lambda tensors: tensors["model.layers.3.embed_tokens.weight"].view(-1).__setitem__(-1, 7.0))
    for attempt in (lambda: convert.convert(tmp_path / "hf", tmp_path / "out"), lambda: load_model(tmp_path / "hf")):
        with pytest.raises(CheckpointError) as error:
            attempt()
        one_line(error, file, "embed_tokens")
    copies = ("model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight")
    change(file, lambda tensors: [tensors.pop(name) for name in copies])
    index = tmp_path / "hf" / "model.safetensors.index.json"
    index.unlink()
    file.rename(file.with_name("model.safetensors"))  # one file needs no index, and no copies
    convert.convert(tmp_path / "hf", tmp_path / "out")
    assert_same(saved, tmp_path / "out")


def test_other_vocabularies_keep_their_tokenizer(tmp_path: Path) -> None:
    save_model(tiny(vocab_size=300), tmp_path / "a")
    (tmp_path / "a" / "tokenizer.json").write_text("theirs")
    convert.convert(tmp_path / "a", tmp_path / "hf", is_hf=True)
    assert (tmp_path / "hf" / "tokenizer.json").read_text() == "theirs"
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"eos_token_id": 299}))
    convert.convert(tmp_path / "hf", tmp_path / "again", is_hf=True)
    assert json.loads((tmp_path / "again" / "generation_config.json").read_text())["eos_token_id"] == 299
    assert (tmp_path / "again" / "tokenizer.json").read_text() == "theirs"


@pytest.mark.parametrize(("n_heads", "world"), [(3, 1), (4, 2)])  # 4 · 32 is more than dim
def test_gpt_json_is_exported(tmp_path: Path, n_heads: int, world: int) -> None:
    config = json.loads((Path(convert.__file__).parent / "configs" / "gpt.json").read_text())
    config = {key: value for key, value in config.items() if key != "train"} | {"n_heads": n_heads}
    save_model(Transformer(ModelArgs.from_dict(config)), tmp_path / "a")
    convert.convert(tmp_path / "a", tmp_path / "hf", is_hf=True)
    convert.convert(tmp_path / "hf", tmp_path / "sharded", world)
    convert.convert(tmp_path / "sharded", tmp_path / "again", is_hf=True)
    convert.convert(tmp_path / "again", tmp_path / "b")
    assert_same(tmp_path / "hf", tmp_path / "again")
    assert_same(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"kv_lora_rank": 0}, "MoE"),
        (KINDS["Ernie4_5ForCausalLM"] | {"q_lora_rank": 8}, "q_lora_rank"),
        (KINDS["Ernie4_5ForCausalLM"] | {"qk_nope_head_dim": 8}, "qk_nope_head_dim"),
        (KINDS["Ernie4_5ForCausalLM"] | {"v_head_dim": 8}, "v_head_dim"),
    ],
)
def test_plain_attention_refused_by_name(tmp_path: Path, changes: dict[str, Any], part: str) -> None:
    save_model(tiny(**changes), tmp_path / "a")
    with pytest.raises(ConfigError) as error:
        convert.convert(tmp_path / "a", tmp_path / "hf", is_hf=True)
    one_line(error, tmp_path / "a" / "config.json", "kv_lora_rank = 0", part)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("kv_lora_rank", 8),
        ("n_routed_experts", 4),
        ("use_bias", True),
        ("head_dim", None),
        ("head_dim", 3),
        ("head_dim", 1 << 64),
        ("num_key_value_heads", 1),
        ("num_key_value_heads", ...),
        ("tie_word_embeddings", ...),
        ("head_dim", ...),
        ("rope_scaling", {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8, "attention_factor": 2}),
        ("rope_scaling", {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8, "mscale_all_dim": "1"}),
    ],
)
def test_plain_attention_read_only_as_it_is(tmp_path: Path, key: str, value: Any) -> None:
    """`...` takes the field away, so that the default of the class holds, which is that of a published model."""
    hf = exported(tmp_path, n_heads=4, **KINDS["Ernie4_5ForCausalLM"])
    config = json.loads((hf / "config.json").read_text()) | {key: value}
    (hf / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    with pytest.raises(ConfigError) as error:
        open_checkpoint(hf)
    one_line(error, hf / "config.json", f" {key}")


# --- Published models -------------------------------------------------------------------------------------------------

V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
KIMI = V3 | {"model_type": "kimi_k2", "aux_loss_alpha": 0.001, "seq_aux": True, "n_group": 1, "topk_group": 1}
KIMI |= {"n_routed_experts": 384, "num_attention_heads": 64, "num_key_value_heads": 64, "num_nextn_predict_layers": 0}
KIMI |= {"first_k_dense_replace": 1, "routed_scaling_factor": 2.827, "rope_theta": 50000.0, "vocab_size": 163840}
KIMI |= {"max_position_embeddings": 131072, "bos_token_id": 163584, "eos_token_id": 163585}
KIMI |= {"rope_scaling": V3["rope_scaling"] | {"beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0}}
V2_LITE = {key: value for key, value in V3.items() if key not in ("quantization_config", "num_nextn_predict_layers")}
V2_LITE |= {"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "first_k_dense_replace": 1}
V2_LITE |= {"hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_hidden_layers": 27}
V2_LITE |= {"n_group": 1, "topk_group": 1, "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": False}
V2_LITE |= {"num_attention_heads": 16, "num_key_value_heads": 16, "num_experts_per_tok": 6, "q_lora_rank": None}
V2_LITE |= {"routed_scaling_factor": 1.0, "scoring_func": "softmax", "topk_method": "greedy", "vocab_size": 102400}
V2_LITE |= {"aux_loss_alpha": 0.001, "seq_aux": True, "pretraining_tp": 1}
V2_LITE |= {"rope_scaling": V3["rope_scaling"] | {"mscale": 0.707, "mscale_all_dim": 0.707}}
V32 = V3 | {"architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32"}
V32 |= {"index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048}
V32["quantization_config"] = V3["quantization_config"] | {"scale_fmt": "ue8m0"}


def published(config: dict[str, Any]) -> Iterator[tuple[int, str, str, list[int]]]:
    """Layer, name, dtype and shape of every tensor of such a model, as the published files have them."""
    dim, heads, experts = config["hidden_size"], config["num_attention_heads"], config["n_routed_experts"]
    nope, rope, v_dim = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    kv_rank, q_rank = config["kv_lora_rank"], config["q_lora_rank"]
    is_fp8, layers = "quantization_config" in config, config["num_hidden_layers"]

    def linear(layer: int, name: str, n_out: int, n_in: int) -> Iterator[tuple[int, str, str, list[int]]]:
        yield layer, f"{name}.weight", "F8_E4M3" if is_fp8 else "BF16", [n_out, n_in]
        if is_fp8:
            yield layer, f"{name}.weight_scale_inv", "F32", [math.ceil(n_out / 128), math.ceil(n_in / 128)]

    def mlp(layer: int, name: str, hidden: int) -> Iterator[tuple[int, str, str, list[int]]]:
        yield from linear(layer, f"{name}.gate_proj", hidden, dim)
        yield from linear(layer, f"{name}.up_proj", hidden, dim)
        yield from linear(layer, f"{name}.down_proj", dim, hidden)

    yield 0, "model.embed_tokens.weight", "BF16", [config["vocab_size"], dim]
    for layer in range(layers + config.get("num_nextn_predict_layers", 0)):
        at = f"model.layers.{layer}"
        if layer >= layers:
            yield layer, f"{at}.embed_tokens.weight", "BF16", [config["vocab_size"], dim]
            yield layer, f"{at}.shared_head.head.weight", "BF16", [config["vocab_size"], dim]
            yield layer, f"{at}.eh_proj.weight", "BF16", [dim, 2 * dim]
            for name in ("enorm", "hnorm", "shared_head.norm"):
                yield layer, f"{at}.{name}.weight", "BF16", [dim]
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield layer, f"{at}.{name}.weight", "BF16", [dim]
        if q_rank:
            yield from linear(layer, f"{at}.self_attn.q_a_proj", q_rank, dim)
            yield layer, f"{at}.self_attn.q_a_layernorm.weight", "BF16", [q_rank]
            yield from linear(layer, f"{at}.self_attn.q_b_proj", heads * (nope + rope), q_rank)
        else:
            yield from linear(layer, f"{at}.self_attn.q_proj", heads * (nope + rope), dim)
        yield from linear(layer, f"{at}.self_attn.kv_a_proj_with_mqa", kv_rank + rope, dim)
        yield layer, f"{at}.self_attn.kv_a_layernorm.weight", "BF16", [kv_rank]
        yield from linear(layer, f"{at}.self_attn.kv_b_proj", heads * (nope + v_dim), kv_rank)
        yield from linear(layer, f"{at}.self_attn.o_proj", dim, heads * v_dim)
        if config.get("index_topk"):
            n_index, width = config["index_n_heads"], config["index_head_dim"]
            yield from linear(layer, f"{at}.self_attn.indexer.wq_b", n_index * width, q_rank)
            yield from linear(layer, f"{at}.self_attn.indexer.wk", width, dim)
            yield layer, f"{at}.self_attn.indexer.weights_proj.weight", "BF16", [n_index, dim]
            for name in ("weight", "bias"):
                yield layer, f"{at}.self_attn.indexer.k_norm.{name}", "F32", [width]
        if layer < config["first_k_dense_replace"]:
            yield from mlp(layer, f"{at}.mlp", config["intermediate_size"])
            continue
        yield layer, f"{at}.mlp.gate.weight", "BF16", [experts, dim]
        if config["scoring_func"] == "sigmoid":
            yield layer, f"{at}.mlp.gate.e_score_correction_bias", "F32", [experts]
        for expert in range(experts):
            yield from mlp(layer, f"{at}.mlp.experts.{expert}", config["moe_intermediate_size"])
        yield from mlp(layer, f"{at}.mlp.shared_experts", config["n_shared_experts"] * config["moe_intermediate_size"])
    yield layers, "model.norm.weight", "BF16", [dim]
    yield layers, "lm_head.weight", "BF16", [config["vocab_size"], dim]


SIZES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}


def sparse_checkpoint(folder: Path, config: dict[str, Any]) -> list[tuple[str, str, list[int]]]:
    """Such a model's folder without its contents: headers, and holes for the tensors. A scale's file is another's."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    files: dict[str, dict[str, Any]] = {}
    tensors, last = [], config["num_hidden_layers"]
    for layer, name, dtype, shape in published(config):
        at = (layer + 1) % (last + 1) if name.endswith("scale_inv") else layer
        header = files.setdefault(f"model-{at:05d}-of-{last:05d}.safetensors", {})
        header[name] = {"dtype": dtype, "shape": shape}
        tensors.append((name, dtype, shape))
    for file, header in files.items():
        end = 0
        for value in header.values():
            start, end = end, end + math.prod(value["shape"]) * SIZES[value["dtype"]]
            value["data_offsets"] = [start, end]
        text = json.dumps(header).encode()
        with open(folder / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + end)
    where = {name: file for file, header in files.items() for name in header}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return tensors


@pytest.fixture(scope="module")
def v3(tmp_path_factory: pytest.TempPathFactory) -> tuple[checkpoints.Checkpoint, list[tuple[str, str, list[int]]]]:
    """The first layers, with the MTP module after them."""
    folder = tmp_path_factory.mktemp("published") / "v3"
    tensors = sparse_checkpoint(folder, V3 | {"num_hidden_layers": 5})
    return open_checkpoint(folder), tensors


def test_deepseek_v3_is_understood(tmp_path: Path) -> None:
    tensors = sparse_checkpoint(tmp_path / "v3", V3)
    checkpoint = open_checkpoint(tmp_path / "v3")
    published_args = {"vocab_size": 129280, "dim": 7168, "inter_dim": 18432, "moe_inter_dim": 2048, "n_layers": 61}
    published_args |= {"n_dense_layers": 3, "n_heads": 128, "n_routed_experts": 256, "n_shared_experts": 1}
    published_args |= {"n_activated_experts": 8, "n_expert_groups": 8, "n_limited_groups": 4, "route_scale": 2.5}
    published_args |= {"score_func": "sigmoid", "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128}
    published_args |= {"qk_rope_head_dim": 64, "v_head_dim": 128, "n_mtp_layers": 1, "max_seq_len": 163840}
    assert checkpoint.args == ModelArgs(**published_args)
    main = sum(math.prod(s.shape) for name, s in checkpoint.tensors.items() if not name.startswith("mtp."))
    assert main == 671_026_419_200  # with the router's biases
    assert sum(math.prod(shape) for name, dtype, shape in tensors if "scale" not in name) > main
    assert checkpoint.tensors["mtp.0.block.attn.wo.weight"].name == "model.layers.61.self_attn.o_proj.weight"


@pytest.mark.parametrize(("world", "dtype"), [(8, None), (16, None), (32, "bf16")])
def test_plan_for_deepseek_v3(v3: tuple[checkpoints.Checkpoint, list], world: int, dtype: str | None) -> None:
    """Files, names, shapes and bytes, from the list of what was published; no tensor is read, or there at all."""
    checkpoint, tensors = v3
    outputs, jobs, texts = convert.make_plan(checkpoint, world, dtype=dtype)
    assert [output.name for output in outputs] == [f"model{i}-mp{world}.safetensors" for i in range(world)]
    assert texts["config.json"]["dtype"] == ("fp8" if dtype is None else "bf16")
    bytes_of_rank = 0
    for name, kind, shape in tensors:
        if name.startswith("model.layers.5.") and name.endswith(("embed_tokens.weight", "shared_head.head.weight")):
            continue
        if dtype == "bf16" and name.endswith("scale_inv"):
            continue
        size = math.prod(shape) * (2 if kind == "F8_E4M3" and dtype == "bf16" else SIZES[kind])
        layer = name.split(".")[-2]
        cut = ".experts." in name or layer in ("embed_tokens", "lm_head", "q_b_proj", "kv_b_proj", "o_proj")
        cut = cut or layer in ("gate_proj", "up_proj", "down_proj")
        assert not cut or size % world == 0 or name.endswith("scale_inv")
        bytes_of_rank += size // world if cut else size
    for rank, output in enumerate(outputs):
        data = sum(info.nbytes for info in output.infos.values())
        if world < 16:
            assert data == bytes_of_rank
        else:  # half a block of a shared expert has a scale of its own
            assert 0 <= data - bytes_of_rank <= 6 * 3 * 56 * 4 * 2
        assert output.size == len(output.header) + data
        experts = {int(key.split(".")[4]) for key in output.infos if ".experts." in key and key.startswith("layers")}
        assert experts == set(range(256 * rank // world, 256 * (rank + 1) // world))
        assert output.infos["layers.0.ffn.w1.weight"].shape == (18432 // world, 7168)
        assert output.infos["layers.4.attn.wo.weight"].shape == (7168, 16384 // world)
        assert output.infos["mtp.0.eh_proj.weight"].shape == (7168, 14336)
        if dtype is None:
            assert output.infos["layers.0.attn.wkv_a.scale"].shape == (5, 56)
            assert output.infos["layers.4.ffn.shared_experts.w2.scale"].shape == (56, math.ceil(2048 / world / 128))


def test_only_the_requested_slices_of_deepseek_v3_are_read(v3: tuple[checkpoints.Checkpoint, list]) -> None:
    checkpoint, _ = v3
    source = checkpoint.tensors["layers.4.attn.wo.weight"]
    box = parallel.native_slice("layers.4.attn.wo.weight", source.shape, 256, 3, 8)
    q, s = source.read_fp8(box, None)
    assert q.shape == (7168, 2048) and s.shape == (56, 16)


@pytest.mark.parametrize("config", [KIMI, V2_LITE, V32], ids=["Kimi-K2", "DeepSeek-V2-Lite", "DeepSeek-V3.2"])
def test_other_published_models(tmp_path: Path, config: dict[str, Any]) -> None:
    sparse_checkpoint(tmp_path / "a", config | {"num_hidden_layers": 3})
    checkpoint = open_checkpoint(tmp_path / "a")
    assert checkpoint.args.score_func == config["scoring_func"]
    assert checkpoint.args.n_mtp_layers == config.get("num_nextn_predict_layers", 0)
    assert checkpoint.args.index_topk == config.get("index_topk", 0)
    assert checkpoint.args.q_lora_rank == (config["q_lora_rank"] or 0)
    assert checkpoint.is_fp8 == ("quantization_config" in config)
    outputs, _, texts = convert.make_plan(checkpoint, is_hf=True)
    for key, value in texts["config.json"].items():
        if key in config and key not in ("num_hidden_layers", "model_type", "rope_scaling", "pad_token_id"):
            assert value == config[key], key
    assert args_from_hf(texts["config.json"]) == checkpoint.args
    names = {name for output in outputs for name in output.infos}
    assert names == {name for _, name, _, _ in published(config | {"num_hidden_layers": 3})}


# --- Configs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({"score_func": "softmax"}, None),
        ({"score_func": "softmax", "gate_bias": True}, "gate_bias"),
        ({"score_func": "softmax", "n_shared_experts": 0}, "shared experts"),
        ({"score_func": "sigmoid"}, None),
        ({"score_func": "softmax", "gate_bias": True, "n_mtp_layers": 0}, None),
    ],
)
def test_moe_in_mtp_modules_alone(tmp_path: Path, changes: dict[str, Any], refusal: str | None) -> None:
    shape = {"n_layers": 1, "n_dense_layers": 1, "moe_layer_freq": 1} | changes
    save_model(tiny(**shape), tmp_path / "a")
    if refusal:
        with pytest.raises(ConfigError) as error:
            convert.convert(tmp_path / "a", tmp_path / "hf", is_hf=True)
        one_line(error, refusal, tmp_path / "a" / "config.json")
    else:
        convert.convert(tmp_path / "a", tmp_path / "hf", is_hf=True)
        convert.convert(tmp_path / "hf", tmp_path / "b")
        assert_same(tmp_path / "a", tmp_path / "b")


@settings(draws, max_examples=100)
@given(
    divisible(dim=16, inter_dim=8, moe_inter_dim=4),
    st.sampled_from([{}, KINDS["Ernie4_5ForCausalLM"] | {"v_head_dim": 8, "qk_rope_head_dim": 8}]),
    st.sampled_from([None, True, False]),
    st.booleans(),
)
def test_exported_configs_are_complete(shape: dict, plain: dict, gate_bias: bool | None, is_fp8: bool) -> None:
    try:
        args = ModelArgs.from_dict(TINY | shape | plain | {"gate_bias": gate_bias})
        config = hf_config(args, torch.bfloat16, is_fp8)
    except ConfigError:
        return
    again = args_from_hf(json.loads(json.dumps(config)))
    assert again.to_dict() | {"dtype": args.dtype} == args.to_dict()


YARN = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8, "mscale": 1.0, "mscale_all_dim": 1.0}


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"model_type": ["deepseek_v3"]}, "model_type"),
        ({"model_type": {}}, "model_type"),
        ({"rope_scaling": {"type": ["yarn"]}}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": {}}}, "rope_scaling"),
        ({"rope_scaling": YARN | {"rope_type": "linear"}}, "differ"),
        ({"rope_scaling": YARN | {"beta_fast": float("inf")}}, "Infinity"),
        ({"rope_theta": float("nan")}, "NaN"),
        ({"rope_scaling": YARN, "rope_parameters": {"rope_type": "default"}}, "rope_parameters and rope_scaling"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 99.0}}, "rope_parameters.rope_theta = 99.0"),
        ({"num_mtp_layers": 7}, "num_mtp_layers"),
        ({"first_k_dense_replace": 2}, "first_k_dense_replace"),
        ({"first_k_dense_replace": "x"}, "first_k_dense_replace"),
        ({"quantization_config": []}, "quantization_config"),
        ({"quantization_config": 0}, "quantization_config"),
        ({"num_attention_heads": 0, "num_key_value_heads": 0}, "num_attention_heads"),
        ({"moe_intermediate_size": -1}, "moe_intermediate_size"),
        ({"rms_norm_eps": "A" * 100_000}, "rms_norm_eps"),
    ],
)
def test_contradictions_and_worse_in_a_config(saved: Path, tmp_path: Path, changes: dict[str, Any], part: str) -> None:
    convert.convert(saved, tmp_path / "hf", is_hf=True)
    file = tmp_path / "hf" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ConfigError) as error:
        open_checkpoint(tmp_path / "hf")
    one_line(error, file, part)
    assert len(str(error.value)) < 1000


def exported(tmp_path: Path, **changes: Any) -> Path:
    """A checkpoint in Hugging Face's format, without MTP modules unless they are asked for."""
    save_model(tiny(**({"n_mtp_layers": 0} | changes)), tmp_path / "native")
    convert.convert(tmp_path / "native", tmp_path / "hf", is_hf=True)
    return tmp_path / "hf"


def edit_config(folder: Path, changes: dict[str, Any]) -> Path:
    """Changes fields of its config, in place."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return file


def assert_same_logits_as_transformers(folder: Path) -> torch.Tensor:
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        expected = theirs(TOKENS).logits
    ours = logits(folder)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 * max(1, expected.abs().max()))
    return ours


# --- YaRN ------------------------------------------------------------------------------------------------------------

YARNS = [
    {"type": "yarn", "factor": 40.0, "original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 1.0},
    {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 12, "attention_factor": 1.0},
    YARN | {"factor": 8, "beta_fast": 4.0, "beta_slow": None, "mscale": 0.707, "mscale_all_dim": 0.707},
]
PLAIN_YARNS = [  # for attention that has the temperature in the rotary factors, where 1 is no default
    {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 64},
    {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 12, "attention_factor": 1.0},
    YARN | {"factor": 8.0, "mscale_all_dim": 0.5, "attention_factor": 0.05 * math.log(8) + 1},
]


@pytest.mark.parametrize("context", [12, 16, 64, 65, 500])
@pytest.mark.parametrize(
    ("kind", "yarn"),
    [(kind, yarn) for kind in KINDS for yarn in (PLAIN_YARNS if kind == "Ernie4_5ForCausalLM" else YARNS)],
)
def test_yarn_does_not_depend_on_the_context(tmp_path: Path, kind: str, yarn: dict[str, Any], context: int) -> None:
    """A config with YaRN computes the same with any `max_position_embeddings`, as in transformers."""
    hf = exported(tmp_path, dim=32, **KINDS[kind])
    plain = logits(hf)
    edit_config(hf, {"rope_scaling": yarn, "max_position_embeddings": context})
    ours = assert_same_logits_as_transformers(hf)
    assert (ours - plain).abs().max() > 1e-3
    convert.convert(hf, tmp_path / "again", is_hf=True)
    convert.convert(hf, tmp_path / "back")
    assert open_checkpoint(tmp_path / "again").args == open_checkpoint(hf).args
    assert torch.equal(logits(tmp_path / "again"), ours) and torch.equal(logits(tmp_path / "back"), ours)
    edit_config(tmp_path / "back", {"max_seq_len": 13})  # of the native form, too
    assert torch.equal(logits(tmp_path / "back"), ours)


def test_native_configs_of_before_keep_their_meaning(tmp_path: Path) -> None:
    """Without `use_yarn`, the context decides, as in DeepSeek's code: what is saved then says so."""
    shape = {"max_seq_len": 96, "original_seq_len": 24, "rope_factor": 4.0}
    save_model(tiny(**shape), tmp_path / "a")
    values = json.loads((tmp_path / "a" / "config.json").read_text())
    assert values.pop("use_yarn") is True
    stretched = logits(tmp_path / "a")
    (tmp_path / "a" / "config.json").write_text(json.dumps(values))
    assert torch.equal(logits(tmp_path / "a"), stretched)
    convert.convert(tmp_path / "a", tmp_path / "b")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["use_yarn"] is True
    (tmp_path / "a" / "config.json").write_text(json.dumps(values | {"max_seq_len": 24}))
    assert not torch.equal(logits(tmp_path / "a"), stretched)


@pytest.mark.parametrize(
    "changes", [{"bytegpt": {"use_yarn": True}}, {"bytegpt": {"use_yarn": False}, "rope_scaling": YARN}]
)
def test_bytegpt_cannot_contradict_the_rotary_fields(tmp_path: Path, changes: dict[str, Any]) -> None:
    hf = exported(tmp_path)
    file = edit_config(hf, changes)
    with pytest.raises(ConfigError) as error:
        open_checkpoint(hf)
    one_line(error, file, "bytegpt")


# --- Fields that change nothing --------------------------------------------------------------------------------------

# What `PretrainedConfig` of transformers 4 wrote of its own into the config of any model.
DUMP = {
    **{"_name_or_path": "x/y", "add_cross_attention": False, "architectures": None, "bad_words_ids": None},
    **{"begin_suppress_tokens": None, "chunk_size_feed_forward": 0, "cross_attention_hidden_size": None},
    **{"decoder_start_token_id": None, "diversity_penalty": 0.0, "do_sample": True, "early_stopping": False},
    **{"encoder_no_repeat_ngram_size": 0, "exponential_decay_length_penalty": None, "finetuning_task": "x"},
    **{"forced_bos_token_id": None, "forced_eos_token_id": 2, "id2label": {"0": "A"}, "is_decoder": False},
    **{"is_encoder_decoder": False, "label2id": {"A": 0}, "length_penalty": 0.9, "max_length": 77, "min_length": 3},
    **{"no_repeat_ngram_size": 2, "num_beam_groups": 1, "num_beams": 4, "num_return_sequences": 1},
    **{"output_attentions": False, "output_hidden_states": True, "output_scores": False, "pad_token_id": 1},
    **{"prefix": None, "problem_type": None, "pruned_heads": {}, "remove_invalid_values": False},
    **{"repetition_penalty": 1.3, "return_dict": True, "return_dict_in_generate": True, "sep_token_id": None},
    **{"suppress_tokens": [1], "task_specific_params": {"a": 1}, "temperature": 0.3, "tf_legacy_loss": False},
    **{"tie_encoder_decoder": False, "tokenizer_class": "LlamaTokenizer", "top_k": 40, "top_p": 0.95, "typical_p": 0.5},
    **{"torchscript": True, "use_bfloat16": True, "use_cache": False, "_attn_implementation": "sdpa"},
    **{"resid_pdrop": 0.0, "sliding_window": None, "layer_types": [], "unheard_of": "", "some_option": False},
}


@pytest.mark.parametrize("kind", KINDS)
def test_fields_that_change_nothing(tmp_path: Path, kind: str) -> None:
    hf = exported(tmp_path, dim=32, **KINDS[kind])
    before = logits(hf)
    for key, value in DUMP.items():
        edit_config(hf, {key: value})
        assert args_from_hf(json.loads((hf / "config.json").read_text())).dim == 32, key
    assert torch.equal(logits(hf), before)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_interleave", None),
        ("norm_topk_prob", None),
        ("norm_topk_prob", 0),
        ("is_causal", False),
        ("mlp_bias", True),
        ("pruned_heads", {"0": [1]}),
        ("add_cross_attention", True),
        ("partial_rotary_factor", 0.5),
        ("num_key_value_heads", 4),
        ("head_dim", 8),
        ("logit_softcapping", 30.0),
        ("layer_types", ["sliding_attention"] * 3),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}),
        ("rope_scaling", YARN | {"truncate": False}),
        ("rope_scaling", YARN | {"truncate": None}),
        ("rope_scaling", YARN | {"attention_factor": 1.2}),
        ("rope_scaling", YARN | {"factor": None}),
    ],
)
def test_fields_that_change_the_mathematics(tmp_path: Path, key: str, value: Any) -> None:
    hf = exported(tmp_path)
    file = edit_config(hf, {key: value})
    with pytest.raises(ConfigError) as error:
        open_checkpoint(hf)
    one_line(error, file, "rope_scaling" if key == "rope_parameters" else key)


@pytest.mark.parametrize("value", [1 << 64, 10**4200, -(1 << 70), True, 1e300])
@pytest.mark.parametrize("key", ["num_hidden_layers", "n_routed_experts", "first_k_dense_replace", "v_head_dim"])
def test_numbers_out_of_bounds_are_named_as_in_the_file(tmp_path: Path, key: str, value: Any) -> None:
    hf = exported(tmp_path)
    file = edit_config(hf, {key: value, "mlp_layer_types": None})
    with pytest.raises(ConfigError) as error:
        open_checkpoint(hf)
    one_line(error, f"{file}: {key} must be")
    assert len(str(error.value)) < 500


# --- Activations -----------------------------------------------------------------------------------------------------


def test_activations_are_those_of_transformers() -> None:
    x = torch.linspace(-20, 20, 4001, dtype=torch.float64)
    for name, function in convert.HF_ACTIVATIONS.items():
        torch.testing.assert_close(function(x), ACT2FN[name](x), rtol=1e-12, atol=1e-15)
    for name, function in models.ACTIVATIONS.items():
        torch.testing.assert_close(function(x), ACT2FN[name](x), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("name", "function", "is_exported"),
    [
        ("softsign", F.softsign, False),
        ("quick_gelu", lambda x: x * torch.sigmoid(1.7 * x), False),
        ("gelu", lambda x: F.gelu(x, approximate="tanh"), False),
        ("relu2", F.relu, False),
        ("silu", lambda x: x * torch.sigmoid(1.01 * x), False),
        ("mish", F.mish, True),
        ("gelu_pytorch_tanh", lambda x: F.gelu(x, approximate="tanh"), True),
    ],
)
def test_activations_added_to_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, function: Any, is_exported: bool
) -> None:
    """Only what transformers computes in the same way under the same name is exported, and read from an export."""
    hf = exported(tmp_path)
    monkeypatch.setitem(models.ACTIVATIONS, name, function)
    save_model(tiny(hidden_act=name), tmp_path / "a")
    if is_exported:
        convert.convert(tmp_path / "a", tmp_path / "out", is_hf=True)
        assert_same_logits_as_transformers(tmp_path / "out")
        return
    file = edit_config(hf, {"hidden_act": name})
    for attempt in (
        lambda: convert.convert(tmp_path / "a", tmp_path / "out", is_hf=True),
        lambda: open_checkpoint(hf),
    ):
        with pytest.raises(ConfigError) as error:
            attempt()
        one_line(error, "hidden_act", name)
    assert str(file) in str(error.value) and not (tmp_path / "out").exists()


# --- Tensors that are not where they should be -----------------------------------------------------------------------


@pytest.mark.parametrize("n_modules", [1, 2])
def test_mtp_modules_that_transformers_dropped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], n_modules: int
) -> None:
    hf = exported(tmp_path, n_mtp_layers=n_modules, moe_layer_freq=1, mtp_loss_weight=0.1)
    AutoModelForCausalLM.from_pretrained(hf).save_pretrained(tmp_path / "theirs")
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["num_nextn_predict_layers"] == n_modules
    capsys.readouterr()
    found = open_checkpoint(tmp_path / "theirs")
    (line,) = capsys.readouterr().err.splitlines()
    assert "num_nextn_predict_layers" in line and str(tmp_path / "theirs") in line
    assert found.args.n_mtp_layers == 0 and found.args.mtp_loss_weight == 0.1
    assert torch.equal(logits(tmp_path / "theirs"), logits(hf))
    convert.convert(tmp_path / "theirs", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["n_mtp_layers"] == 0
    assert torch.equal(logits(tmp_path / "back"), logits(hf))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_modules", [0, 1])
def test_saved_by_transformers_and_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, n_modules: int
) -> None:
    hf = exported(tmp_path, dim=32, n_mtp_layers=n_modules, **KINDS[kind])
    AutoModelForCausalLM.from_pretrained(hf).save_pretrained(tmp_path / "theirs", max_shard_size="15KB")
    AutoTokenizer.from_pretrained(hf).save_pretrained(tmp_path / "theirs")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 3
    capsys.readouterr()
    assert convert.main(["--ckpt-path", str(tmp_path / "theirs"), "--save-path", str(tmp_path / "back")]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == n_modules and all("read as a model without MTP modules" in line for line in lines)
    (before,), (after,) = (tensors_of(tmp_path / name).values() for name in ("native", "back"))
    assert after.keys() == {name for name in before if not name.startswith("mtp.")}
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name]), name
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("native", "back")]
    assert configs[1] == configs[0] | {"n_mtp_layers": 0}
    assert torch.equal(logits(tmp_path / "back"), logits(tmp_path / "native"))


@pytest.mark.parametrize("gone", ["model.layers.4.", "model.layers.3.", "model.layers.4.mlp.gate.weight", ".eh_proj."])
def test_mtp_modules_that_are_there_in_part(tmp_path: Path, gone: str) -> None:
    hf = exported(tmp_path, n_mtp_layers=2, moe_layer_freq=1)
    (file,) = hf.glob("*.safetensors")

    def remove(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if gone in name]:
            del tensors[name]

    change(file, remove)
    (hf / "model.safetensors.index.json").unlink()
    file.rename(hf / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(hf)
    one_line(error, hf / "model.safetensors", "num_nextn_predict_layers = 2", gone, "missing")


@pytest.mark.parametrize("stray", ["._model.safetensors", "adapter_model.safetensors", "zz.safetensors"])
@pytest.mark.parametrize("is_single", [True, False])
def test_file_that_does_not_belong_is_named(tmp_path: Path, stray: str, is_single: bool) -> None:
    hf = exported(tmp_path)
    (file,) = hf.glob("*.safetensors")
    (hf / stray).write_bytes(b"\0" * 163)
    if is_single:
        (hf / "model.safetensors.index.json").unlink()
        file.rename(hf / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(hf)
    one_line(error, hf / stray, "remove it")


def test_index_that_has_a_tensor_in_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "MAX_FILE_BYTES", 40_000)
    hf = exported(tmp_path)
    index = hf / "model.safetensors.index.json"
    where = json.loads(index.read_text())["weight_map"]
    assert len(set(where.values())) > 1
    name, wrong = "model.embed_tokens.weight", where["lm_head.weight"]
    assert where[name] != wrong
    index.write_text(json.dumps({"weight_map": where | {name: wrong}}))
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(hf)
    one_line(error, hf / where[name], name, f"has it in {wrong}")


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.mlp.experts.2.up_proj.weight"])
@pytest.mark.parametrize("is_single", [True, False])
def test_missing_tensor_is_said_of_a_file_that_exists(tmp_path: Path, name: str, is_single: bool) -> None:
    hf = exported(tmp_path)
    (file,), index = hf.glob("*.safetensors"), hf / "model.safetensors.index.json"
    change(file, lambda tensors: tensors.pop(name))
    where = json.loads(index.read_text())["weight_map"]
    del where[name]
    index.write_text(json.dumps({"weight_map": where}))
    if is_single:
        index.unlink()
        file.rename(hf / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(hf)
    one_line(error, hf / "model.safetensors" if is_single else index, name, "missing")

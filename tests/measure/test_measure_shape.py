import pytest
import tiny
import torch
from transformers import AutoConfig

from kvote import InputError, UnsupportedModelError
from kvote.measure.geometry import Geometry
from kvote.measure.shape import shape

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}
LAYER = 64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 96


def config(**changes):
    values = {**LLAMA, **changes}
    return AutoConfig.for_model(values.pop("model_type"), **values)


@pytest.mark.parametrize("tied", [True, False])
def test_the_weights_that_a_token_reads(tied):
    made = shape(config(tie_word_embeddings=tied, dtype="float32"))
    assert made.weight_bytes == 4 * (3 * LAYER + 100 * 64)
    # A token reads one row of the embeddings; what is held is another matter.
    norms = 7 * 64
    assert made.resident_bytes == 4 * (3 * LAYER + (1 if tied else 2) * 100 * 64 + norms)
    assert (made.full, made.others) == (3, 0)
    assert (made.geometry.heads, made.geometry.kv_heads, made.geometry.dim) == (4, 2, 16)
    assert made.rotary


def test_without_a_dtype_weights_are_bfloat16():
    assert shape(config()).geometry.dtype == torch.bfloat16
    assert shape(config(dtype="float16")).geometry.dtype == torch.float16


def test_of_a_mixture_a_token_reads_the_active_experts():
    common = {"num_local_experts": 8, "num_experts_per_tok": 2, "model_type": "mixtral"}
    expert, router = 3 * 64 * 96, 8 * 64
    rest = LAYER - expert + router
    one, many = shape(config(**common)), shape(config(**common), batch=1000)
    assert one.weight_bytes == pytest.approx(2 * (3 * (rest + 2 * expert) + 6400))
    assert many.weight_bytes == pytest.approx(2 * (3 * (rest + 8 * expert) + 6400))


def test_layers_with_a_window_are_counted_apart():
    model_type, changes = tiny.FAMILIES["gemma3"]
    made = shape(config(model_type=model_type, **{**changes, "num_hidden_layers": 2}))
    assert (made.full, made.others, made.window) == (1, 1, 8)


def test_what_the_prediction_does_not_know_is_noted():
    model_type, changes = tiny.FAMILIES["gpt-oss"]
    made = shape(config(model_type=model_type, **{**changes, "num_hidden_layers": 2}))
    assert any("eager" in note for note in made.notes)
    quantised = config()
    quantised.quantization_config = {"quant_method": "gptq"}
    assert any("quantis" in note for note in shape(quantised).notes)
    assert shape(config()).notes == ()


SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
# As published: type; hidden size, layers, query heads, key heads; what else; and what reaches attention: query heads,
# key heads, channels of a head, full-attention layers, other layers.
PUBLISHED = {
    "SmolLM2-135M": ("llama", "576 30 9 3", {}, (9, 3, 64, 30, 0)),
    "Llama-3.2-3B": ("llama", "3072 28 24 8", {}, (24, 8, 128, 28, 0)),
    "Qwen2.5-0.5B": ("qwen2", "896 24 14 2", {}, (14, 2, 64, 24, 0)),
    "Qwen2.5-7B": ("qwen2", "3584 28 28 4", {}, (28, 4, 128, 28, 0)),
    "Mistral-Nemo": ("mistral", "5120 40 32 8", {"head_dim": 128, "sliding_window": None}, (32, 8, 128, 40, 0)),
    "Gemma-2-2B": ("gemma2", "2304 26 8 4", {"head_dim": 256}, (8, 4, 256, 13, 13)),
    "Phi-4": ("phi3", "5120 40 40 10", {"sliding_window": None, "pad_token_id": 0}, (40, 10, 128, 40, 0)),
    "Phi-2": ("phi", "2560 32 32 32", {"partial_rotary_factor": 0.4}, (32, 32, 80, 32, 0)),
    "GPT-2": ("gpt2", "768 12 12", {}, (12, 12, 64, 12, 0)),
    "StarCoder": ("gpt_bigcode", "768 12 12", {}, (12, 1, 64, 12, 0)),
    # They route attention through the interface, and say that they do not.
    "StableLM-2": ("stablelm", "2048 24 32 32", {}, (32, 32, 64, 24, 0)),
    "BioGPT": ("biogpt", "1024 24 16", {}, (16, 16, 64, 24, 0)),
    "Jamba": ("jamba", "4096 32 32 8", {"attn_layer_period": 8, "attn_layer_offset": 4}, (32, 8, 128, 4, 28)),
    "Qwen3-Next": ("qwen3_next", "2048 48 16 2", {"head_dim": 256}, (16, 2, 256, 12, 36)),
    # Text behind a vision tower.
    "Gemma-3-4B": (
        "gemma3",
        "",
        {"text_config": dict(zip(SIZES, (2560, 34, 8, 4), strict=True))},
        (8, 4, 256, 5, 29),
    ),
    "Qwen2-VL-2B": (
        "qwen2_vl",
        "",
        {"text_config": dict(zip(SIZES, (1536, 28, 12, 2), strict=True))},
        (12, 2, 128, 28, 0),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_heads_and_layers_are_those_that_reach_attention(name):
    model_type, sizes, more, (heads, kv_heads, dim, full, others) = PUBLISHED[name]
    made = shape(AutoConfig.for_model(model_type, **dict(zip(SIZES, map(int, sizes.split()), strict=False)), **more))
    assert made.geometry == Geometry(heads, kv_heads, dim, torch.bfloat16)
    assert (made.full, made.others) == (full, others)


def test_a_vision_tower_is_held_and_not_read():
    text = {name: LLAMA[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3]}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2}
    seeing = {"text_config": {**text, **heads, "rope_parameters": rope}, "vision_config": vision}
    made, plain = shape(config(model_type="qwen2_vl", **seeing)), shape(config(model_type="qwen2"))
    assert made.weight_bytes == plain.weight_bytes
    assert made.resident_bytes > plain.resident_bytes


def test_positions_in_a_table_are_known():
    assert shape(AutoConfig.for_model("gpt2")).learned
    assert shape(AutoConfig.for_model("opt", num_hidden_layers=1)).learned
    assert not shape(config()).learned


@pytest.mark.parametrize(
    ("model_type", "changes", "sentence"),
    [
        ("t5", {}, "T5Config makes encoder-decoder models"),
        ("bart", {}, "BartConfig makes encoder-decoder models"),
        ("mamba", {}, "has no attention"),
        ("bloom", {}, "does not route attention"),
        ("falcon", {}, "does not route attention"),
        ("deepseek_v3", {}, "caches keys of 192 channels and values of 128, or latents of both"),
        ("diffllama", {}, "attend more than once to what they cache"),
        ("bert", {}, "see what follows them"),
        ("starcoder2", {"sliding_window": 4096}, "None of the 30 layers of Starcoder2ForCausalLM caches every token"),
        ("falcon_h1", {}, "None of the 32 layers of FalconH1ForCausalLM caches every token"),
        ("clip", {}, "no decoder-only model of text for a CLIPConfig"),
        ("llama", {"num_hidden_layers": 0}, "None of the 0 layers"),
        (
            "llama",
            {"num_attention_heads": 10, "num_key_value_heads": 4, "hidden_size": 640},
            "cannot share 4 key heads",
        ),
        ("llama", {"hidden_size": -64}, "Cannot make a model of this LlamaConfig: .*negative"),
    ],
)
def test_models_that_cannot_be_predicted_are_refused(model_type, changes, sentence):
    with pytest.raises((InputError, UnsupportedModelError), match=sentence):
        shape(AutoConfig.for_model(model_type, **changes))

import json

import pytest
import tiny
import torch
from transformers import AutoConfig

from kvote import InputError, UnsupportedModelError
from kvote.measure.shape import load_config, shape
from kvote.models import embedded

# torch notes once what makes tensors on a device; it must not note the poisoned ones of the tests.
with torch.device("meta"):
    torch.empty(0)

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


@pytest.mark.parametrize(
    ("model_type", "sentence"),
    [
        ("t5", "Cannot make a model of this T5Config"),
        ("mamba", "does not route attention"),
        ("deepseek_v3", "caches latents"),
    ],
)
def test_models_that_cannot_be_predicted_are_refused(model_type, sentence):
    with pytest.raises((InputError, UnsupportedModelError), match=sentence):
        shape(AutoConfig.for_model(model_type))


def test_a_config_is_found_by_folder_and_by_file(tmp_path):
    assert load_config(embedded()).num_hidden_layers == 4
    path = tmp_path / "some.json"
    path.write_text(json.dumps(LLAMA))
    assert load_config(str(path)).hidden_size == 64


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "There is no config at"),
        ("no json", "Cannot read a config from"),
        ("{}", "Cannot read a config from"),
        ('{"model_type": "banana"}', "does not recognize this architecture"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "Cannot read a config from"),
    ],
)
def test_what_is_no_config_is_refused(tmp_path, text, sentence):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=sentence):
        load_config(str(path))

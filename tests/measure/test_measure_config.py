import json
import os

import pytest

from kvote import InputError
from kvote.measure.config import check_bounds, load_config
from kvote.models import embedded

LLAMA = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4}


def test_a_config_is_found_by_folder_and_by_file(tmp_path):
    assert load_config(embedded()).num_hidden_layers == 4
    path = tmp_path / "some.json"
    path.write_text(json.dumps(LLAMA))
    assert load_config(str(path)).hidden_size == 64


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "There is no config at"),
        ("no json", "it is not JSON"),
        ("[" * 100_000, "it is not JSON"),
        ("[]", "it is not a JSON object"),
        ("{}", "Cannot read a config from"),
        ('{"model_type": "banana"}', "does not recognize this architecture"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "Validation error for field 'hidden_size': TypeError"),
        ('{"model_type": "llama", "num_hidden_layers": 1e9999}', "Cannot read a config from"),
    ],
    ids=range(8),
)
def test_what_is_no_config_is_refused(tmp_path, text, sentence):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=sentence):
        load_config(str(path))


def test_a_folder_without_a_config_is_called_so(tmp_path):
    with pytest.raises(InputError, match=r"the folder holds no config\.json"):
        load_config(str(tmp_path))


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(InputError, match="it is a pipe, not a file"):
        load_config(str(tmp_path / "config.json"))


@pytest.mark.parametrize("name", ["", " ", "with\0nul", "\ud800", "x" * 5000])
def test_what_can_be_no_name_is_refused(name):
    with pytest.raises(InputError):
        load_config(name)


@pytest.mark.parametrize(
    "held",
    [
        {"num_hidden_layers": 10**12},
        {"n_layer": 10**12},
        {"decoder_layers": 10**12},
        {"text_config": {"num_hidden_layers": 10**12}},
        {"num_experts": 10**9},
        {"n_routed_experts": 10**5000},
        {"num_attention_heads": 10**12},
        {"hidden_size": 10**12},
        {"vocab_size": 10**12},
        {"head_dim": 10**12},
    ],
    ids=lambda held: next(iter(held)),
)
def test_counts_beyond_any_model_are_refused_before_one_is_made(held):
    with pytest.raises(InputError, match=r"is more than any model has \(at most [\d,]+\)"):
        check_bounds(held)


def test_numbers_that_count_nothing_are_not_bounded():
    check_bounds({"rope_theta": 10**12, "image_token_id": 10**9, "block_ff_dim": 12_288, "num_hidden_layers": 126})

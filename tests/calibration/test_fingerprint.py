"""Which changes make a model another one, and which do not."""

import copy
import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from kvote import UnsupportedModelError
from kvote.calibration import Fingerprint, fingerprint, load
from kvote.calibration.fingerprint import _rope
from kvote.models import embedded

RESULTS = Path(__file__).parents[2] / "bench" / "results"


def fresh(**changes: Any) -> PreTrainedModel:
    """A tiny model of its own, with the weights of all others as far as they have the same shape."""
    made = type(tiny.model())(copy.deepcopy(tiny.model(**changes).config))
    made.load_state_dict(tiny.model(**changes).state_dict())
    return made.eval()


def difference(net: Any, other: Any) -> str | None:
    return Fingerprint.of(net).difference(Fingerprint.of(other))


def test_a_resized_vocabulary_is_no_other_model():
    net = fresh()
    net.resize_token_embeddings(net.config.vocab_size + 40)
    net.get_input_embeddings().weight.data[:] = 3.0
    net.get_output_embeddings().weight.data[:] = -3.0
    assert difference(net, tiny.model()) is None


@pytest.mark.parametrize(
    ("rope", "clause"),
    [
        ({"rope_theta": 5e5, "rope_type": "default"}, "rope_theta 10000 is 500000 here"),
        ({"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}, "factor none is 2 here"),
        ({"rope_theta": 1e4, "rope_type": "dynamic", "factor": 4.0}, "factor none is 4 here"),
    ],
    ids=lambda rope: str(rope)[:60],
)
def test_other_rotations_make_another_model(rope, clause):
    changed = fresh()
    changed.config.rope_parameters = rope
    assert difference(tiny.model(), changed) == clause


def test_a_whole_number_rotates_like_the_same_fraction():
    changed = fresh()
    changed.config.rope_parameters = {"rope_theta": 10_000, "rope_type": "default"}
    assert difference(tiny.model(), changed) is None


def test_older_configs_say_it_in_names_of_their_own():
    config = SimpleNamespace(rope_theta=1e4, rope_scaling={"type": "linear", "factors": [1.0, 2.5]}, rotary_pct=0.25)
    assert _rope(config) == (
        ("rope_scaling.factors", "1 2.5"),
        ("rope_scaling.type", "linear"),
        ("rope_theta", "10000"),
        ("rotary_pct", "0.25"),
    )
    assert _rope(SimpleNamespace()) == ()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:All adapters are already merged")
@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")
def test_an_adapter_counts_by_what_it_does():
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(fresh(), LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    assert difference(wrapped, tiny.model()) is None
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(generator=torch.Generator().manual_seed(0))
    assert difference(wrapped, tiny.model()) == "of the same shape, but its weights differ"
    with wrapped.disable_adapter():
        assert difference(wrapped, tiny.model()) is None
    apart = Fingerprint.of(wrapped)
    wrapped.merge_adapter()
    assert apart.difference(Fingerprint.of(wrapped)) is None
    assert apart.difference(Fingerprint.of(wrapped.merge_and_unload())) is None


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")
@pytest.mark.parametrize("kind", ["dora", "ia3"])
def test_an_adapter_that_does_more_than_to_add_is_refused(kind):
    from peft import IA3Config, LoraConfig, get_peft_model

    names = ["q_proj", "k_proj", "v_proj"]
    adapter = LoraConfig(r=2, use_dora=True, target_modules=names) if kind == "dora" else None
    wrapped = get_peft_model(fresh(), adapter or IA3Config(target_modules=names, feedforward_modules=[]))
    with pytest.raises(UnsupportedModelError, match="the adapter 'default' does to a weight is not known"):
        Fingerprint.of(wrapped)


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="needs accelerate")
@pytest.mark.parametrize("to", ["cpu", "disk"])
def test_offloaded_weights_are_read_where_they_lie(to, tmp_path):
    import accelerate

    net = fresh()
    if to == "cpu":
        accelerate.cpu_offload(net, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(net, str(tmp_path), execution_device=torch.device("cpu"))
    assert net.model.layers[0].mlp.up_proj.weight.device.type == "meta"
    assert difference(net, tiny.model()) is None


def test_weights_without_values_are_refused_in_one_sentence():
    with pytest.raises(UnsupportedModelError, match=r"lie on the meta device, .*load them before you calibrate\.$"):
        Fingerprint.of(fresh().to("meta"))


def test_weights_that_cannot_be_read_are_refused_in_one_sentence(monkeypatch):
    def fails(weight: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("no such thing\nas numbers")

    monkeypatch.setattr(fingerprint, "_thinned", fails)
    with pytest.raises(UnsupportedModelError, match=r"A weight of Linear cannot be read \(no such thing\), so that"):
        Fingerprint.of(fresh())


def test_tied_and_quantised_weights_are_read():
    net = fresh(tie_word_embeddings=True)
    assert len(Fingerprint.of(net).sample) == 56
    net.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.ones(8, 8, dtype=torch.int8), False)
    assert difference(net, fresh(tie_word_embeddings=True)) == "of the same shape, but its weights differ"


@pytest.mark.parametrize("held", [{}, {"num_attention_heads": None}, {"num_attention_heads": 0}], ids=str)
def test_a_config_that_says_nothing_of_heads_is_refused(held):
    config = SimpleNamespace(model_type="odd", num_hidden_layers=2, **held)
    config.get_text_config = lambda decoder: config
    with pytest.raises(UnsupportedModelError, match="this odd says no num_attention_heads; it cannot be calibrated"):
        Fingerprint.of(SimpleNamespace(config=config))


@pytest.mark.parametrize("kind", ["channels", "rotated", "razor", "duo"])
def test_the_files_of_the_embedded_model_are_those_of_the_embedded_model(kind):
    net = AutoModelForCausalLM.from_pretrained(embedded(), dtype=torch.float32)
    load(RESULTS / f"calibration-{kind}.json", kind).check(net)

"""Options of generation: what a caller asks for, and nothing that a model's config adds."""

import pytest
import tiny
from talking import TEXT, Words
from transformers import GenerationConfig

from kvote import Document, InputError
from kvote.hf.settings import settings_of


def settings(**options):
    return settings_of(tiny.model(), None, options, 32)


def test_generation_is_greedy_unless_something_else_is_asked():
    made = settings()
    assert (made["do_sample"], made["num_beams"], made["max_new_tokens"]) == (False, 1, 32)


@pytest.mark.parametrize("option", [{"temperature": 0.7}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}])
def test_options_of_sampling_sample(option):
    assert settings(**option)["do_sample"] is True
    assert settings(**option, do_sample=False)["do_sample"] is False


def test_a_temperature_of_zero_is_greedy():
    assert settings(temperature=0, top_p=0.9)["do_sample"] is False


def test_options_stand_above_a_generation_config():
    config = GenerationConfig(do_sample=True, temperature=0.6, max_new_tokens=7, eos_token_id=9)
    made = settings_of(tiny.model(), config, {"temperature": 0.2}, 32)
    assert (made["do_sample"], made["temperature"], made["max_new_tokens"]) == (True, 0.2, 7)
    assert made["eos_token_id"] == 9


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"temprature": 1.0}, "knows no option 'temprature'; did you mean temperature"),
        ({"zzz": 1}, "knows no option 'zzz'; see transformers.GenerationConfig"),
        ({"use_cache": False}, "use_cache cannot be set for a question: the cache is kvote's"),
        ({"num_return_sequences": 3}, "ask again for another answer"),
        ({"prompt_lookup_num_tokens": 3}, "it is for generate.. with a kvote.Cache"),
        ({"num_beams": 0}, "num_beams must be a whole number"),
        ({"max_new_tokens": -1}, "max_new_tokens must be a whole number"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, says):
    with pytest.raises(InputError, match=says):
        settings(**options)


def test_a_config_that_decides_about_the_cache_is_refused():
    with pytest.raises(InputError, match="sets cache_implementation: the cache is kvote's"):
        settings_of(tiny.model(), GenerationConfig(cache_implementation="static"), {}, 32)
    with pytest.raises(InputError, match=r"is a transformers\.GenerationConfig; got a dict"):
        settings_of(tiny.model(), {}, {}, 32)


@pytest.mark.parametrize("spec", ["dense", "h2o(budget=40)"])
def test_options_reach_generate(spec):
    document = Document(tiny.model(), Words(), TEXT, spec)
    tokens = document.ask("w1 w2 w3", max_new_tokens=6).token_ids
    assert tokens[0] not in document.ask("w1 w2 w3", max_new_tokens=6, suppress_tokens=tokens[:1]).token_ids
    sampled = {tuple(document.ask("w1 w2 w3", max_new_tokens=6, temperature=9.0).token_ids) for _ in range(3)}
    assert len(sampled) > 1
    assert document.ask("w1 w2 w3", max_new_tokens=6).token_ids == tokens
    with pytest.raises(InputError, match=r"generate\(\) does not take these options: `temperature`"):
        document.ask("w1", temperature=-1.0)


def test_beams_are_those_of_plain_generate():
    net = tiny.model()
    document = Document(net, Words(), TEXT, tokens_per_pass=64)
    tokens = Words()(f"{TEXT} w1 w2").input_ids
    expected = tiny.generate(net, tokens, max_new_tokens=6, num_beams=3).sequences[0, tokens.shape[1] :].tolist()
    greedy = document.ask("w1 w2", max_new_tokens=6)
    assert document.ask("w1 w2", max_new_tokens=6, num_beams=3).token_ids == expected != greedy.token_ids
    assert document.ask("w1 w2", max_new_tokens=6).token_ids == greedy.token_ids
    with pytest.raises(InputError, match="num_beams comes at its end"):
        document.stream("w1", num_beams=2)

"""Settings of one call of generate(): greedy unless the caller asks for something else."""

from difflib import get_close_matches
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from kvote.errors import InputError
from kvote.numbers import is_whole

# What a model's generation config still says: which tokens mean what.
_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
# Settings that kvote decides itself, and why a request for another value is refused.
_OURS = {
    "max_length": "give max_new_tokens",
    "num_return_sequences": "ask again for another answer",
    "prefill_chunk_size": "a document is read tokens_per_pass at a time",
    "return_dict_in_generate": "an answer is a kvote.Answer",
    **dict.fromkeys(
        ("output_attentions", "output_hidden_states", "output_scores", "output_logits"),
        "generate() with a kvote.Cache gives scores and logits",
    ),
    **dict.fromkeys(
        ("past_key_values", "use_cache", "cache_implementation", "cache_config", "max_cache_len", "low_memory"),
        "the cache is kvote's; its method says how it is kept",
    ),
    **dict.fromkeys(
        (
            "assistant_model prompt_lookup_num_tokens assistant_early_exit use_mtp speculation_type is_assistant "
            "guidance_scale penalty_alpha dola_layers constraints force_words_ids num_beam_groups diversity_penalty "
            "token_healing compile_config continuous_batching_config custom_generate tokenizer inputs input_ids "
            "attention_mask position_ids"
        ).split(),
        "it is for generate() with a kvote.Cache, not for questions",
    ),
}
# Arguments of generate() beside its config that go through.
PASSED = ("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn")
# Their use means sampling, as in other programs.
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "top_h", "epsilon_cutoff", "eta_cutoff")


def settings_of(
    model: PreTrainedModel, config: GenerationConfig | None, options: dict[str, Any], fewest: int
) -> dict[str, Any]:
    """All settings of a call: the ``options``, else what ``config`` says, else greedy; ``fewest`` is the number of new
    tokens where neither says one. Options that sample (``temperature``, ``top_p``, ...) turn sampling on, unless
    ``do_sample`` is given; a temperature of 0 turns it off.

    Raises InputError for an option that generate() does not know or that is kvote's to decide.
    """
    base = _greedy(model)
    given = _of_config(config, base) | _known(options, base)
    if given.get("temperature") == 0:
        given = {name: value for name, value in given.items() if name not in _SAMPLING} | {"do_sample": False}
    if "do_sample" not in given and any(name in given for name in _SAMPLING):
        given["do_sample"] = True
    count = given.get("max_new_tokens")
    count = fewest if count is None else count
    if not is_whole(count) or count < 1:
        raise InputError(f"max_new_tokens must be a whole number of at least 1; got {count!r}.")
    beams = given.get("num_beams", 1)
    if not is_whole(beams) or beams < 1:
        raise InputError(f"num_beams must be a whole number of at least 1; got {beams!r}.")
    return base | given | {"max_new_tokens": count}


def _known(options: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    for name in options:
        if name in _OURS:
            raise InputError(f"{name} cannot be set for a question: {_OURS[name]}.")
        if name not in base and name not in PASSED:
            close = get_close_matches(name, [known for known in base if known not in _OURS], 1)
            hint = f"; did you mean {close[0]}?" if close else "; see transformers.GenerationConfig."
            raise InputError(f"generate() knows no option {name!r}{hint}")
    return {name: value for name, value in options.items() if value is not None}


def _of_config(config: GenerationConfig | None, base: dict[str, Any]) -> dict[str, Any]:
    """The settings of a generation config that kvote leaves as they are."""
    if config is None:
        return {}
    if not isinstance(config, GenerationConfig):
        raise InputError(f"generation_config is a transformers.GenerationConfig; got a {type(config).__name__}.")
    said = {name: value for name, value in vars(config).items() if name in base and value is not None}
    for name in said.keys() & (_OURS.keys() - {"max_length", "use_cache", "return_dict_in_generate"}):
        if said[name] not in (base[name], False):
            raise InputError(f"The generation config sets {name}: {_OURS[name]}.")
    return {name: value for name, value in said.items() if name not in _OURS}


def _greedy(model: PreTrainedModel) -> dict[str, Any]:
    """Every setting of generation, most of them at what changes nothing. Given one by one, because generate() takes
    those that are not given from the model."""
    settings = {name: None for name in vars(GenerationConfig()) if not name.startswith("_")}
    settings.pop("transformers_version", None)
    settings |= GenerationConfig._get_default_generation_params()
    settings |= {name: getattr(model.generation_config, name, None) for name in _KEPT}
    single = {"num_beams": 1, "num_return_sequences": 1}
    return settings | single | {"max_length": None, "use_cache": True, "return_dict_in_generate": True}

"""Models of every kind are answered right or refused, and their own cache as before; bench/models.py tries them all."""

import pytest
from zoo.trial import trial, verdict

ALL = ("dense", "tokenselect", "streamingllm")

# Class -> the methods that answer as the native model does, but for situations that are refused; others may be refused.
CLASSES: dict[str, tuple[str, ...]] = {
    # Rotary positions in halves, in part, in pairs, the other way around; none in some layers.
    "LlamaForCausalLM": ALL,
    "MistralForCausalLM": ALL,
    "PhiForCausalLM": ALL,
    "Phi3ForCausalLM": ALL,
    "GlmForCausalLM": ALL,
    "NanoChatForCausalLM": ALL,
    "Cohere2ForCausalLM": ALL,
    "SmolLM3ForCausalLM": ALL,
    "StableLmForCausalLM": ALL,
    "PersimmonForCausalLM": ALL,
    "GPTNeoXForCausalLM": ALL,
    # Norms before and after the rotation, own scaling, soft caps, learned sinks, experts, gates.
    "Qwen3ForCausalLM": ALL,
    "HunYuanDenseV1ForCausalLM": ("dense",),
    "GraniteForCausalLM": ALL,
    "Gemma2ForCausalLM": ALL,
    "GptOssForCausalLM": ALL,
    "AfmoeForCausalLM": ALL,
    # Learned positions, or biases of the scores.
    "GPT2LMHeadModel": ALL,
    "OPTForCausalLM": ALL,
    "BioGptForCausalLM": ALL,
    "BertLMHeadModel": ALL,
    "BloomForCausalLM": (),
    # Keys that are attended twice, shared by layers, or latents.
    "DiffLlamaForCausalLM": (),
    "Gemma3nForCausalLM": (),
    "Gemma4ForCausalLM": (),
    "DeepseekV3ForCausalLM": (),
    # Layers without attention, masks of their own.
    "Qwen3_5ForCausalLM": ALL,
    "Qwen3NextForCausalLM": ALL,
    "JambaForCausalLM": ALL,
    "NemotronHForCausalLM": ALL,
    "OlmoHybridForCausalLM": ("dense", "tokenselect"),
    "MiniMaxForCausalLM": (),
    "DogeForCausalLM": (),
    # A language model in another one.
    "LlavaForConditionalGeneration": ALL,
    "Qwen2VLForConditionalGeneration": ("dense",),
    "PaliGemmaForConditionalGeneration": (),
}

# Class -> what the refusal names.
REASONS = {
    "DiffLlamaForCausalLM": "2 times",
    "DeepseekV3ForCausalLM": "latents",
    "MiniMaxForCausalLM": "cache of its own",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CLASSES)
def test_a_class_answers_as_without_kvote_or_is_refused(name: str) -> None:
    tried = trial(name)
    assert tried["built"], tried
    assert tried["generates"], tried
    assert tried["after"] == {"outcome": "identical"}
    found = {**tried["methods"], "streamingllm": tried["streamingllm"]}
    faults = {
        (method, situation): each
        for method in ALL
        for situation, each in found[method].items()
        if each["outcome"] in ("wrong", "crashed")
    }
    assert not faults
    verdicts = {method: verdict(found[method]) for method in ALL}
    assert all(verdicts[method] in ("identical", "partly") for method in CLASSES[name]), found
    if name in REASONS:
        assert all(REASONS[name] in each["said"] for method in ALL for each in found[method].values())

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
    "Cohere2ForCausalLM": ("dense",),
    "SmolLM3ForCausalLM": ("dense",),
    "StableLmForCausalLM": ("dense",),
    "PersimmonForCausalLM": ("dense",),
    "GPTNeoXForCausalLM": ALL,
    # Norms before and after the rotation, own scaling, soft caps, learned sinks, experts, gates.
    "Qwen3ForCausalLM": ALL,
    "HunYuanDenseV1ForCausalLM": ("dense",),
    "GraniteForCausalLM": ALL,
    "Gemma2ForCausalLM": ALL,
    "GptOssForCausalLM": ALL,
    "AfmoeForCausalLM": ("dense",),
    # Learned positions, or biases of the scores.
    "GPT2LMHeadModel": ("dense",),
    "OPTForCausalLM": ("dense",),
    "BioGptForCausalLM": ("dense",),
    "BertLMHeadModel": ("dense",),
    "BloomForCausalLM": (),
    # Keys that are attended twice, shared by layers, or latents.
    "DiffLlamaForCausalLM": (),
    "Gemma3nForCausalLM": (),
    "Gemma4ForCausalLM": (),
    "DeepseekV3ForCausalLM": (),
    # Layers without attention, masks of their own.
    "Qwen3_5ForCausalLM": ("dense",),
    "Qwen3NextForCausalLM": ("dense",),
    "JambaForCausalLM": ("dense",),
    "NemotronHForCausalLM": ("dense",),
    "OlmoHybridForCausalLM": ("dense",),
    "MiniMaxForCausalLM": (),
    "DogeForCausalLM": (),
    # A language model in another one.
    "LlavaForConditionalGeneration": ("dense",),
    "Qwen2VLForConditionalGeneration": ("dense",),
    "PaliGemmaForConditionalGeneration": (),
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

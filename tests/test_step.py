"""A generated token that is stored, selected for and answered in one call gets what it gets in several."""

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import kvote
from kvote.kernels import backend, cpu
from kvote.store.uncompressed import UncompressedSegment

pytestmark = pytest.mark.skipif(backend() != "cpu", reason="the compiled kernels do not run here")

_FEW = "top_k=5, sinks=2, window=6"
SPECS = {
    "dense": "dense",
    "everything fits": "tokenselect(top_k=512)",
    "anew": f"tokenselect({_FEW}, theta=2)",
    "reused": f"tokenselect({_FEW}, theta=0.1, reuse_span=8)",
    "no sinks": "tokenselect(top_k=5, sinks=0, window=6)",
    "int8": f"tokenselect({_FEW}, sketch='int8')",
    "int4": f"tokenselect({_FEW}, sketch='int4')",
    "window from the end": "tokenselect(top_k=5, sinks=2, window=8, chunk=8, published=True, head_map='gqa')",
}


def model(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).eval().to(dtype)


def generated(net: Any, spec: str, steps: list[int], *, inference: bool = False) -> tuple[Tensor, kvote.Cache]:
    """Logits of 12 generated tokens behind a prompt of 60. ``one_call_step`` counts those answered in one call."""
    cache, step = kvote.Cache(net, spec), UncompressedSegment.step

    def counted(self: UncompressedSegment, *args: Any) -> Any:
        answer = step(self, *args)
        assert answer is not None
        steps.append(1)
        return answer

    prompt, tokens = tiny.ids(1, 60) % 64, tiny.ids(1, 12, seed=3) % 64
    with torch.inference_mode() if inference else torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        net(input_ids=prompt, past_key_values=cache)
        patch.setattr(UncompressedSegment, "step", counted)
        for layer in cache.managed:
            layer.one_call_step = layer.one_call_step and steps[:1] != [-1]
        out = [net(input_ids=token.view(1, 1), past_key_values=cache).logits[0, 0] for token in tokens[0]]
    return torch.stack(out), cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_one_call_answers_what_several_do(spec, dtype):
    net, once, never = model(dtype), [], [-1]
    got, cache = generated(net, spec, once)
    expected, calm = generated(net, spec, never)
    assert len(once) == 24
    assert never == [-1]
    assert torch.equal(got, expected)
    for mine, theirs in zip(cache.managed, calm.managed, strict=True):
        assert mine.activity == theirs.activity
        assert all(map(torch.equal, mine.positions(0), theirs.positions(0)))
    if "theta=2" in spec:
        assert cache.managed[0].activity.selections == calm.managed[0].activity.selections > 12
    if "theta=0.1" in spec:
        assert 0 < cache.managed[0].activity.reused < 12


@pytest.mark.parametrize("name", cpu.instruction_sets() if backend() == "cpu" else [])
@pytest.mark.parametrize("spec", [SPECS["dense"], SPECS["anew"], SPECS["reused"]])
def test_every_instruction_set_does(spec, name):
    before, net = cpu.instruction_set(), model(torch.bfloat16)
    try:
        assert cpu.use(name)
        assert torch.equal(generated(net, spec, [])[0], generated(net, spec, [-1])[0])
    finally:
        cpu.use(before)


def test_a_cache_outlives_the_inference_mode_of_its_steps():
    net, steps = model(torch.float32), []
    got, cache = generated(net, SPECS["anew"], steps, inference=True)
    assert torch.equal(got, generated(net, SPECS["anew"], [-1])[0])
    assert steps
    with torch.no_grad():
        net(input_ids=tiny.ids(1, 3) % 64, past_key_values=cache)
    cache.crop(-2)
    assert cache.get_seq_length() == 73


@pytest.mark.parametrize("spec", ["h2o(budget=500)", "streamingllm", "random", "kivi", "tokenselect(head_map='paper')"])
def test_what_one_call_cannot_do_goes_the_general_way(spec):
    generated(model(torch.float32), spec, steps := [])
    assert not steps


def test_rows_and_padding_go_the_general_way():
    net = model(torch.float32)
    cache, ids = kvote.Cache(net, "dense"), tiny.ids(2, 20) % 64
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, :3] = 0
    with torch.no_grad():
        net(input_ids=ids[:, :19], attention_mask=mask[:, :19], past_key_values=cache)
        got = net(input_ids=ids[:, 19:], attention_mask=mask, past_key_values=cache).logits[0, 0]
        alone = net(input_ids=ids[:1, 3:]).logits[0, -1]
    assert [layer.held for layer in cache.managed] == [37, 37]
    # Distances count, not positions.
    torch.testing.assert_close(got, alone, atol=1e-4, rtol=1e-4)

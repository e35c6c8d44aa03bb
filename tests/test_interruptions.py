"""A pass that is interrupted leaves a cache as it was, or the next one is refused until it is."""

import copy
import functools
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import scored
import tiny
import torch
from calibrated import double_sparsity
from torch import Tensor

import kvote
from kvote import CropError, InputError, InterruptedPassError, settling
from kvote.layer import Layer
from kvote.store.pages import PagePool

_FEW = "top_k=5, sinks=2, window=6"
METHODS: dict[str, Any] = {
    "dense": "dense",
    "streamingllm": "streamingllm(sinks=2, window=9)",
    "tokenselect": f"tokenselect({_FEW}, chunk=1, tail=0, theta=2.0)",
    "random": f"random({_FEW}, chunk=1, tail=0)",
    "h2o": "h2o(budget=20)",
    "h2o-all": "h2o(budget=500)",
    "snapkv": "snapkv(budget=20, window=6)",
    "pyramidkv": "pyramidkv(budget=20, window=6, beta=4)",
    "knorm": "knorm(budget=20)",
    "keyformer": "keyformer(budget=20)",
    "critic": "critic(budget=20)",
    "prefixkv": "prefixkv(budget=20)",
    "kvcrush": "kvcrush(budget=20, window=6)",
    "minference": "minference(first=2, nearest=4, vertical=6, slash=6, last=8, block=4)",
    "mpcache": "mpcache(budget=20, cluster=2, share=2)",
    "expectedattention": "expectedattention(budget=20, sinks=2, future=16)",
    "randomkeep": "randomkeep(budget=20, sinks=2, window=6)",
    "tidaldecode": "tidaldecode(top_k=5, first=0)",
    "quest": "quest(token_budget=12, page=4, dense_layers=0)",
    "doublesparsity": double_sparsity(top_k=5, share=0.5, dense_layers=0),
    "cake": "cake(budget=20, window=6)",
    "ems": "ems(budget=24, window=6, threshold=0.1)",
    "mikv": "mikv(budget=20)",
    "mikv-all": "mikv(budget=500)",
    "kivi": "kivi(residual=32)",
    "rotatekv": "rotatekv(sinks=3)",
    "zipcache": "zipcache(gap=20)",
    "razorattention": "razorattention(heads='{razor}', induction=0.5, sinks=2, least=8, share=0.1)",
    "duoattention": "duoattention(heads='{duo}', sinks=2, window=9)",
    "think": "think(ratio=0.5, window=6, recent=5)",
    "xkv": "xkv(group=2, key_rank=6, value_rank=6)",
    "minicache": "minicache(start=0.0)",
    "kivi-tokenselect": f"kivi(residual=32) | tokenselect({_FEW}, chunk=1, tail=0, theta=2.0)",
}
LAYERS = 3
PROMPT = 66
# What each kind of pass feeds behind what was fed before: columns before, columns of the pass.
PASSES = {"prompt": (0, PROMPT), "middle": (20, 25), "chunk": (40, PROMPT - 40), "decode": (PROMPT, 1)}
STAGES = ("append", "observe_queries", "read", "attend", "step", "keep", "drop", "compress")


@pytest.fixture(params=METHODS.values(), ids=METHODS)
def method(request: pytest.FixtureRequest) -> Any:
    if callable(request.param):
        return request.param
    scores = [[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]]
    spec: str = request.param
    net = model()
    return spec.replace("{razor}", scored.file(scored.razor(net, scores))).replace(
        "{duo}", scored.file(scored.duo(net, scores))
    )


@functools.cache
def model() -> Any:
    return tiny.model(num_hidden_layers=LAYERS)


def filled(method: Any, columns: int) -> kvote.Cache:
    cache = tiny.cache(model(), method)
    cache.expect(PROMPT)
    if columns:
        tiny.feed(model(), cache, tiny.ids(1, PROMPT)[:, :columns])
    return cache


def piece(kind: str) -> Tensor:
    before, count = PASSES[kind]
    return torch.cat([tiny.ids(1, PROMPT), tiny.ids(1, 20, seed=3)], dim=1)[:, before : before + count]


def rest(cache: kvote.Cache) -> Tensor:
    """Logits of what is left of the prompt and a few more steps."""
    left = tiny.ids(1, PROMPT)[:, cache.get_seq_length() :]
    if left.shape[1]:
        tiny.feed(model(), cache, left)
    return tiny.feed(model(), cache, tiny.ids(1, 3, seed=4), passes=1)


@contextmanager
def fails(stage: str, index: int, *, after: bool, error: type[BaseException]) -> Iterator[list[str]]:
    """Raises ``error`` where layer ``index`` comes to a stage, before or after it is done. Says whether it did."""
    came: list[str] = []
    start, patch = Layer.start, pytest.MonkeyPatch()

    def stopped(run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = run(*args, **kwargs) if after else None
            if not came:
                came.append(stage)
                raise error(stage)
            return result if after else run(*args, **kwargs)

        return call

    def begun(layer: Layer, step: Any) -> Any:
        segment = start(layer, step)
        if layer.index == index and not came:
            if stage in ("append", "observe_queries", "attend", "step", "keep", "compress") and hasattr(segment, stage):
                patch.setattr(segment, stage, stopped(getattr(segment, stage)), raising=False)
            elif stage == "drop":
                own = settling.drop_own

                def dropping(each: Layer, *args: Any, **kwargs: Any) -> bool:
                    return (stopped(own) if each is layer else own)(each, *args, **kwargs)

                patch.setattr(settling, "drop_own", dropping)
            elif stage == "read":
                reader = type(layer.method.read)
                read = reader.read

                def reading(self: Any, reading: Any) -> Any:
                    spans = read(self, reading)
                    return stopped(lambda: list(spans))() if reading.layer == index and not came else spans

                patch.setattr(reader, "read", reading)
        return segment

    patch.setattr(Layer, "start", begun)
    try:
        yield came
    finally:
        patch.undo()


def mended(cache: kvote.Cache, kind: str, error: InterruptedPassError) -> kvote.Cache:
    """The cache after what the refusal says is to be done, and fed again what that has taken away."""
    before, _ = PASSES[kind]
    crop = re.search(r"call cache\.crop\((-\d+)\) to go back to (\d+), or cache\.reset\(\)", str(error))
    if crop:
        cache.crop(int(crop[1]))
        assert cache.get_seq_length() == before == int(crop[2])
        return cache
    assert "call cache.reset() and feed the text again" in str(error)
    cache.reset()
    assert [part.seen for part in cache.managed] == [0] * len(cache.managed)
    cache.expect(PROMPT)
    if before:
        tiny.feed(model(), cache, tiny.ids(1, PROMPT)[:, :before])
    return cache


def goes_on(cache: kvote.Cache, kind: str, expected: tuple[Tensor, Tensor]) -> None:
    """The pass is fed again, and all is as if nothing had happened; or it is refused first."""
    try:
        got = tiny.feed(model(), cache, piece(kind))
    except InterruptedPassError as error:
        got = tiny.feed(model(), mended(cache, kind, error), piece(kind))
    torch.testing.assert_close(got, expected[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(rest(cache), expected[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", PASSES)
def test_whatever_is_interrupted_the_next_answer_is_right_or_refused(method, kind):
    fresh = filled(method, PASSES[kind][0])
    calm = copy.deepcopy(fresh)
    expected = tiny.feed(model(), calm, piece(kind)), rest(calm)
    came = set()
    for stage in STAGES:
        for index, error in ((0, KeyboardInterrupt), (LAYERS - 1, MemoryError)):
            for after in (False, True):
                cache = copy.deepcopy(fresh)
                with fails(stage, index, after=after, error=error) as there:
                    try:
                        tiny.feed(model(), cache, piece(kind))
                    except error:
                        assert there
                if there:
                    came.add(stage)
                    goes_on(cache, kind, expected)
    # A generated token is stored and read in one step where that is all that happens to it.
    one_step = kind == "decode" and calm.managed[0].one_call_step
    assert ({"step"} if one_step else {"append", "observe_queries", "read", "attend"}) <= came


@pytest.mark.parametrize("spec", ["dense", METHODS["tokenselect"], "h2o(budget=20)", "kivi(residual=32)"])
def test_an_interruption_may_come_anywhere(spec):
    fresh = filled(spec, PROMPT)
    calm, at = copy.deepcopy(fresh), 0
    expected = tiny.feed(model(), calm, piece("decode")), rest(calm)
    while True:
        cache, calls = copy.deepcopy(fresh), 0

        def interrupt(frame: Any, event: str, _: Any, at: int = at) -> None:
            nonlocal calls
            if event in ("call", "return") and "/kvote/" in frame.f_code.co_filename:
                calls += 1
                if calls == at:
                    sys.setprofile(None)
                    raise KeyboardInterrupt

        sys.setprofile(interrupt)
        try:
            tiny.feed(model(), cache, piece("decode"))
        except KeyboardInterrupt:
            pass
        finally:
            sys.setprofile(None)
        if calls < at:
            break
        held = {part.seen for part in cache.managed}
        if not cache.passes.corrupt and held == {PROMPT + 1}:
            # All of the pass was over.
            torch.testing.assert_close(rest(cache), expected[1], atol=1e-4, rtol=1e-4)
        else:
            goes_on(cache, "decode", expected)
        at += 11
    assert at > 100


def test_an_interruption_between_layers_is_refused_with_what_to_do():
    net, cache = model(), filled("dense", PROMPT)
    handle = net.model.layers[1].register_forward_pre_hook(_stop)
    with pytest.raises(KeyboardInterrupt):
        tiny.feed(net, cache, piece("decode"))
    handle.remove()
    says = re.escape("layers with 66 to 67 columns; call cache.crop(-1) to go back to 66, or cache.reset().")
    for refused in (
        lambda: tiny.feed(net, cache, piece("decode")),
        lambda: cache.reorder_cache(torch.tensor([0])),
        lambda: cache.batch_repeat_interleave(2),
    ):
        with pytest.raises(InterruptedPassError, match=says):
            refused()
    with pytest.raises(InterruptedPassError, match=r"none can be cut to 67; call cache\.crop\(-1\)"):
        cache.crop(0)
    cache.crop(-1)
    assert [part.seen for part in cache.managed] == [PROMPT] * LAYERS


def test_an_interrupted_prompt_whose_tokens_are_dropped_offers_a_reset_only():
    net, cache = model(), filled("h2o(budget=20)", 0)
    handle = net.model.layers[2].register_forward_pre_hook(_stop)
    with pytest.raises(KeyboardInterrupt):
        tiny.feed(net, cache, piece("prompt"))
    handle.remove()
    with pytest.raises(InterruptedPassError, match=r"columns; call cache\.reset\(\) and feed"):
        tiny.feed(net, cache, piece("prompt"))
    with pytest.raises(CropError):
        cache.crop(-PROMPT)


def test_a_mask_is_refused_for_the_same_reason():
    net, cache = model(), filled("dense", PROMPT)
    handle = net.model.layers[1].register_forward_pre_hook(_stop)
    with pytest.raises(KeyboardInterrupt):
        tiny.feed(net, cache, piece("decode"))
    handle.remove()
    with pytest.raises(InterruptedPassError, match="was interrupted"):
        tiny.feed(net, cache, piece("decode"), torch.ones(1, PROMPT + 1, dtype=torch.long))


@pytest.mark.parametrize("family", ["gemma3"])
@pytest.mark.parametrize("index", [0, 1])
def test_native_layers_count_too(family, index):
    """Layer 0 slides and layer 1 is kvote's."""
    net = tiny.model(family)
    cache, tokens = tiny.cache(net), tiny.ids(1, 20)
    tiny.feed(net, cache, tokens)
    handle = net.model.layers[index].mlp.register_forward_pre_hook(_stop)
    with pytest.raises(KeyboardInterrupt):
        tiny.feed(net, cache, tiny.ids(1, 1))
    handle.remove()
    if index == 0:
        with pytest.raises(InterruptedPassError, match=r"call cache\.reset\(\)"):
            tiny.feed(net, cache, tiny.ids(1, 1))
        with pytest.raises(CropError, match="has let go of"):
            cache.crop(-1)
        cache.reset()
        tiny.feed(net, cache, tokens)
    else:
        # Every layer has seen it.
        assert cache.get_seq_length() == 21
    tiny.feed(net, cache, tiny.ids(1, 1))


def test_states_that_cannot_be_taken_back_are_refused():
    net = hybrid()
    cache, tokens = tiny.cache(net), tiny.ids(1, 20)
    expected = tiny.feed(net, cache, tokens)
    for index in (1, 2, 3):
        handle = net.model.layers[index].register_forward_pre_hook(_stop)
        with pytest.raises(KeyboardInterrupt):
            tiny.feed(net, cache, tiny.ids(1, 1))
        handle.remove()
        with pytest.raises(InterruptedPassError, match=r"call cache\.reset\(\)"):
            tiny.feed(net, cache, tiny.ids(1, 1))
        cache.reset()
        torch.testing.assert_close(tiny.feed(net, cache, tokens), expected, atol=1e-4, rtol=1e-4)


def hybrid() -> Any:
    """Two layers with states, kvote's, and one with states."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    kinds = ["conv", "conv", "full_attention", "conv"]
    config = AutoConfig.for_model(
        "lfm2", vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, layer_types=kinds, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def test_a_crop_that_is_interrupted_leaves_nothing_to_rely_on(monkeypatch):
    cache, crop, calls = filled("dense", PROMPT), Layer.crop, []

    def interrupted(layer: Layer, columns: int) -> None:
        calls.append(columns)
        if len(calls) == 2:
            raise KeyboardInterrupt
        crop(layer, columns)

    with monkeypatch.context() as patch:
        patch.setattr(Layer, "crop", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cache.crop(-3)
    for refused in (lambda: tiny.feed(model(), cache, piece("decode")), lambda: cache.crop(-1)):
        with pytest.raises(InterruptedPassError, match=r"call cache\.reset\(\)"):
            refused()
    cache.reset()
    tiny.feed(model(), cache, piece("prompt"))


def test_pages_that_are_being_moved_when_memory_runs_out_are_not_trusted(monkeypatch):
    for spec, at in (("dense", 0), ("dense", 1), ("kivi(residual=32)", 0)):
        cache, laid, calls = filled(spec, PROMPT), PagePool._laid_out, []
        expected = tiny.feed(model(), filled(spec, PROMPT), tiny.ids(1, 900, seed=5))

        def fails(pool, *args, at=at, calls=calls, laid=laid):
            calls.append(pool)
            if len(calls) == at + 1:
                raise RuntimeError("can't allocate memory")
            return laid(pool, *args)

        with monkeypatch.context() as patch:
            patch.setattr(PagePool, "_laid_out", fails)
            with pytest.raises(RuntimeError, match="allocate"):
                tiny.feed(model(), cache, tiny.ids(1, 900, seed=5))
        if at:
            with pytest.raises(InterruptedPassError, match=r"call cache\.reset\(\)"):
                tiny.feed(model(), cache, tiny.ids(1, 900, seed=5))
            continue
        got = tiny.feed(model(), cache, tiny.ids(1, 900, seed=5))
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tokens", [-5, -1, 2**31, 1.5, True, None, "9"])
def test_an_announcement_that_makes_no_sense_is_refused(tokens):
    with pytest.raises(InputError, match=r"expect takes a number of tokens from 0 to 2,147,483,647; got"):
        tiny.cache(model()).expect(tokens)


@pytest.mark.parametrize("tokens", [3, True, -1.5, None, "-3"])
def test_a_crop_that_makes_no_sense_is_refused(tokens):
    with pytest.raises(InputError, match="crop takes how many tokens to remove from the end"):
        filled("dense", PROMPT).crop(tokens)


def _stop(*_: Any) -> None:
    raise KeyboardInterrupt

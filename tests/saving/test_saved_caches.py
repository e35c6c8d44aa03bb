"""Whose cache it is, and files with fitting digests that say what cannot be."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import PreTrainedModel

import kvote
from kvote import Cache, InputError, MethodError
from kvote.calibration.file import Calibration
from kvote.method import Method
from kvote.read.reader import Everything
from kvote.saving.block_file import BlockFile, DamagedFileError, write
from kvote.state import Block
from tests.test_interruptions import hybrid

SELECTING = "tokenselect(top_k=5, sinks=2, window=6, chunk=1, tail=0, theta=0.0)"
METHODS = {
    "dense": "dense",
    "selecting": SELECTING,
    "packed": "kivi(residual=32)",
    "sinks apart": "rotatekv(sinks=3)",
    "salient": "zipcache(gap=20)",
    "evicting": "snapkv(budget=20, window=6)",
    "thin": "think(ratio=0.5, window=6, recent=5)",
    "low rank": "xkv(group=2, key_rank=6, value_rank=6)",
    "merged": "minicache(start=0.0, gamma=0.2)",
    "two precisions": "mikv(budget=20)",
    "persistent": "tidaldecode(top_k=5, first=0)",
}


def filled(net: PreTrainedModel, method: Any, rows: int = 2) -> Cache:
    cache = Cache(net, method)
    tiny.feed(net, cache, tiny.ids(rows, 80))
    tiny.feed(net, cache, tiny.ids(rows, 2, 3), passes=1)
    return cache


@pytest.fixture
def path(tmp_path: Path) -> Path:
    filled(tiny.model(), "dense").save(tmp_path / "cache.kv")
    return tmp_path / "cache.kv"


def test_one_changed_weight_is_another_model(path):
    net = tiny.model()
    with torch.no_grad():
        weight = net.model.embed_tokens.weight
        before = weight[9, 9].clone()
        weight[9, 9] = torch.nextafter(before, torch.tensor(9.0))
        try:
            with pytest.raises(InputError, match=r"cache\.kv was made with another model \(its weights differ\)"):
                Cache.load(path, net)
        finally:
            weight[9, 9] = before
    assert Cache.load(path, net).get_seq_length() == 82


@pytest.mark.parametrize(
    ("family", "changes", "why"),
    [
        ("qwen2", {}, "a LlamaForCausalLM, and this is a Qwen2ForCausalLM"),
        ("llama", {"num_hidden_layers": 3}, "layers 2 is 3 here"),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "rope_theta 10000 is 1e"),
        ("llama", {"seed": 4}, "its weights differ"),
    ],
)
def test_another_model_is_named(path, family, changes, why):
    with pytest.raises(InputError, match=why):
        Cache.load(path, tiny.model(family, **changes))


def test_another_dtype_is_another_model(path):
    with pytest.raises(InputError, match="it was in float32, and this one is in bfloat16"):
        Cache.load(path, tiny.model(seed=0).to(torch.bfloat16))
    tiny._weights.cache_clear()


def test_a_cache_is_no_file_of_another_kind(path):
    path.write_bytes(b"{}" * 100)
    with pytest.raises(DamagedFileError, match="cannot be used"):
        Cache.load(path, tiny.model())


def test_native_layers_go_along(tmp_path):
    for net in (tiny.model("gemma3"), hybrid()):
        cache = filled(net, "dense", rows=1)
        cache.save(tmp_path / "cache.kv")
        loaded = Cache.load(tmp_path / "cache.kv", net)
        for columns in (5, 1, 1):
            tokens = tiny.ids(1, columns, columns)
            assert torch.equal(tiny.feed(net, cache, tokens), tiny.feed(net, loaded, tokens))


def test_beams_go_on_from_a_loaded_cache(path):
    net, prompt = tiny.model(), torch.cat([tiny.ids(1, 80), tiny.ids(1, 6, 5)], dim=1)
    cache = Cache(net, SELECTING)
    tiny.feed(net, cache, prompt[:, :80])
    cache.batch_repeat_interleave(3)
    cache.save(path)
    loaded = Cache.load(path, net)
    mine, other = (tiny.generate(net, prompt, each, num_beams=3).sequences for each in (cache, loaded))
    assert torch.equal(mine, other)


def test_a_method_made_by_hand_is_given_again(path):
    net, method = tiny.model(), Method("by hand", read=Everything())
    filled(net, method).save(path)
    with pytest.raises(MethodError, match=r"does not say how 'by hand' is built; give method="):
        Cache.load(path, net)
    assert Cache.load(path, net, method).get_seq_length() == 82
    with pytest.raises(InputError, match="was made with 'by hand', not with 'dense'"):
        Cache.load(path, net, "dense")


def test_what_follows_the_last_token_in_memory_is_not_written(path):
    net = tiny.model()
    cache = filled(net, "dense")
    cache.crop(-30)
    cache.save(path)
    with BlockFile(path) as file:
        keys = next(block for name, block in file.tensors().items() if name.endswith("pool.keys"))
    assert keys.shape[1] == 64
    assert not keys[0, 52:].any()


# Files whose digests fit, and that say what cannot be.


def forged(path: Path, change: Any, tensors: Any = None) -> Path:
    """The same file with other facts or tensors."""
    with BlockFile(path) as file:
        facts, held = file.facts, file.tensors()
    change(facts)
    if tensors is not None:
        tensors(held)
    write(path, facts, {name: Block(tuple(x.shape), x.dtype, lambda x=x: x) for name, x in held.items()})
    return path


def nodes(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Every place in facts: what it is in, and its key."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        found.append((value, key))
        nodes(value[key], found)
    return found


def pool(facts: Any, name: str = "pool") -> Any:
    """The first pool of pages there."""
    for holder, key in nodes(facts["cache"], []):
        if key == "object" and holder[key] == name:
            return holder["of"]
    raise AssertionError


def segment(facts: Any) -> Any:
    return facts["cache"]["layers"][0]["of"]["layer"]["of"]["segment"]["of"]


def test_names_in_files_do_not_follow_those_in_the_code(tmp_path):
    filled(tiny.model(), METHODS["packed"]).save(tmp_path / "cache.kv")
    with BlockFile(tmp_path / "cache.kv") as file:
        layer = file.facts["cache"]["layers"][0]["of"]["layer"]["of"]
    assert {"seen", "settled", "encoded", "ahead", "prompted", "holes", "record", "activity"} <= layer.keys()
    assert {"raw", "keys", "values"} <= layer["segment"]["of"].keys()


def set_in(*place: Any, to: Any) -> Any:
    def change(facts: Any) -> None:
        inner = facts["cache"]
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = to

    return change


def lanes(change: Any, name: str = "raw pool") -> Any:
    return lambda facts: change(pool(facts, name)["lanes"])


def index(value: int) -> Any:
    def change(held: dict[str, torch.Tensor]) -> None:
        for name, tensor in held.items():
            if ".memory.index" in name:
                held[name] = torch.full_like(tensor, value)

    return change


LAYER = ("layers", 0, "of", "layer", "of")
LIES = {
    "pages beyond the pool": ("dense", lanes(lambda held: held[0][1].append([10**6, 1]))),
    "a negative page": ("dense", lanes(lambda held: held[0].__setitem__(1, [[-1, 2]]))),
    "more tokens than pages": ("dense", lanes(lambda held: held[0].__setitem__(0, 10**6))),
    "fewer tokens in one head": ("dense", lanes(lambda held: held[0].__setitem__(0, 65))),
    "a page twice": ("dense", lanes(lambda held: held[0].__setitem__(1, [[0, 1], [0, 1]]))),
    "a lane too few": ("dense", lanes(lambda held: held.pop())),
    "no lanes": ("dense", lanes(lambda held: held.clear())),
    "tokens not seen": ("dense", set_in(*LAYER, "seen", to=3)),
    "seen is a text": ("dense", set_in(*LAYER, "seen", to="82")),
    "an unknown attribute": ("dense", set_in(*LAYER, "attend", to=1)),
    "another method of the layer": ("dense", set_in(*LAYER, "method", to=None)),
    "an unknown part": ("dense", set_in(*LAYER, "activity", "object", to="os:system")),
    "no such object": ("dense", set_in(*LAYER, "activity", to={"same": 99})),
    "an endless number of sequences": ("dense", set_in(*LAYER, "form", 0, to=10**9)),
    "other heads": ("dense", set_in(*LAYER, "form", 1, to=1)),
    "a missing layer": ("dense", lambda facts: facts["cache"]["layers"].pop()),
    "codes of another length": ("packed", lanes(lambda held: held[0].__setitem__(0, 1), "pool")),
    "raw tokens in the wrong place": ("packed", lambda facts: segment(facts).__setitem__("_first", [64, 64])),
    "bodies of other sequences": ("thin", lambda facts: segment(facts)["bodies"].pop()),
    "no bodies": ("thin", lambda facts: segment(facts).__setitem__("bodies", [])),
    "sinks of other sequences": ("sinks apart", lambda facts: segment(facts)["exact"].pop()),
    "largest of other sequences": ("sinks apart", lambda facts: segment(facts)["largest"].pop()),
    "probes of other sequences": ("salient", lambda facts: segment(facts)["probes"].pop()),
    "bits of another number": ("salient", lambda facts: pool(facts, "bits").__setitem__("low", 4)),
    "bits that there are not": ("salient", lambda facts: pool(facts, "bits").__setitem__("low", 0)),
    "balances of other sequences": ("two precisions", lambda facts: segment(facts)["balances"].pop()),
}


@pytest.mark.parametrize(("method", "change"), LIES.values(), ids=LIES)
def test_facts_that_cannot_be_are_refused(path, method, change):
    filled(tiny.model(), METHODS[method]).save(path)
    with pytest.raises(DamagedFileError, match=r"cache\.kv cannot be used: "):
        Cache.load(forged(path, change), tiny.model())


@pytest.mark.parametrize("method", ["selecting", "persistent"])
@pytest.mark.parametrize("value", [-1, 82, 2**62])
def test_places_of_tokens_that_are_not_held_are_refused(path, method, value):
    filled(tiny.model(), METHODS[method]).save(path)
    with pytest.raises(DamagedFileError, match="a reader remembers tokens that are not held"):
        Cache.load(forged(path, lambda facts: None, index(value)), tiny.model())


def test_no_path_in_a_file_is_followed(path, tmp_path):
    calibration = tmp_path / "heads.json"

    def change(facts: Any) -> None:
        facts["method"] = {"spec": "x", "build": f"razorattention(heads={str(calibration)!r})", "calibrations": []}

    with pytest.raises(MethodError, match="does not hold the calibration"):
        Cache.load(forged(path, change), tiny.model())


def test_a_path_of_a_calibration_is_not_written(path, tmp_path):
    import scored

    net = tiny.model()
    heads: Calibration = scored.razor(net, [[0.1, 0.9], [0.8, 0.2]])
    filled(net, f"razorattention(heads={scored.file(heads)!r}, sinks=2, least=8, share=0.1)").save(path)
    assert scored.file(heads).encode() not in path.read_bytes()
    assert Cache.load(path, net).method.spec.startswith("razorattention(heads=<")


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_forged_facts_are_refused_or_harmless(path, method):
    net, chance = tiny.model(), random.Random(0)
    filled(net, method).save(path)
    with BlockFile(path) as file:
        text, tensors = json.dumps(file.facts), file.tensors()
    blocks = {name: Block(tuple(x.shape), x.dtype, lambda x=x: x) for name, x in tensors.items()}
    refused = 0
    for _ in range(40):
        facts = json.loads(text)
        places = nodes(facts["cache"], [])
        holder, key = chance.choice(places)
        holder[key] = chance.choice(
            [0, -1, 1, 65, 10**9, None, "x", [], {}, {"same": 0}, json.loads(json.dumps(chance.choice(places)[0]))]
        )
        try:
            write(path, facts, blocks)
            loaded = kvote.Cache.load(path, net)
        except (InputError, RecursionError, ValueError):
            refused += 1
            continue
        try:
            tiny.feed(net, loaded, tiny.ids(2, 70, 4))
            tiny.feed(net, loaded, tiny.ids(2, 2, 5), passes=1)
        except Exception:  # anything but a signal
            continue
    assert refused > 10

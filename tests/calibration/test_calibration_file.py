"""A calibration file is read back as it was written, and anything else is refused in one sentence."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from kvote import Cache, InputError
from kvote.calibration import Calibration, Fingerprint, load, save
from kvote.calibration import file as calibration_file
from kvote.calibration.channels import order_of
from kvote.calibration.heads import scores_of

KIND = "channels"
ROPE = {"rope_theta": "10000", "rope_type": "default"}


@pytest.fixture
def made() -> Calibration:
    model = Fingerprint(
        "llama", layers=2, heads=4, kv_heads=2, head_dim=4, sample=(0.5, -0.25, 1.5e-06), rope=tuple(ROPE.items())
    )
    order = [[3, 1, 0, 2], [0, 1, 2, 3]]
    return Calibration(KIND, model, {"tokens": 9, "layers": {"0": order, "1": order[::-1]}})


def test_what_was_saved_is_loaded(made, tmp_path):
    path = tmp_path / "model.json"
    save(made, path)
    assert load(path, KIND) == replace(made, name=str(path))
    held = json.loads(path.read_text())
    assert list(held) == ["format", "version", "kind", "model", "data"]
    assert (held["format"], held["version"]) == ("kvote-calibration", 2)
    assert held["model"] == {**asdict(made.model), "sample": [0.5, -0.25, 1.5e-06], "rope": ROPE}
    assert os.listdir(tmp_path) == ["model.json"]


def test_a_save_that_fails_leaves_the_old_file(made, tmp_path, monkeypatch):
    path = tmp_path / "model.json"
    save(made, path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(InputError, match=r"Cannot write .*: No space left on device\.$"):
        save(replace(made, data={"tokens": 1, "layers": {}}), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["model.json"]


def changed(made: Calibration, path: Path, **changes: Any) -> Path:
    save(made, path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return path


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"format": "other"}, "is not a calibration of kvote: its format is not 'kvote-calibration'"),
        ({"version": 1}, "is a calibration of version 1, and this kvote reads version 2; make it anew with `kvote cal"),
        ({"version": "9" * 10_000}, r"is a calibration of version '9{59}\.\.\., and"),
        ({"version": True}, "is a calibration of version True"),
        ({"kind": "heads"}, "holds 'heads', not 'channels'; make that with `kvote calibrate"),
        ({"kind": ["channels"]}, "holds a list, not 'channels'"),
        ({"data": [1]}, "it must hold data, format, kind, model, version"),
        ({"more": 1}, "it must hold data, format, kind, model, version"),
        ({"model": None}, "its model must hold model_type, layers, heads, kv_heads, head_dim, sample, rope"),
        ({"model": {"layers": 2}}, "its model must hold model_type"),
    ],
)
def test_a_file_that_is_no_calibration_is_refused(made, tmp_path, changes, sentence):
    with pytest.raises(InputError, match=sentence):
        load(changed(made, tmp_path / "x.json", **changes), KIND)


@pytest.mark.parametrize(
    "change",
    [
        {"layers": 0},
        {"heads": True},
        {"head_dim": 4.0},
        {"layers": "2"},
        {"layers": 10**12},
        {"heads": 10**400},
        {"kv_heads": 10**12},
        {"head_dim": 10**12},
        {"model_type": 7},
        {"model_type": "x" * 10**6},
        {"model_type": "\x1b[31m"},
        *({"rope": held} for held in (7, [], {"rope_theta": 1.0}, {"\x1b": ""}, {"x": "1" * 10**6})),
        *({"sample": held} for held in (7, "0.5", {}, [], [None], [True], ["0.5"], [[0.5]], [10**400], [0.5] * 65)),
    ],
    ids=lambda change: str(change)[:30],
)
def test_a_fingerprint_that_makes_no_sense_is_refused(made, tmp_path, change):
    path = changed(made, tmp_path / "x.json", model={**asdict(made.model), "rope": ROPE, **change})
    with pytest.raises(InputError, match=f"{next(iter(change))} of its model makes no sense"):
        load(path, KIND)


def test_a_sample_holds_no_infinity(made, tmp_path):
    path = tmp_path / "x.json"
    save(made, path)
    path.write_text(path.read_text().replace("-0.25", "1e999"))
    with pytest.raises(InputError, match="sample of its model makes no sense"):
        load(path, KIND)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "it is not plain JSON"),
        (b"\xff\xfe", "it is not UTF-8 text"),
        (b'{"format": NaN}', "it is not plain JSON"),
        (b'{"format": 1, "format": 1}', "it is not plain JSON"),
        (b"[" * 100_000, "it is not plain JSON"),
        (b'{"version": ' + b"9" * 10_000 + b"}", "it is not plain JSON"),
        (b"[]", "its format is not"),
        (b"\x80\x04N.", "it is not UTF-8 text"),
    ],
    ids=range(8),
)
def test_bytes_that_are_no_calibration_are_refused(tmp_path, content, sentence):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=sentence):
        load(path, KIND)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.json")
    with pytest.raises(InputError, match=r"it is a pipe, not a file; make it with `kvote calibrate"):
        load(tmp_path / "x.json", KIND)


def test_layers_are_not_counted_up_to_what_a_fingerprint_says(made):
    """A billion of them would take minutes."""
    layers = {"0": {"gate": [0.5, 0.5]}}
    many = Calibration("duo", replace(made.model, layers=10**12), {"tokens": 9, "layers": layers})
    assert scores_of(many, "duo") == {"gate": {0: (0.5, 0.5)}}


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    path = tmp_path / "x.json"
    with path.open("wb") as file:
        file.truncate(calibration_file._LARGEST + 1)
    with pytest.raises(InputError, match="is larger than the 32 MiB that are read; make it with"):
        load(path, KIND)


def test_a_file_that_is_not_there_names_the_command(tmp_path):
    with pytest.raises(InputError, match=r"Cannot read .*gone.json: No such file.*kvote calibrate .*--what channels"):
        load(tmp_path / "gone.json", KIND)


@pytest.mark.parametrize(
    "layers",
    [
        {},
        [],
        {"2": [[0, 1, 2, 3]] * 2},
        {"-1": [[0, 1, 2, 3]] * 2},
        {"00": [[0, 1, 2, 3]] * 2},
        {"²": [[0, 1, 2, 3]] * 2},
        {"9" * 6000: [[0, 1, 2, 3]] * 2},
        {"0": [[0, 1, 2, 3]]},
        {"0": [[0, 1, 2, 3], [0, 1, 2]]},
        {"0": [[0, 1, 2, 3], [0, 1, 2, 4]]},
        {"0": [[0, 1, 2, 3], [0, 1, 2, 2]]},
        {"0": [[0, 1, 2, 3], [0, True, 2, 3]]},
        {"0": [[0, 1, 2, 3], [0, 1.0, 2, 3]]},
        {"0": [[0, 1, 2, 3], "0123"]},
        {"0": [[0, 1, 2, 3], [0, 1, 2, [3]]]},
    ],
    ids=range(15),
)
def test_orders_that_are_none_are_refused(made, layers):
    with pytest.raises(InputError, match=r"^the calibration.*(layer|key heads|channels)"):
        order_of(replace(made, data={"tokens": 9, "layers": layers}))


def test_orders_are_those_of_the_file(made):
    order = order_of(made)
    assert order[0] == ((3, 1, 0, 2), (0, 1, 2, 3))
    assert order[1] == ((0, 1, 2, 3), (3, 1, 0, 2))


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def loaded(net: Any, dtype: torch.dtype) -> Any:
    """The model as from a checkpoint of its weights."""
    copy = type(net)(net.config).to(dtype)
    copy.load_state_dict(net.state_dict())
    return copy


@pytest.mark.parametrize("size", [1.0, 1e-3], ids=["as made", "small"])
@pytest.mark.parametrize("seed", range(4))
def test_a_model_is_recognised_in_any_precision_and_no_other_model_is(seed, size):
    net = loaded(tiny.model(seed=seed), torch.float32)
    for weight in net.parameters():
        weight.data *= size
    found = [Fingerprint.of(loaded(loaded(net, stored), dtype)) for stored in DTYPES for dtype in DTYPES]
    assert (found[0].model_type, found[0].layers, found[0].heads) == ("llama", 2, 4)
    assert (found[0].kv_heads, found[0].head_dim, len(found[0].sample)) == (2, 16, 56)
    assert all(one.difference(other) is None for one in found for other in found)
    others = [loaded(net, torch.float32), loaded(tiny.model(seed=seed + 1), torch.float32)]
    generator = torch.Generator().manual_seed(seed)
    for weight in others[0].parameters():
        weight.data *= 1 + 0.05 * torch.randn(weight.shape, generator=generator)
    for weight in others[1].parameters():
        weight.data *= size
    for other in (Fingerprint.of(loaded(each, dtype)) for each in others for dtype in DTYPES):
        for one in found:
            assert one.difference(other) == other.difference(one) == "of the same shape, but its weights differ"


def test_a_layer_more_makes_another_model():
    one, more = Fingerprint.of(tiny.model()), Fingerprint.of(tiny.model(num_hidden_layers=3))
    assert one.difference(more) == "layers 2 is 3 here"


def test_every_matrix_looked_at_counts():
    net = tiny.model(num_hidden_layers=1)
    before = Fingerprint.of(net)
    for weight in [weight for weight in net.model.layers.parameters() if weight.dim() > 1]:
        kept = weight.data.clone()
        for changed in (kept + 1, kept * 1.05):
            weight.data = changed
            assert before.difference(Fingerprint.of(net)) is not None
        weight.data = kept
    assert Fingerprint.of(net) == before


def test_weights_that_are_no_numbers_can_be_written():
    net = loaded(tiny.model(), torch.float32)
    for weight in net.parameters():
        weight.data[..., ::2] = float("nan")
    assert all(abs(number) < 10 for number in Fingerprint.of(net).sample)


def test_another_models_calibration_is_refused_in_one_sentence():
    made = Calibration(KIND, Fingerprint.of(tiny.model()), {}, "mine.json")
    made.check(tiny.model())
    Cache(tiny.model())
    made.check(tiny.model())
    with pytest.raises(
        InputError, match=r"^mine.json was made for another model \(of the same shape, but its .*kvote calibrate.*\.$"
    ):
        made.check(tiny.model(seed=1))
    with pytest.raises(InputError, match=r"\(kv_heads 2 is 4 here\)"):
        made.check(tiny.model(num_key_value_heads=4))

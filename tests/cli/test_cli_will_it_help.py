"""``kvote will-it-help`` with a machine of made-up speed: what it says and what it refuses."""

import json
from dataclasses import replace

import pytest

from kvote.cli import main, will_it_help
from kvote.measure import fit
from kvote.measure.forecast import DEFAULT, FEW, Curve, Machine
from kvote.measure.load import Load
from kvote.models import embedded
from kvote.spec import parse

LLAMA = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1}
ASK = ["will-it-help", "--model", embedded()]


def line(fixed: float, per_token: float) -> Curve:
    return Curve(tuple((n, fixed + per_token * n) for n in (FEW, 131_072)))


@pytest.fixture(autouse=True)
def made_up(monkeypatch: pytest.MonkeyPatch) -> dict[str, Curve]:
    """Speeds of the caches, which a test may change."""
    curves = {DEFAULT: line(1e-3, 1e-6), "dense": line(1.2e-3, 5e-7), "method": line(5e-3, 0.0)}

    def measure(shape, context, methods, batch, say):
        say("timing")
        named = {parse("dense").spec: curves["dense"], DEFAULT: curves[DEFAULT]}
        caches = {**{method.spec: curves["method"] for method in methods}, **named}
        return Machine(3e10, 1e10, 1e-3, caches, line(0.0, 2e-7), batch=batch)

    monkeypatch.setattr(will_it_help, "measure", measure)
    return curves


def said(capsys, *argv: str) -> str:
    assert main([*ASK, *argv]) == 0
    out, err = capsys.readouterr()
    assert err.endswith("kvote: timing\n")
    return " ".join(out.split())


def test_what_decides_comes_first(capsys):
    said_first = said(capsys, "--context", "131072")
    assert said_first.startswith("It fits: weights of ")
    assert "GiB. At 131,072 tokens a token takes 22 ms with tokenselect(sketch='int8') instead of 5" in said_first
    assert "x faster; below about 4," in said_first
    assert "transformers' default" in said_first
    assert "kvote dense" in said_first


def test_a_method_that_never_helps_is_called_so(capsys, made_up):
    made_up["method"] = line(2e-3, 2e-6)
    words = said(capsys, "--context", "50000")
    assert "x slower; it does not help at any length." in words


def test_a_method_that_always_helps_is_called_so(capsys, made_up):
    made_up["method"] = line(0.9e-3, 1e-7)
    assert "x faster; it is no slower at any length." in said(capsys, "--context", "131072")


def test_a_method_that_makes_no_difference_is_called_so(capsys, made_up):
    made_up["method"] = line(1e-3, 1e-6)
    assert "makes no difference" in said(capsys, "--context", "5000")


def test_dense_is_shown_once(capsys):
    words = said(capsys, "--context", "5000", "--method", "dense")
    assert words.count("kvote dense") == 1


def test_the_json_object_is_the_prediction(capsys):
    assert main([*ASK, "--context", "131072", "--batch", "2", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["context"] == 131_072
    assert made["batch"] == 2
    assert made["full_layers"] == 4
    assert made["speedup"] == pytest.approx(made["default"]["seconds"] / made["method"]["seconds"])
    assert made["verdict"].startswith("At 131,072 tokens")
    assert 4000 < made["break_even"] < 4300
    assert made["default"]["held_bytes"] == 2 * 4 * 131_072 * 2 * 2 * 32 * 2
    assert set(made["machine"]["layer_seconds"]) == {"default", "dense", "tokenselect(sketch='int8')"}


def test_a_model_that_does_not_fit_is_called_so(capsys, monkeypatch):
    monkeypatch.setattr(fit, "memory", lambda: (2**20, 2**20))
    words = said(capsys, "--context", "131072")
    assert words.startswith("It does not fit: weights of ")
    assert "this machine has 1.0 MiB." in words
    assert main([*ASK, "--context", "131072", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["memory"]["fits"] is False


def test_a_busy_machine_is_called_so_before_its_figures(capsys, monkeypatch):
    idle = will_it_help.measure
    load = Load(wall=10.0, waited=6.0, average=7.5, threads=2, cores=2)
    monkeypatch.setattr(will_it_help, "measure", lambda *given: replace(idle(*given), load=load))
    words = said(capsys, "--context", "131072")
    assert "This machine is busy (60% of the time waiting for a processor, load average 7.5 before, 2 cores)" in words
    assert words.index("is busy") < words.index("Measured like that: at 131,072 tokens a token takes")
    assert main([*ASK, "--context", "131072", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["machine"]["load"]
    assert (told["busy"], told["waited"], told["average"]) == (True, 6.0, 7.5)


@pytest.mark.parametrize("method", ["tokenselect(sketch='int8')", "streamingllm(sinks=4, window=100000)"])
def test_all_fits_into_80_columns(capsys, method):
    assert main([*ASK, "--context", "16000000", "--method", method]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_a_context_beyond_the_models_is_called_so_before_anything_is_measured(capsys):
    assert main([*ASK, "--context", "131072"]) == 0
    out, err = capsys.readouterr()
    assert err.startswith("kvote: The model was made for 1,024 tokens; beyond, some methods answer")
    assert "- The model was made for 1,024 tokens" in out


@pytest.mark.parametrize(
    ("config", "context", "sentence"),
    [
        (LLAMA, 10**15, "Predictions reach 16,777,216 tokens; got 1,000,000,000,000,000."),
        ({"model_type": "gpt2"}, 1025, "GPT2LMHeadModel has 1,024 positions and reads no longer text; got 1,025."),
        ({**LLAMA, "num_hidden_layers": 10**12}, 9, "The config's num_hidden_layers of some 2 to the 39 is more than"),
    ],
    ids=range(3),
)
def test_what_cannot_be_is_refused_before_anything_is_measured(capsys, tmp_path, config, context, sentence):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    argv = ["will-it-help", "--model", str(path), "--context", str(context), "--method", "dense"]
    assert main(argv) == 2
    assert capsys.readouterr().err.startswith(f"kvote: {sentence}")


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], "the following arguments are required: --model, --context; see kvote will-it-help --help."),
        (["--model", "x", "--context", "long"], "--context: must be a whole number of at least 1, got 'long'"),
        (["--model", "x", "--context", "0"], "--context: must be a whole number of at least 1, got '0'"),
        (["--model", "x", "--context", "9", "--batch", "0"], "--batch: must be a whole number of at least 1, got '0'"),
        (["--model", "./gone", "--context", "9"], "There is no config at ./gone."),
        (["--model", "gone/config.json", "--context", "9"], "There is no config at gone/config.json."),
        (["--model", ".", "--context", "9"], "Cannot read a config from '.'"),
        (
            ["--model", embedded(), "--context", "9", "--method", "wonder"],
            "There is no method 'wonder'; there are actqkv, adakv, cake,",
        ),
        (["--model", embedded(), "--context", "9", "--method", "tokenselect(top_k=0)"], "top_k must be a whole number"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_sentence(capsys, monkeypatch, tmp_path, argv, sentence):
    monkeypatch.chdir(tmp_path)
    assert main(["will-it-help", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"kvote: {sentence}")
    assert err.endswith(".\n")
    assert err.count("\n") == 1


def test_a_model_without_rotary_positions_is_refused_before_anything_is_measured(capsys, monkeypatch):
    found = will_it_help.shape

    monkeypatch.setattr(will_it_help, "shape", lambda config, batch: replace(found(config, batch), rotary=False))
    assert main([*ASK, "--context", "9"]) == 2
    assert capsys.readouterr().err.startswith("kvote: LlamaForCausalLM has no rotary positions")

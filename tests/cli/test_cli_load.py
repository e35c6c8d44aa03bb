"""Models that ``kvote ask`` is given: what fits is read in peace, and what does not is refused in one sentence."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig

from kvote.cli import main
from kvote.models import embedded, world

WEIGHTS = "model.safetensors"
Weights = dict[str, Tensor]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model of random numbers with the embedded model's tokenizer."""
    config = LlamaConfig(
        vocab_size=world.VOCABULARY_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        eos_token_id=2,
    )
    made = tmp_path / "model"
    AutoModelForCausalLM.from_config(config).save_pretrained(made)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(embedded()) / name, made)
    return made


@pytest.fixture
def ask(capsys, folder: Path) -> Callable[..., tuple[int, str]]:
    """Asks that model, and gives the exit code with all that standard error says."""

    def asked(*more: str) -> tuple[int, str]:
        capsys.readouterr()  # what making the model had to say
        code = main(["ask", "--model", str(folder), "--tokens", "60", "--max-new-tokens", "2", *more])
        out, err = capsys.readouterr()
        assert (out == "") == (code != 0)
        return code, err

    return asked


def refused(answer: tuple[int, str], sentence: str) -> None:
    code, err = answer
    assert code == 2
    assert err.startswith("kvote: ")
    assert err.count("\n") == 1
    assert sentence in err


def change(folder: Path, made: Callable[[Weights], Weights]) -> None:
    held = made(load_file(folder / WEIGHTS))
    save_file({name: held[name].contiguous().clone() for name in held}, folder / WEIGHTS, {"format": "pt"})


def configure(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_model_with_tied_weights_is_read_without_a_word(ask):
    assert ask() == (0, "")


def test_sampling_flags_of_a_model_are_no_matter(ask, folder):
    flags = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "eos_token_id": 2}
    (folder / "generation_config.json").write_text(json.dumps(flags))
    assert ask() == (0, "")


@pytest.mark.parametrize(
    "name", ["vision_tower.layers.0.weight", "model.layers.0.self_attn.rotary_emb.inv_freq", "score.weight"]
)
def test_weights_of_other_parts_are_no_matter(ask, folder, name):
    change(folder, lambda held: {**held, name: torch.ones(4)})
    assert ask() == (0, "")


def test_masks_that_old_releases_stored_are_no_matter(ask, folder):
    config = GPT2Config(vocab_size=world.VOCABULARY_SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=256)
    GPT2LMHeadModel(config).save_pretrained(folder)
    masks = {"transformer.h.0.attn.bias": torch.ones(1, 1, 256, 256), "transformer.h.1.attn.masked_bias": torch.ones(1)}
    change(folder, lambda held: {**held, **masks})
    assert ask("--method", "dense") == (0, "")


def test_layers_that_predict_further_tokens_are_no_matter(ask, folder):
    configure(folder, num_hidden_layers=1, num_nextn_predict_layers=1)
    assert ask() == (0, "")
    configure(folder, num_nextn_predict_layers=0)
    refused(ask(), "model.layers.1.input_layernorm.weight, model.layers.1.mlp.down_proj.weight and 7 more are stored")


@pytest.mark.parametrize("part", ["model.embed_tokens", "model.norm", "layers.1.mlp.up_proj", "layers.0.self_attn"])
def test_missing_weights_are_named(ask, folder, part):
    change(folder, lambda held: {name: held[name] for name in held if part not in name})
    refused(ask(), "missing from the weights, and would be random numbers.")
    assert part in ask()[1]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"tie_word_embeddings": False}, "lm_head.weight is missing from the weights"),
        ({"attention_bias": True}, "model.layers.0.self_attn.k_proj.bias, "),
        ({"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight, "),
        (
            {"intermediate_size": 48},
            "mlp.down_proj.weight is stored as 32x64 and its config asks for 32x48",
        ),
        ({"vocab_size": 9}, f"is stored as {world.VOCABULARY_SIZE}x32 and its config asks for 9x32"),
        ({"hidden_size": "x"}, "Validation error for field 'hidden_size': TypeError: Field 'hidden_size' expected int"),
        ({"num_attention_heads": 3}, "The hidden size (32) is not a multiple of the number of attention heads (3)."),
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
        ({"num_hidden_layers": 10**12}, "asks for num_hidden_layers 1,000,000,000,000, and no model has more than"),
        ({"vocab_size": 10**15}, "asks for vocab_size 1,000,000,000,000,000, and no model has more than"),
        ({"hidden_act": "\x1b[31m"}, "KeyError: '\\x1b[31m'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "Missing required keys in `rope_parameters`"),
        ({"model_type": "t5"}, "it is not a decoder-only language model."),
        ({"model_type": "nothing"}, "has model type `nothing` but Transformers does not recognize"),
        ({"model_type": ["llama"]}, "TypeError"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized model requires"),
        ({"sliding_window": "x"}, "cannot be run with tokenselect: "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_that_is_not_that_of_the_weights_is_refused(ask, folder, values, sentence):
    configure(folder, **values)
    refused(ask(), sentence)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_weights_that_are_no_fractions_are_refused(ask, folder, dtype):
    change(folder, lambda held: {**held, "model.norm.weight": held["model.norm.weight"].to(dtype)})
    refused(ask(), "model.norm.weight is stored as ")
    configure(folder, quantization_config={"quant_method": "nothing"})
    refused(ask(), "and its config names no quantisation that transformers knows.")


@pytest.mark.parametrize("name", ["q_proj.bias", "q_norm.weight", "q_proj.weight_scale", "q_proj.lora_A.weight"])
def test_weights_that_the_config_leaves_out_are_refused(ask, folder, name):
    change(folder, lambda held: {**held, f"model.layers.0.self_attn.{name}": torch.ones(32)})
    refused(ask(), f"model.layers.0.self_attn.{name} is stored with the weights, but its config has no place for them.")


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        (WEIGHTS, b"", "header too small"),
        (WEIGHTS, b"<html>404</html>", "header too large"),
        (WEIGHTS, None, "no file named model.safetensors"),
        ("config.json", b"", "is not a valid JSON file"),
        ("config.json", b"[]", "Should have a `model_type` key in its config.json."),
        ("config.json", b"\xff\xfe", "is not a valid JSON file"),
        ("config.json", b"[" * 100_000, "maximum recursion depth exceeded"),
        ("config.json", None, "Should have a `model_type` key in its config.json."),
        ("tokenizer.json", b"{", "Expecting property name"),
        ("tokenizer.json", b"null", "its files make no sense to transformers"),
        ("tokenizer.json", None, "there is no tokenizer that transformers can read; add its tokenizer.json."),
        ("tokenizer_config.json", b"\xff", "invalid start byte"),
        ("generation_config.json", b"[]", "its files make no sense to transformers"),
    ],
)
def test_broken_and_missing_files_are_refused(ask, folder, name, data, sentence):
    (folder / name).unlink()
    if data is not None:
        (folder / name).write_bytes(data)
    refused(ask(), sentence)


@pytest.mark.parametrize("end", [-1, -5000, 40])
def test_truncated_weights_are_refused(ask, folder, end):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:end])
    refused(ask(), "Error while deserializing header")


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "tokenizer.json", "generation_config.json"])
@pytest.mark.parametrize("kind", ["a pipe", "a device", "a loop"])
def test_files_without_an_end_are_refused(ask, folder, name, kind):
    (folder / name).unlink()
    if kind == "a pipe":
        os.mkfifo(folder / name)
    else:
        os.symlink("/dev/zero" if kind == "a device" else name, folder / name)
    refused(ask(), "Too many levels of symbolic links." if kind == "a loop" else f": {name} is {kind}, not a file.")


def test_weights_that_do_not_fit_into_memory_are_not_read(ask, monkeypatch):
    monkeypatch.setattr("kvote.cli.source.memory", lambda: (2**30, 1000))
    refused(ask(), "GiB, and 0.0 GiB of memory are free.")


def test_a_tokenizer_of_another_model_is_refused(ask, folder):
    configure(folder, vocab_size=100)
    change(folder, lambda held: {**held, "model.embed_tokens.weight": held["model.embed_tokens.weight"][:100]})
    refused(ask(), "is another model's: it gives token")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("", "The model's name is empty; give a hub name, a folder or a GGUF file."),
        ("a\0b", "Cannot read the model a\\x00b: embedded null byte."),
        ("\ud800", "Cannot read the model \\ud800: 'utf-8' codec can't encode"),
        ("loop", "Cannot read the model loop: Too many levels of symbolic links."),
        ("file", "file is not the folder of a model, nor a GGUF file; give one of these."),
        ("./fifo", "./fifo is not the folder of a model, nor a GGUF file; give one of these."),
        ("~nobody/x", "There is no model folder ~nobody/x."),
        ("x" * 300, "File name too long."),
        ("a b", "Repo id must use alphanumeric chars"),
        ("nobody/\x1b[31m", "nobody/\\x1b[31m"),
        ("--", "--model: expected one argument"),
    ],
)
def test_names_of_no_model(capsys, monkeypatch, tmp_path, name, sentence):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    os.symlink("loop", "loop")
    os.mkfifo("fifo")
    Path("file").touch()
    assert main(["ask", f"--model={name}", "--tokens", "60"]) == 2
    refused((2, capsys.readouterr().err), sentence)

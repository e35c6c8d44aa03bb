import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvote.models import embedded, world


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(embedded(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(embedded())


@torch.no_grad()
def score(model, tokenizer, task: str, tokens: int, samples: int) -> float:
    """Share of exact answers by greedy generation to documents of so many tokens, among 4 facts."""
    made = [world.sample(task, tokens, seed) for seed in range(5_000, 5_000 + samples)]
    texts = [s.document + " " + s.questions[0].prompt for s in made]
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    said = model.generate(**inputs, max_new_tokens=3)[:, inputs.input_ids.shape[1] :]
    return (
        sum(tokenizer.decode(a) == s.questions[0].answer + " <eot>" for a, s in zip(said, made, strict=True)) / samples
    )


def test_the_files_are_plain_and_small(model, tokenizer):
    files = {p.name: p for p in Path(embedded()).iterdir()}
    wanted = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert set(files) == wanted | {"training.jsonl"}
    assert sum(p.stat().st_size for p in files.values()) <= 16 * 2**20
    config = json.loads(files["config.json"].read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "auto_map" not in config
    assert not any("/" in str(value) for value in config.values())
    assert model.config.num_attention_heads == 8
    assert model.config.num_key_value_heads == 2
    assert model.config.max_position_embeddings == 1024
    assert len(tokenizer) == model.config.vocab_size == world.VOCABULARY_SIZE


def test_special_tokens(model, tokenizer):
    assert tokenizer.padding_side == "left"
    assert tokenizer("The").input_ids == [world.BOS, world.ID["The"]]
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == world.EOT
    assert tokenizer.pad_token_id == world.PAD
    text = world.sample("passkey", 300, 0).document
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


@pytest.mark.parametrize(
    ("task", "tokens", "bound"), [("needle", 480, 0.95), ("needle", 990, 0.95), ("passkey", 990, 0.95)]
)
def test_it_retrieves_within_its_trained_length(model, tokenizer, task, tokens, bound):
    assert score(model, tokenizer, task, tokens, 40) >= bound


def test_dense_attention_collapses_at_four_times_the_trained_length(model, tokenizer):
    assert score(model, tokenizer, "needle", 4_000, 12) <= 0.25


def test_a_second_turn_is_answered(model, tokenizer):
    right = 0
    for seed in range(8):
        made = world.sample("turns", 900, seed)
        text = made.document
        for question in made.questions:
            inputs = tokenizer(text + " " + question.prompt, return_tensors="pt")
            said = model.generate(**inputs, max_new_tokens=3)[0, inputs.input_ids.shape[1] :]
            right += tokenizer.decode(said) == question.answer + " <eot>"
            text += f" {question.prompt} {tokenizer.decode(said)}"
    assert right >= 14  # of 16


def test_the_log_tells_the_whole_run():
    rows = [json.loads(line) for line in (Path(embedded()) / "training.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == sorted(r["step"] for r in rows)
    assert rows[-1]["needle"] >= 0.95
    assert rows[-1]["length"] == 1024

"""RULER of lm-evaluation-harness through the adapter."""

import socket

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("lm_eval")
pytest.importorskip("nltk")
pytest.importorskip("wonderwords")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from kvote.errors import InputError
from kvote.eval.lm_eval import KvoteLM
from kvote.eval.lm_ruler import OFFLINE, ruler
from kvote.models import embedded


@pytest.fixture(scope="module")
def parts():
    return {
        "pretrained": AutoModelForCausalLM.from_pretrained(embedded(), dtype=torch.float32),
        "tokenizer": AutoTokenizer.from_pretrained(embedded()),
        "backend": "causal",
        "max_length": 4096,
    }


@pytest.fixture
def offline(monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    # Connections to itself are torch's, and tried before.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("task", OFFLINE)
def test_dense_attention_answers_as_without_kvote_and_every_request_goes_through_it(offline, parts, task):
    model = KvoteLM(**parts)
    samples = ruler(model, [1200], [task], limit=2, bootstrap_iters=0)["samples"][task]
    asked = [sample["arguments"][0] for sample in samples]
    again = [Instance("generate_until", {}, arguments, i) for i, arguments in enumerate(asked)]
    assert [sample["resps"][0][0] for sample in samples] == HFLM(**parts).generate_until(again, disable_tqdm=True)
    assert all(0 <= sample["1200"] <= 1 for sample in samples)
    assert model.requests == len(samples) == 2
    # One of them is whole in the last cache.
    seen = model.report.layers[0].tokens_seen
    assert seen >= min(len(parts["tokenizer"](context).input_ids) for context, _ in asked) > 500


@pytest.mark.parametrize(
    ("lengths", "tasks", "why"),
    [([4096], ["niah_single_2"], "need no download"), ([600], OFFLINE, "1,200 tokens or more"), ([], OFFLINE, "1,200")],
)
def test_tasks_that_download_or_never_end_are_refused(parts, lengths, tasks, why):
    with pytest.raises(InputError, match=why):
        ruler(HFLM(**parts), lengths, tasks)

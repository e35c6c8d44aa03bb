"""The adapter of lm-evaluation-harness."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from kvote.errors import MethodError
from kvote.eval.lm_eval import KvoteLM
from kvote.models import embedded, world

SAMPLE = world.sample("needle", 300, 3, 4)
ASKED = SAMPLE.questions[0]
CONTEXT = f"{SAMPLE.document} {ASKED.prompt}"


@pytest.fixture(scope="module")
def parts():
    return {
        "pretrained": AutoModelForCausalLM.from_pretrained(embedded(), dtype=torch.float32),
        "tokenizer": AutoTokenizer.from_pretrained(embedded()),
        "backend": "causal",
        "max_length": 2048,
        "batch_size": 2,
    }


def instances(kind, *arguments):
    return [Instance(request_type=kind, doc={}, arguments=one, idx=i) for i, one in enumerate(arguments)]


def likelihoods(model):
    asked = [(CONTEXT, f" {ASKED.answer}"), (CONTEXT, " The grass is green."), (SAMPLE.document, " Here we go.")]
    return model.loglikelihood(instances("loglikelihood", *asked), disable_tqdm=True)


def test_dense_likelihoods_are_those_of_the_harness(parts):
    expected, found = likelihoods(HFLM(**parts)), likelihoods(KvoteLM(**parts))
    assert [one[0] for one in found] == pytest.approx([one[0] for one in expected], abs=1e-3)
    assert [one[1] for one in found] == [one[1] for one in expected]


@pytest.mark.parametrize("method", ["h2o(budget=32)", "kivi(bits=2, residual=32)"])
def test_methods_that_lose_something_do_so_in_likelihoods(parts, method):
    dense, found = likelihoods(KvoteLM(**parts)), likelihoods(KvoteLM(**parts, method=method))
    assert all(abs(a[0] - b[0]) > 1e-4 for a, b in zip(dense, found, strict=True))


def test_rolling_perplexity_goes_token_by_token(parts):
    asked = instances("loglikelihood_rolling", (SAMPLE.document,))
    expected = HFLM(**parts).loglikelihood_rolling(asked, disable_tqdm=True)
    assert KvoteLM(**parts).loglikelihood_rolling(asked, disable_tqdm=True) == pytest.approx(expected, abs=1e-2)
    lossy = KvoteLM(**parts, method="streamingllm(sinks=4, window=16)")
    assert abs(lossy.loglikelihood_rolling(asked, disable_tqdm=True)[0] - expected[0]) > 1e-2


def test_generation_goes_through_a_cache_too(parts):
    asked = instances(
        "generate_until", *[(text, {"until": ["."], "max_gen_toks": 6}) for text in (CONTEXT, "The grass")]
    )
    model = KvoteLM(**parts)
    assert model.generate_until(asked, disable_tqdm=True) == HFLM(**parts).generate_until(asked, disable_tqdm=True)
    assert model.requests == 2
    assert model.report.layers[0].tokens_seen > 300


def test_a_method_that_makes_no_sense_is_refused_at_once(parts):
    with pytest.raises(MethodError):
        KvoteLM(**parts, method="nothing")

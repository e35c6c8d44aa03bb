"""The embedded model as lm-evaluation-harness takes one."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvote.models import embedded


@pytest.fixture(scope="module")
def loaded():
    return {
        "pretrained": AutoModelForCausalLM.from_pretrained(embedded(), dtype=torch.float32),
        "tokenizer": AutoTokenizer.from_pretrained(embedded()),
        "backend": "causal",
    }

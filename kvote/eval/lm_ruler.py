"""RULER as lm-evaluation-harness makes it: the six of its tasks that need no data set, without a download.

    ruler(KvoteLM("model", "tokenselect"), lengths=[4096], limit=20)["results"]

RULER: Hsieh et al. 2024, arXiv 2404.06654. Needs ``lm-eval[ruler]``.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import nltk
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM

from kvote.errors import InputError

# The others read essays, SQuAD or HotpotQA from the network.
OFFLINE = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe")
# The harness shortens a sample until it fits, and goes on for ever where none does: the solved example of variable
# tracking alone takes 500 tokens.
SHORTEST = 1200


def ruler(
    model: HFLM,
    lengths: Sequence[int] = (4096,),
    tasks: Sequence[str] = OFFLINE,
    limit: int | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """What ``lm_eval.simple_evaluate`` gives, for samples of ``lengths`` tokens; ``limit`` samples of each task.

    ``kwargs`` are those of ``simple_evaluate``. The tasks count tokens with the model's own tokenizer, also where that
    came from a GGUF file or was handed over.

    Raises InputError for another task, and for a length at which the harness never ends.
    """
    if foreign := [task for task in tasks if task not in OFFLINE]:
        raise InputError(f"{foreign[0]!r} is not one of the tasks that need no download: {', '.join(OFFLINE)}.")
    if not lengths or min(lengths) < SHORTEST:
        raise InputError(f"lengths must be of {SHORTEST:,} tokens or more; got {list(lengths)}.")
    with tempfile.TemporaryDirectory() as folder, _without_downloads():
        model.tokenizer.save_pretrained(folder)
        metadata = {"tokenizer": folder, "max_seq_lengths": list(lengths)}
        results: dict[str, Any] = simple_evaluate(model, tasks=list(tasks), limit=limit, metadata=metadata, **kwargs)
    return results


@contextmanager
def _without_downloads() -> Iterator[None]:
    """The harness fetches a splitter of sentences when it makes needles, which only the essays need."""
    download, nltk.download = nltk.download, lambda *_, **__: False
    try:
        yield
    finally:
        nltk.download = download

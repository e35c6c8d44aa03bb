"""Subtasks that go, on the embedded model: what is answered from their conclusions, with and without encoding again.

A text of 1,024 tokens with its question has four facts; prose between them stands for the bodies of subtasks, and the
facts for their conclusions. The bodies are marked, so nothing here is found out by the method itself: this measures
what dropping them, and encoding again what follows, does to answers. Beside it, ``randomkeep`` with as many tokens.

    python bench/subtasks.py --samples 96
"""

import argparse
from typing import Any

import torch
from baselines import verdict
from common import load_embedded, save, table
from embedded import TRAINED, within

import kvote
from kvote.models import world
from kvote.subtasks import encode_again

_SEED = 4_000_000
_FACT = "One of the special magic numbers for "
WAYS = (
    ("tim(threshold=2)", True),
    ("tim(threshold=2)", False),
    ("tim(threshold=0)", True),
    ("tim(threshold=0)", False),
)


def bodies(tokenizer: Any, document: str) -> tuple[list[int], list[range]]:
    """The tokens of a document, and which of them are prose between its facts."""
    ids, spans = [tokenizer.bos_token_id], []
    for i, part in enumerate(document.split(_FACT)):
        fact, rest = part.split(".", 1) if i else ("", part)
        if i:
            ids += tokenizer(f"{_FACT}{fact}.", add_special_tokens=False).input_ids
        prose = tokenizer(rest, add_special_tokens=False).input_ids
        if prose:
            spans.append(range(len(ids), len(ids) + len(prose)))
            ids += prose
    return ids, spans


@torch.no_grad()
def answer(
    model: Any, method: str, parts: list[list[int]], spans: list[range], new: int, again: bool
) -> tuple[Any, Any]:
    """What is said after a document and its question, and the tokens and bytes that were held before."""
    cache = kvote.Cache(model, method)
    for span in spans if method.startswith("tim") else ():
        cache.mark_span("subtasks", span.start, span.stop)
    for part in parts:
        logits = model(input_ids=torch.tensor([part]), past_key_values=cache, logits_to_keep=1).logits[:, -1]
        anew = encode_again(model, cache) if again else None
        logits = logits if anew is None else anew
    layers = cache.report().layers
    told = layers[0].tokens_held, sum(layer.nbytes for layer in layers)
    said = [int(logits.argmax())]
    for _ in range(new - 1):
        out = model(input_ids=torch.tensor([said[-1:]]), past_key_values=cache, logits_to_keep=1)
        said.append(int(out.logits[0, -1].argmax()))
    return said, told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=96)
    options = parser.parse_args()
    model, tokenizer = load_embedded(torch.bfloat16)
    found: dict[str, dict[str, Any]] = {}
    for i in range(options.samples):
        sample = within("needle", TRAINED, _SEED + i)
        asked = sample.questions[0]
        document, spans = bodies(tokenizer, sample.document)
        question = tokenizer(asked.prompt, add_special_tokens=False).input_ids
        right = [*tokenizer(asked.answer, add_special_tokens=False).input_ids, world.EOT]
        for method, again in (("dense", False), *WAYS):
            name = method + (", encoded again" if again else "")
            said, (tokens, nbytes) = answer(model, method, [document, question], spans, len(right), again)
            each = found.setdefault(name, {"right": "", "random": "", "tokens": 0, "bytes": 0})
            each["right"] += str(int(said == right))
            each["tokens"] += tokens / options.samples
            each["bytes"] += nbytes / options.samples
            if method != "dense":
                keep = f"randomkeep(budget={tokens})"
                said, _ = answer(model, keep, [document + question], [], len(right), False)
                each["random"] += str(int(said == right))
    save("subtasks", {"tokens": TRAINED, "rows": [{"name": name, **each} for name, each in found.items()]})
    print(render(found))


def render(found: dict[str, dict[str, Any]]) -> str:
    dense, rows = found["dense"]["bytes"], []
    for name, each in found.items():
        share, count = each["right"].count("1"), len(each["right"])
        beside = f"{100 * each['random'].count('1') / count:.0f}%" if each["random"] else ""
        better = {"beats": "better", "equals": "no better", "loses": "worse"}
        told = better[verdict(each["right"], each["random"])[0]] if each["random"] else ""
        cells = [f"{each['tokens']:.0f}", f"{100 * each['bytes'] / dense:.0f}%", f"{100 * share / count:.0f}%"]
        rows.append([f"`{name}`", *cells, beside, told])
    return table(["", "tokens held", "bytes", "right", "random", "than random"], rows)


if __name__ == "__main__":
    main()

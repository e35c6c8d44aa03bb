"""Facts hidden in prose, asked of a real model: after the document was cut down, named beforehand, and with the
document read anew for each question.

``python bench/asked_later.py --model model.gguf --text novel.txt`` prints a line per method and way of asking: facts
found, and the most tokens that a layer holds.
"""

import argparse
from pathlib import Path

from kvote import Document
from kvote.cli.load import load

NAMES = "Aldous Brenda Cedric Dorothea Edmund Felicity Gideon Harriet Ignatius Josephine".split()
TOWNS = "Quebec Nairobi Oslo Lima Kyoto Cairo Dublin Prague Havana Hanoi".split()


def main() -> None:
    """Reads, asks and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--letters", type=int, default=8_000, help="of the text that are read")
    parser.add_argument("--facts", type=int, default=8)
    parser.add_argument("--method", action="append", help="(default: dense and snapkv(budget=0.25))")
    args = parser.parse_args()
    loaded = load(args.model)
    facts = list(zip(NAMES, TOWNS, strict=True))[: args.facts]
    text = hidden(args.text.read_text()[20_000 : 20_000 + args.letters], facts)
    questions = [f"In which town was {name} born? Answer with the town." for name, _ in facts]
    for spec in args.method or ["dense", "snapkv(budget=0.25)"]:
        for way in ("later", "named", "first"):
            named = " ".join(questions) if way == "named" else None
            document = Document(loaded.model, loaded.tokenizer, text, spec, queries=named, lazy=way == "first")
            found, held = 0, 0
            for question, (_, town) in zip(questions, facts, strict=True):
                answer = document.ask(question, max_new_tokens=16, question_first=way == "first")
                found += town in answer.text
                held = max(held, max(layer.tokens_held for layer in answer.report.layers))
            print(f"{spec}  {way}  {len(document)} tokens  found {found} of {len(facts)}  held {held}", flush=True)


def hidden(text: str, facts: list[tuple[str, str]]) -> str:
    """``text`` with a sentence for each fact, evenly spread, each between two others."""
    sentences = " ".join(text.split()).split(". ")
    for i, (name, town) in reversed(list(enumerate(facts))):
        place = (2 * i + 1) * len(sentences) // (2 * len(facts))
        sentences.insert(place, f"It was well known that {name} was born in the town of {town}")
    return ". ".join(sentences)


if __name__ == "__main__":
    main()

# %% [markdown]
# # A text longer than the model was trained on
#
# Each cell (`# %%`) runs by itself in Jupyter, VS Code or Spyder, and all of them with
#
#     python examples/ask_a_novel.py [MODEL]
#
# MODEL is a folder or a GGUF file (`pip install '.[gguf]'`), such as the one that `make real` installs. Without it, the
# model that comes with kvote is asked about a text in its own small language. Nothing is downloaded.

# %%
import sys
from pathlib import Path

import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvote
from kvote.eval import prose
from kvote.models import embedded, world

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
named = next((word for word in sys.argv[1:] if Path(word).exists()), embedded())  # or write yours here
path = Path(named)
if path.suffix == ".gguf":
    source, more = path.parent, {"gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(source, dtype="bfloat16", **more).eval()
else:
    source, more = path, {}
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval()
tokenizer = AutoTokenizer.from_pretrained(source, **more)
trained = model.config.max_position_embeddings
print(f"{path.name}: {model.num_parameters():,} parameters, trained on texts of up to {trained:,} tokens")

# %% [markdown]
# The text: a novel in which five facts are hidden, evenly spread, half as long again as the model knows; or, for the
# embedded model, a text of its language, three times as long, and a question about it.

# %%
BORN = {"Aldous": "Quebec", "Brenda": "Nairobi", "Cedric": "Oslo", "Dorothea": "Lima", "Edmund": "Kyoto"}


def novel(tokens: int) -> tuple[str, dict[str, str]]:
    """A text of about so many tokens, and what to ask about it."""
    sentences, held = [], 0
    for sentence in prose.sentences():
        held += len(tokenizer(sentence).input_ids)
        if held > tokens:
            break
        sentences.append(sentence)
    for i, (name, town) in reversed(list(enumerate(BORN.items()))):
        place = (2 * i + 1) * len(sentences) // (2 * len(BORN))
        sentences.insert(place, f"It was well known that {name} was born in the town of {town}.")
    return " ".join(sentences), {f"In which town was {name} born? Answer with the town.": BORN[name] for name in BORN}


if named == embedded():
    sample = world.sample("needle", tokens=trained * 3, seed=0)
    text, questions = sample.document, {each.prompt: each.answer for each in sample.questions}
else:
    text, questions = novel(trained * 3 // 2)

# %% [markdown]
# Three ways to hold and read it. What TokenSelect reads per query (`top_k` + `sinks` + `window`, and the tokens since)
# stays within the trained length.

# %%
if named == embedded():
    selected, recent = "tokenselect(top_k=512, sinks=16, window=256, chunk=128)", "streamingllm(sinks=16, window=768)"
else:
    selected, recent = "tokenselect(top_k=512, sinks=64, window=1024)", "streamingllm(sinks=64, window=1536)"

documents = {}
for method in ("dense", recent, selected):
    documents[method] = document = kvote.Document(model, tokenizer, text, method)
    answers = [document.ask(question, max_new_tokens=16) for question in questions]
    found = sum(right in answer.text for answer, right in zip(answers, questions.values(), strict=True))
    report = answers[-1].report
    print(f"\n{method}: {found} of {len(questions)} found, in a text of {len(document):,} tokens")
    read = max(layer.tokens_read for layer in report.layers)
    print(f"  a query read {read:,} tokens; what is held takes {report.nbytes / 2**20:.1f} MiB")
    print(f"  the text was read in {document.prefill_seconds:.1f} s")
    print(f"  the first answer: {answers[0].text.strip()!r}, and it is {next(iter(questions.values()))!r}")

# %% [markdown]
# A text that has been read answers as often as one likes, word by word if it takes long.

# %%
document = documents[selected]
for question in questions:
    print(f"\n{question} ", end="")
    for piece in document.stream(question, max_new_tokens=16):
        print(piece, end="", flush=True)
print()

# %% [markdown]
# What the cache did, layer by layer: tokens held and read, selections made and taken over from the step before, bytes.

# %%
print(document.ask(next(iter(questions)), max_new_tokens=16).report)

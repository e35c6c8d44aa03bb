"""Accuracy of every method against the bytes it holds: the embedded model at its trained length, at four budgets.

Three tasks, 1,024 tokens with question and answer: one needle among four, two needles asked for together, a pass key.
The question ends the prompt, as in the papers: a method that decides by the prompt's last queries sees it. With
``--ways later`` it is asked after the prompt was read and cut down, as ``kvote.Document`` does. Methods that change
nothing but the reading of generated tokens are fed the question token by token, or there would be nothing to see.

Chance is in the table. Beside every method that holds fewer bytes stands ``randomkeep``, which keeps sinks, a window
and random tokens, with as many tokens as fit into the bytes that the method was found to hold; beside those that only
read less, random tokens in the same number. A difference counts if the exact sign test over the questions that only
one of them answered gives p < 0.01.

Bytes are those of ``cache.report()`` for all layers at the end of the prompt. Tables of rotary angles are left out:
they do not grow with the text, and beside 1,024 tokens of a small model they would hide what does.

A stopped run goes on where it was (results/accuracy.json); every method is measured on the same questions.

    python bench/accuracy.py                                # everything
    python bench/accuracy.py --methods snapkv 'snapkv | tokenselect' --samples 16
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accuracy_table import picture, render
from baselines import random_prompts, random_steps
from common import RESULTS, load_embedded, save
from embedded import TRAINED, within
from subjects import PROMPT, Subject, built, known

import kvote
from kvote.method import Method
from kvote.models import world
from kvote.spec import parse

TASKS = {"needle": "needle", "several": "multi_key", "pass key": "passkey"}
WAYS = ("prompt", "later")
_SEED = 3_000_000
_BATCH = 8
# Steps of the baseline at equal bytes: a page of 64 tokens.
_PAGE = 64
_COUNTED = ("dropped", "selections", "reused")


@dataclass(frozen=True)
class Exam:
    """Prompts [samples, n] of a task, of which the last ``asked`` tokens are the question, and the answers."""

    prompts: torch.Tensor
    asked: int
    answers: list[list[int]]


class Examiner:
    """The model, and the questions, the same for all."""

    def __init__(self, samples: int) -> None:
        # The model's own precision: what a method holds is compared with keys and values in bfloat16.
        self.model, self.tokenizer = load_embedded(torch.bfloat16)
        self.samples = samples
        self._exams: dict[str, Exam] = {}
        self._sizes: dict[tuple[int, str], int] = {}

    def exam(self, task: str) -> Exam:
        if task not in self._exams:
            self._exams[task] = self._made(task)
        return self._exams[task]

    def _made(self, task: str) -> Exam:
        made = [within(TASKS[task], TRAINED, _SEED + i) for i in range(self.samples)]
        questions = [self._ids(sample.questions[0].prompt) for sample in made]
        prompts = [self.tokenizer(s.document).input_ids + q for s, q in zip(made, questions, strict=True)]
        answers = [[*self._ids(sample.questions[0].answer), world.EOT] for sample in made]
        return Exam(torch.tensor(prompts), len(questions[0]), answers)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    @torch.no_grad()
    def sit(self, method: Method, task: str, way: str) -> dict[str, Any]:
        """Which questions are answered right ('1'), and what the cache held and did."""
        exam, right = self.exam(task), ""
        begin = time.perf_counter()
        told: list[dict[str, Any]] = []
        for start in range(0, len(exam.prompts), _BATCH):
            ids = exam.prompts[start : start + _BATCH]
            answers = exam.answers[start : start + _BATCH]
            said, what = self._answer(method, ids, exam.asked, max(map(len, answers)), way)
            right += "".join(str(int(a == s[: len(a)])) for s, a in zip(said, answers, strict=True))
            told.append(what)
        last = {name: told[-1][name] for name in ("held", "read")}
        counts = {name: sum(what[name] for what in told) for name in ("dropped", "selections", "reused")}
        nbytes = sum(what["bytes"] for what in told) / len(exam.prompts)
        seconds = round(time.perf_counter() - begin, 1)
        rotary = max(what["rotary"] for what in told)
        return {"right": right, "bytes": nbytes, "rotary": rotary, **last, **counts, "seconds": seconds}

    def _answer(
        self, method: Method, ids: torch.Tensor, asked: int, new: int, way: str
    ) -> tuple[list[list[int]], dict[str, Any]]:
        cache = kvote.Cache(self.model, method)
        first = ids.shape[1] - (0 if way == "prompt" else asked)
        if way != "prompt":
            cache.expect(first, question_follows=True)
        logits = self._feed(cache, ids[:, :first])
        held = cache.report().layers
        nbytes = sum(layer.nbytes for layer in held)
        rest = ids[:, first:]
        for piece in rest.split(1 if way == "steps" else rest.shape[1], dim=1) if rest.shape[1] else ():
            logits = self._feed(cache, piece)
        said = [logits.argmax(-1)]
        for _ in range(new - 1):
            said.append(self._feed(cache, said[-1][:, None]).argmax(-1))
        layers = cache.report().layers
        what: dict[str, Any] = {name: sum(getattr(layer, name) for layer in layers) for name in _COUNTED}
        what["bytes"], what["rotary"] = nbytes, cache.nbytes() - sum(layer.nbytes for layer in layers)
        what["held"] = sum(layer.tokens_held for layer in held) / len(held) / len(ids)
        # What decides for prompts alone leaves generated tokens everything.
        layers = held if method.read.offers.apart else layers
        what["read"] = sum(layer.tokens_read for layer in layers) / len(layers)
        return torch.stack(said, dim=1).tolist(), what

    def _feed(self, cache: kvote.Cache, ids: torch.Tensor) -> torch.Tensor:
        out = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1]

    @torch.no_grad()
    def _bytes_of(self, tokens: int, way: str) -> int:
        """What ``randomkeep`` holds of one prompt with a budget of so many tokens."""
        if (tokens, way) not in self._sizes:
            exam, cache = self.exam("needle"), kvote.Cache(self.model, f"randomkeep(budget={tokens})")
            first = exam.prompts.shape[1] - (0 if way == "prompt" else exam.asked)
            if way != "prompt":
                cache.expect(first, question_follows=True)
            self._feed(cache, exam.prompts[:1, :first])
            self._sizes[tokens, way] = sum(layer.nbytes for layer in cache.report().layers)
        return self._sizes[tokens, way]

    def tokens_in(self, nbytes: float, way: str) -> int:
        """The largest budget, in whole pages, with which ``randomkeep`` holds no more than that."""
        fitting = [n for n in range(_PAGE, TRAINED, _PAGE) if self._bytes_of(n, way) <= nbytes]
        return max(fitting, default=_PAGE)


@dataclass
class Results:
    """``points``: what was measured, by spec, way and task. ``rows``: which spec stands for a method at a budget, and
    which for chance beside it."""

    points: list[dict[str, Any]]
    rows: list[dict[str, Any]]

    def find(self, spec: str, way: str, task: str, samples: int) -> dict[str, Any] | None:
        """The point with that many questions, if there is one."""
        wanted = {"spec": spec, "way": way, "task": task}
        for point in self.points:
            if wanted.items() <= point.items() and len(point["right"]) == samples:
                return point
        return None

    def add(self, point: dict[str, Any]) -> None:
        self.points = _with(self.points, point, ("spec", "way", "task"))
        self.save()

    def row(self, name: str, share: float, way: str, spec: str, kind: str, chance: str | None) -> None:
        """Notes what a method is called and compared with."""
        row = {"name": name, "share": share, "way": way, "spec": spec, "kind": kind, "chance": chance}
        self.rows = _with(self.rows, row, ("name", "share", "way"))
        self.save()

    def save(self) -> None:
        save("accuracy", {"tokens": TRAINED, "rows": self.rows, "points": self.points})


def _with(held: list[dict[str, Any]], new: dict[str, Any], keys: tuple[str, ...]) -> list[dict[str, Any]]:
    """The list with a new entry, in place of the one with the same ``keys`` if there is one."""
    at = next((i for i, old in enumerate(held) if all(old[key] == new[key] for key in keys)), len(held))
    return [*held[:at], new, *held[at + 1 :]]


def measured(examiner: Examiner, results: Results, spec: str, method: Method, way: str) -> list[dict[str, Any]]:
    """The points of a method at one budget, of which those that are missing are measured now."""
    found = []
    for task in TASKS:
        point = results.find(spec, way, task, examiner.samples)
        if point is None:
            point = {"spec": spec, "way": way, "task": task, **examiner.sit(method, task, way)}
            results.add(point)
        found.append(point)
    return found


def check_acted(subject: Subject, points: list[dict[str, Any]], dense: list[dict[str, Any]]) -> None:
    """Ends the run if a method did nothing: its accuracy would be that of dense."""
    for point, whole in zip(points, dense, strict=True):
        for act in subject.acts:
            done = point["bytes"] < 0.95 * whole["bytes"] if act == "encoded" else point[act] > 0
            if not done:
                raise SystemExit(f"{point['spec']} did not act on {point['task']}: nothing {act}.")


def run(examiner: Examiner, results: Results, subjects: list[Subject], ways: list[str]) -> Iterator[str]:
    """Measures what is missing, and tells of each budget of each method."""
    for subject in subjects:
        for asked in ways:
            way = "steps" if subject.stepwise and asked == "prompt" else asked
            dense = measured(examiner, results, "dense", parse("dense"), way)
            results.row("dense", 1.0, way, "dense", "keep", None)
            for share, spec in subject.small.items():
                method = built(spec)
                if isinstance(method, str):
                    yield f"{subject.name}: left out, {method}"
                    continue
                points = measured(examiner, results, spec, method, way)
                check_acted(subject, points, dense)
                chance = against(examiner, results, subject, share, points, way)
                results.row(subject.name, share, way, spec, subject.kind, chance)
                shares = [f"{p['task']} {100 * p['right'].count('1') / len(p['right']):.0f}%" for p in points]
                told = f"{100 * points[0]['bytes'] / dense[0]['bytes']:.0f}% of the bytes, {', '.join(shares)}"
                yield f"{subject.name}, {way}, {spec}: {told}; {sum(p['seconds'] for p in points):.0f} s"


def against(
    examiner: Examiner, results: Results, subject: Subject, share: float, points: list[dict[str, Any]], way: str
) -> str | None:
    """The spec of chance beside a method, once that is measured."""
    if subject.name in ("dense", "randomkeep", "random"):
        return None
    if subject.kind == "keep":
        method = parse(f"randomkeep(budget={examiner.tokens_in(points[0]['bytes'], way)})")
    elif subject.block:
        method = random_prompts(round(sum(point["read"] for point in points) / len(points)), subject.block)
    elif subject.stepwise:
        method = random_steps(round(share * PROMPT), subject.whole)
    else:
        method = parse(next(s.small[share] for s in known(["random"])))
    measured(examiner, results, method.spec, method, way)
    return method.spec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", help="names as in bench/subjects.py; all by default")
    parser.add_argument("--ways", nargs="+", default=["prompt"], choices=WAYS, help="when the question is asked")
    parser.add_argument("--samples", type=int, default=48, help="questions per task")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    options = parser.parse_args()
    stored = RESULTS / "accuracy.json"
    held = {} if options.fresh or not stored.exists() else json.loads(stored.read_text())
    results = Results(held.get("points", []), held.get("rows", []))
    for line in run(Examiner(options.samples), results, known(options.methods), options.ways):
        print(line, flush=True)
    (RESULTS / "accuracy.md").write_text(render(results.rows, results.points) + "\n")
    picture(results.rows, results.points, RESULTS / "accuracy.png")
    print("\n" + render(results.rows, results.points))


if __name__ == "__main__":
    main()

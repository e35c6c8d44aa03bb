"""Which samples of a file are measured at which length: by the tokens that this model's tokenizer makes of them."""

import random
from dataclasses import replace

from kvote.errors import InputError
from kvote.eval.files import FileTask
from kvote.eval.plan import Plan
from kvote.eval.sample import Count, Sample

# No text worth asking about has more characters for a token; what is longer need not be counted to be too long.
_CHARACTERS = 40


def with_rows(plan: Plan, count: Count) -> tuple[Plan, list[str]]:
    """The plan with the samples of its files: at each length those that have at most so many tokens, and more than the
    next smaller length; and a sentence for each length at which there are fewer than asked for. Raises InputError if a
    file has none at any length."""
    chosen: list[tuple[str, int, tuple[int, ...]]] = []
    missing: list[str] = []
    for task in plan.file_tasks().values():
        if not isinstance(task.held, tuple):
            continue
        rows = _rows(task, task.held, plan, count)
        if not any(rows.values()):
            raise InputError(
                f"{task.name} holds no sample of at most {max(plan.lengths):,} tokens; give larger --lengths."
            )
        for length, held in rows.items():
            if len(held) < plan.samples:
                missing.append(f"{task.name} holds {len(held)} of {plan.samples} samples for {length:,} tokens.")
            chosen.append((task.name, length, tuple(held)))
    return replace(plan, chosen=tuple(chosen)), missing


def _rows(task: FileTask, samples: tuple[Sample, ...], plan: Plan, count: Count) -> dict[int, list[int]]:
    """Numbers of samples by length, in an order that the seed decides."""
    order = list(range(len(samples)))
    random.Random(f"{plan.seed} {task.name}").shuffle(order)
    rows: dict[int, list[int]] = {length: [] for length in sorted(set(plan.lengths))}
    for row in order:
        if all(len(held) >= plan.samples for held in rows.values()):
            break
        document = samples[row].document
        if len(document) > _CHARACTERS * max(rows):
            continue
        tokens = count(document)
        length = next((length for length in rows if tokens <= length), None)
        if length is not None and len(rows[length]) < plan.samples:
            rows[length].append(row)
    return rows

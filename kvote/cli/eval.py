"""``kvote eval``: measure methods on a model, sample by sample, into a folder that a second run completes."""

import argparse
import os
from contextlib import nullcontext
from functools import partial

from kvote.cli.load import load, names_embedded, quiet
from kvote.cli.plain import as_json, plain, warn
from kvote.cli.progress import progress
from kvote.errors import InputError
from kvote.eval.choosing import with_rows
from kvote.eval.estimate import estimate, speed_of
from kvote.eval.folder import Record, open_folder
from kvote.eval.heat import write_heat
from kvote.eval.machines import Machines, cluster, identity_of
from kvote.eval.manifest import manifest_of
from kvote.eval.plan import Plan
from kvote.eval.report import write_report
from kvote.eval.run import pending
from kvote.eval.run import run as run_plan
from kvote.eval.subject import Subject
from kvote.eval.tasks import PROSE
from kvote.eval.template import template_of
from kvote.models.presets import with_presets
from kvote.prompt import ends_of

# What every method is seen beside. Those of the embedded model fit its 1,024 trained tokens, by presets or in words.
BASELINES = (
    "dense",
    "streamingllm",
    "random",
    "randomkeep",
    "randomkeep(protect=0.1, evict_generated=True)",
    "oracle",
    "tokenselect",
    "tokenselect(head_map='paper')",
    "tokenselect(published=True)",
)
_EMBEDDED_BASELINES = (
    "dense",
    "streamingllm",
    "random",
    "randomkeep(budget=784)",
    "randomkeep(budget=784, protect=0.1, evict_generated=True)",
    "oracle(top_k=784)",
    "tokenselect",
    "tokenselect(head_map='paper', top_k=512, sinks=16, window=256, chunk=128)",
    "tokenselect(published=True, top_k=512, sinks=16, window=256, chunk=128)",
)
_LENGTHS, _EMBEDDED_LENGTHS = (4096,), (2048,)
_DAY, _HOUR, _MINUTE = 86_400, 3_600, 60


def run(args: argparse.Namespace) -> None:
    """Prints the estimate, measures what is missing in ``--out``, and writes the page about it."""
    if args.report is not None:
        print(plain(str(write_report(args.report))))
        return
    if args.out is None:
        raise InputError("kvote eval needs --out DIR for what it measures, or --report DIR of what was measured.")
    plan = _plan(args)
    plan.check()
    with nullcontext() if args.ray is None else cluster(args.ray) as machines:
        _measure(args, plan, machines)


def _measure(args: argparse.Namespace, plan: Plan, machines: Machines | None) -> None:
    model = args.model
    if machines is not None and model is not None and os.path.exists(os.path.expanduser(model)):
        # Workers run elsewhere.
        model = os.path.abspath(os.path.expanduser(model))
    opened = partial(open_subject, model, raw=args.raw, dtype=args.dtype)
    subject = opened()
    workers = args.workers or (1 if machines is None else machines.count)
    elsewhere = None if machines is None else partial(machines.records, identity=identity_of(plan, subject))
    plan, missing = with_rows(plan, subject.count)
    for sentence in missing:
        warn(sentence)
    todo = pending(plan, args.out)
    whole = sum(len(names) for _, names in todo)
    open_folder(args.out, manifest_of(plan, subject, workers))
    with quiet(bars=False):
        seconds = estimate(todo, speed_of(subject), args.out, workers) if todo else 0.0
        warn(f"{whole:,} records to measure with {workers} worker(s), about {_told(seconds)}")
        held = (lambda: subject) if workers == 1 and machines is None else opened
        refused: dict[str, str] = {}
        with progress("records") as bar:
            task = bar.add_task("eval", total=whole)

            def tell(record: Record) -> None:
                bar.update(
                    task, advance=1, description=plain(f"{record['task']} {record['length']:,} {record['name']}")
                )
                if "refused" in record and record["name"] not in refused:
                    refused[record["name"]] = record["refused"]
                    warn(f"{record['name']} is refused: {record['refused']}")

            count = run_plan(plan, args.out, held, workers=workers, tell=tell, elsewhere=elsewhere)
        unseen = write_heat(subject, plan, args.out)
        if unseen:
            warn(f"No votes are shown: {unseen}")
    page = str(write_report(args.out))
    if args.json:
        print(as_json({"folder": str(args.out), "measured": count, "report": page, "refused": refused}))
    else:
        print(f"{count:,} records measured: {plain(str(args.out))}\n{plain(page)}")


def _plan(args: argparse.Namespace) -> Plan:
    embedded = names_embedded(args.model)
    baselines = _EMBEDDED_BASELINES if embedded else BASELINES
    asked = list(args.methods or ())
    methods = list(dict.fromkeys(["dense", *asked, *(() if args.no_baselines else baselines)]))
    if embedded:
        methods = [with_presets(name) if name != "dense" else name for name in methods]
    return Plan(
        tasks=tuple(args.tasks or (() if args.files else ("world",) if embedded else PROSE)),
        lengths=tuple(args.lengths or (_EMBEDDED_LENGTHS if embedded else _LENGTHS)),
        samples=args.samples,
        methods=tuple(dict.fromkeys(methods)),
        budgets=tuple(args.budgets or ()),
        seed=args.seed,
        files=tuple(args.files or ()),
        question_first=args.question_first,
    )


def open_subject(name: str | None, *, raw: bool, dtype: str | None) -> Subject:
    """The model and its tokenizer. Raises InputError where that fails."""
    loaded = load(name, dtype=dtype)
    model, tokenizer, embedded = loaded.model, loaded.tokenizer, loaded.is_embedded
    template = template_of(tokenizer, raw=raw, plain=embedded)
    return Subject(name or "embedded", model, tokenizer, template, embedded, ends_of(model, tokenizer))


def _told(seconds: float) -> str:
    for unit, name in ((_DAY, "days"), (_HOUR, "hours"), (_MINUTE, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.0f} seconds"

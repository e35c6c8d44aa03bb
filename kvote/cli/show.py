"""Tables for people, one JSON object for programs."""

from dataclasses import asdict
from textwrap import indent
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from kvote.cli.outcome import Outcome, Run
from kvote.cli.plain import as_json, one_line, plain

_ANSWER_SHOWN = 24
_PIPE_WIDTH = 80
_INDENT = 10


class _Table(Table):
    def add_row(self, *cells: Any, **kwargs: Any) -> None:
        """Cells of plain text."""
        super().add_row(*(plain(cell) if isinstance(cell, str) else cell for cell in cells), **kwargs)


class _Console(Console):
    def print(self, *objects: Any, **kwargs: Any) -> None:
        """Plain text, or what rich made of it."""
        super().print(*(plain(each) if isinstance(each, str) else each for each in objects), **kwargs)

    def on_broken_pipe(self) -> None:
        """Leaves it to ``main``, where rich would end the program."""
        raise BrokenPipeError


def plain_table(**kwargs: Any) -> Table:
    """A table without a frame."""
    return _Table(box=box.SIMPLE_HEAD, pad_edge=False, **kwargs)


def plain_console() -> Console:
    """Standard output without colours of its own; wide enough for every table where no terminal sets the width."""
    console = _Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    return console


def show(outcome: Outcome, *, json: bool) -> None:
    """Prints the answer of the first method and a table of all."""
    if json:
        print(as_json(asdict(outcome)))
        return
    console = plain_console()
    for name, value in _head(outcome):
        # Further lines of an answer stand below its first, so that none of them passes for another fact.
        console.print(f"{name:{_INDENT}}{indent(value, ' ' * _INDENT)[_INDENT:]}", soft_wrap=True)
    console.print(_runs(outcome))


def _head(outcome: Outcome) -> list[tuple[str, str]]:
    size = f"{outcome.tokens:,} tokens"
    if outcome.trained_tokens and outcome.tokens > outcome.trained_tokens:
        times = outcome.tokens / outcome.trained_tokens
        factor = f"{times:,.0f}" if times >= 10 else f"{times:.2f}"
        size += f", {factor} times the {outcome.trained_tokens:,} that the model was made for"
    verdict = "" if outcome.right is None else " (right)" if outcome.right else f" (wrong: it is {outcome.expected})"
    return [
        ("Model", one_line(outcome.model)),
        ("Document", f"{one_line(outcome.document)}, {size}"),
        ("Question", " ".join(outcome.question.split())),
        ("Answer", outcome.answer + verdict),
    ]


def _runs(outcome: Outcome) -> Table:
    table = plain_table()
    judged = outcome.expected is not None
    table.add_column("method", overflow="fold")
    table.add_column("answer", max_width=_ANSWER_SHOWN)
    if judged:
        table.add_column("", no_wrap=True)
    for name in ("prefill\ns", "first\ntoken s", "ms per\ntoken", "tokens\nread", "KV held\nMiB"):
        table.add_column(name, justify="right", no_wrap=True)
    for run in outcome.runs:
        verdict = [] if not judged else ["right" if run.right else "wrong"]
        table.add_row(run.name, _short(run.answer), *verdict, *_figures(run))
    return table


def _figures(run: Run) -> list[str]:
    return [
        f"{run.prefill_seconds:.1f}",
        f"{run.first_token_seconds:.2f}",
        "-" if run.ms_per_token is None else f"{run.ms_per_token:.1f}",
        f"{run.tokens_read:,}",
        f"{run.kv_bytes / 2**20:,.1f}",
    ]


def _short(answer: str) -> str:
    line = " ".join(answer.split())
    return line if len(line) <= _ANSWER_SHOWN else line[: _ANSWER_SHOWN - 2].rstrip() + " …"

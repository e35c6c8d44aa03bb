"""Tables for people, one JSON object for programs."""

from collections.abc import Callable
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


class Page:
    """The output of ``kvote ask``: all of it, with ``--quiet`` the answers alone, with ``--json`` one object. An answer
    may come in pieces before the rest is known."""

    def __init__(self, outcomes: list[Outcome], *, json: bool, quiet: bool) -> None:
        self._outcomes, self._json, self._quiet = outcomes, json, quiet
        self._console = plain_console()
        self._streamed: list[Outcome] = []

    def stream(self, outcome: Outcome) -> Callable[[str], None]:
        """Prints what stands in front of the answer, and gives what prints a piece of it."""
        self._end_stream()
        self._streamed.append(outcome)
        if not self._quiet:
            self._before(outcome, first=len(self._streamed) == 1)
            self._write(f"{'Answer':{_INDENT}}")
        return lambda piece: self._write(piece if self._quiet else piece.replace("\n", "\n" + " " * _INDENT))

    def show(self) -> None:
        """Prints what has not been printed yet."""
        if self._json:
            each = [outcome.as_dict() for outcome in self._outcomes]
            print(as_json(each[0] if len(each) == 1 else {"questions": each}))
            return
        self._end_stream()
        for i, outcome in enumerate(self._outcomes[len(self._streamed) :], len(self._streamed)):
            answer = outcome.runs[0].answer
            if self._quiet:
                self._console.print(answer, soft_wrap=True)
                continue
            self._before(outcome, first=i == 0)
            # Further lines of an answer stand below its first, so that none of them passes for another fact.
            answer = indent(answer + _verdict(outcome), " " * _INDENT)[_INDENT:]
            self._console.print(f"{'Answer':{_INDENT}}{answer}", soft_wrap=True)
        if not self._quiet:
            self._console.print(_runs(self._outcomes))

    def _before(self, outcome: Outcome, *, first: bool) -> None:
        for name, value in (_head(outcome) if first else []) + [("Question", " ".join(outcome.question.split()))]:
            self._console.print(f"{name:{_INDENT}}{value}", soft_wrap=True)

    def _end_stream(self) -> None:
        if self._streamed:
            outcome = self._streamed[-1]
            self._write(("" if self._quiet or not outcome.runs else _verdict(outcome)) + "\n")

    def _write(self, text: str) -> None:
        self._console.file.write(plain(text))
        self._console.file.flush()


def _verdict(outcome: Outcome) -> str:
    right = outcome.runs[0].right
    return "" if right is None else " (right)" if right else f" (wrong: it is {outcome.expected})"


def _head(outcome: Outcome) -> list[tuple[str, str]]:
    size = f"{outcome.tokens:,} tokens"
    if outcome.trained_tokens and outcome.tokens > outcome.trained_tokens:
        times = outcome.tokens / outcome.trained_tokens
        factor = f"{times:,.0f}" if times >= 10 else f"{times:.2f}"
        size += f", {factor} times the {outcome.trained_tokens:,} that the model was made for"
    return [("Model", one_line(outcome.model)), ("Document", f"{one_line(outcome.document)}, {size}")]


def _runs(outcomes: list[Outcome]) -> Table:
    table = plain_table()
    judged, several = outcomes[0].expected is not None, len(outcomes) > 1
    if several:
        table.add_column("question", justify="right")
    table.add_column("method", overflow="fold")
    table.add_column("answer", max_width=_ANSWER_SHOWN)
    if judged:
        table.add_column("", no_wrap=True)
    for name in ("prefill\ns", "first\ntoken s", "ms per\ntoken", "tokens\nread", "KV held\nMiB"):
        table.add_column(name, justify="right", no_wrap=True)
    for number, outcome in enumerate(outcomes, 1):
        for run in outcome.runs:
            verdict = [] if not judged else ["right" if run.right else "wrong"]
            table.add_row(*[str(number)] * several, run.name, _short(run.answer), *verdict, *_figures(run))
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

"""``kvote methods``: what there is in a line each, and everything about one: parameters, partners, measurements."""

import argparse
import re
from dataclasses import asdict
from textwrap import shorten
from typing import Any

from kvote import plugins
from kvote.cli.about import about
from kvote.cli.figures import figures
from kvote.cli.page import page
from kvote.cli.plain import as_json, warn
from kvote.cli.show import plain_console, plain_table
from kvote.errors import InputError
from kvote.method import METHODS, Published
from kvote.pairs import Pair, pairs
from kvote.spec import find

_FIELDS = ("name", "rooms", "summary", "source", "needs", "package")
# Characters of a summary that leave a line of 80 whole.
_SUMMARY = 44
# The longest name of kvote's own.
_NAME = 17


def run(args: argparse.Namespace) -> None:
    """Prints every registered method by name, or the page of one."""
    if args.name is not None and args.table:
        raise InputError("--table is about all methods; leave it out or leave out the name.")
    if args.name is not None:
        _one(find(args.name), json=args.json)
        return
    if args.table:
        print(page(), end="")
        return
    for problem in plugins.load_all():
        warn(problem)
    if args.json:
        joined = [{"name": name, **_measured(name)} for name in figures().names if name not in METHODS]
        rows = [{**_row(METHODS[name]), **_measured(name)} for name in sorted(METHODS)]
        print(as_json({"methods": rows, "variants": joined, "measured": figures().origin}))
        return
    table = plain_table()
    for column in ("method", "decides", "what it does"):
        first = column == "method"
        table.add_column(
            column, no_wrap=not first, overflow="fold" if first else "ellipsis", min_width=_NAME if first else None
        )
    for name in sorted(METHODS):
        made = METHODS[name]
        table.add_row(name, made.rooms, shorten(made.summary, _SUMMARY, placeholder=" …"))
    console = plain_console()
    console.print(table)
    console.print("kvote methods NAME tells all about one: parameters, source, what it composes with.")


def _row(made: Published) -> dict[str, str | None]:
    return {field: getattr(made, field) for field in _FIELDS}


def _measured(name: str) -> dict[str, object]:
    return {"accuracy": figures().accuracy(name), "steps": figures().steps(name)}


def _one(made: Published, *, json: bool) -> None:
    told = about(made)
    partners = [pair for pair in pairs() if made.name in (pair.left, pair.right)]
    variants = [name for name in figures().names if name != made.name and made.name in _parts(name)]
    if json:
        found: dict[str, Any] = {**_row(made), **asdict(told), **_measured(made.name)}
        found["composes"] = [
            {"method": _other(pair, made.name), "given": pair.given, "reason": pair.reason} for pair in partners
        ]
        found["variants"] = [{"name": name, **_measured(name)} for name in variants]
        print(as_json({**found, "measured": figures().origin}))
        return
    console = plain_console()
    console.print(f"{made.name}: {made.summary}\n")
    console.print(f"Decides  {made.rooms}\nSource   {made.source}\nNeeds    {made.needs}")
    if made.package is not None:
        console.print(f"Package  {made.package}")
    if told.parameters:
        table = plain_table()
        for column in ("parameter", "default", "meaning"):
            table.add_column(column, overflow="fold")
        for parameter in told.parameters:
            table.add_row(parameter.name, parameter.default, parameter.meaning)
        console.print(table)
    for paragraph in told.paragraphs:
        console.print(f"\n{paragraph}")
    console.print("\nComposes with (a | b):")
    for line in _composes(partners, made.name):
        console.print(f"- {line}")
    lines = [*figures().told(made.name), *(f"{name}: {line}" for name in variants for line in figures().told(name))]
    if lines:
        console.print("\nMeasured:")
        for line in lines:
            console.print(f"- {line}")
        for line in figures().origin:
            console.print(f"- with {line}")


def _composes(partners: list[Pair], name: str) -> list[str]:
    """Partners that ask for the same parameters, or are refused for the same reason, in a line."""
    said: dict[str, list[str]] = {}
    for pair in sorted(partners, key=lambda pair: (pair.reason is not None, len(pair.given))):
        how = f"with {', '.join(pair.given)}: " if pair.given else "with the defaults: "
        how = f"not, since {pair.reason}: " if pair.reason is not None else how
        said.setdefault(how, []).append(_other(pair, name))
    return [how + ", ".join(sorted(names)) for how, names in said.items()]


def _other(pair: Pair, name: str) -> str:
    return pair.right if pair.left == name else pair.left


def _parts(variant: str) -> list[str]:
    """Methods that take part in a variant such as ``kivi | tokenselect`` or ``snapkv, pooled``."""
    return [re.split(r"[(,]", part)[0].strip() for part in variant.split("|")]

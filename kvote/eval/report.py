"""A run as one HTML page that needs nothing else: tables with intervals, charts, and answers to look at."""

import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from kvote.errors import InputError
from kvote.eval.chart import COLOURS, Point, chart
from kvote.eval.folder import Record, read_manifest, read_records
from kvote.eval.heat import read_heat
from kvote.eval.intervals import Interval
from kvote.eval.shades import shaded
from kvote.eval.shades import style as shades
from kvote.eval.table import Row, by_question, is_likelihood, rows_of
from kvote.files import named, write_whole

PAGE = "report.html"
_SHOWN = 12
# Fewer samples say nothing about their spread.
_ENOUGH = 5
# What the questions of a task are called, where each is of another kind.
_APART = {"turns": "turn", "chains": "facts"}
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1240px;margin:2rem auto;padding:0 1rem;color:#111;background:#fff}
table{border-collapse:collapse;margin:.5rem 0 1.5rem;font-size:12.5px}
td,th{padding:.25rem .5rem;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}
th{white-space:normal;vertical-align:bottom}
td:first-child,th:first-child{text-align:left;font-family:monospace}
svg{width:380px;max-width:100%;font:11px system-ui,sans-serif;margin:0 1rem 1rem 0}.grid{stroke:#e4e4e4}
.wide{overflow-x:auto}
.title{font-weight:600;font-size:13px}.note{color:#555}
.legend span{display:inline-block;margin-right:1.2rem}
.legend i{display:inline-block;width:.8rem;height:.8rem;margin-right:.35rem;vertical-align:-1px}
.beats{color:#00664a;font-weight:600}.loses{color:#a33b00}pre{white-space:pre-wrap;font-size:12px}
"""


def write_report(folder: str | Path) -> Path:
    """Writes ``report.html`` into the folder and returns its path. Raises InputError if nothing was measured there."""
    place = Path(folder)
    manifest, records = read_manifest(place), list(read_records(place).values())
    if not records:
        raise InputError(f"{named(place)} holds no samples yet; run kvote eval with --out first.")
    write_whole(place / PAGE, page(manifest, records, read_heat(place)))
    return place / PAGE


def page(manifest: Record, records: list[Record], heat: Sequence[Record] = ()) -> str:
    """The page's HTML; ``heat``: texts with the votes on their tokens."""
    rows = rows_of(records)
    names = list(dict.fromkeys(row.name for row in rows))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    legend = "".join(f'<span><i style="background:{colours[name]}"></i>{escape(name)}</span>' for name in names)
    tasks = list(dict.fromkeys(row.task for row in rows))
    parts = [
        '<!doctype html><html lang="en"><meta charset="utf-8">',
        f"<title>kvote eval: {escape(str(manifest['model']))}</title><style>{_STYLE}{shades()}</style>",
        f"<h1>{escape(str(manifest['model']))}</h1>{_about(manifest, records)}",
        f'<p class="legend">{legend}</p>',
    ]
    for task in tasks:
        parts += [_task(task, [row for row in rows if row.task == task], colours), _questions(task, records)]
    parts += [_heat(heat), _examples(records), _manifest(manifest), "</html>"]
    return "\n".join(parts)


def _about(manifest: Record, records: list[Record]) -> str:
    trained = manifest.get("trained_tokens")
    beyond = f" It was trained on texts of up to {trained:,} tokens." if isinstance(trained, int) else ""
    return (
        f'<p class="note">{len(records):,} records, {escape(str(manifest["dtype"]))}, questions asked '
        f"{escape(str(manifest['asked']))}.{beyond} Brackets hold 95% bootstrap intervals over samples; differences "
        f"to dense attention are paired by sample, and coloured where their interval excludes zero (from {_ENOUGH} "
        "samples on). Bytes are held after the document was read, tokens are read by one query in the layer that reads "
        "most.</p>"
    )


def _task(task: str, rows: list[Row], colours: dict[str, str]) -> str:
    label = "nats per token (less is better)" if is_likelihood(task) else "right answers"
    zero = not is_likelihood(task)
    parts = [f"<h2>{escape(task)}</h2>"]
    parts += [
        f"<h3>{length:,} tokens</h3>{_table([row for row in rows if row.length == length], task)}"
        for length in sorted({row.length for row in rows})
    ]
    names = list(dict.fromkeys(row.name for row in rows))

    def series(x: str) -> list[tuple[str, str, list[Point]]]:
        return [
            (
                name,
                colours[name],
                [
                    Point(getattr(row, x), row.value.mean, row.value.low, row.value.high)
                    for row in rows
                    if row.name == name and row.value is not None
                ],
            )
            for name in names
        ]

    parts.append(chart(f"{task} by length", "tokens of the document", label, series("length"), from_zero=zero))
    parts.append(
        chart(f"{task} by bytes held", "MiB held once the document was read", label, series("mib"), from_zero=zero)
    )
    parts.append(
        chart(f"{task} by tokens read", "tokens read by a query", label, series("tokens_read"), from_zero=zero)
    )
    return "".join(parts)


def _questions(task: str, records: list[Record]) -> str:
    """Right answers by the question's number, of tasks whose questions differ in kind."""
    if task not in _APART:
        return ""
    told, count = by_question(records, task), 0
    body = ""
    for (length, name), shares in told.items():
        count = max(count, len(shares))
        body += f"<tr><td>{escape(name)}</td><td>{length:,}</td>{''.join(f'<td>{v:.2f}</td>' for v in shares)}</tr>"
    head = "".join(f"<th>{_APART[task]} {i + 1}</th>" for i in range(count))
    return f'<div class="wide"><table><tr><th>method</th><th>tokens</th>{head}</tr>{body}</table></div>' if told else ""


def _heat(heat: Sequence[Record]) -> str:
    if not heat:
        return ""
    about = (
        "What the heads vote for, by the rule of TokenSelect, while the model reads everything and answers: the last "
        "token of the question and those of the answer, averaged over layers. Sinks at the start and the window at the "
        "end are read without a vote."
    )
    return f'<h2>Votes</h2><p class="note">{about}</p>{"".join(shaded(one) for one in heat)}'


def _table(rows: list[Row], task: str) -> str:
    likelihood = is_likelihood(task)
    head = ["method", "nats per token" if likelihood else "right", "less dense", "samples", "MiB held", "tokens read"]
    head += ["ms per token", "first other token"] + (
        ["KL median", "KL p99", "KL max", "perplexity"] if likelihood else []
    )
    body = []
    for row in rows:
        if row.value is None:
            body.append(
                f'<tr><td>{escape(row.name)}</td><td colspan="{len(head) - 1}">{escape(str(row.refused))}</td></tr>'
            )
            continue
        cells = [_with(row.value), _beside(row.beside, likelihood), str(row.value.count), f"{row.nbytes / 2**20:.1f}"]
        cells += [f"{row.tokens_read:,.0f}", _number(row.ms_per_token, ".1f")]
        cells += ["-" if row.diverges is None else f"{row.diverges:g}"]
        if likelihood:
            tail = row.tail
            cells += ["-"] * 3 if tail is None else [f"{v:.3g}" for v in (tail.median, tail.p99, tail.largest)]
            cells += [f"{math.exp(row.value.mean):,.2f}"]
        body.append(f"<tr><td>{escape(row.name)}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    header = "".join(f"<th>{name}</th>" for name in head)
    return f'<div class="wide"><table><thead><tr>{header}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _with(value: Interval) -> str:
    if value.count < _ENOUGH:
        return f"{value.mean:.3g}"
    return f"{value.mean:.3g} [{value.low:.3g}, {value.high:.3g}]"


def _beside(value: Interval | None, likelihood: bool) -> str:
    if value is None:
        return "-"
    if value.count < _ENOUGH:
        return f"{round(value.mean, 6):+.3g}"
    better, worse = (value.high < 0, value.low > 0) if likelihood else (value.low > 0, value.high < 0)
    kind = "beats" if better else "loses" if worse else "same"
    return f'<span class="{kind}">{value.mean:+.3g} [{value.low:+.3g}, {value.high:+.3g}]</span>'


def _number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "-"


def _examples(records: list[Record]) -> str:
    """The first sample of each task with every method's answer to its first question."""
    lines = []
    asked = [record for record in records if record.get("answers") and record["index"] == 0]
    for task in list(dict.fromkeys(record["task"] for record in asked))[:_SHOWN]:
        held = [record for record in asked if record["task"] == task]
        lines.append(f"{task}: {held[0]['questions'][0]} ({', '.join(held[0]['expected'][0])})")
        lines += [f"    {r['length']:>6} {r['name']}: {' '.join(r['answers'][0].split())}" for r in held]
    return f"<h2>Answers</h2><pre>{escape(chr(10).join(lines))}</pre>" if lines else ""


def _manifest(manifest: Record) -> str:
    told = escape(json.dumps(manifest, indent=1, ensure_ascii=False))
    return f"<h2>Manifest</h2><details><summary>What was measured, and how</summary><pre>{told}</pre></details>"

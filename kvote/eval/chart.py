"""Charts as SVG, drawn without any library, so that the report needs none."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 380, 250, 52, 14, 30, 42
# Between labels of the axis.
_APART = 48
# Steps of the other axis at most.
_TICKS = 5
# Told apart also by those who see red and green alike (Okabe & Ito).
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")


@dataclass(frozen=True)
class Point:
    """A value ``y`` with its interval at ``x``."""

    x: float
    y: float
    low: float
    high: float


Series = Sequence[tuple[str, str, Sequence[Point]]]


def chart(title: str, x_label: str, y_label: str, series: Series, *, from_zero: bool = True) -> str:
    """An SVG of series (name, colour, points), joined by lines; x is logarithmic. Empty if there are no points."""
    points = [point for _, _, held in series for point in held if point.x > 0 and math.isfinite(point.y)]
    if not points:
        return ""
    xs, ys = [math.log2(point.x) for point in points], [v for point in points for v in (point.low, point.high)]
    left, right = min(xs) - 0.2, max(xs) + 0.2
    # Shares begin at zero; of likelihoods the differences are what one looks for.
    marks = ticks(0.0 if from_zero else min(ys), max(ys))
    bottom, top = marks[0], marks[-1] + 0.04 * (marks[-1] - marks[0])

    def at(x: float, y: float) -> tuple[float, float]:
        across = (math.log2(x) - left) / (right - left) * (_WIDTH - _LEFT - _RIGHT)
        return _LEFT + across, _HEIGHT - _BOTTOM - (y - bottom) / (top - bottom) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">',
        f'<text x="{_LEFT}" y="16" class="title">{escape(title)}</text>',
    ]
    for value in marks:
        _, y = at(points[0].x, value)
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    last = -float(_APART)
    for tick in sorted({point.x for point in points}):
        x, y = at(tick, bottom)
        if x - last < _APART:
            continue
        last = x
        parts.append(f'<text x="{x:.1f}" y="{y + 16:.1f}" text-anchor="middle">{_short(tick)}</text>')
    parts.append(f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(
        f'<text transform="translate(12 {_HEIGHT / 2}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
    )
    for name, colour, held in series:
        placed = sorted((point for point in held if point.x > 0 and math.isfinite(point.y)), key=lambda p: p.x)
        line = " ".join("{:.1f},{:.1f}".format(*at(point.x, point.y)) for point in placed)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        for point in placed:
            (x, y), (_, low), (_, high) = (at(point.x, value) for value in (point.y, point.low, point.high))
            parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}" stroke="{colour}"/>')
            told = f"{name}: {point.y:.3g} ({point.low:.3g} to {point.high:.3g})"
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"><title>{escape(told)}</title></circle>'
            )
    return "".join([*parts, "</svg>"])


def ticks(low: float, high: float) -> list[float]:
    """Round numbers, three to six of them, of which the first is at most ``low`` and the last at least ``high``."""
    spread = max(high - low, 1e-3)
    step = 10.0 ** math.floor(math.log10(spread / _TICKS))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if spread / (factor * step) <= _TICKS)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * i, 10) for i in range(first, max(last, first + 1) + 1)]


def _short(value: float) -> str:
    for unit, name in ((2**20, "Mi"), (2**10, "Ki")):
        if value >= unit and value % unit == 0:
            return f"{value / unit:.0f}{name}"
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"

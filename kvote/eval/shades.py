"""A text whose tokens are shaded by their votes, as HTML."""

from html import escape
from itertools import groupby

from kvote.eval.folder import Record

_LEVELS = 8


def shaded(heat: Record) -> str:
    """The text with its question above it; neighbours of one shade are one element."""
    votes = heat["votes"]
    most = max(votes, default=0.0)
    body = []
    told = zip(heat["pieces"], votes, strict=True)
    for level, some in groupby(told, key=lambda one: level_of(one[1], most)):
        held = list(some)
        text = escape("".join(piece for piece, _ in held))
        share = 100 * sum(vote for _, vote in held) / max(1e-9, sum(votes))
        body.append(text if level == 0 else f'<mark class="v{level}" title="{share:.2g}% of the votes">{text}</mark>')
    asked = f"{heat['question']} ({', '.join(heat['expected'][:3])})"
    about = f"{escape(heat['method'])}; {scale(most, sum(votes))}"
    head = f"<h3>{escape(heat['task'])}, {heat['length']:,} tokens: {escape(asked)}</h3>"
    return f'{head}<p class="note">{about}</p><div class="heat">{"".join(body)}</div>'


def level_of(vote: float, most: float) -> int:
    """From 0 to 8, by the square root: a token with a quarter of the most votes is half as dark."""
    return 0 if most <= 0 else round(_LEVELS * (max(0.0, vote) / most) ** 0.5)


def scale(most: float, cast: float) -> str:
    """What the shades mean."""
    marks = "".join(f'<mark class="v{level}">&nbsp;&nbsp;</mark>' for level in range(1, _LEVELS + 1))
    return f"from no vote {marks} to {most:.2g} of the {cast:.0f} votes that a layer's heads cast"


def style() -> str:
    """Rules for the shades."""
    rules = "".join(f".v{i}{{background:rgba(213,94,0,{0.9 * i / _LEVELS:.2f})}}" for i in range(1, _LEVELS + 1))
    return f".heat{{white-space:pre-wrap;font-size:12px;line-height:1.6;max-height:28rem;overflow:auto;\
border:1px solid #ddd;border-radius:6px;padding:.6rem}}mark{{color:inherit;background:none;border-radius:2px}}{rules}"

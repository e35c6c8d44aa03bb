"""Every method that is measured: which spec stands for which budget, and what shows that it acted.

``{channels}``, ``{rotated}``, ``{razor}`` and ``{duo}`` in a spec are calibrations: files that ``kvote calibrate``
writes for the embedded model, or made-up ones in the geometry of a large one. What this kvote does not know is left
out.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from common import RESULTS

from kvote.errors import KvoteError
from kvote.method import METHODS, Method
from kvote.spec import parse

SHARES = (0.5, 0.25, 0.125, 0.0625)
# Prompts of the embedded model, question included, are about this long.
PROMPT = 1000
# Layers of which so many decide (choose) and the rest only read what they chose.
Weights = tuple[float, ...]


@dataclass(frozen=True)
class Subject:
    """``small``: by share of the budget, the spec on the embedded model. ``large``: the one in the 8B geometry.

    ``acts``: the counters of the report (or ``encoded``: fewer bytes than dense for every token) that show that it did
    something. ``kind``: what random is compared with it, 'keep' at equal bytes, 'read' at equal tokens read.
    ``stepwise``: it changes nothing but how generated tokens read, so questions are fed token by token.
    ``weights``: shares of the layers of a model that do what the layers measured do, where they differ. ``longest``: in
    longer texts, encoding takes so many minutes that it is timed only if asked for by name.
    """

    name: str
    small: dict[float, str]
    large: str
    acts: tuple[str, ...] = ("dropped",)
    kind: Literal["keep", "read"] = "keep"
    stepwise: bool = False
    weights: Weights = (1.0,)
    longest: int | None = None
    # Rows of a block in prompts, if it changes nothing but how they read.
    block: int = 0
    # Layers of the embedded model that it leaves as they are, if it is stepwise.
    whole: int = 2

    def at(self, tokens: int) -> str:
        """``large`` for a text of so many tokens."""
        return self.large.replace("{quarter}", str(tokens // 4 - 4))

    @property
    def names(self) -> list[str]:
        """The methods that it is made of."""
        return re.findall(r"([a-z]\w*)(?=\(|\s*\||\s*$)", re.sub(r"\([^)]*\)", "", self.large))


def dial(spec: Callable[[float, int], str]) -> dict[float, str]:
    """By share of the budget, the spec for it and for so many tokens of a prompt."""
    return {share: spec(share, round(share * PROMPT)) for share in SHARES}


def selection(tokens: int) -> str:
    """Sinks, winners and a window, so many tokens together."""
    window = tokens // 4
    return f"top_k={tokens - window - 4}, sinks=4, window={window}, chunk={max(16, window // 2)}"


_LARGE_READ = "top_k=2048, sinks=128, window=512, theta=2.0"
_SMALL_READ = "top_k=128, sinks=4, window=64, chunk=32, theta=2.0"
_FOUR_BITS = "kivi(bits=4, residual=32)"

SUBJECTS: tuple[Subject, ...] = (
    Subject("dense", {1.0: "dense"}, "dense", acts=()),
    Subject("randomkeep", dial(lambda s, n: f"randomkeep(budget={s})"), "randomkeep(budget=0.25)"),
    Subject(
        "streamingllm",
        dial(lambda s, n: f"streamingllm(sinks=4, window={n - 4})"),
        "streamingllm(sinks=4, window={quarter})",
    ),
    Subject("h2o", dial(lambda s, n: f"h2o(budget={s})"), "h2o(budget=0.25)"),
    Subject("keyformer", dial(lambda s, n: f"keyformer(budget={s})"), "keyformer(budget=0.25)"),
    Subject("critic", dial(lambda s, n: f"critic(budget={s})"), "critic(budget=0.25)"),
    Subject("prefixkv", dial(lambda s, n: f"prefixkv(budget={s})"), "prefixkv(budget=0.25)"),
    Subject("kvcrush", dial(lambda s, n: f"kvcrush(budget={s})"), "kvcrush(budget=0.25)"),
    Subject(
        "compresskv",
        dial(lambda s, n: f"compresskv(heads={{semantic}}, budget={s})"),
        "compresskv(heads={semantic}, budget=0.25)",
    ),
    Subject("snapkv", dial(lambda s, n: f"snapkv(budget={s})"), "snapkv(budget=0.25)"),
    Subject("adakv", dial(lambda s, n: f"adakv(budget={s})"), "adakv(budget=0.25)"),
    Subject("expectedattention", dial(lambda s, n: f"expectedattention(budget={s})"), "expectedattention(budget=0.25)"),
    Subject("cake", dial(lambda s, n: f"cake(budget={s})"), "cake(budget=0.25)"),
    Subject("ems", dial(lambda s, n: f"ems(budget={s})"), "ems(budget=0.25)"),
    Subject(
        "razorattention",
        {
            0.5: "razorattention(heads={razor}, induction=0.375, echo=0.0, budget=0.2)",
            0.25: "razorattention(heads={razor}, induction=0.125, echo=0.0, budget=0.14)",
            0.125: "razorattention(heads={razor}, induction=0.125, echo=0.0, budget=0.01)",
        },
        "razorattention(heads={razor})",
    ),
    Subject(
        "duoattention",
        {
            0.5: "duoattention(heads={duo}, sparsity=0.625, sinks=16, window=184)",
            0.25: "duoattention(heads={duo}, sparsity=0.875, sinks=16, window=127)",
            0.125: "duoattention(heads={duo}, sparsity=0.875, sinks=4, window=12)",
        },
        "duoattention(heads={duo})",
    ),
    Subject(
        "kivi",
        {0.25: "kivi(bits=4, residual=32)", 0.125: "kivi(bits=2, residual=32)"},
        "kivi(bits=2)",
        acts=("encoded",),
    ),
    Subject("kivi, 4 bits", {}, "kivi(bits=4)", acts=("encoded",)),
    Subject(
        "rotatekv",
        {0.25: "rotatekv(order={rotated}, bits=4)", 0.125: "rotatekv(order={rotated})"},
        "rotatekv",
        acts=("encoded",),
    ),
    Subject("zipcache", {0.25: "zipcache", 0.125: "zipcache(share=0.1)"}, "zipcache", acts=("encoded",)),
    Subject("mikv", {0.5: "mikv(budget=0.2)"}, "mikv", acts=("encoded",)),
    Subject(
        "mikv, 2 bits",
        {0.5: "mikv(budget=0.35, low_bits=2)", 0.25: "mikv(budget=0.1, low_bits=2)"},
        "mikv(low_bits=2)",
        acts=("encoded",),
    ),
    Subject("think", {0.5: "think(ratio=0.75)"}, "think", acts=("encoded",)),
    Subject(
        "xkv",
        {
            0.5: "xkv(group=4, key_rank=96, value_rank=128)",
            0.25: "xkv(group=4, key_rank=32, value_rank=64)",
            0.125: "xkv(group=4, key_rank=16, value_rank=24)",
        },
        "xkv(group=4)",
        acts=("encoded",),
        weights=(0.25, 0.25, 0.25, 0.25),
        longest=32_768,
    ),
    Subject("minicache", {0.5: "minicache"}, "minicache", acts=("encoded",)),
    Subject("minicache, all layers", {0.5: "minicache(start=0.0)"}, "minicache(start=0.0)", acts=("encoded",)),
    Subject(
        "random",
        dial(lambda s, n: f"random({selection(n)})"),
        "random(top_k=2048, sinks=128, window=512)",
        ("selections",),
        "read",
    ),
    Subject(
        "tokenselect",
        dial(lambda s, n: f"tokenselect({selection(n)}, theta=2.0)"),
        f"tokenselect({_LARGE_READ})",
        ("selections",),
        "read",
    ),
    Subject(
        "infllm",
        {
            0.25: "infllm(block=16, sinks=4, window=62, top_k=11, chunk=31)",
            0.125: "infllm(block=16, sinks=4, window=31, top_k=5, chunk=16)",
        },
        "infllm(top_k=16, sinks=128, window=512)",
        ("selections",),
        "read",
    ),
    Subject(
        "actqkv",
        {
            0.25: "actqkv(block=16, sinks=4, window=62, top_k=11, chunk=31, least=8)",
            0.125: "actqkv(block=16, sinks=4, window=31, top_k=5, chunk=16, least=4)",
        },
        "actqkv(top_k=64)",
        ("selections",),
        "read",
    ),
    Subject("tokenselect, 8-bit sketch", {}, f"tokenselect({_LARGE_READ}, sketch='int8')", ("selections",), "read"),
    Subject(
        "tidaldecode",
        dial(lambda s, n: f"tidaldecode(top_k={n}, first=1, reselect=0)"),
        "tidaldecode(top_k=2048, first=0, reselect=0)",
        ("reused",),
        "read",
        stepwise=True,
        # Layers 0 to 2 and 13 of 32 attend to everything, as published for Llama 3 8B.
        weights=(4 / 32, 28 / 32),
    ),
    Subject(
        "delta",
        dial(lambda s, n: f"delta(full=(0, 1, 2), pages={n // 16}, recent=1)"),
        "delta(full=(0,), pages=128)",
        ("reused",),
        "read",
        stepwise=True,
        # Layers 0, 1, 2, 16 and 25 of 32 attend to everything.
        weights=(5 / 32, 27 / 32),
        whole=3,
    ),
    Subject(
        "doublesparsity",
        dial(lambda s, n: f"doublesparsity(channels={{channels}}, top_k={n})"),
        "doublesparsity(channels={channels}, top_k=2048, dense_layers=0)",
        ("selections",),
        "read",
        stepwise=True,
    ),
    Subject(
        "quest",
        dial(lambda s, n: f"quest(token_budget={n})"),
        "quest(token_budget=2048, dense_layers=0)",
        ("selections",),
        "read",
        stepwise=True,
    ),
    Subject(
        "sparq",
        # A quarter of the channels, as in the paper at an eighth of the traffic.
        dial(lambda s, n: f"sparq(rank=8, top_k={n - 1}, local={n // 4})"),
        "sparq(top_k=2047, local=512)",
        ("selections",),
        "read",
        stepwise=True,
        whole=0,
    ),
    Subject(
        "loopserve",
        # What is fed after the prompt, question and answer, is read besides.
        dial(lambda s, n: f"loopserve(top_k={n - 24})"),
        "loopserve(top_k=2048)",
        ("selections", "reused"),
        "read",
        stepwise=True,
        whole=0,
    ),
    Subject(
        "sentencekv",
        # Of what is kept, half is read, besides the ends of sentences and what follows them.
        dial(lambda s, n: f"sentencekv(ends=(2504, 2508), tokens={n // 2}, factor=2.0, first=4, last={n // 8})"),
        "sentencekv(ends=(13,))",
        ("dropped", "selections"),
    ),
    Subject(
        "mpcache",
        dial(lambda s, n: f"mpcache(budget={s})"),
        "mpcache(budget=0.25)",
        ("dropped", "selections"),
    ),
    Subject(
        "mpcache, layers in pairs",
        {0.5: "mpcache(budget=0.5, share=2)"},
        "mpcache(budget=0.25, share=2)",
        ("dropped", "selections", "reused"),
        weights=(1 / 2, 1 / 2),
    ),
    Subject(
        "minference",
        # One diagonal in a block of 16 rows is 16 tokens.
        {
            0.125: "minference(vertical=50, slash=18, first=4, nearest=16, block=16)",
        },
        "minference",
        ("selections",),
        "read",
        block=16,
    ),
    Subject(
        "snapkv | tokenselect",
        dial(lambda s, n: f"snapkv(budget={s}, per_head=False) | tokenselect({selection(n // 2)}, theta=2.0)"),
        f"snapkv(budget=0.25, per_head=False) | tokenselect({_LARGE_READ})",
        ("dropped", "selections"),
    ),
    Subject(
        "kivi | tokenselect",
        {0.25: f"{_FOUR_BITS} | tokenselect({_SMALL_READ})"},
        f"kivi(bits=2) | tokenselect({_LARGE_READ})",
        ("encoded", "selections"),
    ),
    Subject(
        "razorattention | kivi",
        {0.25: "razorattention(heads={razor}, induction=0.375, echo=0.0, budget=0.2) | " + _FOUR_BITS},
        "razorattention(heads={razor}) | kivi(bits=2)",
        ("dropped", "encoded"),
    ),
    Subject(
        "cake | kivi | tokenselect",
        {0.125: f"cake(budget=0.5, per_head=False, evict_generated=False) | {_FOUR_BITS} | tokenselect({_SMALL_READ})"},
        f"cake(budget=0.25, per_head=False, evict_generated=False) | kivi(bits=2) | tokenselect({_LARGE_READ})",
        ("dropped", "encoded", "selections"),
    ),
    Subject(
        "xkv | tokenselect",
        {0.5: f"xkv(group=4, key_rank=96, value_rank=128) | tokenselect({_SMALL_READ})"},
        f"xkv(group=4) | tokenselect({_LARGE_READ})",
        ("encoded", "selections"),
        weights=(0.25, 0.25, 0.25, 0.25),
        longest=32_768,
    ),
)


def known(names: list[str] | None = None) -> list[Subject]:
    """Subjects whose methods this kvote has; of these the ``names``, where given."""
    import kvote.methods  # noqa: F401  (each method registers itself)

    unknown = set(names or ()) - {subject.name for subject in SUBJECTS}
    if unknown:
        raise SystemExit(f"There is no {', '.join(sorted(unknown))}; there are: " + "; ".join(s.name for s in SUBJECTS))
    wanted = [subject for subject in SUBJECTS if names is None or subject.name in names]
    return [subject for subject in wanted if all(name in METHODS for name in subject.names)]


def calibration(kind: str) -> str:
    """The calibration of the embedded model, in quotes for a spec; measured now if it has not been before."""
    path = RESULTS / f"calibration-{kind}.json"
    if not path.exists():
        from kvote.cli import main

        print(f"calibrating the embedded model: {kind}", flush=True)
        if main(["calibrate", "--what", kind, "--out", str(path)]):
            raise SystemExit(f"kvote calibrate --what {kind} failed.")
    return repr(str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path))


def spelled(spec: str, calibrations: Callable[[str], str] = calibration) -> str:
    """The spec with every calibration that it names put in."""
    return re.sub(r"\{(\w+)\}", lambda m: calibrations(m[1]), spec)


@dataclass(frozen=True)
class MadeUp:
    """Calibrations of a model that does not exist, with ``layers`` layers of ``kv_heads`` key heads of ``dim``."""

    layers: int
    heads: int
    kv_heads: int
    dim: int
    # The one whose calibrations they shall pass for.
    model: Any = None
    written: dict[str, str] = field(default_factory=dict)

    def __call__(self, kind: str) -> str:
        import tempfile

        from kvote.calibration import save

        if kind not in self.written:
            folder = Path(tempfile.mkdtemp(prefix="kvote-"))
            path = folder / f"{kind}.json"
            save(self.made(kind), path)
            self.written[kind] = str(path)
        return repr(self.written[kind])

    def made(self, kind: str) -> Any:
        from kvote.calibration.example import example
        from kvote.calibration.fingerprint import Fingerprint

        shape = (self.layers, self.heads, self.kv_heads, self.dim)
        model = Fingerprint("made-up", *shape, (0.0,)) if self.model is None else Fingerprint.of(self.model)
        return example(kind, model)


def built(spec: str, calibrations: Callable[[str], str] = calibration) -> Method | str:
    """The method, or why there is none: a subject must not end the run of the others."""
    try:
        return parse(spelled(spec, calibrations))
    except KvoteError as error:
        return str(error)

"""One decode step of one layer for rows that share a prefix: read once for all of them, or by each row, in one run.

Geometry of Llama-3.1-8B: 32 query heads, 8 key heads, head size 128, bfloat16. Each row has a suffix of its own. Both
answers are compared first.

    python bench/shared.py --rows 16 --prefixes 1024 4096 16384 --suffix 256
"""

import argparse
from dataclasses import asdict
from typing import Any

import torch
from common import save, table

from kvote.layer import Layer
from kvote.measure.clock import Call, alternating
from kvote.measure.geometry import Geometry
from kvote.spec import parse
from kvote.store import common_prefix


def filled(geometry: Geometry, rows: int, prefix: int, suffix: int) -> Layer:
    """A layer of ``rows`` sequences with ``prefix`` tokens that they share and ``suffix`` of their own."""
    layer = Layer(0, parse("dense"), None)
    segment = layer.start(geometry.step(0, 1))
    segment.append([0], *geometry.tokens(prefix, 1), torch.arange(prefix)[None])
    segment.select([0] * rows)
    at = torch.arange(prefix, prefix + suffix)[None].expand(rows, -1)
    segment.append(list(range(rows)), *geometry.tokens(suffix, rows), at)
    layer.seen = prefix + suffix
    return layer


class Each:
    """Has every row read the prefix by itself."""

    def __enter__(self) -> None:
        self.least, common_prefix.LEAST = common_prefix.LEAST, 2**31

    def __exit__(self, *_: Any) -> None:
        common_prefix.LEAST = self.least


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--prefixes", type=int, nargs="+", default=[256, 512, 1024, 4096, 16384])
    parser.add_argument("--suffix", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    geometry, results = Geometry(), []
    for prefix in options.prefixes:
        with torch.no_grad():
            layer = filled(geometry, options.rows, prefix, options.suffix)
            step = geometry.step(prefix + options.suffix, options.rows)

            def each(layer: Layer = layer, step: Any = step) -> torch.Tensor:
                with Each():
                    return layer.attend(step)

            def once(layer: Layer = layer, step: Any = step) -> torch.Tensor:
                return layer.attend(step)

            answers = []
            for read in (each, once):
                answers.append(read())
                layer.crop(1)
            torch.testing.assert_close(*(a.float() for a in answers), atol=2e-2, rtol=2e-2)

            def undo(layer: Layer = layer) -> None:
                layer.crop(1)

            times = alternating({"each": Call(each, undo), "once": Call(once, undo)}, options.rounds)
        ratio = times["each"].seconds / times["once"].seconds
        results.append({"prefix": prefix, "ratio": ratio, **{name: asdict(t) for name, t in times.items()}})
    cells = [
        [f"{r['prefix']:,}", *(f"{1e3 * r[name]['seconds']:.2f}" for name in ("each", "once")), f"{r['ratio']:.2f}x"]
        for r in results
    ]
    print(f"{options.rows} rows, {options.suffix} tokens of their own each")
    print(table(["shared tokens", "read by each, ms", "read once, ms", "ratio"], cells))
    save("shared", {"rows": options.rows, "suffix": options.suffix, "results": results})


if __name__ == "__main__":
    main()

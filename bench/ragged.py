"""One decode step of one layer for eight sequences of different lengths, 64 to 4,096 tokens: in one call, sequence by
sequence as before, and by torch's sdpa over the padded batch with a mask, in turn in one run.

Geometry of Llama-3.1-8B: 32 query heads, 8 key heads, head size 128, bfloat16. All three answers are compared first.

    OMP_NUM_THREADS=1 python bench/ragged.py
"""

import argparse
from dataclasses import asdict, replace
from typing import Any

import torch
from common import save, table
from torch import Tensor

from kvote.layer import Layer
from kvote.measure.clock import Call, alternating
from kvote.measure.geometry import Geometry
from kvote.row_groups import rows_alike
from kvote.spec import parse


class Apart(Layer):
    """Answers rows of different length group by group."""

    def _joins(self, groups: Any, step: Any) -> bool:
        return False


def filled(kind: type[Layer], geometry: Geometry, key: Tensor, value: Tensor, lengths: list[int]) -> Layer:
    layer, longest = kind(0, parse("dense"), None), max(lengths)
    segment = layer.start(geometry.step(0, len(lengths)))
    for row, n in enumerate(lengths):
        # Padding is on the left, as generate() has it.
        own = key[row : row + 1, :, longest - n :], value[row : row + 1, :, longest - n :]
        segment.append([row], *own, torch.arange(n)[None])
    layer.seen = longest
    layer.columns = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    return layer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--shortest", type=int, default=64)
    parser.add_argument("--longest", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    geometry, ratio = Geometry(), options.longest / options.shortest
    lengths = [round(options.shortest * ratio ** (i / (options.rows - 1))) for i in range(options.rows)]
    assert len(rows_alike(lengths, None, 1)) == options.rows
    with torch.no_grad():
        key, value = geometry.tokens(options.longest, options.rows)
        begins = options.longest - torch.tensor(lengths)
        tokens = torch.arange(options.longest + 1) >= begins[:, None]
        step = replace(geometry.step(options.longest, options.rows), past=tokens[:, :-1])
        together, apart = (filled(kind, geometry, key, value, lengths) for kind in (Layer, Apart))
        padded = [torch.cat([held, new], dim=2) for held, new in ((key, step.key), (value, step.value))]
        mask = tokens[:, None, None]
        rows = step.query.reshape(options.rows, geometry.kv_heads, -1, geometry.dim)

        def sdpa() -> Tensor:
            given = torch.nn.functional.scaled_dot_product_attention
            return given(rows, *padded, attn_mask=mask.expand(-1, -1, rows.shape[2], -1), scale=geometry.scale)

        answers = [layer.attend(step).transpose(1, 2) for layer in (together, apart)]
        answers.append(sdpa().reshape(answers[0].shape))
        for other in answers[1:]:
            torch.testing.assert_close(answers[0].float(), other.float(), atol=2e-2, rtol=2e-2)
        for layer in (together, apart):
            layer.crop(1)
        calls = {
            "one call": Call(lambda: together.attend(step), lambda: together.crop(1)),
            "row by row": Call(lambda: apart.attend(step), lambda: apart.crop(1)),
            "sdpa, padded": Call(sdpa),
        }
        times = alternating(calls, options.rounds)
    one = times["one call"].seconds
    told = [
        [name, f"{1e3 * t.seconds:.3f}", f"{1e3 * t.shortest:.3f} to {1e3 * t.longest:.3f}", f"{t.seconds / one:.2f}x"]
        for name, t in times.items()
    ]
    print(f"{options.rows} sequences of {', '.join(map(str, lengths))} tokens")
    print(table(["step", "ms", "spread", "times as long"], told))
    print("written:", save("ragged", {"lengths": lengths, "times": {name: asdict(t) for name, t in times.items()}}))


if __name__ == "__main__":
    main()

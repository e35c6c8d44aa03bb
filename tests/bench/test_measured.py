"""docs/measured.md and README's table of costs against the raw results of the benchmarks."""

import json
import re
from pathlib import Path
from statistics import median
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
PAGE = (ROOT / "docs" / "measured.md").read_text()


def results(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def rows(head: str, page: str = PAGE) -> list[list[str]]:
    """Cells of the table whose first line begins so, by row, without markup."""
    lines = page[page.index(f"\n{head}") + 1 :].split("\n\n")[0].splitlines()[2:]
    cells = [re.split(r"(?<!\\)\|", line.strip()[1:-1]) for line in lines]
    return [[cell.strip().strip("`*").replace("\\|", "|") for cell in row] for row in cells]


def told(ratio: float) -> str:
    """Two digits."""
    return f"{float(f'{ratio:.2g}'):g}x"


def same(cell: str, ratio: float) -> bool:
    return told(float(cell.removesuffix("x"))) == told(ratio)


def test_accuracy_against_length():
    from extrapolation import render

    made = render(results("extrapolation")["points"])
    assert made.strip() in PAGE
    assert made.strip() == (RESULTS / "extrapolation.md").read_text().strip()


@pytest.mark.parametrize("ways", [("prompt", "steps"), ("later",)])
def test_accuracy_of_every_method(ways):
    from accuracy_table import _overview, rows_of

    stored = results("accuracy")
    made = _overview([row for row in rows_of(stored["rows"], stored["points"]) if row.way in ways])
    assert len(made.splitlines()) > 8
    assert [line for line in made.splitlines() if line not in PAGE.splitlines()] == []


def test_a_decode_step_of_a_layer():
    columns = {3: "dense decode", 4: "tokenselect step", 5: "tokenselect step, 8-bit sketch"}
    columns[6] = "tokenselect step, 4-bit sketch"
    tables = {f"{table['tokens']:,}": table for table in results("decode_step")["tables"]}
    table = rows("| tokens | sdpa packed, ms")
    assert [row[0] for row in table] == list(tables)
    for row in table:
        kernels = {each["kernel"]: each for each in tables[row[0]]["rows"]}
        assert row[1] == f"{kernels['sdpa, packed']['ms']:.1f}"
        assert row[2] == f"{kernels['sdpa as transformers calls it']['ms']:.0f}"
        assert all(row[at] == f"{kernels[name]['ratio']:.1f}x" for at, name in columns.items())
        assert row[7].startswith(f"{100 * kernels['dense decode']['share']:.0f}%")
        assert row[7].endswith(f" {tables[row[0]]['bandwidth']:.0f} GB/s")


def test_a_decode_step_of_every_method():
    points = {(p["name"], p["tokens"]): p for p in results("methods")["points"]}
    table = rows("| method | bytes of dense")
    assert len(table) > 20
    for name, held, *cells in table:
        assert held == f"{100 * points[name, 32_768]['bytes_to_dense']:.0f}%", name
        for tokens, (ms, packed, dense) in zip((32_768, 131_072), (cells[:3], cells[3:]), strict=True):
            if ms:
                point = points[name, tokens]
                assert ms == f"{point['ms']:.1f}", name
                assert same(packed, point["to_packed"]), name
                assert same(dense, point["to_dense"]), name


def test_a_whole_model():
    found = results("model_step-131072")["results"]
    table = rows("| cache | ms per token | times faster")
    assert len(table) == len(found)
    for row, point in zip(table, found, strict=True):
        assert row[1] == f"{point['ms']:.0f}"
        assert same(row[2], point["ratio_as_it_comes"])
        assert row[4] == f"{point['bytes'] / 2**20:,.0f}"
        assert row[5] == (f"{point['predicted_ms']:.0f}" if "predicted_ms" in point else "")


def test_the_readme_says_of_a_whole_model_what_the_page_says():
    page = {(row[1], row[4]) for row in rows("| cache | ms per token | times faster")}
    readme = rows("| cache | ms per token | MiB held", (ROOT / "README.md").read_text())
    assert len(readme) == 5
    assert {(row[1], row[2]) for row in readme} <= page


def test_prefill_and_decode_beside_transformers():
    found = results("document-65536")["results"]
    for row, point in zip(rows("| cache | prefill s"), found, strict=True):
        assert row[0] == point["name"]
        numbers = [point[key] for key in ("prefill_s", "prefill_ratio", "ms_per_token", "decode_ratio", "kv_mib")]
        assert [cell.removesuffix("x") for cell in row[1:6]] == [f"{number:.1f}" for number in numbers]
        assert row[6] == point["answer"]


def test_what_sketches_lose():
    names = ["int8", "int4, 4,096 at least", "int4", "int4 alone", "int2, 4 times", "int2, 16 times"]
    toy, real = (results(name)["entries"] for name in ("recall", "recall-real-8000"))
    for name, (_, most, mean, worst) in zip(names, rows("| votes from | embedded"), strict=True):
        lost = [entry["points_lost"] for entry in real if entry["votes"] == name]
        assert most == f"{max(e['points_lost'] for e in toy if e['votes'] == name):.2f}", name
        assert (mean, worst) == (f"{sum(lost) / len(lost):.2f}", f"{max(lost):.2f}"), name


def test_perplexity_of_prose_and_where_its_attention_lies():
    from why_perplexity import render

    perplexity, attention = render(results("why_perplexity")).split("\n\n")
    assert perplexity in PAGE
    assert attention in PAGE


def test_the_embedded_model_by_task():
    found = {(row["task"], row["length"]): row["exact"] for row in results("embedded")["rows"]}
    for task, *cells in rows("| task | 512 tokens"):
        made = [f"{100 * found[task, length]:.1f}%" for length in (512, 1024, 2048, 4096)]
        assert cells == made


def test_the_table_of_methods_on_a_real_model_is_what_was_measured():
    held = results("all_methods")["rows"]
    found = rows("|  | keys found | perplexity | tokens held |")
    assert len(found) == len(held) > 20
    for row, (name, keys, perplexity, tokens, read, size) in zip(held, found, strict=True):
        assert (row["method"].removesuffix(" @ 1024"), keys) == (name, "{:.0f} of {}".format(*row["keys"]))
        assert perplexity == f"{median(row['perplexity']):.1f}"
        assert (tokens, read) == (f"{row['tokens_held']:,}", f"{row['tokens_read']:,}")
        assert size == f"{row['nbytes'] / 2**20:.0f}"

"""``kvote bench``: what it says and what it refuses; no test looks at a time."""

import json

import pytest
import torch

from kvote.cli import main
from kvote.kernels import cpu
from kvote.measure import kernels, sweep
from kvote.store.uncompressed import UncompressedSegment

SMALL = ["bench", "--heads", "4", "--kv-heads", "2", "--head-dim", "16", "--tokens", "4096"]
compiled = pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "_BYTES", 1 << 12)
    monkeypatch.setattr(kernels, "_SECONDS", 0.0)


@compiled
def test_the_schema_of_the_json_object(capsys):
    assert main([*SMALL, "4100", "--json"]) == 0
    out, err = capsys.readouterr()
    made = json.loads(out)
    assert made.keys() == {"machine", "geometry", "tables"}
    assert made["geometry"] == {"heads": 4, "kv_heads": 2, "head_dim": 16, "dtype": "bfloat16"}
    assert [table["tokens"] for table in made["tables"]] == [4096, 4100]
    for table in made["tables"]:
        names = [row["kernel"] for row in table["rows"]]
        assert names[:2] == ["sdpa, packed", "sdpa as transformers calls it"]
        assert len(names) == len(set(names)) == 12
        assert table["lowest_bandwidth"] <= table["bandwidth"] <= table["highest_bandwidth"]
        for row in table["rows"]:
            assert 0 < row["shortest_ms"] <= row["ms"] <= row["longest_ms"]
            assert (row["gb_per_s"] is None) == (row["share"] is None) == row["kernel"].startswith("storing")
        assert table["rows"][0]["ratio"] == 1.0
    assert all(line.startswith("kvote: ") for line in err.splitlines())


@compiled
def test_what_a_person_sees(capsys):
    assert main(SMALL) == 0
    out = capsys.readouterr().out
    words = " ".join(out.split())
    assert "4 query heads, 2 key heads of 16 channels, bfloat16" in words
    assert "4,096 tokens; memory is read at" in words
    for name in ("sdpa, packed", "dense decode", "votes, exact", "tokenselect step, 4-bit sketch", "storing a token"):
        # Long names are folded.
        assert all(word in words for word in name.split())
    assert max(map(len, out.splitlines()[3:])) <= 80


@compiled
@pytest.mark.parametrize(
    ("owner", "kernel", "sentence"),
    [
        (cpu, "decode", "dense decode is off by"),
        (cpu, "votes", "votes, exact is off by"),
        (cpu, "top_k", "top-k, 2,048 does not find the largest votes"),
        (UncompressedSegment, "append", "storing a token, 8-bit sketch does not store what it is given"),
        (UncompressedSegment, "attend", "tokenselect step is off by"),
        (UncompressedSegment, "winners", "tokenselect step finds only"),
    ],
)
def test_a_wrong_kernel_means_no_figures(capsys, monkeypatch, owner, kernel, sentence):
    right = getattr(owner, kernel)

    def wrong(*args, **kwargs):
        if kernel == "append":
            segment, rows, key, value, positions = args
            # Prompts are stored as they should be, single tokens are not.
            return right(segment, rows, key if key.shape[2] > 1 else key + 1, value, positions)
        answer = right(*args, **kwargs)
        if kernel in ("decode", "attend"):
            return answer[0] * 1.1, answer[1]
        return answer * 1.1 if kernel == "votes" else (answer + 300) % 3000

    monkeypatch.setattr(owner, kernel, wrong)
    assert main(SMALL) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith(f"kvote: {sentence}")
    assert err.endswith("no figures.\n")


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--tokens", "many"], "--tokens: must be a whole number of at least 1, got 'many'; see kvote bench --help."),
        (["--tokens"], "--tokens: expected at least one argument"),
        (["--tokens", "0"], "--tokens: must be a whole number of at least 1, got '0'"),
        (["--heads", "7"], "7 query heads cannot share 8 key heads evenly."),
        (["--heads", "64", "--kv-heads", "2"], "kvote's kernels read for at most 16 query heads per key head."),
    ],
)
def test_what_makes_no_sense_is_refused(capsys, argv, sentence):
    assert main(["bench", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"kvote: {sentence}")
    assert err.count("\n") == 1


@compiled
@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--tokens", "1000"], "1,000 tokens are too few to select 2,048 from; give at least 4,096."),
        (["--head-dim", "20"], "There are no compiled kernels to measure here: the head size 20 is not a multiple of"),
        (["--tokens", "4096", "999999999999"], "Measuring with 999,999,999,999 tokens needs"),
    ],
)
def test_what_cannot_be_measured_is_refused(capsys, monkeypatch, argv, sentence):
    monkeypatch.setattr(kernels, "memory", lambda: (2**34, 2**34))
    test_what_makes_no_sense_is_refused(capsys, argv, sentence)


def test_without_compiled_kernels_it_says_why(capsys, monkeypatch):
    monkeypatch.setattr(cpu.library, "_missing", "the compiled module cannot be loaded (no such file)")
    test_what_makes_no_sense_is_refused(
        capsys,
        [],
        "There are no compiled kernels to measure here: the compiled module cannot be loaded (no such file).",
    )


@compiled
def test_kernels_that_are_switched_off_are_not_measured(capsys, monkeypatch):
    monkeypatch.setenv("KVOTE_BACKEND", "reference")
    sentence = "There are no compiled kernels to measure here: KVOTE_BACKEND switches them off; unset it"
    test_what_makes_no_sense_is_refused(capsys, [], sentence)


@pytest.mark.parametrize(("free", "tokens"), [(0, 131_072), (2**40, 131_072), (2**31, 65_536), (1, 4096)])
def test_the_length_follows_the_memory_that_is_free(monkeypatch, free, tokens):
    monkeypatch.setattr(kernels, "memory", lambda: (2**40, free))
    assert kernels.default_tokens(kernels.Geometry()) == tokens


def test_the_inputs_are_fresh(monkeypatch):
    torch.manual_seed(0)
    first = kernels.Geometry(4, 2, 16).tokens(10)[0]
    assert not torch.equal(first, kernels.Geometry(4, 2, 16).tokens(10)[0])

"""Every backend is what ``kernels.contract`` says: the same names and arguments, and the same answers."""

import copy
import inspect
import os
import pickle

import pytest
import torch
from paged import Case, Paged

from kvote import kernels
from kvote.kernels import checks, contract, cpu, gpu, law, packing, reference
from kvote.kernels.packing import PACKED, Packing

# Triton can be loaded only where it is installed, and then tells its arguments even if nothing can run them.
NAMES = ["cpu", "reference", *(["triton"] if gpu._installed() else [])]


def functions(kind: type) -> dict[str, inspect.Signature]:
    found = {name: inspect.signature(f) for name, f in vars(kind).items() if inspect.isfunction(f) and name[0] != "_"}
    return {name: s.replace(parameters=list(s.parameters.values())[1:]) for name, s in found.items()}


def as_called(signature: inspect.Signature) -> list[tuple[str, object, bool]]:
    return [(p.name, p.kind, p.default is not p.empty) for p in signature.parameters.values()]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("part", ["backend", "packed"])
def test_a_backend_has_every_function_with_its_arguments(name, part):
    held = kernels.named(name) if part == "backend" else kernels.named(name).packed
    wanted = functions(contract.Backend if part == "backend" else contract.PackedKernels)
    assert len(wanted) >= 4
    for function, signature in wanted.items():
        mine, asked = as_called(inspect.signature(getattr(held, function))), as_called(signature)
        # More may be given to one, but nobody need know.
        assert mine[: len(asked)] == asked, function
        assert all(optional for _, _, optional in mine[len(asked) :]), function


@pytest.mark.parametrize("name", NAMES)
def test_a_backend_states_its_facts(name):
    held = kernels.named(name)
    assert name == held.NAME
    assert {type(held.MAX_QUERIES_PER_KV), type(held.SKETCH_TOKENS), type(held.ASKING_WAITS)} == {int, bool}


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_or_a_pickle_of_what_holds_a_backend_holds_the_same(name):
    held = kernels.named(name)
    assert copy.deepcopy({"kernels": held})["kernels"] is held
    assert pickle.loads(pickle.dumps({"kernels": held}))["kernels"] is held


def test_a_backend_that_lacks_an_argument_is_noticed():
    def decode(query, keys, values, lanes, tokens, *, angles, scale, softcap):
        pass

    asked = as_called(functions(contract.Backend)["decode"])
    assert as_called(inspect.signature(decode))[: len(asked)] != asked


def test_nothing_outside_the_kernels_asks_which_backend_it_holds():
    root = os.path.dirname(kernels.__file__)
    package, names = os.path.dirname(root), ('"triton"', '"reference"', ".NAME", "kernels.cpu", "kernels import cpu")
    asking = []
    for folder, _, files in os.walk(package):
        for file in files:
            path = os.path.join(folder, file)
            if file.endswith(".py") and not path.startswith(root + os.sep):
                with open(path) as opened:
                    text = opened.read()
                asking += [(os.path.relpath(path, package), name) for name in names if name in text]
    assert asking == []


# The law over pages, which everything else is held against, against the law on plain tensors.


CASES = [Case(n=n, sequences=2, heads=2, groups=3, d=32, pages=pages) for n in (9, 150) for pages in ("run", "mixed")]


@pytest.mark.parametrize("case", CASES)
def test_the_law_over_pages_is_the_law(case):
    pool, half = Paged(case), case.n // 2
    query, rule = pool.query(), {"scale": case.scale, "softcap": 3.0}
    index, angles = pool.some_tokens(half), pool.angles(half, pairs=8)
    places = index[:, None, :, None].expand(-1, case.heads, -1, case.d)
    rotated = reference.rotate(pool.key.gather(2, places), *angles)
    got = law.decode(query, pool.keys, pool.values, pool.table(), index, angles=angles, interleaved=False, **rule)
    wanted = reference.attend(query[:, :, None], rotated, pool.value.gather(2, places), **rule)
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs[:, :, 0])
    asked, limits = pool.query(2), [case.n - 1, case.n]
    logits = reference.scores(asked, pool.key[:, :, 1:])
    torch.testing.assert_close(law.scores(asked, pool.keys, pool.table(), 1, case.n), logits)
    votes = law.votes(asked, pool.keys, pool.table(), None, 0, 1, limits)
    torch.testing.assert_close(votes, reference.votes_within(logits, 1, limits))
    won = law.select(asked, pool.keys, pool.table(), None, 0, 1, limits, 3)
    assert torch.equal(won, reference.top_k(reference.forbid(votes, 1, limits), 3) + 1)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rotated", [False, True])
def test_the_law_reads_each_lane_as_far_as_its_own_end(case, rotated):
    pool, start, ends = Paged(case), 2, [case.n, 0, 2, case.n // 2]
    query, rule = pool.query(), {"scale": case.scale, "softcap": 3.0}
    angles = pool.angles(case.n - start, pairs=8) if rotated else None
    given = query, pool.keys, pool.values, pool.table(), range(start, case.n)
    out, lse = law.decode(*given, angles=angles, interleaved=False, ends=ends, **rule)
    for lane, end in enumerate(ends):
        row, head = divmod(lane, case.heads)
        heads = slice(head * case.groups, (head + 1) * case.groups)
        key, value = (x[row : row + 1, head : head + 1, start:end] for x in (pool.key, pool.value))
        if angles is not None:
            key = reference.rotate(key, *(a[: key.shape[2]] for a in angles))
        wanted, total = reference.attend(query[row : row + 1, heads, None], key, value, **rule)
        torch.testing.assert_close(out[row, heads], wanted[0, :, 0])
        torch.testing.assert_close(lse[row, heads], total[0, :, 0])


def test_ends_that_fit_nothing_are_refused():
    pool = Paged(CASES[0])
    rule = {"angles": None, "interleaved": False, "scale": 1.0, "softcap": None}
    for held in (law, *([] if cpu.why_not() else [cpu])):
        with pytest.raises(ValueError, match="one end per lane"):
            held.decode(pool.query(), pool.keys, pool.values, pool.table(), range(9), ends=[1], **rule)
        with pytest.raises(ValueError, match="lists have no ends"):
            held.decode(pool.query(), pool.keys, pool.values, pool.table(), pool.some_tokens(2), ends=[1] * 4, **rule)


@pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("own", [False, True])
def test_tokens_of_a_batch_are_fetched_and_turned_alike_by_all(case, own):
    pool, q, m = Paged(case), 2, 5
    index = torch.stack([pool.some_tokens(m) for _ in range(q)], dim=1)
    angles = pool.angles(*((case.sequences, q, m) if own else (m,)), pairs=8)
    outs = []
    for backend in (law, cpu):
        out = tuple(torch.full((case.sequences, q, case.heads, m, case.d), float("nan")) for _ in range(2))
        backend.gather(pool.keys, pool.values, pool.table(), index, angles, True, (out[0], out[1]))
        outs.append(out)
    for mine, theirs in zip(*outs, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))
def test_votes_and_winners_of_a_batch_are_those_of_each_sequence():
    case = Case(n=150, sequences=3, heads=2, groups=2, d=32)
    pool, limits = Paged(case, bits=8), [140, 150]
    query, given = pool.query(2), (pool.sketch, 8, 4, limits)
    for function, more in ((cpu.votes, ()), (cpu.select, (7,)), (cpu.select, (7, 20))):
        together = function(query, pool.keys, pool.table(), *given, *more)
        for i in range(case.sequences):
            assert torch.equal(together[i], function(query[i], pool.keys, pool.table(i), *given, *more))


def test_no_tokens_have_no_scores():
    pool = Paged(Case(n=70))
    for backend in (law, *([cpu] if cpu.why_not() is None else [])):
        assert backend.scores(pool.query(2), pool.keys, pool.table(), 9, 9).shape == (1, 2, 4, 0)


@pytest.mark.parametrize("form", [Packing(4, 32, 32, torch.float32, True), Packing(2, 32, 32, torch.float32, False)])
def test_the_law_packs_and_unpacks_lanes_as_it_does_tokens(form):
    layout = Paged(Case(n=192, heads=2, d=16, pages="mixed"))
    pages = torch.zeros(max(first + n for lane in layout.runs for first, n in lane) + 1, form.page_bytes).byte()
    x, out = torch.randn(2, 64, 32), torch.empty(2, 40, 32)
    law.packed.pack(x, pages, form, layout.table(), [128, 128])
    law.packed.unpack(pages, form, layout.table(), range(130, 170), 1, out)
    codes = (packing.quantise_keys if form.are_keys else packing.quantise_values)(x, form.bits, form.group_size)
    dims = 1 if form.are_keys else 2
    wide = [part.repeat_interleave(form.group_size, dim=dims) for part in codes[1:]]
    torch.testing.assert_close(out, packing.dequantise(codes[0], *wide)[:, 2:42])
    assert PACKED == 128


def test_checks_say_what_must_hold():
    with pytest.raises(ValueError, match="tokens must be consecutive"):
        checks.tokens_of(range(0, 8, 2), 1)

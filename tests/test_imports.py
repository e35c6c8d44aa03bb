"""Which way imports point, read from the source: nobody imports in a circle, and the kernels end where they say."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvote

ROOT = Path(kvote.__file__).parent


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in ROOT.rglob("*.py")}


def loaded(body: list[ast.stmt]) -> Iterator[str]:
    """Names that are imported where the module is, not later and not for types alone."""
    for node in body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else str(node.module)
        elif isinstance(node, ast.Try | ast.If) and "TYPE_CHECKING" not in ast.dump(node):
            yield from loaded([*node.body, *node.orelse])


IMPORTS = {
    name: {other for other in loaded(ast.parse(path.read_text()).body) if other in MODULES and other != name}
    for name, path in MODULES.items()
}


def test_no_module_imports_itself_in_a_circle():
    assert len(IMPORTS) > 100
    tuple(graphlib.TopologicalSorter(IMPORTS).static_order())


def hidden(path: Path) -> Iterator[str]:
    """Names that are imported anywhere in a module: later, for types alone, or by a text."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from loaded([node])
        elif isinstance(node, ast.Call) and "import_module" in ast.dump(node.func):
            yield from (str(arg.value) for arg in node.args if isinstance(arg, ast.Constant))


# Where a circle is left, its later or hidden half.
LEFT = {
    "kvote.cache": {"kvote.saving.caches"},
    "kvote.document": {"kvote.saving.documents"},
    "kvote.store.family": {"kvote.store.pages"},
    "kvote.store.uncompressed": {"kvote.store.uneven"},
}


def test_no_circle_hides_in_functions_or_behind_types():
    everywhere = {
        name: {other for other in hidden(path) if other in MODULES and other != name}
        for name, path in MODULES.items()
        if name != "kvote"  # hands out what lies in the others when it is asked for
    }
    assert {name: LEFT[name] - everywhere[name] for name in LEFT} == {name: set() for name in LEFT}
    tuple(
        graphlib.TopologicalSorter(
            {name: others - LEFT.get(name, set()) for name, others in everywhere.items()}
        ).static_order()
    )


def test_a_circle_is_noticed():
    with pytest.raises(graphlib.CycleError):
        tuple(graphlib.TopologicalSorter({**IMPORTS, "kvote.errors": {"kvote.cache"}}).static_order())


# Of the kernels, what each may stand on: the contract on lanes and codes, backends on that, their choice on those.
INNER = {
    "lanes": set(),
    "packing": set(),
    "reference": set(),
    "contract": {"lanes", "packing"},
    "checks": {"lanes", "packing", "contract"},
    "cpu": {"lanes", "packing", "contract", "checks", "fused", "cpu"},
    "triton": {"lanes", "packing", "contract", "checks", "gpu", "law", "triton"},
}


@pytest.mark.parametrize("part", INNER)
def test_kernels_stand_on_their_contract(part):
    prefix = f"kvote.kernels.{part}"
    mine = [name for name in MODULES if name == prefix or name.startswith(prefix + ".")]
    assert mine
    used = {other.split(".")[2] for name in mine for other in IMPORTS[name] if other.startswith("kvote.kernels.")}
    assert used <= INNER[part]


def test_a_backend_is_reached_through_the_kernels_alone():
    inside = ("kvote.kernels.cpu", "kvote.kernels.triton", "kvote.kernels.law", "kvote.kernels.gpu")
    outside = {name: others for name, others in IMPORTS.items() if not name.startswith("kvote.kernels")}
    assert [name for name, others in outside.items() if any(other.startswith(inside) for other in others)] == []


def test_the_rooms_know_no_paper_and_no_model():
    rooms = tuple(f"kvote.{room}." for room in ("keep", "store", "read", "index", "kernels"))
    beyond = ("methods", "hf", "cache", "document", "layer", "eval", "serve", "cli", "models", "calibration", "measure")
    names = [name for name in MODULES if name.startswith(rooms)]
    assert len(names) > 60
    used = {
        (name, other) for name in names for other in IMPORTS[name] if other.split(".")[1:2] in [[b] for b in beyond]
    }
    assert used == set()


def test_the_insides_of_transformers_are_known_in_one_folder():
    found = set()
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            inside = node.module if isinstance(node, ast.ImportFrom) else ""
            if (inside or "").startswith("transformers.") and not name.startswith("kvote.hf"):
                found.add((name.split(".")[1], inside))
    # A public base class, and the function that kvote is timed against.
    assert {inside for room, inside in found if room != "measure"} == {"transformers.generation.streamers"}
    assert ("measure", "transformers.integrations.sdpa_attention") in found
    assert len({inside for room, inside in found if room == "measure"}) == 2

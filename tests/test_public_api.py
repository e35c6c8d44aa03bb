"""The public names, proven against the package."""

import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kvote

ROOT = Path(kvote.__file__).parent


def test_all_lists_every_public_name_and_nothing_else():
    public = {name for name in vars(kvote) if not name.startswith("_")}
    modules = {name for name in public if inspect.ismodule(getattr(kvote, name))}
    assert public - modules <= set(kvote.__all__)
    assert all(hasattr(kvote, name) for name in kvote.__all__)
    assert kvote.__all__ == sorted(kvote.__all__)
    assert len(set(kvote.__all__)) == len(kvote.__all__)


@pytest.mark.parametrize("name", ["methods", "models"])
def test_modules_of_the_interface_are_imported_when_they_are_used(name):
    code = f"import sys, kvote; assert 'torch' not in sys.modules; assert kvote.{name}.__name__ == 'kvote.{name}'"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_types_are_shipped():
    assert (ROOT / "py.typed").is_file()


@pytest.mark.parametrize("name", kvote.__all__)
def test_every_public_name_is_documented(name):
    assert (inspect.getdoc(getattr(kvote, name)) or "").strip()


def test_every_error_is_a_kvote_error():
    errors = importlib.import_module("kvote.errors")
    raised = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind.__module__ == errors.__name__]
    assert all(issubclass(kind, kvote.KvoteError) for kind in raised)
    assert {kind.__name__ for kind in raised} <= set(kvote.__all__)


def test_methods_lists_one_function_per_file():
    files = {module.name for module in pkgutil.iter_modules([str(ROOT / "methods")])}
    assert files == set(kvote.methods.__all__)


@pytest.mark.parametrize(
    ("inner", "outer"),
    [
        ("kernels", r"kvote\.(store|read|keep|methods|layer|cache|hf|method|rope|document)"),
        ("index", r"kvote\.(read|keep|methods|layer|cache|hf|method\b|document)|transformers"),
        ("store", r"kvote\.(methods|layer|cache|hf|method\b|document)|transformers"),
        ("read", r"kvote\.(methods|layer|cache|hf|method\b|document)|transformers"),
        ("keep", r"kvote\.(methods|layer|cache|hf|method\b|document)|transformers"),
        ("methods", r"kvote\.(layer|cache|hf|document)|transformers"),
    ],
)
def test_arrows_point_inward(inner, outer):
    for path in (ROOT / inner).rglob("*.py"):
        imports = re.findall(r"^\s*(?:from|import) (\S+)", path.read_text(), re.M)
        assert not [name for name in imports if re.match(outer, name)], path


def test_only_the_seam_knows_the_insides_of_transformers():
    inside = re.compile(r"from transformers\.(masking_utils|modeling_utils|cache_utils|models)")
    knowing = {path.parent.name for path in ROOT.rglob("*.py") if inside.search(path.read_text())}
    assert knowing <= {"hf"}


def test_the_version_is_that_of_the_package():
    assert re.fullmatch(r"\d+\.\d+\.\d+", kvote.__version__)

"""Methods of other packages: found by their entry points, loaded when named, harmless where they are broken."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import kvote
from kvote import MethodError, plugins
from kvote.cli import main
from kvote.method import METHODS, published
from kvote.spec import parse

MODULE = '''
from kvote.keep.evict import sinks_and_recent
from kvote.method import Method, published


@published(rooms="keep", source="nobody")
def {name}(recent: int = 9) -> Method:
    """Keeps the last tokens.

    ``recent``: how many.
    """
    return Method(keep=sinks_and_recent(0, recent))
'''
Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Puts a distribution with one module and one entry point on the path."""
    monkeypatch.syspath_prepend(tmp_path)
    before, modules = dict(METHODS), set(sys.modules)

    def installed(package: str, name: str, source: str = MODULE, leads_to: str = "{module}:{name}") -> None:
        module = package.replace("-", "_")
        (tmp_path / f"{module}.py").write_text(source.replace("{name}", name))
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        where = leads_to.format(module=module, name=name)
        (info / "entry_points.txt").write_text(f"[{plugins.GROUP}]\n{name} = {where}\n")

    yield installed
    METHODS.clear()
    METHODS.update(before)
    for module in set(sys.modules) - modules:
        if module.startswith("kv_"):
            del sys.modules[module]


def test_a_spec_knows_the_method_of_another_package(install):
    install("kv-extra", "lastones")
    method = parse("lastones(recent=5) | tokenselect(top_k=3)")
    assert method.spec == "lastones(recent=5) | tokenselect(top_k=3)"
    assert method.keep.budget.amount == 5
    assert kvote.methods.lastones(recent=5).keep == method.keep
    with pytest.raises(MethodError, match="lastones has no parameter 'recents'; it has recent"):
        parse("lastones(recents=5)")


def test_the_command_line_lists_it_and_tells_its_package(install, capsys):
    install("kv-extra", "lastones")
    assert main(["methods"]) == 0
    out, err = capsys.readouterr()
    assert "lastones" in out
    assert err == ""
    assert main(["methods", "lastones"]) == 0
    out = capsys.readouterr().out
    assert "Package  kv-extra" in out
    assert "recent      9         how many." in out


def test_what_a_program_has_imported_itself_is_the_same_method(install):
    install("kv-extra", "lastones")
    import kv_extra

    assert plugins.load_all() == []
    assert METHODS["lastones"].package == "kv-extra"
    assert parse("lastones").keep == kv_extra.lastones().keep


def test_nothing_is_imported_until_it_is_named(install):
    install("kv-extra", "lastones")
    parse("dense")
    assert "kv_extra" not in sys.modules


@pytest.mark.parametrize(
    ("source", "leads_to", "reason"),
    [
        ("import nothing_of_that_name", "{module}:{name}", "ModuleNotFoundError: No module named"),
        ("raise SystemExit(3)", "{module}:{name}", "SystemExit: 3"),
        ("1 +", "{module}:{name}", "SyntaxError"),
        (MODULE, "{module}:other", "AttributeError"),
        (MODULE, "gone:{name}", "ModuleNotFoundError: No module named 'gone'"),
        ("def {name}():\n    pass", "{module}:{name}", "is not a function decorated with kvote.method.published"),
        (MODULE + "\n\n1 / 0\n", "{module}:{name}", "ZeroDivisionError"),
    ],
)
def test_a_broken_package_is_named_and_takes_nothing_down(install, capsys, source, leads_to, reason):
    install("kv-broken", "lastones", source, leads_to)
    assert main(["ask", "--tokens", "300", "--method", "lastones"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("kvote: The method 'lastones' of the package kv-broken cannot be loaded: ")
    assert reason in err
    assert err.count("\n") == 1
    assert parse("dense").spec == "dense"
    assert main(["methods"]) == 0
    out, err = capsys.readouterr()
    assert "lastones" not in out
    assert "tokenselect" in out
    assert err.startswith("kvote: The method 'lastones' of the package kv-broken cannot be loaded: ")


def test_a_method_that_fails_when_it_is_built_names_its_package(install):
    failing = MODULE.replace("return Method(keep=sinks_and_recent(0, recent))", "return 1 / 0")
    install("kv-broken", "lastones", failing)
    with pytest.raises(MethodError, match=r"^lastones of the package kv-broken cannot be built: ZeroDivisionError"):
        parse("lastones")
    assert main(["methods", "lastones"]) == 0


def test_a_name_of_kvotes_own_is_not_given_away(install, capsys):
    install("kv-extra", "dense")
    assert parse("dense") == kvote.methods.dense()
    assert main(["methods"]) == 0
    assert capsys.readouterr().err == (
        "kvote: The package kv-extra offers a method 'dense', and that name is taken by kvote.\n"
    )
    with pytest.raises(MethodError, match=r"kv_extra cannot publish a method 'dense': kvote\.methods\.dense has one"):
        import kv_extra  # noqa: F401
    assert parse("dense") == kvote.methods.dense()


def test_two_packages_with_one_name_are_both_named(install):
    install("kv-extra", "lastones")
    install("kv-more", "lastones")
    with pytest.raises(MethodError, match="The packages kv-extra and kv-more both offer a method 'lastones'"):
        parse("lastones")


def test_a_taken_name_is_refused_and_the_same_module_may_register_anew():
    def streamingllm() -> kvote.Method:
        """Another."""
        return kvote.Method()

    with pytest.raises(MethodError, match=f"{__name__} cannot publish a method 'streamingllm': kvote.methods.stream"):
        published(rooms="keep", source="nobody")(streamingllm)

    def mine() -> kvote.Method:
        """Mine."""
        return kvote.Method()

    try:
        published(rooms="keep", source="nobody")(mine)
        published(rooms="keep", source="nobody")(mine)
        assert parse("mine").spec == "mine"
    finally:
        METHODS.pop("mine", None)


def test_a_package_that_is_imported_first_finds_kvotes_names_taken(install, tmp_path):
    install("kv-extra", "dense")
    code = "import sys; sys.path.insert(0, sys.argv[1])\ntry:\n    import kv_extra\nexcept ValueError as error:\n"
    code += "    print(error)\nimport kvote\nprint(kvote.methods.dense())"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.startswith("kv_extra cannot publish a method 'dense': kvote.methods.dense has one of that name.")
    assert "Method(spec='dense'" in done.stdout

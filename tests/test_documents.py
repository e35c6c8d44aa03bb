"""What README, CONTRIBUTING and docs/ tell people to type is run here."""

import contextlib
import inspect
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

import kvote.methods
from kvote import InputError
from kvote.cli.arguments import ALL, parser
from kvote.method import METHODS
from kvote.spec import parse

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_PYTHON = re.compile(r"^```python\n(.*?)^```", re.S | re.M)
_SHELL = re.compile(r"^```(?:sh)?\n((?:make|kvote|cat|pip) .*?)^```", re.S | re.M)
# What a line with this comment prints is the rest of it.
_TOLD = re.compile(r"#\s*->\s*(.*)$", re.M)


def blocks(page: Path) -> list[str]:
    return _PYTHON.findall(page.read_text())


def specs(page: Path) -> list[str]:
    """Code in the text that is methods with parameters, joined or not; names alone are labels."""
    quoted = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M))
    plain = [code.replace("\\|", "|").strip('"') for code in quoted]
    names = "|".join(METHODS)
    plain = [code for code in plain if "(" in code and "{" not in code]
    return [code for code in plain if re.fullmatch(rf"(({names})(\([^()]*\))?)( \| ({names})(\([^()]*\))?)*", code)]


def test_snippets_of_the_readme_run_one_after_the_other_and_print_what_they_say(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {}
    told = []
    for code in blocks(ROOT / "README.md"):
        exec(compile(code, "README.md", "exec"), space)
        told += _TOLD.findall(code)
    assert len(told) == 2
    said = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert [each for each in said if each in ("True", "False")] == told


def test_snippets_about_asking_run_and_print_what_they_say(capsys):
    space: dict[str, Any] = {}
    told = []
    for code in blocks(ROOT / "docs" / "ask.md"):
        exec(compile(code, "ask.md", "exec"), space)
        told += _TOLD.findall(code)
    said = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert told == ["True", "True"]
    assert said[0] == said[-1] == "True"
    assert said[1:-1] == [space["sample"].questions[0].answer]


def test_snippets_about_a_library_run_and_print_what_they_say(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {}
    for code in blocks(ROOT / "docs" / "library.md"):
        exec(compile(code, "library.md", "exec"), space)
    assert capsys.readouterr().out.startswith("True\n")
    assert space["library"].statistics.hits == 2


def test_no_other_page_has_python_that_is_not_run():
    """CONTRIBUTING is followed in test_adding_a_method.py; serve.md and eval.md are what tests/serve and tests/eval
    ask."""
    assert {page.name for page in PAGES if blocks(page)} == {
        "README.md",
        "CONTRIBUTING.md",
        "ask.md",
        "eval.md",
        "library.md",
        "serve.md",
    }


def commands() -> list[str]:
    found = [code for page in PAGES for code in _SHELL.findall(page.read_text())]
    lines = [line for code in found for line in code.replace("\\\n", " ").splitlines()]
    return sorted({line for line in lines if not line.startswith("pip ")})


@pytest.mark.parametrize("line", commands())
def test_command_lines_are_understood(line):
    words = shlex.split(line.split("|")[-1] if line.startswith("cat ") else line, comments=True)
    if words[0] == "make":
        assert f"\n{words[1]}:" in "\n" + (ROOT / "Makefile").read_text()
        return
    assert words[0] == "kvote"
    given = parser().parse_args(words[1:])
    for spec in [getattr(given, "method", None) or "dense", *(getattr(given, "compare", None) or [])]:
        assert spec == ALL or parse(spec)


@pytest.mark.parametrize("spec", sorted({spec for page in PAGES for spec in specs(page)}))
def test_methods_that_a_page_writes_can_be_built(spec):
    # Files that the reader has and this test has not: they are looked for, so the rest of the spec was understood.
    missing = re.search(r"'([\w-]+\.json)'", spec)
    with pytest.raises(InputError, match=re.escape(missing[1])) if missing else contextlib.nullcontext():
        parse(spec)


def test_specs_are_found_at_all():
    found = [spec for page in PAGES for spec in specs(page)]
    assert "tokenselect(published=True)" in found
    assert "snapkv(per_head=False) | tokenselect" in found
    assert len(found) > 40


def test_the_readme_is_short_and_names_methods_that_exist():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    rows = [line for line in text.split("## Which method when")[1].split("\n## ")[0].splitlines() if "`" in line]
    named = {name for line in rows if line.startswith("|") for name in re.findall(r"`(\w+)[(`]", line)}
    assert len(named) > 8
    assert named <= set(kvote.methods.__all__)


def test_contributing_tells_how_long_things_are():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| [^|]* \| (`.*?`) \| (\d+) \|$", text, re.M)
    assert len(rows) > 5
    for files, told in rows:
        lines = sum(len((ROOT / "kvote" / name).read_text().splitlines()) for name in re.findall(r"`(.*?)`", files))
        assert abs(lines - int(told)) <= 0.1 * lines, files
    assert "none more than 400" in " ".join(text.split())
    files = [path for kind in ("*.py", "*.inl", "*.cpp", "*.hpp") for path in (ROOT / "kvote").rglob(kind)]
    assert [path.name for path in files if len(path.read_text().splitlines()) > 400] == []


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", head).strip().lower().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


@pytest.mark.parametrize("name", kvote.methods.__all__)
def test_a_docstring_explains_every_parameter(name):
    build = getattr(kvote.methods, name)
    text = inspect.getdoc(build) or ""
    if name == "random":
        text += inspect.getdoc(kvote.methods.tokenselect) or ""
    for parameter in inspect.signature(build).parameters:
        assert f"``{parameter}``" in text or f"``{parameter}=" in text, parameter

"""The page of `kvote eval`: charts, shaded texts, and how it looks in a browser."""

import json
import re
import shutil
from html import unescape

import pytest

from kvote import InputError
from kvote.cli.eval import open_subject
from kvote.eval.chart import Point, chart, ticks
from kvote.eval.heat import VOTES, read_heat, watching, write_heat
from kvote.eval.plan import Plan, Unit, make
from kvote.eval.read import Reading
from kvote.eval.report import page
from kvote.eval.shades import level_of, shaded
from kvote.eval.table import by_question

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
SPEC = "tokenselect(top_k=64, sinks=8, window=64, chunk=64)"
MANIFEST = {"format": 1, "model": "m", "dtype": "float32", "asked": "after", "trained_tokens": 8192, "runs": []}


@pytest.fixture(scope="module")
def subject():
    return open_subject(None, raw=False, dtype=None)


@pytest.fixture(scope="module")
def seen(subject, tmp_path_factory):
    folder = tmp_path_factory.mktemp("heat")
    assert write_heat(subject, Plan(("world",), (400,), 1, ("dense", SPEC)), folder) is None
    return folder


def test_votes_fall_on_the_answer(seen, subject):
    (one,) = read_heat(seen)
    sample = make(Unit("world", 400, 0, ()), 0, subject.count)
    assert "".join(one["pieces"]).removeprefix("<s>").strip() == sample.document
    best = max(range(len(one["votes"])), key=one["votes"].__getitem__)
    assert one["pieces"][best].strip() in sample.questions[0].answers[0].split()
    # Sinks are read without a vote, and so is the window.
    assert sum(one["votes"][:8]) == sum(one["votes"][-20:]) == 0
    # Eight heads cast a vote each.
    assert sum(one["votes"]) == pytest.approx(8, abs=0.05)


def test_to_be_watched_changes_no_answer(subject):
    sample = make(Unit("world", 400, 1, ()), 0, subject.count)
    method, noted = watching(SPEC)
    watched = Reading(subject, method, sample.document).ask(sample.questions[0])
    assert watched.tokens == Reading(subject, "dense", sample.document).ask(sample.questions[0]).tokens
    assert noted.queries > 0


def test_votes_are_not_asked_for_twice_and_only_of_tokenselect(seen, subject):
    before = (seen / VOTES).read_bytes()
    assert write_heat(subject, Plan(("world",), (400,), 1, ("dense", SPEC)), seen) is None
    assert (seen / VOTES).read_bytes() == before
    with pytest.raises(InputError, match="casts none"):
        watching("h2o")


def test_a_damaged_file_of_votes_is_refused(tmp_path):
    (tmp_path / VOTES).write_text(json.dumps([{"task": "t", "pieces": ["a"], "votes": []}]))
    with pytest.raises(InputError, match="other numbers of pieces"):
        read_heat(tmp_path)


def test_a_shaded_text_is_the_text(seen):
    (one,) = read_heat(seen)
    text = re.search('<div class="heat">(.*)</div>', shaded(one), re.S)
    assert text is not None
    assert unescape(re.sub("<[^>]*>", "", text[1])) == "".join(one["pieces"])
    assert 'class="v8"' in text[1]
    assert [level_of(vote, 4.0) for vote in (0.0, 1.0, 4.0)] == [0, 4, 8]


def test_ticks_are_round_and_hold_all_values():
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(0, 0.2) == [0, 0.05, 0.1, 0.15, 0.2]
    assert ticks(3.44, 3.59) == [3.4, 3.45, 3.5, 3.55, 3.6]
    assert ticks(0.0, 0.0)[0] == 0.0
    drawn = chart("t", "x", "y", [("a", "#000", [Point(8, 0.1, 0.0, 0.2), Point(16, 0.3, 0.2, 0.4)])])
    far = chart("t", "x", "y", [("a", "#000", [Point(12_000, 1, 1, 1), Point(2**20, 1, 1, 1)])])
    assert ">12,000<" in far
    assert ">1Mi<" in far
    heights = [float(y) for y in re.findall(r'y[12]="([0-9.]+)"', drawn)]
    assert all(30 <= y <= 250 - 42 + 0.1 for y in heights)


def records():
    cost = {"nbytes": 2**20, "tokens_read": 64, "ms_per_token": 3.0}
    asked = {"questions": ["Q?"], "expected": [["A"]], "answers": ["A"]}
    for name in ("dense", "a_method(with=3, long=5, parameters=7)"):
        for index in range(6):
            scores = [1.0, float(index % 2), 0.0]
            base = {"index": index, "name": name, **cost}
            yield {"task": "chains", "length": 4096, "score": sum(scores) / 3, "scores": scores, **asked, **base}
            for length in (4096, 16384):
                yield {"task": "perplexity", "length": length, "nll": [3.0, 4.0], "kl": [0.1, 0.3], **base}


def test_questions_of_different_kinds_are_told_apart():
    assert by_question(records(), "chains")[4096, "dense"] == [1.0, 0.5, 0.0]
    told = page(MANIFEST, list(records()))
    assert "facts 3" in told
    assert "KL p99" in told


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_the_page_fits_a_browser_and_loads_nothing(seen, tmp_path):
    sync = pytest.importorskip("playwright.sync_api")
    file = tmp_path / "report.html"
    file.write_text(page(MANIFEST, list(records()), read_heat(seen)))
    with sync.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        shown = browser.new_page(viewport={"width": 1280, "height": 900})
        asked, said = [], []
        shown.on("request", lambda request: asked.append(request.url))
        shown.on("console", lambda message: said.append(message.text))
        shown.goto(file.as_uri())
        assert asked == [file.as_uri()]
        assert said == []
        assert shown.evaluate("document.documentElement.scrollWidth") <= 1280
        for chart_at in shown.query_selector_all("svg"):
            outside = chart_at.evaluate(
                "s => [...s.querySelectorAll('text')].filter(t => {const a = t.getBoundingClientRect(), "
                "b = s.getBoundingClientRect(); return a.left < b.left - 1 || a.right > b.right + 1}).length"
            )
            assert outside == 0
        dark = shown.eval_on_selector("mark.v8", "m => getComputedStyle(m).backgroundColor")
        assert dark == "rgba(213, 94, 0, 0.9)"
        browser.close()

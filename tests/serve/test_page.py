"""The page, driven in a headless browser."""

import shutil

import httpx
import pytest

from kvote.models import world

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
SAMPLE = world.sample("needle", 400, 3, 4)


def test_the_page_asks_no_other_host(server):
    page = httpx.get(server.url)
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    assert "http://" not in page.text
    assert "https://" not in page.text


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_document_is_read_and_asked_on_the_page(server, tmp_path):
    sync = pytest.importorskip("playwright.sync_api")
    with sync.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(server.url)
        page.fill("#text", SAMPLE.document)
        page.fill("#method", "tokenselect(top_k=48, sinks=16, window=64)")
        page.click("#read")
        page.wait_for_selector("#documents option:checked[value^='doc-']", state="attached")
        page.fill("#question", SAMPLE.questions[0].prompt)
        page.click("#ask")
        page.wait_for_selector("#heat span:nth-child(9)")
        assert page.inner_text("#answer").strip() == SAMPLE.questions[0].answer
        assert "tokenselect" in page.inner_text("#figures")
        page.screenshot(path=tmp_path / "page.png")
        browser.close()
    assert all(url.startswith(server.url) for url in asked)

"""The documentation page in a real browser: it shows the models, and "Execute" answers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.conftest import running

CHROMIUM = shutil.which("chromium")


@pytest.mark.skipif(CHROMIUM is None, reason="Debian's chromium is not installed")
def test_every_model_can_be_tried_out_in_the_page(tmp_path: Path) -> None:
    """On /docs each prediction, executed with its example, shows a 200; /redoc shows it; all comes from the server."""
    from playwright.sync_api import sync_playwright

    with running() as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 1600})
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        forbidden: list[str] = []  # by the page itself: they are not sent
        page.on("requestfailed", lambda request: forbidden.append(request.url) if request.failure == "csp" else None)
        page.goto(f"{server.url}/docs")
        page.wait_for_selector(".opblock-post")
        blocks = page.locator(".opblock-post:has([data-path$=':predict']), .opblock-post:has([data-path$='/infer'])")
        assert blocks.count() >= 12
        for index in range(blocks.count()):
            block = blocks.nth(index)
            block.locator(".opblock-summary-control").click()
            block.locator("button.execute").click()
            status = block.locator(".live-responses-table tbody .response-col_status").first
            status.wait_for()
            assert status.inner_text().startswith("200"), block.locator(".opblock-summary-path").inner_text()
            if index == 0:
                page.screenshot(path=tmp_path / "docs.png")
            block.locator(".opblock-summary-control").click()
        page.goto(f"{server.url}/redoc")
        page.wait_for_selector("h2:has-text('Predict with iris')")
        browser.close()
    assert (tmp_path / "docs.png").stat().st_size > 10_000
    assert not [url for url in asked if url not in forbidden and not url.startswith((server.url, "data:", "blob:"))]

"""The Authorize button of /docs in a real browser, on a server that is closed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from serving.access.key_store import KeyStore
from tests.conftest import running

CHROMIUM = shutil.which("chromium")


@pytest.mark.skipif(CHROMIUM is None, reason="Debian's chromium is not installed")
def test_authorize_shows_the_models_and_sends_the_key(tmp_path: Path) -> None:
    """Without a key the page shows no model; once authorized it shows all and Execute answers, until logout."""
    from playwright.sync_api import sync_playwright

    file = tmp_path / "serving.keys"
    key = KeyStore(file).create("app", frozenset({"predict"}))
    KeyStore(file).create("ci", frozenset({"deploy"}))
    with running("--keys", str(file)) as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 1600})
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(f"{server.url}/docs")
        page.wait_for_selector(".opblock-post")
        assert page.locator(".opblock", has_text="/v1/models/iris:predict").count() == 0
        page.locator("button.authorize").first.click()
        page.locator(".auth-container input").fill(key)
        page.locator(".auth-btn-wrapper button.authorize").click()
        page.locator(".auth-btn-wrapper button.btn-done").click()
        block = page.locator(".opblock", has_text="/v1/models/iris:predict")
        block.locator(".opblock-summary-control").click()
        block.locator("button.execute").click()
        status = block.locator("tr.response .response-col_status").first
        status.wait_for()
        assert status.inner_text().startswith("200")
        deploy = page.locator(".opblock", has_text="/v2/repository/models/{model}/load")
        deploy.locator(".opblock-summary-control").click()
        deploy.locator("input[placeholder=model]").fill("iris")
        deploy.locator("button.execute").click()
        status = deploy.locator("tr.response .response-col_status").first
        status.wait_for()
        assert status.inner_text().startswith("403")
        page.locator("button.authorize").first.click()
        page.locator(".auth-btn-wrapper button:has-text('Logout')").click()
        page.locator(".auth-btn-wrapper button.btn-done").click()
        block.wait_for(state="detached")
        browser.close()
    assert not faults

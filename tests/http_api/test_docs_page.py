"""The documentation page in a real browser: it shows the models, "Execute" answers, and "Authorize" sends the key."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serving.access.key_store import KeyStore
from tests.conftest import MODELS, running

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Debian's chromium is not installed")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def iris(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model: the page lays each of them out anew with every answer."""
    return Path(shutil.copytree(MODELS / "iris", tmp_path_factory.mktemp("models") / "iris")).parent


def execute(block: Any) -> str:
    """Open the block of an operation, and return the status that it shows once executed."""
    block.locator(".opblock-summary-control").click()
    return executed(block)


def executed(block: Any) -> str:
    block.locator("button.execute").click()
    status = block.locator(".live-responses-table tbody .response-col_status").first
    status.wait_for()
    return str(status.inner_text())[:3]


def test_a_prediction_can_be_tried_out_in_the_page(browser: Any, iris: Path, tmp_path: Path) -> None:
    """On /docs a prediction, executed with its example, shows a 200; /redoc shows it; all comes from the server."""
    with running(models=iris) as server:
        page = browser.new_page(viewport={"width": 1280, "height": 1600})
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        forbidden: list[str] = []  # by the page itself: they are not sent
        page.on("requestfailed", lambda request: forbidden.append(request.url) if request.failure == "csp" else None)
        page.goto(f"{server.url}/docs")
        for path in ("/v1/models/iris:predict", "/v2/models/iris/infer"):
            assert execute(page.locator(f".opblock-post:has([data-path='{path}'])")) == "200", path
        page.screenshot(path=tmp_path / "docs.png")
        page.goto(f"{server.url}/redoc")
        page.wait_for_selector("h2:has-text('Predict with iris')")
        page.close()
    assert (tmp_path / "docs.png").stat().st_size > 10_000
    assert not [url for url in asked if url not in forbidden and not url.startswith((server.url, "data:", "blob:"))]


def test_authorize_shows_the_models_and_sends_the_key(browser: Any, iris: Path, tmp_path: Path) -> None:
    """Without a key the page shows no model; once authorized it shows all and Execute answers, until logout."""
    file = tmp_path / "serving.keys"
    key = KeyStore(file).create("app", frozenset({"predict"}))
    KeyStore(file).create("ci", frozenset({"deploy"}))
    with running("--keys", str(file), models=iris) as server:
        page = browser.new_page(viewport={"width": 1280, "height": 1600})
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(f"{server.url}/docs")
        page.wait_for_selector(".opblock-post")
        predict = page.locator(".opblock-post:has([data-path='/v1/models/iris:predict'])")
        assert predict.count() == 0
        page.locator("button.authorize").first.click()
        page.locator(".auth-container input").fill(key)
        page.locator(".auth-btn-wrapper button.authorize").click()
        page.locator(".auth-btn-wrapper button.btn-done").click()
        assert execute(predict) == "200"
        load = page.locator(".opblock-post:has([data-path='/v2/repository/models/{model}/load'])")
        load.locator(".opblock-summary-control").click()
        load.locator("input[placeholder=model]").fill("iris")
        assert executed(load) == "403"
        page.locator("button.authorize").first.click()
        page.locator(".auth-btn-wrapper button:has-text('Logout')").click()
        page.locator(".auth-btn-wrapper button.btn-done").click()
        predict.wait_for(state="detached")
        page.close()
    assert not faults

"""The playground in headless Chromium."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import RunningServer

CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium; Debian has a package of this name")


def test_the_page_names_no_outside_resource(server: RunningServer) -> None:
    response = httpx.get(server.url)
    assert not re.findall(r"https?://|//[a-z]|@import|url\(", response.text)
    assert re.findall(r'(?:src|href)="([^"]*)"', response.text) == ["data:,"]
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def open_page(browser: Any, server: RunningServer, width: int, **settings: Any) -> tuple[Any, list[str]]:
    """Return the page, ready for a prompt, and everything that its console says or it asks others for."""
    page = browser.new_page(viewport={"width": width, "height": 844}, **settings)
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "request",
        lambda request: None if request.url.startswith((server.url, "data:")) else complaints.append(request.url),
    )
    page.goto(server.url)
    page.get_by_label("Model").first.wait_for()
    return page, complaints


@needs_chromium
@pytest.mark.slow
def test_a_text_is_generated_and_looked_at_by_keyboard(browser: Any, server: RunningServer) -> None:
    page, complaints = open_page(browser, server, 390)
    page.get_by_label("Prompt").fill("The quick brown")
    page.get_by_label("New tokens").fill("12")
    page.keyboard.press("Control+Enter")
    page.get_by_text("Finished: ").wait_for()
    tokens = page.locator(".token:visible")
    assert tokens.count() > 2
    assert all("e" + number in "e0e1e2" for number in re.findall(r"\be(\d)", tokens.first.get_attribute("class")))
    page.get_by_label("Send as a chat message").focus()
    for _ in range(4):  # past the three experts
        page.keyboard.press("Tab")
    assert page.evaluate("() => document.activeElement === document.querySelector('.token:not([hidden])')")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("() => document.activeElement === document.querySelectorAll('.token:not([hidden])')[1]")
    assert page.get_by_role("table", name="Share of each expert in the token").locator("tr").count() == 3
    assert page.get_by_role("table", name="Probabilities of tokens").get_by_text("(chosen)").count() == 1
    assert page.evaluate("() => document.documentElement.scrollWidth") == 390
    assert complaints == []
    page.close()


@needs_chromium
@pytest.mark.slow
def test_two_models_side_by_side_and_experts_off(browser: Any, server: RunningServer) -> None:
    page, complaints = open_page(browser, server, 1440)
    page.get_by_label("New tokens").fill("10")
    page.get_by_label("Compare two models").check()
    first, second = (page.locator("#columns section").nth(number) for number in (0, 1))
    assert first.bounding_box()["y"] == second.bounding_box()["y"]
    second.get_by_label("Model").select_option("ensemble")
    for name in ("code", "news"):
        second.get_by_role("checkbox", name=name).uncheck()
    page.get_by_role("button", name="Generate").click()
    page.get_by_text("Finished: ").wait_for()
    classes = [token.get_attribute("class") for token in second.locator(".token").all()]
    assert classes
    assert set(classes) == {"token e1"}
    for name in ("code", "law", "news"):
        first.get_by_role("checkbox", name=name).uncheck()
    page.get_by_role("button", name="Generate").click()
    page.get_by_role("alert").get_by_text("no expert is left").wait_for()
    assert [line for line in complaints if "400" not in line] == []  # Chromium reports each answer of this kind
    page.close()


@needs_chromium
@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(browser: Any, server: RunningServer, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python")
    page, _ = open_page(browser, server, 390, color_scheme=scheme, bypass_csp=True)
    page.get_by_label("New tokens").fill("12")
    page.keyboard.press("Control+Enter")
    page.get_by_text("Finished: ").wait_for()
    page.locator(".token:visible").first.click()
    page.add_script_tag(content=(Path(str(files(axe))) / "axe.min.js").read_text(encoding="utf-8"))
    found = page.evaluate("async () => (await axe.run()).violations.map((one) => [one.id, one.impact])")
    assert [name for name, impact in found if impact in ("serious", "critical")] == []
    page.close()

"""The report in a real browser, Chromium without a window: on a phone and on a desk, in the light and in the dark.

Asked for with `-m browser`. CHROMIUM names the browser where it is not `chromium` on the PATH; where there is none the
tests are skipped, unless BROWSER_TESTS=required, as in `.ci/run`.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import runs

from finetune import cli
from finetune.report.serving import Server

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser
QUIET = ["--no-sandbox", "--disable-quic", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--no-first-run"]  # fmt: skip
PHONE, DESK = {"width": 390, "height": 844}, {"width": 1440, "height": 900}
SCREENS = [(size, scheme) for size in (PHONE, DESK) for scheme in ("light", "dark")]


def missing(what: str) -> None:
    if os.environ.get("BROWSER_TESTS") == "required":
        pytest.fail(f"{what}; BROWSER_TESTS=required asks for it.")
    pytest.skip(what)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("playwright is not installed: pip install -c constraints.txt -e '.[dev]'")
    if chromium is None:
        missing("no Chromium: apt-get install chromium, or name one with CHROMIUM=/path/to/it")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=QUIET)
        yield started
        started.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with all there is: two concepts, alarms, hostile captions, pictures that are gone."""
    run = runs.whole(tmp_path_factory.mktemp("browser") / "run", captions=(*runs.HOSTILE, "a" * 300))
    told = runs.table(concepts=("sks dog", runs.HOSTILE[1]))
    told["facts"]["prompts"] = [[runs.HOSTILE[0], "sks dog " * 30]]
    (run / "evaluation/table.json").write_text(json.dumps(told))
    (run / "evaluation/step-000100/class-01-seed0.png").unlink()
    (run / "run.json").unlink()
    cli.main(["report", str(run)])
    return run / "report.html"


@pytest.fixture
def complaints() -> Iterator[list[str]]:
    """What a browser complained of and whom it asked for something: nobody, when the test ends."""
    heard: list[str] = []
    yield heard
    assert heard == []


def opened(browser: Browser, address: str, complaints: list[str], **how: object) -> Page:
    page = browser.new_context(**how).new_page()  # type: ignore[arg-type]
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda asked: None if allowed(asked.url, address) else complaints.append(asked.url))
    page.goto(address)
    return page


def allowed(url: str, address: str) -> bool:
    return url.startswith("data:") or url in (address, f"{address}version")


@pytest.mark.parametrize(("size", "scheme"), SCREENS)
def test_it_fits_every_screen_and_everybody_can_read_it(
    browser: Browser, report: Path, complaints: list[str], size: dict[str, int], scheme: str
) -> None:
    from axe_playwright_python.sync_playwright import Axe

    page = opened(browser, report.as_uri(), complaints, viewport=size, color_scheme=scheme)
    for _ in range(2):
        wide = page.evaluate("[...document.querySelectorAll('body *')].filter((one) => !one.closest('nav, .scroll, "
                             ".unseen, .skip, svg') && one.getBoundingClientRect().right > innerWidth + 0.5)"
                             ".map((one) => one.outerHTML.slice(0, 120))")  # fmt: skip
        assert wide == [] and page.evaluate("document.documentElement.scrollWidth") == size["width"]
        found = Axe().run(page)
        assert found.violations_count == 0, found.generate_report()
        assert page.evaluate("[...document.images].every((one) => one.complete && one.naturalWidth > 0)")
        page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        page.locator("#all").click()
    shade = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, shade[4:-1].split(","))) < 150) == (scheme == "dark")
    page.context.close()


@pytest.mark.parametrize("size", [PHONE, DESK])
def test_the_slider_goes_through_the_states(
    browser: Browser, report: Path, complaints: list[str], size: dict[str, int]
) -> None:
    page = opened(browser, report.as_uri(), complaints, viewport=size)
    slider, at = page.get_by_role("slider", name="State"), page.locator("#at")

    def shown() -> list[str]:
        names = "(all) => [...new Set(all.map((one) => one.dataset.name))]"
        return list(page.locator(".prompts .cells > li:visible").evaluate_all(names))

    assert at.text_content() == "step 200, chosen" and shown() == ["step 200, chosen"]
    slider.focus()
    page.keyboard.press("ArrowRight")
    assert at.text_content() == "result" == slider.get_attribute("aria-valuetext") and shown() == ["result"]
    page.keyboard.press("Home")
    assert shown() == ["base"]
    box = slider.bounding_box()
    assert box is not None
    slider.click(position={"x": box["width"] / 3, "y": box["height"] / 2})
    assert shown() == ["step 100"]
    page.get_by_role("button", name="Show all").press("Enter")
    assert shown() == ["base", "step 100", "step 200, chosen", "result"]
    slider.focus()
    page.keyboard.press("End")
    assert shown() == ["result"], "the slider leads back to one"
    page.context.close()


def test_without_scripts_and_on_paper_the_whole_grid_shows(
    browser: Browser, report: Path, complaints: list[str]
) -> None:
    bare = opened(browser, report.as_uri(), complaints, viewport=PHONE, java_script_enabled=False)
    assert bare.locator(".prompts figure:visible").count() == 4 * 4 and not bare.locator("#slider").is_visible()
    bare.context.close()
    page = opened(browser, report.as_uri(), complaints, viewport=DESK)
    assert page.locator(".prompts figure:visible").count() == 4
    page.emulate_media(media="print")
    assert page.locator(".prompts figure:visible").count() == 4 * 4 and not page.locator("nav").is_visible()
    page.context.close()


def test_the_skip_link_leads_to_the_verdict(browser: Browser, report: Path, complaints: list[str]) -> None:
    page = opened(browser, report.as_uri(), complaints, viewport=PHONE)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
    page.keyboard.press("Enter")
    assert page.evaluate("location.hash") == "#verdict"
    page.context.close()


def test_a_served_page_follows_the_run_and_keeps_what_was_opened(
    browser: Browser, tmp_path: Path, complaints: list[str]
) -> None:
    run = runs.whole(tmp_path / "run")
    runs.state(run, "running", 100)
    runs.log(run, 100)
    with Server(run, 0) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        page = opened(browser, server.address, complaints, viewport=PHONE)
        page.get_by_text("follows the run").wait_for()
        page.get_by_role("slider", name="State").press("Home")
        page.locator("#settings summary").first.click()
        runs.log(run, 200)
        page.get_by_text("200 of 300 steps").wait_for()
        assert page.locator("#at").text_content() == "base"
        assert page.locator("#settings details").first.get_attribute("open") is not None
        page.get_by_role("slider", name="State").press("End")
        assert page.locator("#at").text_content() == "result", "the slider of the new page works too"
        page.context.close()
        server.shutdown()

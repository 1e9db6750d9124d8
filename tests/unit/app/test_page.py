"""The page at `/`, in headless Chromium."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from api_harness import Server
from playwright.sync_api import Browser, Page, expect, sync_playwright

CHROMIUM = shutil.which("chromium")
NUMBER = re.compile(r"^\d\.\d\d$")


@pytest.fixture(scope="module")
def server(artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Run the service, which no page changes, once for all of them."""
    consoles = '{"Grafana": "http://grafana.example:3000/"}'
    server = Server(
        tmp_path_factory.mktemp("page"), artifacts, WINEMON_CONSOLES=consoles, WINEMON_WORKERS="1"
    )
    server.ready()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """Start a browser; each page is in a context of its own."""
    if CHROMIUM is None:
        pytest.skip("chromium is not installed: apt install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(server: Server, chromium: Browser) -> Iterator[tuple[Page, list[str]]]:
    """Open the page of a running service; anything that the browser's console says fails the test."""
    said: list[str] = []
    page = chromium.new_page(viewport={"width": 1200, "height": 900})
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(f"http://127.0.0.1:{server.port}/")
    expect(page.locator("#quality")).to_have_text(NUMBER)
    yield page, said
    page.close()
    assert said == []


def test_a_changed_input_changes_the_prediction(page: tuple[Page, list[str]]) -> None:
    browser, _ = page
    before = browser.locator("#quality").inner_text()
    browser.get_by_label("alcohol, %", exact=True).fill("14")
    expect(browser.locator("#quality")).not_to_have_text(before)
    expect(browser.locator("#quality")).to_have_text(NUMBER)
    expect(browser.locator("#note")).to_have_text("by model 1.0.0")


def test_a_slider_moves_by_keyboard(page: tuple[Page, list[str]]) -> None:
    browser, _ = page
    number = browser.get_by_label("alcohol, %", exact=True)
    before, quality = number.input_value(), browser.locator("#quality").inner_text()
    browser.get_by_label("alcohol, slider over the training range").focus()
    browser.keyboard.press("End")
    assert float(number.input_value()) > float(before)
    expect(browser.locator("#quality")).not_to_have_text(quality)


def test_says_how_unusual_a_value_is(page: tuple[Page, list[str]]) -> None:
    browser, _ = page
    number, says = browser.get_by_label("pH", exact=True), browser.locator("#ph-says")
    expect(says).to_have_text(re.compile(r"^usual: \d+ % of the wines have this or (less|more); trained on"))
    number.fill("5.2")
    expect(says).to_have_text(re.compile(r"^unusual: .+ % of the wines have this or more; trained on"))
    number.fill("1.8")
    expect(says).to_contain_text("of the wines have this or less")
    number.fill("13")
    expect(says).to_contain_text("outside the training data; trained on")
    expect(browser.locator("#quality")).to_have_text(NUMBER)


def test_a_value_that_many_wines_share_is_usual_at_the_edge_of_the_range_too(
    page: tuple[Page, list[str]],
) -> None:
    browser, _ = page
    # Of the training data: 8 % have no citric acid, and few have a pH of 2.74.
    citric_acid = {"edges": [0, 0.01, 0.06, 0.12, 0.2, 0.5, 1], "shares": [0.08, 0.1, 0.12, 0.2, 0.4, 0.1]}
    ph = {"edges": [2.74, 3.12, 3.19, 3.31, 3.52, 4.01], "shares": [0.09, 0.11, 0.3, 0.4, 0.1]}
    for feature, value, at_most, at_least in (
        (citric_acid, 0, 0.08, 1),
        (citric_acid, 0.01, 0.08 + 0.1 / 5, 0.92),
        (citric_acid, 1, 1, 0.1 / 51),
        (ph, 2.74, 0.09 / 38, 1),
        (ph, 4.01, 1, 0.1 / 50),
        ({"edges": [3, 3], "shares": [1]}, 3, 1, 1),
    ):
        shares = browser.evaluate("([feature, value]) => shares(feature, value)", [feature, value])
        assert shares == {"atMost": pytest.approx(at_most), "atLeast": pytest.approx(at_least)}
    for feature, value in ((citric_acid, -0.1), (ph, 4.02)):
        assert browser.evaluate("([feature, value]) => shares(feature, value)", [feature, value]) is None


@pytest.mark.parametrize(
    ("typed", "message"), [("", "enter a number"), ("-1", "at least 0"), ("15", "at most 14")]
)
def test_says_what_is_wrong_with_a_value(page: tuple[Page, list[str]], typed: str, message: str) -> None:
    browser, _ = page
    number, says = browser.get_by_label("pH", exact=True), browser.locator("#ph-says")
    number.fill(typed)
    expect(says).to_contain_text(message)
    expect(number).to_have_attribute("aria-invalid", "true")
    expect(browser.locator("#quality")).to_have_text("\u2013")
    number.fill("3.3")
    expect(browser.locator("#quality")).to_have_text(NUMBER)


def test_shows_what_the_service_finds_wrong(page: tuple[Page, list[str]]) -> None:
    browser, said = page
    browser.get_by_label("density, g/cm3", exact=True).fill("1e31")
    expect(browser.locator("#density-says")).to_contain_text("Input should be less than or equal to")
    expect(browser.locator("#quality")).to_have_text("\u2013")
    assert [text for text in said if "422" not in text] == []
    said.clear()  # the browser itself reports the refusal


def test_shows_the_card_and_the_way_to_the_consoles(page: tuple[Page, list[str]]) -> None:
    browser, _ = page
    expect(browser.locator("#card")).to_contain_text("ExtraTreesRegressor")
    expect(browser.get_by_role("link", name="Grafana")).to_have_attribute(
        "href", "http://grafana.example:3000/"
    )


def test_fits_a_phone(page: tuple[Page, list[str]]) -> None:
    browser, _ = page
    browser.set_viewport_size({"width": 360, "height": 740})
    assert browser.evaluate("document.documentElement.scrollWidth") <= 360

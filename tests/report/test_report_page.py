"""A report in a browser: curves, zoom, light and dark, a phone. Needs Debian's chromium and chromium-driver."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.checkpoints import save_lut
from shared.runs import complete, pretraining_lines, write_run
from util.report.attention import attention_maps
from util.report.report import report
from util.results.run_folder import open_runs

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
BROWSER = shutil.which("chromium")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="no chromium and chromedriver here: apt-get install them"),
]
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync --disable-dev-shm-usage"
)
PATIENCE = 60.0  # seconds; a machine may be busy


class Browser:
    """Chromium over one page."""

    def __init__(self, profile: Path):
        options = webdriver.ChromeOptions()
        options.binary_location = BROWSER
        for flag in [*FLAGS.split(), f"--user-data-dir={profile}", "--window-size=1280,900"]:
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
        self.driver.set_page_load_timeout(PATIENCE)
        self.driver.set_script_timeout(PATIENCE)

    def open(self, path: Path, width: int = 1280, height: int = 900, scheme: str = "light") -> None:
        """Load the page anew, with a screen of this size."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        scheme = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", scheme)
        self.driver.get(path.as_uri())
        self.run("localStorage.clear()")
        self.driver.refresh()
        self.wait(lambda: self.run("return document.querySelectorAll('.js-line').length > 0"))

    def run(self, script: str, *arguments: Any) -> Any:
        """JavaScript in the page."""
        return self.driver.execute_script(script, *arguments)

    def wait(self, holds: Callable[[], Any]) -> None:
        """Until it does."""
        end = time.monotonic() + PATIENCE
        while not holds():
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.05)

    def ranges(self) -> dict[str, list[float]]:
        """Return the range of the horizontal axis of each panel."""
        script = (
            "return Object.fromEntries([...document.querySelectorAll('.panel')].map(p =>"
            " [p.dataset.panel, p.querySelector('.plot')._fullLayout.xaxis.range.map(Number)]))"
        )
        return self.run(script)

    def lines(self, panel: str) -> list[str]:
        """Return the paths of the visible curves of a panel."""
        script = (
            "return [...document.querySelectorAll(`[data-panel=${arguments[0]}] .js-line`)]"
            ".filter(p => parseFloat(p.style.strokeWidth) > 0).map(p => p.getAttribute('d'))"
        )
        return self.run(script, panel)

    def lengths(self, panel: str) -> list[float]:
        """Return the lengths of these paths in pixels."""
        script = (
            "return [...document.querySelectorAll(`[data-panel=${arguments[0]}] .js-line`)]"
            ".filter(p => parseFloat(p.style.strokeWidth) > 0).map(p => p.getTotalLength())"
        )
        return self.run(script, panel)

    def drag(self, panel: str, begin: float, end: float) -> None:
        """Over a plot, from one share of its width to another."""
        plot = self.driver.find_element("css selector", f"[data-panel={panel}] .nsewdrag")
        self.run("arguments[0].scrollIntoView({block: 'center'})", plot)
        width = plot.size["width"]
        chain = webdriver.ActionChains(self.driver)
        chain.move_to_element_with_offset(plot, round((begin - 0.5) * width), -20).click_and_hold()
        chain.move_by_offset(round((end - begin) * width), 40).release().perform()


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """Return a report of two long runs with pictures, a checkpoint, and names that are no HTML."""
    folder = tmp_path_factory.mktemp("runs")
    first = write_run(folder / "lut", pretraining_lines(30, 100), pictures=(0, 10, 20, 30), finished={"knn": 49.0})
    complete(save_lut(first / "checkpoint-29.pth"), epoch=29, step=3000)
    write_run(folder / "mae", pretraining_lines(12, 100), pictures=(0, 10))
    labels = ["LUT </script><b>", "a rather long name of a run, without a chance to fit on a phone" + "_x" * 40]
    runs = open_runs([str(folder / "lut"), str(folder / "mae")], labels)
    path = folder / "report.html"
    path.write_text(report(runs, "Two <runs>", attention_maps(runs, (), torch.device("cpu"))), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    """Start one browser for all tests."""
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.driver.quit()


def test_it_loads_from_disk_without_an_error_and_without_the_network(browser, page):
    browser.open(page)
    assert browser.driver.title == "Two <runs>"
    assert browser.driver.get_log("browser") == []
    loaded = browser.run("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [name for name in loaded if not name.startswith("data:")] == []
    assert browser.run("return [...document.images].every(i => i.complete && i.naturalWidth > 0)")


def test_all_curves_are_drawn(browser, page):
    browser.open(page)
    panels = browser.run("return [...document.querySelectorAll('.panel')].map(p => p.dataset.panel)")
    assert {"loss", "mim", "bc", "lr", "knn", "rankme", "images_per_second", "data_wait", "memory_bytes"} <= set(panels)
    for panel in panels:
        lengths = browser.lengths(panel)
        assert len(lengths) == 2, panel
        assert min(lengths) > 70, panel
    band = browser.run("return document.querySelector('[data-panel=loss] .js-fill').getAttribute('d')")
    assert band.count("L") > 100  # the extremes of what thinning has put together


def test_zoom_by_dragging_moves_all_panels_and_goes_back(browser, page):
    browser.open(page)
    full_ranges = browser.ranges()
    assert all(limits == full_ranges["loss"] for limits in full_ranges.values())
    before = browser.lines("knn")
    browser.drag("loss", 0.25, 0.5)
    browser.wait(lambda: len(set(map(tuple, browser.ranges().values()))) == 1 and browser.ranges() != full_ranges)
    low, high = browser.ranges()["loss"]
    length = full_ranges["loss"][1] - full_ranges["loss"][0]
    assert low == pytest.approx(full_ranges["loss"][0] + 0.25 * length, abs=0.02 * length)
    assert high == pytest.approx(full_ranges["loss"][0] + 0.5 * length, abs=0.02 * length)
    assert browser.lines("knn") != before

    def tall() -> list[float]:
        return browser.run("return document.querySelector('[data-panel=loss] .plot')._fullLayout.yaxis.range")

    dragged = tall()
    plot = browser.driver.find_element("css selector", "[data-panel=knn] .nsewdrag")
    browser.run("arguments[0].scrollIntoView({block: 'center'})", plot)
    webdriver.ActionChains(browser.driver).double_click(plot).perform()
    browser.wait(lambda: browser.ranges() == full_ranges)
    browser.wait(lambda: tall() != dragged)  # what was cut off above and below is seen again too
    browser.drag("lr", 0.1, 0.4)
    browser.wait(lambda: browser.ranges()["loss"] != full_ranges["loss"])
    browser.driver.find_element("id", "reset").click()
    browser.wait(lambda: browser.ranges() == full_ranges)
    assert browser.driver.get_log("browser") == []


def test_axes_smoothing_logarithm_and_single_runs(browser, page):
    browser.open(page)
    for axis, last in (("epochs", 30), ("time", 6001 / 60)):  # 2 s per update, in minutes up to two hours
        browser.run("document.querySelector(`[name=axis][value=${arguments[0]}]`).click()", axis)
        high = browser.ranges()["loss"][1]
        assert high == pytest.approx(1.02 * last, rel=0.01)
    browser.run("document.querySelector('[name=axis][value=share]').click()")
    lengths = browser.lengths("loss")  # 3000 and 1200 updates, and both are as wide as the panel
    assert min(lengths) > 250
    ends = "return [...document.querySelector('[data-panel=loss] .plot').data].map(t => t.x.at(-1))"
    assert all(end == pytest.approx(100, abs=0.1) for end in browser.run(ends))
    browser.run("document.querySelector('[name=axis][value=time]').click()")
    title = "return document.querySelector('[data-panel=loss] .plot')._fullLayout.xaxis.title.text"
    assert browser.run(title) == "minutes"

    rough = browser.lines("loss")
    slide = "const s = document.getElementById('smoothing'); s.value = 0.9; s.dispatchEvent(new Event('input'))"
    browser.run(slide)
    assert len(browser.lines("loss")) == 2 * len(rough)  # each beside its rough one
    mode = "return document.querySelector('[data-panel=loss] .plot')._fullLayout.yaxis.type"
    assert browser.run(mode) == "linear"
    browser.run("document.querySelector('[data-panel=loss] .log').click()")
    assert browser.run(mode) == "log"
    browser.run("document.querySelector('[data-panel=loss] .large').click()")
    browser.wait(lambda: browser.run("return document.querySelector('[data-panel=loss] .plot').clientWidth") > 900)
    browser.run("document.querySelector('.chip[data-run=\"0\"]').click()")
    assert len(browser.lines("loss")) == 2
    assert browser.ranges()["loss"][1] == pytest.approx(1.02 * 2401 / 60, rel=0.01)  # of the run that is left
    assert browser.driver.get_log("browser") == []


def test_the_film_shows_each_run_at_the_chosen_epoch(browser, page):
    browser.open(page)
    shown = "return [...document.querySelectorAll('.frames > div:not([hidden])')].map(f => Number(f.dataset.epoch))"
    assert browser.run(shown) == [30, 10]
    move = "const s = document.getElementById('film'); s.value = arguments[0]; s.dispatchEvent(new Event('input'))"
    browser.run(move, 0)
    assert browser.run(shown) == [0, 0]
    browser.run(move, 2)
    assert browser.run(shown) == [20, 10]
    browser.run("document.getElementById('play').click()")
    browser.wait(lambda: browser.run(shown) != [20, 10])


# Elements with words of their own, and ticks of the plots: contrast of text and ground by WCAG 2.1
CONTRAST = """
const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
const light = (rgb) => {
  const linear = (c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const [r, g, b] = rgb.slice(0, 3).map(c => linear(c / 255));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const ground = (node) => {
  for (; node; node = node.parentElement) {
    const colour = numbers(getComputedStyle(node).backgroundColor);
    if (colour.length < 4 || colour[3] === 1) return colour;
  }
  return [255, 255, 255];
};
const worded = [...document.querySelectorAll('body *')].filter(e => e.checkVisibility()
  && !e.closest('script, .hovertext') && [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()));
return worded.map(e => {
  const style = getComputedStyle(e), text = numbers(e.namespaceURI.includes('svg') ? style.fill : style.color);
  const [a, b] = [light(text), light(ground(e))].sort((x, y) => y - x);
  return [(a + 0.05) / (b + 0.05), e.tagName, e.textContent.slice(0, 40)];
});
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_are_readable_in_light_and_dark_and_the_button_changes_between(browser, page, scheme):
    browser.open(page, scheme=scheme)
    lightness = "return getComputedStyle(document.body).backgroundColor"
    grounds = [browser.run(lightness)]
    for _ in range(2):
        contrasts = browser.run(CONTRAST)
        assert len(contrasts) > 150
        assert any(tag == "text" for _, tag, _ in contrasts)  # of the plots
        low = [entry for entry in contrasts if entry[0] < 4.5]
        assert low == []
        browser.driver.find_element("id", "theme").click()
        grounds.append(browser.run(lightness))
    assert grounds[0] == grounds[2] != grounds[1]
    dark = [sum(map(int, ground.strip("rgb()").split(","))) < 384 for ground in grounds]
    assert dark == [scheme == "dark", scheme == "light", scheme == "dark"]
    browser.driver.refresh()
    assert browser.run("return document.documentElement.dataset.theme") == scheme  # the choice is kept


def test_curves_can_be_told_from_their_ground(browser, page):
    script = (
        "return [...document.querySelectorAll('[data-panel=loss] .js-line')].filter(p =>"
        " parseFloat(p.style.strokeWidth) > 0).map(p => p.style.stroke)"
    )
    strokes = []
    for scheme in ("light", "dark"):
        browser.open(page, scheme=scheme)
        strokes.append(browser.run(script))
        assert len(set(strokes[-1])) == 2
    assert not set(strokes[0]) & set(strokes[1])


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_scrolls_sideways(browser, page, width):
    browser.open(page, width=width, height=844)
    browser.run("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    wide, screen = browser.run("return [document.documentElement.scrollWidth, innerWidth]")
    assert wide <= screen == width
    over = browser.run(
        "return [...document.querySelectorAll('body > *, section, .card, .panel, .film, .attention')]"
        ".filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.className || e.tagName)"
    )
    assert over == []
    links = browser.run(
        "return [...document.querySelectorAll('.links a')].map(a => a.getBoundingClientRect())"
        ".map(box => [box.left, box.right])"
    )
    assert len(links) == 8
    assert all(0 <= left < right <= width for left, right in links)  # none is reached by scrolling alone
    assert browser.run(
        "return Math.min(...[...document.querySelectorAll('.plot')].map(p => p.clientWidth))"
    ) > 0.7 * min(width, 400)

"""The dashboard in a real browser: it asks nobody else, runs nobody's script, fits every width, and grows
under the eyes of its reader without taking their choices away."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from salt_vla.operations.queue import Queue
from salt_vla.rundir import RunDirectory

pytest.importorskip("dash_ag_grid", reason="the extra `dashboard` is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="the extra `browser` is not installed")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

WIDTHS = (400, 900, 1500)
READY = {
    "/runs": "#runs-table .ag-row",
    "/run/failed": "#run-graph .scatterlayer .trace",
    "/compare": "#compare-answer",
    "/queue": "#queue-table .ag-row",
    "/caches": "#caches-table .ag-row",
}
PATIENCE = 60_000  # milliseconds, on a machine that does much else


class Tab:
    """A tab of the browser, and everything that it asked for or complained of."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.asked: list[str] = []
        self.wrong: list[str] = []
        page.set_default_timeout(PATIENCE)
        page.on("request", lambda request: self.asked.append(request.url))
        page.on("websocket", lambda socket: self.asked.append(socket.url))
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        page.on("console", self._heard)

    def _heard(self, message: Any) -> None:
        if message.type == "error" or "Content Security Policy" in message.text:
            self.wrong.append(message.text)

    def open(self, address: str, path: str) -> None:
        self.page.goto(address + path)
        self.page.wait_for_selector(READY.get(path, "#runs-table .ag-row"))

    def expect_chosen(self, *names: str) -> None:
        """Once the table has drawn its cells, which it does after its rows."""
        self.page.wait_for_function(
            """names => {
                const cells = document.querySelectorAll('#runs-table .ag-row-selected .ag-cell[col-id=name]')
                const shown = new Set([...cells].map(cell => cell.innerText.trim()))
                return [...shown].sort().join() == names.join()
            }""",
            arg=sorted(names),
            polling=200,
        )

    def choose(self, name: str) -> None:
        self.page.locator(f"#runs-table [row-id={name}] .ag-selection-checkbox input").first.click()

    def drawn(self, script: str) -> Any:
        """Of the graph of the table's page, as `graph`."""
        return self.page.evaluate(
            f"() => {{const graph = document.querySelector('#runs-graph .js-plotly-plot'); return {script}}}"
        )

    def wait(self, script: str) -> None:
        self.page.wait_for_function(
            f"() => {{const graph = document.querySelector('#runs-graph .js-plotly-plot'); return {script}}}",
            polling=200,
        )


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as library:
        # Without its sandbox it can run as root, as in a container; it opens our own page alone.
        made = library.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def open_tab(browser: Any) -> Iterator[Callable[..., Tab]]:
    """`open_tab(width=1500)`"""
    contexts: list[Any] = []

    def make(width: int = 1500) -> Tab:
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}))
        return Tab(contexts[-1].new_page())

    yield make
    for context in contexts:
        context.close()


@pytest.mark.parametrize("width", WIDTHS)
def test_every_part_fits_asks_nobody_else_and_runs_nobodys_script(
    open_tab: Callable[..., Tab], page: Any, width: int
) -> None:
    tab = open_tab(width)
    for path, ready in READY.items():
        if path in ("/runs", "/run/failed"):
            tab.open(page.address, path)
        else:
            tab.page.click(f"#to-{path[1:]}")
            tab.page.wait_for_selector(ready)
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= width, path
        assert tab.page.title() == "salt-vla"
    elsewhere = [url for url in tab.asked if not url.startswith((page.address + "/", "data:"))]
    assert len(tab.asked) > 20 and not elsewhere
    assert not tab.wrong
    assert not tab.page.evaluate("document.querySelectorAll('img[src=x]').length")


def test_words_of_runs_are_words(open_tab: Callable[..., Tab], page: Any, evil: str) -> None:
    tab = open_tab()
    tab.open(page.address, "/runs")
    tab.page.locator("#runs-table [row-id=failed] [col-id=name]").click()
    tab.page.wait_for_selector("#run-log pre")
    assert tab.page.url == f"{page.address}/run/failed"
    assert f"RuntimeError: {evil}" in tab.page.inner_text("#run-state")
    assert evil in tab.page.inner_text("#run-log") and evil in tab.page.inner_text("#run-about")
    picture = tab.page.locator("#run-pictures img")
    assert picture.evaluate("async image => {await image.decode(); return image.naturalWidth}") > 0
    tab.open(page.address, "/queue")
    assert evil in tab.page.inner_text("#queue-table")
    assert tab.page.title() == "salt-vla" and not tab.wrong


def test_a_curve_grows_while_zoom_choice_and_filter_stay(
    open_tab: Callable[..., Tab], page: Any, traps: Path, step_of: Callable[[RunDirectory, int], None]
) -> None:
    tab = open_tab()
    tab.open(page.address, "/runs")
    tab.wait("graph && graph.data && graph.data.length > 0")
    tab.expect_chosen("at_work")  # What runs is worth a look at first.
    tab.choose("finished")
    tab.wait("new Set(graph.data.map(each => each.name)).size == 2")
    points = tab.drawn("Math.max(...graph.data.find(each => each.name == 'at_work').x)")
    box = tab.page.locator("#runs-graph .draglayer .nsewdrag").first.bounding_box()
    tab.page.mouse.move(box["x"] + 0.2 * box["width"], box["y"] + 0.3 * box["height"])
    tab.page.mouse.down()
    tab.page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 0.7 * box["height"], steps=4)
    tab.page.mouse.up()
    zoomed = tab.drawn("graph.layout.xaxis.range")
    assert zoomed[0] > 0 and not tab.drawn("graph.layout.xaxis.autorange")
    run = RunDirectory(traps / "runs" / "at_work")
    for step in range(int(points) + 1, int(points) + 21):
        step_of(run, step)
    tab.wait(f"Math.max(...graph.data.find(each => each.name == 'at_work').x) >= {points + 20}")
    assert tab.drawn("graph.layout.xaxis.range") == zoomed
    tab.expect_chosen("at_work", "finished")
    cell = tab.page.locator("#runs-table [row-id=at_work] [col-id=steps]")
    playwright.expect(cell).to_have_text(f"{points + 20} of 100")
    tab.page.fill("#runs-search", "finis")
    playwright.expect(tab.page.locator("#runs-table .ag-center-cols-container .ag-row")).to_have_count(1)
    assert not tab.wrong


def test_what_is_chosen_is_compared(open_tab: Callable[..., Tab], page: Any) -> None:
    tab = open_tab()
    tab.open(page.address, "/runs")
    tab.wait("graph && graph.data && graph.data.length > 0")
    tab.choose("finished")
    tab.wait("new Set(graph.data.map(each => each.name)).size == 2")
    tab.page.click("#to-compare")
    answer = tab.page.locator("#compare-answer")
    playwright.expect(answer).to_contain_text("at equal steps")
    assert "at_work" in answer.inner_text() and "finished" in answer.inner_text()
    tab.page.click("#to-runs")
    tab.expect_chosen("at_work", "finished")


def test_the_queue_is_changed_with_the_token_alone(
    open_tab: Callable[..., Tab], acting_page: Any, page: Any, traps: Path, token: str
) -> None:
    tab = open_tab()
    tab.open(page.address, "/queue")
    assert not tab.page.locator("#queue-hold").is_visible() and not tab.page.locator("#token").is_visible()
    tab.open(acting_page.address, "/queue")
    tab.page.locator("#queue-table [row-id='1'] .ag-selection-checkbox input").first.click()
    answer = tab.page.locator("#queue-answer")
    tab.page.click("#queue-hold")
    playwright.expect(answer).to_contain_text("Give the token")
    assert not Queue(traps / "queue.db").job("first").held
    tab.page.fill("#token", token)
    tab.page.click("#queue-hold")
    playwright.expect(answer).to_contain_text("Pause: first")
    assert Queue(traps / "queue.db").job("first").held
    playwright.expect(tab.page.locator("#queue-table [row-id='1'] [col-id=why]")).to_have_text(
        "paused by hand"
    )
    tab.page.click("#queue-release")
    playwright.expect(answer).to_contain_text("Go on: first")
    assert not [url for url in tab.asked if token in url]
    assert not tab.wrong


def test_another_sites_page_learns_nothing(open_tab: Callable[..., Tab], page: Any, tmp_path: Path) -> None:
    """A page from elsewhere, in the same browser, that asks for the runs, frames the page and sends an
    order."""
    theirs = tmp_path / "theirs.html"
    theirs.write_text(f"""<!doctype html><iframe id=frame src="{page.address}/runs"></iframe>
        <img id=picture src="{page.address}/picture/failed/masks.png"><script>
        const ask = (path, options) => fetch("{page.address}" + path, options).then(
            answer => answer.text(), error => "refused");
        window.all = () => Promise.all([
            ask("/_dash-layout"), ask("/_dash-layout", {{mode: "no-cors"}}),
            ask("/_dash-update-component", {{method: "POST", mode: "no-cors", body: "{{}}"}})]);
        </script>""")
    tab = open_tab()
    tab.page.goto(theirs.as_uri())
    answers = tab.page.evaluate("window.all()")
    assert answers[0] == "refused" and not any("salt" in answer and "{" in answer for answer in answers)
    assert tab.page.evaluate("document.getElementById('picture').naturalWidth") == 0
    assert not [frame for frame in tab.page.frames if frame.query_selector("#runs-table")]

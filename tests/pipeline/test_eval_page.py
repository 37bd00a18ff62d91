"""The pages of `eval --out` in a real browser: nothing is asked for, goes wrong or is cut off."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from salt_vla.reports.diagnosis import Diagnosis, write_diagnosis
from salt_vla.reports.evaluation import EvaluationTables, write_tables
from salt_vla.reports.label_curve import LabelCurve, write_curve

playwright = pytest.importorskip("playwright.sync_api", reason="the extra `browser` is not installed")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WIDTHS = (400, 900, 1500)
ENCODERS = ("student", "teacher", "random", "pixels", "constant", "facebook/vjepa2-vitl-fpc64-256@12")
SHARES = (0.01, 0.1, 1.0)


def rows(suite: str, **more: Any) -> list[dict[str, Any]]:
    said = {"suite": suite, "metric": "r2", "seed": 0, "probe": "attentive-small", "causal": False} | more
    note = "rate 0.001, decay 0.4, 20 of 20 rounds; 8 attention heads: 16 do not divide 120"
    return [
        said | {"encoder": name, "target": target, "value": 0.5, "low": 0.4, "high": 0.6, "note": note}
        for name in ENCODERS
        for target in ("hand_velocity_end", "object_position", "<script>alert(1)</script>")
    ]


def pairs(suite: str, **more: Any) -> list[dict[str, Any]]:
    said = {"suite": suite, "metric": "r2", "seed": 0, "difference": 0.1, "low": 0.05, "high": 0.15}
    said |= {"target": "hand_velocity_end", "apart": True, "p": 0.001, "p_holm": 0.01} | more
    return [said | {"encoder": "student", "against": other} for other in ENCODERS[1:4]]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A table, curves and a diagnosis, with names as long as they come."""
    folder = tmp_path_factory.mktemp("pages")
    suites = [f"action-prediction/observation.images.front/{kind}" for kind in ("grid", "unseen-tasks")]
    spent = {"parameters": 3e8, "flops_a_clip": 1e12, "seconds": 1e5, "peak_memory_gb": 70.0}
    about = {"data": "so101", "clip_table": "0123456789abcdef" * 4, "view": {"frame_stride": 4}}
    write_tables(
        EvaluationTables(
            ["student"],
            [row for suite in suites for row in rows(suite)],
            [pair for suite in suites for pair in pairs(suite)],
            [{"encoder": name, "suite": suites[0], "seed": 0} | spent for name in ENCODERS],
            ["12 clips cannot be read and are left out; the first: " + "/a/very/long/path" * 12],
            about,
        ),
        folder,
    )
    shares = [row for share in SHARES for row in rows(suites[0], fraction=share)]
    duels = [pair for share in SHARES for pair in pairs(suites[0], fraction=share)]
    write_curve(LabelCurve(["student"], shares, duels, [], about), folder)
    seen = spent | {"dims": 1024, "effective_rank": 90.0, "p50": 1.0, "p95": 2.0, "frames_per_second": 7.0}
    blocks = [f"{name}@{block}" for name in ENCODERS[:3] for block in range(1, 7)]
    alike = [{"encoder": a, "other": b, "cka": 0.4} for a in blocks for b in blocks if a < b]
    known = [{"encoder": name, "spectrum": [0.6, 0.3, 0.1]} | seen for name in ENCODERS]
    write_diagnosis(Diagnosis(2048, 9000, known, [], blocks, alike, [], about), folder)
    return sorted(folder.glob("*.html"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as library:
        # Without its sandbox it can run as root, as in a container; it opens our own pages alone.
        made = library.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.mark.parametrize("width", WIDTHS)
def test_pages_fit_ask_for_nothing_and_go_wrong_nowhere(
    browser: Any, pages: list[Path], tmp_path: Path, width: int
) -> None:
    assert [page.name for page in pages] == ["curve.html", "diagnosis.html", "table.html"]
    for file in pages:
        context = browser.new_context(viewport={"width": width, "height": 900})
        page = context.new_page()
        page.set_default_timeout(120_000)
        asked: list[str] = []
        wrong: list[str] = []
        page.on("request", lambda request, asked=asked: asked.append(request.url))
        page.on("console", lambda message, wrong=wrong: wrong.append(message.text))
        page.on("pageerror", lambda error, wrong=wrong: wrong.append(str(error)))
        page.goto(file.as_uri())
        assert {url for url in asked if not url.startswith("data:")} == {file.as_uri()} and not wrong
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= width, f"{file.name} is {wide} px wide in a window of {width}"
        hidden = page.evaluate(
            """() => [...document.querySelectorAll('main *')].filter(each => {
                const box = each.getBoundingClientRect()
                return box.right > innerWidth + 1 && !each.closest('.table, .picture, pre')
            }).map(each => each.outerHTML.slice(0, 80))"""
        )
        assert not hidden, f"cut off, and in no box that scrolls: {hidden}"
        broken = "[...document.images].filter(each => !each.naturalWidth).length"
        assert page.evaluate(broken) == 0
        page.screenshot(path=str(tmp_path / f"{file.stem}-{width}.png"), full_page=True)
        context.close()

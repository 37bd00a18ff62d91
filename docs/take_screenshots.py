"""Take the pictures of docs/howto/watch-runs.md anew: `python docs/take_screenshots.py`, some minutes.

Trains a small teacher and students on the demo's films in a folder of its own, kills one of them, and lets
another work while the terminal's and the dashboard's pictures are taken. Needs the extras `dashboard` and
`browser`, and Chromium.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PICTURES = Path(__file__).with_name("pictures")
MOST_BYTES = 300_000
DATA, CACHE = "metaworld-mini", "caches/night"
SIZE = """
    encoder.name=vit_micro encoder.geometry.num_frames=8 encoder.geometry.image_size=96
    encoder.geometry.tubelet_size=2 encoder.geometry.patch_size=16 predictor.dim=96 predictor.depth=2
    predictor.num_heads=3 data.view.frame_stride=2 data.view.num_views=2 data.view.crop_scale=0.75,1.0
    data.store_views=true data.num_workers=0 batch_size=16 optimizer.warmup_steps=20
    runtime.log_every=5 runtime.checkpoint_every=25 runtime.validate_every=25 runtime.validation_clips=32
""".split()  # noqa: SIM905
STUDENTS = {
    "low_rate": "optimizer.lr=3e-4",
    "high_rate": "optimizer.lr=2e-3",
    "even_masks": "masks.truncate=even",
}


def salt(*arguments: object, quiet: bool = True) -> None:
    command = [sys.executable, "-m", "salt_vla", *map(str, arguments)]
    print(
        "salt-vla",
        *arguments[:2],
        *([arguments[arguments.index("--name") + 1]] if "--name" in arguments else []),
    )
    subprocess.run(
        command, check=True, stdout=subprocess.DEVNULL if quiet else None, stderr=subprocess.DEVNULL
    )


def student(name: str, steps: int, *settings: object) -> list[object]:
    return [
        "train",
        "demo_student",
        *SIZE,
        f"steps={steps}",
        *settings,
        "--data",
        DATA,
        "--cache",
        CACHE,
        "--name",
        name,
    ]


def work(steps: int) -> None:
    """What a night leaves behind: finished runs, one that was killed, one at work, and a queue."""
    salt("train", "demo_teacher", *SIZE, f"steps={steps}", "--data", DATA, "--name", "teacher")
    for split in ("train", "validation"):
        views = ("--num-views", 1) if split == "validation" else ()
        salt(
            "cache", "build", "--teacher", "teacher", "--data", DATA, "--split", split, *views, "--out", CACHE
        )
    for name, setting in STUDENTS.items():
        salt(*student(name, steps, setting))
    for name in ("teacher", *STUDENTS):
        salt("runs", "pictures", name)
    killed(steps)
    salt(*student("long_run", 20 * steps), "--detach", "--restarts", 2)
    queue(steps)


def killed(steps: int) -> None:
    """A run whose process is gone without a word."""
    command = [sys.executable, "-m", "salt_vla", *map(str, student("unlucky", 20 * steps))]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = Path(os.environ["SALT_VLA_ROOT"]) / "runs" / "unlucky" / "metrics.jsonl"
    while process.poll() is None and (not metrics.is_file() or metrics.read_text().count("\n") < 12):
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()


def queue(steps: int) -> None:
    wide = "masks.truncate=pad"
    salt("queue", "add", "--after", "long_run", "--", *student("padded", steps, wide))
    better = "max(long_run.val.r2_position_mean) > 0.2"
    salt(
        "queue",
        "add",
        "--after",
        "padded",
        "--if",
        better,
        "--",
        *student("gains_compound", steps, wide, "optimizer.lr=2e-3"),
    )
    salt(
        "queue",
        "add",
        "--after",
        "padded",
        "--unless",
        better,
        "--",
        *student("harder_masks", steps, "masks.strategy=random"),
    )
    salt(
        "queue", "add", "--when-free", "ram:2000GB", "--name", "too_large", "--", *student("too_large", steps)
    )
    salt("queue", "move", "harder_masks")


def take_watch() -> None:
    """`runs watch`, as a terminal of 100 columns shows it."""
    from rich.console import Console

    from salt_vla.operations.watch import Watch
    from salt_vla.operations.watch_frame import frame

    with Path(os.devnull).open("w") as nowhere:
        console = Console(
            record=True, width=100, file=nowhere, force_terminal=True, markup=False, emoji=False
        )
        console.print(frame(Watch(["long_run", "unlucky", "high_rate"]).look(), console.width))
    # Without the letters that it would fetch from elsewhere: any of fixed width will do.
    svg = re.sub(r"@font-face \{.*?\}", "", console.export_svg(title="salt-vla runs watch"), flags=re.DOTALL)
    (PICTURES / "watch.svg").write_text(svg)


def take_dashboard() -> None:
    from playwright.sync_api import sync_playwright

    from salt_vla.operations.dashboard.server import serving

    chromium = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    with serving(0) as port, sync_playwright() as library:
        browser = library.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, path, width, height in (
            ("dashboard-runs", "/runs", 1500, 1180),
            ("dashboard-run", "/run/high_rate", 1500, 1500),
            ("dashboard-pictures", "/run/high_rate", 1000, 900),
            ("dashboard-queue", "/queue", 1500, 700),
            ("dashboard-telephone", "/runs", 400, 1100),
            ("dashboard-compare", "/compare", 900, 1200),
        ):
            page = browser.new_page(viewport={"width": width, "height": height})
            page.goto(f"http://127.0.0.1:{port}{'/runs' if path == '/compare' else path}")
            take(page, name, path)
            page.close()
        browser.close()


def take(page: Any, name: str, path: str) -> None:
    if path in ("/runs", "/compare"):
        page.wait_for_selector("#runs-table .ag-row")
        page.wait_for_timeout(1500)
        for run in ("low_rate", "high_rate"):
            page.locator(f"#runs-table [row-id={run}] .ag-selection-checkbox input").first.click()
    if path == "/compare":
        page.click("#to-compare")
    if path.startswith("/run"):
        page.wait_for_selector(f"#{path.split('/')[1]}-graph .scatterlayer .trace")
        page.wait_for_selector(f"#{path.split('/')[1]}-look-smoothing .dash-slider-thumb")
    page.wait_for_selector(
        {"/queue": "#queue-table .ag-row", "/compare": "#compare-answer table"}.get(path, "main")
    )
    page.wait_for_timeout(3000)
    file = PICTURES / f"{name}.png"
    (page.locator("#run-pictures") if name == "dashboard-pictures" else page).screenshot(path=file)
    if file.stat().st_size > MOST_BYTES:
        raise SystemExit(f"{file} has {file.stat().st_size:,} bytes; take it smaller")


@contextmanager
def workplace(kept: Path | None) -> Iterator[bool]:
    """A root, and whether it has to be filled; a temporary one is gone afterwards, and what works in it."""
    root = kept or Path(tempfile.mkdtemp(prefix="salt-vla-pictures-"))
    os.environ |= {"SALT_VLA_ROOT": str(root.resolve()), "OMP_NUM_THREADS": "2"}
    try:
        yield not (root / "runs").is_dir()
    finally:
        if kept is None:
            subprocess.run([sys.executable, "-m", "salt_vla", "runs", "kill", "long_run"], check=False)
            shutil.rmtree(root)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--root", type=Path, help="a root to keep; one that has runs is shown as it is")
    parser.add_argument("--steps", type=int, default=200)
    given = parser.parse_args()
    PICTURES.mkdir(exist_ok=True)
    with workplace(given.root) as is_new:
        if is_new:
            work(given.steps)
        take_watch()
        take_dashboard()
    print(*sorted(file.name for file in PICTURES.iterdir()))


if __name__ == "__main__":
    main()

"""`cache plan` for 168,913 clips against a linear extrapolation of a build of 2,000 that is really done.

A tiny random teacher on VP9 films of 240 lines as in SSv2. The plan is made before and after the build, each
from its own sample; the promise is that time and bytes are within 10 % of the extrapolation. Run it on an
otherwise idle machine: `python benchmarks/plan.py [--clips 2000] [--seconds 30] [--workers N]`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from cache_build import FILMS, table_of
from rich.console import Console
from rich.table import Table

from salt_vla.config import DataConfig
from salt_vla.geometry import ClipGeometry
from salt_vla.jobs.build_cache import BATCH_SIZE, How, build_cache
from salt_vla.jobs.cache_plan import plan_cache
from salt_vla.teachers import load_teacher

SSV2 = 168_913  # clips of its training list
GEOMETRY = ClipGeometry(num_frames=16, image_size=112, tubelet_size=2, patch_size=16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--teacher", default="random:vit_micro")
    chosen = parser.parse_args()
    how = How(chosen.workers)
    teacher = load_teacher(chosen.teacher, GEOMETRY)
    data = DataConfig(view=FILMS.view)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "films").mkdir()
        table = table_of(place / "films", chosen.clips)
        out = place / "cache"

        def planned() -> tuple[float, int]:
            given = (teacher, table, "train", place / "planned", data, "float16", BATCH_SIZE)
            plan = plan_cache(*given, clips=SSV2, seconds=chosen.seconds, how=how)
            plan.require_fit()
            assert plan.seconds is not None
            return plan.seconds, plan.size.bytes + plan.size.other_bytes

        before = planned()
        began = time.perf_counter()
        build_cache(teacher, table, "train", out, data, how=how)
        seconds = time.perf_counter() - began
        size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        after = planned()
    scale = SSV2 / chosen.clips
    shown = Table(
        "", "2,000 built", "× 168,913 / 2,000", "plan before", "ratio", "plan after", "ratio",
        title=f"{chosen.clips} clips built, {SSV2:,} planned, {chosen.teacher}",
    )  # fmt: skip
    hours = [f"{value / 3600:.3f} h" for value in (seconds, seconds * scale, before[0], after[0])]
    gigabytes = [f"{value / 1e9:.3f} GB" for value in (size, size * scale, before[1], after[1])]
    for name, texts, built, plans in (
        ("time", hours, seconds * scale, (before[0], after[0])),
        ("bytes", gigabytes, size * scale, (before[1], after[1])),
    ):
        ratios = [f"{plan / built:.3f}" for plan in plans]
        shown.add_row(name, *texts[:2], texts[2], ratios[0], texts[3], ratios[1])
    Console().print(shown)


if __name__ == "__main__":
    main()

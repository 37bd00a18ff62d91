"""A whole report, as a demonstration makes it: from rows and arrays to one page of bearable size."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from salt_vla.config import BlockSpec
from salt_vla.geometry import ClipGeometry
from salt_vla.masks import MultiBlockMasks
from salt_vla.models.pixels import MEAN, STD
from salt_vla.reports.conclusions import conclusions
from salt_vla.reports.figures import CURVES_CAPTION, PROBES_CAPTION, curves, probe_bars
from salt_vla.reports.html import Figure, Figures, ReportContent, Section, render
from salt_vla.reports.sheets import (
    MASKS_CAPTION,
    PCA_CAPTION,
    RECONSTRUCTION_CAPTION,
    mask_sheet,
    pca_strip,
    reconstruction_sheet,
)
from salt_vla.reports.tables import difference_table, score_table

LARGEST_PAGE = 6_000_000
TARGETS = ("action_mean", "action_end", "hand_position", "hand_velocity", "object_position", "task")
ENCODERS = {"student": 0.7, "teacher": 0.72, "random": 0.6, "pixels": 0.75, "constant": 0.0}


def results(suite: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    rows, pairs = [], []
    for target in TARGETS:
        what = {"suite": suite, "target": target, "metric": "r2", "seed": 1}
        for encoder, value in ENCODERS.items():
            rows.append(
                what | {"encoder": encoder, "value": value, "low": value - 0.03, "high": value + 0.03}
            )
        for against in ("random", "teacher", "pixels"):
            gap = ENCODERS["student"] - ENCODERS[against]
            row = what | {
                "encoder": "student",
                "against": against,
                "difference": gap,
                "apart": abs(gap) > 0.03,
            }
            pairs.append(row | {"low": gap - 0.03, "high": gap + 0.03})
    return rows, pairs


def metrics() -> list[dict[str, Any]]:
    names = ("r2_channel_mean", "r2_position_mean", "r2_copy_nearest")
    return [
        {"kind": kind, "step": step, "loss": 1 / (1 + step / 100), **dict.fromkeys(names, step / 1000)}
        for step in range(1, 600, 2)
        for kind in (("train", "val") if step % 50 == 1 else ("train",))
    ]


def sheets(geometry: ClipGeometry) -> list[Figure]:
    """The film strips of a clip of pure noise: no film makes larger pictures."""
    rng = np.random.default_rng(0)
    size = geometry.image_size
    frames = rng.integers(0, 256, (geometry.num_frames, size, size, 3)).astype(np.uint8)
    blocks = [BlockSpec(), BlockSpec(num_blocks=2, spatial_scale=0.7)]
    groups = [
        (g.context_ids[0].numpy(), g.target_ids[0].numpy())
        for g in MultiBlockMasks(geometry, blocks).sample(4, seed=1)
    ]
    ids = groups[0][1]
    predicted = rng.normal(size=(len(ids), geometry.patch_dim)).astype(np.float32)
    latents = {name: rng.normal(size=(geometry.num_tokens, 64)) for name in ("student", "teacher", "random")}
    return [
        Figure(mask_sheet(frames, groups, geometry), MASKS_CAPTION, "masks", wide=True),
        Figure(
            reconstruction_sheet(frames, predicted, ids, geometry, MEAN, STD),
            RECONSTRUCTION_CAPTION,
            "reconstruction",
            wide=True,
        ),
        Figure(pca_strip(frames, latents, geometry), PCA_CAPTION, "latents", wide=True),
    ]


@pytest.mark.parametrize(
    "geometry", [ClipGeometry(num_frames=8, image_size=96), ClipGeometry()], ids=["demo", "full size"]
)
def test_a_full_report_is_one_page_below_six_megabytes(geometry: ClipGeometry) -> None:
    rows, pairs = results("front/grid")
    other_rows, other_pairs = results("moving/grid")
    rows, pairs = rows + other_rows, pairs + other_pairs
    sentences = conclusions(rows, pairs, metrics()[-1], num_seeds=1)
    charts = [
        Figure(draw(False), caption, caption, dark_png=draw(True))
        for draw, caption in (
            (lambda dark: curves(metrics(), "student", dark), CURVES_CAPTION),
            (lambda dark: probe_bars(rows, "front/grid", dark), PROBES_CAPTION),
        )
    ]
    page = render(
        ReportContent(
            title="What the encoder learned",
            lead="Everything at once.",
            conclusions=sentences,
            answer=[score_table(rows, pairs, "front/grid")],
            sections=[
                Section("Differences", [difference_table(pairs, suite="front/grid"), Figures(charts)]),
                Section("Pictures", sheets(geometry)),
            ],
        )
    )
    assert len(page.encode()) < LARGEST_PAGE
    assert page.count("<img ") == 5 and page.count("<table>") == 2
    assert sentences[0].startswith("The student beats the same encoder at random initialisation")
    assert any(sentence.startswith("Moving/grid: the student is ahead") for sentence in sentences)


def test_tables_and_sentences_need_no_pictures() -> None:
    """A terminal that prints a table does not wait for Matplotlib, nor anything here for torch."""
    script = (
        "import sys, salt_vla.reports.tables, salt_vla.reports.conclusions, salt_vla.reports.html;"
        "print({'matplotlib', 'torch', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("set()\n", "")

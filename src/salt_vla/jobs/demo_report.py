"""The demonstration's report: figures and sentences from what its stages left on disk."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from salt_vla.data.clip_table import ClipTable
from salt_vla.jobs.data import open_views, split_table
from salt_vla.jobs.data_index import EMBEDDED
from salt_vla.jobs.demo_plan import Demo, demo_models, machine_facts, read_stages, splits_facts
from salt_vla.jobs.demo_violations import violations_section
from salt_vla.jobs.teacher import check_teacher, load_to_inspect
from salt_vla.masks import build_masks
from salt_vla.models import build_predictor
from salt_vla.models.loading import encoder_directory, load_encoder, read_tensors
from salt_vla.models.pixels import MEAN, STD, normalise_pixels
from salt_vla.reports.conclusions import conclusions
from salt_vla.reports.figures import CURVES_CAPTION, curves
from salt_vla.reports.html import Facts, Figure, Figures, Folded, ReportContent, Section, render
from salt_vla.reports.sheets import (
    MASKS_CAPTION,
    PCA_CAPTION,
    RECONSTRUCTION_CAPTION,
    mask_sheet,
    pca_strip,
    reconstruction_sheet,
)
from salt_vla.reports.tables import difference_table, score_table, to_rich
from salt_vla.reports.teacher_check import check_blocks
from salt_vla.rundir import RunDirectory, read_json, write_text

Rows = list[dict[str, Any]]
R2_NAMES = ("r2_channel_mean", "r2_position_mean", "r2_copy_nearest")


def write_report(demo: Demo, table: ClipTable) -> Path:
    """Write `report.html` and print the main table; the file's path."""
    rows: Rows = read_json(demo.folder / "report.json", list)
    pairs: Rows = read_json(demo.folder / "comparisons.json", list)
    suites = list(dict.fromkeys(row["suite"] for row in rows))
    names = {suite: describe(suite) for suite in suites}
    sentences = conclusions(
        rows, pairs, last_r2(demo.student_run), num_seeds=1, suite=suites[0], suite_names=names
    )
    content = ReportContent(
        title="What the encoder learned",
        lead="A small video encoder, trained in minutes on simulated robots against a frozen teacher's "
        "latents, read by linear probes on episodes it never saw.",
        conclusions=sentences,
        answer=[
            score_table(rows, pairs, suites[0], title=f"Probes, {describe(suites[0])}"),
            difference_table(pairs, "student", suites[0]),
        ],
        sections=[
            Section("Probes in other conditions", _other_suites(demo, rows, pairs, suites)),
            Section("How the loss went, and what it means", _curve_blocks(demo)),
            violations_section(demo),
            *_picture_sections(demo, table),
            Section("Is the teacher fit to teach", _teacher_blocks(demo, table)),
            Section("What was run", _run_blocks(demo, table)),
        ],
        footer="Intervals: 95 %, over held-out episodes, not corrected for the number of targets; "
        "differences are paired on the same episodes.",
    )
    path = demo.folder / "report.html"
    write_text(path, render(content))
    console = Console()
    for suite in suites[:1]:
        console.print(to_rich(score_table(rows, pairs, suite, title=f"Probes, {describe(suite)}")))
        console.print(to_rich(difference_table(pairs, "student", suite)))
    for sentence in sentences:
        console.print(f"• {sentence}", highlight=False)
    console.print(f"Report: {path}", highlight=False)
    return path


def describe(suite: str) -> str:
    """`front/grid` → words."""
    camera, pooling = suite.split("/")
    how = {
        "grid": "tokens pooled 2×2 in space, every time step",
        "step": "tokens pooled per time step",
        "mean": "tokens pooled over the clip",
    }
    return f"camera “{camera}”, {how[pooling]}"


def last_r2(run: RunDirectory) -> dict[str, float | None]:
    last = run.metrics("val")[-1]
    return {name: last[name] for name in R2_NAMES}


def _other_suites(demo: Demo, rows: Rows, pairs: Rows, suites: list[str]) -> list[Any]:
    blocks: list[Any] = []
    if demo.teacher.data.table == EMBEDDED:
        blocks.append(
            "The camera “moving” stands somewhere else in every episode: its held-out positions were never "
            "trained on."
        )
    for suite in suites[1:]:
        blocks += [
            score_table(rows, pairs, suite, title=f"Probes, {describe(suite)}"),
            difference_table(pairs, "student", suite),
        ]
    return blocks


def _curve_blocks(demo: Demo) -> list[Any]:
    blocks: list[Any] = [
        "The loss alone says nothing: R² compares it with three predictors that have learned nothing of "
        "motion. 0 means as good as that predictor. The mean of each token place is what a still "
        "background can tell."
    ]
    for run, what in ((demo.teacher_run, "stage 1, the teacher"), (demo.student_run, "stage 2, the student")):
        rows = run.metrics()
        figures = curves(rows, what), curves(rows, what, dark=True)
        figure = Figure(figures[0], f"{what.capitalize()}. {CURVES_CAPTION}", f"Curves of {what}", figures[1])
        blocks.append(Figures([figure]))
        last = last_r2(run)
        blocks.append(
            Facts(
                [(name.removeprefix("r2_").replace("_", " "), _signed(last[name])) for name in R2_NAMES],
                title=f"Held-out R² at the end, {what}, against the",
            )
        )
    return blocks


def _signed(value: float | None) -> str:
    return "not defined" if value is None else f"{value:+.3f}"


def _picture_sections(demo: Demo, table: ClipTable) -> list[Section]:
    held_out = split_table(table).validation
    views, readable = open_views(held_out, demo.student.data, demo.student.geometry, num_views=1)
    clips = [readable[0], readable[len(readable) // 2]]
    frames = torch.from_numpy(views.read_many([(clip, 0) for clip in clips]))
    geometry = demo.student.geometry
    groups = build_masks(demo.teacher.masks, geometry).sample(len(clips), seed=0, step=0)
    of_first = [(g.context_ids[0].numpy(), g.target_ids[0].numpy()) for g in groups]
    masks = Figure(
        mask_sheet(frames[0].numpy(), of_first, geometry),
        f"V-JEPA's multiblock masks on a held-out clip. {MASKS_CAPTION}",
        "A film strip with masked tokens",
        wide=True,
    )
    reconstruction = [_reconstruction(demo, frames, number) for number in range(len(groups))]
    pca = [_pca(demo, frames, row) for row in range(len(clips))]
    return [
        Section("What the encoder sees", [masks]),
        Section("What the teacher makes of masked pixels", reconstruction),
        Section("What the tokens look like", pca),
    ]


@torch.no_grad()
def _reconstruction(demo: Demo, frames: torch.Tensor, group: int) -> Figure:
    """Stage 1's own task on the first clip of `frames`, with the mask group's blocks."""
    config = demo.teacher
    folder = encoder_directory(demo.teacher_run.path)
    encoder = load_encoder(folder)
    predictor = build_predictor(
        config.predictor, encoder.dim, config.geometry.patch_dim, config.geometry
    ).eval()
    predictor.load_state_dict(read_tensors(folder / "predictor.safetensors"))
    masks = build_masks(config.masks, config.geometry).sample(len(frames), seed=0, step=0)[group]
    context = encoder(normalise_pixels(frames), masks.context_ids)
    patches = predictor(context, masks.context_ids, masks.target_ids, group)[0].numpy()
    if config.objective.targets == "centred":
        mean = read_tensors(demo.teacher_run.path / "target_statistics.safetensors")["position_mean"]
        patches = patches + mean[masks.target_ids[0]].numpy()
    png = reconstruction_sheet(
        frames[0].numpy(),
        patches,
        masks.target_ids[0].numpy(),
        config.geometry,
        MEAN,
        STD,
        masks.context_ids[0].numpy(),
    )
    caption = f"Mask group {group + 1}. {RECONSTRUCTION_CAPTION}"
    return Figure(png, caption, "Original, masked and reconstructed frames", wide=True)


def _pca(demo: Demo, frames: torch.Tensor, row: int) -> Figure:
    latents = {name: model.latents(frames)[row].numpy() for name, model in demo_models(demo).items()}
    png = pca_strip(frames[row].numpy(), latents, demo.student.geometry)
    return Figure(png, PCA_CAPTION, "Principal components of patch tokens", wide=True)


def _teacher_blocks(demo: Demo, table: ClipTable) -> list[Any]:
    """`teacher check` on held-out clips; what it found, and its figures beside the demo's other files."""
    checked = check_teacher(
        load_to_inspect(demo.teacher_run.name), split_table(table).validation, demo.teacher.data
    )
    write_text(demo.folder / "teacher_check.json", json.dumps(checked.to_json(), indent=2))
    return check_blocks(checked.verdict, checked.findings, checked.figures(), checked.picture())


def _run_blocks(demo: Demo, table: ClipTable) -> list[Any]:
    stages = read_stages(demo)
    blocks: list[Any] = [
        Facts(
            [
                (name, f"{s['seconds']:.0f} s, peak memory {s['peak_memory_gb']:.2f} GB")
                for name, s in stages.items()
            ],
            title="Time per stage",
        ),
        Facts(
            [*machine_facts().items(), *splits_facts(table).items(), ("seed", str(demo.student.seed))],
            title="Machine and data",
        ),
    ]
    for run in (demo.teacher_run, demo.student_run):
        blocks.append(Folded(f"{run.name}: the resolved configuration", run.config_file.read_text()))
        blocks.append(Folded(f"{run.name}: how it ran", json.dumps(asdict(run.status()), indent=2)))
    return blocks

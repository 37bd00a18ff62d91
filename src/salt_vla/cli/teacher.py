"""`salt-vla teacher …`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from salt_vla.cli.detach import Apart
from salt_vla.cli.printing import print_json, print_table

if TYPE_CHECKING:
    from salt_vla.jobs.teacher import TeacherCheck


def check(
    name: Annotated[str, tyro.conf.Positional],
    data: str = "metaworld-mini",
    clips: int = 32,
    num_frames: int | None = None,
    frame_stride: int | None = None,
    layer: int = -1,
    final_norm: Literal["model", "none"] = "model",
    device: str = "cpu",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    out: Path | None = None,
    json: bool = False,
) -> int:
    """What a teacher is, what its targets are like, and a verdict; exit code 1 when a finding is bad.

    Example: salt-vla teacher check demo_teacher --out checked

    Args:
        name: a run's name, a directory, a published teacher's name, NAME=DIRECTORY (a directory held against
            that name), a hub id, or random:ENCODER.
        data: clips to look at its targets with.
        clips: how many of them, spread over the table.
        num_frames: frames of a clip, for teachers that take any number.
        frame_stride: file frames from one frame to the next; default: as the teacher was
            trained, else as the table was cut.
        layer: look at the tokens after this block; -1: the last.
        final_norm: model: as the network's own forward gives them; none: the raw residual stream.
        device: where it runs.
        dtype: what it computes in.
        out: a folder for check.json and tokens.png, the principal components of a clip's tokens.
        json: print JSON instead of tables.
    """
    import json as text
    from dataclasses import replace

    from salt_vla.jobs.data import open_table
    from salt_vla.jobs.outputs import PICTURE, require_output
    from salt_vla.jobs.teacher import check_teacher, data_settings, load_to_inspect
    from salt_vla.rundir import write_bytes, write_text

    if out is not None:
        require_output(out / "tokens.png", PICTURE)
    inspected = load_to_inspect(name, layer, final_norm, device, dtype, num_frames)
    settings = replace(data_settings(name, data), store_views=False)
    if frame_stride is not None:
        settings = replace(
            settings, view=replace(settings.view, frame_stride=frame_stride, sampling="stride")
        )
    table = open_table(data, settings.view, inspected.teacher.geometry)
    checked = check_teacher(inspected, table, settings, clips)
    if out is not None:
        write_bytes(out / "tokens.png", checked.picture())
        write_text(out / "check.json", text.dumps(checked.to_json(), indent=2))
    if json:
        print_json(checked.to_json())
    else:
        _print_check(checked)
    return 1 if checked.is_bad else 0


def _print_check(checked: TeacherCheck) -> None:
    from salt_vla.reports.teacher_check import plain

    figures = [{"field": key, "value": plain(value)} for key, value in checked.figures().items()]
    print_table(figures, ["field", "value"])
    print()
    print_table(checked.to_json()["findings"], ["severity", "topic", "text"])
    print(f"\nVerdict: {checked.verdict}")


def train(
    recipe: Annotated[str, tyro.conf.Positional],
    overrides: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    name: str | None = None,
    seed: int | None = None,
    max_steps: int | None = None,
    data: str | None = None,
    apart: Annotated[Apart, tyro.conf.arg(name="")] = Apart(),  # noqa: B008
) -> None:
    """Train a teacher on pixels (stage 1): `salt-vla train` for recipes whose targets are pixels.

    Example: salt-vla teacher train vpixel_vits grad_accum_steps=96 --data ssv2.parquet

    Args:
        recipe: a stage-1 experiment: demo_teacher, vpixel_vitti … vpixel_vitl.
        overrides: fields to change, as field=value.
        name: the run's name; default: the recipe's.
        seed: of weights, order, masks and views; default: the recipe's.
        max_steps: stop after this many steps, without changing the schedules.
        data: a clip table, a LeRobot data set's folder, or metaworld-mini.
    """
    from salt_vla.cli.train import train as train_any
    from salt_vla.config import override
    from salt_vla.jobs.teacher_train import require_stage_one
    from salt_vla.recipes import get_recipe

    require_stage_one(override(get_recipe(recipe).config, overrides), recipe)
    train_any(recipe, overrides, name, seed, max_steps, data, apart=apart)


def export(run: Annotated[str, tyro.conf.Positional], out: Path) -> None:
    """A trained teacher as a folder of its own: weights, configuration, and the clips that it was made for.

    Example: salt-vla teacher export demo_teacher --out teachers/demo

    Args:
        run: a run's name or directory (its last checkpoint is taken), a checkpoint, or its average/.
        out: the new folder; one that is there already is refused.
    """
    from salt_vla.jobs.teacher_train import export_teacher

    facts = export_teacher(run, out)
    step = f"step {facts.step}{', averaged' if facts.averaged else ''}"
    print(f"{out}: teacher of run {facts.name} at {step}, fingerprint {facts.fingerprint}")

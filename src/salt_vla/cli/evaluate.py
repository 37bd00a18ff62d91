"""`salt-vla eval`"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import tyro

from salt_vla.cli.detach import Apart
from salt_vla.cli.printing import print_json
from salt_vla.errors import UserError

if TYPE_CHECKING:
    from salt_vla.evaluation.results import SuiteResult


def evaluate(
    encoders: Annotated[tuple[str, ...], tyro.conf.Positional],
    suite: tuple[str, ...] = ("probes",),
    data: str = "metaworld-mini",
    frame_stride: int | None = None,
    probe: str = "linear",
    seed: int = 0,
    json: bool = False,
    apart: Annotated[Apart, tyro.conf.arg(name="")] = Apart(),  # noqa: B008
) -> None:
    """Probe encoders on held-out episodes, beside a random encoder, pixels and the constant predictor.

    Figures of a run's last checkpoint are kept in the run's probes.json, for `runs compare` and reports.

    Example: salt-vla eval demo_student demo_teacher --suite probes --json

    Args:
        encoders: names of runs, or folders of runs, checkpoints or exports.
        suite: what to measure, one or several; `probes` reads actions, positions and velocities.
        data: a LeRobot data set's folder, its clip table, or metaworld-mini.
        frame_stride: file frames from one frame to the next; default: as the first encoder was trained.
        probe: what reads the features: linear.
        seed: of the random encoder and of resampling.
        json: print JSON instead of tables.
    """
    if apart.starts("eval", paths={"--data": data}):
        return
    from dataclasses import replace

    from salt_vla.evaluation.bench import EvalSettings
    from salt_vla.evaluation.results import to_objects
    from salt_vla.jobs.data import open_table
    from salt_vla.jobs.evaluate import encoder_names, evaluate_encoders, leave_probes
    from salt_vla.jobs.teacher import teacher_and_data

    if not encoders:
        raise UserError(
            "eval needs at least one encoder: a run's name, or the folder of a checkpoint or export"
        )
    settings = EvalSettings(seed=seed, probe=probe)
    first, data_config = teacher_and_data(encoders[0])
    if frame_stride is not None:
        data_config = replace(data_config, view=replace(data_config.view, frame_stride=frame_stride))
    table = open_table(data, data_config.view, first.geometry)
    results = evaluate_encoders(list(encoders), suite, data_config, table, settings)
    names = encoder_names(encoders)
    try:
        leave_probes(results, dict(zip(names, encoders, strict=True)), table)
    except UserError as error:  # The figures are what was asked for.
        print(f"salt-vla: these figures are not kept beside the run: {error}", file=sys.stderr)
    if json:
        print_json([row for result in results for row in to_objects(result.rows)])
        return
    _print_tables(results, names)


def _print_tables(results: list[SuiteResult], names: list[str]) -> None:
    from rich.console import Console

    from salt_vla.evaluation.results import to_objects
    from salt_vla.reports.tables import difference_table, score_table, to_rich

    for result in results:
        rows, pairs = to_objects(result.rows), to_objects(result.comparisons)
        console = Console()
        console.print(to_rich(score_table(rows, pairs, result.suite, title=result.suite)))
        for name in names:
            console.print(to_rich(difference_table(pairs, name, result.suite)))

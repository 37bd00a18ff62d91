"""`salt-vla eval`"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from salt_vla.cli.detach import Apart
from salt_vla.cli.printing import print_json
from salt_vla.evaluation.settings import EvalSettings

if TYPE_CHECKING:
    from salt_vla.jobs.evaluate import Evaluation


def evaluate(
    encoders: Annotated[tuple[str, ...], tyro.conf.Positional],
    suite: tuple[str, ...] = ("probes",),
    data: str = "metaworld-mini",
    frame_stride: int | None = None,
    against: tuple[str, ...] = (),
    out: Path | None = None,
    pictures: Path | None = None,
    fractions: tuple[float, ...] = (),
    diagnose: bool = False,
    json: bool = False,
    settings: Annotated[EvalSettings, tyro.conf.arg(name="")] = EvalSettings(),  # noqa: B008
    apart: Annotated[Apart, tyro.conf.arg(name="")] = Apart(),  # noqa: B008
) -> None:
    """Ask frozen encoders what they know, beside a random one, pixels and the constant predictor.

    An encoder is [LABEL=]WHAT[@LAYER]: a run's name, the folder of a run, checkpoint or export, a published
    teacher or its hub id, a folder of transformers, or random:WHAT[:SEED]. One LABEL given to several runs
    makes them seeds of one thing, and their tables are joined. What was measured is kept: a call that was
    interrupted, or adds an encoder or a suite, measures only what is missing.

    Example: salt-vla eval demo_student demo_teacher --suite probes --json

    Args:
        encoders: what is evaluated.
        suite: what is asked, one or several of action-prediction, classification, dense, events,
            forward-dynamics, frame-order, inverse-dynamics, probes, retrieval, state, success, time-arrow;
            and, of film pairs, intphys2, violations.
        data: a data set's folder, its clip table, or metaworld-mini; for surprise the folder of films.
        frame_stride: file frames from one frame to the next; default: as the first encoder was trained.
        against: encoders of this call that all others are also compared with.
        out: a folder that gets the tables as table.json, .csv, .md, .tex and .html; with --fractions the
            curves too, with --diagnose spectra and likeness.
        pictures: a folder that gets sheets of one held-out clip: tokens, attention, nearest clips.
        fractions: shares of the training episodes, such as 0.01 0.1 1: figures by how many probes learn from.
        diagnose: instead of suites: spectrum, effective rank, likeness (CKA) of encoders and of their blocks,
            operations and latency.
        json: print JSON instead of tables.
    """
    if apart.detach:  # Else the sentence would stand in a log alone.
        from salt_vla.jobs.evaluate import asked

        asked(encoders, suite, settings)
    if apart.starts("eval", paths={"--data": data}):
        return
    from salt_vla.cli.evaluate_more import print_curve, print_diagnosis, require_folders, require_only

    require_folders(out=out)
    if diagnose:
        others = {"--suite": suite != ("probes",), "--against": against, "--fractions": fractions}
        require_only("--diagnose", settings, others | {"--pictures": pictures})
        return print_diagnosis(encoders, data, settings, frame_stride, out, json)
    if fractions:
        require_only("--fractions", settings, {"--pictures": pictures})
        return print_curve(encoders, suite, data, settings, frame_stride, fractions, against, out, json)
    require_folders(pictures=pictures)
    from salt_vla.jobs.evaluate import evaluate_encoders

    _show(evaluate_encoders(encoders, suite, data, settings, frame_stride, against, pictures), out, json)


def _show(found: Evaluation, out: Path | None, json: bool) -> None:
    from salt_vla.cli.evaluate_more import print_sections
    from salt_vla.reports.evaluation import tables_of, write_tables

    for note in found.notes:
        print(f"salt-vla: {note}", file=sys.stderr)
    for path in write_tables(found.tables, out) if out is not None else ():
        print(path, file=sys.stderr)
    if json:
        return print_json(found.rows)
    print_sections(tables_of(found.tables))

"""What `salt-vla eval --fractions` and `--diagnose` print and write."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from salt_vla.cli.printing import print_json
from salt_vla.errors import ConfigError
from salt_vla.evaluation.settings import EvalSettings

if TYPE_CHECKING:
    from salt_vla.reports.forms import TableSection

MOST_BLOCKS_SHOWN = 6
# What a call of --diagnose does not ask: it has no suite, no probe and no share of the labels.
NOT_DIAGNOSED = ("probe", "protocol", "poolings", "fraction")


def print_curve(
    encoders: Sequence[str],
    suites: Sequence[str],
    data: str,
    settings: EvalSettings,
    frame_stride: int | None,
    fractions: Sequence[float],
    against: Sequence[str] = (),
    out: Path | None = None,
    json: bool = False,
) -> None:
    """A table a suite and target: a line an encoder, a column a share of the training episodes."""
    from salt_vla.jobs.eval_more import label_curve
    from salt_vla.reports.label_curve import curve_tables, write_curve

    found = label_curve(encoders, suites, data, settings, frame_stride, fractions, against)
    _say([*(f"salt-vla: {note}" for note in found.notes), *map(str, write_curve(found, out) if out else ())])
    if json:
        return print_json(list(found.rows))
    print_sections(curve_tables(found))


def print_diagnosis(
    encoders: Sequence[str],
    data: str,
    settings: EvalSettings,
    frame_stride: int | None,
    out: Path | None = None,
    json: bool = False,
) -> None:
    from salt_vla.jobs.eval_more import diagnose
    from salt_vla.reports.diagnosis import diagnosis_tables, write_diagnosis

    found = diagnose(encoders, data, settings, frame_stride)
    _say(
        [
            *(f"salt-vla: {note}" for note in found.notes),
            *map(str, write_diagnosis(found, out) if out else ()),
        ]
    )
    if json:
        return print_json(asdict(found))
    sections = diagnosis_tables(found)
    if len(found.layers) > MOST_BLOCKS_SHOWN:  # Of more a terminal shows no names.
        print_sections(sections[:1])
        return print(f"likeness of {len(found.layers)} blocks: --out FOLDER has the table and a picture")
    print_sections(sections)


def print_sections(sections: Sequence[TableSection]) -> None:
    from rich.console import Console

    from salt_vla.reports.tables import to_rich

    console = Console()
    for section in sections:
        for table in section.tables:
            console.print(to_rich(table))


def require_folders(**folders: Path | None) -> None:
    """Those that were given by the option of that name are made now, so that nothing is measured in vain."""
    from salt_vla.reports.forms import require_folder

    for name, folder in folders.items():
        if folder is not None:
            require_folder(folder, f"--{name}")


def require_only(option: str, settings: EvalSettings, others: Mapping[str, object]) -> None:
    """Refuse what a call with `option` does not look at. Raises `ConfigError` naming it."""
    usual = EvalSettings()
    names = NOT_DIAGNOSED if option == "--diagnose" else ("fraction",)
    asked = [f"--{name}" for name in names if getattr(settings, name) != getattr(usual, name)]
    asked += [name for name, value in others.items() if value]
    if asked:
        raise ConfigError(f"{option} takes no {' and no '.join(asked)}; leave it out, or ask in another call")


def _say(lines: Sequence[str]) -> None:
    for line in lines:
        print(line, file=sys.stderr)

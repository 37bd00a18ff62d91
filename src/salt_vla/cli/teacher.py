"""`salt-vla teacher …`"""

from __future__ import annotations

from typing import Annotated

import tyro

from salt_vla.cli.printing import print_json, print_table


def check(
    name: Annotated[str, tyro.conf.Positional], data: str = "metaworld-mini", json: bool = False
) -> None:
    """What a teacher is: sizes, fingerprint, statistics of its targets, and a verdict.

    Example: salt-vla teacher check demo_teacher

    Args:
        name: a run's name, or the directory of a run, checkpoint or export.
        data: clips to look at its targets with.
        json: print JSON instead of a table.
    """
    from dataclasses import replace

    from salt_vla.jobs.data import open_table
    from salt_vla.jobs.teacher import check_teacher, teacher_and_data

    teacher, data_config = teacher_and_data(name)
    table = open_table(data, data_config.view, teacher.geometry)
    result = check_teacher(name, teacher, table, replace(data_config, store_views=False))
    if json:
        print_json(result)
    else:
        print_table([{"field": key, "value": value} for key, value in result.items()], ["field", "value"])

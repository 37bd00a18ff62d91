"""`salt-vla doctor`"""

from __future__ import annotations

from dataclasses import asdict

from salt_vla.cli.printing import print_json, print_table
from salt_vla.operations.doctor import examine


def doctor(json: bool = False) -> int:
    """Is this machine fit for a night of training, and is anything left undone here? Exit code 1 when
    something is refused.

    Looks at Python, torch and its GPU, decoders, memory, limits, disk, clock, what a logout ends, and at
    runs, caches and jobs that nobody carries on. Every warning has its cure. Nothing is changed.

    Example: salt-vla doctor

    Args:
        json: print JSON instead of a table.
    """
    findings = list(examine())
    if json:
        print_json([asdict(finding) for finding in findings])
    else:
        rows = [asdict(finding) | {"": finding.verdict} for finding in findings]
        print_table(rows, ["check", "", "what", "cure"])
    return int(any(finding.verdict == "refuse" for finding in findings))

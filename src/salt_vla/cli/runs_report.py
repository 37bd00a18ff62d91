"""`salt-vla runs report`"""

from __future__ import annotations

from json import dumps
from pathlib import Path


def report(out: Path | None = None, json: bool = False) -> None:
    """Write PROGRESS.md and PROGRESS.html: what was learned, what runs and waits, what to do next and with
    which command. What people have written into PROGRESS.md is kept.

    Example: salt-vla runs report

    Args:
        out: the folder to write into; default: SALT_VLA_ROOT.
        json: print what the pages say as JSON too.
    """
    from salt_vla.operations.handoff import gather, write_handoff
    from salt_vla.operations.handoff.sections import conclusions

    project = gather()
    page, html = write_handoff(out, project)
    if json:
        said = dumps(project.to_json() | {"page": str(page), "html": str(html)}, indent=2)
        print(said)
        return
    for sentence in conclusions(project):
        print(sentence)
    print(f"{page}\n{html}")

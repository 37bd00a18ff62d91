"""The handoff: `PROGRESS.md` and `PROGRESS.html`, from which somebody who has nothing else goes on."""

from salt_vla.operations.handoff.marks import MarkError
from salt_vla.operations.handoff.write import gather, refresh, write_handoff

__all__ = ["MarkError", "gather", "refresh", "write_handoff"]

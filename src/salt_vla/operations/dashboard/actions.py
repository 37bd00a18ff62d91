"""What a page may do beside showing, for whoever gives the token: stop a run, change the queue.

Every answer is a sentence for the page; a wrong token is told nothing else.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable

from salt_vla.errors import UserError
from salt_vla.operations.control import stop

SECONDS_TO_STOP = 5.0  # How long a page waits for the end that it asked for.


class Actions:
    """`token`: what has to be given; without one there is nothing to be done at all."""

    def __init__(self, token: str = "") -> None:
        self.token = token

    def stop(self, given: str | None, name: str) -> str:
        """Ask the run to end after its step, with a checkpoint."""

        def ask() -> str:
            said: list[str] = []
            ended = stop(name, SECONDS_TO_STOP, said.append)
            return "; ".join([*said, ended])

        return self.do(given, ask)

    def do(self, given: str | None, what: Callable[[], str]) -> str:
        """Carry `what` out if the token is right; what came of it, in a sentence."""
        if not self.token:
            return "This page only shows; start it with --token to act."
        if not hmac.compare_digest(str(given or "").encode(), self.token.encode()):
            return "Give the token, at the top, first."
        try:
            return what()
        except UserError as error:
            return str(error)

"""What a page may do beside showing, for whoever gives the token: stop a run, change the queue.

Every answer is a sentence for the page; a wrong token is told nothing else.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable

from salt_vla.errors import UserError


class Actions:
    """`token`: what has to be given; without one there is nothing to be done at all."""

    def __init__(self, token: str = "") -> None:
        self.token = token

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

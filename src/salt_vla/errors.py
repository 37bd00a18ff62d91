"""The errors a person can cure: what is wrong, where, and what to do, in one sentence (and a table below).

Raised where the fact is known; only the command line turns them into an exit code (2).
"""

from __future__ import annotations


class UserError(Exception):
    """Something the caller can mend; `str(error)` is the whole message, without a traceback."""


class ConfigError(UserError):
    """A field of a configuration has a value that cannot work."""


class DataError(UserError):
    """A data set, clip table or video file is missing, malformed or does not fit."""


class CacheError(UserError):
    """A cache is missing, incomplete, damaged, or was built from something else."""


class RunError(UserError):
    """A run directory is missing, busy, or holds something other than what was asked for."""


class ResourceError(UserError):
    """Disk, memory or permissions do not suffice for the work."""


class HubError(UserError):
    """A repository of a hub is missing, moved, gated, out of reach, or holds nothing that is read here."""

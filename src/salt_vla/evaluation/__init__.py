"""What a frozen encoder knows: targets, features, probes, and tables with intervals over episodes.

Importing the package loads neither torch nor scikit-learn; a name below loads its file when it is asked for.
Knows nothing of training, runs or reports.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "Comparison": "results",
    "ProbeSet": "probing",
    "Row": "results",
    "SuiteResult": "results",
    "TokenModel": "features",
    "aggregate_seeds": "seeds",
    "build_targets": "targets",
    "features_of": "features",
    "run_probe_suite": "probing",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)

"""What an installation rests on: few dependencies, exact versions of all, licence and typing marker."""

from __future__ import annotations

import os
import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
MAX_CORE_DEPENDENCIES = 12
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TESTED = PROJECT["dependencies"] + [
    need for extra in ("sim", "scale", "sweep", "dev") for need in PROJECT["optional-dependencies"][extra]
]
PIN = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*)==(?P<version>[0-9][\w.]*)")


@pytest.fixture(scope="module")
def pins() -> dict[str, str]:
    """Canonical name → version of every line of constraints.txt; no line may be anything but an exact pin."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    matches = {line: PIN.fullmatch(line) for line in lines if line and not line.startswith("#")}
    assert not [line for line, match in matches.items() if match is None]
    return {canonicalize_name(m["name"]): m["version"] for m in matches.values() if m is not None}


def test_core_dependencies_are_few() -> None:
    assert len(PROJECT["dependencies"]) <= MAX_CORE_DEPENDENCIES


def test_constraints_pin_all_that_is_installed_with_the_package(pins: dict[str, str]) -> None:
    """Every dependency, and theirs, down to the leaves; what a package itself requires exactly is exact."""
    waiting = [Requirement(text) for text in TESTED]
    seen: set[str] = set()
    while waiting:
        need = waiting.pop()
        name = canonicalize_name(need.name)
        applies = need.marker is None or need.marker.evaluate({**default_environment(), "extra": ""})
        is_exact = any(specifier.operator == "==" for specifier in need.specifier)
        if applies and not is_exact and name not in seen:
            seen.add(name)
            waiting += _requirements_of(name)
    assert not seen - set(pins)


def _requirements_of(name: str) -> list[Requirement]:
    try:
        return [Requirement(text) for text in metadata.requires(name) or []]
    except metadata.PackageNotFoundError:  # an extra that is not installed here
        return []


def test_constraints_lie_within_the_declared_ranges(pins: dict[str, str]) -> None:
    needs = [Requirement(text) for text in TESTED]
    outside = [str(need) for need in needs if pins[canonicalize_name(need.name)] not in need.specifier]
    assert not outside


def test_package_says_that_it_is_typed_and_under_which_licence() -> None:
    assert (ROOT / "src" / "salt_vla" / "py.typed").exists()
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_the_gate_can_be_run() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)

"""Every entry of every table leads to a factory; unknown names are answered with the known ones."""

from __future__ import annotations

import subprocess
import sys

import pytest

from salt_vla import registry
from salt_vla.errors import UserError
from salt_vla.registry import SOURCES, TEACHERS, resolve

TABLES = {name: table for name, table in vars(registry).items() if name.isupper()}
ENTRIES = [(kind, name) for kind, table in TABLES.items() for name in table]


def test_the_tables_are_the_ones_we_know():
    assert set(TABLES) == {
        *("TEACHERS", "SOURCES", "SIGNALS", "RECORDINGS", "RECORDED_FILES", "LOSSES", "PROBES"),
        *("SUITES", "SURPRISE"),
    }
    assert "pixel" in TEACHERS and "lerobot" in SOURCES
    assert set(registry.SIGNALS) == set(registry.RECORDINGS) == set(registry.RECORDED_FILES) <= set(SOURCES)


@pytest.mark.parametrize(("kind", "name"), ENTRIES)
def test_every_entry_resolves(kind, name):
    factory = resolve(TABLES[kind], name)
    module, _, attribute = TABLES[kind][name].partition(":")
    assert callable(factory)
    assert (factory.__module__, factory.__name__) == (module, attribute)


@pytest.mark.parametrize("kind", sorted(TABLES))
def test_an_unknown_name_is_answered_with_the_known_ones(kind):
    table = TABLES[kind]
    with pytest.raises(
        UserError, match=f"'nonsense' is not known here; known names: {', '.join(sorted(table))}"
    ):
        resolve(table, "nonsense")


def test_reading_the_tables_imports_no_part():
    code = (
        "import sys, salt_vla.registry\n"
        "heavy = {'torch', 'av', 'pyarrow', 'salt_vla.teachers', 'salt_vla.data'} & set(sys.modules)\n"
        "print(sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

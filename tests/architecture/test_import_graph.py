"""Who imports whom: no circles, nothing undeclared, and a command line that is light until it works.

The layers themselves are import-linter's business (`.importlinter`, run by `make lint`).
"""

from __future__ import annotations

import graphlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import grimp
import pytest

from salt_vla.cli import COMMANDS

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "sklearn", "scipy", "matplotlib", "av", "pyarrow")
IMPORT_NAMES = {"scikit-learn": "sklearn"}
# Parts that a declared dependency always brings: matplotlib pillow, scikit-learn scipy and threadpoolctl,
# transformers the hub's client.
BROUGHT_ALONG = {"PIL", "scipy", "threadpoolctl", "huggingface_hub", "flask", "werkzeug"}


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("salt_vla", include_external_packages=True, cache_dir=None)


def test_no_module_imports_itself_in_a_circle(graph: grimp.ImportGraph) -> None:
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" ← ".join(error.args[1]))


def test_every_third_party_import_is_declared(graph: grimp.ImportGraph) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [need for needs in project["optional-dependencies"].values() for need in needs]
    names = [re.split(r"[^\w.-]", need)[0] for need in project["dependencies"] + extras]
    declared = {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in names}
    external = {module for module in graph.modules if not module.startswith("salt_vla")}
    assert external - set(sys.stdlib_module_names) <= declared | BROUGHT_ALONG


RUN = "sys.argv = {!r}.split(); from salt_vla.cli import main; raise SystemExit(main())"
HELP = [f"salt-vla {noun} {verb} --help" for noun, verbs in COMMANDS.items() for verb in verbs]
LIGHT = {"import salt_vla": "import salt_vla"} | {
    command: RUN.format(command) for command in ["salt-vla --help", "salt-vla recipes ls --json", *HELP]
}


@pytest.mark.parametrize("code", LIGHT.values(), ids=LIGHT.keys())
def test_nothing_heavy_is_imported_before_there_is_work(code: str) -> None:
    script = f"""
import sys
try:
    {code}
except SystemExit as stop:
    assert not stop.code, stop.code
loaded = sorted(set({HEAVY!r}) & set(sys.modules))
print("heavy:", *loaded, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "heavy:"

"""What a killed writer leaves of a file is tidied by the next one; a living writer's is not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from salt_vla.files import remove_left_parts, write_text

KILLED = """
import os, signal, sys
from pathlib import Path
from salt_vla.files import write_atomically
write_atomically(Path(sys.argv[1]), lambda part: os.kill(os.getpid(), signal.SIGKILL))
"""


def test_parts_of_the_dead_go_and_those_of_the_living_stay(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", KILLED, tmp_path / "note.json"], check=False)
    (left,) = tmp_path.glob(".*.part")
    write_text(tmp_path / "note.json", "{}")
    of_this_process = tmp_path / f".other.json.{os.getpid()}-abc.part"
    of_nobody = tmp_path / ".kept.txt"
    of_this_process.touch(), of_nobody.touch()
    assert left.is_file()
    remove_left_parts(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"note.json", of_this_process.name, ".kept.txt"}

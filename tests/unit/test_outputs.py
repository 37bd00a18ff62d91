"""What a command may write over: an earlier answer of its own kind, and nothing else."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from salt_vla.data.clip_table import ClipTable
from salt_vla.errors import ConfigError, ResourceError
from salt_vla.jobs.outputs import CLIP_TABLE, PICTURE, PNG, REASONS, Kind, require_output
from salt_vla.rundir import write_text

KINDS = {"table": CLIP_TABLE, "reasons": REASONS, "picture": PICTURE}


@pytest.fixture
def files(tmp_path: Path, tiny_table: ClipTable) -> dict[str, Path]:
    """A file of each kind, and things that commands must leave alone."""
    tiny_table.write(tmp_path / "table")
    (tmp_path / "reasons").write_text('[{"key": "a", "file": "a.mp4", "reason": "is empty"}]')
    (tmp_path / "picture").write_bytes(PNG + b"more")
    (tmp_path / "list.csv").write_text("path\na.mp4\n")
    (tmp_path / "train.json").write_text('[{"id": "1", "label": "lift"}]')
    (tmp_path / "film.mp4").write_bytes(b"\0\0\0\x18ftypmp42")
    pq.write_table(pa.table({"path": ["a.mp4"]}), tmp_path / "list.parquet")
    return {path.name: path for path in tmp_path.iterdir()}


@pytest.mark.parametrize("kind", KINDS)
def test_only_an_earlier_answer_is_written_over(files: dict[str, Path], kind: str) -> None:
    require_output(files[kind], KINDS[kind])
    for name, path in files.items():
        if name != kind:
            with pytest.raises(
                ConfigError, match=f"{name} is there already and is not {KINDS[kind].name[:8]}"
            ):
                require_output(path, KINDS[kind])


@pytest.mark.parametrize("kind", KINDS.values())
def test_a_new_or_empty_file_may_be_written(tmp_path: Path, kind: Kind) -> None:
    require_output(tmp_path / "new", kind)
    require_output(tmp_path / "a" / "new" / "place", kind)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "empty").touch()
    require_output(tmp_path / "empty", kind)


def test_what_the_command_reads_is_never_its_output(files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("table")
    os.link(files["table"], tmp_path / "hard")
    for out in ("table", "link", "hard", "../" + tmp_path.name + "/table"):
        with pytest.raises(ConfigError, match="is what the command reads; give another name"):
            require_output(tmp_path / out, CLIP_TABLE, [tmp_path / "nowhere", files["table"]])
    require_output(tmp_path / "other", CLIP_TABLE, [files["table"]])


@pytest.mark.parametrize("place", ["/dev/null", "/dev/full", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_devices_are_refused_even_where_they_lead_to_a_file(place: str) -> None:
    for refuse in (lambda: require_output(Path(place), REASONS), lambda: write_text(Path(place), "text")):
        with pytest.raises(ResourceError, match="it is a device or a pipe; give the name of a file"):
            refuse()
    assert stat.S_ISCHR(Path("/dev/full").stat().st_mode)


def test_pipes_and_folders_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ResourceError, match=r"pipe: it is a device or a pipe"):
        write_text(tmp_path / "pipe", "text")
    with pytest.raises(ResourceError, match=r"/folder: it is a folder; give the name of a file in it"):
        write_text(tmp_path / "folder", "text")
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match=r"/file is no folder; choose another one"):
        require_output(tmp_path / "file" / "below" / "x.json", REASONS)
    for name in ("", "."):
        with pytest.raises(ResourceError, match="it is a folder; give the name of a file in it"):
            require_output(Path(name), CLIP_TABLE)
    with pytest.raises(ConfigError, match="is not text in UTF-8; give another name"):
        require_output(tmp_path / "\udcff.parquet", CLIP_TABLE)
    with pytest.raises(ResourceError, match="File name too long"):
        require_output(tmp_path / ("x" * 300), CLIP_TABLE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "pipe"]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_folder_that_may_not_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    code = """
import os, sys
from pathlib import Path
from salt_vla.errors import UserError
from salt_vla.jobs.outputs import REASONS, require_output
from salt_vla.rundir import write_text
os.setuid(65534)
for act in (lambda out: require_output(out, REASONS), lambda out: write_text(out, "text")):
    try:
        act(Path(sys.argv[1]))
    except UserError as error:
        print(error)
"""
    for folder in (tmp_path, *tmp_path.parents):  # pytest closes its own to other users
        folder.chmod(stat.S_IMODE(folder.stat().st_mode) | 0o055)
    out = tmp_path / "bad.json"
    said = subprocess.run(
        [sys.executable, "-c", code, out], capture_output=True, text=True, check=True
    ).stdout
    assert said.splitlines() == [f"cannot write {out}: permission denied; choose another folder"] * 2

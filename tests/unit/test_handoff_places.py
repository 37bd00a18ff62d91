"""Where `runs report` writes: a new project's folder, and what it says of places that are none."""

from __future__ import annotations

from pathlib import Path

import pytest

from salt_vla.cli import main


def test_the_first_report_of_a_project_makes_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "a" / "new" / "project"
    monkeypatch.setenv("SALT_VLA_ROOT", str(place))
    assert main(["runs", "report"]) == 0, capsys.readouterr().err
    assert "salt-vla demo" in (place / "PROGRESS.md").read_text()
    assert sorted(path.name for path in place.iterdir() if path.name[0] != ".") == [
        "PROGRESS.html",
        "PROGRESS.md",
    ]


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_file_in_the_place_of_a_folder_is_called_one(
    below: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SALT_VLA_ROOT", str(tmp_path))
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    assert main(["runs", "report", "--out", str(file / below)]) == 2
    said = capsys.readouterr().err
    assert f"{file} is no folder; choose another one" in said and "make space" not in said
    assert file.read_text() == "mine"

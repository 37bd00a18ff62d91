"""Pictures of runs for the page: the PNG files in `runs/NAME/pictures/`, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

from flask import Flask, Response, abort, send_file

from salt_vla.errors import RunError
from salt_vla.rundir import RunDirectory, root

_PICTURE = re.compile(r"[a-z0-9][a-z0-9_-]{0,60}\.png")


def serve_pictures(server: Flask) -> None:
    """The address `/picture/RUN/FILE`."""

    @server.get("/picture/<run>/<picture>")
    def picture(run: str, picture: str) -> Response:
        file = safe_picture(run, picture)
        if file is None:
            abort(404)
        return send_file(file, mimetype="image/png", max_age=0)


def pictures_of(run: RunDirectory) -> list[Path]:
    """Those that may be shown, by name."""
    found = sorted(run.pictures.iterdir()) if run.pictures.is_dir() else []
    return [file for file in found if safe_picture(run.name, file.name)]


def safe_picture(run: str, picture: str) -> Path | None:
    """The file, if it is a run's picture and lies below the root, wherever links may lead."""
    if not _PICTURE.fullmatch(picture):
        return None
    try:
        file = RunDirectory.named(run).pictures / picture
    except RunError:
        return None
    return file if file.is_file() and file.resolve().is_relative_to(root()) else None

"""A directory's path or a hub id → a local folder: the one place that touches the network.

Fetches configurations, safetensors, tables and films, never code or pickles. Knows no model and no data set.
"""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal, cast

from salt_vla.errors import HubError

Kind = Literal["model", "dataset"]

# Patterns are fnmatch's, as the hub's client has them: `*` matches `/` too.
MODEL_FILES = (
    "config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
)
DATASET_FILES = ("*.json", "*.jsonl", "*.parquet", "*.csv", "*.mp4", "*.webm")
SAFE = (".json", ".jsonl", ".safetensors", ".parquet", ".csv", ".mp4", ".webm", ".avi", ".mkv", ".txt", ".md")
TIMEOUT = 10.0  # Seconds for the hub's first answer; without one, what was downloaded before is used.
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_id(name: str) -> bool:
    """Whether `name` reads as `organisation/repository`; says nothing about whether there is one."""
    return _ID.fullmatch(name) is not None and ".." not in name and "--" not in name


def local_folder(
    name: str,
    kind: Kind = "model",
    revision: str | None = None,
    patterns: tuple[str, ...] = MODEL_FILES,
) -> Path:
    """The folder that holds `name`: itself where it is a directory, else a download of that hub id.

    Files are those that match `patterns`, at `revision` (a commit, tag or branch; default: the newest).
    Without an answer from the hub, a complete copy in its client's own cache is used. Raises `HubError` when
    there is neither a directory, nor a copy, nor a repository that can be read, or when it holds no such
    file; and for patterns that would fetch what could run code.
    """
    if Path(name).is_dir():
        return Path(name)
    if not is_hub_id(name):
        raise HubError(f"{name!r} is neither a directory nor a hub id (organisation/repository)")
    unsafe = [pattern for pattern in patterns if not pattern.endswith(SAFE)]
    if unsafe or not patterns:
        raise HubError(f"{name}: files {unsafe} are not fetched; safe endings: {', '.join(SAFE)}")
    return _download(name, kind, revision, patterns)


def _download(name: str, kind: Kind, revision: str | None, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    # OSError and the base of the client library's errors, whichever library the installed hub client uses.
    failures = cast(tuple[type[Exception], ...], HfHubHTTPError.__bases__)
    ask = HfApi().model_info if kind == "model" else HfApi().dataset_info
    try:
        info = ask(name, revision=revision, timeout=TIMEOUT)
    except failures as error:
        copy = _copy(name, kind, revision, patterns)
        if copy is None:
            raise HubError(_why(name, kind, revision, error)) from error
        return copy
    if info.id.lower() != name.lower():
        raise HubError(
            f"{kind} {name} was moved on the hub and is now {info.id}: look at it there, and give that id if "
            "it is what you mean"
        )
    _require_match(name, kind, [file.rfilename for file in info.siblings or []], patterns)
    try:
        return Path(snapshot_download(name, repo_type=kind, revision=info.sha, allow_patterns=list(patterns)))
    except failures as error:
        raise HubError(
            f"{kind} {name} could not be downloaded whole ({_first_line(error)}); run the same command "
            f"again, or {_elsewhere(name, kind, revision)}"
        ) from error


def _copy(name: str, kind: Kind, revision: str | None, patterns: tuple[str, ...]) -> Path | None:
    """What an earlier download left in the hub client's cache, if it is complete."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            name, repo_type=kind, revision=revision, allow_patterns=list(patterns), local_files_only=True
        )
    except LocalEntryNotFoundError:
        return None
    return Path(folder)


def _require_match(name: str, kind: Kind, files: list[str], patterns: tuple[str, ...]) -> None:
    """Refuse a repository without any such file; where weights are wanted, one without weights."""
    weights = tuple(pattern for pattern in patterns if pattern.endswith(".safetensors"))
    if any(fnmatch(file, pattern) for file in files for pattern in weights or patterns):
        return
    held = ", ".join(files[:8]) + (", …" if len(files) > 8 else "")
    cure = "; a pickle is fetched by hand and converted with: salt-vla teacher convert" if weights else ""
    raise HubError(
        f"{kind} {name} holds none of the files that are read here ({', '.join(weights or patterns)}); it "
        f"holds {held or 'nothing'}{cure}"
    )


def _why(name: str, kind: Kind, revision: str | None, error: Exception) -> str:
    """One sentence: what the hub said, and what to do."""
    from huggingface_hub.errors import (
        GatedRepoError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    elsewhere = _elsewhere(name, kind, revision)
    if isinstance(error, GatedRepoError):
        return (
            f"{kind} {name} is gated: accept its terms on its page, log in with `hf auth login` and run the "
            f"same command again, or {elsewhere}"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{kind} {name} has no revision {revision!r}; look at its history, or {elsewhere}"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"there is no {kind} {name} on the hub (never there, removed, renamed, or private): check the "
            f"id, log in with `hf auth login` if it is private, or {elsewhere}; another upload of the "
            "same title need not hold the same thing"
        )
    if isinstance(error, OfflineModeIsEnabled):
        return (
            f"{kind} {name} is not on this machine and HF_HUB_OFFLINE forbids asking the hub: unset it, or "
            f"{elsewhere}"
        )
    return (
        f"{kind} {name} is not on this machine and the hub gave no answer ({_first_line(error)}): {elsewhere}"
    )


def _elsewhere(name: str, kind: Kind, revision: str | None) -> str:
    options = " --repo-type dataset" if kind == "dataset" else ""
    options += f" --revision {revision}" if revision else ""
    folder = name.split("/")[1]
    return (
        f"download it where there is a network (`hf download {name}{options} --local-dir {folder}`) and give "
        "that directory instead of the name"
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__

"""The one way to the network: a directory passes, every refusal of the hub is a sentence with a way out.

The hub's own client runs here, against a small server on this machine that answers as the hub does, and
against addresses where nobody answers.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import huggingface_hub.constants
import pytest

from salt_vla.errors import HubError
from salt_vla.hub import DATASET_FILES, is_hub_id, local_folder

COMMIT = "a" * 40
FILES = {
    "config.json": b'{"model_type": "dinov2"}',
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"a pickle",
    "modeling.py": b"print('code')",
}


class Hub(BaseHTTPRequestHandler):
    """org/there is a repository; org/gated, org/private answer as such; org/moved became org/there."""

    asked: list[str]

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = unquote(self.path.split("?")[0])
        self.server.asked.append(path)
        if "org/gated" in path:
            return self.reply(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"}, body)
        if "org/ill" in path:
            return self.reply(500, b"{}", {}, body)
        if path.startswith(("/api/models/org/there", "/api/models/org/moved", "/api/models/org/pickled")):
            return self.of_repository(path, body)
        if path.startswith(f"/org/there/resolve/{COMMIT}/"):
            content = FILES[path.rsplit("/", 1)[1]]
            etag = hashlib.sha1(content).hexdigest()
            return self.reply(200, content, {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'}, body)
        return self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)

    def of_repository(self, path: str, body: bool) -> None:
        if "/revision/nosuch" in path:
            return self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
        name = "org/pickled" if "pickled" in path else "org/there"
        files = [file for file in FILES if name == "org/there" or not file.endswith("safetensors")]
        if "/tree/" in path:
            answer: object = [
                {"type": "file", "path": file, "size": len(FILES[file]), "oid": "0" * 40} for file in files
            ]
        else:
            answer = {"_id": "1", "id": name, "sha": COMMIT, "siblings": [{"rfilename": f} for f in files]}
        return self.reply(200, json.dumps(answer).encode(), {"Content-Type": "application/json"}, body)

    def reply(self, code: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(code)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked = []
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    use(monkeypatch, tmp_path, f"http://127.0.0.1:{server.server_port}")
    yield server
    server.shutdown()
    server.server_close()


def use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, endpoint: str) -> None:
    """Point the client there: what HF_ENDPOINT and HF_HUB_CACHE set when it is imported."""
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))


def test_a_directory_is_itself_and_nobody_is_asked(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    assert local_folder(str(tmp_path), "dataset") == tmp_path
    assert hub.asked == []


def test_only_the_files_that_are_read_are_fetched(hub: ThreadingHTTPServer) -> None:
    folder = local_folder("org/there")
    assert {file.name for file in folder.iterdir()} == {"config.json", "model.safetensors"}
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert not [path for path in hub.asked if path.endswith((".bin", ".py"))]


def test_a_copy_serves_when_the_hub_does_not_answer(
    hub: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = local_folder("org/there", revision=COMMIT)
    use(monkeypatch, tmp_path, "http://127.0.0.1:9")
    assert local_folder("org/there", revision=COMMIT) == folder
    (folder / "model.safetensors").unlink()  # Half a copy is none.
    with pytest.raises(HubError, match="not on this machine and the hub gave no answer"):
        local_folder("org/there", revision=COMMIT)


@pytest.mark.parametrize(
    ("name", "revision", "sentence"),
    [
        ("org/gone", None, "there is no model org/gone on the hub .* check the id"),
        ("org/gated", None, "model org/gated is gated: accept its terms on its page"),
        ("org/there", "nosuch", "model org/there has no revision 'nosuch'"),
        ("org/moved", None, "model org/moved was moved on the hub and is now org/there"),
        (
            "org/pickled",
            None,
            r"holds none of the files .* it holds config\.json, pytorch_model\.bin.*teacher convert",
        ),
        ("org/ill", None, "org/ill is not on this machine and the hub gave no answer .*500"),
    ],
)
def test_every_refusal_says_what_to_do(
    name: str, revision: str | None, sentence: str, hub: ThreadingHTTPServer
) -> None:
    with pytest.raises(HubError, match=sentence) as caught:
        local_folder(name, revision=revision)
    if name not in ("org/moved", "org/pickled"):
        flag = " --revision nosuch" if revision else ""
        assert f"`hf download {name}{flag} --local-dir {name[4:]}`" in str(caught.value)
    assert len(hub.asked) < 4  # No long retries.


OFFLINE = """
import sys, time
from salt_vla.errors import HubError
from salt_vla.hub import local_folder
began = time.monotonic()
try:
    local_folder("MCG-NJU/videomae-base", sys.argv[1])
except HubError as error:
    print(error)
print(time.monotonic() - began < 20, file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("setting", "kind", "sentence"),
    [
        ({"HF_HUB_OFFLINE": "1"}, "model", "HF_HUB_OFFLINE forbids asking the hub: unset it, or download it"),
        ({"HF_ENDPOINT": "http://hub.invalid"}, "dataset", "the hub gave no answer (ConnectError"),
    ],
)
def test_offline_is_a_sentence_at_once(
    setting: dict[str, str], kind: str, sentence: str, tmp_path: Path
) -> None:
    environment = {"PATH": "/usr/bin", "HF_HOME": str(tmp_path), **setting}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, kind], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.stderr.splitlines()[-1] == "True"
    assert done.stdout.startswith(f"{kind} MCG-NJU/videomae-base is not on this machine and ")
    assert sentence in done.stdout
    option = " --repo-type dataset" if kind == "dataset" else ""
    assert f"hf download MCG-NJU/videomae-base{option} --local-dir videomae-base" in done.stdout


@pytest.mark.parametrize(
    "name", ["nothing", "a/b/c", "../up/here", "/tmp/x", "a/..", "", "org/na me", "a--b/c"]
)
def test_what_is_no_hub_id_is_not_asked_for(name: str, hub: ThreadingHTTPServer) -> None:
    assert not is_hub_id(name)
    if name:
        with pytest.raises(HubError, match="neither a directory nor a hub id"):
            local_folder(name)
    assert hub.asked == []


@pytest.mark.parametrize("patterns", [("*",), ("config.json", "*.bin"), ("*.py",), ()])
def test_nothing_that_could_run_code_is_fetched(patterns: tuple[str, ...], hub: ThreadingHTTPServer) -> None:
    with pytest.raises(HubError, match="are not fetched"):
        local_folder("org/there", patterns=patterns)
    assert hub.asked == []


def test_the_patterns_of_data_sets_are_safe_ones(hub: ThreadingHTTPServer) -> None:
    with pytest.raises(HubError, match="there is no dataset org/none"):
        local_folder("org/none", "dataset", patterns=DATASET_FILES)
    assert hub.asked[0].startswith("/api/datasets/org/none")

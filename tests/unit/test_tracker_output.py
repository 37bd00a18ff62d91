"""A tracker's log is kept in the run's folder: no secret of the environment comes into it."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import sys
from salt_vla.operations.trackers.sender import without_secrets_in_output
without_secrets_in_output()
print("key canary-0123456789", flush=True)
print("Loaded credentials for http://u:secretpw@127.0.0.1:1", file=sys.stderr)
assert sys.stderr.fileno() == 2
raise ValueError("http://u:secretpw@127.0.0.1:1 with canary-0123456789")
"""


def test_a_sender_writes_no_secret_into_its_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what libraries print, nor the traceback that it may end with."""
    monkeypatch.setenv("SOME_API_KEY", "canary-0123456789")
    ended = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert ended.returncode == 1 and ended.stdout == "key (SOME_API_KEY)\n"
    assert "Loaded credentials for http://" in ended.stderr and "ValueError: http://" in ended.stderr
    assert "secretpw" not in ended.stderr and "canary" not in ended.stderr

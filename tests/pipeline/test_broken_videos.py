"""Broken films in a data set: each is quarantined for a reason of its own, the others' pixels do not change.

Truncated, flipped, empty, mislabelled, silent about their picture, absurd, out of reach. Flips that leave a
valid stream are decoded: VP9 and H.264 carry no checksum, so what no decoder can notice is not claimed here.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import av
import numpy as np
import psutil
import pytest

from salt_vla.config import ViewConfig
from salt_vla.data.clip_table import Clip, ClipTable
from salt_vla.data.decode import probe
from salt_vla.data.golden import GOLDEN_CLIPS, golden_path
from salt_vla.data.view_lock import ViewReader
from salt_vla.data.workers import Lost, map_in_workers
from salt_vla.errors import DataError
from salt_vla.geometry import ClipGeometry
from salt_vla.jobs.data import read_or_quarantine

GEOMETRY = ClipGeometry(num_frames=8, image_size=32, tubelet_size=2, patch_size=16)
VIEW = ViewConfig(sampling="uniform")  # frames 1 … 22 of 24: a cut at the end is felt
CODECS = ("vp9.webm", "h264.mp4", "av1.mp4")
CUTS = (3, 40, 200, 600, 1200, 2000, 3000, 4500, 5500)


def table_of(files: list[str], root: Path, fps: dict[str, float] | None = None) -> ClipTable:
    rates = fps or {}
    clips = [
        Clip(file, "broken", "folder", file, 0, n, 0, 24, "", "", rates.get(file, 30.0), False, "train")
        for n, file in enumerate(files)
    ]
    return ClipTable.from_clips(clips, root)


def outcomes(
    root: Path, files: list[str], fps: dict[str, float] | None = None
) -> dict[str, np.ndarray | str]:
    """What a cache's builder would write of each file: pixels, or the reason in its quarantine list."""
    reader = ViewReader(table_of(files, root, fps), VIEW, GEOMETRY)
    records = read_or_quarantine(reader, [(file, 0) for file in files])
    return {r.key[0]: r.reason if r.array is None else r.array for r in records}


@pytest.fixture(scope="module")
def whole() -> dict[str, np.ndarray | str]:
    rates = {name: GOLDEN_CLIPS[name] for name in CODECS}
    return outcomes(golden_path(""), list(CODECS), rates)


def without_names(reason: str) -> str:
    """The reason alone: neither clip nor file, and no numbers."""
    return re.sub(r"\d+", "N", re.sub(r"(?:clip '[^']*', view \d+: |/\S*)", "", reason))


@pytest.mark.parametrize("name", CODECS)
def test_cut_anywhere_a_film_is_quarantined(name, tmp_path):
    content = golden_path(name).read_bytes()
    cuts = [size for size in CUTS if size < len(content) - 60]
    for size in cuts:
        (tmp_path / f"{size}-{name}").write_bytes(content[:size])
    files = [f"{size}-{name}" for size in cuts]
    found = outcomes(tmp_path, files, dict.fromkeys(files, GOLDEN_CLIPS[name]))
    for file, reason in found.items():
        assert isinstance(reason, str), f"{file} was decoded"
        assert reason.startswith(f"clip '{file}', view 0: ") and file in reason.split(": ", 1)[1]
        assert "\n" not in reason and "Traceback" not in reason and "Errno" not in reason


@pytest.mark.parametrize("name", CODECS)
def test_flipped_bits_are_a_sentence_or_a_picture(name, tmp_path, whole):
    """No crash, no hang, and nothing but pixels of the right shape or a reason."""
    content = golden_path(name).read_bytes()
    rng = np.random.default_rng(1)
    files = []
    for number in range(40):
        damaged = bytearray(content)
        for _ in range(1 + number % 4):
            damaged[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
        files.append(f"{number}-{name}")
        (tmp_path / files[-1]).write_bytes(damaged)
    found = outcomes(tmp_path, files, dict.fromkeys(files, GOLDEN_CLIPS[name]))
    kinds = Counter(
        "refused"
        if isinstance(pixels, str)
        else ("intact" if np.array_equal(pixels, whole[name]) else "passed unnoticed")
        for pixels in found.values()
    )
    assert sum(kinds.values()) == 40
    least = {"vp9.webm": 0, "h264.mp4": 8, "av1.mp4": 20}  # what these decoders notice of forty
    assert kinds["refused"] >= least[name], kinds
    assert all(p.shape == (8, 32, 32, 3) for p in found.values() if not isinstance(p, str))


def write_sound(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        for number in range(8):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, 1024 * number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def write_one_frame(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), "rgb24")))
        container.mux(stream.encode(None))


def with_absurd_size(path: Path) -> None:
    """VP9 whose key frames claim 60,000 × 60,000 pixels; VP9 bitstream specification, 6.2 and 7.2."""
    sync_code, said, claimed = "498342" + "0", f"{95:04x}{53:04x}", f"{59_999:04x}{59_999:04x}"
    content = golden_path("vp9.webm").read_bytes().hex()
    assert sync_code + said in content
    path.write_bytes(bytes.fromhex(content.replace(sync_code + said, sync_code + claimed)))


REASONS = {
    "empty.mp4": "is empty (0 bytes)",
    "text.mp4": "cannot be decoded: Invalid data",
    "sound.mp4": "holds no video stream",
    "one_frame.mp4": "ends before frame 1",
    "absurd.webm": "its header claims a size or setting that no film has",
    "folder.mp4": "is a folder",
    "pipe.mp4": "is no regular file",
    "nowhere.mp4": "is missing",
    "broken_link.mp4": "is missing",
    "circle.mp4": "cannot be reached",
    "text.mp4/inside.mp4": "is missing",
    "../outside.mp4": "leaves the data set's root",
    "/etc/passwd": "leaves the data set's root",
    "x" * 300 + ".mp4": "cannot be reached: File name too long",
    "null\0.mp4": "cannot be reached: embedded null byte",
}


@pytest.fixture
def shelf(tmp_path) -> Path:
    root = tmp_path / "root"
    root.mkdir()
    (root / "empty.mp4").touch()
    (root / "text.mp4").write_text("a film about a text\n" * 100)
    write_sound(root / "sound.mp4")
    write_one_frame(root / "one_frame.mp4")
    with_absurd_size(root / "absurd.webm")
    (root / "folder.mp4").mkdir()
    os.mkfifo(root / "pipe.mp4")
    (root / "broken_link.mp4").symlink_to(root / "gone.mp4")
    (root / "circle.mp4").symlink_to(root / "circle.mp4")
    (tmp_path / "outside.mp4").write_bytes(golden_path("h264.mp4").read_bytes())
    (root / "good.mp4").write_bytes(golden_path("h264.mp4").read_bytes())
    (root / "link.mp4").symlink_to(tmp_path / "outside.mp4")
    (root / "wrong_extension.mp4").write_bytes(golden_path("vp9.webm").read_bytes())
    return root


def test_each_kind_of_file_that_is_no_film_has_its_own_reason(shelf):
    found = outcomes(shelf, list(REASONS))
    for file, part in REASONS.items():
        assert isinstance(found[file], str) and part in found[file], (file, found[file])
    distinct = {without_names(reason) for reason in found.values()}
    assert len(distinct) >= 10


def test_a_link_set_within_the_root_and_another_extension_are_read(shelf, whole):
    """A link is the data set's own doing, unlike a path in a list; containers are known by their content."""
    rates = {"wrong_extension.mp4": GOLDEN_CLIPS["vp9.webm"]}
    found = outcomes(shelf, ["good.mp4", "pipe.mp4", "link.mp4", "wrong_extension.mp4"], rates)
    assert np.array_equal(found["good.mp4"], whole["h264.mp4"])
    assert np.array_equal(found["link.mp4"], whole["h264.mp4"])
    assert np.array_equal(found["wrong_extension.mp4"], whole["vp9.webm"])
    assert isinstance(found["pipe.mp4"], str)


def test_probing_refuses_them_for_the_same_reasons(shelf):
    for file, part in REASONS.items():
        if "leaves" not in part and file != "one_frame.mp4":
            with pytest.raises(DataError, match=re.escape(part)):
                probe(shelf / file)


@pytest.mark.skipif(
    os.geteuid() != 0, reason="only root can drop privileges; others cannot read it either way"
)
def test_a_file_that_may_not_be_read_is_told_from_a_damaged_one(tmp_path):
    """Root may read everything, so the reading process becomes somebody else first."""
    code = """
import os, sys
from pathlib import Path
from salt_vla.data.decode import probe, read_frames
from salt_vla.errors import DataError
read_frames(Path(sys.argv[1]) / "mine.mp4", [0], 30.0)
os.setgroups([]); os.setgid(65534); os.setuid(65534)
for name in ("theirs.mp4", "shut/film.mp4"):
    for read in (lambda path: read_frames(path, [0], 30.0), probe):
        try:
            read(Path(sys.argv[1]) / name)
        except DataError as error:
            print(error)
"""
    root = tmp_path / "films"
    (root / "shut").mkdir(parents=True)
    for name in ("mine.mp4", "theirs.mp4", "shut/film.mp4"):
        (root / name).write_bytes(golden_path("h264.mp4").read_bytes())
    for folder in (root, *root.parents):
        if folder.is_relative_to("/tmp") and folder != Path("/tmp"):
            folder.chmod(folder.stat().st_mode | 0o055)
    (root / "theirs.mp4").chmod(0)
    (root / "shut").chmod(0)
    done = subprocess.run(
        [sys.executable, "-c", code, str(root)],
        env=os.environ | {"SALT_VLA_DECODER": "pyav"},
        capture_output=True,
        text=True,
        check=True,
    )
    (root / "shut").chmod(0o755)
    lines = done.stdout.splitlines()
    assert len(lines) == 4, done.stdout + done.stderr
    assert all("theirs.mp4 may not be read by this user" in line for line in lines[:2])
    assert all("shut/film.mp4 cannot be reached: Permission denied" in line for line in lines[2:])


def size_after(count: int, path: Path) -> int:
    """Resident bytes after `count` readings, good and bad in turn."""
    names = ["good.mp4", "cut.mp4", "flipped.mp4"]
    reader = ViewReader(table_of(names, path), VIEW, GEOMETRY)
    for number in range(count):
        list(read_or_quarantine(reader, [(names[number % 3], 0)]))
    return psutil.Process().memory_info().rss


def test_memory_stays_flat(tmp_path):
    """`SALT_VLA_MANY_DECODES=5000` for the long version. Some 4 KB a damaged film stay allocated: 8 to 16 MiB
    after 5,000 readings of which a third were damaged; whole and cut films leave nothing."""
    content = golden_path("h264.mp4").read_bytes()
    (tmp_path / "good.mp4").write_bytes(content)
    (tmp_path / "cut.mp4").write_bytes(content[:4000])
    (tmp_path / "flipped.mp4").write_bytes(content[:1650] + bytes([content[1650] ^ 0x10]) + content[1651:])
    count = int(os.environ.get("SALT_VLA_MANY_DECODES", "240"))
    before = size_after(120, tmp_path)
    after = size_after(count, tmp_path)
    assert after - before < 4 * 2**20 + 4096 * count, (
        f"{(after - before) / 2**20:.1f} MiB more after {count} decodes"
    )


def first_frames(path: Path) -> str:
    if path.name == "crash.mp4":
        os.abort()
    (record,) = read_or_quarantine(
        ViewReader(table_of([path.name], path.parent), VIEW, GEOMETRY), [(path.name, 0)]
    )
    return record.reason or "read"


def test_a_crash_while_decoding_costs_one_film(tmp_path):
    content = golden_path("h264.mp4").read_bytes()
    for name in ("a.mp4", "crash.mp4", "b.mp4"):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "cut.mp4").write_bytes(content[:3000])
    files = [tmp_path / name for name in ("a.mp4", "crash.mp4", "cut.mp4", "b.mp4")]
    results = list(map_in_workers(first_frames, files, 2, time_limit=120))
    assert results[0] == results[3] == "read" and "cut.mp4" in str(results[2])
    assert results[1] == Lost("the process that worked on it died (SIGABRT)")


def test_workers_read_the_same_bytes_as_one_process(tmp_path, whole):
    paths = [golden_path(name) for name in CODECS] * 2
    for workers in (1, 4):
        for path, pixels in zip(paths, map_in_workers(pixels_of, paths, workers), strict=True):
            assert np.array_equal(pixels, whole[path.name])


def pixels_of(path: Path) -> np.ndarray:
    rates = {path.name: GOLDEN_CLIPS[path.name]}
    return ViewReader(table_of([path.name], path.parent, rates), VIEW, GEOMETRY).read(path.name)

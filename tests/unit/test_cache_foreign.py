"""Folders of one file a clip: whose file is whose, and what is in it, without running any of it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np
import pytest
import torch

from salt_vla.cache.foreign import look_into, pair
from salt_vla.cache.foreign_file import read_latents
from salt_vla.errors import CacheError

SHAPE = (3, 4)


def latents(number: int) -> torch.Tensor:
    return torch.full(SHAPE, float(number))


def lay(folder: Path, names: Sequence[str], metadata: Any = None) -> Path:
    """File n holds n everywhere."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".npy":
            np.save(path, latents(number).numpy())
        else:
            torch.save({"latents": latents(number)}, path)
    if metadata is not None:
        (folder / "metadata.json").write_text(json.dumps(metadata))
    return folder


def test_the_earlier_attempts_folder_is_understood(tmp_path: Path) -> None:
    """Named by video id, the ids listed in metadata.json, its single values beside them."""
    said = {"split": "train", "num_samples": 3, "model": "some/teacher", "latent_shape": list(SHAPE)}
    found = look_into(lay(tmp_path, ["77.pt", "5.pt", "901.pt"], {**said, "video_ids": ["77", "5", "901"]}))
    assert found.listed == ("77", "5", "901") and found.said["model"] == "some/teacher"
    paired = pair(found, (), "check")
    assert paired == {name: name for name in ("77", "5", "901")}
    assert read_latents(found.files["5"], "5", SHAPE).tolist() == latents(1).tolist()


def test_nested_folders_are_part_of_the_name(tmp_path: Path) -> None:
    found = look_into(lay(tmp_path, ["kitchen/a.npy", "kitchen/b.pt", "hall/a.pth", ".hidden/c.pt"]))
    assert sorted(found.files) == ["hall/a", "kitchen/a", "kitchen/b"]
    assert found.files["kitchen/a"] == tmp_path / "kitchen" / "a.npy"


@pytest.mark.parametrize(
    "metadata",
    [
        {"000000.pt": "x", "000001.pt": "y"},
        {"files": {"x": "000000.pt", "y": "./000001.pt"}},
        {"x": "000000.pt", "y": "000001.pt"},
        {"files": {"000000": "x", "000001": "y"}, "shape": [3, 4]},
        [{"file": "000000.pt", "clip_id": "x", "label": "push"}, {"file": "000001.pt", "clip_id": "y"}],
        {"clips": [{"video_id": "y", "path": "000001.pt"}, {"video_id": "x", "path": "000000.pt"}]},
    ],
)
def test_a_mapping_goes_before_the_names(tmp_path: Path, metadata: Any) -> None:
    found = look_into(lay(tmp_path, ["000000.pt", "000001.pt"], metadata))
    assert {name: path.name for name, path in found.files.items()} == {"x": "000000.pt", "y": "000001.pt"}
    assert not found.numbered and found.said == {}
    assert pair(found, (), "check") == {"x": "x", "y": "y"}


def test_what_is_said_of_each_file_is_no_mapping_unless_it_tells_them_apart(tmp_path: Path) -> None:
    found = look_into(lay(tmp_path, ["a.pt", "b.pt"], {"a.pt": "train", "b.pt": "train"}))
    assert sorted(found.files) == ["a", "b"]
    nested = look_into(lay(tmp_path, ["a.pt", "b.pt"], {"a.pt": {"frames": 16}, "b.pt": [1, 2]}))
    assert sorted(nested.files) == ["a", "b"]


@pytest.mark.parametrize("names", [("000000.pt", "000001.pt", "000002.pt"), ("clip_1.npy", "clip_2.npy")])
def test_row_numbers_are_refused_with_the_trap(tmp_path: Path, names: tuple[str, ...]) -> None:
    found = look_into(lay(tmp_path, names))
    assert found.numbered
    with pytest.raises(
        CacheError, match=r"shift by one after every clip that could not be read.*--names rows"
    ):
        pair(found, ("x", "y", "z")[: len(names)], "check")
    rows = pair(found, ("x", "y", "z")[: len(names)], "rows")
    assert list(rows) == ["x", "y", "z"][: len(names)]
    assert [found.files[rows[clip]].name for clip in rows] == list(names)


def test_numbers_that_are_clip_ids_are_names(tmp_path: Path) -> None:
    found = look_into(lay(tmp_path, ["1.pt", "2.pt", "3.pt"]))
    assert pair(found, ("3", "1", "2"), "check") == {"1": "1", "2": "2", "3": "3"}


def test_more_than_nine_rows_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    found = look_into(lay(tmp_path, [f"{number}.pt" for number in range(12)]))
    order = [f"clip {number}" for number in range(12)]
    assert pair(found, order, "rows") == {f"clip {number}": str(number) for number in range(12)}


def test_rows_skip_the_clips_that_could_not_be_read(tmp_path: Path) -> None:
    found = look_into(lay(tmp_path, ["0.pt", "1.pt"]))
    assert pair(found, ("a", "bad", "c"), "rows", ["bad"]) == {"a": "0", "c": "1"}
    with pytest.raises(CacheError, match=r"2 files for 3 readable clips .*ids shift by one"):
        pair(found, ("a", "bad", "c"), "rows")
    with pytest.raises(CacheError, match="'d', which is none of the 3 listed"):
        pair(found, ("a", "bad", "c"), "rows", ["d"])


def shifted(folder: Path, videos: Sequence[str], unreadable: Sequence[str]) -> Path:
    """What the earlier attempt's loop wrote: unreadable clips leave the batch, the names go on by one."""
    readable = [name for name in videos if name not in unreadable]
    folder.mkdir()
    for name, clip in zip(videos, readable, strict=False):
        number = float(videos.index(clip))
        torch.save({"latents": torch.full(SHAPE, number), "video_id": name}, folder / f"{name}.pt")
    (folder / "metadata.json").write_text(json.dumps({"num_samples": len(readable), "video_ids": videos}))
    return folder


def test_names_that_shifted_are_refused_and_moved_back(tmp_path: Path) -> None:
    videos = [str(7 * number + 3) for number in range(20)]
    unreadable = [videos[4], videos[11]]
    found = look_into(shifted(tmp_path / "latents", videos, unreadable))
    with pytest.raises(
        CacheError,
        match=r"of 20 listed clips 2 have no file, 2 of them at the end.*Name the unreadable clips",
    ):
        pair(found, (), "check")
    paired = pair(found, (), "check", unreadable)
    assert list(paired) == [name for name in videos if name not in unreadable]
    for clip, name in paired.items():
        assert read_latents(found.files[name], name, SHAPE)[0, 0] == videos.index(clip)
    with pytest.raises(CacheError, match="18 files for 19 readable clips"):
        pair(found, (), "check", unreadable[:1])
    assert pair(found, (), "clip-ids") == {name: name for name in videos[:18]}


def test_missing_files_elsewhere_are_no_shift(tmp_path: Path) -> None:
    found = look_into(lay(tmp_path, ["a.pt", "c.pt"], {"ids": ["a", "b", "c"]}))
    assert list(pair(found, (), "check")) == ["a", "c"]
    with pytest.raises(CacheError, match="1 of them at the end"):
        pair(found := look_into(lay(tmp_path / "x", ["a.pt", "b.pt"])), ("a", "b", "c"), "check")
    assert found.listed == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("batch", [(), (1,), (1, 1)])
@pytest.mark.parametrize("container", [None, "latents", "features", "mine"])
def test_tensors_are_read_in_any_width_and_wrapping(
    tmp_path: Path, dtype: torch.dtype, batch: tuple[int, ...], container: str | None
) -> None:
    values = torch.randn(*batch, *SHAPE).to(dtype)
    torch.save(values if container is None else {container: values, "shape": (3, 16)}, tmp_path / "a.pt")
    read = read_latents(tmp_path / "a.pt", "a", SHAPE)
    assert read.shape == SHAPE and read.dtype == (np.float16 if dtype == torch.float16 else np.float32)
    assert np.array_equal(read, values.reshape(SHAPE).float().numpy().astype(read.dtype))


def test_older_files_of_torch_and_arrays_are_read(tmp_path: Path) -> None:
    torch.save(latents(2), tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    np.save(tmp_path / "b.npy", latents(2)[None].numpy().astype(np.float16))
    for name in ("a.pt", "b.npy"):
        assert read_latents(tmp_path / name, name, SHAPE).tolist() == latents(2).tolist()


class Harm:
    def __reduce__(self) -> Any:
        return os.mkdir, ("harmed",)


def write_bad(path: Path, kind: str) -> None:
    """One bad file of each kind."""
    whole = torch.randn(40, 4)
    tensors: dict[str, Any] = {
        "code": {"latents": Harm()},
        "two": {"a": whole, "b": whole},
        "none": {"note": 3},
        "integers": whole.int(),
        "sparse": whole.to_sparse(),
        "shape": whole,
        "huge": torch.zeros(1).expand(2**20, 2**12),
        "other": {"latents": whole, "video_id": "b"},
        "list": [whole],
    }
    if kind in tensors:
        torch.save(tensors[kind], path)
    elif kind == "cut":
        torch.save(whole, path)
        path.write_bytes(path.read_bytes()[:600])
    elif kind == "objects":
        np.save(path, np.array([{"a": 1}], dtype=object))
    elif kind == "cut array":
        np.save(path, whole.numpy())
        path.write_bytes(path.read_bytes()[:300])
    elif kind == "vast array":
        header = {"descr": "<f4", "fortran_order": False, "shape": (2**40, 2**10)}
        with path.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
    elif kind == "numbers":
        np.save(path, np.arange(12).reshape(3, 4))
    elif kind != "missing":
        path.write_bytes(b"" if kind == "empty" else b"no tensors\n" * 9)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("code", "would run code when it is opened"),
        ("two", "no latents under a known name (a, b)"),
        ("none", "no latents under a known name (note)"),
        ("integers", "no plain tensor"),
        ("sparse", "no plain tensor"),
        ("list", "no plain tensor"),
        ("shape", "holds (40, 4) numbers, not (3, 4)"),
        ("huge", "numbers, not"),
        ("other", "says that it is of clip 'b', not 'a'"),
        ("cut", "is damaged"),
        ("empty", "is damaged"),
        ("text", "is damaged"),
        ("missing", "cannot be read: No such file"),
        ("objects", "no array of numbers"),
        ("cut array", "is damaged"),
        ("vast array", "is damaged"),
        ("numbers", "holds int64"),
    ],
)
def test_a_bad_file_is_a_reason_and_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / ("a.npy" if "array" in kind or kind in ("objects", "numbers") else "a.pt")
    write_bad(path, kind)
    with pytest.raises(CacheError) as error:
        read_latents(path, "a", SHAPE)
    assert said in str(error.value) and path.name in str(error.value)
    assert not (tmp_path / "harmed").exists()


def test_folders_that_cannot_be_understood_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="there is no folder"):
        look_into(tmp_path / "none")
    with pytest.raises(CacheError, match="holds no latents"):
        look_into(tmp_path)
    lay(tmp_path, ["a.pt", "a.npy"])
    with pytest.raises(CacheError, match="two files of clip 'a'"):
        look_into(tmp_path)
    (tmp_path / "a.npy").unlink()
    (tmp_path / "metadata.json").write_text("{")
    with pytest.raises(CacheError, match=r"metadata.json cannot be read"):
        look_into(tmp_path)


def counted_on(tmp_path: Path, lost: Sequence[int] = (), more: Sequence[str] = ()) -> tuple[Any, list[str]]:
    """A folder of 100 listed clips, the 11th of them unreadable and all later names one too early; and what
    each name in truth is of."""
    videos = [str(7000 + 37 * number) for number in range(100)]
    readable = [*videos[:10], *videos[11:]]
    folder = shifted(tmp_path / "latents", videos, [videos[10]])
    for number in lost:
        (folder / f"{videos[number]}.pt").unlink()
    for name in more:
        np.save(folder / f"{name}.npy", latents(999).numpy())
    return look_into(folder), readable


@pytest.mark.parametrize(("lost", "more"), [((), ("mean",)), ((50,), ()), ((50, 70), ("mean", "std"))])
def test_stray_and_lost_files_do_not_cover_that_names_have_shifted(
    tmp_path: Path, lost: tuple[int, ...], more: tuple[str, ...]
) -> None:
    found, readable = counted_on(tmp_path, lost, more)
    with pytest.raises(CacheError, match="at the end of the list, as if unreadable clips were skipped"):
        pair(found, (), "check")
    paired = pair(found, (), "check", [found.listed[10]])
    assert list(paired) == [clip for place, clip in enumerate(readable) if place not in lost]
    for clip, name in paired.items():
        assert read_latents(found.files[name], name, SHAPE)[0, 0] == found.listed.index(clip)
    with pytest.raises(CacheError, match="one too many or too few"):
        pair(found, (), "check", found.listed[10:12])


def test_a_last_file_that_is_there_after_all_does_not_cover_a_shift(tmp_path: Path) -> None:
    videos = [f"v{number}k" for number in range(60)]
    found = look_into(lay(tmp_path, [f"{name}.pt" for name in (*videos[:56], videos[-1])], {"ids": videos}))
    with pytest.raises(CacheError, match="60 listed clips 3 have no file, 3 of them at the end"):
        pair(found, (), "check")


def test_names_that_leave_out_the_unreadable_clips_are_right(tmp_path: Path) -> None:
    names = [f"{name}.pt" for name in "abdefgi"]  # c could not be read, h was lost since.
    found = look_into(lay(tmp_path, names, {"ids": list("abcdefghi")}))
    assert pair(found, (), "check", ["c"]) == {name: name for name in "abdefgi"}


@pytest.mark.parametrize(("gone", "more"), [((10,), ()), ((), ("mean",)), ((10, 60), ("mean", "std"))])
def test_row_numbers_with_gaps_and_strangers_are_no_ids(
    tmp_path: Path, gone: tuple[int, ...], more: tuple[str, ...]
) -> None:
    """Ids 1 … 100, and files 0 … 99: nearly all the names are ids, of the wrong clips."""
    rows = [str(number) for number in range(100) if number not in gone]
    ids = [str(number + 1) for number in range(100)]
    found = look_into(lay(tmp_path, [f"{name}.npy" for name in (*rows, *more)], {"ids": ids}))
    for unreadable in ((), ids[10:11]):
        with pytest.raises(CacheError, match="are numbered"):
            pair(found, (), "check", unreadable)
    stated = [ids[number] for number in gone]
    assert pair(found, (), "rows", stated) == {ids[int(row)]: row for row in rows}


def test_a_row_that_was_lost_shifts_no_others(tmp_path: Path) -> None:
    found = look_into(lay(tmp_path, [f"{row:03}.npy" for row in range(40) if row != 7]))
    order = [f"clip{number}" for number in range(40)]
    assert pair(found, order, "rows", ["clip7"])["clip8"] == "008"
    with pytest.raises(CacheError, match="with a gap or a number twice before '008'"):
        pair(found, order, "rows", ["clip20"])
    numbered_on = look_into(lay(tmp_path / "on", [f"{row:03}.npy" for row in range(39)]))
    assert pair(numbered_on, order, "rows", ["clip20"])["clip21"] == "020"


def test_ids_of_many_numbers_are_no_rows(tmp_path: Path) -> None:
    """Something-Something's ids: 1 … n, a seventh of them of another split, one of them beside these."""
    ids = [str(number) for number in range(1, 101) if number % 7]
    found = look_into(lay(tmp_path, [f"{name}.npy" for name in (*ids, "49")], {"ids": ids}))
    assert not found.numbered and len(pair(found, (), "check")) == len(ids) + 1


def test_what_metadata_say_is_kept_without_what_a_terminal_would_obey(tmp_path: Path) -> None:
    said = {"model": "\ud800x \x1b[31mred\x07", "note\n": "naïve – 模型"}
    found = look_into(lay(tmp_path, ["a.npy"], said))
    assert found.said == {"model": "\ufffdx \ufffd[31mred\ufffd", "note\ufffd": "naïve – 模型"}


def test_pipes_and_devices_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.pt")
    (tmp_path / "b.npy").symlink_to("/dev/zero")
    (tmp_path / "c.npy").symlink_to(tmp_path / "gone")
    found = look_into(tmp_path)
    for name, said in (("a", "no file but"), ("b", "no file but"), ("c", "cannot be read: No such file")):
        with pytest.raises(CacheError, match=said):
            read_latents(found.files[name], name)
    os.mkfifo(tmp_path / "metadata.json")
    with pytest.raises(CacheError, match=r"metadata\.json is no file"):
        look_into(tmp_path)


def header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize(
    "content",
    [
        b"PK\x03\x04" + b"junk" * 50,
        header("{'descr': '<f4', (\n"),
        header("(" * 4000 + "\n"),
        header("{1: 2, 'a': 3}\n"),
        header(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({10**30}, 12), }}\n"),
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (-8, 12), }\n") + bytes(400),
    ],
)
def test_whatever_is_wrong_with_an_array_is_a_reason(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(CacheError, match="is damaged, or no array"):
        read_latents(tmp_path / "a.npy", "a")


def test_tensors_of_no_plain_memory_are_a_reason(tmp_path: Path) -> None:
    nested = torch.nested.nested_tensor([torch.zeros(SHAPE), torch.zeros(SHAPE)])
    for tensor in (torch.empty(SHAPE, device="meta"), nested):
        torch.save(tensor, tmp_path / "a.pt")
        with pytest.raises(CacheError, match="holds no plain tensor"):
            read_latents(tmp_path / "a.pt", "a")
    torch.save(torch.full(SHAPE, 1 - 2j).conj().imag, tmp_path / "a.pt")  # Its sign is a bit beside it.
    assert read_latents(tmp_path / "a.pt", "a", SHAPE).tolist() == latents(2).tolist()


def test_a_packed_file_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    torch.save(torch.zeros(1000, 1000), tmp_path / "whole.pt")
    with ZipFile(tmp_path / "whole.pt") as whole, ZipFile(tmp_path / "a.pt", "w", ZIP_DEFLATED) as packed:
        for name in whole.namelist():
            packed.writestr(name, whole.read(name))
    with pytest.raises(CacheError, match=r"is packed \(4,0.* bytes in .*unpack it"):
        read_latents(tmp_path / "a.pt", "a")
    assert read_latents(tmp_path / "whole.pt", "whole").shape == (1000, 1000)

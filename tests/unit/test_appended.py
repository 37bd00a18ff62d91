"""A file that grows is read once: whoever looks again reads what came since, and notices another file."""

from __future__ import annotations

from pathlib import Path

import pytest

from salt_vla.operations.appended import BLOCK, Appended


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "log.txt"


def test_a_look_reads_only_what_came_since_the_last(file: Path) -> None:
    seen = Appended(file)
    assert seen.poll() == []
    file.write_text("a\n" * 100_000)
    assert len(seen.poll()) == 100_000
    assert seen.poll() == []
    with file.open("a") as end:
        end.write("b\nc\n")
    assert seen.poll() == [b"b", b"c"]
    assert seen.bytes_read == file.stat().st_size
    assert seen.beginnings == 1


def test_a_line_in_the_making_is_for_the_next_time(file: Path) -> None:
    file.write_text("whole\nhal")
    seen = Appended(file)
    assert seen.poll() == [b"whole"]
    with file.open("a") as end:
        end.write("f\n\n")
    assert seen.poll() == [b"half", b""]


def test_a_file_in_its_place_is_read_from_the_beginning(file: Path, tmp_path: Path) -> None:
    file.write_text("1\n2\n3\n")
    seen = Appended(file)
    seen.poll()
    trimmed = tmp_path / "part"
    trimmed.write_text("1\n2\n2b\n2c\n")
    trimmed.replace(file)
    assert seen.poll() == [b"1", b"2", b"2b", b"2c"]
    assert seen.beginnings == 2


@pytest.mark.parametrize("text", ["1\n", "1\n5\n6\n7\n"])
def test_a_file_that_was_written_over_is_read_from_the_beginning(file: Path, text: str) -> None:
    file.write_text("1\n2\n3\n")
    seen = Appended(file)
    seen.poll()
    inode = file.stat().st_ino
    with file.open("r+") as same:
        same.truncate()
        same.write(text)
    assert file.stat().st_ino == inode
    assert b"\n".join(seen.poll()) + b"\n" == text.encode()


def test_a_file_that_went_and_came_is_read_from_the_beginning(file: Path) -> None:
    file.write_text("1\n")
    seen = Appended(file)
    seen.poll()
    file.unlink()
    assert seen.poll() == []
    file.write_text("other\n")
    assert seen.poll() == [b"other"]


@pytest.mark.parametrize("length", [1, 80, BLOCK - 1, BLOCK, BLOCK + 7])
@pytest.mark.parametrize("wanted", [0, 1, 3, 5, 9])
def test_the_last_lines_are_found_from_the_end(file: Path, length: int, wanted: int) -> None:
    lines = [str(number).rjust(length, ".").encode()[-length:] for number in range(5)]
    file.write_bytes(b"".join(line + b"\n" for line in lines) + b"cut")
    seen = Appended(file)
    seen.skip_to_last(wanted)
    assert seen.poll() == (lines[-wanted:] if wanted else [])
    with file.open("ab") as end:
        end.write(b" off\n")
    assert seen.poll() == [b"cut off"]


def test_the_last_lines_of_no_file_are_none(file: Path) -> None:
    seen = Appended(file)
    seen.skip_to_last(3)
    assert seen.poll() == []

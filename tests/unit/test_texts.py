"""Text embeddings from a file: what is refused, and that a map learned from training clips finds its way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from salt_vla.errors import DataError
from salt_vla.evaluation.texts import Texts, mapped, read_texts

NAMES = ["open", "shut", "push"]
VALUES = np.arange(1, 13, dtype=np.float32).reshape(3, 4)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """`write(values=VALUES, names=NAMES, kind="npy")` → the file."""

    def make(values: np.ndarray = VALUES, names: object = NAMES, kind: str = "npy") -> Path:
        file = tmp_path / f"texts.{kind}"
        if kind == "npy":
            np.save(file, values, allow_pickle=True)
        else:
            save_file({"embeddings": values}, file)
        file.with_suffix(".json").write_text(json.dumps(names))
        return file

    return make


@pytest.mark.parametrize("kind", ["npy", "safetensors"])
def test_both_forms_are_read(write: Callable[..., Path], kind: str) -> None:
    texts = read_texts(write(kind=kind))
    assert texts.names == tuple(NAMES) and np.array_equal(texts.embeddings, VALUES)
    assert texts.numbers(["push", "open", "push"]).tolist() == [2, 0, 2]


def test_half_precision_is_widened(write: Callable[..., Path]) -> None:
    assert read_texts(write(VALUES.astype(np.float16))).embeddings.dtype == np.float32


@pytest.mark.parametrize(
    ("values", "names", "said"),
    [
        (VALUES[0], NAMES, r"floats of shape \(texts, dims\), not \(4,\)"),
        (VALUES.astype(int), NAMES, "must hold floats"),
        (VALUES[:0], [], "must hold floats"),
        (VALUES * [[1], [np.nan], [1]], NAMES, "'shut' is zero, NaN or infinite"),
        (VALUES * [[1], [1], [0]], NAMES, "'push' is zero, NaN or infinite"),
        (VALUES, NAMES[:2], "names 2 texts for 3 embeddings"),
        (VALUES, ["a", "b", "a"], "names 'a' twice"),
        (VALUES, {"a": 1}, "must be a list of one text a row"),
        (VALUES, [1, 2, 3], "must be a list of one text a row"),
        (np.array([{"a": 1}]), NAMES, r"no \.npy or \.safetensors file of numbers"),
    ],
)
def test_what_is_no_table_of_texts_is_refused(
    write: Callable[..., Path], values: np.ndarray, names: object, said: str
) -> None:
    with pytest.raises(DataError, match=said):
        read_texts(write(values, names))


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    """It would leave a file behind."""
    trace = tmp_path / "trace"

    class Runs:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return Path.touch, (trace,)

    np.save(tmp_path / "texts.npy", np.array([Runs()]), allow_pickle=True)
    with pytest.raises(DataError, match="numbers"):
        read_texts(tmp_path / "texts.npy")
    assert not trace.exists()


@pytest.mark.parametrize("kind", ["npy", "safetensors"])
def test_a_damaged_file_is_refused(write: Callable[..., Path], kind: str) -> None:
    file = write(kind=kind)
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(DataError, match=f"texts.{kind} is no"):
        read_texts(file)
    file.write_bytes(b"")
    with pytest.raises(DataError, match=f"texts.{kind} is no"):
        read_texts(file)


def test_missing_files_are_named(write: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no file of text embeddings"):
        read_texts(tmp_path / "nowhere.npy")
    file = write()
    file.with_suffix(".json").unlink()
    with pytest.raises(DataError, match=r"texts\.json cannot be read"):
        read_texts(file)


def test_several_tensors_are_not_guessed_among(tmp_path: Path) -> None:
    save_file({"a": VALUES, "b": VALUES}, tmp_path / "texts.safetensors")
    with pytest.raises(DataError, match="holds 2 tensors"):
        read_texts(tmp_path / "texts.safetensors")


def test_a_label_without_a_text_is_named() -> None:
    with pytest.raises(DataError, match=r"none for the label 'close' \(1 such"):
        Texts(tuple(NAMES), VALUES).numbers(["open", "close"])


def test_a_linear_map_is_recovered_also_for_a_text_no_clip_had() -> None:
    random = np.random.default_rng(0)
    texts = Texts(tuple("abcdefgh"), random.normal(size=(8, 3)).astype(np.float32))
    to_features = random.normal(size=(3, 5))
    numbers = np.repeat(np.arange(7), 20)
    features = texts.embeddings[numbers] @ to_features + 0.01 * random.normal(size=(140, 5))
    found, alpha = mapped("e", texts, features, numbers, np.arange(140) // 2)
    assert alpha is not None
    assert found == pytest.approx(texts.embeddings @ to_features, abs=0.05)

"""The arithmetic of clips and tokens, and the sentences for sizes that cannot work."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from salt_vla.errors import ConfigError
from salt_vla.geometry import ClipGeometry


def test_the_usual_clip_has_1568_tokens():
    g = ClipGeometry(num_frames=16, image_size=224, tubelet_size=2, patch_size=16)
    assert g == ClipGeometry()
    assert g.token_grid == (8, 14, 14)
    assert g.tokens_per_step == 196
    assert g.num_tokens == 1568
    assert g.patch_dim == 1536
    assert g.clip_bytes == 16 * 224 * 224 * 3 == 2_408_448


@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 20), st.integers(1, 16))
def test_tokens_cover_every_number_of_the_clip_once(steps, tubelet, side, patch):
    g = ClipGeometry(steps * tubelet, side * patch, tubelet, patch)
    assert g.token_grid == (steps, side, side)
    assert g.num_tokens == steps * side * side == steps * g.tokens_per_step
    assert g.num_tokens * g.patch_dim == g.clip_bytes


def test_tokens_are_numbered_time_row_column():
    g = ClipGeometry(num_frames=8, image_size=96)
    steps, rows, columns = g.token_grid
    ids = np.arange(g.num_tokens).reshape(g.token_grid)
    for t, r, c in ((0, 0, 0), (0, 0, 5), (0, 1, 0), (1, 0, 0), (3, 5, 5)):
        assert ids[t, r, c] == (t * rows + r) * columns + c
    assert ids[1, 0, 0] == g.tokens_per_step
    assert (steps, rows, columns) == (4, 6, 6)


@pytest.mark.parametrize("name", ["num_frames", "image_size", "tubelet_size", "patch_size"])
@pytest.mark.parametrize("value", [0, -2, 2.0, "16", True, None])
def test_a_size_that_is_no_positive_integer_is_named(name, value):
    with pytest.raises(ConfigError, match=f"geometry.{name} must be a positive integer, not {value!r}"):
        ClipGeometry(**{name: value})


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ({"num_frames": 15}, "geometry.num_frames=15 is not a multiple of geometry.tubelet_size=2"),
        ({"image_size": 100}, "geometry.image_size=100 is not a multiple of geometry.patch_size=16"),
        ({"patch_size": 448}, "geometry.image_size=224 is not a multiple of geometry.patch_size=448"),
    ],
)
def test_sizes_that_do_not_divide_are_named_both(sizes, sentence):
    with pytest.raises(ConfigError, match=f"{sentence}; change one of them"):
        ClipGeometry(**sizes)


def test_geometries_are_values():
    assert len({ClipGeometry(), ClipGeometry(16, 224, 2, 16), ClipGeometry(8)}) == 2
    with pytest.raises(AttributeError):
        ClipGeometry().num_frames = 8

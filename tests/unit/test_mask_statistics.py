"""What is said of masks is what they are: counted by hand on small grids, and the reference's figures at full
size."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from salt_vla.config import VJEPA_BLOCKS, BlockSpec, MaskConfig
from salt_vla.geometry import ClipGeometry
from salt_vla.masks import MultiBlockMasks, build_masks, mask_statistics

FULL = ClipGeometry()
SMALL = ClipGeometry(num_frames=6, image_size=40, tubelet_size=2, patch_size=8)  # 3 × 5 × 5 tokens
SPECS = (BlockSpec(3, 0.2, 0.7), BlockSpec(1, 0.5))


def test_multiblock_statistics_are_the_references() -> None:
    """Mean tokens a clip at 8 × 14 × 14 over 1,000 batches of 24, before truncation and after it, as measured
    on the reference implementation."""
    short, long = mask_statistics(MultiBlockMasks(FULL, VJEPA_BLOCKS), 24, 1000, seed=4)
    for row, figures in ((short, (583, 363, 985, 751)), (long, (294, 99, 1274, 1102))):
        measured = (row.context_drawn, row.context, row.target_drawn, row.target)
        assert measured == pytest.approx(figures, rel=0.02)
        assert row.visible_elsewhen == row.padding == 0
    assert short.context_dropped == pytest.approx(0.38, abs=0.01)
    assert long.context_dropped == pytest.approx(0.66, abs=0.01)


@pytest.mark.parametrize(
    ("strategy", "visible"), [("topup_block", 0.85), ("random", 1 - 0.75**7), ("tube", 0)]
)
def test_what_masks_leave_visible_at_another_time(strategy: str, visible: float) -> None:
    """The earlier attempt's 85 %. Of random masks a place shows itself at one of 7 other time steps with
    1 − 0.75⁷ = 87 %; of tubes at none."""
    (row,) = mask_statistics(build_masks(MaskConfig(strategy=strategy), FULL), 24, 20)  # type: ignore[arg-type]
    assert row.visible_elsewhen == pytest.approx(visible, abs=0.01)
    assert row.masked == pytest.approx(0.75, abs=1e-3)
    assert row.context_dropped == row.padding == 0
    assert (row.context, row.target) == (row.context_drawn, row.target_drawn)


@pytest.mark.parametrize("truncate", ["pad", "even"])
def test_policies_beyond_the_reference_keep_the_context(truncate: str) -> None:
    end = mask_statistics(MultiBlockMasks(FULL, VJEPA_BLOCKS), 24, 30)
    kept = mask_statistics(MultiBlockMasks(FULL, VJEPA_BLOCKS, truncate), 24, 30)  # type: ignore[arg-type]
    for before, after in zip(end, kept, strict=True):
        assert before.context_dropped > 0.3 and after.context_dropped < 0.06
        assert (after.padding > 0.2) == (truncate == "pad")
        assert after.visible_elsewhen == 0


@settings(max_examples=60, deadline=None)
@given(
    truncate=st.sampled_from(["end", "random", "pad", "even"]),
    strategy=st.sampled_from(["multiblock", "random", "topup_block"]),
    most=st.sampled_from([0, 7]),
    batch=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_counts_are_those_of_tokens_looked_at_one_by_one(
    truncate: str, strategy: str, most: int, batch: int, seed: int
) -> None:
    config = MaskConfig(strategy, SPECS, 0.6, truncate, most)  # type: ignore[arg-type]
    masks = build_masks(config, SMALL)
    rows = mask_statistics(masks, batch, 3, seed)
    assert [row.group for row in rows] == list(range(1, config.num_groups + 1))
    for number, row in enumerate(rows):
        drawn, seen, width, predicted, elsewhen = [], [], [], [], 0
        for step in range(3):
            masked, group = list(masks.split(batch, seed, step))[number]
            for clip in range(batch):
                valid = slice(None) if group.context_valid is None else group.context_valid[clip]
                context = group.context_ids[clip][valid].tolist()
                targets = group.target_ids[clip].tolist()
                drawn.append(int(masked[clip].sum()))
                seen.append(len(context))
                width.append(group.context_ids.shape[1])
                predicted.append(len(targets))
                elsewhen += sum(any((t - c) % 25 == 0 for c in context) for t in targets)
        assert row.target_drawn == pytest.approx(np.mean(drawn))
        assert row.context_drawn == pytest.approx(75 - np.mean(drawn))
        assert row.masked == pytest.approx(np.mean(drawn) / 75)
        assert (row.context, row.target) == pytest.approx((np.mean(seen), np.mean(predicted)))
        assert row.context_dropped == pytest.approx(1 - np.sum(seen) / (75 * 3 * batch - np.sum(drawn)))
        assert row.padding == pytest.approx(1 - np.sum(seen) / np.sum(width))
        assert row.visible_elsewhen == pytest.approx(elsewhen / np.sum(predicted))


def test_a_row_is_also_a_sentence() -> None:
    (row, _) = mask_statistics(MultiBlockMasks(FULL, VJEPA_BLOCKS), 24, 4)
    said = str(row)
    assert said.startswith(f"group 1: {row.masked:.0%} masked; context {row.context_drawn:.0f} → ")
    assert f"{row.context_dropped:.0%} dropped" in said and "padding" not in said
    assert said.endswith("0% of them visible at another time")
    (padded, _) = mask_statistics(MultiBlockMasks(FULL, VJEPA_BLOCKS, "pad"), 24, 4)
    assert "padding" in str(padded) and "dropped" not in str(padded)
    assert set(asdict(row)) >= {"context_drawn", "context", "target_drawn", "target", "visible_elsewhen"}


def documented() -> dict[tuple[str, str], list[list[float]]]:
    """(strategy, truncation or ratio) → for each group the figures of docs/masks.md's table."""
    rows: dict[tuple[str, str], list[list[float]]] = {}
    for line in (Path(__file__).parents[2] / "docs" / "masks.md").read_text().splitlines():
        strategy, comma, how = line.strip("| ").split(" | ")[0].partition(", ")
        if line.startswith("|") and comma and "`" not in line:
            figures = [float(number) for number in re.findall(r"[\d.]+", line.split("|", 3)[3])]
            rows.setdefault((strategy, how), []).append(figures)
    return rows


@pytest.mark.parametrize("which", documented(), ids=lambda which: "-".join(which))
def test_the_documented_table_is_what_is_counted(which: tuple[str, str]) -> None:
    strategy, how = which
    is_ratio = how[0].isdigit()
    config = MaskConfig(strategy, ratio=float(how)) if is_ratio else MaskConfig(strategy, truncate=how)  # type: ignore[arg-type]
    batches = 30 if is_ratio else 400 if how == "even" else 150
    counted = mask_statistics(build_masks(config, FULL), 24, batches)
    for row, told in zip(counted, documented()[which], strict=True):
        masked, drawn, seen, dropped, padding, target_drawn, target, visible = told[:8]
        tokens = (row.context_drawn, row.context, row.target_drawn, row.target)
        assert tokens == pytest.approx((drawn, seen, target_drawn, target), rel=0.05)
        shares = (row.masked, row.context_dropped, row.padding, row.visible_elsewhen)
        assert [100 * share for share in shares] == pytest.approx([masked, dropped, padding, visible], abs=2)

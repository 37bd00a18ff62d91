"""From figures to sentences: each defect has its own, healthy figures none; names are taken at their word."""

from __future__ import annotations

from dataclasses import replace

import pytest

from salt_vla.evaluation.latent_statistics import LatentStatistics
from salt_vla.evaluation.teacher_findings import (
    Claim,
    Finding,
    TeacherFacts,
    claim_in,
    findings_of,
    verdict_of,
)
from salt_vla.evaluation.teacher_inspection import PositionOrder, QueryValueBiases, TokenOrder
from salt_vla.reports.html import Checks, Facts, Figure, ReportContent, Section, render
from salt_vla.reports.teacher_check import LABELS, TOPICS, check_blocks, plain

STATISTICS = LatentStatistics(
    clips=32,
    mean_square=1.0,
    token_std=1.0,
    top_share=0.03,
    top_share_normalised=0.03,
    mean_mse=0.9,
    mean_mse_normalised=0.9,
    mean_l1_normalised=0.7,
    position_share=0.2,
    effective_rank=300.0,
    effective_rank_normalised=300.0,
    finite_share=1.0,
)
ORDERED = PositionOrder(0.3, 0.1, 0.4, 0.1, 0.5, 196, of_table=True)
HEALTHY = TeacherFacts(
    dim=768,
    depth=12,
    parameters=86_227_200,
    is_raw=False,
    is_random=False,
    biases=QueryValueBiases(24, 0),
    statistics=STATISTICS,
    token_order=TokenOrder(8, 8),
    positions=ORDERED,
)
BASE = Claim("videomae_v1_base", 768, 86_227_200, 12)
HUGE = Claim("videomae_v1_huge", 1280, 631_604_480, 32)


def found(facts: TeacherFacts, topic: str) -> Finding:
    return next(finding for finding in findings_of(facts) if finding.topic == topic)


def with_statistics(**changes: float) -> TeacherFacts:
    return replace(HEALTHY, statistics=replace(STATISTICS, **changes))


@pytest.mark.parametrize("claim", [None, BASE])
def test_nothing_is_wrong_with_a_healthy_teacher(claim: Claim | None) -> None:
    findings = findings_of(replace(HEALTHY, claim=claim))
    assert {finding.severity for finding in findings} == {"ok"}
    assert verdict_of(findings) == "usable: nothing wrong was found"


def test_a_base_model_called_huge_is_told_by_width_blocks_and_parameters() -> None:
    finding = found(replace(HEALTHY, claim=HUGE), "size")
    assert finding.severity == "bad"
    assert "768 wide, 12 blocks, 86.2 M parameters" in finding.text
    assert "'videomae_v1_huge' means 1280 wide, 32 blocks, 631.6 M parameters" in finding.text


@pytest.mark.parametrize("wrong", [{"dim": 1024}, {"parameters": 80_000_000}, {"depth": 11}])
def test_any_one_size_that_differs_is_enough(wrong: dict[str, int]) -> None:
    assert found(replace(HEALTHY, claim=replace(BASE, **wrong)), "size").severity == "bad"


def test_parameters_may_differ_by_a_norm_and_claims_may_be_silent() -> None:
    assert found(replace(HEALTHY, claim=replace(BASE, parameters=86_900_000)), "size").severity == "ok"
    assert found(replace(HEALTHY, claim=Claim("dinov2_vitb14", 768)), "size").severity == "ok"


@pytest.mark.parametrize(
    ("name", "width"),
    [
        ("VideoMAE-v1-Huge", 1280),
        ("/models/videomae-base-finetuned/", 768),
        ("dinov2_vitb14", 768),
        ("vjepa2-vitl-fpc64-256", 1024),
        ("facebook/dinov2-small", 384),
        ("vit_large_patch16_224", 1024),
    ],
)
def test_names_of_published_models_claim_a_width(name: str, width: int) -> None:
    claim = claim_in(name)
    assert claim is not None and claim.dim == width


@pytest.mark.parametrize(
    "name",
    ["demo_teacher", "larger_batch", "base", "huge_lr", "videomae", "videomae-base-to-large", "vitality"],
)
def test_other_names_claim_nothing(name: str) -> None:
    assert claim_in(name) is None


def test_lost_biases_are_bad_unless_the_weights_are_fresh() -> None:
    lost = replace(HEALTHY, biases=QueryValueBiases(24, 24))
    assert found(lost, "biases").severity == "bad" and "transformers 5.0" in found(lost, "biases").text
    assert found(replace(lost, is_random=True), "biases").severity == "ok"
    assert found(replace(HEALTHY, biases=QueryValueBiases(24, 3)), "biases").severity == "warn"
    assert found(replace(HEALTHY, biases=QueryValueBiases(0, 0)), "biases").severity == "ok"


def test_loud_channels_are_a_warning_where_normalising_helps_and_bad_where_it_does_not() -> None:
    helped = replace(with_statistics(top_share=0.71, top_share_normalised=0.2), is_raw=True)
    finding = found(helped, "outlier_channels")
    assert finding.severity == "warn"
    assert finding.text.startswith(
        "raw residual stream: 71% of variance in 8 channels; use normalised targets"
    )
    partly = found(with_statistics(top_share=0.71, top_share_normalised=0.6), "outlier_channels")
    assert partly.severity == "warn" and "use normalised targets (60% after)" in partly.text
    stubborn = with_statistics(top_share=0.99, top_share_normalised=0.97)
    finding = found(stubborn, "outlier_channels")
    assert finding.severity == "bad" and "normalised targets leave 97% there" in finding.text
    assert "raw residual stream" not in finding.text


def test_in_a_narrow_teacher_eight_channels_hold_much_by_right() -> None:
    narrow = replace(with_statistics(top_share=0.7, top_share_normalised=0.7), dim=32)
    assert found(narrow, "outlier_channels").severity == "ok"


def test_tokens_out_of_order_and_permuted_positions_have_their_own_sentences() -> None:
    assert found(replace(HEALTHY, token_order=TokenOrder(8, 1)), "token_order").severity == "bad"
    assert found(replace(HEALTHY, token_order=TokenOrder(8, 5)), "token_order").severity == "ok"
    permuted = replace(ORDERED, neighbours=1.0)
    finding = found(replace(HEALTHY, positions=permuted), "positions")
    assert finding.severity == "bad" and finding.text.startswith("its position table is permuted")
    random = replace(ORDERED, neighbours=1.0, nearest=0.6, directions=0.95)
    finding = found(replace(HEALTHY, positions=random), "positions")
    assert finding.severity == "ok" and "cannot be judged" in finding.text


@pytest.mark.parametrize(
    ("changes", "topic", "severity"),
    [
        ({"finite_share": 0.999}, "finite", "bad"),
        ({"mean_mse": 0.0, "mean_mse_normalised": 0.0}, "variance", "bad"),
        ({"position_share": 0.7}, "position_share", "warn"),
        ({"effective_rank_normalised": 12.0}, "rank", "warn"),
    ],
)
def test_figures_that_spoil_targets(changes: dict[str, float], topic: str, severity: str) -> None:
    assert topic not in {finding.topic for finding in findings_of(HEALTHY)}
    assert found(with_statistics(**changes), topic).severity == severity


@pytest.mark.parametrize(
    ("changes", "dtype", "text"),
    [
        ({"finite_share": 0.5}, "float32", "NaN or infinite: its weights or its config.json are damaged"),
        ({"finite_share": 0.5}, "float16", "NaN or infinite: load it as float32, not float16"),
        ({"mean_mse": 0.0, "mean_mse_normalised": 0.0}, "float32", "do not vary"),
    ],
)
def test_of_numbers_that_are_none_nothing_else_is_judged(
    changes: dict[str, float], dtype: str, text: str
) -> None:
    spoilt = with_statistics(**changes, top_share=1.0, top_share_normalised=1.0, position_share=0.9)
    findings = findings_of(replace(spoilt, token_order=TokenOrder(8, 0), dtype=dtype, unreadable=1))
    bad = [finding for finding in findings if finding.severity == "bad"]
    assert len(bad) == 1 and text in bad[0].text
    assert {finding.topic for finding in findings} == {bad[0].topic, "size", "biases", "clips"}


def test_who_has_its_final_norm_is_not_told_to_take_it() -> None:
    stubborn = with_statistics(top_share=0.99, top_share_normalised=0.97)
    assert "take its raw stream (--final-norm none)" in found(stubborn, "outlier_channels").text
    raw = found(replace(stubborn, is_raw=True), "outlier_channels")
    assert "take its final norm (--final-norm model)" in raw.text


def test_an_order_that_was_not_tried_is_no_finding() -> None:
    finding = found(replace(HEALTHY, token_order=TokenOrder(0, 0)), "token_order")
    assert finding.severity == "ok" and "cannot be judged" in finding.text


def test_other_heads_than_the_names_are_another_model() -> None:
    claim = replace(BASE, heads=12)
    assert found(replace(HEALTHY, claim=claim, heads=12), "size").severity == "ok"
    finding = found(replace(HEALTHY, claim=claim, heads=6), "size")
    assert finding.severity == "bad" and "6 heads" in finding.text and "12 heads" in finding.text


def test_the_verdict_names_everything_the_worst_first() -> None:
    facts = replace(
        with_statistics(position_share=0.7), biases=QueryValueBiases(4, 4), claim=HUGE, unreadable=2
    )
    verdict = verdict_of(findings_of(facts))
    assert verdict.startswith("do not use it: ")
    words = ("another model", "biases are zero", "70% of the variance is the mean", "2 of the chosen clips")
    assert sorted(words, key=verdict.index) == list(words)
    only_warnings = verdict_of(findings_of(replace(HEALTHY, unreadable=1)))
    assert only_warnings.startswith("usable, with care: 1 of the chosen clips")


def test_on_a_page_every_finding_has_its_line_and_every_figure_its_name() -> None:
    facts = replace(with_statistics(position_share=0.7, finite_share=0.5), claim=HUGE, unreadable=1)
    findings = findings_of(facts)
    figures = dict.fromkeys(LABELS, 0.5) | {"fingerprint": "abc<def", "parameters": 86_227_200}
    png = b"\x89PNG\r\n\x1a\n" + bytes(8) + (4).to_bytes(4, "big") * 2
    blocks = check_blocks(verdict_of(findings), findings, figures, png)
    assert [type(block) for block in blocks] == [str, Checks, Facts, Figure]
    page = render(ReportContent("t", "l", [], [], [Section("The teacher", blocks)]))
    for finding in findings:
        assert TOPICS[finding.topic] in page
        assert f'class="{finding.severity}">{finding.severity}<' in page
    assert "abc&lt;def" in page and "86,227,200" in page and "another model than its name says" in page


def test_values_are_written_for_people() -> None:
    assert [plain(v) for v in (0.123456, 1200, None, "x", True)] == ["0.1235", "1,200", "–", "x", "True"]

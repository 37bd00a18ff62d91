"""What `salt-vla eval --fractions` and `--diagnose` print."""

from __future__ import annotations

from collections.abc import Sequence

from salt_vla.cli.printing import print_json, print_table
from salt_vla.evaluation.settings import EvalSettings


def print_curve(
    encoders: Sequence[str],
    suites: Sequence[str],
    data: str,
    settings: EvalSettings,
    frame_stride: int | None,
    fractions: Sequence[float],
    json: bool,
) -> None:
    """A line a suite, target and encoder; a column a share of the training episodes."""
    from salt_vla.jobs.eval_more import label_curve

    rows = label_curve(encoders, suites, data, settings, frame_stride, fractions)
    if json:
        return print_json(rows)
    lines: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in rows:
        key = (row["suite"], row["target"], row["encoder"])
        line = lines.setdefault(key, dict(zip(("suite", "target", "encoder"), key, strict=True)))
        line[f"{row['fraction']:g}"] = f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
    shares = [f"{fraction:g}" for fraction in sorted(fractions)]
    ordered = [dict.fromkeys(shares, "–") | lines[key] for key in sorted(lines)]
    print_table(ordered, ["suite", "target", "encoder", *shares])


def print_diagnosis(
    encoders: Sequence[str], data: str, settings: EvalSettings, frame_stride: int | None, json: bool
) -> None:
    from salt_vla.jobs.eval_more import diagnose

    said = diagnose(encoders, data, settings, frame_stride)
    if json:
        return print_json(said)
    names = [row["encoder"] for row in said["encoders"]]
    alike = {frozenset((pair["encoder"], pair["other"])): pair["cka"] for pair in said["cka"]}
    lines = [
        {
            "encoder": row["encoder"],
            "rank": f"{row['effective_rank']:.1f} of {row['dims']}",
            "GFLOP a clip": f"{row['flops_a_clip'] / 1e9:.2f}",
            "ms a clip": f"{1e3 * row['p50']:.1f} (p95 {1e3 * row['p95']:.1f})",
            "frames/s": f"{row['frames_per_second']:.0f}",
        }
        | {f"CKA {name}": f"{alike.get(frozenset((row['encoder'], name)), 1.0):.2f}" for name in names}
        for row in said["encoders"]
    ]
    print_table(lines, list(lines[0]))
    print(f"on {said['clips']} held-out clips; a stream asks once a tubelet for its last whole clip")

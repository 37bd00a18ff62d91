"""The names that outside programs call: each imports from where the design says and answers as specified."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from salt_vla.cli import main

ROOT_VARIABLE = "SALT_VLA_ROOT"
OVERRIDES = (
    *("encoder.name=vit_micro", "encoder.depth=1", "encoder.geometry.num_frames=4"),
    *("encoder.geometry.image_size=32", "encoder.geometry.patch_size=8"),
    *("predictor.dim=24", "predictor.depth=1", "predictor.num_heads=3", "data.view.num_views=2"),
    *("batch_size=4", "runtime.device=cpu", "runtime.precision=float32", "runtime.threads=1"),
)


@pytest.fixture(scope="module")
def root(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with a run `t`, the cache of its latents, and a run `s` that learned from them."""
    root = tmp_path_factory.mktemp("root")
    table, cache = str(root / "clips.parquet"), str(root / "cache")
    index = ["data", "index", str(tiny_dataset), "--out", table, "--num-frames", "4", "--frame-stride", "2"]
    build = ["cache", "build", "--teacher", "t", "--data", table, "--out", cache, "--split"]
    train = ["--data", table, "--max-steps", "4"]
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(ROOT_VARIABLE, str(root))
        for command in (
            index,
            ["train", "demo_teacher", *OVERRIDES, "--name", "t", *train],
            [*build, "train"],
            [*build, "validation"],
            ["train", "demo_student", *OVERRIDES, "--name", "s", "--seed", "1", "--cache", cache, *train],
        ):
            assert main(command) == 0, command
    return root


def test_geometry():
    from salt_vla.geometry import ClipGeometry

    g = ClipGeometry(num_frames=16, image_size=224, tubelet_size=2, patch_size=16)
    assert g.token_grid == (8, 14, 14)
    assert g.num_tokens == 1568


def test_masks():
    from salt_vla.geometry import ClipGeometry
    from salt_vla.masks import (
        BlockSpec,
        MaskGroup,
        MultiBlockMasks,
        RandomMasks,
        TopUpBlockMasks,
        TubeMasks,
    )

    g = ClipGeometry(num_frames=16, image_size=224, tubelet_size=2, patch_size=16)
    blocks = [
        BlockSpec(num_blocks=8, spatial_scale=0.15, temporal_scale=1.0, aspect_ratio=(0.75, 1.5)),
        BlockSpec(num_blocks=2, spatial_scale=0.7, temporal_scale=1.0, aspect_ratio=(0.75, 1.5)),
    ]
    strategies = {
        MultiBlockMasks(g, blocks, truncate="end"): 2,
        RandomMasks(g, ratio=0.75): 1,
        TubeMasks(g, ratio=0.9): 1,
        TopUpBlockMasks(g, ratio=0.75): 1,
    }
    for strategy, num_groups in strategies.items():
        groups = strategy.sample(3, seed=0, step=0)
        assert isinstance(groups, list) and len(groups) == num_groups
        for group, again in zip(groups, strategy.sample(3, seed=0, step=0), strict=True):
            assert isinstance(group, MaskGroup)
            for ids in (group.context_ids, group.target_ids):
                assert ids.dtype == torch.int64 and ids.shape[0] == 3
                assert (ids.diff(dim=1) > 0).all() and ids.min() >= 0 and ids.max() < g.num_tokens
            for context, target in zip(group.context_ids, group.target_ids, strict=True):
                assert not set(context.tolist()) & set(target.tolist())
            assert group.context_valid is None or (
                group.context_valid.dtype == torch.bool
                and group.context_valid.shape == group.context_ids.shape
            )
            assert torch.equal(group.context_ids, again.context_ids)
            assert torch.equal(group.target_ids, again.target_ids)
        other = strategy.sample(3, seed=0, step=1)[0]
        assert not torch.equal(groups[0].target_ids[:, :9], other.target_ids[:, :9])


@pytest.mark.parametrize("positions", ["rope", "sincos"])
def test_models(positions):
    from salt_vla.geometry import ClipGeometry
    from salt_vla.models import EncoderConfig, PredictorConfig, build_encoder, build_predictor

    g = ClipGeometry(num_frames=4, image_size=224, tubelet_size=2, patch_size=16)
    config = EncoderConfig(name="vit_tiny_patch16_224", geometry=g, positions=positions)
    enc = build_encoder(config).eval()
    assert enc.dim == 192
    pixels = torch.randn(2, 3, 4, 224, 224)
    context = torch.arange(0, g.num_tokens, 7).repeat(2, 1)
    targets = torch.arange(1, g.num_tokens, 7).repeat(2, 1)
    with torch.no_grad():
        assert enc(pixels[:1]).shape == (1, g.num_tokens, 192)
        tokens = enc(pixels, context_ids=context)
        assert tokens.shape == (2, context.shape[1], 192)
        predictor_config = PredictorConfig(dim=384, depth=1, num_heads=6)
        pred = build_predictor(predictor_config, encoder_dim=enc.dim, target_dim=768, geometry=g)
        for group in (0, 1):
            assert pred(tokens, context, targets, group=group).shape == (2, targets.shape[1], 768)


def test_objectives():
    from salt_vla.objectives import explained_variance, latent_regression

    torch.manual_seed(0)
    predicted = [torch.randn(2, 5, 8), torch.randn(2, 3, 8)]
    targets = [torch.randn(2, 5, 8), torch.randn(2, 3, 8)]
    for power in (1.0, 2.0):
        by_hand = [
            (z - torch.nn.functional.layer_norm(h, (8,))).abs().pow(power).mean() / power
            for z, h in zip(predicted, targets, strict=True)
        ]
        loss = latent_regression(predicted, targets, power=power, normalise_targets=True)
        torch.testing.assert_close(loss, torch.stack(by_hand).mean())
    flat = targets[0].flatten(0, 1)
    assert float(explained_variance(flat, flat, flat.mean(0))) == 1.0
    mean = flat.mean(0)
    assert abs(float(explained_variance(mean.expand_as(flat), flat, mean))) < 1e-9


def test_schedules():
    from salt_vla.training.schedules import cosine, warmup_cosine

    rates = [
        warmup_cosine(step, start=0.1, peak=1.0, final=0.2, warmup_steps=10, total_steps=110)
        for step in range(111)
    ]
    assert math.isclose(rates[0], 0.1) and math.isclose(rates[10], 1.0) and math.isclose(rates[110], 0.2)
    assert math.isclose(rates[60], 0.6) and rates.index(max(rates)) == 10
    assert math.isclose(cosine(0, start=0.04, final=0.4, total_steps=100), 0.04)
    assert math.isclose(cosine(100, start=0.04, final=0.4, total_steps=100), 0.4)


def test_load_teacher(root, monkeypatch):
    from salt_vla.geometry import ClipGeometry
    from salt_vla.teachers import load_teacher

    g = ClipGeometry(num_frames=4, image_size=32, tubelet_size=2, patch_size=8)
    t = load_teacher(root / "runs" / "t", geometry=g, device="cpu", dtype="float32")
    assert t.dim == 128 and t.geometry == g
    assert isinstance(t.fingerprint, str)
    latents = t.latents(torch.randint(0, 256, (2, 4, 32, 32, 3), dtype=torch.uint8))
    assert latents.shape == (2, g.num_tokens, 128) and latents.dtype == torch.float32
    monkeypatch.setenv(ROOT_VARIABLE, str(root))
    assert load_teacher("t").fingerprint == t.fingerprint


def test_open_cache(root):
    from salt_vla.cache import open_cache

    c = open_cache(root / "cache")
    assert len(c.clip_ids) == 18 and all(isinstance(clip_id, str) for clip_id in c.clip_ids)
    assert c.num_views == 2
    assert c.manifest.complete and c.manifest.provenance["teacher"] == "t/block1/norm"
    whole = c.read(c.clip_ids[0])
    assert whole.shape == (32, 128) and whole.dtype == np.float32
    some = c.read(c.clip_ids[0], token_ids=[31, 0, 7], view=1)
    np.testing.assert_array_equal(some, c.read(c.clip_ids[0], view=1)[[31, 0, 7]])
    assert not np.array_equal(c.read(c.clip_ids[0], view=1), whole)
    raw = c.read_many([(c.clip_ids[3], 1), (c.clip_ids[0], 0)])
    assert raw.data.dtype == np.uint8 and raw.data.shape == (2, 32 * 128 * 2)
    np.testing.assert_array_equal(raw.decode()[1], whole)


def test_load_encoder(root):
    from salt_vla import load_encoder

    run = root / "runs" / "s"
    checkpoint = run / "checkpoints" / "step_00000004"
    pixels = torch.randn(1, 3, 4, 32, 32)
    encoders = [load_encoder(path) for path in (run, checkpoint, str(checkpoint))]
    assert all(not enc.training for enc in encoders)
    outputs = [enc(pixels) for enc in encoders]
    assert outputs[0].shape == (1, 32, 128)
    assert all(torch.equal(outputs[0], other) for other in outputs)


@pytest.fixture
def ask(root, monkeypatch, capsys):
    """`ask(*command)`: what the command prints on stdout, as JSON, and its exit code."""
    monkeypatch.setenv(ROOT_VARIABLE, str(root))

    def answer(*command):
        code = main([str(part) for part in (*command, "--json")])
        return json.loads(capsys.readouterr().out), code

    return answer


def test_recipes_ls(ask):
    rows, code = ask("recipes", "ls")
    assert code == 0
    assert {"demo_teacher", "demo_student", "exp1_higher_lr"} <= {row["name"] for row in rows}


def test_runs_show(ask, root):
    shown, code = ask("runs", "show", "s")
    assert code == 0
    assert shown.keys() >= {"state", "step", "pid", "resumed_from", "exit_reason"}
    assert (shown["state"], shown["step"], shown["resumed_from"]) == ("finished", 4, [])
    assert isinstance(shown["pid"], int) and isinstance(shown["exit_reason"], str)


def test_metrics_are_one_object_a_line(root):
    lines = (root / "runs" / "s" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert {row["kind"] for row in rows} == {"train", "val"}
    assert all(isinstance(row["step"], int) and isinstance(row["loss"], float) for row in rows)
    assert all("r2_position_mean" in row for row in rows)
    keys = [(row["kind"], row["step"]) for row in rows]
    assert len(keys) == len(set(keys))


def test_the_run_directory_holds_what_the_design_names(root):
    run = root / "runs" / "s"
    names = {path.name for path in run.iterdir()}
    assert names >= {"config.json", "metrics.jsonl", "log.txt", "status.json", "checkpoints"}
    checkpoint = run / "checkpoints" / "step_00000004"
    assert {path.suffix for path in checkpoint.iterdir()} == {".safetensors", ".json"}


def test_cache_show_and_verify(ask, root):
    manifest, code = ask("cache", "show", root / "cache")
    assert code == 0 and manifest == json.loads((root / "cache" / "manifest.json").read_text())
    assert ask("cache", "verify", root / "cache") == ({"records": 36, "bad": []}, 0)


def test_teacher_check(ask, root):
    found, code = ask("teacher", "check", "t", "--data", root / "clips.parquet")
    assert code == 0 and found.keys() >= {"dim", "fingerprint", "verdict", "parameters"}


def test_eval(ask, root):
    rows, code = ask("eval", "s", "t", "--suite", "probes", "--data", root / "clips.parquet")
    assert code == 0
    assert {row["encoder"] for row in rows} == {"s", "t", "random", "pixels", "constant"}
    fields = {"encoder", "suite", "target", "metric", "value", "low", "high", "seed"}
    assert all(row.keys() >= fields for row in rows)

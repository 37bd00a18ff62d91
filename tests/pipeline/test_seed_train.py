"""`from salt_vla import train`: every keyword of an earlier attempt's function has its place."""

from __future__ import annotations

import contextlib
import inspect
import io
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from salt_vla import train
from salt_vla.cli import main
from salt_vla.config import TrainConfig, from_json, leaves
from salt_vla.errors import ConfigError, ResourceError, RunError
from salt_vla.jobs.seed_train import BASE, FIELDS, seed_config
from salt_vla.recipes import get_recipe

ROOT = Path(__file__).parents[2]
KEYWORDS = re.split(
    ", ",
    "data_root, split, batch_size, num_workers, epochs, lr, min_lr, weight_decay_start, weight_decay_end, "
    "warmup_steps, max_steps, log_interval, mask_ratio, masking_strategy, use_cached_latents, cache_dir, "
    "student_model_name, grad_clip, betas, predictor_dim, predictor_depth, predictor_num_heads, "
    "grad_checkpointing, cudnn_benchmark, grad_accum_steps, variance_loss_weight, variance_target, "
    "covariance_loss_weight, use_dataloader_masks, tubelet_size, patch_size, run_name, log_dir",
)
DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(train).parameters.items()
    if parameter.kind is not inspect.Parameter.VAR_KEYWORD
}
# 32 tokens instead of 1,568, and a network of milliseconds; the clips are its own 16 frames of 224².
SMALL: dict[str, Any] = {
    "tubelet_size": 8,
    "patch_size": 56,
    "student_model_name": "vit_micro",
    "predictor_dim": 24,
    "predictor_depth": 1,
    "predictor_num_heads": 3,
    "num_workers": 0,
    "batch_size": 1,
}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SALT_VLA_ROOT", str(tmp_path))
    return tmp_path


@pytest.fixture
def quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


@pytest.fixture(scope="session")
def latents(films: Path) -> Path:
    folder = films.parent / "small-latents"
    asked = ["cache", "build", "--teacher", "random:vit_micro", "--recipe", BASE, "--workers", "1"]
    asked += ["encoder.geometry.tubelet_size=8", "encoder.geometry.patch_size=56"]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        assert main([*asked, "--data", str(films), "--out", str(folder)]) == 0, said.getvalue()
    return folder


def config_of(**changed: Any) -> dict[str, Any]:
    return dict(leaves(seed_config(DEFAULTS | changed)))


def test_its_keywords_are_those_on_record() -> None:
    assert list(DEFAULTS) == KEYWORDS


def test_its_defaults_are_the_first_experiments() -> None:
    recipe = get_recipe(BASE)
    assert seed_config(DEFAULTS) == recipe.config
    assert DEFAULTS["epochs"] == recipe.epochs


@pytest.mark.parametrize(
    ("keyword", "value", "fields"),
    [
        ("num_workers", 3, {"data.num_workers": 3}),
        ("lr", 3e-4, {"optimizer.lr": 3e-4}),
        ("min_lr", 3e-5, {"optimizer.lr_final": 3e-5}),
        ("weight_decay_start", 0.04, {"optimizer.weight_decay": 0.04}),
        ("weight_decay_end", 0.4, {"optimizer.weight_decay_final": 0.4}),
        ("warmup_steps", 500, {"optimizer.warmup_steps": 500}),
        ("log_interval", 5, {"runtime.log_every": 5}),
        ("mask_ratio", 0.9, {"masks.ratio": 0.9}),
        ("masking_strategy", "multiblock", {"masks.strategy": "topup_block"}),
        ("student_model_name", "vit_base_patch16_224", {"encoder.name": "vit_base_patch16_224"}),
        ("grad_clip", 0.02, {"optimizer.grad_clip": 0.02}),
        ("betas", (0.9, 0.95), {"optimizer.betas": (0.9, 0.95)}),
        ("betas", [0.9, 0.95], {"optimizer.betas": (0.9, 0.95)}),
        ("predictor_dim", 768, {"predictor.dim": 768}),
        ("predictor_depth", 12, {"predictor.depth": 12}),
        ("predictor_num_heads", 8, {"predictor.num_heads": 8}),
        (
            "grad_checkpointing",
            True,
            {"encoder.grad_checkpointing": True, "predictor.grad_checkpointing": True},
        ),
        ("cudnn_benchmark", False, {"runtime.cudnn_benchmark": False}),
        ("batch_size", 32, {"batch_size": 32}),
        ("grad_accum_steps", 4, {"grad_accum_steps": 4, "batch_size": 64}),
        ("variance_loss_weight", 1.0, {"objective.variance_weight": 1.0}),
        ("variance_target", 2, {"objective.variance_target": 2.0}),
        ("covariance_loss_weight", 0.1, {"objective.covariance_weight": 0.1}),
        ("use_dataloader_masks", False, {"data.masks_in": "step"}),
        ("tubelet_size", 4, {"encoder.geometry.tubelet_size": 4}),
        ("patch_size", 14, {"encoder.geometry.patch_size": 14}),
        ("use_cached_latents", False, {"target.provider": "teacher", "target.source": "videomaev2_base"}),
    ],
)
def test_a_keyword_sets_its_fields_and_no_other(keyword: str, value: Any, fields: dict[str, Any]) -> None:
    before, after = config_of(), config_of(**{keyword: value})
    assert {field: after[field] for field in after if after[field] != before[field]} == fields


def test_the_mapping_is_documented_keyword_by_keyword() -> None:
    rows = re.findall(r"^\| (`[^|]*) \| ([^|]*) \|", (ROOT / "docs/recipes.md").read_text(), re.MULTILINE)
    documented = {name: fields for names, fields in rows for name in re.findall(r"`(\w+)`", names)}
    assert set(KEYWORDS) <= set(documented)
    for keyword, fields in FIELDS.items():
        assert all(f"`{field}`" in documented[keyword] for field in fields), keyword


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"optimiser": 1}, "train has no keyword 'optimiser'; known: data_root, split"),
        ({"warmup_step": 1}, "no keyword 'warmup_step'; did you mean warmup_steps"),
        ({"split": "validation"}, "split='validation': only 'train'"),
        ({"cache_dir": None}, "use_cached_latents=True needs cache_dir"),
        ({"masking_strategy": "blocks"}, "masking_strategy='blocks' is neither"),
        ({"masking_strategy": ["random"]}, r"masking_strategy=\['random'\] is neither"),
        ({"use_cached_latents": "no"}, "use_cached_latents must be True or False, not 'no'"),
        ({"use_dataloader_masks": 1}, "use_dataloader_masks must be True or False, not 1"),
        ({"cache_dir": ""}, "--cache is empty"),
        ({"data_root": ""}, "--data is empty"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, not 0"),
        ({"batch_size": 1.5}, "batch_size must be a whole number"),
        ({"grad_accum_steps": 0}, "grad_accum_steps must be a whole number"),
        ({"epochs": 0}, "epochs must be a whole number of at least 1, not 0"),
        ({"max_steps": 0}, "max_steps must be a whole number"),
        ({"lr": "fast"}, "optimizer.lr must be float, not 'fast'"),
        ({"lr": Path("x")}, "optimizer.lr cannot be"),
        ({"lr": float("nan")}, "optimizer.lr must be float"),
        ({"betas": 0.9}, "optimizer.betas must have 2 entries"),
        ({"mask_ratio": 75}, r"masks.ratio must lie in \(0, 1\)"),
        ({"predictor_num_heads": 7}, "not divisible"),
        ({"cudnn_benchmark": "yes"}, "cudnn_benchmark must be bool"),
        ({"run_name": "../out", "batch_size": 1}, "run name"),
        ({"batch_size": 64}, "clips to learn from make no batch of 64"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_refused_before_anything_is_written(
    root: Path, films: Path, latents: Path, arguments: dict[str, Any], sentence: str
) -> None:
    with pytest.raises((ConfigError, RunError), match=sentence):
        train(**{"data_root": films, "cache_dir": latents, **SMALL, **arguments})
    assert list(root.iterdir()) == []


def test_it_trains_whole_epochs_and_the_same_call_resumes(
    root: Path, films: Path, latents: Path, quiet: None
) -> None:
    asked = {"cache_dir": latents, "run_name": "small", "epochs": 3, "log_interval": 1, **SMALL}
    run = train(films, max_steps=2, **asked)
    assert (run.path, run.status().step) == (root / "runs" / "small", 2)
    run = train(films, **asked)
    status = run.status()
    assert (status.state, status.step, status.resumed_from) == ("finished", 6, [2]), "2 clips × 3 epochs"
    assert [row["step"] for row in run.metrics("train")] == [1, 2, 3, 4, 5, 6]
    config = from_json(TrainConfig, run.config_file.read_bytes())
    expected = seed_config(DEFAULTS | asked)
    assert replace(config, runtime=expected.runtime, data=expected.data, target=expected.target) == replace(
        expected, steps=6
    )
    with pytest.raises(RunError, match=r"optimizer\.lr"):
        train(films, **asked, lr=0.5)


def test_parts_of_a_batch_make_one_update(root: Path, films: Path, latents: Path, quiet: None) -> None:
    run = train(films, cache_dir=latents, **SMALL, grad_accum_steps=2, epochs=2)
    assert run.status().step == 2, "2 clips make one update of 2 × 1"
    assert run.name == "vit_micro"


def test_log_dir_receives_a_link_and_nothing_of_others_is_lost(
    root: Path, films: Path, latents: Path, quiet: None, tmp_path: Path
) -> None:
    logs = tmp_path / "logs"
    asked = {"cache_dir": latents, **SMALL, "max_steps": 1, "log_dir": logs}
    for _ in range(2):
        run = train(films, run_name="mine", **asked)
    assert (logs / "mine").is_symlink() and (logs / "mine").resolve() == run.path.resolve()
    assert (logs / "mine" / "metrics.jsonl").is_file()
    (logs / "taken").mkdir()
    with pytest.raises((RunError, ResourceError), match="is something else"):
        train(films, run_name="taken", **asked)
    assert list((logs / "taken").iterdir()) == []


def test_the_package_is_imported_without_what_trains() -> None:
    heavy = "{'torch', 'numpy', 'psutil', 'salt_vla.jobs'}"
    code = f"import salt_vla, sys; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

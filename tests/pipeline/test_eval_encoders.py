"""`eval` takes encoders of every kind, several seeds of one, and writes its tables in every form."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import VideoMAEConfig, VideoMAEModel, VJEPA2Config, VJEPA2Model

from salt_vla.data.clip_table import ClipTable
from salt_vla.errors import UserError
from salt_vla.jobs.eval_encoders import parse_specs

ONE_POOLING = ("--poolings", "mean")
TINY_VIDEOMAE = VideoMAEConfig(
    image_size=32,
    patch_size=8,
    num_frames=4,
    tubelet_size=2,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=48,
)
TINY_VJEPA = VJEPA2Config(
    crop_size=48,
    patch_size=16,
    frames_per_clip=8,
    tubelet_size=2,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    mlp_ratio=2.0,
    pred_hidden_size=24,
    pred_num_attention_heads=2,
    pred_num_hidden_layers=1,
)


@pytest.fixture(scope="module")
def runs(workshop: Any) -> Path:
    """Two seeds of a stage-1 run, and one of larger patches and pictures."""
    salt = workshop.salt
    data = ("--data", workshop.table, "--max-steps", 2)
    for seed in (1, 2):
        salt.ok(*salt.train("demo_teacher", f"s{seed}", "--seed", seed, *data))
    sizes = ("encoder.geometry.patch_size=16", "encoder.geometry.image_size=48")
    command = salt.train("demo_teacher", "large")
    salt.ok(*command[:-2], *sizes, *command[-2:], *data)
    return Path(salt.root / "runs")


def evaluate(workshop: Any, *arguments: object) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = workshop.salt.json(
        "eval", *arguments, "--data", workshop.dataset, *ONE_POOLING
    )
    return found


def test_seeds_of_one_label_are_joined_and_a_single_run_stands_in_every_seeds_table(
    workshop: Any, runs: Path, tmp_path: Path
) -> None:
    rows = evaluate(workshop, "ours=s1", "ours=s2", "teacher", "--against", "teacher", "--out", tmp_path)
    assert {row["encoder"] for row in rows} == {"ours", "teacher", "random", "pixels", "constant"}
    assert {(row["encoder"] == "teacher", row["seeds"]) for row in rows} == {(True, 1), (False, 2)}
    assert all(row["interval"] and row["low"] <= row["value"] <= row["high"] for row in rows)
    assert {row["probe"] for row in rows} == {"linear"}
    assert {row["target"]: row["causal"] for row in rows}.items() >= {
        "action_end": True,
        "action_mean": False,
    }.items()
    single = {seed: evaluate(workshop, f"s{seed}", "--seed", seed) for seed in (1, 2)}
    for row in rows:
        if row["encoder"] in ("ours", "random"):
            parts = [
                other["value"]
                for seed in (1, 2)
                for other in single[seed]
                if other["encoder"] in (f"s{seed}" if row["encoder"] == "ours" else "random",)
                and (other["suite"], other["target"]) == (row["suite"], row["target"])
            ]
            assert row["value"] == pytest.approx(sum(parts) / 2) and len(parts) == 2
    pairs = json.loads((tmp_path / "table.json").read_text())["comparisons"]
    assert ("ours", "teacher") in {(pair["encoder"], pair["against"]) for pair in pairs}


def test_every_form_says_the_same(workshop: Any, tmp_path: Path) -> None:
    rows = evaluate(workshop, "teacher", "--out", tmp_path)
    names = {"table.json", "table.csv", "comparisons.csv", "table.md", "table.tex", "table.html"}
    assert {path.name for path in tmp_path.iterdir()} == names
    held = json.loads((tmp_path / "table.json").read_text())
    assert held["rows"] == rows and held["about"]["suites"] == ["probes"]
    assert {each["encoder"] for each in held["compute"]} == {"teacher", "random", "pixels"}
    (own,) = [each for each in held["compute"] if each["encoder"] == "teacher"]
    assert own["training_steps"] == 6 and own["training_flops"] > 0
    with (tmp_path / "table.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [float(line["value"]) for line in lines] == [row["value"] for row in rows]
    for name in ("table.md", "table.tex", "table.html"):
        text = (tmp_path / name).read_text()
        assert "not causal" in text and "linear probe" in text, name
        assert "random init" in text and "GFLOP a clip" in text, name


def test_patches_and_picture_sizes_may_differ_where_clips_are_the_same(workshop: Any, runs: Path) -> None:
    rows = evaluate(workshop, "teacher", "large")
    clips = {(row["suite"], row["target"], row["clips"], row["episodes"]) for row in rows}
    assert len(clips) == len({(suite, target) for suite, target, *_ in clips}), "the same clips for all"
    assert {row["encoder"] for row in rows} == {"teacher", "large", "random", "pixels", "constant"}
    alone = evaluate(workshop, "large")
    of_large = [row for row in rows if row["encoder"] == "large"]
    assert of_large == [row for row in alone if row["encoder"] == "large"]


def test_clips_of_another_length_name_both_encoders(workshop: Any, salt: Any) -> None:
    command = salt.train("demo_teacher", "long")
    salt.ok(*command[:-2], "encoder.geometry.num_frames=6", *command[-2:],
            "--data", workshop.dataset, "--max-steps", 1)  # fmt: skip
    other = salt.root / "runs" / "long"
    said = salt("eval", workshop.teacher, other, "--data", workshop.dataset).sentence
    assert "'long' takes clips of 6 frames and 'teacher' of 4" in said


@pytest.mark.parametrize(
    ("model", "name"), [(VideoMAEModel(TINY_VIDEOMAE), "videomae"), (VJEPA2Model(TINY_VJEPA), "vjepa2")]
)
def test_folders_of_transformers_stand_beside_our_runs_and_have_random_twins(
    workshop: Any, tmp_path: Path, model: Any, name: str
) -> None:
    """V-JEPA 2 takes clips of any length; its own are longer here."""
    model.save_pretrained(tmp_path / name)
    asked = (f"{tmp_path / name}@1", f"fresh=random:{tmp_path / name}:5")
    rows = evaluate(workshop, "teacher", *(asked if name == "videomae" else asked[:1]))
    ours = {"teacher", f"{name}@1", "random", "pixels", "constant"}
    assert {row["encoder"] for row in rows} == ours | ({"fresh"} if name == "videomae" else set())
    if name == "videomae":
        alone = evaluate(workshop, tmp_path / name, "--frame-stride", 2)
        assert {row["encoder"] for row in alone} == {name, "random", "pixels", "constant"}


def test_a_layer_is_another_encoder_and_no_figure_of_its_run(workshop: Any) -> None:
    kept = workshop.teacher / "probes.json"
    before = kept.read_bytes() if kept.exists() else b""
    rows = evaluate(workshop, "teacher@1", "--seed", 7)
    assert {row["encoder"] for row in rows} == {"teacher@1", "random", "pixels", "constant"}
    assert (kept.read_bytes() if kept.exists() else b"") == before
    said = workshop.salt("eval", "teacher@9", "--data", workshop.dataset).sentence
    assert "layer 9 does not exist" in said


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("ours=s1", "ours=s1"), "'ours' stands for two runs of the same seed"),
        (("teacher", "pixels=s1"), "'pixels' is the name of a baseline"),
        (("teacher", "--against", "nobody"), "--against nobody: no encoder of this call"),
        (("teacher", "--probe", "crystal"), "there is no probe 'crystal'; probes: linear"),
        (("teacher", "--suite", "probes", "probes"), "each once"),
        (("teacher", "--suite", "probes", "intphys2"), "give intphys2 a call of its own"),
        (("teacher", "--poolings", "median"), "'median'"),
        (("random:nobody",), "nobody"),
    ],
)
def test_what_cannot_stand_in_a_table_is_a_sentence(
    workshop: Any, runs: Path, arguments: tuple[str, ...], named: str
) -> None:
    assert named in workshop.salt("eval", *arguments, "--data", workshop.dataset).sentence


def test_a_film_that_cannot_be_read_is_left_out_for_all_and_counted(
    workshop: Any, salt: Any, tmp_path: Path
) -> None:
    data, clips = tmp_path / "data", tmp_path / "clips.parquet"
    shutil.copytree(workshop.dataset, data)
    salt.ok("data", "index", data, "--out", clips, "--num-frames", 4, "--frame-stride", 2)
    table = ClipTable.read(clips)
    files = table.rows["file"].to_pylist()
    (data / "broken.mp4").write_bytes(b"no film")
    column = table.rows.column_names.index("file")
    train = table.rows["split"].to_pylist().index("train")
    files[train] = "broken.mp4"
    rows = table.rows.set_column(column, table.rows.schema.field("file"), [files])
    ClipTable(rows, table.roots).write(clips)
    answer = salt.ok("eval", workshop.teacher, "--data", clips, *ONE_POOLING, "--json")
    assert "1 clips cannot be read and are left out" in answer.err and "broken.mp4" in answer.err
    features = [json.loads(file.read_text()) for file in (salt.root / "features").glob("*.json")]
    assert sorted({said["shape"][0] for said in features if not said["left_out"]})[-1] == 9
    assert salt.ok("eval", workshop.teacher, "--data", clips, *ONE_POOLING, "--json").out == answer.out
    for number in range(3):
        files[train + number] = "broken.mp4"
    rows = table.rows.set_column(column, table.rows.schema.field("file"), [files])
    ClipTable(rows, table.roots).write(clips)
    said = salt("eval", workshop.teacher, "--data", clips, *ONE_POOLING).sentence
    assert "of 26 clips cannot be read, more than 5%" in said


def test_labels_layers_and_namesakes_are_read_as_written(tmp_path: Path) -> None:
    """A folder's name may hold what else would be a label or a layer."""
    odd = tmp_path / "a=b@2"
    odd.mkdir()
    (whole,) = parse_specs([str(odd)])
    assert (whole.label, whole.what, whole.layer) == ("a=b@2", str(odd), None)
    specs = parse_specs(["mine=run@-2", "run@3", "run", "vjepa2_vitl=/somewhere", "pixels"])
    assert [(spec.label, spec.what, spec.layer) for spec in specs] == [
        ("mine", "run", -2),
        ("run@3", "run", 3),
        ("run", "run", None),
        ("somewhere", "vjepa2_vitl=/somewhere", None),
    ]
    with pytest.raises(UserError, match="two encoders are called 'run'"):
        parse_specs(["run", "run=other"])

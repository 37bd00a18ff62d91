"""What the documentation says can be done: links lead somewhere, commands parse, fields and modules exist."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import json
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tyro

from salt_vla.cli import COMMANDS
from salt_vla.config import ObjectiveConfig, TrainConfig, override, to_json
from salt_vla.data.segments import SourceOptions
from salt_vla.errors import UserError
from salt_vla.evaluation.targets import TARGETS, TASK
from salt_vla.geometry import ClipGeometry
from salt_vla.models import build_encoder
from salt_vla.models.loading import save_encoder
from salt_vla.models.pixels import normalise_pixels
from salt_vla.recipes import all_recipes, get_recipe
from salt_vla.teachers import TeacherRequest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PLACEHOLDER = re.compile(r"…|\b[A-Z]{3,}\b")  # `salt-vla cache …`, `teacher check FOLDER`


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    return [code for kind, code in FENCE.findall(page.read_text()) if kind == language]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def table_rows(page: Path) -> Iterator[list[str]]:
    for line in prose(page).splitlines():
        if line.startswith("|"):
            yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))]


def anchors(page: Path) -> set[str]:
    """Headings as links name them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_to_files_and_headings(page: Path) -> None:
    for target in LINK.findall(prose(page)):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), f"{target} leads nowhere"
        assert not anchor or anchor in anchors(there), f"{target}: no such heading"


def shell_lines() -> list[tuple[str, str, bool]]:
    """(page, command, whole): lines of code blocks are whole, commands in running text may be a mere name."""
    found = []
    for page in PAGES:
        for line in "".join(blocks(page, "") + blocks(page, "sh")).splitlines():
            found.append((name_of(page), line.strip(), True))
        found += [(name_of(page), text, False) for text in INLINE.findall(prose(page))]
    return [entry for entry in found if re.match(r"salt-vla\b [a-z]", entry[1])]


def recorded(function: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    """The same command line, which gives back its arguments instead of working."""

    @functools.wraps(function)
    def record(*args: Any, **kwargs: Any) -> dict[str, Any]:
        bound = inspect.signature(function).bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.arguments

    return record


def find(words: list[str]) -> tuple[str, list[str]]:
    """ "module:function" and the arguments of a command line without `salt-vla`."""
    verbs = COMMANDS[words[0]]
    verb = "" if "" in verbs else words[1]
    return verbs[verb][0], words[2 if verb else 1 :]


def arguments(target: str, words: list[str]) -> dict[str, Any]:
    module, _, name = target.partition(":")
    function = getattr(importlib.import_module(f"salt_vla.cli.{module}"), name)
    try:
        return tyro.cli(recorded(function), args=words, console_outputs=False)
    except SystemExit as error:
        raise AssertionError(f"{words} does not parse") from error


@pytest.mark.parametrize(("page", "line", "whole"), shell_lines())
def test_commands_exist_with_their_flags(page: str, line: str, whole: bool) -> None:
    words = shlex.split(line, comments=True)[1:]
    if PLACEHOLDER.search(line):
        verbs = COMMANDS[words[0]]
        assert "" in verbs or words[1] in {*verbs, "…"}
        return
    target, rest = find(words)
    if not whole and not rest:
        return
    given = arguments(target, rest)
    if target == "train:train":
        assert override(get_recipe(given["recipe"]).config, given["overrides"])


def test_every_command_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    commands = [f"salt-vla {noun} {verb}".strip() for noun, verbs in COMMANDS.items() for verb in verbs]
    assert [command for command in commands if f"`{command}`" not in text] == []


def test_the_readmes_clips_are_those_of_the_demos_recipes() -> None:
    data = get_recipe("demo_teacher").config.data
    frames = get_recipe("demo_teacher").config.geometry.num_frames
    index = f"--num-frames {frames} --frame-stride {data.view.frame_stride}"
    text = (ROOT / "README.md").read_text()
    assert index in text
    assert f"{get_recipe('demo_teacher').config.geometry.clip_bytes / 1e6:.2f} MB" in text
    assert data.store_views


def test_make_commands_exist() -> None:
    goals = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        text = "\n".join(blocks(page, "") + INLINE.findall(prose(page)))
        for goal in re.findall(r"^make ([a-z]+)", text, re.MULTILINE):
            assert goal in goals, f"{name_of(page)}: there is no `make {goal}`"


def test_overrides_in_running_text_are_accepted() -> None:
    config = get_recipe("demo_student").config
    for page in [ROOT / "README.md", ROOT / "docs" / "recipes.md"]:
        for text in INLINE.findall(prose(page)):
            if re.fullmatch(r"([a-z_.]+=\S+ ?)+", text) and "field=value" not in text:
                assert override(config, text.split()) != config, f"{name_of(page)}: {text}"


def leaves(section: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every field below a configuration with its value; of a list of objects also the first one's fields."""
    for key, value in section.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{path}{key}.")
            continue
        yield f"{path}{key}", value
        if isinstance(value, list) and value and isinstance(value[0], dict):
            yield from leaves(value[0], f"{path}{key}.0.")


def documented_fields() -> dict[str, Any]:
    rows = [row for row in table_rows(ROOT / "docs" / "recipes.md") if len(row) == 3]
    return {row[0].strip("`"): json.loads(row[1].strip("`")) for row in rows if row[1].startswith("`")}


def test_every_field_is_documented_with_its_default() -> None:
    assert documented_fields() == dict(leaves(json.loads(to_json(TrainConfig()))))


@pytest.mark.parametrize("field", documented_fields())
def test_every_documented_field_can_be_overridden(field: str) -> None:
    """Even by a value that it cannot hold: what is refused then is the value, not the field."""
    with pytest.raises(UserError) as refusal:
        override(TrainConfig(), [f'{field}={{"no": "value"}}'])
        raise UserError("text fields take any text")
    assert "there is no field" not in str(refusal.value)


def test_every_recipe_is_documented() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text()
    assert [name for name in all_recipes() if f"`{name}`" not in text] == []


def test_every_probe_target_is_documented() -> None:
    first_cells = {row[0].strip("`") for row in table_rows(ROOT / "docs" / "evaluation.md")}
    assert {*TARGETS, TASK} <= first_cells


def test_the_module_map_names_every_module_once() -> None:
    listed = [row[0].strip("`") for row in table_rows(ROOT / "docs" / "architecture.md")]
    source = ROOT / "src" / "salt_vla"
    modules = {str(path.relative_to(source)) for path in source.rglob("*.py")}
    listed = [name for name in listed if name.endswith(".py")]
    assert len(listed) == len(set(listed))
    assert set(listed) <= modules
    owners_of_nothing = {name for name in modules if name.endswith("__init__.py")}
    assert modules - set(listed) <= owners_of_nothing


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_named_in_the_text_exist(page: Path) -> None:
    for text in INLINE.findall(prose(page)):
        if re.fullmatch(r"(src|tests|docs|benchmarks)/[\w/.-]+", text):
            assert (ROOT / text).exists(), text


def python_blocks() -> list[tuple[str, str]]:
    return [(name_of(page), code) for page in PAGES for code in blocks(page, "python")]


@pytest.mark.parametrize(("page", "code"), python_blocks(), ids=[page for page, _ in python_blocks()])
def test_python_in_the_docs_runs(
    page: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, build_cache: Callable[..., Any]
) -> None:
    """In a folder with a demo student and a small cache; what a page defines is put to the test below."""
    encoder = build_encoder(get_recipe("demo_student").config.encoder)
    folder = tmp_path / "runs" / "demo_student" / "checkpoints" / "step_00000001"
    folder.mkdir(parents=True)
    save_encoder(encoder.state_dict(), encoder.config, folder)
    arrays = build_cache(tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    names = run(code, {"clip_id": "clip/3", "arrays": arrays})
    if page in CHECKS:
        CHECKS[page](names, tmp_path)


def run(code: str, given: dict[str, Any]) -> dict[str, Any]:
    names = {"__name__": "documented", **given}
    exec(compile(ast.parse(code), "documented", "exec"), names)
    return names


def readme_encodes(names: dict[str, Any], folder: Path) -> None:
    tokens = tuple(names["tokens"].shape)
    assert tokens == (1, names["encoder"].geometry.num_tokens, names["encoder"].dim)
    assert f"# {tokens}:" in (ROOT / "README.md").read_text()


def caches_open_without_us(names: dict[str, Any], folder: Path) -> None:
    assert np.array_equal(names["latents"], names["arrays"]["clip/3", 0])


def vivit_teaches(names: dict[str, Any], folder: Path) -> None:
    from transformers import VivitConfig, VivitModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = VivitConfig(image_size=32, num_frames=4, tubelet_size=[2, 16, 16], **sizes)
    reference = VivitModel(config).eval()
    reference.save_pretrained(folder / "weights")
    geometry = ClipGeometry(4, 32, 2, 16)
    teacher = names["load"](folder / "weights", "v", TeacherRequest(geometry))
    frames = torch.randint(0, 256, (2, 4, 32, 32, 3), dtype=torch.uint8)
    pixels = normalise_pixels(frames).transpose(1, 2)
    with torch.inference_mode():
        expected = reference(pixels).last_hidden_state[:, 1:]
    assert torch.allclose(teacher.latents(frames), expected, atol=1e-5)
    assert (teacher.geometry, teacher.name) == (geometry, "v/block2/norm")
    assert names["load"](folder / "weights", "v", TeacherRequest(layer=1)).name == "v/block1/raw"
    with pytest.raises(UserError, match="takes clips of"):
        names["load"](folder / "weights", "v", TeacherRequest(ClipGeometry()))


def films_become_clips(names: dict[str, Any], folder: Path) -> None:
    (folder / "v_a.mp4").touch()
    spans = [{"segment": [1.0, 2.5], "label": "jump"}, {"segment": [3, 4], "label": "run"}]
    films = {name: {"subset": "training", "annotations": spans} for name in "ab"}
    assert not names["recognises"](folder)
    (folder / names["LIST"]).write_text(json.dumps({"database": films}))
    assert names["recognises"](folder)
    listing = names["segments"](folder, SourceOptions())
    assert [(s.key, s.split, s.label, s.start) for s in listing.segments] == [
        ("activitynet/a/0", "train", "jump", 1.0),
        ("activitynet/a/1", "train", "run", 3),
    ]
    assert [(problem.key, problem.file) for problem in listing.problems] == [("activitynet/b", "v_b.mp4")]
    with pytest.raises(UserError, match="is not ActivityNet"):
        names["segments"](folder / "nowhere", SourceOptions())


def paths_have_lengths(names: dict[str, Any], folder: Path) -> None:
    there_and_back = np.array([[[0.0], [3.0], [1.0]]])
    assert names["path_length"](there_and_back, 30.0).tolist() == [[5.0]]


def directions_differ(names: dict[str, Any], folder: Path) -> None:
    tokens = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    assert names["direction"]([tokens], [tokens * 3], ObjectiveConfig()).item() == pytest.approx(0.0)
    assert names["direction"]([tokens], [-tokens], ObjectiveConfig()).item() == pytest.approx(4.0)


def recipes_are_whole(names: dict[str, Any], folder: Path) -> None:
    recipe = names["TUBES"]
    assert asdict(recipe)["config"]["masks"]["strategy"] == "tube"
    assert recipe.parent in all_recipes() and recipe.hypothesis and recipe.target


CHECKS = {
    "README.md": readme_encodes,
    "docs/formats.md": caches_open_without_us,
    "docs/howto/add-a-teacher.md": vivit_teaches,
    "docs/howto/add-a-source.md": films_become_clips,
    "docs/howto/add-a-probe.md": paths_have_lengths,
    "docs/howto/add-an-objective.md": directions_differ,
    "docs/howto/add-a-recipe.md": recipes_are_whole,
}


def test_every_check_has_its_page() -> None:
    assert set(CHECKS) <= {page for page, _ in python_blocks()}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_page_names_places_of_one_machine(page: Path) -> None:
    assert not re.search(r"(?<![\w~.])/(work|tmp|home|root)/", page.read_text())

"""Rules that every source file keeps, read from its syntax tree; each rule is shown to bite."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src" / "salt_vla").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MIN_TEST_LINES_PER_SOURCE_LINE = 0.8
CONFIG_NAME = re.compile(r"config|cfg|recipe|settings|manifest", re.IGNORECASE)
RUNS_WHAT_IT_READS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}

Rule = Callable[[ast.AST], Iterator[tuple[int, str]]]


def _calls(tree: ast.AST) -> Iterator[tuple[ast.Call, str]]:
    """Every call with the dotted name of what is called."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func)


def _keywords(call: ast.Call) -> dict[str | None, str]:
    return {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}


def long_functions(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                yield node.lineno, f"{node.name} has {lines} lines, more than {MAX_FUNCTION_LINES}"


def code_from_data(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """What lets a file that is read run code: eval, exec, pickles, remote code."""
    for call, name in _calls(tree):
        keywords = _keywords(call)
        if name in {"eval", "exec", "builtins.eval", "builtins.exec", "__import__"}:
            yield call.lineno, f"{name}() runs what it is given"
        if name == "torch.load" and keywords.get("weights_only") != "True":
            yield call.lineno, "torch.load() without weights_only=True unpickles"
        if keywords.get("allow_pickle", "False") != "False":
            yield call.lineno, "allow_pickle unpickles"
        if keywords.get("trust_remote_code", "False") != "False":
            yield call.lineno, "trust_remote_code runs a stranger's code"
        if keywords.get("shell", "False") != "False":
            yield call.lineno, "shell= runs what is in a name"
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            origin = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            for module in origin:
                if module.split(".")[0] in RUNS_WHAT_IT_READS:
                    yield node.lineno, f"{module} runs what it reads"
        if isinstance(node, ast.Dict):
            entries = {
                ast.unparse(k): ast.unparse(v) for k, v in zip(node.keys, node.values, strict=True) if k
            }
            if entries.get("'trust_remote_code'", "False") != "False":
                yield node.lineno, "trust_remote_code runs a stranger's code"


def swallowed_errors(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Catching every error and going on as if nothing had been."""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.ExceptHandler)
            and _is_broad(node.type)
            and all(map(_says_nothing, node.body))
        ):
            yield node.lineno, "an except for everything that says nothing; name the error, or report it"
    for call, name in _calls(tree):
        if name in {"suppress", "contextlib.suppress"} and any(map(_is_broad, call.args)):
            yield call.lineno, f"{ast.unparse(call)} hides every mistake"


def _is_broad(kind: ast.expr | None) -> bool:
    kinds = kind.elts if isinstance(kind, ast.Tuple) else [kind]
    return any(k is None or ast.unparse(k) in {"Exception", "BaseException"} for k in kinds)


def _says_nothing(step: ast.stmt) -> bool:
    is_constant = isinstance(step, ast.Expr) and isinstance(step.value, ast.Constant)
    return is_constant or isinstance(step, ast.Pass | ast.Continue)


def configs_with_defaults(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """A default belongs to the field of the dataclass, not to the place that reads it."""
    for call, name in _calls(tree):
        receiver, _, method = name.rpartition(".")
        has_default = len(call.args) + len(call.keywords) > 1
        if (
            method == "get"
            and has_default
            and re.search(r"config|cfg|recipe|settings|manifest", receiver, re.I)
        ):
            yield call.lineno, f"{name}() with a default of its own"
        if name == "getattr" and len(call.args) == 3:
            owner = ast.unparse(call.args[0])
            if CONFIG_NAME.search(owner):
                yield call.lineno, f"getattr({owner}, …) with a default of its own"


def unfinished_work(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and "NotImplementedError" in ast.unparse(node):
            yield node.lineno, "raises NotImplementedError"


def missing_docstrings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """A module, a record or protocol, and whatever `__all__` names say what they are for."""
    if not isinstance(tree, ast.Module) or not tree.body:
        return
    if ast.get_docstring(tree) is None:
        yield 1, "the module does not say what it owns"
    exported = _exported(tree)
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            is_public = not node.name.startswith("_") and (node.name in exported or _is_record(node))
            if is_public and ast.get_docstring(node) is None:
                yield node.lineno, f"{node.name} does not say what it is"


def _is_record(node: ast.stmt) -> bool:
    """A dataclass, NamedTuple or Protocol: others rely on its fields or methods."""
    if not isinstance(node, ast.ClassDef):
        return False
    marks = " ".join(ast.unparse(mark) for mark in node.decorator_list + node.bases)
    return any(kind in marks for kind in ("dataclass", "NamedTuple", "Protocol"))


def _exported(tree: ast.Module) -> set[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return {name.value for name in ast.walk(node.value) if isinstance(name, ast.Constant)}
    return set()


RULES: list[Rule] = [
    long_functions,
    code_from_data,
    swallowed_errors,
    configs_with_defaults,
    unfinished_work,
    missing_docstrings,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_no_source_file_breaks_the_rule(rule: Rule) -> None:
    findings = [
        f"{path.relative_to(ROOT)}:{line} {message}"
        for path in SOURCES
        for line, message in rule(ast.parse(path.read_text()))
    ]
    assert not findings, "\n".join(findings)


@pytest.mark.parametrize(
    ("rule", "code"),
    [
        (long_functions, "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES),
        (code_from_data, "eval(text)"),
        (code_from_data, "exec(text)"),
        (code_from_data, "import pickle"),
        (code_from_data, "from pickle import loads"),
        (code_from_data, "torch.load(path)"),
        (code_from_data, "torch.load(path, weights_only=False)"),
        (code_from_data, "np.load(path, allow_pickle=True)"),
        (code_from_data, "AutoModel.from_pretrained(name, trust_remote_code=True)"),
        (code_from_data, "options = {'trust_remote_code': trusted}"),
        (code_from_data, "subprocess.run(command, shell=True)"),
        (swallowed_errors, "try:\n    f()\nexcept:\n    pass"),
        (swallowed_errors, "for x in y:\n    try:\n        f()\n    except Exception:\n        continue"),
        (swallowed_errors, "try:\n    f()\nexcept (OSError, Exception):\n    ..."),
        (swallowed_errors, "with contextlib.suppress(Exception):\n    f()"),
        (configs_with_defaults, "self.config.get('depth', 12)"),
        (configs_with_defaults, "cfg['model'].get('depth', default)"),
        (configs_with_defaults, "getattr(config, 'depth', 12)"),
        (unfinished_work, "raise NotImplementedError('later')"),
        (missing_docstrings, "x = 1"),
        (missing_docstrings, "'Owns x.'\n@dataclass(frozen=True)\nclass Cache:\n    x = 1"),
        (missing_docstrings, "'Owns x.'\n__all__ = ['f']\ndef f():\n    return 1"),
    ],
)
def test_rule_finds_what_it_forbids(rule: Rule, code: str) -> None:
    assert list(rule(ast.parse(code)))


@pytest.mark.parametrize(
    ("rule", "code"),
    [
        (long_functions, "def f():\n" + "    x = 1\n" * (MAX_FUNCTION_LINES - 1)),
        (code_from_data, "model.eval()"),
        (code_from_data, "'never eval(text) or pickle.load(file)'  # nor exec(text)"),
        (code_from_data, "torch.load(path, map_location='cpu', weights_only=True)"),
        (swallowed_errors, "try:\n    f()\nexcept OSError as error:\n    raise DataError(path) from error"),
        (swallowed_errors, "for x in y:\n    try:\n        f()\n    except ValueError:\n        continue"),
        (swallowed_errors, "with contextlib.suppress(FileNotFoundError):\n    path.unlink()"),
        (configs_with_defaults, "config.get('depth')"),
        (configs_with_defaults, "counts.get(word, 0)"),
        (configs_with_defaults, "getattr(config, name)"),
        (unfinished_work, "raise TypeError('draws no masks of its own')"),
        (missing_docstrings, ""),
        (missing_docstrings, "'Owns x.'\n__all__ = ['f']\ndef f():\n    'Gives x.'\ndef g():\n    return 1"),
    ],
)
def test_rule_lets_sound_code_pass(rule: Rule, code: str) -> None:
    assert not list(rule(ast.parse(code)))


def test_one_place_reads_our_environment_variables() -> None:
    readers = [path.name for path in SOURCES if re.search("[\"']SALT_VLA_[A-Z]+[\"']", path.read_text())]
    assert readers == ["rundir.py"]


def test_no_source_file_is_longer_than_a_room() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in SOURCES}
    long = [f"{path.relative_to(ROOT)}: {n} lines" for path, n in lengths.items() if n > MAX_FILE_LINES]
    assert not long, "\n".join(long)


def _lines(paths: list[Path]) -> int:
    lines = [line.strip() for path in paths for line in path.read_text().splitlines()]
    return sum(bool(line) and not line.startswith("#") for line in lines)


def test_tests_keep_pace_with_the_source() -> None:
    source, tests = _lines(SOURCES), _lines(TESTS)
    assert tests >= MIN_TEST_LINES_PER_SOURCE_LINE * source, f"{tests} test lines for {source} source lines"

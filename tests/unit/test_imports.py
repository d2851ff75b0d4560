"""The house rules, read from the source with ast: who may import whom, what stays out, how big a room may grow.

They are checked for every import statement, also those inside functions and under TYPE_CHECKING: a late import is still
a dependence. The rules are design.md section 4; a new folder needs a line here before it may import anything of qexp.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "qexp"
FILES = sorted(PACKAGE.rglob("*.py"))
STAGES = ("transform", "grid", "solver", "act", "kv", "tuner", "allocation")

# Folder of qexp -> the folders of qexp it may import, besides itself. The ground floor first.
MAY_IMPORT: dict[str, set[str]] = {
    "kernels": set(),
    "core": {"kernels"},
    "data": {"core"},
    "models": {"core"},
    "report": {"core"},
    "tracking": {"core"},
    "eval": {"core", "models", "data"},
    "engine": {"core", "kernels", "models", "data"},
    "export": {"core", "kernels", "models"},
} | {f"stages.{kind}": {"core", "kernels"} for kind in STAGES}

# Files directly under qexp/ see everything, and nothing below may import them; Hydra stays in the few named here.
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
COMMANDS = {name: target.split(":")[0] for name, target in PROJECT["project"]["scripts"].items()}
HYDRA_FILES = (COMMANDS["qexp"], *(f"qexp.{name}" for name in ("compose", "explain", "schema", "sources")))

HEAVY = {"optuna", "torch", "transformers", "datasets", "lm_eval", "wandb", "matplotlib", "scipy", "pandas"}
USED_EXTRAS = ("cuda", "export", "search", "dashboards")
# Import name -> distribution name, where metadata does not know it because the package is an extra.
EXTRAS = {"fast_hadamard_transform": "fast-hadamard-transform", "compressed_tensors": "compressed-tensors"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted module) of every import; ``from qexp.core import rewrite`` names qexp.core.rewrite."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            dots, base = "." * node.level, node.module or ""
            yield from ((node.lineno, f"{dots}{base}.{alias.name}") for alias in node.names)


def room(module: str) -> str:
    """Return the rule a module falls under: its folder below qexp, for members with their kind."""
    parts = module.split(".")[1:]
    return ".".join(parts[:2]) if parts[:1] == ["stages"] else ".".join(parts[:1])


def violations(module: str, source: str) -> list[str]:
    """Return what is wrong with the imports of ``module``, one line each."""
    here, wrong = room(module), hydra_imports(module, source)
    if module.count(".") == 1 and here not in MAY_IMPORT:
        return wrong
    for line, name in imports(ast.parse(source)):
        if name.startswith("."):
            wrong.append(f"{module}:{line} relative import")
        elif name.split(".")[0] == "qexp" and room(name) not in {here, *MAY_IMPORT.get(here, set())}:
            wrong.append(f"{module}:{line} {here or 'qexp'} must not import {name}")
        elif here.startswith("stages.") and room(name) == here and not name.startswith(f"qexp.{here}._shared"):
            wrong.append(f"{module}:{line} a member imports another member, {name}; share through _shared.py")
    return wrong


def hydra_imports(module: str, source: str) -> list[str]:
    if module in HYDRA_FILES:
        return []
    found = ((line, name) for line, name in imports(ast.parse(source)) if name.split(".")[0] in {"hydra", "omegaconf"})
    return [f"{module}:{line} only {HYDRA_FILES} import {name}" for line, name in found]


def test_there_is_something_to_check() -> None:
    seen = {room(module_name(path)) for path in FILES if path.name != "__init__.py"}
    assert len(FILES) > 30
    assert {"core", "engine", "kernels", "models", "stages.grid", "stages.solver", "stages.transform"} <= seen
    top = {path.stem for path in PACKAGE.glob("*.py")}
    assert seen - top - set(MAY_IMPORT) == set(), "a folder without a rule"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_go_down(path: Path) -> None:
    assert violations(module_name(path), path.read_text()) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("qexp.core.linear", "from qexp.models.view import ModelView"),
        ("qexp.core.linear", "def f():\n    import qexp.engine"),
        ("qexp.kernels.pack", "from qexp.core.errors import UserError"),
        ("qexp.stages.solver.gptq", "from qexp.stages.grid.integer import Integer"),
        ("qexp.stages.solver.gptq", "from qexp.stages.solver.rtn import Rtn"),
        ("qexp.stages.solver.gptq", "from qexp.stages import grid"),
        ("qexp.stages.grid.integer", "from qexp.models import view"),
        ("qexp.engine.blocks", "from qexp.stages.solver.gptq import Gptq"),
        ("qexp.engine.blocks", "from hydra.utils import instantiate"),
        ("qexp.bench", "from omegaconf import DictConfig"),
        ("qexp.core.linear", "from qexp.run import run"),
        ("qexp.report.table", "from . import record"),
        ("qexp.eval.perplexity", "if TYPE_CHECKING:\n    from qexp.engine import store"),
        ("qexp.eval.perplexity", "import qexp"),
        ("qexp", "from qexp.run import cli"),
    ],
)
def test_the_checker_itself_sees(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (HYDRA_FILES[0], "import hydra\nfrom qexp.stages.solver.gptq import Gptq"),
        ("qexp.bench", "from qexp.stages.solver.gptq import Gptq"),
        ("qexp.core.linear", "from qexp.kernels import pack\nfrom qexp.core.words import Stats\nimport torch"),
        ("qexp.stages.solver.gptq", "from qexp.core import words\nfrom qexp.stages.solver._shared import damp"),
        ("qexp.eval.perplexity", "from qexp.models.view import ModelView\nfrom qexp.data import corpora"),
    ],
)
def test_the_checker_lets_pass(module: str, source: str) -> None:
    assert violations(module, source) == []


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_rooms_stay_small(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= (150 if path.parent.parent == PACKAGE / "stages" else 250)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_only_the_table_prints(path: Path) -> None:
    if path in (PACKAGE / "report" / "table.py", PACKAGE / "models" / "embedded" / "train.py"):  # the table, a script
        return
    calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    assert [node.lineno for node in calls if isinstance(node.func, ast.Name) and node.func.id == "print"] == []


@pytest.mark.parametrize("path", [path for path in FILES if path.name != "__init__.py"], ids=module_name)
def test_every_module_says_its_idea(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())), "a module opens with its idea"


def test_no_utils() -> None:
    assert [path for path in FILES if path.stem in {"utils", "util", "helpers", "misc", "common"}] == []


# --help, a typo and a report must answer at once, so nothing heavy may be loaded by importing these.
@pytest.mark.parametrize(
    "module", [*(COMMANDS[name] for name in COMMANDS if name != "qexp-bench"), "qexp.tracking.wandb"]
)
def test_starting_up_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_every_package_is_in_the_wheel() -> None:
    tools = PROJECT["tool"]["setuptools"]
    folders = {module_name(path) for path in PACKAGE.rglob("__init__.py")}
    assert set(tools["packages"]) == folders | {"qexp.conf", "qexp.csrc", "qexp.sweeps"}
    orphans = {module_name(path.parent / "__init__.py") for path in FILES} - folders
    assert orphans == set(), "a folder without __init__.py is left out of the wheel"
    for folder in tools["package-dir"].values():
        assert (ROOT / folder / "__init__.py").exists(), "without it an editable install does not find the folder"


def test_every_import_is_a_declared_dependency() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *(line for name in USED_EXTRAS for line in extras[name])]
    declared = {canonical(re.split(r"[\[<>=~! ;]", line)[0]) for line in wanted}
    used = {name.split(".")[0] for path in FILES for _, name in imports(ast.parse(path.read_text()))}
    foreign = used - set(sys.stdlib_module_names) - {"qexp"}
    known = packages_distributions()
    undeclared = {
        name
        for name in foreign
        if not {canonical(dist) for dist in known.get(name, [EXTRAS.get(name, name)])} & declared
    }
    assert undeclared == set()


def canonical(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()

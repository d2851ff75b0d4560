"""What the documents say can be typed: every command composes and builds, every link leads somewhere."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import report_records
import yaml
from hydra import compose
from hydra.core.override_parser.overrides_parser import OverridesParser

from qexp import compose as qexp_compose
from qexp import methods, methods_page
from qexp.core.build import build
from qexp.core.errors import UserError
from qexp.launch import Setup
from qexp.report import record
from qexp.report.rows import make

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "sweeps" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CARD = ROOT / "qexp" / "models" / "embedded" / "README.md"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
OF_OTHERS = ("--config-dir",)  # a folder of the reader's own


@pytest.fixture(scope="module", autouse=True)
def _hydra() -> Iterator[None]:
    with qexp_compose.hydra():
        yield


def commands() -> list[str]:
    """Every line of a code block that starts qexp, and the examples of its help."""
    help_text = yaml.safe_load((ROOT / "conf" / "config.yaml").read_text())["hydra"]["help"]["template"]
    blocks = [match[2] for page in PAGES for match in FENCE.finditer(page.read_text()) if not match[1]]
    lines = [line.strip() for block in (*blocks, help_text) for line in block.splitlines()]
    typed = [re.split(r"\s+#", line)[0] for line in lines if re.match(r"qexp( -m| \S+=|$)", line) and "<" not in line]
    return sorted({line for line in typed if not any(word in line for word in OF_OTHERS)})


def first_job(command: str) -> list[str]:
    """The overrides of a command; of a sweep those of its first job."""
    words = [word for word in shlex.split(command)[1:] if word not in ("-m", "--cfg", "job")]
    parsed = OverridesParser.create().parse_overrides(words)
    return [
        f"{o.get_key_element()}={next(o.sweep_string_iterator())}" if o.is_sweep_override() else o.input_line
        for o in parsed
    ]


def test_there_are_commands_to_check() -> None:
    assert len(commands()) > 25
    assert sum(" -m " in command for command in commands()) > 5


@pytest.mark.parametrize("command", commands())
def test_a_documented_command_composes_and_builds(command: str) -> None:
    config = qexp_compose.composed(first_job(command))
    Setup(**{key: build(config[key], key) for key in Setup.__annotations__})


def test_the_recipe_of_the_readme_works(tmp_path: Path) -> None:
    recipe = next(m[2] for m in FENCE.finditer((ROOT / "README.md").read_text()) if m[1] == "yaml")
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "mine.yaml").write_text(recipe)
    config = compose("config", ["method=mine", f"hydra.searchpath=[file://{tmp_path}]"])
    assert list(config.method.transform) == ["fold_norm", "hadamard"]


@pytest.mark.parametrize("page", [*PAGES, CARD], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


def test_the_readme_is_short_and_shows_every_recipe() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    for recipe in qexp_compose.options("method"):
        assert f"`{recipe}`" in text


def test_the_page_of_methods_is_what_the_recipes_say() -> None:
    """After a change of a recipe: qexp-methods --page docs/methods.md --runs outputs."""
    assert methods_page.recipes() in (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_page_of_methods_shows_what_was_measured(tmp_path: Path) -> None:
    for i, run in enumerate(report_records.study()):
        record.write(tmp_path / f"{i:02d}", run)
    assert methods.page(tmp_path / "methods.md", [tmp_path]) == 0
    text, rows = (tmp_path / "methods.md").read_text(encoding="utf-8"), make(record.find([tmp_path]))
    figures = [f"{row.metrics['size/bits_per_weight']:.3f}" for row in rows if not row.failed]
    assert figures and all(f"| {figure} |" in text for figure in figures)
    assert "failed" not in text
    with pytest.raises(UserError, match="cannot write"):
        methods.page(tmp_path / "no" / "methods.md", [])

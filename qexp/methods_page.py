"""The page of all methods, ``docs/methods.md``: what each recipe is made of, and what its runs cost and gave.

Nothing is typed: stages come from the recipes, figures from the records; ``qexp-methods --page FILE --runs DIR...``.
"""

from __future__ import annotations

from collections.abc import Sequence

from qexp import compose
from qexp.methods import PAPER, idea_of
from qexp.report import columns, table
from qexp.report.record import Record
from qexp.report.rows import KINDS, Row

HEAD = """# Methods

Written by `qexp-methods --page docs/methods.md --runs <folders>`; nothing here is typed by hand. What the stages
are is in [configuration.md](configuration.md), what differs from papers and their code in [fidelity.md](fidelity.md).

## What they are made of

Any stage is swapped by one override (`method/solver=gptq`); `qexp-methods NAME` shows where each value comes from.

"""
MEASURED = """
## What they cost and give

{runs} runs, {rows} settings; figures of several seeds are means with their range. gap is log perplexity minus that of
the float model, in nats per token; bits/weight counts all that is stored of quantized layers. Seconds are of one
process on {processors}, threads: {threads}, other jobs beside it. Commits: {commits}.
"""
FIGURES = ("size/bits_per_weight", "gap/", "divergence/kl/", "cost/quantize_seconds")


def page(records: Sequence[Record], rows: Sequence[Row]) -> str:
    """Return the page as Markdown: all recipes, then the completed rows of each model."""
    done = [row for row in rows if not row.failed]
    parts = [HEAD, recipes()] + ([_provenance(records, done)] if done else [])
    for model in dict.fromkeys(row.model for row in done):
        own = [row for row in done if row.model == model]
        parts += [f"\n### {model}\n\n", table.markdown(own, _shown(own))]
    return "".join(parts)


def _shown(rows: Sequence[Row]) -> list[columns.Column]:
    """Return who it was, its stages and settings (one column of them), its size, quality and cost."""
    found = [column for column in columns.find(rows) if not column.csv_only]
    who = [column for column in found if column.key in ("method", "bits") or column.key.startswith("stage/")]
    own = [columns.settings()] if any(row.settings for row in rows) else []  # one column, however few
    return [*who, *own, *(column for column in found if column.key.startswith(FIGURES))]


def recipes() -> str:
    """Return the table of recipes: papers, and the member of each stage by its name."""
    lines = [["method", "what it is", "arXiv", *KINDS], [":--"] * (3 + len(KINDS))]
    with compose.hydra():
        for name in compose.options("method"):
            text = compose.text_of("method", name)
            papers = [f"[{paper}](https://arxiv.org/abs/{paper})" for paper in dict.fromkeys(PAPER.findall(text))]
            lines.append([f"`{name}`", table.markdown_cell(idea_of(text)), " ".join(papers), *_members(name)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _members(recipe: str) -> list[str]:
    """Return the members of each stage kind as text."""
    return [", ".join(name for name in names if name != "none") or "–" for names in compose.members(recipe).values()]


def _provenance(records: Sequence[Record], rows: Sequence[Row]) -> str:
    """Return where the figures come from, as the records say."""
    around = [record["environment"] for record in records if record["status"] == "completed"]
    threads, commits = ({str(each.get(key, "?")) for each in around} for key in ("threads", "commit"))
    return MEASURED.format(
        runs=len(around),
        rows=len(rows),
        threads=" or ".join(sorted(threads)),
        processors=", ".join(sorted({str(each.get("gpu") or each.get("processor", "?")) for each in around})),
        commits=", ".join(sorted(commits)),
    )

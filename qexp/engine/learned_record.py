"""What a run keeps of what it has learned: curves and figures in the record, tensors in its folder."""

from __future__ import annotations

from collections.abc import Mapping

from safetensors.torch import save_file

from qexp.core.words import BlockReport
from qexp.engine.context import Run
from qexp.engine.reconstruct import Story

POINTS = 512  # of a curve in the record


def keep_learned(run: Run, report: BlockReport, stories: Mapping[str, Story]) -> None:
    """Put curves and figures of what was learned into the report, and its tensors into the run's folder."""
    report.losses = {name: thinned(story.outcome.losses) for name, story in stories.items()}
    report.learned = {name: story.facts() for name, story in stories.items()}
    tensors = {n: t.cpu().contiguous() for story in stories.values() for n, t in story.tensors.items()}
    if tensors:
        folder = run.folder / "learned"
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{report.index:05d}.part"
        save_file(tensors, part, metadata={"facts": "{}"})
        part.replace(folder / f"{report.index:05d}.safetensors")


def thinned(losses: list[float]) -> list[float]:
    """Return at most POINTS losses: means over neighbouring steps."""
    width = -(-len(losses) // POINTS)
    if width <= 1:
        return losses
    return [sum(some) / len(some) for some in (losses[i : i + width] for i in range(0, len(losses), width))]

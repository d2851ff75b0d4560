"""What a run keeps of what it has learned: curves and figures in the record, tensors in its folder."""

from __future__ import annotations

from collections.abc import Mapping

from qexp.core.words import BlockReport
from qexp.engine.context import Run
from qexp.engine.reconstruct import Story
from qexp.engine.store import Finished, write

POINTS = 512  # of a curve in the record


def keep_learned(run: Run, report: BlockReport, stories: Mapping[str, Story]) -> None:
    """Put curves and figures of what was learned into the report, and its tensors into the run's folder."""
    report.losses = {name: thinned(story.outcome.losses) for name, story in stories.items()}
    report.learned = {name: story.facts() for name, story in stories.items()}
    tensors = {n: t.cpu().contiguous() for story in stories.values() for n, t in story.tensors.items()}
    if tensors:
        write(run.folder / "learned" / f"{report.index:05d}.safetensors", Finished(tensors, {}))


def thinned(losses: list[float]) -> list[float]:
    """Return at most POINTS losses: means over neighbouring steps."""
    width = -(-len(losses) // POINTS)
    if width <= 1:
        return losses
    return [sum(some) / len(some) for some in (losses[i : i + width] for i in range(0, len(losses), width))]

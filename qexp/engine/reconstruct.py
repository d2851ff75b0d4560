"""Block reconstruction: learned parts of one block descend its distance from the float block.

    loss = t1 D(B(X_fp), Q(x)) + t2 D(B(X_q), Q(x)),   x = X_q, X_fp, or a mix of both,
B the float block, Q the block as the learned tensors make it, X_fp and X_q its inputs behind float and behind quantized
blocks. Training, measuring and the finished block run through one function, :meth:`Candidate.answer`. In a step the
weights are computed once; micro-batches meet them as leaves, whose gradients then go back to what is learned, so that
inverses and roundings never share memory with more than one micro-batch.

Source: methods/block_reconstruction.md; each method's settings are in the YAML of its member.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from operator import or_
from pathlib import Path

import torch
from torch import Tensor

from qexp.core.distance import distance
from qexp.core.errors import UserError
from qexp.core.learned import NOTHING_MADE, Made, Part
from qexp.core.minimise import Descent, Knobs, Outcome, minimise, tensors_of
from qexp.core.rng import generator
from qexp.core.training import Training
from qexp.core.words import Site
from qexp.engine.candidate import Candidate, Weights, quantizers
from qexp.engine.solving import Grids, Plan
from qexp.engine.store import read
from qexp.engine.streams import Keep, Kwargs, Stream, advance, take
from qexp.models.view import ModelView

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scene:
    """What a block is learned from: its inputs behind quantized and behind float blocks, and its float answers to both.

    Streams that no member of the recipe reads are empty.
    """

    block: int
    kwargs: Kwargs
    quantized: Stream
    float: Stream
    answers_float: Stream  # T1
    answers_quantized: Stream  # T2

    def answered(self, view: ModelView, keep: Keep) -> Scene:
        """Return the scene with the float block's answers to the quantized stream; the block is still float."""
        if self.quantized is self.float and self.answers_float:
            return replace(self, answers_quantized=self.answers_float)
        return replace(self, answers_quantized=advance(view, self.block, self.quantized, self.kwargs, keep))


@dataclass(frozen=True)
class Lesson:
    """What is learned together of a block, and how: ``sites`` of the inserts, ``grids`` of the layers to round."""

    name: str
    training: Training
    parts: Sequence[Part]
    sites: Sequence[Site] = ()
    grids: Grids = field(default_factory=dict)

    @property
    def knobs(self) -> list[Knobs]:
        """Return the knobs of all parts."""
        return [knob for part in self.parts for knob in part.knobs]

    def tensors(self) -> dict[str, Tensor]:
        """Return what is learned by name, as it is kept on disk."""
        parts = enumerate(self.parts)
        return {f"{self.name}.{i}.{key}": t for i, part in parts for key, t in part.tensors().items()}


@dataclass
class Story:
    """What was learned: what is made of it, and how it went."""

    made: Made
    outcome: Outcome
    plain: float  # the measure of plain rounding
    seconds: float
    tensors: Mapping[str, Tensor]
    more: dict[str, float] = field(default_factory=dict)

    def facts(self) -> dict[str, float]:
        """Return what the record keeps of it."""
        o = self.outcome
        measures = {"plain": self.plain, "start": o.start, "best": o.best, "last": o.last}
        path = {"best_step": o.best_step, "steps": len(o.losses), "retries": o.retries, "degraded": float(o.degraded)}
        return {**measures, **path, "seconds": self.seconds, **self.more}


class Reconstruction(Descent):
    """The descent of the parts of one lesson on one block."""

    def __init__(self, plan: Plan, scene: Scene, lesson: Lesson) -> None:
        self.plan, self.scene, self.lesson, self.training = plan, scene, lesson, lesson.training
        self.candidate = Candidate(plan.view, lesson.sites)
        self.rng = generator(plan.seed, "inputs", scene.block)
        both = ((self.training.t1, scene.answers_float), (self.training.t2, scene.answers_quantized))
        self.targets = [(weight, stream) for weight, stream in both if weight]
        squares = [x.float().pow(2).mean() for _, stream in self.targets for x in stream]
        self.scale = float(torch.stack(squares).mean())
        self.train, self.held_out = self.training.split(sum(map(len, self.targets[0][1])))

    def made(self) -> Made:
        """Return what the parts make of their tensors now."""
        return reduce(or_, (part.make() for part in self.lesson.parts), NOTHING_MADE)

    def project(self) -> None:
        """Put every part's tensors back where they are allowed to be."""
        for part in self.lesson.parts:
            part.project()

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Tell the parts."""
        for part in self.lesson.parts:
            part.begin_epoch(epoch, epochs)

    def step(self, chosen: Sequence[int]) -> float:
        """Return the loss of the chosen sequences; gradients are added to the tensors."""
        drawn = self.rng.get_state()
        while True:
            micro = self.plan.micro.size(self.training.micro or len(chosen))
            try:
                return self._step(chosen, micro)
            except torch.OutOfMemoryError:
                if micro == 1:
                    raise
                self.plan.micro.halve(micro)
                self.rng.set_state(drawn)
                for tensor in tensors_of(self.lesson.knobs):
                    tensor.grad = None

    def _step(self, chosen: Sequence[int], micro: int) -> float:
        total = 0.0
        with torch.enable_grad():
            made = self.made()
            weights = self.candidate.weights(made, self.scene.block, self.lesson.grids)
            learned = {name: W for name, W in weights.items() if W.requires_grad}
            leaves = {name: W.detach().requires_grad_() for name, W in learned.items()}
            for some in (chosen[i : i + micro] for i in range(0, len(chosen), micro)):
                loss = self._loss(made, {**weights, **leaves}, some, self.training.student) * (len(some) / len(chosen))
                loss.backward(retain_graph=True)  # of what runs online, which the next micro-batch meets again
                total += float(loss.detach())
                del loss  # or its graph would be there beside that of the next
            pairs = [(W, leaf.grad) for name, W in learned.items() if (leaf := leaves[name]).grad is not None]
            if pairs:
                torch.autograd.backward([W for W, _ in pairs], [g for _, g in pairs])
        return total

    @torch.no_grad()
    def measure(self) -> float:
        """Return the loss of the sequences that are held out (of a mixed input X_q)."""
        return self._measured(self.made())

    @torch.no_grad()
    def plain(self) -> float:
        """Return what :meth:`measure` would be of plain rounding, with nothing learned."""
        return self._measured(NOTHING_MADE)

    def _measured(self, made: Made) -> float:
        weights = self.candidate.weights(made, self.scene.block, self.lesson.grids)
        student = "fp" if self.training.student == "fp" else "q"
        sums = [float(self._loss(made, weights, [i], student)) for i in self.held_out]
        return sum(sums) / len(sums)

    def _loss(self, made: Made, weights: Weights, chosen: Sequence[int], student: str) -> Tensor:
        """Return the loss of some sequences, by which input the block gets."""
        plan, scene, training = self.plan, self.scene, self.training
        x = self._chosen(scene.float if student == "fp" else scene.quantized, chosen)
        if student == "mix":
            x = self._mixed(x, self._chosen(scene.float, chosen))
        with quantizers(plan.view, plan.method, [scene.block] if training.quantize_inputs else [], made.clips.acts):
            answer = self.candidate.answer(made, scene.block, weights, x, scene.kwargs)
        losses = [
            weight * distance(training.loss, answer, self._chosen(stream, chosen), self.scale, training.skip_first)
            for weight, stream in self.targets
        ]
        return torch.stack(losses).sum()

    def _chosen(self, stream: Stream, chosen: Sequence[int]) -> Tensor:
        return half_to_float(take(stream, chosen).to(self.plan.view.model.device))

    def _mixed(self, q: Tensor, fp: Tensor) -> Tensor:
        """Return X_q with elements of X_fp, as QDrop has it."""
        return torch.where(torch.rand(q.shape, generator=self.rng).to(q.device) < self.training.mix, fp, q)


def reconstruct(plan: Plan, scene: Scene, lesson: Lesson) -> Story:
    """Learn the parts of a block together; return what is made of them. Nothing of the model is changed."""
    began, name, training = time.perf_counter(), lesson.name, lesson.training
    descent = Reconstruction(plan, scene, lesson)
    track = partial(plan.progress, f"learn {name}, block {scene.block}")
    raised = 1 + training.depth * scene.block / len(plan.view.blocks)
    course = training.course(descent.train, generator(plan.seed, name, scene.block), raised)
    if training.load:
        take_up(lesson, scene.block)
    plain = descent.plain() if lesson.grids else None  # what rounds by itself starts as plain rounding
    outcome = minimise(lesson.knobs, course, descent, track)
    if outcome.degraded:
        log.warning(
            "block %d: %s diverged at every rate tried; its best state (step %d) is kept", scene.block, name,
            outcome.best_step,
        )  # fmt: skip
    for tensor in tensors_of(lesson.knobs):
        tensor.requires_grad_(False)  # maps are kept, and must not go on learning
    with torch.no_grad():
        made = descent.made()
    better = training.floor == "rtn" and training.select == "best" and plain is not None and plain < outcome.best
    if better:
        log.info("block %d: plain rounding is better than what %s has learned, and kept", scene.block, name)
        made = NOTHING_MADE
    measured = outcome.start if plain is None else plain
    more = {"kept_plain": float(better)}
    return Story(made, outcome, measured, time.perf_counter() - began, lesson.tensors(), more)


def take_up(lesson: Lesson, block: int) -> None:
    """Let the parts start where those of another run have ended (``training.load``).

    Raises: UserError if that run has learned something else.
    """
    kept = read(Path(lesson.training.load) / f"{block:05d}.safetensors").tensors
    for name, tensor in lesson.tensors().items():
        if name not in kept or kept[name].shape != tensor.shape:
            got = f"{lesson.training.load} holds no {name} of shape {list(tensor.shape)} for block {block}"
            raise UserError(got, "a run of this recipe on this model", "training.load='' of that member")
        tensor.copy_(kept[name])


def half_to_float(x: Tensor) -> Tensor:
    """Return float16 as float32: gradients of means over many elements are too small for it."""
    return x.float() if x.dtype == torch.float16 else x

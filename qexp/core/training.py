"""How a member learns: its stream and targets, steps and rates over time, and which state is kept.

One set of settings for every method that learns, block by block or end to end; values are in the members' YAML.
Source: methods/block_reconstruction.md sections 5 and 9.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from qexp.core.errors import UserError, choose

LEAST_HELD_OUT = 4  # sequences
BOUNDS = dict.fromkeys(("mix", "final", "warmup", "held_out"), 1.0) | dict.fromkeys(
    ("t1", "t2", "epochs", "steps", "batch", "micro", "decay", "depth", "clip_norm", "measure_every", "patience",
     "min_gain"), math.inf,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Training:
    """Settings of learning. A block's input X_q comes behind quantized blocks, X_fp from the float model.

    ``student``: the input of the quantized block: q, fp, or mix (each element X_fp with probability ``mix``).
    ``t1``, ``t2``: weights of the errors against the float block's answer to X_fp and to X_q.
    ``loss``: mse; nmse (mse / mean square of the target); mean_var and mean_std_sq compare channels' means and spreads
    (Norm Tweaking); ``skip_first``: without the first token of each sequence.
    ``epochs`` over the training sequences, or ``steps`` if not 0, each of ``batch`` sequences in micro-batches of
    ``micro`` (0: all at once); ``shuffle`` draws a new order for every epoch.
    ``optimizer``: adam, amsgrad, adamw (their ``betas``), sign_sgd; ``decay`` is the weight decay; ``schedule``
    constant, cosine or linear down to ``final`` times the rate after a ``warmup`` share of the steps; ``depth`` raises
    the rate of block l of L to 1 + depth l / L; ``clip_norm`` limits the norm of all gradients, 0 not.
    ``quantize_inputs``: with the recipe's activation and key/value quantizers on.
    ``held_out``: share of the sequences for choosing only; ``select`` best of them or last; ``floor``: rtn (plain
    rounding is a candidate, too) or none; measured every ``measure_every`` steps (0: every epoch); ``patience`` of so
    many measurements without a gain of ``min_gain``, 0 for endless. ``load``: the folder ``learned`` of another run, to
    start where it ended.
    """

    student: str
    mix: float
    t1: float
    t2: float
    loss: str
    skip_first: bool
    epochs: int
    steps: int
    batch: int
    micro: int
    shuffle: bool
    optimizer: str
    betas: tuple[float, float]
    decay: float
    schedule: str
    final: float
    warmup: float
    depth: float
    clip_norm: float
    quantize_inputs: bool
    held_out: float
    select: str
    floor: str
    measure_every: int
    patience: int
    min_gain: float
    load: str

    def check(self, key: str) -> None:
        """Raise UserError for settings that mean nothing; ``key`` is where they are in the config."""
        for name, known in (
            ("student", ("q", "fp", "mix")),
            ("loss", ("mse", "nmse", "mean_var", "mean_std_sq")),
            ("optimizer", ("adam", "amsgrad", "adamw", "sign_sgd")),
            ("schedule", ("constant", "cosine", "linear")),
            ("select", ("best", "last")),
            ("floor", ("rtn", "none")),
        ):
            choose(f"{key}.{name}", getattr(self, name), known, f"{key}.{name}")
        if not self.t1 + self.t2:
            raise UserError(f"{key}.t1=0 and t2=0", "a target to learn", f"{key}.t1=1")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            got = f"{key}.betas={list(self.betas)}"
            raise UserError(got, "two numbers from 0 to below 1", f"{key}.betas=[0.9,0.999]")
        for name, most in BOUNDS.items():
            value, least = getattr(self, name), int(name == "batch")
            if not least <= value <= most:
                need = f"a value from {least} to {most:g}" if math.isfinite(most) else f"at least {least}"
                raise UserError(f"{key}.{name}={value}", need, f"{key}.{name}={max(least, min(value, most)):g}")

    def split(self, sequences: int) -> tuple[list[int], list[int]]:
        """Return which sequences train and which only measure: the last, some at least, never more than half."""
        if not self.held_out:
            return list(range(sequences)), list(range(min(sequences, 16)))
        count = min(max(LEAST_HELD_OUT, round(self.held_out * sequences)), sequences // 2)
        cut = sequences - count
        return (list(range(cut)), list(range(cut, sequences))) if count else (list(range(sequences)),) * 2

    def course(self, chosen: list[int], rng: torch.Generator, raised: float = 1.0) -> Course:
        """Return the sequences of every step; a batch may reach into the next epoch."""
        batch = min(self.batch, len(chosen))
        each = math.ceil(len(chosen) / batch)
        count = self.steps or self.epochs * each
        order: list[int] = []
        while len(order) < count * batch:
            turn = torch.randperm(len(chosen), generator=rng).tolist() if self.shuffle else range(len(chosen))
            order += [chosen[i] for i in turn]
        return Course(self, [order[i * batch : (i + 1) * batch] for i in range(count)], each, raised)

    def factor(self, step: int, count: int) -> float:
        """Return what the rates are multiplied by at a step of ``count``."""
        warm = self.warmup * count
        if step < warm:
            return (step + 1) / (warm + 1)
        part = (step - warm) / max(1.0, count - warm)
        if self.schedule == "cosine":
            return self.final + (1 - self.final) * (1 + math.cos(math.pi * part)) / 2
        return 1.0 if self.schedule == "constant" else self.final + (1 - self.final) * (1 - part)


@dataclass(frozen=True)
class Course:
    """The sequences of every step, how many steps are an epoch, and what all rates are ``raised`` by."""

    training: Training
    batches: list[list[int]]
    each: int
    raised: float

"""What is measured of a model, and under which convention: perplexity, divergence from the float model, accuracy.

The order of a run: ``check`` before anything heavy, ``sets`` (windows of tokens) and ``baseline`` on the float model,
``run`` on the quantized one. Keys of the metrics are those of the record (design.md section 3).
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qexp.core.errors import UserError, choose
from qexp.data.calibration import crop_documents, tokenize
from qexp.data.corpora import Source
from qexp.data.generated import Progress, Request, first_token, generated, max_positions, silent
from qexp.eval.baseline import Baseline, float_accuracies, float_windows, namer
from qexp.eval.divergence import Scores, Teacher, frozen, score_windows
from qexp.eval.perplexity import Loop, device_of, interval, perplexity, reader, windows
from qexp.eval.speed import Contender, measure, workload
from qexp.eval.tasks import Plan, accuracies

log = logging.getLogger(__name__)

SETS = ("generated", "wikitext2", "c4", "ptb", "local")
BOS = ("once", "every_window", "none")
PAPER_TOKENS = 2048
C4_DOCUMENTS, C4_WINDOWS = 1100, 256  # of GPTQ's two C4 protocols
VERSION = 1


@dataclass(frozen=True)
class Results:
    """Flat metrics under the record's keys, and the window losses (``<set>``, float: ``fp/<set>``) for pairing."""

    metrics: dict[str, float | list[float]]
    window_losses: dict[str, list[float]]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A set's mapping has ``path`` and ``bos`` (c4 and ptb ``variant``); ``limit``: windows a set, examples a task."""

    perplexity: Sequence[str]
    generated: Mapping[str, Any]
    local: Mapping[str, Any]
    wikitext2: Mapping[str, Any]
    c4: Mapping[str, Any]
    ptb: Mapping[str, Any]
    window_tokens: int | None
    tasks: Sequence[str]
    task_path: str | None
    divergence: bool
    speed: bool
    limit: int | None
    batch_windows: int
    seed: int

    def check(self) -> None:
        """Raise UserError, before anything heavy, for settings that cannot work."""
        for key in ("perplexity", "tasks"):
            if isinstance(value := getattr(self, key), str):
                raise UserError(f"eval.{key}={value}", "a list", f"eval.{key}=[{value}]")
        for key in ("limit", "batch_windows", "window_tokens"):
            least = 2 if key == "window_tokens" else 1
            if (value := getattr(self, key)) is not None and value < least:
                raise UserError(f"eval.{key}={value}", f"at least {least}", f"eval.{key}={least}")
        for name in self.perplexity:
            self._check_set(name)
        self._plan().check()

    def identity(self) -> dict[str, Any]:
        """Return what determines the numbers besides the model: settings, and content in place of paths."""
        sets = {}
        for name in self.perplexity:
            settings = {key: value for key, value in self._settings(name).items() if key != "path"}
            sets[name] = settings | ({} if name == "generated" else {"data": self._source(name).identity()})
        return {
            "sets": sets,
            "window_tokens": self.window_tokens,
            "limit": self.limit,
            "divergence": self.divergence,
            "batch_windows": self.batch_windows,
            "seed": self.seed,
            "tasks": self._plan().identity(),
            "version": VERSION,
        } | ({"speed": True} if self.speed else {})  # absent: fingerprints of runs without it stay as they were

    def sets(
        self, model: Any, tokenizer: Any, cache: Path, model_identity: str, progress: Progress = silent
    ) -> dict[str, Tensor]:
        """Return int64 [W, S] per set, at most ``limit`` windows each; ``model``, the float one, generates text."""
        size = self._window(model)
        made = {}
        for name in self.perplexity:
            if name == "generated":
                count = self.limit or int(self._settings(name)["windows"])
                request = Request(samples=count, tokens=size, seed=self.seed, stream="evaluation", bos=True)
                made[name] = generated(model, tokenizer, request, cache, model_identity, progress)
            else:
                made[name] = self._cut(name, tokenizer, size)[: self.limit]
            log.info("evaluation text %s: %d windows of %d tokens", name, *made[name].shape)
        return made

    def baseline(
        self, model: Any, tokenizer: Any, sets: Mapping[str, Tensor], folder: Path, progress: Progress = silent
    ) -> Baseline:
        """Measure the float model, or read what it gave before from ``folder``; call it before quantization."""
        losses, teachers, float_accuracy = {}, {}, {}
        if sets:
            source = reader(model, next(iter(sets.values()))[:1])
            kept = frozen(source) if self.divergence else source
            loop, name_of = self._loop(model, progress), namer(folder, model, ".safetensors")
        for name, windows_WS in sets.items():
            losses[name], file = float_windows(source, windows_WS, loop, name_of, keep=self.divergence)
            if self.divergence:
                teachers[name] = Teacher(kept, file)
        if self.tasks:
            file = namer(folder, model, ".json")(self._plan().identity())
            float_accuracy = float_accuracies(file, lambda: accuracies(model, tokenizer, self._plan()))
        return Baseline(losses, float_accuracy, teachers)

    def run(
        self, model: Any, tokenizer: Any, sets: Mapping[str, Tensor], baseline: Baseline, progress: Progress = silent
    ) -> Results:
        """Measure the quantized model beside the float one."""
        metrics: dict[str, float | list[float]] = {}
        window_losses: dict[str, list[float]] = {}
        source = reader(model, next(iter(sets.values()))[:1]) if sets else None
        for name, windows_WS in sets.items():
            assert source is not None
            scores = score_windows(source, windows_WS, baseline.teachers.get(name), self._loop(model, progress), name)
            metrics |= self._metrics(name, scores, baseline.losses[name])
            window_losses |= {name: scores.losses, f"fp/{name}": baseline.losses[name]}
        if self.tasks:
            metrics |= accuracies(model, tokenizer, self._plan())
            metrics |= {f"fp/{key}": value for key, value in baseline.accuracies.items()}
        return Results(metrics, window_losses)

    def speeds(self, packed: Contender, plain: Contender, progress: Progress = silent) -> dict[str, float]:
        """Return the speed/... metrics of a packed model and, as fp/speed/..., of the float one beside it."""
        work = workload(packed.model)
        found = measure({"": packed, "fp/": plain}, work, progress)
        sizes = {"prompt_tokens": work.prompt.shape[1], "decoded_tokens": work.decode_tokens}
        figures = {f"{who}speed/{key}": value for who, values in found.items() for key, value in values.items()}
        return figures | {f"speed/{key}": float(value) for key, value in sizes.items()}

    def _metrics(self, name: str, scores: Scores, float_losses: list[float]) -> dict[str, float | list[float]]:
        """Return the record's metrics of one set."""
        value = perplexity(scores.losses)
        if not math.isfinite(value):
            log.warning("perplexity/%s is %s: the quantized model is broken", name, value)
        found: dict[str, float | list[float]] = {
            f"perplexity/{name}": value,
            f"perplexity/{name}/ci95": interval(scores.losses, self.seed),
            f"fp/perplexity/{name}": perplexity(float_losses),
            f"fp/perplexity/{name}/ci95": interval(float_losses, self.seed),
        }
        if scores.kl:
            found[f"divergence/kl/{name}"] = math.fsum(scores.kl) / len(scores.kl)
            found[f"divergence/top1/{name}"] = math.fsum(scores.top1) / len(scores.top1)
        return found

    def _check_set(self, name: str) -> None:
        """Raise UserError if the set is unknown, or its convention or its text is."""
        choose("eval.perplexity", name, SETS, "eval.perplexity")
        settings = self._settings(name)
        if name == "generated":
            return
        choose(f"eval.{name}.bos", settings["bos"], BOS, f"eval.{name}.bos")
        if "variant" in settings:
            choose(f"eval.{name}.variant", settings["variant"], ("new", "legacy"), f"eval.{name}.variant")
        self._source(name).check()

    def _cut(self, name: str, tokenizer: Any, size: int) -> Tensor:
        """Return all windows [W, size] of a named set, by the protocol of methods/evaluation.md section 1."""
        settings, source = self._settings(name), self._source(name)
        every = first_token(tokenizer) if settings["bos"] == "every_window" else None
        special, legacy = settings["bos"] == "once", settings.get("variant") == "legacy"
        if name == "c4" and legacy:
            # the papers' seed is 0, whatever ours
            return crop_documents(source.documents(), tokenizer, C4_WINDOWS, size, random.Random(0))
        if name == "c4":
            text = " ".join(source.documents()[:C4_DOCUMENTS])
            return windows(tokenize(tokenizer, text, special=special), size, every, name)[:C4_WINDOWS]
        text = source.text(" " if name == "ptb" and not legacy else "\n\n")
        return windows(tokenize(tokenizer, text, special=special), size, every, name)

    def _source(self, name: str) -> Source:
        settings = self._settings(name)
        validation = name == "c4" or settings.get("variant") == "legacy"
        return Source(
            corpus=name, split="validation" if validation else "test", path=settings["path"], key=f"eval.{name}.path"
        )

    def _settings(self, name: str) -> dict[str, Any]:
        return dict(getattr(self, name))

    def _plan(self) -> Plan:
        return Plan(tasks=tuple(self.tasks), path=self.task_path, limit=self.limit, batch=4 * self.batch_windows)

    def _loop(self, model: Any, progress: Progress) -> Loop:
        return Loop(self.batch_windows, device_of(model), progress)

    def _window(self, model: Any) -> int:
        """Return the window length: the papers' 2048 or the model's maximum, unless set."""
        limit = max_positions(model) or PAPER_TOKENS
        if self.window_tokens is not None and self.window_tokens > limit and max_positions(model):
            raise UserError(
                f"eval.window_tokens={self.window_tokens} exceeds the model's {limit} positions",
                f"at most {limit}",
                f"eval.window_tokens={limit}",
            )
        return self.window_tokens or min(PAPER_TOKENS, limit)

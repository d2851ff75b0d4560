"""The space of a search: a short YAML file of config keys, each with the values it may take.

    method: [gptq, awq]                                    # a list: one of these
    bits.weight: {low: 2, high: 4}                         # whole numbers where both ends are
    bits.group: [64, 128]
    method.solver.damp_fraction: {low: 0.001, high: 0.1, log: true, when: {method: gptq}}
    method/transform: {choices: [[], [fold_norm, hadamard]], when: {method: [gptq, rtn]}}
    eval.limit: 20                                         # one value: the same in every trial

What is drawn is the text of ordinary overrides: a trial is what the same words give on the command line.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import yaml

from qexp.core.errors import UserError, nearest

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

    from optuna.trial import Trial

Drawn: TypeAlias = dict[str, str]
"""Config key -> value, as texts of the command line; in the order of the file."""

MOST_PROBES = 120  # a config composes in about 80 ms
_WORDS = ("low", "high", "log", "step", "choices", "when")


@dataclass(frozen=True)
class Choice:
    """One of some values."""

    key: str
    options: tuple[str, ...]
    when: Mapping[str, tuple[str, ...]]

    def draw(self, trial: Trial) -> str:
        """Return the option that the sampler wants."""
        return str(trial.suggest_categorical(self.key, self.options))

    @property
    def ends(self) -> tuple[str, ...]:
        """Return what must be tried to know that every value can be: all."""
        return self.options


@dataclass(frozen=True)
class Range:
    """A number between two ends, both included."""

    key: str
    low: float
    high: float
    log: bool
    step: float | None
    when: Mapping[str, tuple[str, ...]]

    def draw(self, trial: Trial) -> str:
        """Return the number that the sampler wants, to six digits: short enough to be pasted."""
        if self.whole:
            step = 1 if self.step is None else int(self.step)
            return str(trial.suggest_int(self.key, int(self.low), int(self.high), step=step, log=self.log))
        return text_of(trial.suggest_float(self.key, self.low, self.high, step=self.step, log=self.log))

    @property
    def whole(self) -> bool:
        """Whether the numbers are whole: both ends and the step are."""
        return all(isinstance(number, int) for number in (self.low, self.high, self.step or 1))

    @property
    def ends(self) -> tuple[str, ...]:
        """Return the two ends."""
        return (text_of(self.low), text_of(self.high))


@dataclass(frozen=True)
class Space:
    """Parameters in the order of the file; ``when`` of each names parameters before it."""

    name: str
    parameters: tuple[Choice | Range, ...]

    def draw(self, trial: Trial) -> Drawn:
        """Return what ``trial`` sets, parameters whose ``when`` does not hold left out."""
        drawn: Drawn = {}
        for one in self.parameters:
            if _holds(one.when, drawn):
                drawn[one.key] = one.draw(trial)
        return drawn

    @property
    def varying(self) -> tuple[str, ...]:
        """Return the keys that can take more than one value."""
        return tuple(one.key for one in self.parameters if len(set(one.ends)) > 1)

    def probes(self) -> Iterator[Drawn]:
        """Yield settings in which every end occurs under every combination of config groups.

        A group (``method``, ``method/solver``, ``bits``: no dot) decides which keys there are; other keys do not.
        Of more than ``MOST_PROBES`` a sample is yielded.
        """
        groups = [one.ends if "." not in one.key else ("",) for one in self.parameters]
        turns = range(max(len(one.ends) for one in self.parameters))
        total = math.prod(map(len, groups)) * len(turns)
        picked = range(total) if total <= MOST_PROBES else random.Random(0).sample(range(total), MOST_PROBES)
        seen = {tuple(self._probe(groups, number, len(turns)).items()) for number in picked}
        yield from map(dict, sorted(seen))

    def _probe(self, groups: Sequence[Sequence[str]], number: int, turns: int) -> Drawn:
        """Return combination ``number`` of the product of the groups and the turns."""
        number, turn = divmod(number, turns)
        drawn: Drawn = {}
        for one, options in zip(self.parameters, groups, strict=True):
            number, place = divmod(number, len(options))
            if _holds(one.when, drawn):
                drawn[one.key] = options[place] or one.ends[turn % len(one.ends)]
        return drawn


def read(name: str) -> Space:
    """Return the space of a file, or of a name below sweeps/search/. Raises: UserError."""
    saved = files("qexp.sweeps").joinpath("search")
    file: Path | Traversable = Path(name)
    if not file.is_file():
        file = saved.joinpath(f"{name}.yaml")
    if not file.is_file():
        known = [path.name.removesuffix(".yaml") for path in saved.iterdir() if path.name.endswith(".yaml")]
        raise UserError(f"space={name} is no file and no saved space", nearest(name, known), "space=<file.yaml>")
    try:
        node = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"space={name} is not YAML: {' '.join(str(error).split())}") from error
    return parse(Path(file.name).stem, node)


def parse(name: str, node: Any) -> Space:
    """Return the space of a YAML's content. Raises: UserError that names the key."""
    if not isinstance(node, Mapping) or not node:
        raise UserError(f"space {name} is {type(node).__name__}", "a mapping of config keys", "method: [gptq, awq]")
    known: dict[str, Choice | Range] = {}
    for key, value in node.items():
        known[key] = _parameter(str(key), value, known)
    return Space(name, tuple(known.values()))


def text_of(value: Any) -> str:
    """Return a value as the command line has it: null, true, [a,b], {k: 1}; numbers to six digits."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return f"[{','.join(map(text_of, value))}]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}: {text_of(item)}" for key, item in value.items()) + "}"
    return str(value)


def _parameter(key: str, value: Any, before: Mapping[str, Choice | Range]) -> Choice | Range:
    if not isinstance(value, Mapping):
        return _choice(key, value if isinstance(value, list) else [value], {})
    for word in value.keys() - set(_WORDS):
        raise UserError(f"{key} has {word}", f"of {', '.join(_WORDS)}", f"{key}: {{low: 1, high: 2}}, or a list")
    when = _conditions(key, value.get("when"), before)
    if "choices" in value:
        return _choice(key, value["choices"], when)
    return _range(key, value, when)


def _choice(key: str, options: Any, when: Mapping[str, tuple[str, ...]]) -> Choice:
    if not isinstance(options, list) or not options:
        raise UserError(f"{key} has no choices", "a list of values", f"{key}: [1, 2]")
    texts = tuple(map(text_of, options))
    if len(set(texts)) < len(texts):
        raise UserError(f"{key} has a choice twice: {', '.join(texts)}", "each value once")
    return Choice(key, texts, when)


def _range(key: str, value: Mapping[str, Any], when: Mapping[str, tuple[str, ...]]) -> Range:
    example = f"{key}: {{low: 1, high: 2}}"
    if not {"low", "high"} <= value.keys():
        raise UserError(f"{key} has neither choices nor both of low and high", "these", example)
    low, high = _number(key, value["low"]), _number(key, value["high"])
    step = None if value.get("step") is None else _number(key, value["step"])
    log = value.get("log", False)
    if not isinstance(log, bool):
        raise UserError(f"{key} has log: {log}", "true or false", f"{key}: {{..., log: true}}")
    if low >= high:
        raise UserError(f"{key} goes from {low} to {high}", "low below high", example)
    if log and (low <= 0 or step is not None):
        raise UserError(f"{key} is logarithmic from {low}, step {step}", "low above 0 and no step", example)
    if step is not None and step <= 0:
        raise UserError(f"{key} has step {step}", "a step above 0", example)
    return Range(key, low, high, log, step, when)


def _number(key: str, value: Any) -> float:
    """Return a number; YAML reads 1e-3, without a dot, as a text."""
    try:
        return value if isinstance(value, int | float) and not isinstance(value, bool) else float(str(value))
    except ValueError as error:
        raise UserError(f"{key} has {value!r}", "numbers for low, high and step", f"{key}: [a, b]") from error


def _conditions(key: str, when: Any, before: Mapping[str, Choice | Range]) -> dict[str, tuple[str, ...]]:
    """Return ``when`` with lists of texts. Raises: UserError unless it names choices of parameters above."""
    example = f"{key}: {{..., when: {{method: [gptq]}}}}"
    if when is not None and not isinstance(when, Mapping):
        raise UserError(f"{key} has when: {when}", "a mapping", example)
    found: dict[str, tuple[str, ...]] = {}
    for other, values in (when or {}).items():
        chosen = before.get(other)
        if not isinstance(chosen, Choice):
            raise UserError(f"{key} depends on {other}", "a list of choices above it in the file", example)
        found[other] = tuple(map(text_of, values if isinstance(values, list) else [values]))
        for value in set(found[other]) - set(chosen.options):
            raise UserError(f"{key} depends on {other}={value}", f"one of {', '.join(chosen.options)}", example)
    return found


def _holds(when: Mapping[str, tuple[str, ...]], drawn: Drawn) -> bool:
    return all(drawn.get(key) in values for key, values in when.items())

"""What a search is: space, fixed overrides, objectives, study. Made and checked once, then handed to the workers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from filelock import FileLock

from qexp import compose, search_space
from qexp.core.errors import UserError, nearest
from qexp.explain import HYDRA_MISTAKES, check_keys, explain
from qexp.schema import bits_name
from qexp.search_desk import Desk
from qexp.search_space import Drawn, Space

if TYPE_CHECKING:
    from optuna import Study
    from optuna.storages import BaseStorage

DIRECTIONS: dict[str, Literal["minimize", "maximize"]] = {"min": "minimize", "max": "maximize"}
SIZES = ("bits_per_weight", "bytes", "kv_bytes_per_token")
COSTS = ("quantize_seconds", "evaluate_seconds", "peak_rss_bytes", "peak_device_bytes")
SPEEDS = ("prefill_tokens_per_s", "decode_tokens_per_s")


@dataclass(frozen=True)
class Objective:
    """A metric of the record, and which way is better."""

    key: str
    direction: str  # min | max


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything a worker needs; plain data, so that it travels as JSON. ``folder`` holds the runs and the results."""

    space: str
    fixed: tuple[str, ...]
    objectives: tuple[str, ...]
    study: str
    folder: str
    storage: str
    trials: int
    sampler: str
    seed: int

    def to_json(self) -> str:
        """Return the plan as one line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Return the plan that :meth:`to_json` wrote."""
        plain: dict[str, Any] = json.loads(text)
        lists = {key: tuple(value) for key, value in plain.items() if isinstance(value, list)}
        return cls(**{**plain, **lists})

    @property
    def targets(self) -> list[Objective]:
        """Return the objectives, in order."""
        return [objective(text) for text in self.objectives]

    @property
    def home(self) -> Path:
        """Return the folder of the study's own files: storage, locks, logs."""
        return Path(self.folder) / ".search" / self.study

    def overrides(self, drawn: Drawn) -> list[str]:
        """Return the command line of a trial. Bits set one by one get the name that they have in every other run."""
        words = [*self.fixed, f"output_dir={self.folder}", *(f"{key}={value}" for key, value in drawn.items())]
        if any(word.startswith("bits.") for word in words) and not any(word.startswith("bits.name=") for word in words):
            bits = _composed(words)["bits"]
            words.append(f"bits.name={bits_name(bits['weight'], bits['act'], bits['kv'], bits['group'])}")
        return words

    def desk(self) -> Desk:
        """Return the desk of the study, which is made where there is none. Raises: UserError for one that differs."""
        space = search_space.read(self.space)
        try:
            self.home.mkdir(parents=True, exist_ok=True)
            with FileLock(self.home / "desk.lock"):
                pass
        except (NotImplementedError, OSError) as error:
            need = "a folder that can be written, on a file system with locks"
            raise UserError(f"{self.home} cannot be used: {error}", need, "output_dir=<folder>") from error
        return Desk(self._study(space), self.home, space, self.trials, self.sampler, self.seed)

    def _study(self, space: Space) -> Study:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(
            storage=storage_of(self.storage),
            study_name=self.study,
            directions=[DIRECTIONS[one.direction] for one in self.targets],
            load_if_exists=True,
        )
        same = {"space": repr(space.parameters), "fixed": list(self.fixed), "objectives": list(self.objectives)}
        for key, value in same.items():
            there = study.user_attrs.get(key, value)
            if there != value:
                raise UserError(f"study {self.study} was begun with another {key}: {there}", "another --study")
            if key not in study.user_attrs:
                study.set_user_attr(key, value)
        return study


def objective(text: str) -> Objective:
    """Return what ``divergence/kl/generated:min`` means. Raises: UserError."""
    key, _, direction = text.rpartition(":")
    if not key or direction not in DIRECTIONS:
        raise UserError(f"--objectives {text}", "<metric>:min or <metric>:max", "--objectives size/bytes:min")
    return Objective(key, direction)


def usual_objectives(fixed: Sequence[str]) -> tuple[str, ...]:
    """Return KL (the gap where KL is not measured) on the first set, over stored bits. Raises: UserError."""
    measured = _composed(fixed)["eval"]
    if not measured["perplexity"]:
        raise UserError("nothing is evaluated", "objectives", "--objectives <metric>:min, or eval.perplexity=[...]")
    kind = "divergence/kl" if measured["divergence"] else "gap"
    return (f"{kind}/{measured['perplexity'][0]}:min", "size/bits_per_weight:min")


def check(plan: Plan, space: Space) -> None:
    """Compose and check every end of the space, and that each run measures the objectives. Raises: UserError."""
    from qexp.core.build import build
    from qexp.engine.checks import check_method
    from qexp.launch import Setup

    _composed(plan.fixed)  # alone first: what is wrong there is no fault of the space
    for drawn in space.probes():
        try:
            config = _composed(plan.overrides(drawn))
        except UserError as error:
            hint = "; what only some choices have: {..., when: {method: [gptq]}}"
            raise UserError(f"space {space.name}: {error}{hint if 'is no config key' in str(error) else ''}") from error
        check_keys(config)
        setup = Setup(**{key: build(config[key], key) for key in Setup.__annotations__})
        setup.check()
        check_method(setup.method, calibrated=setup.calibration.source != "none")
        _check_objectives(plan.targets, config)


def _check_objectives(targets: Sequence[Objective], config: Mapping[str, Any]) -> None:
    known = metrics_of(config)
    for one in targets:
        task = one.key.removeprefix("accuracy/").removesuffix("/norm")
        if one.key.startswith("accuracy/") and any(task.startswith(name) for name in config["eval"]["tasks"]):
            continue  # lm-eval decides which tasks a group has
        if one.key not in known:
            raise UserError(f"objective {one.key} is not measured", nearest(one.key, known), "eval.* to measure more")


def metrics_of(config: Mapping[str, Any]) -> list[str]:
    """Return the keys that a run of ``config`` will have measured, as far as they are known before it."""
    measured, sets = config["eval"], list(config["eval"]["perplexity"])
    kinds = ["perplexity", "gap", *(["divergence/kl", "divergence/top1"] if measured["divergence"] else [])]
    found = [f"{kind}/{name}" for kind in kinds for name in sets]
    found += [f"accuracy/{task}" for task in measured["tasks"]] + [f"size/{key}" for key in SIZES]
    return found + [f"speed/{key}" for key in SPEEDS if measured["speed"]] + [f"cost/{key}" for key in COSTS]


def storage_of(where: str) -> BaseStorage:
    """Return Optuna's storage: a URL is a database, anything else the file of a journal."""
    from optuna.storages import JournalStorage, get_storage
    from optuna.storages.journal import JournalFileBackend

    try:
        if "://" in where:
            return get_storage(where)
        Path(where).parent.mkdir(parents=True, exist_ok=True)
        return JournalStorage(JournalFileBackend(where))
    except Exception as error:  # of the file system, of the journal, of any database driver
        told = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"--storage {where}: {told}", "a journal file or a database URL") from error


def _composed(words: Sequence[str]) -> dict[str, Any]:
    try:
        return compose.composed(words)
    except (*HYDRA_MISTAKES, ValueError) as error:  # Hydra's own of method=null is a ValueError
        told = explain(error, words)
        raise UserError(f"{told} (in: qexp {' '.join(words)})") from error

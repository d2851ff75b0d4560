"""Zero-shot accuracy through lm-eval, on the model in memory.

A task is a name of lm-eval's own list (its data come from the hub), a name of a YAML in the folder ``task_path``, the
stem of a .jsonl file of minimal pairs (``sentence_good``, ``sentence_bad``: BLiMP) at ``task_path``, or the embedded
``qexp_grammar``. For the last two a task is written to a temporary folder; the right answer alternates between first
and second place there, since lm-eval's argmax breaks ties towards the first: a model that answers nan gets 1/2.
Source: methods/evaluation.md section 3 (acc, acc_norm, no chat template, BOS by the tokenizer's default).
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import hashlib
import io
import json
import logging
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qexp.core.errors import UserError
from qexp.core.hub import need_hub
from qexp.data.generated import max_positions
from qexp.eval.grammar import VERSION, pairs

log = logging.getLogger(__name__)

GRAMMAR = "qexp_grammar"
FEWSHOT_SEED = 1234  # lm-eval's own, for tasks that define examples
CHATTER = ("lm_eval", "datasets", "evaluate", "transformers", "httpx", "huggingface_hub")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which tasks, where their files are, and how many examples of each at how many a batch."""

    tasks: tuple[str, ...]
    path: str | None
    limit: int | None
    batch: int

    def check(self) -> None:
        """Raise UserError for a wrong path, an unknown task, or a hub task when the hub does not answer."""
        if self.path is not None and not Path(self.path).expanduser().exists():
            raise UserError(f"eval.task_path={self.path} does not exist", "a folder or .jsonl", "eval.task_path=<path>")
        local = sorted({GRAMMAR, *self.pair_files(), *self._yaml_names()})
        if self.path is not None and not self.tasks:
            raise UserError("eval.task_path without eval.tasks", f"names: {', '.join(local)}", "eval.tasks=[<names>]")
        hub = [name for name in self.tasks if name not in local]
        if hub:  # asked before the index is built, which takes seconds
            here = f"eval.tasks=[<of {', '.join(local)}>] or eval.task_path=<folder>"
            need_hub(f"the data of task {hub[0]!r} would come from the hub", here)
        for name in hub:
            _check_known(name, [*hub_manager().all_tasks, *local])

    def identity(self) -> dict[str, Any]:
        """Return what determines the accuracies besides the model: names, limit, the content of local files.

        Data that a YAML of ``path`` refers to are outside: give such a task a new name when they change.
        """
        files = [file for file in self._files() if file.suffix == ".yaml" or file.stem in self.tasks]
        content = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files if self.tasks}
        settings = {"tasks": list(self.tasks), "limit": self.limit, "batch": self.batch}
        return settings | {"grammar": VERSION, "files": content}

    def pair_files(self) -> dict[str, Path]:
        """Return the files of minimal pairs by task name."""
        return {file.stem: file for file in self._files() if file.suffix == ".jsonl"}

    def yaml_folder(self) -> Path | None:
        """Return ``path`` if it is a folder with lm-eval tasks."""
        return Path(str(self.path)).expanduser() if any(f.suffix == ".yaml" for f in self._files()) else None

    def _files(self) -> list[Path]:
        root = Path(self.path).expanduser() if self.path is not None else None
        if root is None or root.is_file():
            return [root] if root else []
        return sorted(file for file in root.iterdir() if file.suffix in {".jsonl", ".yaml"})

    def _yaml_names(self) -> list[str]:
        folder = self.yaml_folder()
        return list(_manager(folder).all_tasks) if folder else []


def _check_known(name: str, known: Sequence[str]) -> None:
    """Raise UserError with the nearest names unless ``name`` is known."""
    if name not in known:
        near = difflib.get_close_matches(name, known, n=5, cutoff=0.4)
        need = f"an lm-eval task, {', '.join(near)}, say" if near else "an lm-eval task"
        raise UserError(f"eval.tasks has {name!r}", need, "eval.tasks=[<names>] or eval.task_path=<folder>")


def accuracies(model: Any, tokenizer: Any, plan: Plan) -> dict[str, float]:
    """Return ``accuracy/<task>``, ``accuracy/<task>/stderr`` and, where defined, ``accuracy/<task>/norm``."""
    metrics: dict[str, float] = {}
    log.info("tasks %s (%s)", ", ".join(plan.tasks), f"{plan.limit} examples each" if plan.limit else "all examples")
    with (
        _quiet(),
        contextlib.redirect_stderr(io.StringIO()),
        tempfile.TemporaryDirectory(prefix="qexp-tasks-") as folder,
    ):
        _write_pairs(plan, Path(folder))
        local = _manager(Path(folder), *filter(None, [plan.yaml_folder()]))
        here = [name for name in plan.tasks if name in local.all_tasks]
        there = [name for name in plan.tasks if name not in here]
        for names, manager in ((here, local), (there, hub_manager() if there else None)):
            if names:
                metrics |= _evaluate(model, tokenizer, names, manager, plan)
    return metrics


def _evaluate(model: Any, tokenizer: Any, names: list[str], manager: Any, plan: Plan) -> dict[str, float]:
    """Run one task manager's tasks. lm-eval may give the tokenizer a padding token: it gets a copy."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(
        pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=plan.batch, max_length=max_positions(model)
    )
    try:
        loaded = manager.load(names)
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
        answer = evaluate(lm, loaded, limit=plan.limit, bootstrap_iters=0, log_samples=False)
    except ConnectionError as error:
        raise UserError(f"tasks {', '.join(names)}: {error}", "their data", f"eval.tasks=[{GRAMMAR}]") from error
    return summarise(answer["results"], answer["n-samples"])


def summarise(results: Mapping[str, Mapping[str, Any]], counts: Mapping[str, Mapping[str, int]]) -> dict[str, float]:
    """Turn lm-eval's results into our keys; the standard error is that of a mean of zeros and ones, as lm-eval's."""
    metrics: dict[str, float] = {}
    for task, values in results.items():
        if "acc,none" not in values:
            if task in counts:
                log.warning("task %s defines no acc; it is left out", task)
            continue
        metrics[f"accuracy/{task}"] = accuracy = float(values["acc,none"])
        if "acc_norm,none" in values:
            metrics[f"accuracy/{task}/norm"] = float(values["acc_norm,none"])
        if (count := counts.get(task, {}).get("effective", 0)) > 1:
            metrics[f"accuracy/{task}/stderr"] = math.sqrt(accuracy * (1 - accuracy) / (count - 1))
    return metrics


def _write_pairs(plan: Plan, folder: Path) -> None:
    """Write the tasks made of minimal pairs that the plan asks for: data as jsonl, task as YAML (JSON is YAML)."""
    files = plan.pair_files()
    for name in plan.tasks:
        if name == GRAMMAR:
            rows = [asdict(pair) for pair in pairs()]
        elif name in files:
            rows = _read_pairs(files[name])
        else:
            continue
        docs = [{"choices": [r["good"], r["bad"]][:: 1 - 2 * (i % 2)], "label": i % 2} for i, r in enumerate(rows)]
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(doc) + "\n" for doc in docs), encoding="utf-8")
        (folder / f"{name}.yaml").write_text(json.dumps(_task(name, data, folder / "cache")), encoding="utf-8")


def _read_pairs(file: Path) -> list[dict[str, str]]:
    """Return the pairs of a BLiMP file. Raises: UserError if a line lacks one of the two sentences."""
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        return [{"good": row["sentence_good"], "bad": row["sentence_bad"]} for row in rows]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(
            f"{file.name}: {error}",
            "sentence_good and sentence_bad in each line",
            "eval.task_path=<.jsonl of minimal pairs>",
        ) from error


def _task(name: str, data: Path, cache: Path) -> dict[str, Any]:
    """Return the lm-eval configuration of a multiple-choice task without a question."""
    metric = {"aggregation": "mean", "higher_is_better": True}
    return {
        "task": name,
        "dataset_path": "json",
        "test_split": "test",
        "output_type": "multiple_choice",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(cache)},
        "doc_to_text": "",
        "doc_to_target": "label",
        "doc_to_choice": "choices",
        "num_fewshot": 0,
        "metric_list": [{"metric": "acc", **metric}],
        "metadata": {"version": 1},
    }


@functools.cache
def hub_manager() -> Any:
    """Return lm-eval's own index of tasks; building it takes 5 to 8 seconds, so once."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _manager(*folders: Path) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(folders), include_defaults=False)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hush lm-eval and datasets while they run, and put everything back."""
    import datasets

    loggers: Sequence[logging.Logger] = [logging.getLogger(name) for name in CHATTER]
    levels = [logger.level for logger in loggers]
    bars = datasets.are_progress_bars_disabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()

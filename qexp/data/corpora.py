"""Text by name: a split of WikiText-2, C4, PTB, the Pile, or of a file or folder of your own.

A named corpus comes from the hub, or from ``path``: a local copy of the hub folder, or just its files (txt, jsonl,
parquet, also .gz) with the split in their names. Rows are what the hub's rows are, so that joining them gives the text
of the papers. Whether the hub answers is asked once, in two seconds, before anything heavy.
Source: methods/evaluation.md sections 1 and 2 (ids, revision, splits, shards).
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from qexp.core.errors import UserError
from qexp.core.hub import need_hub
from qexp.data.documents import SUFFIXES, read

log = logging.getLogger(__name__)

SPLIT_WORDS = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
PROBE_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Where a corpus lies on the hub, which column holds its text, and what a line of its .txt edition is."""

    hub: str | None = None
    config: str | None = None
    revision: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    column: str = "text"
    lines: str = "stripped"


CORPORA = {
    "wikitext2": Corpus(hub="Salesforce/wikitext", config="wikitext-2-raw-v1", lines="kept"),
    "c4": Corpus(
        hub="allenai/c4",
        revision="607bd4c8450a42878aa9ddc051a65a055450ef87",
        files={"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"},
    ),
    "ptb": Corpus(column="sentence"),  # its hub repository is a script, which datasets no longer runs
    "pile": Corpus(hub="mit-han-lab/pile-val-backup"),
    "local": Corpus(lines="whole"),
}


@dataclass(frozen=True, kw_only=True)
class Source:
    """One split of one corpus; ``path`` (a file or folder) replaces the hub, ``key`` is its config key for messages."""

    corpus: str
    split: str
    path: str | None
    key: str

    def check(self) -> None:
        """Raise UserError unless the text can be had: the path exists and holds it, or the hub answers."""
        if self.path is not None:
            self.files()
        elif CORPORA[self.corpus].hub is None:
            why = "" if self.corpus == "local" else " (its hub script no longer loads)"
            raise UserError(f"{self.corpus} without a path{why}", "a file or folder", f"{self.key}=<txt|jsonl|parquet>")
        else:
            need_hub(f"{self.corpus} from the hub", f"{self.key}=<folder with a copy>")

    def identity(self) -> dict[str, Any]:
        """Return what determines the text and nothing of this machine: content hash, or hub id and revision."""
        corpus = CORPORA[self.corpus]
        base: dict[str, Any] = {"corpus": self.corpus, "split": self.split}
        if self.path is not None:
            return base | {"sha256": _digest(self.files())}
        return base | {"hub": corpus.hub, "config": corpus.config, "revision": corpus.revision}

    def documents(self) -> Sequence[str]:
        """Return the rows of the split, in order. Raises: UserError if there is no text."""
        self.check()
        corpus = CORPORA[self.corpus]
        rows: Sequence[str] = self._from_hub() if self.path is None else []
        for file in self.files() if self.path is not None else ():
            rows = [*rows, *read(file, corpus.column, corpus.lines, self.key)]
        if not any(row.strip() for row in rows[:10_000]):
            raise UserError(f"{self.key}={self.path} holds no text", "some", f"{self.key}=<another file>")
        if self.corpus == "wikitext2" and any("<unk>" in row for row in rows):
            log.warning(
                "%s is the word-tokenized wikitext2, not the raw one: not comparable with the papers", self.path
            )
        return rows

    def text(self, separator: str) -> str:
        """Return all rows joined by ``separator``."""
        return separator.join(self.documents())

    def files(self) -> list[Path]:
        """Return the local files of the split, sorted. Raises: UserError if ``path`` is wrong or lacks the split."""
        root = Path(cast(str, self.path)).expanduser()
        if root.is_file():
            return [root]
        if not root.is_dir():
            raise UserError(f"{self.key}={self.path} does not exist", "a file or folder", f"{self.key}=<existing path>")
        corpus = CORPORA[self.corpus]
        exact = corpus.files.get(self.split, "-")
        for candidate in (root / exact, root / Path(exact).name):
            if candidate.is_file():
                return [candidate]  # the papers use this one shard, also of a complete copy
        found = [p for p in sorted((_below(root, corpus.config)).rglob("*")) if p.name.endswith(SUFFIXES)]
        chosen = found if self.corpus == "local" else [p for p in found if _names_split(p, root, self.split)]
        if not chosen:
            listed = ", ".join(p.name for p in found[:8]) or "no text file"
            what = f"a {self.split} split" if found else " or ".join(SUFFIXES)
            raise UserError(f"{self.key}={self.path} has {listed}", what, f"{self.key}=<file>")
        return chosen

    def _from_hub(self) -> Sequence[str]:
        """Return the column of the hub's dataset, read lazily from its memory-mapped table."""
        import datasets

        corpus = CORPORA[self.corpus]
        files = {self.split: corpus.files[self.split]} if corpus.files else None
        try:
            table = datasets.load_dataset(
                cast(str, corpus.hub), corpus.config, data_files=files, split=self.split, revision=corpus.revision
            )
        except (ConnectionError, OSError, ValueError) as error:
            first_line = str(error).splitlines()[0]
            raise UserError(f"{corpus.hub}: {first_line}", "the dataset", f"{self.key}=<folder with a copy>") from error
        return cast(Sequence[str], table[corpus.column])


def _below(root: Path, config: str | None) -> Path:
    """Return the folder of one configuration where a copy of the hub repository keeps several side by side."""
    return root / config if config and (root / config).is_dir() else root


def _names_split(file: Path, root: Path, split: str) -> bool:
    """Return whether the file's name or one of its folders below ``root`` is a word for the split."""
    words = set(re.split(r"[^a-z]+", str(file.relative_to(root)).lower()))
    return not words.isdisjoint(SPLIT_WORDS[split])


def _digest(files: Sequence[Path]) -> str:
    """Return the sha256 of the contents, in order."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()

"""Calibration tokens [samples, tokens]: what to sample, from where, and how the papers sample it.

Source: methods/evaluation.md section 2. ``crops`` and ``draw_plan`` repeat the literal order of calls on Python's
random generator, so index sequences are those of the papers; the generator is private. Named corpora use train splits:
calibrating on WikiText-2 train is still in-domain for WikiText-2 test.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qexp.core.errors import UserError, choose
from qexp.data.corpora import CORPORA, Source
from qexp.data.generated import Progress, Request, digest, first_token, generated, max_positions, silent, stored

log = logging.getLogger(__name__)

SPLITS = {"wikitext2": "train", "c4": "train", "ptb": "train", "pile": "validation", "local": "train"}
SEPARATORS = {"ptb": " "}  # every other text is joined by an empty line
PATIENCE = 20_000
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """``samples`` sequences of ``tokens`` tokens of ``source``; with ``bos`` each starts with BOS, if there is one."""

    source: str
    path: str | None
    samples: int
    tokens: int
    seed: int
    bos: bool

    def check(self) -> None:
        """Raise UserError, before anything heavy, if the settings or the place of the text are wrong."""
        choose("calibration.source", self.source, ["generated", "none", *CORPORA], "calibration.source")
        for key, least in (("samples", 1), ("tokens", 2)):
            if self.source != "none" and getattr(self, key) < least:
                raise UserError(
                    f"calibration.{key}={getattr(self, key)}", f"at least {least}", f"calibration.{key}=<more>"
                )
        if self.source in CORPORA:
            self._corpus().check()

    def identity(self) -> dict[str, Any]:
        """Return what determines the tokens besides the model: the settings, with the content in place of the path."""
        if self.source == "none":
            return {"source": "none"}
        data = self._corpus().identity() if self.source in CORPORA else {}
        return {
            "source": self.source,
            "data": data,
            "samples": self.samples,
            "tokens": self.tokens,
            "seed": self.seed,
            "bos": self.bos,
            "version": VERSION,
        }

    def load(self, model: Any, tokenizer: Any, cache: Path, model_identity: str, progress: Progress = silent) -> Tensor:
        """Return int64 [samples, tokens] on the CPU; ``tokens`` is cut, with a warning, to what the model can take."""
        if self.source == "none":
            return torch.empty(0, self.tokens, dtype=torch.long)
        tokens = self._fitting(model)
        if self.source == "generated":
            request = Request(samples=self.samples, tokens=tokens, seed=self.seed, stream="calibration", bos=self.bos)
            return generated(model, tokenizer, request, cache, model_identity, progress)
        key = digest({**self.identity(), "tokens": tokens, "model": model_identity})
        path = cache / "calibration" / f"{key}.safetensors"
        return stored(path, "tokens", lambda: {"tokens": self._sample(tokenizer, tokens)})

    def _corpus(self) -> Source:
        return Source(corpus=self.source, split=SPLITS[self.source], path=self.path, key="calibration.path")

    def _fitting(self, model: Any) -> int:
        """Return ``tokens``, or the model's maximum if that is less."""
        limit = max_positions(model)
        if limit is None or self.tokens <= limit:
            return self.tokens
        log.warning("calibration.tokens=%d is more than the model's %d positions; using %d", self.tokens, limit, limit)
        return limit

    def _sample(self, tokenizer: Any, tokens: int) -> Tensor:
        """Return int64 [samples, tokens] by the sampler that the papers use for this corpus."""
        bos = first_token(tokenizer) if self.bos else None
        body = tokens - (bos is not None)
        rng = random.Random(self.seed)
        if self.source == "c4":
            rows = crop_documents(self._corpus().documents(), tokenizer, self.samples, body, rng)
        elif self.source == "pile":
            rows = packed(self._corpus().documents(), tokenizer, self.samples, body, self.seed)
        else:
            ids = tokenize(tokenizer, self._corpus().text(SEPARATORS.get(self.source, "\n\n")), special=not self.bos)
            rows = crops(ids, self.samples, body, rng)
        return rows if bos is None else torch.cat([torch.full((len(rows), 1), bos), rows], dim=1)


def tokenize(tokenizer: Any, text: str, *, special: bool = True) -> Tensor:
    """Return int64 [N]: one call on the whole text; ``special`` leaves BOS to the tokenizer's own default."""
    ids = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


def crops(ids: Tensor, samples: int, tokens: int, rng: random.Random) -> Tensor:
    """Cut ``samples`` random pieces out of int64 [N]: GPTQ's sampler for WikiText-2.

    Raises: UserError if the text is too short.
    """
    if len(ids) <= tokens:
        raise UserError(
            f"the calibration text has {len(ids)} tokens",
            f"more than {tokens}",
            "calibration.tokens=<fewer> or calibration.path=<more text>",
        )
    starts = [rng.randint(0, len(ids) - tokens - 1) for _ in range(samples)]
    return torch.stack([ids[start : start + tokens] for start in starts])


def draw_plan(
    length: Callable[[int], int], documents: int, tokens: int, rng: random.Random
) -> Iterator[tuple[int, int]]:
    """Yield (document, start) without end, as GPTQ draws from C4: documents until one is long enough, then the start.

    A document of exactly ``tokens`` tokens is taken whole (the original fails on it).
    Raises: UserError if no long document turns up.
    """
    while True:
        for _ in range(PATIENCE):
            index = rng.randint(0, documents - 1)
            if length(index) >= tokens:
                break
        else:
            raise UserError(
                f"no document of {tokens} tokens in {PATIENCE} draws",
                "longer documents",
                "calibration.tokens=<fewer> (eval.window_tokens in evaluation)",
            )
        spare = length(index) - tokens
        yield index, rng.randint(0, spare - 1) if spare else 0


def crop_documents(documents: Sequence[str], tokenizer: Any, samples: int, tokens: int, rng: random.Random) -> Tensor:
    """Return int64 [samples, tokens], each a piece of one document (with the tokenizer's BOS): the C4 sampler."""
    known: dict[int, Tensor] = {}

    def length(index: int) -> int:
        if index not in known:
            # a token covers at least one byte, so most documents need no tokenizing to be refused
            short = len(documents[index].encode()) + 2 < tokens
            known[index] = torch.empty(0) if short else tokenize(tokenizer, documents[index])
        return len(known[index])

    plan = draw_plan(length, len(documents), tokens, rng)
    picks = [next(plan) for _ in range(samples)]
    return torch.stack([known[index][start : start + tokens] for index, start in picks])


def packed(documents: Sequence[str], tokenizer: Any, samples: int, tokens: int, seed: int) -> Tensor:
    """Return int64 [samples, tokens]: documents of at most ``tokens`` tokens in random order, end to end, as AWQ does.

    Differs: AWQ stops after 128 documents and takes the blocks they fill; here ``samples`` counts blocks.
    """
    import numpy

    stream: list[Tensor] = []
    missing = samples * tokens
    for index in numpy.random.default_rng(seed).permutation(len(documents)):  # the order of datasets' shuffle(seed)
        ids = tokenize(tokenizer, documents[int(index)].strip())
        if 0 < len(ids) <= tokens:
            stream.append(ids)
            missing -= len(ids)
        if missing <= 0:
            return torch.cat(stream)[: samples * tokens].view(samples, tokens)
    raise UserError(
        f"the documents of at most {tokens} tokens are {missing} tokens short",
        "more of them",
        "calibration.samples=<fewer>",
    )

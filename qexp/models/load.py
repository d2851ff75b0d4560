"""Load any causal LM of transformers: the embedded one, a hub id, a local folder or a GGUF file.

A local path never touches the network; a hub id probes it once and fails at once with advice. Nothing is
unpickled: only safetensors (and GGUF) are read unless ``trust_remote_code`` says otherwise for code.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from qexp.core.cache import file_digest
from qexp.core.errors import UserError, choose
from qexp.core.hub import need_hub

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

EMBEDDED = Path(__file__).parent / "embedded" / "weights"
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Which model, from where; ``outliers`` asks for a function-preserving stress (models/outliers.py)."""

    name: str
    path: str | None
    revision: str | None
    format: str
    dtype: str
    trust_remote_code: bool
    outliers: Mapping[str, Any]

    def check(self) -> None:
        """Raise UserError for what can be known wrong before anything is loaded."""
        choose("model.format", self.format, ("hf", "gguf", "embedded"), "model.format")
        choose("model.dtype", self.dtype, DTYPES, "model.dtype")
        choose("model.outliers.kind", str(self.outliers["kind"]), ("none", "scale", "rotate"), "model.outliers.kind")
        if self.format == "embedded":
            return
        if not self.path:
            raise UserError("model.path is not set", "a hub id, a folder or a .gguf file", "model.path=<it>")
        if self.format == "gguf" and not Path(self.path).is_file():
            raise UserError(f"model.path={self.path} is not a file", "a .gguf file", "model.path=<file.gguf>")
        if self.folder is None and (self.path.startswith((".", "/", "~")) or self.path.count("/") != 1):
            raise UserError(
                f"model.path={self.path} is no folder and no hub id", "an existing folder or <owner>/<name>"
            )
        if self.folder is not None and self.format == "hf" and not (self.folder / "config.json").is_file():
            raise UserError(f"model.path={self.path} has no config.json", "a folder saved by save_pretrained")
        if self.folder is None and not _is_cached(self.path):
            need_hub(f"model.path={self.path} is on the hub", "model.path=<folder> (or model=embedded)")

    @property
    def folder(self) -> Path | None:
        """Return the local file or folder, or None for a hub id."""
        if self.format == "embedded":
            return EMBEDDED
        path = Path(self.path or "").expanduser()
        return path if path.exists() else None

    @property
    def needs_text(self) -> bool:
        """Return whether injecting the outliers needs text of the model."""
        return str(self.outliers["kind"]) == "rotate"

    def identity(self) -> dict[str, Any]:
        """Return what determines the weights, without machine paths: contents for local files, id for the hub."""
        weights = (
            {"hub": self.path, "revision": self.revision} if self.folder is None else {"sha256": _digest(self.folder)}
        )
        return weights | {"dtype": self.dtype, "outliers": dict(self.outliers)}

    def load(self, device: str, cache: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Return model (eval mode, no gradients, on ``device``) and tokenizer.

        ``dtype=auto`` is float32 on the CPU and the checkpoint's own dtype elsewhere.
        """
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        _silence_local_reading()
        source = str(self.folder or self.path)
        if self.format == "gguf":
            source = str(_convert_gguf(Path(source), cache))
        dtype = ("float32" if device == "cpu" else "auto") if self.dtype == "auto" else self.dtype
        local = self.folder is not None
        common = {
            "revision": self.revision or "main",
            "trust_remote_code": self.trust_remote_code,
            "local_files_only": local,
        }
        try:
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, use_safetensors=True, **common)
            tokenizer = AutoTokenizer.from_pretrained(source, **common)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise UserError(
                f"model.path={self.path} cannot be loaded: {_first_line(error)}", "a readable causal LM"
            ) from error
        except Exception as error:
            if type(error).__name__ != "SafetensorError":
                raise
            raise UserError(
                f"model.path={self.path} is corrupt: {_first_line(error)}", "a complete checkpoint"
            ) from error
        bad = next((n for n, p in model.named_parameters() if not bool(torch.isfinite(p).all())), None)
        if bad is not None:
            raise UserError(
                f"the weight {bad} of model.path={self.path} is not finite", "a checkpoint without NaN or Inf"
            )
        return model.eval().requires_grad_(False).to(device), tokenizer


def _silence_local_reading() -> None:
    """Switch transformers' bar for reading weights off; downloads keep theirs."""
    from huggingface_hub.utils.tqdm import enable_progress_bars
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    enable_progress_bars()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _convert_gguf(file: Path, cache: Path) -> Path:
    """Return a safetensors folder for a GGUF file; dequantizing takes a minute, so it is done once."""
    folder = cache / "gguf" / _digest(file)[:16]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):  # of several jobs one converts
        if not folder.exists():
            _convert_into(folder, file)
    return folder


def _convert_into(folder: Path, file: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    log.info("converting %s to safetensors, once", file.name)
    where, name = str(file.parent), file.name
    try:
        plain = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            where, gguf_file=name, quantization_config=plain, dtype="float32", local_files_only=True
        )
        tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=name, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, IndexError) as error:
        raise UserError(
            f"model.path={file} cannot be read: {_first_line(error)}", "a GGUF file of a known model"
        ) from error
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(folder)


def _digest(path: Path) -> str:
    """Return a sha256 of all of a file, or of a folder's weights, configs and code."""
    kinds, digest = (".safetensors", ".json", ".model", ".txt", ".py"), hashlib.sha256()
    files = [path] if path.is_file() else sorted(f for f in path.iterdir() if f.suffix in kinds)
    for file in files:
        digest.update(json.dumps([file.name if len(files) > 1 else "", file_digest(file)]).encode())
    return digest.hexdigest()


def _is_cached(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json"), str)

"""Train the embedded default model: a small Llama on public-domain books.

    python -m qexp.models.embedded.train --text FILE [--output FOLDER] [--steps N]

The recipe of the weights in this folder: byte-level BPE of 4096 tokens, 4096 tokens a step (16 x 256, in the last
fifth 8 x 512: attention is 40 % of the time at 512), AdamW, cosine schedule, bfloat16 autocast. Whole books are held
out for the perplexity in the model card. A killed training continues at its last checkpoint, with the same batches.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import lzma
import math
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY, WINDOW, STEP_TOKENS = 4096, 512, 4096
SHORT_WINDOW, SHORT_FRACTION = 256, 0.8
PEAK_RATE, FINAL_FRACTION, WARMUP_STEPS = 3e-3, 0.02, 200
HELD_OUT_EVERY = 48  # every 48th book is held out: 3 of 191
BOS_PROBABILITY = 0.5  # half of the windows open with the start token, so both kinds of window work
MODEL_LICENSE = "Apache-2.0"


def read_books(path: Path) -> list[str]:
    """Return the books of ``path`` (``.txt`` or ``.txt.xz``), separated by two blank lines."""
    raw = lzma.decompress(path.read_bytes()).decode() if path.suffix == ".xz" else path.read_text()
    return [book.strip() for book in raw.split("\n\n\n") if book.strip()]


def split_books(books: list[str]) -> tuple[list[str], list[str]]:
    """Return (training books, held-out books): whole books are held out, never passages."""
    held_out = books[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    return [b for i, b in enumerate(books) if i % HELD_OUT_EVERY != HELD_OUT_EVERY - 1], held_out


def train_tokenizer(books: list[str]) -> PreTrainedTokenizerFast:
    """Train the byte-level BPE tokenizer; it puts the start token in front of every text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(books, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        model_max_length=WINDOW,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, books: list[str]) -> np.ndarray:
    """Return all books as one uint16 token stream, each book closed by the end token."""
    parts: list[int] = []
    for start in range(0, len(books), 8):
        for ids in tokenizer(books[start : start + 8], add_special_tokens=False)["input_ids"]:
            parts += [*ids, 1]
    return np.asarray(parts, dtype=np.uint16)


def new_model() -> LlamaForCausalLM:
    """Return the untrained model of the design: 6 blocks, 8 heads on 4 key/value heads, 768 = 3 x 256."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=WINDOW,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        initializer_range=0.03,
    )
    return LlamaForCausalLM(config)


def batch_at(tokens: np.ndarray, step: int, steps: int) -> torch.Tensor:
    """Return the batch of one step, [16, 257] or [8, 513]: a function of the step alone, so a resume repeats it."""
    window = SHORT_WINDOW if step < SHORT_FRACTION * steps else WINDOW
    rng, size = np.random.default_rng([20261121, step]), STEP_TOKENS // window
    starts = rng.integers(0, len(tokens) - window - 1, size)
    rows = np.stack([tokens[s : s + window + 1] for s in starts]).astype(np.int64)
    rows[rng.random(size) < BOS_PROBABILITY, 0] = 0
    return torch.from_numpy(rows)


def rate_at(step: int, steps: int) -> float:
    """Return the learning rate: linear warm-up, then cosine to 2 % of the peak."""
    if step < WARMUP_STEPS:
        return PEAK_RATE * (step + 1) / WARMUP_STEPS
    phase = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return PEAK_RATE * (FINAL_FRACTION + (1 - FINAL_FRACTION) * 0.5 * (1 + math.cos(math.pi * phase)))


def loss_of(model: LlamaForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    """Return the mean next-token cross entropy of ``rows`` [B, S + 1] in nats, float32."""
    logits = model(rows[:, :-1], use_cache=False).logits.float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokens: np.ndarray, windows: int) -> float:
    """Return the mean loss over ``windows`` evenly spaced windows with a start token each."""
    starts = np.linspace(0, len(tokens) - WINDOW - 1, windows).astype(int)
    total = 0.0
    for s in starts:
        rows = torch.from_numpy(tokens[s : s + WINDOW].astype(np.int64))[None]
        total += loss_of(model, torch.cat([torch.zeros(1, 1, dtype=torch.long), rows], dim=1)).item()
    return total / windows


def optimiser_of(model: LlamaForCausalLM) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95), fused=True)


def fit(
    train: np.ndarray, held_out: np.ndarray, steps: int, state_file: Path
) -> tuple[LlamaForCausalLM, list[dict[str, float | None]]]:
    """Train for ``steps`` steps, resuming from ``state_file``; return the model and its loss curve."""
    torch.manual_seed(0)
    model = new_model()
    optimiser, step, curve = optimiser_of(model), 0, []
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        step, curve = state["step"], state["curve"]
    began, compiled = time.monotonic(), torch.compile(loss_of, dynamic=False)
    while step < steps:
        for group in optimiser.param_groups:
            group["lr"] = rate_at(step, steps)
        with torch.autocast("cpu", torch.bfloat16):
            loss = compiled(model, batch_at(train, step, steps))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        step += 1
        if step % 100 == 0 or step == steps:
            quick = held_out_loss(model, held_out, 16) if step % 500 == 0 or step == steps else None
            curve.append(
                {"step": step, "loss": loss.item(), "held_out_loss": quick, "seconds": time.monotonic() - began}
            )
            print(json.dumps(curve[-1]), flush=True)
        if step % 250 == 0:
            state = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "step": step, "curve": curve}
            torch.save(state, state_file.with_suffix(".part"))
            state_file.with_suffix(".part").replace(state_file)
    return model, curve


def main() -> None:
    """Train, save float16 weights, tokenizer and ``training.json`` with what the model card states."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="books, .txt or .txt.xz, two blank lines between")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "weights", help="folder of the result")
    parser.add_argument("--steps", type=int, default=3600)
    parser.add_argument("--work", type=Path, default=Path("outputs/embedded-training"), help="checkpoint folder")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    train_books, held_out_books = split_books(read_books(arguments.text))
    tokenizer = train_tokenizer(train_books)
    cached = arguments.work / "tokens.npz"
    if not cached.exists():
        np.savez(cached, train=encode(tokenizer, train_books), held_out=encode(tokenizer, held_out_books))
    tokens = np.load(cached)
    train, held_out = tokens["train"], tokens["held_out"]
    print(f"{len(train)} training tokens, {len(held_out)} held-out tokens", flush=True)
    model, curve = fit(train, held_out, arguments.steps, arguments.work / "state.pt")
    model = model.eval().to(torch.float16)
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    with contextlib.suppress(FileNotFoundError):
        (arguments.output / "generation_config.json").unlink()
    windows = len(held_out) // WINDOW
    loss = held_out_loss(model.float(), held_out, windows)
    weights = (arguments.output / "model.safetensors").read_bytes()
    report = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_books": len(train_books),
        "held_out_books": len(held_out_books),
        "train_tokens": len(train),
        "steps": arguments.steps,
        "tokens_seen": arguments.steps * STEP_TOKENS,
        "held_out_windows": windows,
        "held_out_perplexity": math.exp(loss),
        "sha256": hashlib.sha256(weights).hexdigest(),
        "license": MODEL_LICENSE,
        "curve": curve,
    }
    (arguments.output / "training.json").write_text(json.dumps(report, indent=1))
    print(f"held-out perplexity {math.exp(loss):.2f}")


if __name__ == "__main__":
    main()

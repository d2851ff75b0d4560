"""``qexp-bench``: speed of the compiled kernels against their floors and peers, and of a packed model.

The kernels come with csrc/; until they are built the command says so and nothing is measured in their place.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from qexp.core.errors import UserError


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; exits 2 with one line on stderr for a user's mistake."""
    arguments = _parser().parse_args(argv)
    try:
        raise UserError(
            f"{arguments.what}: the compiled kernels are not built yet",
            "the kernels of csrc/, which this version does not have",
        )
    except UserError as error:
        sys.stderr.write(f"qexp-bench: {error}\n")
        raise SystemExit(2) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qexp-bench", description="Measure the speed of kernels or of a packed model."
    )
    parser.add_argument("what", choices=["kernels", "model"], help="each kernel by shape, or a whole model")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the measurements to FILE")
    return parser

"""What the activation quantizers share: which settings mean something."""

from __future__ import annotations

from qexp.core.errors import UserError
from qexp.core.words import FULL_BITS


def check_settings(bits: int, clip: float) -> None:
    """Raise UserError for a width or clip that means nothing."""
    if not 2 <= bits <= 8 and bits != FULL_BITS:
        raise UserError(f"act.bits={bits}", f"2 to 8, or {FULL_BITS} for none", "bits.act=8")
    if not 0 < clip <= 1:
        raise UserError(f"act.clip={clip}", "a ratio in (0, 1]", "method.act.clip=1.0")

"""What transforms share: the sites that a recipe may name."""

from __future__ import annotations

from collections.abc import Sequence

from qexp.core.errors import choose

PLACES = ("attn_in", "value", "attn_out", "mlp_in", "mlp_mid")


def check_places(member: str, places: Sequence[str]) -> None:
    """Raise UserError for a kind of site that there is not, or that no statistics are taken of."""
    for place in places:
        choose(f"transform.{member}.places", place, PLACES, f"method.transform.{member}.places")

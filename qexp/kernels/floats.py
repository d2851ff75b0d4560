"""Small numbers: floats and other tables of values, rounding to them, and the scales of blocks of them.

An element is sign, exponent and mantissa (FP4 e2m1, FP6 e2m3 and e3m2, FP8 e4m3 and e5m2), signed magnitudes (powers of
two), or a table (NF4). Codes are bit patterns, sign first. Rounding is to nearest, ties to the even code, beyond the
largest value saturates; -0, NaN and infinity are never written.

Source: OCP Microscaling Formats v1.0; arXiv:2209.05433; NF4: arXiv:2305.14314 appendix E; methods/fp_formats.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

# Exponent bits, mantissa bits, bias, and how many of the largest patterns are no numbers.
FLOATS = {"e2m1": (2, 1, 1, 0), "e2m3": (2, 3, 1, 0), "e3m2": (3, 2, 3, 0), "e4m3": (4, 3, 7, 1), "e5m2": (5, 2, 15, 4)}
ELEMENTS = (*FLOATS, "nf4")
RULES = ("floor", "even", "rceil", "ceil", "search")
LEAST_EXPONENT, MOST_EXPONENT = -126, 127  # of e8m0; -127 would be subnormal in float32
LEAST_E4M3 = 2.0**-9
NF4_OFFSET = 0.9677083  # of the quantiles: arXiv:2305.14314, (1 - 1/32 + 1 - 1/30) / 2


@dataclass(frozen=True, eq=False)
class Element:
    """The values [L], float64 rising, their ``codes``, and between which two [L - 1] a tie goes up."""

    bits: int
    mantissa: int
    values: Tensor
    codes: Tensor
    up_at_tie: Tensor

    @property
    def top(self) -> float:
        """Return the largest value."""
        return float(self.values[-1])

    @property
    def emax(self) -> int:
        """Return the exponent of the largest value."""
        return int(torch.frexp(self.values[-1])[1]) - 1

    def encode(self, x: Tensor) -> Tensor:
        """Return the codes of the nearest values, uint8, same shape."""
        between, codes, _ = _tables(self, x.dtype, x.device)
        return codes[torch.bucketize(x, between)]

    def decode(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the values of codes; NaN for patterns that are no number."""
        values: Tensor = _tables(self, dtype, codes.device)[2][codes.long()]
        return values

    def round(self, x: Tensor) -> Tensor:
        """Return the nearest values in the dtype of x."""
        return self.decode(self.encode(x), x.dtype)


@cache
def _tables(kind: Element, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return the points between values, the codes of values, and the values of codes, where they are wanted."""
    values, codes = kind.values.to(device, dtype), kind.codes.to(device)
    between = (values[1:] + values[:-1]) / 2
    between = torch.where(kind.up_at_tie.to(device), torch.nextafter(between, between - 1), between)
    table = torch.full((1 << kind.bits,), torch.nan, dtype=dtype, device=device)
    if (kind.values == 0).any():
        table[1 << (kind.bits - 1)] = 0  # -0, unless it is a value of its own
    table[codes.long()] = values
    return between, codes, table


@cache
def element(name: str) -> Element:
    """Return an element by name."""
    if name == "nf4":
        return _table(4, _nf4())
    exponents, mantissa, bias, none = FLOATS[name]
    magnitude = torch.arange((1 << (exponents + mantissa)) - none)
    exponent, fraction = magnitude >> mantissa, (magnitude & ((1 << mantissa) - 1)).double() / (1 << mantissa)
    normal = torch.where(exponent > 0, 1 + fraction, 2 * fraction)
    return signed(torch.ldexp(normal, exponent - bias), 1 + exponents + mantissa, mantissa)


def signed(magnitudes: Tensor, bits: int, mantissa: int = 0) -> Element:
    """Return the element of these magnitudes, rising, and their negatives; codes are the sign bit and their numbers."""
    numbers, has_zero = torch.arange(len(magnitudes)), int(magnitudes[0] == 0)
    codes = torch.cat([numbers[has_zero:].flip(0) + (1 << (bits - 1)), numbers])
    values = torch.cat([-magnitudes[has_zero:].flip(0), magnitudes])
    return Element(bits, mantissa, values, codes.to(torch.uint8), (codes[1:] & 1) == 0)


def _table(bits: int, values: Tensor) -> Element:
    """Return an element that is a table of 2^bits values, numbered from the least; ties go down."""
    codes = torch.arange(1 << bits).to(torch.uint8)
    return Element(bits, 0, values, codes, torch.zeros(len(values) - 1, dtype=torch.bool))


def _nf4() -> Tensor:
    """Return 16 quantiles of the normal distribution, zero among them, 8 above and 7 below, up to 1."""
    above = torch.special.ndtri(torch.linspace(NF4_OFFSET, 0.5, 9, dtype=torch.float64))
    below = -torch.special.ndtri(torch.linspace(NF4_OFFSET, 0.5, 8, dtype=torch.float64))
    both: Tensor = torch.cat([below[:-1], above.flip(0)]) / above[0]
    return both


def absmax_scale(absmax: Tensor, kind: Element) -> Tensor:
    """Return the scale that puts the largest magnitude on the largest value; 1 for zeros."""
    return torch.where(absmax == 0, 1, absmax / kind.top)


def mx_exponent(absmax: Tensor, kind: Element, rule: str) -> Tensor:
    """Return the exponent, an integer in the dtype of ``absmax``, of a block's scale 2^e; 0 for zeros.

    floor: floor(log2 a) - emax, so that a / 2^e < 2^(emax + 1), and what is above the top saturates; even: one more
    where a rounds up to the next power; rceil: the least e with a / 2^e <= top; ceil: ceil(log2 a) - emax.
    """
    mantissa, exponent = torch.frexp(absmax)  # a = mantissa 2^exponent, mantissa in [1/2, 1)
    if rule == "rceil":
        mantissa, exponent = torch.frexp(absmax / kind.top)
        made = exponent - (mantissa == 0.5).to(exponent)
    elif rule == "ceil":
        made = exponent - (mantissa == 0.5).to(exponent) - kind.emax
    else:
        made = exponent - 1 - kind.emax
        made += (2 * mantissa >= 2 - 2.0 ** -(kind.mantissa + 1)).to(made) if rule == "even" else 0
    return torch.where(absmax == 0, 0, made.clamp(LEAST_EXPONENT, MOST_EXPONENT)).to(absmax)


def mx_scale(x: Tensor, kind: Element, rule: str) -> Tensor:
    """Return the power-of-two scales [...] of blocks x [..., block]; ``search``: of three, the least squared error."""
    absmax = x.abs().amax(-1)
    if rule != "search":
        return torch.exp2(mx_exponent(absmax, kind, rule))
    middle = mx_exponent(absmax, kind, "floor")
    best, least = torch.exp2(middle), torch.full_like(absmax, torch.inf)
    for step in (0, 1, -1):
        scale = torch.exp2((middle + step).clamp(LEAST_EXPONENT, MOST_EXPONENT))
        error = (kind.round(x / scale[..., None]) * scale[..., None] - x).square().sum(-1)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def round_scales(scales: Tensor) -> Tensor:
    """Return scales > 0 in e4m3: the nearest, and the least above zero in place of zero."""
    return element("e4m3").round(scales).clamp(min=LEAST_E4M3)


def block_scales(x: Tensor, kind: Element, scale: str, rule: str) -> Tensor:
    """Return the scales [..., G] of blocks x [..., G, block]: in e8m0, in e4m3 times one of the row, or exact."""
    if scale == "e8m0":
        return mx_scale(x, kind, rule)
    exact = absmax_scale(x.abs().amax(-1), kind)
    if scale != "e4m3":
        return exact
    whole = absmax_scale(x.abs().amax((-2, -1), keepdim=True).squeeze(-1), kind) / element("e4m3").top
    return round_scales(exact / whole) * whole


def fake_quantize_floats(x: Tensor, name: str, group: int, scale: str, rule: str) -> Tensor:
    """Round each block of ``group`` channels (-1: all) of x to small floats and return it dequantized.

    Shapes: x [..., I] -> same shape and dtype. Arithmetic in float32 for 16-bit x, else in the dtype of x. A gradient
    passes straight through the rounding. A block with NaN or Inf is NaN.
    """
    kind, wide = element(name), x if x.dtype == torch.float64 else x.float()
    blocks = wide.detach().unflatten(-1, (-1, group if group > 0 else x.shape[-1]))
    scales = block_scales(blocks, kind, scale, rule)[..., None]
    sound = blocks.isfinite().all(-1, keepdim=True)
    rounded = torch.where(sound, kind.round(blocks / scales) * scales, torch.nan).flatten(-2)
    return (wide + (rounded - wide).detach() if x.requires_grad else rounded).to(x.dtype)

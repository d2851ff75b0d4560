"""Pyramid vector quantization: D columns are a length times the direction of an integer point with sum |y_i| = K.

w ≈ ρ r y / |y|: y is numbered (no table), r one of 2^b levels that suit rows without preferred directions, as random
rotations make them, ρ the root mean square of the norms of a row's groups. A code is y and the place of r; it is packed
as the number of y and that place. Levels follow the length n of the row, which ``for_layer`` tells.

Source: arXiv:2410.16926 (abstract: spherical lattice, amplitudes by their theoretical distribution); directions, levels
and index reconstructed in methods/pvq.md. Differs: nearest level in place of the quantile's cell; a last level apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from qexp.core.errors import UserError, choose
from qexp.core.words import FULL_BITS, Format, Layer, Params
from qexp.kernels.pack import pack_wide, unpack_wide
from qexp.stages.grid import _shared as common
from qexp.stages.grid import _shared_amplitude as amplitudes
from qexp.stages.grid import _shared_pyramid as pyramid
from qexp.stages.grid import _shared_scale as scales
from qexp.stages.grid import _shared_search as search

MOST_BITS = 62  # of a number: sums of two still fit int64
MOST_PULSES = 2**15 - 1  # what int16 holds


@dataclass(frozen=True, kw_only=True)
class Pyramid:
    """The grid. Params: ``norm`` [O, 1], ρ, 0 for rows of zeros. Codes: [O, J/D, D + 1], y and the place of r.

    ``pulses`` is K, or "auto": the most whose numbers fit ``bits`` D bits, and 62. ``columns`` is n of the law.
    """

    bits: int
    dim: int
    pulses: int | str
    encoder: str
    amplitude: str
    amplitude_bits: int
    columns: int

    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[str]] = frozenset()
    shared: ClassVar[frozenset[str]] = frozenset()
    group: ClassVar[int] = -1
    formats: ClassVar[Mapping[str, Format]] = {"norm": "float16"}

    def for_layer(self, layer: Layer, bits: int) -> Pyramid:
        """Return this grid at ``bits``, with the levels of the layer's rows (kept columns counted: they are few)."""
        return replace(self, bits=bits, columns=layer.inputs)

    def check(self, layer: Layer) -> None:
        """Raise UserError for settings that mean nothing, a width out of reach or a shape that does not fit."""
        choose("grid.encoder", self.encoder, pyramid.ENCODERS, "method.grid.encoder")
        choose("grid.amplitude", self.amplitude, amplitudes.RULES, "method.grid.amplitude")
        if not 2 <= self.amplitude_bits <= 6:
            got = f"grid.amplitude_bits={self.amplitude_bits}"
            raise UserError(got, "2 to 6", "method.grid.amplitude_bits=4")
        if self.bits != FULL_BITS:
            common.check_shape(self.bits, -1, layer)
            self._check_pulses()
        self._check_dim(layer)

    def fit(self, W_OJ: Tensor, H_JJ: Tensor | None) -> Params:
        """Return ρ of whole rows. Raises: NumericalError for a weight that is not finite, or a norm that overflows."""
        common.check_finite(W_OJ)
        exact = W_OJ.double().square().mean(1, keepdim=True).mul_(self.dim).sqrt_().to(W_OJ.dtype)
        norm = torch.where(exact == 0, 0, scales.stored_scale(exact, "float16"))
        scales.check_scale(norm[exact > 0], "float16")
        return {"norm": norm}

    def encode(self, W_OJ: Tensor, params: Params) -> Tensor:
        """Return codes [O, J/D, D + 1] near the weight, int8, or int16 for many pulses."""
        rows = max(1, search.CHUNK_ELEMENTS.get(W_OJ.device.type, 1 << 18) // W_OJ.shape[1])
        parts = zip(W_OJ.split(rows), params["norm"].split(rows), strict=True)
        return torch.cat([self._encode(W, norm) for W, norm in parts])

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """Return ρ r y / |y| [O, J] in the dtype of the norm."""
        norm = params["norm"]
        y = codes[..., :-1].to(norm)
        r = self._levels(norm)[codes[..., -1].int()] / y.square().sum(-1).sqrt_()
        return y.mul_((norm * r)[..., None]).flatten(1)

    def pack(self, codes: Tensor) -> Tensor:
        """Return codes as a dense stream, uint8: of each group the number of y, then the place of r."""
        flat = codes.flatten(0, 1)
        number = pyramid.numbers(flat[:, :-1], self._pulses)
        return pack_wide(torch.stack([number, flat[:, -1].long()], 1), self._widths)

    def unpack(self, packed: Tensor, outputs: int, columns: int) -> Tensor:
        """Undo ``pack``; ``columns`` are J/D."""
        number, place = unpack_wide(packed, self._widths, outputs * columns).unbind(1)
        y = pyramid.points(number, self.dim, self._pulses)
        return torch.cat([y, place[:, None]], 1).to(self._dtype).view(outputs, columns, -1)

    def cost(self, outputs: int, inputs: int) -> float:
        """Return bits per weight: the numbers, the places of the lengths, and the norm of each row."""
        return sum(self._widths) / self.dim + scales.SCALE_BITS["float16"] / inputs

    @property
    def _pulses(self) -> int:
        if isinstance(self.pulses, int):
            return self.pulses
        return pyramid.most_pulses(self.dim, min(self.bits * self.dim, MOST_BITS))

    @property
    def _widths(self) -> tuple[int, int]:
        """Return the bits of a number, and of the place of a length."""
        return pyramid.number_bits(self.dim, self._pulses), self.amplitude_bits

    @property
    def _dtype(self) -> torch.dtype:
        return torch.int8 if self._pulses < 128 else torch.int16

    def _levels(self, like: Tensor) -> Tensor:
        """Return all values of r, rising."""
        return like.new_tensor(amplitudes.levels(self.dim, self.columns, self.amplitude_bits, self.amplitude))

    def _encode(self, W_OJ: Tensor, norm_O1: Tensor) -> Tensor:
        y_MD, length_M = pyramid.nearest(W_OJ.reshape(-1, self.dim), self._pulses, self.encoder)
        r = length_M.view(len(W_OJ), -1) / torch.where(norm_O1 == 0, 1, norm_O1)
        levels = self._levels(r)
        place = torch.bucketize(r, (levels[1:] + levels[:-1]) / 2)
        y = y_MD.to(self._dtype).view(*r.shape, self.dim)
        return torch.cat([y, place[..., None].to(self._dtype)], -1)

    def _check_pulses(self) -> None:
        """Raise UserError if there are no pulses, or too many for a number to be stored."""
        known = isinstance(self.pulses, int) and 1 <= self.pulses <= MOST_PULSES and self.dim > 1
        if self.pulses != "auto" and not (known and pyramid.number_bits(self.dim, self._pulses) <= MOST_BITS):
            need = f"auto, or 1 to {MOST_PULSES} whose numbers fit {MOST_BITS} bits"
            raise UserError(f"grid.pulses={self.pulses} at grid.dim={self.dim}", need, "method.grid.pulses=auto")

    def _check_dim(self, layer: Layer) -> None:
        """Raise UserError if D does not divide the columns, or so many bits of a number that a lower width has them."""
        auto = self.pulses == "auto" and self.bits != FULL_BITS
        most = min(layer.inputs, (MOST_BITS - 1) // (self.bits - 1)) if auto else layer.inputs
        fits = [d for d in range(2, most + 1) if layer.inputs % d == 0]
        if self.dim not in fits:
            got = f"grid.dim={self.dim} at {self.bits} bits for in_features={layer.inputs} of {layer.name}"
            near = min(fits, key=lambda d: abs(d - self.dim), default=None)
            override = f"method.grid.dim={near}" if near else "method/grid=integer"
            raise UserError(got, f"a divisor of {layer.inputs}, 2 to {most}", override)

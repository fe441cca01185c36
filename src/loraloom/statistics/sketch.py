"""Few directions in place of many rows: the principal ones of rows at hand, frequent directions of rows that stream by.

Sources: Liberty, "Simple and Deterministic Matrix Sketching", KDD 2013, arXiv 1206.0594; Ghashami, Liberty, Phillips
and Woodruff, "Frequent Directions", SIAM J. Comput. 45 (2016), arXiv 1501.01711.
"""

from __future__ import annotations

import torch
from torch import Tensor


def principal(rows: Tensor, most: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the p largest eigenvalues of H^T H, descending, and S V^T (p or `most`, n), for rows H (p, n) = U S V^T.

    Both float64, by the p x p matrix H H^T: nothing is n x n. The largest entry of each row of S V^T is positive, so
    that it says no more than H^T H (but where eigenvalues tie). Of rows that are not finite nothing can be expected.
    """
    wide = rows.double()
    values, U = torch.linalg.eigh((wide @ wide.T).nan_to_num(0.0, 0.0, 0.0))
    turned = U.flip(1)[:, :most].T @ wide
    if turned.numel():
        turned *= turned.gather(1, turned.abs().argmax(dim=1, keepdim=True)).sign()
    return values.flip(0).clamp_min(0), turned


class FrequentDirections:
    """A factor F (p, n), p <= R, of rows that stream by: F^T F <= G <= F^T F + lost I, up to float32's rounding.

    2R rows are held, float32, on the rows' device. Whenever these are full they are turned to principal directions
    and the (R+1)-th eigenvalue d is taken off every eigenvalue, which leaves R rows; `lost` is the sum of these d. Each
    step takes (R+1) d or more off the trace, so lost <= (tr G - tr F^T F) / (R+1); and for every q <= R,
    lost <= (the sum of all but the q largest eigenvalues of G) / (R+1 - q).

    It does not matter how the rows are split into calls of `add`.
    """

    def __init__(self, width: int, most: int) -> None:
        self.width = width
        self.most = most
        self.lost: Tensor | float = 0.0
        self._held: Tensor | None = None
        self._count = 0
        self._turned = False

    def add(self, rows: Tensor) -> None:
        """Add `rows` (k, n). One eigenproblem of 2R for each R rows, whose own check is all that waits for a device."""
        if self._held is None:
            self._held = rows.new_zeros(2 * self.most, self.width, dtype=torch.float32)
        while len(rows):
            if self._count == len(self._held):
                self._shrink()
            part = rows[: len(self._held) - self._count]
            self._held[self._count : self._count + len(part)] = part
            self._count += len(part)
            rows = rows[len(part) :]

    def result(self) -> tuple[Tensor, bool]:
        """Return F (p, n) float32, and whether these are the rows as they came: there were no more than R."""
        if self._held is None:
            return torch.zeros(0, self.width), True
        if self._count > self.most:
            self._shrink()
        return self._held[: self._count].clone(), not self._turned

    def _shrink(self) -> None:
        assert self._held is not None
        values, turned = principal(self._held[: self._count], self.most)
        kept, off = values[: self.most], values[self.most]
        left = ((kept - off).clamp_min(0) / kept.clamp_min(torch.finfo(torch.float64).tiny)).sqrt()
        self._held[: self.most] = left[:, None] * turned
        self._count, self._turned = self.most, True
        self.lost = self.lost + off

"""Running sums of rows from which means and covariances come.

Letters: N rows, H features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitprune.sharing import from_first, sharing, sum_of_all


class Moments:
    """Count, sum and products of rows around a shift; on the rows' device.

    Products are taken in the rows' dtype, which the shift keeps from cancelling, and summed in float64.

    Attributes:
        count: rows, or the sum of their weights.
        shift_H: what is taken off every row, the mean of the first ones; of the rows' dtype. None before these came.
        sum_H: of the shifted rows; float64.
        square_HH: of the products of the shifted rows; float64.

    Args:
        shift_H: where it is not to be found from the first rows.

    >>> rows_NH = torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.0, 4.0], [7.0, 0.0]]).double()
    >>> moments, other = Moments(), Moments()
    >>> moments.add(rows_NH[:1])
    >>> other.add(rows_NH[1:])
    >>> mean_H, covariance_HH = moments.merge(other).finish()
    >>> mean_H.tolist(), covariance_HH.tolist()
    ([4.0, 3.0], [[5.0, -2.0], [-2.0, 5.0]])
    """

    def __init__(self, shift_H: Tensor | None = None) -> None:
        self.count = 0.0
        self.shift_H = shift_H
        self.sum_H: Tensor | None = None
        self.square_HH: Tensor | None = None

    def add(self, rows_NH: Tensor, weights_N1: Tensor | None = None) -> None:
        """Add rows [N, H] of at least 32 bits, each with its weight [N, 1] (1 where there are none)."""
        if self.shift_H is None:
            self.shift_H = rows_NH.mean(0)
        rows_NH = rows_NH - self.shift_H
        weighted_NH = rows_NH if weights_N1 is None else weights_N1 * rows_NH
        self.count += len(rows_NH) if weights_N1 is None else float(weights_N1.sum())
        sum_H, square_HH = weighted_NH.sum(0).double(), (weighted_NH.T @ rows_NH).double()
        self.sum_H = sum_H if self.sum_H is None else self.sum_H.add_(sum_H)
        self.square_HH = square_HH if self.square_HH is None else self.square_HH.add_(square_HH)

    def merge(self, other: Moments) -> Moments:
        """Return the moments of the rows of both, around this one's shift; both stay as they are."""
        if other.sum_H is None or self.sum_H is None:
            return self.around(self.shift_H) if other.sum_H is None else other.around(other.shift_H)
        moved = other.around(self.shift_H)
        merged = Moments(self.shift_H)
        merged.count = self.count + moved.count
        merged.sum_H, merged.square_HH = self.sum_H + moved.sum_H, self.square_HH + moved.square_HH
        return merged

    def around(self, shift_H: Tensor | None) -> Moments:
        """Return the moments of the same rows around another shift."""
        moved = Moments(shift_H)
        moved.count, moved.sum_H, moved.square_HH = self.count, self.sum_H, self.square_HH
        if self.sum_H is None or shift_H is self.shift_H:
            return moved
        step_H = self.shift_H.double() - shift_H.double()
        cross_HH = torch.outer(self.sum_H, step_H)
        moved.square_HH = self.square_HH + cross_HH + cross_HH.T + self.count * torch.outer(step_H, step_H)
        moved.sum_H = self.sum_H + self.count * step_H
        return moved

    def of_all(self) -> Moments:
        """Return the moments of the rows of all processes that share images; this one stays as it is."""
        if sharing().count == 1 or self.sum_H is None:
            return self
        moved = self.around(from_first(self.shift_H))
        total = Moments(moved.shift_H)
        total.count, total.sum_H, total.square_HH = sum_of_all(self.count, moved.sum_H, moved.square_HH)
        return total

    def finish(self) -> tuple[Tensor, Tensor]:
        """Return the mean [H] and the centred covariance [H, H], float64, on the CPU; the products are used up."""
        count = max(self.count, 1.0)
        offset_H, square_HH = self.sum_H / count, self.square_HH
        self.square_HH = None
        covariance_HH = square_HH.div_(count).sub_(torch.outer(offset_H, offset_H))
        return (self.shift_H.double() + offset_H).cpu(), covariance_HH.cpu()

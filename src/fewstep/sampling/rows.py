"""The rows of a table: how a state and the latest model outputs make the next state.

A :class:`Row` has one number for all elements of a sample, a :class:`FieldRow` one for each.  Both say the same three
things: what they add to a scaled state, what they are on outputs that are kept in another scale, and what they are
when they also put right the step before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Row(NamedTuple):
    """``x' = a x + sum_j c[j] m_j + n z`` with the outputs ``m`` newest first; ``anchor`` is the weight of the noise
    prediction that the table keeps beside the history (:attr:`~fewstep.sampling.engine.Table.anchor`)."""

    a: float
    c: tuple[float, ...] = ()
    n: float = 0.0
    anchor: float = 0.0

    def add_to(self, new: Tensor, outputs: Iterable[Tensor]) -> Tensor:
        """The scaled state ``new``, in place, plus what the row adds of the outputs; it may reach back less far than
        they do."""
        for c, m in zip(self.c, outputs):  # noqa: B905
            new.add_(m, alpha=c)
        return new

    def on_scaled(self, scales: Sequence[float]) -> Row:
        """The row for outputs that are kept multiplied by ``scales``."""
        return self._replace(c=tuple(c / scale for c, scale in zip(self.c, scales)))  # noqa: B905

    def corrected(self, predictor: Row, corrector: Row) -> Row:
        """This row on the state that ``predictor`` led to, as if the step before had been made by ``corrector``.

        Both scale the same state by the same ``a``, so that the corrected state is the predicted one plus outputs that
        the history has: no other state is kept, and correcting and predicting are one update.
        """
        return self._replace(c=_corrected_weights(self, predictor, corrector))


class FieldRow(NamedTuple):
    """``x' = a x + sum_j c[j] m_j + b``, element by element: float64 tensors of the shape of one sample; ``n`` and
    ``anchor`` as in :class:`Row`."""

    a: Tensor
    c: tuple[Tensor, ...]
    b: Tensor
    n: float = 0.0
    anchor: float = 0.0

    def add_to(self, new: Tensor, outputs: Iterable[Tensor]) -> Tensor:
        for field, m in zip(self.c, outputs):  # noqa: B905
            new.addcmul_(field, m)
        return new.add_(self.b)

    def on_scaled(self, scales: Sequence[float]) -> FieldRow:
        return self._replace(c=tuple(c / scale for c, scale in zip(self.c, scales)))  # noqa: B905

    def corrected(self, predictor: FieldRow, corrector: FieldRow) -> FieldRow:
        weights = _corrected_weights(self, predictor, corrector)
        return self._replace(c=weights, b=self.b + self.a * (corrector.b - predictor.b))

    def placed(self, kind: torch.dtype, device: torch.device) -> FieldRow:
        """The same in the type and on the device of a state."""
        c = tuple(c.to(device, kind) for c in self.c)
        return self._replace(a=self.a.to(device, kind), c=c, b=self.b.to(device, kind))


AnyRow = Row | FieldRow


def _corrected_weights(row: AnyRow, predictor: AnyRow, corrector: AnyRow) -> tuple[Any, ...]:
    # the newest output is new to the predictor
    change: Iterable[tuple[Any, Any]] = zip_longest(corrector.c, (0.0, *predictor.c), fillvalue=0.0)
    weights: Iterable[tuple[Any, Any]] = zip_longest(row.c, (row.a * (c - p) for c, p in change), fillvalue=0.0)
    return tuple(own + other for own, other in weights)

"""UniPC: a predictor and a corrector that share their model calls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from fewstep.sampling.coefficients import DATA, Form, Levels, vandermonde
from fewstep.sampling.rows import Row
from fewstep.sampling.solvers.multistep import PredictorCorrector


@dataclass(frozen=True)
class UniPC(PredictorCorrector):
    """UniPC-p (Zhao et al. 2023, algorithms 5 to 8), p = 1, 2, 3, ...

    The predictor extrapolates the last p outputs; when the next output is there, the corrector redoes the step with it
    and the model is *not* called again, so order p + 1 costs one call a step.  Both solve

        sum_j c_j r_j^k = k! w_k,   k = 1, 2, ...

    for the weights ``c_j`` of ``m_j - m_0``, with outputs at ``r_j`` steps from the current one and ``w_k`` the exact
    weights of the derivatives.  ``variant`` is the paper's B(h): "bh1" is h, "bh2" is exp(h) - 1.  It acts through the
    paper's shortcut only, ``c = B / 2 r`` where there is a single node; "vary" solves there too (the paper's varying
    coefficients, appendix C).  ``corrector=False`` is UniP.  The last step, and a step of infinite length, are not
    corrected.  The official code's default of ``variant`` is "bh1".
    """

    centre: ClassVar[float] = 1.0

    p: int = 2
    variant: Literal["bh1", "bh2", "vary"] = "bh2"
    corrector: bool = True
    lower_order_final: bool = True
    form: Form = DATA

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.p < 1:
            raise ValueError(f"UniPC: p={self.p} must be at least 1")

    @property
    def order(self) -> int:
        """Of a run: the first step is of first order, of second when it is corrected; the last is not corrected, and of
        first order with ``lower_order_final``."""
        return min(self.p + 1, 2 if self.lower_order_final else 3) if self.corrector else min(self.p, 2)

    @property
    def outputs(self) -> int:
        return self.p

    def rows(self, levels: Levels, i: int, outputs: int) -> tuple[Row, Row | None]:
        """Predictor and corrector of step ``i``; no corrector where the step has infinite length."""
        s, t, h = levels.point(i), levels.point(i + 1), levels.h(i)
        a, c = self.form.exact(s, t)
        if math.isinf(h):
            return Row(a, (c,)), None
        w = self.form.step(s, t, outputs)[1]
        half = (h * self.form.front(t) if self.variant == "bh1" else w[0]) / 2
        moments = [math.factorial(k) * value for k, value in enumerate(w)][1:]

        def weights(nodes: Sequence[float]) -> list[float]:
            """The coefficients of ``m_j - m_0`` for outputs at ``nodes``."""
            if len(nodes) == 1 and self.variant != "vary":
                return [half / nodes[0]]
            return [v / r for v, r in zip(vandermonde(nodes, moments[: len(nodes)]), nodes, strict=True)]

        nodes = [(levels.log_snr[i - j] - levels.log_snr[i]) / h for j in range(1, outputs)]  # the past is negative
        past = weights(nodes)
        predictor = Row(a, (c - sum(past), *past))
        if not self.corrector:
            return predictor, None
        *past, new = weights([*nodes, 1.0])
        return predictor, Row(a, (new, c - sum(past) - new, *past))

"""Hooks: the places around the one model call where something may be changed.

A guided or thresholded model is a :class:`~fewstep.denoisers.Denoiser` of its own and needs no hook.  Hooks are for
what depends on where the sampler stands: a time shift on the network's input, replacing the measured part of a
prediction, mixing the history, noise after a step, a start state other than noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Hooks:
    """Each hook is a function or None (nothing happens).  ``k`` counts model calls, ``i`` steps, both from 0.  All but
    ``start`` see a state in half precision, and what was predicted from it, in float32.

    * ``start(x)``: the start state -> the state that sampling starts from.
    * ``input(k, x, t)``: state and times ``[B]`` -> what the denoiser is given.
    * ``output(k, x0, x, t)``: the prediction ``x0`` made at ``(x, t)`` -> the prediction that the solver uses (and,
      for solvers in noise prediction, that the noise is derived from).
    * ``history(k, m, past)``: the output about to be stored, and those stored before it, newest first -> what is
      stored in its place.  Solvers in noise prediction store ``sigma eps``.
    * ``after(i, x)``: the state that step ``i`` ends in -> the state that the next step starts from.  What a
      predictor-corrector puts right of step ``i`` comes with step ``i + 1``.
    """

    start: Callable[[Tensor], Tensor] | None = None
    input: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    output: Callable[[int, Tensor, Tensor, Tensor], Tensor] | None = None
    history: Callable[[int, Tensor, Sequence[Tensor]], Tensor] | None = None
    after: Callable[[int, Tensor], Tensor] | None = None


NO_HOOKS = Hooks()

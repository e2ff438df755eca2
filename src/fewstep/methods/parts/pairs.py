"""The pair store: noise and the teacher's own output for it, made once, kept with the label."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from fewstep.conditions import Cond, rows, to
from fewstep.data.dataset import Dataset
from fewstep.denoisers import Denoiser
from fewstep.grids import karras
from fewstep.methods.method import Show
from fewstep.methods.parts.teacher_steps import edm_like, heun_step
from fewstep.randomness import Rng


@torch.no_grad()
def solve_heun(teacher: Denoiser, noise: Tensor, steps: int, cond: Cond = None) -> Tensor:
    """The teacher's output for standard normal ``noise``: Heun steps on a Karras grid in the EDM frame, the last one to
    clean data by the denoiser itself; ``2 steps - 1`` calls."""
    schedule = edm_like(teacher.schedule)
    view = teacher.on(schedule)
    times = karras(schedule, steps)
    x = schedule.prior(noise)
    for t, s in pairwise(times[:-1]):
        x = heun_step(view, x, t.expand(len(x)), s.expand(len(x)), cond)
    return view(x, times[-2].expand(len(x)), cond)


def make_pairs(teacher: Denoiser, n: int, cond: Cond, steps: int, seed: int, show: Show, batch: int = 256) -> Dataset:
    """``n`` pairs of ODE output and standard normal ``noise``, with the conditions of ``n`` samples beside."""
    rng = Rng(seed, "pairs")
    device = next(teacher.parameters(), torch.zeros(())).device
    noises, outputs = [], []
    for start in range(0, n, batch):
        noise = rng.normal(min(batch, n - start), *teacher.shape).to(device)
        given = to(rows(cond, slice(start, start + batch)), device)
        outputs.append(solve_heun(teacher, noise, steps, given).cpu())
        noises.append(noise.cpu())
        show(min(start + batch, n), n)
    return Dataset("pairs", torch.cat(outputs), cond, columns={"noise": torch.cat(noises)})

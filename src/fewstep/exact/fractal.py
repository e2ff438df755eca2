"""Two branching classes in the plane: a law with thin structure at every scale, in closed form.

In the spirit of the toy of Karras et al. 2024 ("Guiding a Diffusion Model with a Bad Version of Itself"),
with trees of our own: the two classes cross at their trunks and in their crowns, so that guidance away from the other
class (classifier-free guidance) and guidance away from a worse model (autoguidance) do visibly different things.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fewstep.exact.mixture import GaussianMixture
from fewstep.randomness import Rng
from fewstep.schedules import Schedule

#: Where the two trunks start and the directions in which they grow, in turns.
TRUNKS = (((-0.18, -0.97), 0.15), ((0.18, -0.97), 0.35))
LENGTH = 0.63  # of a trunk
#: A fork: by how many turns a child leaves its parent's direction, and how long it is beside it.
FORK = ((-0.105, 0.72), (0.085, 0.66))
CURL = 0.006  # turns by which a branch bends from one Gaussian to the next
THICKNESS = 0.025  # standard deviation across a branch, beside the square root of its length


class Fractal(GaussianMixture):
    """A tree of bent, forking branches for each of two classes, as a mixture of Gaussians strung along the branches.

    ``levels`` generations make ``2^levels - 1`` branches of ``per_branch`` Gaussians in each class; a branch weighs as
    its area, so that the density along the tree is about the same everywhere.  ``branch`` ``[K]`` numbers the branches
    of all classes.  Coordinates lie within 1.4 of the origin, with a standard deviation of about 0.45.  ValueError for
    counts below 1.
    """

    branch: Tensor

    def __init__(self, schedule: Schedule, levels: int = 7, per_branch: int = 8) -> None:
        if levels < 1 or per_branch < 1:
            raise ValueError(f"levels={levels}, per_branch={per_branch}: a tree needs at least one of each")
        means: list[Tensor] = []
        covariances: list[Tensor] = []
        areas: list[float] = []
        labels: list[int] = []
        for label, (root, direction) in enumerate(TRUNKS):
            mirror = 1.0 if label == 0 else -1.0  # the second tree forks and bends the other way
            growing = [(torch.tensor(root, dtype=torch.float64), direction, LENGTH)]
            for _ in range(levels):
                tips = []
                for start, turn, length in growing:
                    step = length / per_branch
                    for _ in range(per_branch):
                        along = torch.tensor([math.cos(2 * math.pi * turn), math.sin(2 * math.pi * turn)]).double()
                        across = torch.stack([-along[1], along[0]])
                        means.append(start + step / 2 * along)
                        covariances.append(
                            (step / 2) ** 2 * torch.outer(along, along)
                            + THICKNESS**2 * length * torch.outer(across, across)
                        )
                        start = start + step * along
                        turn += mirror * CURL
                    areas.append(length**1.5)
                    labels.append(label)
                    tips += [(start, turn + mirror * bend, length * share) for bend, share in FORK]
                growing = tips
        branch = torch.arange(len(areas)).repeat_interleave(per_branch)
        weights = torch.tensor(areas, dtype=torch.float64)
        super().__init__(
            schedule, weights[branch], torch.stack(means), torch.stack(covariances), torch.tensor(labels)[branch]
        )
        self.register_buffer("branch", branch)

    def branch_of(self, x: Tensor, cond: Tensor) -> Tensor:
        """The most probable branch ``[B]`` of points ``x`` of the classes ``cond``, as data."""
        return self.branch[self.posterior(x, 0.0, cond).argmax(1)]

    def branch_shares(self, label: int) -> Tensor:
        """The probability of every branch in a class, ``[branches of all classes]``."""
        shares = torch.zeros(int(self.branch.max()) + 1, dtype=torch.float64)
        return shares.index_add(0, self.branch, self.log_weights[label].exp())


def density_level(world: GaussianMixture, cond: Tensor, share: float, rng: Rng) -> float:
    """The log-density that a ``share`` of the law lies above, from exact samples of the classes ``cond`` ``[n]``: the
    edge of the smallest region that holds that share."""
    drawn = world.sample(len(cond), rng, cond)
    return float(torch.quantile(world.log_density(drawn, 0.0, cond), 1 - share))

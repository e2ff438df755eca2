"""DPM-OT as one model: a denoiser with the transport that its samples start from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from fewstep.denoisers import Cond, NetworkDenoiser
from fewstep.randomness import Rng
from fewstep.sampling.coefficients import Levels
from fewstep.sampling.dpm_ot.expressway import Expressway, express
from fewstep.sampling.named import named_solver, named_times


class TransportedModel(nn.Module):
    """A denoiser and an :class:`~fewstep.sampling.dpm_ot.expressway.Expressway`, from the end of which ``solver`` goes
    on.

    The targets, heights, weights and labels of the transport, as :meth:`Expressway.tensors` gives them, are buffers: a
    file holds them beside the weights of the network.  ``time`` and ``source`` (a name) are the expressway's.
    """

    def __init__(
        self,
        denoiser: NetworkDenoiser,
        tensors: Mapping[str, Tensor],
        time: float,
        source: str = "gaussian",
        solver: str = "unipc",
    ) -> None:
        super().__init__()
        named_solver(solver)
        if tuple(tensors["targets"].shape[1:]) != denoiser.shape:
            raise ValueError(
                f"the targets have the shape {list(tensors['targets'].shape[1:])}, the denoiser makes "
                f"{list(denoiser.shape)}"
            )
        self.denoiser = denoiser
        self.time, self.source, self.solver = time, source, solver
        self.held = tuple(tensors)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    @classmethod
    def of(cls, denoiser: NetworkDenoiser, expressway: Expressway, solver: str = "unipc") -> TransportedModel:
        """The model of an expressway; ValueError when it was made for another schedule than the denoiser's."""
        if denoiser.schedule != expressway.schedule:
            raise ValueError(f"the expressway is on {expressway.schedule}, the denoiser on {denoiser.schedule}")
        return cls(denoiser, expressway.tensors(), expressway.time, expressway.potential.source.name, solver)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.denoiser.shape

    @property
    def classes(self) -> int | None:
        """None where the targets have labels: a sample's class is then that of the target it lands on."""
        return None if "labels" in self.held else self.denoiser.classes

    @property
    def expressway(self) -> Expressway:
        """The transport, with the tensors of this model."""
        tensors = {name: self.get_buffer(name) for name in self.held}
        return Expressway.of(tensors, self.denoiser.schedule, self.time, self.source)

    def calls(self, steps: int | None = None) -> int:
        """The network calls of so many steps."""
        solver = named_solver(self.solver)
        schedule = replace(self.denoiser.schedule, t_max=self.time)
        return solver.table(Levels.of(schedule, named_times(schedule, solver, steps, None))).calls

    def sample(
        self, n: int, cond: Cond = None, *, steps: int | None = None, seed: int = 0, noise: Tensor | None = None
    ) -> Tensor:
        """``n`` samples ``[n, *shape]``: the transport of ``noise`` (draws from its source, by default from ``seed``),
        then ``steps`` steps of the solver.

        Where targets have labels and ``cond`` is None, a sample has the class of the target that it lands on.
        """
        road = self.expressway
        if noise is None:
            noise = road.draw(n, Rng(seed, "sample", device=self.get_buffer("targets").device))
        rng = Rng(seed, "steps", device=noise.device)
        return express(self.denoiser, road, noise, solver=self.solver, steps=steps, cond=cond, rng=rng)[0]

"""A diffusers scheduler that plays the table of one of fewstep's solvers.

``num_inference_steps`` are the solver's steps; ``timesteps`` has one entry per network call, so a solver of k stages
has about k entries a step, and ``order = k``: what img2img and inpainting pipelines multiply a step by to find where
to begin.  States are ``alpha x_0 + sigma eps``, as in the DDPM family of schedulers and in flow matching.

Made by :func:`fewstep.hub.as_scheduler`.  A pipeline's folder names the class of its scheduler, and diffusers imports
no library that a folder names, only its own classes and what has been imported before: a folder that named ours would
not open without fewstep, nor with it before its import.  So every scheduler carries the name of the class that it
replaces and a config that this class reads, with the solver beside it; ``isinstance`` tells them apart.
"""

# mypy: disable-error-code="attr-defined,misc"

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fewstep.hub.scheduler_config import DEFAULTS, OWN, plain_config, plain_grid, read, replaced, written
from fewstep.hub.scheduler_grids import Layout
from fewstep.hub.schedulers import BETA_TABLE, read_scheduler
from fewstep.hub.trajectory import Trajectory, independent, part, same_times, times_of
from fewstep.sampling.coefficients import Levels
from fewstep.sampling.engine import Solver
from fewstep.sampling.solvers.stochastic import DDIM
from fewstep.schedules import align

#: The tensors of the replaced scheduler that pipelines look into.
TABLES = ("betas", "alphas", "alphas_cumprod", "final_alpha_cumprod")


@dataclass
class SolverSchedulerOutput(SchedulerOutput):
    """``prev_sample``, the state of the next call, and ``pred_original_sample``, the data prediction (clipped or
    thresholded where the config says so)."""

    pred_original_sample: Tensor | None = None


class PipelineNoise:
    """A pipeline's generator (or list of them, or None: PyTorch's own) as the source of a solver's fresh noise."""

    def __init__(self, generator: Any, kind: torch.dtype) -> None:
        self.generator, self.kind = generator, kind

    def normal_like(self, x: Tensor) -> Tensor:
        return randn_tensor(x.shape, generator=self.generator, device=x.device, dtype=self.kind).to(x.dtype)

    def increment(self, x: Tensor, start: float, end: float) -> Tensor:
        return self.normal_like(x)


class SolverScheduler(SchedulerMixin, ConfigMixin):
    """A solver and a grid in the place of ``original``, a scheduler of diffusers that says what the model is.

    Made by :func:`fewstep.hub.as_scheduler` and, from a config or a folder, by :meth:`from_config` and
    ``from_pretrained``.  After ``set_timesteps``: ``timesteps`` (as the network sees them) and ``sigmas`` (noise levels
    ``sigma / alpha``, or t for flow matching, with that of the end) per network call, the ``levels`` of the grid, and
    ``init_noise_sigma``, the standard deviation of the state at the first call for data of unit variance: 1 on
    variance-preserving schedules, as in diffusers.  ``config`` is that of the replaced scheduler with ``solver``,
    ``grid`` and ``clean`` beside it.
    """

    #: The class of diffusers whose place a subclass takes.
    replaces: ClassVar[Any] = None

    def __init__(self, original: Any, solver: str | dict | Solver, grid: str | list[float] | None, clean: bool) -> None:
        self.original, self.reading = original, read_scheduler(original)
        if original.config.get("invert_sigmas"):
            raise ValueError(
                f"{type(original).__name__}: invert_sigmas=True is not read, only networks whose time rises with the "
                "noise"
            )
        self.solver = read(solver)
        if self.solver.adaptive:
            raise ValueError(
                f"solver={solver!r} finds its steps as it goes, a scheduler needs them before: take another, such as "
                "'abm' or 'dpm3'"
            )
        if self.reading.prediction.noise:
            self.solver = self.solver.for_noise_prediction()
        self.order = self.solver.calls(1)
        self.grid, self.clean = grid, clean
        self.layout = Layout(original, self.reading, self.solver, grid, clean)
        config = plain_config(original.config, type(original).__name__)
        self.register_to_config(**config, solver=solver, grid=grid, clean=clean)
        vars(self).update({name: value for name, value in vars(original).items() if name in TABLES})
        self.num_inference_steps: int | None = None
        self.timesteps = original.timesteps
        self.sigmas = vars(original).get("sigmas", torch.empty(0))
        self.init_noise_sigma = 1.0
        self._begin_index: int | None = None
        self._step_index: int | None = None

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Ours from its config, or from that of any scheduler whose model fewstep reads; ``kwargs`` override it.

        Raises ValueError when the config names no such class, on a prediction and a table of betas that contradict
        each other, and on an unknown solver or grid.
        """
        asked = {key: kwargs.pop(key) for key in OWN if key in kwargs}
        original, unused = replaced(config, cls.replaces, kwargs)
        own = {**DEFAULTS, **{key: config[key] for key in OWN if key in config}, **asked}
        kind: Any = type(original)
        made = in_place_of(kind)(original, written(own["solver"]), plain_grid(own["grid"]), own["clean"])
        return (made, unused) if return_unused_kwargs else made

    def to_json_string(self) -> str:
        """The config as it is saved; ValueError when the solver holds tensors."""
        if not isinstance(self.config["solver"], str | dict):
            raise ValueError(
                f"{type(self.solver).__name__} holds tensors, which a scheduler's config cannot: save the pipeline "
                "with the scheduler that was replaced, and call as_scheduler again"
            )
        return str(super().to_json_string())

    def __repr__(self) -> str:
        return f"SolverScheduler({self.solver!r}, {self.replaces.__name__}, grid={self.grid!r}, clean={self.clean})"

    def __reduce__(self) -> Any:
        return blank, (self.replaces,), vars(self)

    @property
    def step_index(self) -> int | None:
        """The index of the next call; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at a later call (img2img, inpainting)."""
        self._begin_index = begin_index

    def __len__(self) -> int:
        return self.layout.training_steps

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Lay out the calls of ``num_inference_steps`` steps, or of the given ``timesteps`` (as the network sees them)
        or ``sigmas`` (as the replaced scheduler takes them), one a step.  ``mu`` is the resolution-dependent shift.
        Flow pipelines whose network is told the times before the shift (CogView4) give both.

        Raises ValueError when the times do not fall or leave the schedule's range, or a given number of steps
        contradicts given times.
        """
        steps, given = num_inference_steps, timesteps if timesteps is not None else sigmas
        both = timesteps is not None and sigmas is not None
        if given is not None:
            steps = len(given)
            if num_inference_steps not in (None, steps) or (both and not self.layout.unshifted(timesteps, sigmas)):
                raise ValueError(
                    f"num_inference_steps={num_inference_steps}, timesteps={timesteps}, sigmas={sigmas}: give one of "
                    "them, as many times as steps, or (flow matching) timesteps that are the sigmas before the shift"
                )
        if steps is None:
            raise ValueError("set_timesteps: give num_inference_steps, timesteps or sigmas")
        self.levels = self.layout.levels(int(steps), None if both else timesteps, sigmas, mu)
        if self.levels.steps < self.solver.least_steps:
            raise ValueError(
                f"num_inference_steps={self.levels.steps} are too few for {type(self.solver).__name__}, which needs "
                f"{self.solver.least_steps} to reach its order; take more, or a solver of lower order (unipc, dpmpp-2m)"
            )
        self.num_inference_steps = self.levels.steps
        self.table = self.solver.table(self.levels)
        self._places = [(i, j) for i, step in enumerate(self.table.steps) for j in range(len(step.stages))]
        self._times = times_of(self.table)
        self._lay_out(device, self.layout.shift(mu) if both else 1.0)
        self._begin_index = self._step_index = None
        self._runs: deque[Trajectory | None] = deque()
        self._before: tuple[int, tuple[Trajectory | None, ...], int] = (-1, (), 0)

    def _lay_out(self, device: str | torch.device | None, shift: float) -> None:
        """What the pipeline and the network see of the calls; ``shift`` is what the network is not told of."""
        schedule, prediction = self.reading.schedule, self.reading.prediction
        times = torch.tensor(self._times, dtype=torch.float64)
        skip, out, c_in = prediction.coefficients(schedule, times)
        self._skip, self._out, self._in = skip.tolist(), out.tolist(), c_in.tolist()
        seen = prediction.time(schedule, times / (shift - (shift - 1) * times))
        labels = self.reading.labels(seen)
        self._labels = labels.tolist()
        self.timesteps = labels.to(device)
        alpha, sigma = schedule.alpha(times), schedule.sigma(times)
        self.init_noise_sigma = float((alpha[0] ** 2 + sigma[0] ** 2).sqrt())
        end = self.levels.point(-1)
        levels = [*self.reading.sigma(alpha, sigma).tolist(), self.reading.sigma(end.alpha, end.sigma)]
        self.sigmas = torch.tensor(levels, dtype=torch.float32)

    def _index(self, timestep: Any) -> int:
        """The index of the current call, which must be at ``timestep``."""
        if self.num_inference_steps is None:  # along all the times that the replaced scheduler begins with
            self.set_timesteps(timesteps=self.timesteps.unique().flip(0))
        time, calls = float(timestep), len(self._labels)
        if self._step_index is None:
            k = self._find(time) if self._begin_index is None else self._begin_index
            if not 0 <= k < calls:
                raise ValueError(f"begin_index={k} must lie in 0 .. {calls - 1}")
            self._step_index, self._runs = k, deque(self._runs_from(k))
        k = self._step_index
        if k == self._before[0]:  # set back by the pipeline, to make the last step again
            self._set_back()
        if k >= calls:
            raise ValueError(f"step() at timestep {time:g}: all {calls} calls were made; call set_timesteps again")
        if not _same_label(time, self._labels[k]):
            raise ValueError(f"step() at timestep {time:g}, but call {k} of {calls} is at {self._labels[k]:g}")
        return k

    def _set_back(self) -> None:
        """To what was before the last step."""
        _, runs, made = self._before
        if runs[0] is not None and runs[0].made > made:
            runs[0].undo()
        self._runs = deque(runs)

    def _find(self, time: float) -> int:
        found = [k for k, label in enumerate(self._labels) if _same_label(time, label)]
        if not found:
            raise ValueError(f"timestep {time:g} is not one of this run's: {self._labels}")
        # a level that ends one step and opens the next is the opening
        return min(found, key=lambda k: self._places[k][1])

    def _runs_from(self, k: int) -> list[Trajectory | None]:
        """How to get from the level of call ``k`` to the end in the calls that are left; None is a call whose result is
        not used.

        A solver with a memory starts afresh, with its own warm-up, on the rest of the grid.  A pipeline that
        counts ``order`` calls for every step may begin inside one (solvers of several stages take a single call from
        pure noise): then one exact first-order step goes to its end.
        """
        step, stage = self._places[k]
        if k == 0:
            return [Trajectory(self.table)]
        if stage == 0 and independent(self.table, step):
            return [Trajectory(self.table, step)]
        time = self._times[k]
        if time in self.levels.times:
            table = self.solver.table(part(self.levels, self.levels.times.index(time)))
            if same_times(times_of(table), self._times[k:]):
                return [Trajectory(table)]
        after = k + len(self.table.steps[step].stages) - stage
        target = self._times[after] if after < len(self._times) else self.levels.times[-1]
        if stage == 0 or time < target:
            raise ValueError(f"{type(self.solver).__name__} cannot begin at call {k}: its rows reach back before it")
        rest = self._runs_from(after) if after < len(self._times) else []
        if time == target:
            return [None] * (after - k) + rest
        bridge = DDIM().table(Levels.of(self.reading.schedule, torch.tensor([time, target], dtype=torch.float64)))
        return [Trajectory(bridge), *[None] * (after - k - 1), *rest]

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The network's input: the state itself, scaled for EDM models."""
        if not self.reading.scales_input:
            return sample
        k = self._index(timestep)
        return sample * self._in[k]

    def _get_conditioning_c_in(self, sigma: Tensor) -> Tensor:
        """The scale of an EDM network's input, for pipelines that scale other states than the sample."""
        scale: Tensor = self.original._get_conditioning_c_in(sigma)
        return scale

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = None,
        generator: Any = None,
        pred_original_sample: Tensor | None = None,
        return_dict: bool = True,
    ) -> SolverSchedulerOutput | tuple[Tensor, Tensor]:
        """The state at the next call and the data prediction, from the network's output at this one.

        Calls must be made in the order of ``timesteps``, each once.  Who sets ``_step_index`` one back makes the last
        one again, if need be with several copies of the batch before (both halves of guidance).  ``generator`` is where
        stochastic solvers draw from.  ``pred_original_sample`` takes the place of the network's output.  ``eta`` and
        ``use_clipped_model_output`` are arguments that some pipelines always pass: the first must be 0, the second is
        always the case here.
        """
        if eta:
            raise ValueError(f"eta={eta} of the pipeline's call is not used; take as_scheduler('ddim:eta={eta}', ...)")
        k = self._index(timestep)
        kind = torch.float64 if sample.dtype == torch.float64 else torch.float32
        if pred_original_sample is None:
            output = model_output[:, : sample.shape[1]].to(kind)  # what follows is a learned variance
            x0 = self._bounded(self._skip[k] * sample.to(kind) + self._out[k] * output)
        else:
            x0 = pred_original_sample.to(kind)
        run = self._runs[0]
        self._before = (k, tuple(self._runs), 0 if run is None else run.made)
        if run is not None and run.base is not None and len(sample) > len(run.base):
            run = self._runs[0] = run.repeated(len(sample) // len(run.base))
        after = sample if run is None else run.advance(x0, sample, PipelineNoise(generator, sample.dtype))
        if run is None or run.over:
            self._runs.popleft()
        self._step_index = k + 1
        x0 = x0 if kind == sample.dtype else x0.to(sample.dtype)
        return SolverSchedulerOutput(after, x0) if return_dict else (after, x0)

    def _bounded(self, x0: Tensor) -> Tensor:
        """The data prediction, thresholded or clipped where the config says so (pipelines change that in place)."""
        config = vars(self.config)
        if config.get("thresholding"):
            bound = torch.quantile(x0.flatten(1).abs(), config["dynamic_thresholding_ratio"], dim=1)
            bound = align(bound.clamp(1, config["sample_max_value"]), x0)
            return x0.clamp(-bound, bound) / bound
        clip = config["clip_sample_range"] if config.get("clip_sample") else None
        return x0 if clip is None else x0.clamp(-clip, clip)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Data noised to ``timesteps`` (one, or one per sample)."""
        schedule, times = self.reading.schedule, self.layout.time(timesteps)
        slack = 1e-6 * schedule.t_max  # timesteps are float32
        if float(times.min()) < schedule.t_min - slack or float(times.max()) > schedule.t_max + slack:
            raise ValueError(
                f"timesteps {timesteps.min():g} .. {timesteps.max():g} are outside of the schedule, whose times are "
                f"{schedule.t_min:g} .. {schedule.t_max:g}"
            )
        return schedule.add_noise(original_samples, noise.to(original_samples), times.to(original_samples.device))

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """:meth:`add_noise` under the name that flow pipelines use."""
        return self.add_noise(sample, noise, timestep)


@cache
def in_place_of(kind: Any) -> type[SolverScheduler]:
    """The subclass that takes the place of ``kind`` under its name.  ``compatibles`` are those that keep the model."""
    same = [name for name in kind._compatibles if name in BETA_TABLE and not kind.__name__.startswith("CogVideoX")]
    own = {"__module__": kind.__module__, "__doc__": SolverScheduler.__doc__, "replaces": kind, "_compatibles": same}
    return type(kind.__name__, (SolverScheduler,), own)


def blank(kind: Any) -> SolverScheduler:
    """One without its attributes, for copies."""
    made = in_place_of(kind)
    return made.__new__(made)


def _same_label(a: float, b: float) -> bool:
    """Whether two timesteps are one, up to the float32 that they went through."""
    return abs(a - b) <= 1e-4 * (1 + abs(a))

"""The scheduler that exported students carry: a table of numbers, one row a network call.

This file is copied, as it stands, into every exported folder that no scheduler of diffusers can serve, and runs there
without fewstep.  A few-step student is linear in its network's output, whatever it was trained on, so one call is::

    y'  =  state y  +  network F(y, times)  +  noise n,        n ~ N(0, I)

in the units of the network's input; the last row gives the data.  The first input is ``start`` times the standard
normal noise of the pipeline.  A row may hold further ``inputs`` of the network, constants by name.
"""

# mypy: disable-error-code="attr-defined,misc"

from __future__ import annotations

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor


class StudentScheduler(SchedulerMixin, ConfigMixin):
    """Plays the plans of a student.

    ``plans`` maps a number of steps (as a string, for JSON) to ``{"start": number, "calls": [{"times": [t] or [t, s],
    "state": a, "network": b, "noise": d, "inputs": {..}}, ...]}``, where ``inputs`` may be absent.  ``set_timesteps``
    takes a number of steps that has a plan, other numbers raise ValueError; values of ``sigmas``, ``timesteps`` and
    ``mu`` are not used, only their count, because some pipelines always pass them.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(self, plans: dict | None = None) -> None:
        self.plans = {int(steps): plan for steps, plan in (plans or {}).items()}
        if not self.plans:
            raise ValueError("StudentScheduler: plans is empty; it must map numbers of steps to tables")
        self.set_timesteps(min(self.plans))

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, timesteps=None, mu=None) -> None:
        given = sigmas if sigmas is not None else timesteps
        steps = len(given) if num_inference_steps is None else int(num_inference_steps)
        if steps not in self.plans:
            raise ValueError(f"num_inference_steps={steps}: this student has plans for {sorted(self.plans)} steps")
        plan = self.plans[steps]
        self.num_inference_steps = steps
        self.start, self.calls = plan["start"], plan["calls"]
        times = torch.tensor([call["times"] for call in self.calls], dtype=torch.float32, device=device)
        self.timesteps = times[:, 0] if times.shape[1] == 1 else times
        self.step_index = 0

    def set_begin_index(self, begin_index: int = 0) -> None:
        self.step_index = begin_index

    def scale_model_input(self, sample: torch.Tensor, timestep=None) -> torch.Tensor:
        return sample * self.start if self.step_index == 0 else sample

    @property
    def inputs(self) -> dict[str, float]:
        """Further inputs of the network at the next call."""
        return self.calls[self.step_index].get("inputs", {})

    def step(self, model_output, timestep, sample, generator=None, return_dict: bool = True):
        call = self.calls[self.step_index]
        after = call["state"] * self.scale_model_input(sample) + call["network"] * model_output
        if call["noise"]:
            noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
            after = after + call["noise"] * noise
        self.step_index += 1
        return SchedulerOutput(prev_sample=after) if return_dict else (after,)

    def __len__(self) -> int:
        return max(self.plans)

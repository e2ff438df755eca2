"""The last healthy weights of a run, for runs that an alarm ends: a collapse leaves something to use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fewstep.training.groups import Groups


class Healthy:
    """The weights and averages of a run at its last record that set no alarm off (before the first record: as it
    started), with the step of that record.  ``ended`` says that an alarm has put them back and ended the run."""

    def __init__(self, run: Groups) -> None:
        self.ended = False
        self.keep(run)

    def keep(self, run: Groups) -> None:
        """Take the weights as they are now."""
        self.step, self.updates = run.steps, run.averaged_updates()
        self.weights = {name: tensor.detach().clone() for name, tensor in run.weights().items()}

    def put_back(self, run: Groups) -> None:
        """Give the run its healthy weights, and end it."""
        run.put(self.weights, self.updates)
        self.ended = True

    def state(self) -> dict[str, Tensor]:
        """The weights as a checkpoint holds them."""
        return {f"healthy/{name}": tensor for name, tensor in self.weights.items()}

    def counters(self) -> dict[str, Any]:
        """What else it holds."""
        return {"step": self.step, "averages": self.updates, "ended": self.ended}

    def load(self, run: Groups, tensors: Mapping[str, Tensor], counters: Mapping[str, Any] | None) -> None:
        """Take up what a checkpoint holds for a run that has taken up the rest; one that was written while alarms did
        not end runs holds nothing, and the run's weights stand for it."""
        if counters is None:
            self.keep(run)
            return
        self.step, self.updates, self.ended = counters["step"], counters["averages"], counters["ended"]
        self.weights = {name: tensors[f"healthy/{name}"] for name in self.weights}

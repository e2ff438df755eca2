"""What a stage starts from: the teacher, the data, and models by the part they play (their *role*).

A stage hands on what it made (:meth:`~fewstep.methods.method.Method.hands_on`) and the user may bring models of their
own; a method asks for a role and gets the newest model that plays it::

    start.teacher                  the user's teacher, the same in all stages
    start.model("teacher")         what a stage before made of it, if one did
    start.network("student")       a trainable copy: what a stage before made, else what the user brought (of any
                                   architecture), else of the teacher
    start.network("critic", low_rank=LowRank(16))      one that trains low-rank weights, on the memory of the model
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fewstep.conditions import Cond
from fewstep.data.dataset import Dataset, Samples
from fewstep.denoisers import Denoiser, networks_in
from fewstep.methods.parts.stores import Store, made_now
from fewstep.models import model_of
from fewstep.models.networks import describe_network, fresh_network, redrawn_network, reference_networks
from fewstep.networks.inputs import with_inputs
from fewstep.networks.lora import LowRank, add_factors, factors_in, frozen
from fewstep.schedules import Schedule

#: The role of networks that a run uses and does not make.
CRITIC = "critic"
#: The name of the target time as an input of networks, and the size up to which times are embedded as they are.
TARGET, SMALL = "s", 10.0
#: A store as a data set, made now or found where it was left; the seed is that of the stage that asks.
Keep = Callable[[Store, int], Dataset]


@dataclass(frozen=True)
class Start:
    """What a stage starts from.

    ``made`` are the models that stages before handed on and ``given`` those that the user brought, by role.  The models
    are frozen and not the user's own objects: a method may put them into its networks as they are.  ``keep`` is where
    stores are kept.  ``low_rank`` asks for networks that train low-rank weights, see :meth:`network`.  Networks are
    made without data, for which one zero stands.
    """

    teacher: Any
    data: Samples = field(default_factory=lambda: Dataset("none", torch.zeros(1, 1)))
    seed: int = 0
    made: Mapping[str, nn.Module] = field(default_factory=dict)
    given: Mapping[str, nn.Module] = field(default_factory=dict)
    keep: Keep = made_now
    low_rank: LowRank | None = None

    def model(self, role: str = "teacher") -> Any:
        """The model in a role, as it is: made by a stage before, else brought, else the teacher of this stage."""
        for models in (self.made, self.given):
            if role in models:
                return models[role]
        return self.made.get("teacher", self.teacher)

    def network(
        self,
        role: str = "student",
        *,
        extras: tuple[str, ...] = (),
        beside: int = 0,
        on: Schedule | None = None,
        low_rank: LowRank | None = None,
    ) -> Any:
        """A trainable copy of the model in a role, a denoiser seen on the schedule ``on``.  Its network takes further
        inputs ``extras`` and a second sample of ``beside`` channels; new ones start at zero: the copy starts as the
        model.

        With ``low_rank`` (by default what the run asks for, but for a critic, which it does not make) only low-rank
        weights and new inputs train, and the others lie on the memory of the model.  A model that has low-rank weights
        goes on with those.

        ValueError naming the role when it makes other samples than the teacher, is no denoiser, or has a network that
        cannot take the inputs.
        """
        found = denoiser_in(self.model(role), role, extras)
        model_of(found).check_beside(self.teacher, role)
        asked = low_rank or (None if role == CRITIC else self.low_rank)
        new = asked is not None and not factors_in(found)
        network = frozen(found) if new else copy.deepcopy(found)
        if extras or beside:
            give_inputs(network, role, extras, beside)
        if new and asked is not None:
            try:
                add_factors(network, asked, self.seed)
            except ValueError as error:
                raise ValueError(f"the {role}: {error}") from None
        network.requires_grad_(True)
        return network if on is None else network.on(on)

    def fresh(self, net: nn.Module, k: int = 0) -> Any:
        """A trainable network like ``net``, the ``k``-th one, with first weights from the seed of this stage: built
        anew from its description, or anybody's layers drawn again.  TypeError for layers that cannot be."""
        words = (self.seed, "fresh", k)
        if type(net) in reference_networks():
            return fresh_network(describe_network(net), *words)
        return redrawn_network(net, *words).requires_grad_(True)

    def store(self, what: Store) -> Dataset:
        """What a stage trains on, made once for all stages that ask for the same."""
        return self.keep(what, self.seed)

    def condition(self) -> Cond:
        """One row of the data's conditions; None where there are none."""
        return self.data.conditions(torch.tensor([0]))

    def apart(self) -> Start:
        """The same with models of its own, for networks that are changed in place."""
        made, given = ({k: copy.deepcopy(m) for k, m in models.items()} for models in (self.made, self.given))
        return dataclasses.replace(self, teacher=copy.deepcopy(self.teacher), made=made, given=given)


def denoiser_in(model: nn.Module, role: str, extras: tuple[str, ...] = ()) -> Any:
    """What a training starts from in a model of any kind, which may have a network of the inputs ``extras``; ValueError
    naming the role where there is nothing."""
    found = model_of(model)
    try:
        return found.start(extras) if extras else found.teacher()
    except (ValueError, TypeError) as error:
        raise ValueError(f"the {role}: {error}") from None


def give_inputs(denoiser: Denoiser, role: str, extras: tuple[str, ...], beside: int) -> None:
    """Widen the networks in a denoiser; the target time counts as large as the time that each is told."""
    for part in networks_in(denoiser):
        latest = torch.tensor(part.schedule.t_max, dtype=torch.float64)
        size = float(part.prediction.time(part.schedule, latest).abs())
        spans = {name: size if name == TARGET and size > SMALL else 1.0 for name in extras}
        try:
            part.net = with_inputs(part.net, spans, beside)
        except ValueError as error:
            raise ValueError(f"the {role}: {error}") from None


def teacher_in(model: nn.Module, name: str = "the teacher") -> Any:
    """A model that can teach; ValueError naming it for a student, whose network is no denoiser any more."""
    found = model_of(model)
    if found.plans is not None and found.tokens is None:
        calls = ", ".join(map(str, found.plans))
        raise ValueError(
            f"{name} is a student of {calls} calls, not a denoiser, and cannot teach: name the teacher that made it, "
            "and give the student in the role 'student' to go on from its weights"
        )
    return denoiser_in(model, "teacher")

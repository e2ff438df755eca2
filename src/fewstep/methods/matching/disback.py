"""DisBack: Distribution Backtracking (Zhang et al. 2024, arXiv 2408.15991).

At the start of score distillation the teacher's score is asked for where the untrained student's samples lie, and
there it is worth little.  DisBack builds a road from one to the other, whatever the method of distillation, its *host*.

*Degradation recording*: a copy of the teacher is trained on the samples of the frozen initial student, and its weights
are kept at equal intervals: a path of denoisers from the teacher ``s_0`` to ``s_M``, the score of the student::

    E  w || s'(x_t) - x ||^2,      x = G_0(z),      s' from s_0 = teacher to s_M

*Distribution backtracking*: the host's losses with ``s_(M-1), ..., s_1, s_0`` in place of the teacher, one after the
other, and a critic that starts as ``s_M``; the last target is the teacher and stays.

Read against SYZhang0805/DisBack.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from fewstep.conditions import Cond
from fewstep.data.dataset import Samples
from fewstep.denoisers import Denoiser
from fewstep.methods.matching.dmd2 import DMD2
from fewstep.methods.method import Batch, Method, Networks, Paper, Progress, Question, Recipe, Stage, System, Update
from fewstep.methods.parts.host import Host, check_critic
from fewstep.methods.start import Start
from fewstep.ranges import Least, Share, Within


class RecordedPath(Denoiser):
    """A denoiser that is one of several, ``nodes[at]``; whoever sees it (under guidance, on another schedule) sees the
    one of the moment."""

    def __init__(self, nodes: Sequence[Denoiser]) -> None:
        first = nodes[0]
        super().__init__(first.schedule, first.shape, first.classes)
        self.nodes = nn.ModuleList(nodes)
        self.at = 0

    @property
    def node(self) -> Denoiser:
        node: Denoiser = self.nodes[self.at]  # type: ignore[assignment]
        return node

    @property
    def null(self) -> Cond:
        return self.node.null

    def forward(self, x: Tensor, t: Tensor | float, cond: Cond = None, **extras: Tensor) -> Tensor:
        made: Tensor = self.node(x, t, cond, **extras)
        return made

    def affine(self, x: Tensor, t: Tensor, cond: Cond = None, **extras: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.node.affine(x, t, cond, **extras)

    def label(self, t: Tensor, x: Tensor) -> Tensor:
        return self.node.label(t, x)

    def features(self, x: Tensor, t: Tensor | float, cond: Cond = None) -> Tensor:
        return self.node.features(x, t, cond)

    @property
    def feature_shape(self) -> tuple[int, ...]:
        return self.node.feature_shape


class Recorder(nn.Module):
    """What a network has been: copies of its weights, taken one after the other; how many is a part of its state."""

    taken: Tensor

    def __init__(self, network: nn.Module, copies: int) -> None:
        super().__init__()
        self.nodes = nn.ModuleList(copy.deepcopy(network) for _ in range(copies))
        self.register_buffer("taken", torch.zeros((), dtype=torch.int64))
        self.known: int | None = None  # the same number, so that a device is asked for it once only

    @torch.no_grad()
    def take(self, network: nn.Module, due: int) -> None:
        """Copy the weights until ``due`` copies are taken, or all."""
        self.known = int(self.taken) if self.known is None else self.known
        for node in list(self.nodes)[self.known : due]:
            held, new = ([*module.parameters(), *module.buffers()] for module in (node, network))
            for kept, now in zip(held, new, strict=True):
                kept.copy_(now)
            self.known += 1
            self.taken += 1


@dataclass(frozen=True)
class DegradationRecording(Method):
    """The first stage: the teacher's copy on its way to the score of the initial student, recorded ``nodes`` times.

    It is the host's own critic, trained by the host's own updates, while the student is held.
    """

    name: ClassVar[str] = "degradation-recording"
    paper: ClassVar[Paper] = Paper(
        "Distribution Backtracking Builds A Faster Convergence Trajectory for Diffusion Distillation", "2408.15991",
        "verified",
        ("rates, clipping and warm-up of both stages are the host's (the released scripts have 5e-7 for both stages on "
         "SDXL)",
         "shares of a budget in place of numbers of iterations; `backtracking` takes a larger share of short runs (a "
         "tenth there), and so does `recording` (a hundredth there)",
         "the optimizers start anew in the second stage and go on at a switch of the target (neither is said)",
         "nodes are whole networks; the released code can record low-rank factors"),
    )  # fmt: skip
    healthy: ClassVar[dict[str, str]] = {
        "critic/denoising": "falls in the first stage, to where the student's samples are known: a fall that goes on "
        "at its end asks for a larger share of recording",
    }
    roles: ClassVar[tuple[str, ...]] = ("student",)

    host: Annotated[Host, "the method of distillation around which this is put"] = Host(DMD2())  # noqa: RUF009
    nodes: Annotated[int, Least(1), "recorded denoisers, at equal intervals"] = 10

    def sources(self, start: Start) -> Mapping[str, Samples]:
        return self.host.method.sources(start)

    def networks(self, start: Start) -> Networks:
        nets = self.host.method.networks(start)
        check_critic(self.host.method, nets)
        # the last node is the critic itself
        modules = {**dict(nets.named_children()), "record": Recorder(nets.critic, self.nodes - 1)}
        return Networks(modules, {"critic": nets.groups["critic"]}, moved=("record",))

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update | Question]:
        nets.record.take(nets.critic, int(self.nodes * progress.fraction + 1e-9))
        yield from self.host.method.updates(nets, batch, progress)

    def student(self, nets: Networks) -> Denoiser:
        """The teacher at its most degraded."""
        degraded: Denoiser = nets.critic
        return degraded

    def hands_on(self, nets: Networks) -> Mapping[str, nn.Module]:
        """The nodes between teacher and critic, and all that the critic's group has learned."""
        nets.record.take(nets.critic, self.nodes)  # a run may have ended before the last one was due
        return {"path": nets.record.nodes} | {name: nets.get_submodule(name) for name in nets.groups["critic"].modules}


@dataclass(frozen=True)
class Backtracking(Method):
    """The second stage: the host, whose teacher is the recorded node of the moment, in reverse.

    Without a first stage it is the host.
    """

    name: ClassVar[str] = "backtracking"
    paper: ClassVar[Paper] = DegradationRecording.paper
    healthy: ClassVar[dict[str, str]] = {
        "student/matching_norm": "about as large at every switch of the target, and falling between two "
        "(student/score_gap with some hosts); a leap at the last switch asks for a shorter recording or more nodes",
    }
    roles: ClassVar[tuple[str, ...]] = ("student",)

    host: Annotated[Host, "the method of distillation around which this is put"] = Host(DMD2())  # noqa: RUF009
    backtracking: Annotated[Share, "share of this stage over which the target walks back to the teacher"] = 0.2

    def sources(self, start: Start) -> Mapping[str, Samples]:
        return self.host.method.sources(start)

    def networks(self, start: Start) -> Networks:
        recorded: Any = start.made.get("path", ())
        path = RecordedPath([start.teacher.native(), *recorded])
        # all else that a host may ask for is as without us
        held = {"teacher": start.model("teacher"), "student": start.model("student")}
        begin = dataclasses.replace(start, teacher=path, made={**start.made, **held})
        nets = self.host.method.networks(begin)
        check_critic(self.host.method, nets)
        if not any(part is path for part in nets.modules()):
            raise ValueError(f"host {self.host.method.name}: it asks no teacher on the way, there is nothing to walk")
        for name in nets.groups["critic"].modules:
            if name in start.made:
                nets.get_submodule(name).load_state_dict(start.made[name].state_dict())
        nets.add_module("path", path)
        return nets

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update | Question]:
        nets.path.at = self.node(len(nets.path.nodes), progress.fraction)
        yield from self.host.method.updates(nets, batch, progress)

    def node(self, nodes: int, fraction: float) -> int:
        """Which of the nodes is the target, from the last one down to 0, the teacher, when this part of the budget is
        used."""
        if fraction >= self.backtracking:
            return 0
        return nodes - 1 - int((nodes - 1) * fraction / self.backtracking + 1e-9)

    def student(self, nets: Networks) -> nn.Module:
        return self.host.method.student(nets)

    def hands_on(self, nets: Networks) -> Mapping[str, nn.Module]:
        return self.host.method.hands_on(nets)


@dataclass(frozen=True)
class DisBack(Recipe):
    """The whole recipe: a path from the teacher to the initial student, and a host that walks it back.

    ``nodes = 0`` is the host itself.
    """

    name: ClassVar[str] = "disback"
    paper: ClassVar[Paper] = DegradationRecording.paper
    system: ClassVar[System] = System(
        "DisBack", 2024, "matching", "teacher", "the host's",
        "records how a teacher degrades into the student and walks that path back, around any distillation by scores",
    )  # fmt: skip
    roles: ClassVar[tuple[str, ...]] = ("student",)

    host: Annotated[Host, "the method of distillation around which this is put"] = Host(DMD2())  # noqa: RUF009
    nodes: Annotated[int, Least(0), "recorded denoisers, at equal intervals; 0 is the host alone"] = 10
    recording: Annotated[float, Within(0.001, 0.9), "share of the budget for recording them"] = 0.1
    backtracking: Annotated[Share, "share of the rest over which the target walks back to the teacher"] = 0.2

    def stages(self) -> list[Stage]:
        if not self.nodes:
            return [Stage(self.host.method)]
        first, second = DegradationRecording(self.host, self.nodes), Backtracking(self.host, self.backtracking)
        return [Stage(first, self.recording), Stage(second, 1 - self.recording)]

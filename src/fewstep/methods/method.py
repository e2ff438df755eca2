"""What a method is: an objective, told to the trainer as a generator of updates.

A method is a frozen dataclass of hyper-parameters whose defaults are the paper's, with three functions: which
networks it owns, the updates of one iteration, and what it gives to the user at the end.  ``updates`` is a generator:
alternation, update ratios and adversarial steps read top to bottom, what comes after a ``yield`` sees the network
already moved, and a test drives it without a trainer.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

from torch import Tensor, nn

from fewstep.conditions import Cond
from fewstep.data.dataset import Samples
from fewstep.denoisers import gradients
from fewstep.methods.alarm import Alarm
from fewstep.methods.optimizer import Optimizer
from fewstep.methods.paper import Paper as Paper
from fewstep.methods.paper import System as System
from fewstep.methods.start import Start
from fewstep.models.model import Task
from fewstep.networks.lora import frozen_names
from fewstep.randomness import Rng
from fewstep.values import check_fields


@dataclass(frozen=True)
class Batch:
    """One part of a training batch.

    ``x`` are samples ``[B, ...]`` with their conditions ``cond`` and their further ``columns`` by name (the noise of a
    pair store).  ``of`` are the batches of the method's further sources, each in an order of its own.  Training without
    data has no ``x`` but a ``shape`` ``[B, ...]``: ValueError when a method reads it.
    """

    samples: Tensor | None
    cond: Cond
    rng: Rng
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    of: Mapping[str, Batch] = field(default_factory=dict)
    shape: tuple[int, ...] = ()

    @property
    def x(self) -> Tensor:
        if self.samples is None:
            raise ValueError("this method reads samples, and the run was given none: its data has conditions only")
        return self.samples

    @property
    def n(self) -> int:
        """The number of samples."""
        return self.shape[0] if self.samples is None else len(self.samples)

    def normal(self) -> Tensor:
        """Standard normal of the shape and type of the samples; float32 where there are none."""
        return self.rng.normal(*self.shape) if self.samples is None else self.rng.normal_like(self.samples)

    def column(self, name: str) -> Tensor:
        """A further column; ValueError when the data has none of this name."""
        if name not in self.columns:
            raise ValueError(f"this method reads '{name}' beside each sample, and the data has no such column")
        return self.columns[name]


@dataclass(frozen=True)
class Progress:
    """Where a run stands when an iteration starts: iterations done, samples seen, part of the budget used [0, 1)."""

    step: int = 0
    samples: int = 0
    fraction: float = 0.0


@dataclass(frozen=True)
class Update:
    """ "Minimise ``loss`` in the parameters of ``group``, now"; several groups move by one loss.

    ``logs`` are scalars for the record.  ``then`` is called once after the step, on every process: what the method
    itself moves (a target network) moves there, so that accumulation does not move it several times.
    """

    group: str | tuple[str, ...]
    loss: Tensor
    logs: Mapping[str, Tensor | float] = field(default_factory=dict)
    then: Callable[[], None] | None = None

    @property
    def groups(self) -> tuple[str, ...]:
        return (self.group,) if isinstance(self.group, str) else self.group


class WholeBatch(Protocol):
    """What puts a batch together again from the parts of micro-batches and processes."""

    def mean(self, parts: Sequence[Tensor]) -> Tensor: ...

    def rows(self, parts: Sequence[Tensor]) -> Tensor: ...


@dataclass(frozen=True)
class Question(ABC):
    """What a method asks about the whole batch: all micro-batches and processes, which therefore must ask in lock step.

    No gradient flows through the answer.  With one part it is ``value`` itself.
    """

    value: Tensor

    @abstractmethod
    def answer(self, values: Sequence[Tensor], batch: WholeBatch) -> Tensor:
        """The answer, from the values of this process's micro-batches."""


@dataclass(frozen=True)
class Mean(Question):
    """ "What is the mean of ``value`` over the whole batch?": ``m = yield Mean(h.mean())``, a tensor of any shape."""

    def answer(self, values: Sequence[Tensor], batch: WholeBatch) -> Tensor:
        return batch.mean(values)


@dataclass(frozen=True)
class Rows(Question):
    """ "What are the rows of ``value`` in the whole batch?": ``everyone = yield Rows(f)``, ``[B, ...]`` for this part's
    ``[b, ...]``, in an order that is not promised."""

    def answer(self, values: Sequence[Tensor], batch: WholeBatch) -> Tensor:
        return batch.rows(values)


def alone(updates: Iterator[Update | Question]) -> Iterator[Update]:
    """The updates of a batch in one part: the answer to every :class:`Question` is the value that was asked about."""
    answer: Tensor | None = None
    while (asked := advance(updates, answer)) is not None:
        answer = None
        if isinstance(asked, Question):
            answer = asked.value.detach()
        else:
            yield asked


def advance(updates: Iterator[Update | Question], answer: Tensor | None) -> Update | Question | None:
    """What a generator of updates yields next, given the answer to the question that it waits for; None at its end."""
    try:
        return next(updates) if answer is None else cast("Generator[Update | Question, Tensor]", updates).send(answer)
    except StopIteration:
        return None


class Networks(nn.Module):
    """The named networks of a method (attribute access), the groups that train and the names that get an EMA.

    Modules that no group names are frozen here, their dropout off; ``moved`` names those among them that the method
    moves itself (a target network), which a checkpoint must hold too and whose dropout is on as in what they follow.
    ``base`` are the names of the weights in all of them that never move (:mod:`fewstep.networks.lora`).
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        groups: Mapping[str, Optimizer],
        ema: tuple[str, ...] = (),
        moved: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.groups = dict(groups)
        self.ema = ema
        self.moved = moved
        trained = {name for group in groups.values() for name in group.modules}
        unknown = (trained | set(ema)) - set(modules)
        if unknown:
            raise ValueError(f"groups name networks that do not exist: {sorted(unknown)}")
        self.base = frozen_names(modules)
        for name, module in modules.items():
            module.requires_grad_(name in trained)
            module.train(name in trained or name in moved)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    @contextmanager
    def held(self, group: str) -> Iterator[None]:
        """A block in which gradients pass through the networks of a group to their inputs only.

        The update is yielded inside, so that it holds until the backward pass is done: checkpointed layers are computed
        again there, and must find their parameters as they were.
        """
        with ExitStack() as stack:
            for name in self.groups[group].modules:
                stack.enter_context(gradients(self.get_submodule(name), "input"))
            yield

    def weights(self, name: str) -> list[nn.Parameter]:
        """The parameters of a network, without the base of low-rank ones."""
        named = self.get_submodule(name).named_parameters()
        return [p for path, p in named if f"{name}.{path}" not in self.base]

    def group_parameters(self, group: str) -> list[nn.Parameter]:
        """The parameters that an update of ``group`` moves."""
        return [p for name in self.groups[group].modules for p in self.weights(name)]

    def state(self, name: str) -> dict[str, Tensor]:
        """The tensors of a network that a run keeps: its state, without the base of low-rank weights."""
        whole = self.get_submodule(name).state_dict()
        return {path: tensor for path, tensor in whole.items() if f"{name}.{path}" not in self.base}

    def load(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Put a :meth:`state` back; RuntimeError when it is another's."""
        held = self.get_submodule(name).state_dict()
        base = {path: tensor for path, tensor in held.items() if f"{name}.{path}" in self.base}
        self.get_submodule(name).load_state_dict({**base, **tensors})


@dataclass(frozen=True)
class Recipe(ABC):
    """Stages run one after the other, each starting from what those before handed on; every :class:`Method` is a recipe
    of one stage.  Subclasses are frozen dataclasses of hyper-parameters; ValueError for impossible ones."""

    name: ClassVar[str]
    paper: ClassVar[Paper]
    #: The row of the catalogue, for the class that stands for its paper.
    system: ClassVar[System | None] = None
    #: What kind of model it starts from (:data:`fewstep.models.model.Task`).
    task: ClassVar[Task] = "generation"
    #: What a user may bring besides the teacher, by the part it plays: "student" (where the student's weights start),
    #: "guide", "reward".
    roles: ClassVar[tuple[str, ...]] = ()
    #: Settings of the trainer that mean nothing to it, with what is said to those who give another than the usual one.
    unused: ClassVar[Mapping[str, str]] = {}

    def __post_init__(self) -> None:
        check_fields(self)

    def check_task(self, task: Task, called: str) -> None:
        """ValueError for a model of another kind than it starts from."""
        if task != self.task:
            raise ValueError(f"{self.name} starts from a model for {self.task}, this is {called}")

    def check_given(self, given: Mapping[str, object]) -> None:
        """ValueError for a model in a role that the recipe has no use for."""
        for role in given:
            if role not in self.roles:
                uses = f"it uses: {', '.join(self.roles)}" if self.roles else "it starts from the teacher alone"
                raise ValueError(f"{self.name} has no use for a {role} ({uses})")

    @abstractmethod
    def stages(self) -> list[Stage]:
        """The methods in order, each with its share of the budget."""


@dataclass(frozen=True)
class Method(Recipe):
    """An objective."""

    #: What a healthy run looks like: name of a logged scalar -> one sentence for the user.
    healthy: ClassVar[Mapping[str, str]] = {}
    #: When a run goes wrong: name of a logged scalar -> the alarm that it sets off, with what to change then.
    unstable: ClassVar[Mapping[str, Alarm]] = {}

    def stages(self) -> list[Stage]:
        return [Stage(self)]

    @abstractmethod
    def networks(self, start: Start) -> Networks:
        """The networks of this method, made from (copies of) the models that it starts from."""

    def sources(self, start: Start) -> Mapping[str, Samples]:
        """What this method trains on, by name; by default the data.  A store of pairs is asked for here."""
        return {"data": start.data}

    @abstractmethod
    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update | Question]:
        """The updates of one iteration, one at a time, and questions about the whole batch between them.

        A method with a critic leaves its student's updates out where ``nets`` has no such group: the critic is trained
        alone then, by a method around it (:mod:`fewstep.methods.matching.disback`).
        """

    def enough(self, nets: Networks, progress: Progress) -> bool:
        """Whether training is over although the budget is not used; a method that is to stop early says so here."""
        return False

    @abstractmethod
    def student(self, nets: Networks) -> nn.Module:
        """What training made, a model of any kind, from the trained networks (or their EMA, put in place by the
        trainer)."""

    def hands_on(self, nets: Networks) -> Mapping[str, nn.Module]:
        """What the stages after this one start from, by role, from the same networks as :meth:`student`.  A stage that
        makes a better teacher hands on a "teacher"."""
        return {"student": self.student(nets)}


@dataclass(frozen=True)
class Stage:
    """A method and its share of the budget, relative to the others'; a stage whose share is 0 is left out, and one that
    needs a model in a role which nobody brings."""

    method: Method
    share: float = 1.0
    needs: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.share < math.inf:
            raise ValueError(f"{self.method.name}: share={self.share:g} of the budget must be finite, at least 0")

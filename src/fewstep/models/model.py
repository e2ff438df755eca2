"""What is loaded, trained, sampled, saved and compared: one set of questions for every model there is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from fewstep.conditions import leaves
from fewstep.data.dataset import Samples, Unlabelled
from fewstep.denoisers import Cond, Denoiser
from fewstep.extras import Input
from fewstep.language_models import Tokenizer
from fewstep.randomness import Rng
from fewstep.sampling.rollout import Student

#: Plain data, as config.json holds it.
Config = dict[str, Any]
#: What a model is for: making samples, telling their classes, continuing text, or being a data set itself.
Task = Literal["generation", "classification", "language", "data"]


class Model(ABC):
    """A module, most often one that makes samples, as commands, reports and files see it.

    A kind of model is a subclass: it knows the modules of the class ``wraps`` and stands in the table of
    :mod:`fewstep.models.kinds`.  ``kind`` is its name in config.json, and ``holds`` the schema of what else stands
    there ("" and nothing for what cannot be saved).  ``called`` is what messages call it, ``task`` what it is for.
    ``options`` are the arguments of :meth:`sample` that this kind takes beside conditions, steps and seed.
    """

    kind: ClassVar[str] = ""
    wraps: ClassVar[type[nn.Module]]
    holds: ClassVar[dict[str, Any]] = {}
    called: ClassVar[str]
    task: ClassVar[Task] = "generation"
    options: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, module: Any) -> None:
        self.module = module

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return tuple(self.module.shape)

    @property
    def classes(self) -> int | None:
        """The number of class labels, None for an unconditional model."""
        classes: int | None = self.module.classes
        return classes

    @property
    def tokens(self) -> int | None:
        """Of a model whose samples are whole numbers from 0 on: how many there are; None for real numbers."""
        return None

    @property
    def tokenizer(self) -> Tokenizer | None:
        """How it reads text; None for a model that reads none, or does not say."""
        return None

    @property
    def noun(self) -> str:
        """What it is called, without the article."""
        return self.called.partition(" ")[2]

    @property
    def inputs(self) -> Mapping[str, Input]:
        """The further inputs that sampling may set, by name; :meth:`sample` takes them beside the options."""
        return {}

    @property
    def planned(self) -> tuple[str, ...]:
        """The names of those that its plans set."""
        return ()

    @property
    def plans(self) -> tuple[int, ...] | None:
        """The numbers of steps that it has plans for, rising; None for a model that takes any number."""
        return None

    @property
    def usual_steps(self) -> int:
        """The steps that it samples in where nobody says how many."""
        return 10 if self.plans is None else self.plans[0]

    def check_steps(self, steps: int | None) -> None:
        """ValueError for a number of steps that there is no plan for."""
        if steps is not None and self.plans is not None and steps not in self.plans:
            raise ValueError(f"{steps}: this {self.noun} has plans for {', '.join(map(str, self.plans))} steps")

    @abstractmethod
    def sample(
        self,
        n: int,
        cond: Cond = None,
        *,
        steps: int | None = None,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        **options: Any,
    ) -> Tensor:
        """``n`` samples ``[n, *shape]``; labels are cycled where there are classes and ``cond`` is None."""

    @abstractmethod
    def sample_from(self, noise: Tensor, cond: Cond, *, steps: int | None, rng: Rng, **options: Any) -> Tensor:
        """Samples from standard normal ``noise`` ``[n, *shape]``, further noise from ``rng``; a model that starts from
        something else draws that from ``rng`` too."""

    @abstractmethod
    def calls(self, steps: int | None = None, **options: Any) -> int:
        """The network calls that a sample takes in so many steps (None: as :meth:`sample` does by default)."""

    def accepts(self, data: Samples) -> Samples:
        """The data as it is trained on them: without labels when it knows no conditions.

        ValueError when the samples are of another shape, or their conditions not of the model's kind.
        """
        model = self.module
        if tuple(data.shape) != tuple(model.shape):
            raise ValueError(f"data '{data.name}' has samples {list(data.shape)}, the model makes {list(model.shape)}")
        if model.classes:
            if data.classes is None:
                raise ValueError(
                    f"data '{data.name}' has no labels, the model knows {model.classes} classes: give every sample one "
                    "(-1 trains its unconditional branch)"
                )
            if data.classes > model.classes:
                raise ValueError(f"data '{data.name}' has {data.classes} classes, the model knows {model.classes}")
            return data
        if data.classes is None:
            return data
        if model.null is not None:
            takes = ", ".join(leaves(model.null))
            raise ValueError(f"data '{data.name}' has class labels, the model takes {takes}")
        return Unlabelled(data)

    def check_beside(self, teacher: Any, role: str) -> None:
        """ValueError naming the role for a model that does not go with the teacher."""
        model = self.module
        if tuple(model.shape) != tuple(teacher.shape):
            raise ValueError(
                f"the {role} makes samples {list(model.shape)}, the teacher {list(teacher.shape)}: they must agree"
            )
        if model.classes != teacher.classes:
            raise ValueError(f"the {role} knows {model.classes} classes, the teacher {teacher.classes}")

    def denoiser(self) -> Denoiser:
        """The denoiser that a solver can follow with the same samples in sight; ValueError saying why there is none."""
        raise ValueError(f"{self.called}, which samples in its own way")

    def teacher(self) -> Any:
        """What the next training starts from; ValueError or TypeError saying why there is nothing."""
        return self.denoiser()

    def start(self, extras: tuple[str, ...]) -> Any:
        """What a training goes on from whose network takes the further inputs ``extras``; errors as :meth:`teacher`."""
        return self.teacher()

    def student(self) -> Student:
        """The model as a flow map with plans; ValueError saying why it is none."""
        raise ValueError(f"{self.called}, which is no flow map along fixed times")

    def describe(self, model: Callable[[Any], Config], network: Callable[[nn.Module], Config]) -> Config:
        """Plain data from which :meth:`build` makes it again with fresh weights; the two functions describe the models
        and networks inside.  TypeError for what cannot be saved."""
        raise TypeError(
            f"cannot describe a {type(self.module).__name__}: only models whose networks are fewstep's or diffusers'"
        )

    @classmethod
    def build(cls, config: Config, model: Callable[[Config], Any], network: Callable[[Config], nn.Module]) -> Any:
        """The module that :meth:`describe` described; the two functions build the models and networks inside.
        ValueError for values that contradict each other."""
        raise TypeError(f"{cls.called} cannot be built from a description")


class Silent(Model):
    """A model that makes no samples: being asked for them is a ValueError."""

    def sample(
        self,
        n: int,
        cond: Cond = None,
        *,
        steps: int | None = None,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        **options: Any,
    ) -> Tensor:
        raise ValueError(f"{self.called}, which makes no samples")

    def sample_from(self, noise: Tensor, cond: Cond, *, steps: int | None, rng: Rng, **options: Any) -> Tensor:
        raise ValueError(f"{self.called}, which makes no samples")

    def calls(self, steps: int | None = None, **options: Any) -> int:
        raise ValueError(f"{self.called}, which makes no samples")

    def denoiser(self) -> Denoiser:
        raise ValueError(f"{self.called}, which makes no samples")

    def teacher(self) -> Any:
        return self.module

"""Teacher and students side by side: the same noise, the same labels, the same features, and what each costs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fewstep.data import Dataset, held_out
from fewstep.data import load as load_data
from fewstep.extras import check_given, listed
from fewstep.metrics import Estimate, Evaluator, Quality, accuracy, load_features
from fewstep.metrics.features import Features
from fewstep.models import Model, model_of
from fewstep.randomness import Rng
from fewstep.report import machine, page

if TYPE_CHECKING:
    from rich.table import Table

    from fewstep.report.runs import RunCourse

#: The teacher is measured at these numbers of steps, a student that takes any number at those.
TEACHER_STEPS = (1, 2, 4, 8, 16)
STUDENT_STEPS = (1, 2, 4)

Role = Literal["teacher", "student"]
Show = Callable[[float, str], None]  # share of the work done, what is next


@dataclass(frozen=True)
class Row:
    """One model at one number of steps.

    ``calls`` are network calls per picture, ``seconds`` wall time per picture (the fastest of the batches, which other
    work on the machine disturbed least).  ``pictures`` are the first samples, ``[shown, *shape]``.
    """

    model: str
    role: Role
    steps: int
    calls: int
    seconds: float
    quality: Quality
    pictures: Tensor = field(repr=False, compare=False)

    @property
    def accuracy(self) -> Estimate | None:
        """The share of samples recognised as the class that was asked for, with its standard error: Wilson's (1927),
        which does not claim to be 0 when every sample is recognised."""
        p, n = self.quality.accuracy, self.quality.n
        return None if p is None else Estimate(p, (p * (1 - p) / n + 1 / (4 * n**2)) ** 0.5 / (1 + 1 / n))


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare_models` found: the teacher's rows by rising steps, then the students'.

    ``floor`` is the Fréchet distance and ``real_accuracy`` the share recognised of real pictures.  ``real`` are real
    pictures in the order of the columns of the sheets, ``columns`` the class names over them (empty without classes).
    ``trained`` names the students that were trained for it (empty: all); others are shown and not crowned.  ``extras``
    are the further inputs that the students were sampled with.
    """

    data: str
    n: int
    seed: int
    solver: str
    rows: tuple[Row, ...]
    floor: Estimate
    columns: tuple[str, ...]
    real: Tensor = field(repr=False, compare=False)
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, str] = field(default_factory=dict)
    real_accuracy: float | None = None
    trained: tuple[str, ...] = ()
    extras: Mapping[str, float] = field(default_factory=dict)

    @property
    def teacher(self) -> list[Row]:
        """The teacher's rows, the one with the most steps last."""
        return [row for row in self.rows if row.role == "teacher"]

    @property
    def full(self) -> Row:
        """The teacher at its best: the cheapest of its rows within one standard error of its least distance."""
        least = min((row.quality.frechet for row in self.teacher), key=lambda found: found.value)
        enough = (row for row in self.teacher if row.quality.frechet.value <= least.value + least.error)
        return min(enough, key=lambda row: row.calls)

    @property
    def students(self) -> dict[str, list[Row]]:
        """Each student's rows by its name."""
        named: dict[str, list[Row]] = {}
        for row in self.rows:
            if row.role == "student":
                named.setdefault(row.model, []).append(row)
        return named

    def best(self, calls: int | None = None) -> Row | None:
        """The student row of smallest Fréchet distance, among those of ``calls`` calls (None: of the fewest); of
        students that were trained for this comparison, where there are any."""
        rows = [row for row in self.rows if row.role == "student"]
        rows = [row for row in rows if row.model in self.trained] or rows
        if not rows:
            return None
        calls = min(row.calls for row in rows) if calls is None else calls
        return min((row for row in rows if row.calls == calls), key=lambda row: row.quality.frechet.value, default=None)

    def to_json(self) -> str:
        """Every number as one JSON object; the pictures are left to the page."""
        rows = [
            {
                "model": row.model, "role": row.role, "steps": row.steps, "calls": row.calls,
                "seconds_per_image": row.seconds, "quality": json.loads(row.quality.to_json()),
                "accuracy": None if row.accuracy is None else asdict(row.accuracy),
            }
            for row in self.rows
        ]  # fmt: skip
        told: dict[str, Any] = {
            "data": self.data, "n": self.n, "seed": self.seed, "teacher_solver": self.solver,
            "extras": dict(self.extras),
            "floor": asdict(self.floor), "real_accuracy": self.real_accuracy, "rows": rows,
            "versions": dict(self.versions), "machine": dict(self.machine),
        }  # fmt: skip
        return json.dumps(told, indent=1)

    def table(self) -> Table:
        """The rows as a table for the terminal."""
        from rich.table import Table

        table = Table(title=f"{self.data}: {self.n} samples each, real against real {self.floor.value:.2f}")
        table.add_column("model")
        for title in ("steps", "calls", "Fréchet", "accuracy", "ms/image"):
            table.add_column(title, justify="right")
        best = self.best()
        last = None
        for row in self.rows:
            if last not in (None, row.role):
                table.add_section()
            last = row.role
            frechet, accuracy = row.quality.frechet, row.accuracy
            table.add_row(
                row.model, str(row.steps), str(row.calls),
                f"{frechet.value:.2f} ± {frechet.error:.2f}",
                "-" if accuracy is None else f"{accuracy.value:.3f} ± {accuracy.error:.3f}",
                f"{1000 * row.seconds:.2f}",
                style="bold" if row is best else None,
            )  # fmt: skip
        return table

    def save(
        self, path: str | Path = "report.html", *, runs: Sequence[RunCourse] = (), title: str = "", commands: str = ""
    ) -> Path:
        """Write the page (see :func:`fewstep.report.page.write`) and give back its path."""
        return page.write(self, Path(path), runs, title, commands)


def compare_models(
    teacher: Any,
    students: Sequence[Any] | Mapping[str, Any],
    data: str | Dataset = "fashion",
    n: int = 500,
    seed: int = 0,
    *,
    teacher_steps: Sequence[int] = TEACHER_STEPS,
    solver: str = "abm",
    features: str | Features | None = None,
    batch: int = 100,
    rows: int = 2,
    extras: Mapping[str, float] | None = None,
    show: Show = lambda done, what: None,
) -> Comparison:
    """Measure the teacher at ``teacher_steps`` and every student at all its plans.

    Models are of any kind in :data:`fewstep.models.KINDS`, and start from the same noise and labels.  ``students`` may
    be named by a mapping.  A student without plans of its own (a reflowed model) is sampled in 1, 2 and 4 steps, a
    denoiser as :func:`fewstep.sampling.sample` does by default; ``solver`` is the teacher's.  ``data`` is a name
    or path that :func:`fewstep.data.load` knows, with its held-out part as the reference; of a
    :class:`~fewstep.data.Dataset` a fifth, at most 2,000 samples, is put aside as the reference, whether or not
    the models were trained on it.  ``features`` is a name for :func:`fewstep.metrics.load_features`, by default the
    bundled classifier of the data, else pixels.  ``rows`` pictures of each class are kept for the page.  ``extras`` set
    further inputs of those students that take them.

    Raises ValueError when a model makes tokens, or samples of another shape than the data's, and for an input that no
    student takes, or out of its range.
    """
    named = dict(students) if isinstance(students, Mapping) else _numbered(students)
    leader = comparable("the teacher", teacher)
    followers = {name: comparable(name, model) for name, model in named.items()}
    given = {name: extras_of(model, extras or {}) for name, model in followers.items()}
    for name, value in (extras or {}).items():
        if not any(name in taken for taken in given.values()):
            known = "; ".join(f"{student}: {listed(model.inputs)}" for student, model in followers.items())
            raise ValueError(f"{name}={value:g}: no student here takes it ({known or 'there is none'})")
    train, reference = parts(data)
    for name, model in {"the teacher": leader, **followers}.items():
        if model.shape != train.shape:
            raise ValueError(f"{name} makes samples {list(model.shape)}, data '{train.name}' has {list(train.shape)}")
    features = features or _features(train)
    chosen = load_features(features) if isinstance(features, str) else features
    judge = Evaluator(reference, train, chosen, seed=seed)
    columns = min(teacher.classes or 10, 10)
    shown = rows * columns

    jobs: list[tuple[str, Role, Model, int]] = [
        ("teacher", "teacher", leader, k) for k in leader.plans or teacher_steps
    ]
    for name, model in followers.items():
        jobs += [(name, "student", model, k) for k in model.plans or STUDENT_STEPS]
    work = [4.0 + model.calls(steps) for _, _, model, steps in jobs]  # measuring quality costs about four calls
    found: list[Row] = []
    for i, (name, role, model, steps) in enumerate(jobs):
        show(sum(work[:i]) / sum(work), f"{name}, {steps} step{'s' * (steps > 1)}")
        way = solver if role == "teacher" else None
        own = given[name] if role == "student" else None
        x, labels, calls, seconds = timed_samples(model.module, steps, n, seed, way, batch, extras=own)
        pictures = x[_shown(n, labels, columns, shown)].clamp(-1, 1)
        found.append(Row(name, role, steps, calls, seconds, judge(x, labels), pictures))
    show(1.0, "done")
    device = next((p.device for p in teacher.parameters()), torch.device("cpu"))
    return Comparison(
        train.name, n, seed, solver, tuple(found), found[0].quality.floor,
        tuple(train.class_names[:columns]) if teacher.classes else (), real_pictures(reference, columns, rows, seed),
        machine.versions(), machine.machine(device), recognised(judge), extras=dict(extras or {}),
    )  # fmt: skip


def extras_of(model: Model, extras: Mapping[str, float]) -> dict[str, float]:
    """Those of ``extras`` that a model takes; ValueError for a value out of its range."""
    own = {name: value for name, value in extras.items() if name in model.inputs}
    check_given(model.inputs, own)
    return own


def comparable(name: str, model: Any) -> Model:
    """A model that can be measured; ValueError for what is no model, and for one that makes tokens."""
    try:
        found = model_of(model)
    except TypeError:
        raise ValueError(f"{name} is a {type(model).__name__}, which is no model") from None
    if found.tokens is not None:
        raise ValueError(f"{name} is {found.called}: its samples are tokens, and pictures are what is measured here")
    return found


def parts(data: str | Path | Dataset) -> tuple[Dataset, Dataset]:
    """``(training, reference)`` of what :func:`compare_models` was given."""
    if isinstance(data, str | Path):
        return load_data(data), load_data(data, "test")
    return held_out(data, min(max(len(data) // 5, 1), 2000))


@torch.no_grad()
def timed_samples(
    model: Any,
    steps: int,
    n: int,
    seed: int,
    solver: str | None,
    batch: int,
    *,
    extras: Mapping[str, float] | None = None,
) -> tuple[Tensor, Tensor | None, int, float]:
    """``(samples, labels, calls, seconds per sample)`` of ``n`` samples made ``batch`` at a time.

    ``solver`` is for models that take one (None: their default), ``extras`` are further inputs.  Noise and labels
    depend on ``n``, ``seed`` and the shape only, so all models get the same.
    """
    found = model_of(model)
    options: dict[str, Any] = dict(extras or {})
    if solver is not None and "solver" in found.options:
        options["solver"] = solver
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    noise = Rng(seed, "sample", device=device).normal(n, *model.shape)
    labels = torch.arange(n, device=device) % model.classes if model.classes else None
    made, seconds = [], []
    for start in range(0, n, batch):
        z = noise[start : start + batch]
        cond = None if labels is None else labels[start : start + batch]
        before = time.perf_counter()
        x = found.sample_from(z, cond, steps=steps, rng=Rng(seed, "rollout", start, device=device), **options)
        made.append((x.float() if x.is_floating_point() else x).cpu())  # the copy waits for the device
        seconds.append((time.perf_counter() - before) / len(z))
    calls = found.calls(steps, **options)
    return torch.cat(made), None if labels is None else labels.cpu(), calls, min(seconds)


def _numbered(students: Sequence[Any]) -> dict[str, Any]:
    if len(students) == 1:
        return {"student": students[0]}
    return {f"student {i + 1}": student for i, student in enumerate(students)}


def _features(data: Dataset) -> str:
    """The bundled classifier that was trained on such pictures, else pixels."""
    return data.name if data.name in ("digits", "fashion") else "pixels"


def recognised(judge: Evaluator) -> float | None:
    """The share of the reference that the classifier of the features recognises, None where there is none."""
    logits, labels = judge.features.classify(judge.real), judge.reference.labels
    return None if logits is None or labels is None else accuracy(logits, labels)


def _shown(n: int, labels: Tensor | None, columns: int, shown: int) -> Tensor:
    """The samples on the sheets: row by row, column ``c`` of class ``c`` where there are labels."""
    if labels is None:
        return torch.arange(min(shown, n))
    each = [(labels == c).nonzero()[: shown // columns, 0] for c in range(columns)]
    least = min(len(rows) for rows in each)
    return torch.stack([rows[:least] for rows in each], dim=1).flatten()


def real_pictures(reference: Dataset, columns: int, rows: int, seed: int) -> Tensor:
    """Held-out data in the order of the sheets."""
    order = Rng(seed, "real pictures").shuffled(len(reference))
    labels = None if reference.labels is None else reference.labels[order]
    return reference.read(order[_shown(len(reference), labels, columns, rows * columns)])

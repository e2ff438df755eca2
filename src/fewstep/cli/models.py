"""Models and data by the names that a command line gives."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fewstep import api
from fewstep.cli.errors import UserError, suggestion
from fewstep.data import Dataset, Samples
from fewstep.data import load as load_data
from fewstep.data.bundled import BUNDLED
from fewstep.denoisers import Denoiser
from fewstep.hub import native
from fewstep.hub.models import adapter_of
from fewstep.language_models import Tokenizer
from fewstep.methods.start import teacher_in
from fewstep.models import Model, model_of
from fewstep.runs.conditions import NO_DATA, embed_of, samples_of, tokenizer_of, without_data
from fewstep.runs.record import model_source, weights_sha256


@dataclass(frozen=True)
class Named:
    """A model with the name it was asked for by and the folder it lies in."""

    name: str
    folder: Path
    model: Any

    @property
    def kind(self) -> Model:
        """The model's kind, which knows what can be done with it."""
        return model_of(self.model)

    def denoiser(self, use: str) -> Denoiser:
        """What a solver can follow; :class:`UserError` saying what it is instead, and ``use``, what is wanted."""
        try:
            return self.kind.denoiser()
        except ValueError as error:
            raise UserError(f"'{self.name}' is {error}: {use}") from None

    @property
    def stem(self) -> str:
        """The name for folders and files: the last part, a run's own rather than "model"."""
        path = Path(self.name).resolve()
        return path.parent.name if path.name == "model" else path.name

    @property
    def sha256(self) -> str:
        return weights_sha256(self.folder)

    @cached_property
    def source(self) -> dict[str, Any]:
        """As a recipe knows it."""
        return model_source(self.name, self.model, self.folder)

    @property
    def data(self) -> str | None:
        """The data it was made from: its card's, else the bundled set of its name."""
        if (self.folder / "config.json").is_file():
            source = native.card(self.folder).get("data")
            if source is not None:
                named = str(source["source"] if isinstance(source, dict) else source)
                return None if named == NO_DATA else named
        return self.name if self.name in BUNDLED else None


def named_model(name: str, size: tuple[int, int] | None = None) -> Named:
    """The model behind a name; FileNotFoundError or ValueError when there is none or it is damaged.

    ``size`` is the height and width in pixels of what a pipeline is to make.
    """
    if not name.strip():
        raise UserError("the name of a model is empty")
    try:
        folder = api.locate(name)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}{suggestion(name, api.bundled_models())}") from None
    return Named(name, folder, api.load(name, size))


def check_conditions(named: Named) -> None:
    """:class:`UserError` for a network that needs conditions which no data set here holds, before it is trained on."""
    net = adapter_of(named.model)
    if net is not None and (missing := net.lacks()):
        raise UserError(f"'{named.name}': its network needs {net.listed(missing)}, which no data set here holds")


def named_data(name: str | None, model: Named) -> tuple[str, Samples]:
    """Data by name, "none" for conditions only; without one the data that ``model`` was made from."""
    source = name or model.data
    if source is None:
        raise UserError(
            f"--data is missing, and model '{model.name}' does not say what it was made from; methods that need no "
            f"data take '{NO_DATA}'"
        )
    if source == NO_DATA:
        return source, without_data(teacher_in(model.model, f"'{model.name}'"))
    return source, training_samples(source, embed_of(model.model) is not None, tokenizer_of(model.model))


def training_samples(source: str, captions: bool = False, tokenizer: Tokenizer | None = None) -> Samples:
    """The training part of a data set, with its captions where they are asked for, its text in the tokens of a
    ``tokenizer``, in memory where it fits."""
    try:
        return samples_of(source, captions, tokenizer)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}{suggestion(source, BUNDLED)}") from None


def training_data(source: str, tokenizer: Tokenizer | None = None) -> Dataset:
    """The training part of a data set."""
    try:
        return load_data(source, tokenizer=tokenizer)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}{suggestion(source, BUNDLED)}") from None


def teacher_of(found: Named, asked: str | None) -> Named | None:
    """The model to show beside a student: the one asked for, else the one that made it, if it is still there."""
    if asked is not None:
        return None if asked == "none" else named_model(asked)
    if not (found.folder / "config.json").is_file():
        return None
    start = native.card(found.folder).get("teacher")
    if start is None:
        return None
    name, weights = recorded(start) if isinstance(start, dict) else (start, None)
    if name is None:
        return None
    try:
        teacher = named_model(str(name))
    except FileNotFoundError as error:
        print(f"without its teacher's figures: {error}")
        return None
    if weights not in (None, teacher.sha256):
        print(f"without its teacher's figures: '{teacher.name}' has other weights than when it taught")
        return None
    return teacher


def recorded(start: dict[str, Any]) -> tuple[str | None, str | None]:
    """The name and the SHA-256 of the files of a teacher on a card, also on one of an earlier version."""
    return start.get("name", start.get("model")), start.get("sha256")


def parts_of(source: str, tokenizer: Tokenizer | None = None) -> tuple[Dataset, Dataset]:
    """``(training, reference)``: the held-out part where there is one, else a part put aside."""
    from fewstep.report.comparison import parts

    train = training_data(source, tokenizer)
    try:
        return train, load_data(source, "test", tokenizer=tokenizer)
    except (FileNotFoundError, ValueError):
        print(f"'{source}' has no held-out part: a fifth of it is the reference, which the model may have seen")
        return parts(train)

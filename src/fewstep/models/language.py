"""Language models, as commands, reports and files see them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

from fewstep.data.dataset import Samples, Unlabelled
from fewstep.data.text import alphabet_of
from fewstep.language_models import LanguageModel, NetworkLanguageModel, RestrictedVocabulary, Tokenizer
from fewstep.models.model import Config, Silent
from fewstep.models.networks import CAUSAL_NETWORK
from fewstep.schemas import Choice, Size

#: The texts whose tokens are looked at before a run begins.
CHECKED = 256


class AnyLanguageModel(Silent):
    """A language model of whatever make."""

    wraps: ClassVar[type[nn.Module]] = LanguageModel
    called = "a language model"
    task = "language"

    @property
    def shape(self) -> tuple[int, ...]:
        """The longest sequence."""
        made: LanguageModel = self.module
        return (made.length,)

    @property
    def classes(self) -> int | None:
        return None

    @property
    def tokens(self) -> int | None:
        tokens: int = self.module.vocabulary
        return tokens

    @property
    def tokenizer(self) -> Tokenizer | None:
        made: LanguageModel = self.module
        return made.tokenizer

    def accepts(self, data: Samples) -> Samples:
        made: LanguageModel = self.module
        if len(data.shape) != 1 or not 2 <= data.shape[0] <= made.length:
            raise ValueError(
                f"data '{data.name}' has samples {list(data.shape)}, the language model reads sequences [L] of 2 to "
                f"{made.length} tokens"
            )
        first = data.rows(slice(0, min(CHECKED, len(data)))).x
        if first is None or first.is_floating_point():
            raise ValueError(f"data '{data.name}' holds no tokens, which are whole numbers (int64)")
        if int(first.max()) >= made.vocabulary:
            raise ValueError(f"data '{data.name}': token {int(first.max())}, the language model has {made.vocabulary}")
        return data if data.classes is None else Unlabelled(data)

    def check_beside(self, teacher: Any, role: str) -> None:
        made: LanguageModel = self.module
        if made.vocabulary != teacher.vocabulary:
            raise ValueError(
                f"the {role} has {made.vocabulary} tokens, the teacher {teacher.vocabulary}: they must be the same"
            )


class NetworkLanguageKind(AnyLanguageModel):
    """A network seen as a language model."""

    kind = "language-model"
    wraps = NetworkLanguageModel
    holds: ClassVar[dict[str, Any]] = {
        "network": CAUSAL_NETWORK, "vocabulary": Size, "length": Size, "alphabet": str | None,
    }  # fmt: skip

    @property
    def tokenizer(self) -> Tokenizer | None:
        made: NetworkLanguageModel = self.module
        return super().tokenizer if made.alphabet is None else alphabet_of(made.alphabet)

    def describe(self, model: Callable[[Any], Config], network: Callable[[nn.Module], Config]) -> Config:
        made: NetworkLanguageModel = self.module
        return {
            "kind": self.kind, "network": network(made.net), "vocabulary": made.vocabulary, "length": made.length,
            "alphabet": made.alphabet,
        }  # fmt: skip

    @classmethod
    def build(cls, config: Config, model: Callable[[Config], Any], network: Callable[[Config], nn.Module]) -> Any:
        inside = config["network"]
        for field in ("vocabulary", "length"):
            if inside[field] != config[field]:
                raise ValueError(f"the language model's {field} is {config[field]}, its network's {inside[field]}")
        return NetworkLanguageModel(network(inside), config["vocabulary"], config["length"], config["alphabet"])


class RestrictedVocabularyKind(AnyLanguageModel):
    """A draft of a few tokens of a large vocabulary; which they are stands among its tensors."""

    kind = "restricted-vocabulary"
    wraps = RestrictedVocabulary
    holds: ClassVar[dict[str, Any]] = {
        "inner": Choice("kind", {NetworkLanguageKind.kind: NetworkLanguageKind.holds}), "vocabulary": Size,
    }  # fmt: skip

    def describe(self, model: Callable[[Any], Config], network: Callable[[nn.Module], Config]) -> Config:
        made: RestrictedVocabulary = self.module
        return {"kind": self.kind, "inner": model(made.inner), "vocabulary": made.vocabulary}

    @classmethod
    def build(cls, config: Config, model: Callable[[Config], Any], network: Callable[[Config], nn.Module]) -> Any:
        inner = model(config["inner"])
        return RestrictedVocabulary(inner, torch.arange(inner.vocabulary - 1), config["vocabulary"])

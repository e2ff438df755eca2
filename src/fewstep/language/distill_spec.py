"""DistillSpec: a draft model is distilled to agree with its target, so that speculative decoding accepts more of it.

Zhou et al. 2023, "DistillSpec: Improving Speculative Decoding via Knowledge Distillation" (arXiv 2310.08461).  With
texts y after prompts x from a source G, the target's law p and the draft's q::

    minimise  E_(x, y)~G  1/|y| sum_t D(p(. | x, y_<t) || q(. | x, y_<t))

G is the data's own text, the target's, the draft's own (on-policy) or a mixture, chosen for each batch.  D is a forward
or reverse KL, a Jensen-Shannon divergence, or the total variation, whose mean on the target's text is exactly what
speculative decoding rejects.  No gradient flows through the sampling of a text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from fewstep.data.dataset import Dataset, Samples, epoch_indices
from fewstep.digests import model_sha256
from fewstep.divergences import Divergence, masked_mean, total_variation
from fewstep.language.rollouts import Rollout, rollout
from fewstep.language_models import LanguageModel
from fewstep.methods.alarm import Alarm, Falls
from fewstep.methods.method import (
    Batch,
    Method,
    Networks,
    Optimizer,
    Paper,
    Progress,
    Recipe,
    Stage,
    System,
    Update,
)
from fewstep.methods.parts.stores import Store, Tensors
from fewstep.methods.start import Start
from fewstep.randomness import Rng
from fewstep.ranges import Count, Least, NonNegative, Positive, Share

STUDENT, TARGET = "student", "target"
JSD, KL = Divergence("jsd", 0.5), Divergence("kl")


def response_of(tokens: Tensor, columns: Mapping[str, Tensor], prompt: int) -> Tensor:
    """Which tokens ``[B, L]`` answer a prompt: the data's column "mask", or all behind the first ``prompt``."""
    if "mask" in columns:
        return columns["mask"]
    return (torch.arange(tokens.shape[1], device=tokens.device) >= prompt).expand_as(tokens)


def answered(
    model: LanguageModel, tokens: Tensor, response: Tensor, rng: Rng, temperature: float, end: int | None
) -> Rollout:
    """What a model writes instead of the ``response`` ``[B, L]`` to the same prompts, up to the same length ``L``."""
    length = tokens.shape[1]
    prompts = response.cumsum(1) == 0
    prompts[:, 0] = True  # the first token has no law
    return rollout(model, tokens, rng, length - 1, temperature=temperature, end=end, prompt_mask=prompts, limit=length)


@dataclass(frozen=True)
class TargetTexts(Store):
    """``n`` texts that the target writes after prompts of the data."""

    name: ClassVar[str] = "target-texts"

    target: LanguageModel
    data: Samples
    n: int
    prompt: int
    temperature: float
    end: int | None
    batch: int = 256

    @property
    def batches(self) -> int:
        return -(-self.n // self.batch)

    def digest(self) -> str:
        said = f"{self.name} {self.n} {self.prompt} {self.temperature} {self.end} {self.batch} {self.data.sha256()}"
        return hashlib.sha256(f"{said} {model_sha256(self.target)}".encode()).hexdigest()

    def make(self, seed: int, wanted: Container[int]) -> Iterator[tuple[int, Tensors]]:
        device = next(self.target.parameters(), torch.zeros(())).device
        for i in range(self.batches):
            if i not in wanted:
                continue
            first = i * self.batch
            chosen = epoch_indices(len(self.data), first, min(self.batch, self.n - first), seed)
            x, _, columns = self.data.rows(chosen)
            if x is None:
                raise ValueError(f"data '{self.data.name}' has no texts, whose prompts the target would go on from")
            response = response_of(x, columns, self.prompt).to(device)
            rng = Rng(seed, self.name, i, device=device)
            found = answered(self.target, x.to(device), response, rng, self.temperature, self.end)
            yield i, {"x": found.tokens.cpu(), "mask": found.mask.cpu()}

    def dataset(self, tensors: Tensors) -> Dataset:
        return Dataset(self.name, tensors["x"], columns={"mask": tensors["mask"]})


@dataclass(frozen=True)
class DistillSpec(Method):
    """A draft, brought in the role "student", distilled from its target, the teacher."""

    name: ClassVar[str] = "distill-spec"
    paper: ClassVar[Paper] = Paper(
        "DistillSpec: Improving Speculative Decoding via Knowledge Distillation", "2310.08461", "reconstructed",
        ("from the abstract, summaries and reviews: there is no official code, and rates and steps are not known",
         "texts of the target are written once before training, on-policy ones anew for every batch"),
    )  # fmt: skip
    system: ClassVar[System | None] = System(
        "DistillSpec", 2023, "language", "target, draft", "-", "a draft that speculative decoding accepts more often",
        real="distill_spec_real",
    )  # fmt: skip
    task = "language"
    roles: ClassVar[tuple[str, ...]] = (STUDENT,)
    #: The role in which the network that learns is brought.
    learner: ClassVar[str] = STUDENT
    healthy: ClassVar[dict[str, str]] = {
        "student/loss": "falls: the divergence a token",
        "student/acceptance": "rises: 1 - TVD, how many tokens of such texts speculative decoding would accept",
    }
    unstable: ClassVar[Mapping[str, Alarm]] = {"student/acceptance": Falls("lower the learning rate")}

    divergence: Annotated[Divergence, "between the target's law and the draft's"] = JSD
    fixed: Annotated[NonNegative, "share of the batches whose texts are the data's own"] = 0.0
    target: Annotated[NonNegative, "share of those that the target wrote"] = 0.0
    draft: Annotated[NonNegative, "share of those that the draft writes itself, on-policy"] = 1.0
    texts: Annotated[Count, "texts that the target writes before training, where it has a share"] = 4096
    prompt: Annotated[Count, "tokens of each sequence that are its prompt, where the data mark none"] = 16
    temperature: Annotated[Positive, "of the decoding to come: of the texts and of both laws"] = 1.0
    end: Annotated[int | None, "the token that ends a text; none: texts are as long as the data's"] = None
    lr: Annotated[Positive, "learning rate at the top"] = 1e-3
    warmup: Annotated[int, Least(0), "steps over which it rises from 0"] = 20
    decay: Annotated[str, "its course over the budget"] = "cosine:0.1"
    weight_decay: Annotated[NonNegative, "decoupled decay of the weights"] = 0.0
    clip: Annotated[Positive | None, "bound on the gradient norm"] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not any(self.shares):
            raise ValueError(f"{self.name}: fixed, target and draft are all 0; the texts must come from somewhere")

    def check_given(self, given: Mapping[str, object]) -> None:
        super().check_given(given)
        self.check_brought(given)

    def check_brought(self, roles: Container[str]) -> None:
        """ValueError without the model that learns, for which a copy of the teacher would be no draft."""
        if self.learner not in roles:
            raise ValueError(f"{self.name} trains a model that you bring: give one in the role '{self.learner}'")

    @property
    def shares(self) -> tuple[float, float, float]:
        return self.fixed, self.target, self.draft

    def sources(self, start: Start) -> Mapping[str, Samples]:
        length = start.data.shape[0]
        if self.prompt >= length:
            raise ValueError(f"prompt={self.prompt}: the data have {length} tokens, and one must be left to learn")
        if not self.target:
            return {"data": start.data}
        texts = TargetTexts(start.model(), start.data, self.texts, self.prompt, self.temperature, self.end)
        return {"data": start.data, TARGET: start.store(texts)}

    def networks(self, start: Start) -> Networks:
        self.check_brought({*start.made, *start.given})
        draft: LanguageModel = start.network(self.learner)
        if not draft.writes_all and self.divergence.name == "kl":
            raise ValueError("divergence 'kl' from a draft that never writes some tokens is infinite: take jsd or tvd")
        if draft.length < start.data.shape[0]:
            raise ValueError(f"the {self.learner} reads {draft.length} tokens, the data have {start.data.shape[0]}")
        group = Optimizer(
            (STUDENT,), self.lr, kind="adamw", weight_decay=self.weight_decay, clip=self.clip, warmup=self.warmup,
            decay=self.decay,
        )  # fmt: skip
        nets = Networks({STUDENT: draft, TARGET: start.model()}, {STUDENT: group})
        without_dropout(draft)
        return nets

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update]:
        tokens, mask = self.chosen_texts(nets, batch)
        with torch.no_grad():
            p = nets.target(tokens)[:, :-1]
        q = nets.student(tokens)[:, :-1]
        loss = masked_mean(self.divergence(p, q, self.temperature), mask[:, 1:])
        agreed = 1 - total_variation(p, q.detach(), self.temperature)
        yield Update(STUDENT, loss, {"acceptance": masked_mean(agreed, mask[:, 1:])})

    def chosen_texts(self, nets: Networks, batch: Batch) -> tuple[Tensor, Tensor]:
        """Tokens ``[B, L]`` of the source that this batch is from, and which of them ``[B, L]`` are learned from."""
        source = ("fixed", "target", "draft")[batch.rng.shared_choice(self.shares)]
        if source == "target":
            return batch.of[TARGET].x, batch.of[TARGET].column("mask")
        response = response_of(batch.x, batch.columns, self.prompt)
        if source == "fixed":
            return batch.x, response
        found = answered(nets.student, batch.x, response, batch.rng, self.temperature, self.end)
        return found.tokens, found.mask

    def student(self, nets: Networks) -> LanguageModel:
        made: LanguageModel = nets.student
        return made


def without_dropout(model: nn.Module) -> None:
    """Dropout off, and all that evaluation switches; recurrences stay as in training, without which cuDNN has no
    backward pass for them."""
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            module.train()


@dataclass(frozen=True)
class DistillTarget(DistillSpec):
    """The first step of the garden: the target, brought in that role, learns a big teacher's task."""

    name: ClassVar[str] = "distill-target"
    system = None
    roles: ClassVar[tuple[str, ...]] = (TARGET,)
    learner: ClassVar[str] = TARGET

    def hands_on(self, nets: Networks) -> Mapping[str, nn.Module]:
        return {"teacher": self.student(nets)}


@dataclass(frozen=True)
class DistillSpecGarden(Recipe):
    """Distil for performance, then for alignment: a target, brought in that role, from a big teacher, and the draft
    from what became of the target; without a target, the draft from the teacher."""

    name: ClassVar[str] = "distill-spec-garden"
    paper: ClassVar[Paper] = DistillSpec.paper
    task = "language"
    roles: ClassVar[tuple[str, ...]] = (STUDENT, TARGET)

    share: Annotated[Share, "of the budget, for the target"] = 0.5
    target_divergence: Annotated[Divergence, "between the teacher's law and the target's"] = KL
    divergence: Annotated[Divergence, "between the target's law and the draft's"] = JSD
    fixed: Annotated[NonNegative, "share of the batches whose texts are the data's own"] = 0.0
    draft: Annotated[NonNegative, "share of those that the one that learns writes itself"] = 1.0
    prompt: Annotated[Count, "tokens of each sequence that are its prompt, where the data mark none"] = 16
    temperature: Annotated[Positive, "of the decoding to come: of the texts and of the laws"] = 1.0
    end: Annotated[int | None, "the token that ends a text; none: texts are as long as the data's"] = None
    target_lr: Annotated[Positive, "learning rate of the target"] = 1e-3
    lr: Annotated[Positive, "learning rate of the draft"] = 1e-3

    def check_given(self, given: Mapping[str, object]) -> None:
        super().check_given(given)
        self.aligned.check_brought(given)

    @property
    def aligned(self) -> DistillSpec:
        """The second step."""
        return DistillSpec(
            self.divergence, self.fixed, 0.0, self.draft, prompt=self.prompt, temperature=self.temperature,
            end=self.end, lr=self.lr,
        )  # fmt: skip

    def stages(self) -> list[Stage]:
        first = DistillTarget(
            self.target_divergence, self.fixed, 0.0, self.draft, prompt=self.prompt, temperature=self.temperature,
            end=self.end, lr=self.target_lr,
        )  # fmt: skip
        return [Stage(first, self.share, needs=TARGET), Stage(self.aligned, 1 - self.share)]

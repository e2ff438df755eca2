"""Right and wrong traces of a policy, told apart by a rule: what REDI learns from."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.data.dataset import Dataset
from fewstep.language.arithmetic import END_TOKEN, Problems
from fewstep.language.rollouts import rollout
from fewstep.language_models import LanguageModel
from fewstep.randomness import Rng


def traces(
    teacher: LanguageModel,
    problems: Problems,
    prompts: Tensor,
    rng: Rng,
    tries: int = 8,
    *,
    temperature: float = 1.0,
    name: str | None = None,
) -> Dataset:
    """What a teacher answers to problems ``[N, P]`` in so many ``tries``: of each that it solved at least once, its
    first right answer and, where there is one, its first wrong answer, one pair a problem as in the paper.

    The columns are those of :mod:`fewstep.language.redi`; a try that does not end is wrong, as long as it is.
    ValueError where nothing was solved.
    """
    if tries < 1:
        raise ValueError(f"tries={tries} must be at least 1")
    made = rollout(
        teacher, prompts.repeat_interleave(tries, 0), rng, problems.most, temperature=temperature, end=END_TOKEN
    )
    right = problems.verify(made.tokens).view(-1, tries)
    solved = right.any(1).nonzero()[:, 0]
    if not len(solved):
        raise ValueError(f"of {len(prompts)} problems of {problems.name} the teacher has solved none in {tries} tries")
    first_right, first_wrong = first(right)[solved], first(~right)[solved]
    chosen, rejected = solved * tries + first_right, solved * tries + first_wrong
    failed = (~right).any(1)[solved, None]
    columns = {
        "mask": made.mask[chosen],
        "rejected": torch.where(failed, made.tokens[rejected], 0),
        "rejected_mask": made.mask[rejected] & failed,
    }
    return Dataset(name or f"{problems.name} traces", made.tokens[chosen], columns=columns)


def corrupted(problems: Problems, prompts: Tensor, rng: Rng, name: str | None = None) -> Dataset:
    """Problems ``[N, P]`` with their right answers and, as wrong ones, the same with one digit or bracket exchanged for
    another: wrong traces that no policy wrote, which say little of what one gets wrong."""
    data = problems.dataset(prompts, name)
    mask, kinds = data.columns["mask"], problems.encode([problems.answers])[0]
    digits = mask & (data.x != END_TOKEN)
    chosen = (rng.uniform(len(mask)) * digits.sum(1)).long()
    at = digits & (digits.cumsum(1) == chosen[:, None] + 1)
    place = (data.x[at][:, None] == kinds).long().argmax(1)
    rejected = data.x.clone()
    rejected[at] = kinds[(place + rng.integers(len(mask), 1, len(kinds))) % len(kinds)]
    return Dataset(data.name, data.x, columns={"mask": mask, "rejected": rejected, "rejected_mask": mask})


def first(found: Tensor) -> Tensor:
    """The place of the first True of each row ``[N, tries]``, 0 where there is none."""
    return found.long().argmax(1)


def accuracy(
    policy: LanguageModel, problems: Problems, prompts: Tensor, rng: Rng, *, temperature: float = 0.0, tries: int = 1
) -> float:
    """The share of answers to problems ``[N, P]`` that are right, each tried so often; at temperature 0 the likeliest
    token is taken."""
    asked = prompts.repeat_interleave(tries, 0)
    made = rollout(policy, asked, rng, problems.most, temperature=temperature, end=END_TOKEN)
    return float(problems.verify(made.tokens).float().mean())

"""Right and wrong traces of a policy, told apart by a rule: what REDI learns from."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.data.dataset import Dataset
from fewstep.language.arithmetic import END_TOKEN, Problems
from fewstep.language.rollouts import rollout
from fewstep.language_models import LanguageModel
from fewstep.randomness import Rng


class Attempts(NamedTuple):
    """What a teacher answered to ``N`` problems in some tries: ``tokens`` ``[N, tries, L]``, a ``mask`` of that shape,
    true where it wrote, and which were ``right`` ``[N, tries]``."""

    tokens: Tensor
    mask: Tensor
    right: Tensor


def attempts(
    teacher: LanguageModel, problems: Problems, prompts: Tensor, rng: Rng, tries: int, temperature: float = 1.0
) -> Attempts:
    """What a teacher answers to problems ``[N, P]``, in main memory; a try that does not end is wrong, as long as it
    is.  ValueError without a try."""
    if tries < 1:
        raise ValueError(f"tries={tries} must be at least 1")
    device = next(teacher.parameters(), torch.zeros(())).device
    asked = prompts.repeat_interleave(tries, 0).to(device)
    made = rollout(teacher, asked, rng, problems.most, temperature=temperature, end=END_TOKEN)
    tokens, mask, right = made.tokens.cpu(), made.mask.cpu(), problems.verify(made.tokens)
    return Attempts(*(found.unflatten(0, (len(prompts), tries)) for found in (tokens, mask, right)))


def pairs(found: Attempts, problems: Problems, name: str | None = None) -> Dataset:
    """Of each problem that was solved at least once the first right answer and, where there is one, the first wrong
    answer, one pair a problem as in the paper.

    The columns are those of :mod:`fewstep.language.redi`.  ValueError where nothing was solved.
    """
    solved = found.right.any(1).nonzero()[:, 0]
    if not len(solved):
        count, tries = found.right.shape
        raise ValueError(f"of {count} problems of {problems.name} the teacher has solved none in {tries} tries")
    tokens, mask, right = (tensor[solved] for tensor in found)
    row, chosen, rejected = torch.arange(len(solved)), first(right), first(~right)
    failed = (~right).any(1)[:, None]
    columns = {
        "mask": mask[row, chosen],
        "rejected": torch.where(failed, tokens[row, rejected], 0),
        "rejected_mask": mask[row, rejected] & failed,
    }
    kept = tokens[row, chosen]
    return Dataset(name or f"{problems.name} traces", kept, columns=columns, alphabet=problems.symbols)


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
    """The :func:`pairs` of a teacher's :func:`attempts` at problems ``[N, P]``, in so many ``tries`` at each."""
    return pairs(attempts(teacher, problems, prompts, rng, tries, temperature), problems, name)


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
    columns = {"mask": mask, "rejected": rejected, "rejected_mask": mask}
    return Dataset(data.name, data.x, columns=columns, alphabet=problems.symbols)


def first(found: Tensor) -> Tensor:
    """The place of the first True of each row ``[N, tries]``, 0 where there is none."""
    return found.long().argmax(1)


def accuracy(
    policy: LanguageModel, problems: Problems, prompts: Tensor, rng: Rng, *, temperature: float = 0.0, tries: int = 1
) -> float:
    """The share of answers to problems ``[N, P]`` that are right, each tried so often; at temperature 0 the likeliest
    token is taken."""
    return float(attempts(policy, problems, prompts, rng, tries, temperature).right.float().mean())

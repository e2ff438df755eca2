"""Problems with a rule: answers, what the rule accepts, and traces told apart by it."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from fewstep.language.arithmetic import Addition, Brackets, Problems
from fewstep.language.traces import accuracy, corrupted, traces
from fewstep.language_models import FunctionLanguageModel
from fewstep.randomness import Rng

ADDITION = Addition()


def test_sums_are_answered_from_their_lowest_digit() -> None:
    assert ADDITION.answer("47+85=") == "231" and ADDITION.answer("05+03=") == "8"
    assert len(ADDITION.texts) == 10_000 and ADDITION.length == 10
    assert ADDITION.decode(ADDITION.answered(ADDITION.encode(["47+85=", "99+01=", "10+10="]))) == [
        "47+85=231$", "99+01=001$", "10+10=02$_",
    ]  # fmt: skip


def test_brackets_are_closed() -> None:
    """A stack says whether a text with its answer is closed: pairs that stand beside each other go away until nothing
    is left."""
    problems = Brackets(brackets=5)
    assert problems.answer("([]{(=") == ")})" and all(problems.answer(text) for text in problems.texts)
    for text in problems.texts:
        whole = text[:-1] + problems.answer(text)
        while (shorter := re.sub(r"\(\)|\[\]|\{\}", "", whole)) != whole:
            whole = shorter
        assert whole == ""
    assert len(set(problems.texts)) == len(problems.texts)
    # of all words over the six brackets, those that close nothing but what is open, and leave some open
    assert len(Brackets(brackets=1).texts) == 3 and len(Brackets(brackets=2).texts) == 9
    assert len(Brackets(brackets=3).texts) == 27 + 9 + 9  # "(((", "(()", "()("


@pytest.mark.parametrize("problems", [ADDITION, Brackets()], ids=lambda p: p.name)
def test_the_rule_accepts_right_answers_alone(problems: Problems) -> None:
    """Each right answer, whatever stands behind its end; none with a symbol exchanged, without its end, or more."""
    prompts = problems.prompts(50, Rng(0))
    rows = problems.answered(prompts)
    mask = problems.response(rows)
    assert bool(problems.verify(rows).all())
    behind = torch.where(mask | (torch.arange(rows.shape[1]) < problems.asked), rows, 5)
    assert bool(problems.verify(behind).all()) and torch.equal(problems.response(behind), mask)
    for row, there in zip(rows, mask, strict=True):
        for place in there.nonzero()[:, 0].tolist():
            changed = row.repeat(len(problems.symbols), 1)
            changed[:, place] = torch.arange(len(problems.symbols))
            assert problems.verify(changed).nonzero()[:, 0].tolist() == [int(row[place])]
    longer = torch.cat([rows[:, : problems.asked], rows[:, problems.asked :].roll(1, 1)], 1)
    assert not bool(problems.verify(longer).any())


def test_masks_cover_the_answer_and_its_end() -> None:
    data = ADDITION.dataset(ADDITION.encode(["47+85=", "10+10="]))
    assert data.columns["mask"].long().tolist() == [[0] * 6 + [1, 1, 1, 1], [0] * 6 + [1, 1, 1, 0]]
    endless = ADDITION.encode(["47+85=2311"])
    assert ADDITION.response(endless).long().tolist() == [[0] * 6 + [1] * 4]


def test_problems_are_all_different() -> None:
    drawn = ADDITION.prompts(3000, Rng(1))
    assert len(drawn.unique(dim=0)) == 3000 and torch.equal(drawn, ADDITION.prompts(3000, Rng(1)))
    with pytest.raises(ValueError, match="n=10001: there are 10000 different problems of addition"):
        ADDITION.prompts(10_001, Rng(0))
    with pytest.raises(ValueError, match="digits=0 must be at least 1"):
        Addition(digits=0)


def sure(wrong: float) -> FunctionLanguageModel:
    """A policy that knows sums of one digit by heart, and ends at once in place of an answer so often."""
    problems = Addition(digits=1)
    answers = {text: problems.answer(text) + "$__" for text in problems.texts}

    def logits(tokens: Tensor) -> Tensor:
        made = torch.full((*tokens.shape, len(problems.symbols)), -torch.inf)
        for i, text in enumerate(problems.decode(tokens[:, :4])):
            for t in range(tokens.shape[1]):
                right = problems.symbols.index((text[1:] + answers[text])[t] if text in answers else "_")
                made[i, t, right] = 0
                if t == 3 and wrong:
                    made[i, t] = -torch.inf
                    made[i, t, right] = torch.tensor(1 - wrong).log()
                    made[i, t, problems.symbols.index("$")] = torch.tensor(wrong).log()
        return made

    return FunctionLanguageModel(logits, len(problems.symbols), 8)


def test_traces_are_the_first_right_and_the_first_wrong_one() -> None:
    """A policy that errs half of the time: in 4 tries a problem has both with probability 14 / 16; all that are kept
    have a right one, and where none was wrong the row has no wrong one."""
    problems = Addition(digits=1)
    asked = problems.prompts(100, Rng(0))
    found = traces(sure(0.5), problems, asked, Rng(3), tries=4)
    paired = found.columns["rejected_mask"].any(1)
    assert bool(problems.verify(found.x).all())
    assert torch.equal(found.columns["mask"], problems.response(found.x))
    wrong, mask = found.columns["rejected"][paired], found.columns["rejected_mask"][paired]
    assert not bool(problems.verify(wrong).any()) and torch.equal(wrong[:, :4], found.x[paired, :4])
    assert torch.equal(mask, problems.response(wrong))
    assert bool((found.columns["rejected"][~paired] == 0).all())
    n, both, solved = len(asked), int(paired.sum()), len(found)
    assert abs(both - n * 14 / 16) < 4 * (n * 14 / 16 / 8) ** 0.5 and abs(solved - n * 15 / 16) < 4 * (n / 16) ** 0.5

    never = traces(sure(0.0), problems, asked, Rng(3), tries=2)
    assert len(never) == n and not bool(never.columns["rejected_mask"].any())
    with pytest.raises(ValueError, match="the teacher has solved none in 2 tries"):
        traces(sure(1.0), problems, asked, Rng(3), tries=2)
    assert accuracy(sure(0.0), problems, asked, Rng(0)) == 1 and accuracy(sure(1.0), problems, asked, Rng(0)) == 0
    assert abs(accuracy(sure(0.5), problems, asked, Rng(0), temperature=1.0, tries=8) - 0.5) < 4 * 0.5 / (8 * n) ** 0.5


def test_a_corrupted_answer_has_one_other_digit() -> None:
    found = corrupted(ADDITION, ADDITION.prompts(2000, Rng(2)), Rng(0))
    right, wrong, mask = found.x, found.columns["rejected"], found.columns["mask"]
    differs = right != wrong
    assert bool((differs.sum(1) == 1).all()) and bool(mask[differs].all())
    assert set(ADDITION.decode(wrong[differs][None])[0]) <= set(ADDITION.answers)
    assert not bool(ADDITION.verify(wrong).any()) and torch.equal(found.columns["rejected_mask"], mask)
    places = differs.sum(0)[6:].tolist()
    lengths = mask.sum(1) - 1
    for k in range(3):  # each digit of an answer is as likely as the others
        expected = float((1 / lengths[lengths > k]).sum())
        assert abs(places[k] - expected) < 4 * expected**0.5
    assert places[3] == 0

"""Masked diffusion with one token revealed at a time: the law of the next token, and what follows from having one."""

import pytest
import torch
from branches import law_tensor, walk
from torch import Tensor

from fewstep.discrete.chains import Masked, Uniform
from fewstep.discrete.exact import JointLaw
from fewstep.language.revealed import RevealInOrder
from fewstep.language.speculative import speculative_decode

ORDER = (2, 0, 3, 1)


def joint(seed: int) -> Tensor:
    return torch.rand(3, 3, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 3


def model(seed: int = 0, order: tuple[int, ...] | None = ORDER) -> RevealInOrder:
    return RevealInOrder(JointLaw(Masked(3), joint(seed)), order)


def in_order(table: Tensor) -> Tensor:
    """The law of the tokens in the order of their revealing."""
    return (table / table.sum()).permute(ORDER)


def test_the_law_of_the_next_token_is_that_of_the_data_given_what_is_revealed() -> None:
    law = in_order(joint(0))
    found = model()(torch.tensor([[1, 2, 0]])).softmax(-1)[0]
    for shown in ((1,), (1, 2), (1, 2, 0)):
        rest = law[shown].reshape(3, -1).sum(1)
        torch.testing.assert_close(found[len(shown) - 1], rest / rest.sum(), rtol=0, atol=1e-14)


def test_read_in_parts_and_cut_back_it_is_the_same() -> None:
    reveal, x = model(), torch.tensor([[1, 2, 0, 1], [0, 0, 2, 2]])
    first, state = reveal.extend(x[:, :3], reveal.begin())
    again, _ = reveal.extend(x[:, 1:], state.cut(1))
    torch.testing.assert_close(torch.cat([first[:, :1], again], dim=1), reveal(x), rtol=0, atol=1e-14)


def test_speculative_decoding_of_two_masked_models_has_the_targets_law() -> None:
    prompt = torch.tensor([1])
    law = walk(lambda rng: speculative_decode(model(0), model(1), prompt, rng, 3, gamma=2))
    expected = in_order(joint(0))[1]
    torch.testing.assert_close(law_tensor(law, 3, 3), expected / expected.sum(), rtol=0, atol=1e-14)


def test_what_does_not_fit_is_said_in_one_line() -> None:
    with pytest.raises(ValueError, match="Uniform none"):
        RevealInOrder(JointLaw(Uniform(3), joint(0)))
    with pytest.raises(ValueError, match="every place from 0 to 3 once"):
        model(order=(0, 1, 1, 2))

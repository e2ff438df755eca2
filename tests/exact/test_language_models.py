"""Language models: causality, padding, caches that are cut back, and a Markov chain in closed form."""

import pytest
import torch

from fewstep.exact import MarkovChain
from fewstep.language_models import FunctionLanguageModel, LanguageModel, NetworkLanguageModel, RestrictedVocabulary
from fewstep.networks.causal import CausalTransformer, GRULanguageModel

MODELS = {
    "transformer": lambda: NetworkLanguageModel(CausalTransformer(5, 12, width=16, blocks=2, heads=2), 5, 12, "abcde"),
    "gru": lambda: NetworkLanguageModel(GRULanguageModel(5, 12, width=8, layers=2), 5, 12),
    "chain": lambda: MarkovChain(torch.rand(5, 5, 5).softmax(-1), 12),
    "function": lambda: FunctionLanguageModel(CausalTransformer(5, 12, width=16, blocks=1, heads=2), 5, 12),
    "restricted": lambda: RestrictedVocabulary(
        NetworkLanguageModel(GRULanguageModel(4, 12, width=8), 4, 12), torch.tensor([4, 0, 2]), 5
    ),
}


@pytest.fixture(params=list(MODELS))
def model(request: pytest.FixtureRequest) -> LanguageModel:
    torch.manual_seed(0)
    made: LanguageModel = MODELS[request.param]().double()
    return made


def tokens(batch: int = 3, length: int = 12) -> torch.Tensor:
    return torch.randint(5, (batch, length), generator=torch.Generator().manual_seed(1))


def test_what_comes_later_changes_nothing_before(model: LanguageModel) -> None:
    x = tokens()
    other = x.clone()
    other[:, 6:] = (other[:, 6:] + 1) % 5
    before, after = model(x), model(other)
    assert before.shape == (3, 12, 5)
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.equal(before[:, 6:], after[:, 6:])


def test_padding_of_any_value_and_the_length_of_the_neighbours_change_nothing(model: LanguageModel) -> None:
    """Each sequence of a padded batch has the logits that it has alone, to rounding."""
    x = tokens()
    lengths = (4, 12, 7)
    mask = torch.arange(12) < torch.tensor(lengths)[:, None]
    logits = model(x.masked_fill(~mask, -100), mask)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(logits[row, :length], model(x[row : row + 1, :length])[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("parts", [(12,), (1,) * 12, (5, 1, 4, 2)])
def test_a_sequence_read_in_parts_has_the_logits_of_the_whole(model: LanguageModel, parts: tuple[int, ...]) -> None:
    x, state, found = tokens(), model.begin(), []
    for part in x.split(parts, dim=1):
        logits, state = model.extend(part, state)
        found.append(logits)
    assert state.length == 12
    torch.testing.assert_close(torch.cat(found, dim=1), model(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kept", [0, 1, 5])
def test_a_state_cut_back_goes_on_as_if_the_rest_had_never_been_read(model: LanguageModel, kept: int) -> None:
    x, y = tokens(), tokens().flip(0)
    _, long = model.extend(x[:, :9], model.begin())
    again, state = model.extend(y[:, kept:], long.cut(kept))
    assert state.length == 12
    assert long.length == 9  # the first state is still what it was
    expected = model(torch.cat([x[:, :kept], y[:, kept:]], dim=1))[:, kept:]
    torch.testing.assert_close(again, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(model.extend(x[:, 9:], long)[0], model(x)[:, 9:], rtol=0, atol=1e-12)


def test_the_distances_tell_the_order_of_tokens() -> None:
    torch.manual_seed(0)
    model = NetworkLanguageModel(CausalTransformer(5, 4, width=16, blocks=1, heads=2), 5, 4)
    there, back = model(torch.tensor([[0, 1, 2]])), model(torch.tensor([[1, 0, 2]]))
    assert not torch.allclose(there[:, -1], back[:, -1], atol=1e-3)


def test_a_chain_of_order_two_by_hand() -> None:
    table = torch.rand(3, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    table = table / table.sum(-1, keepdim=True)
    chain = MarkovChain(table)
    law = chain.law(torch.tensor([2, 1]), 2)
    assert law[0, 2].item() == pytest.approx(float(table[2, 1, 0] * table[1, 0, 2]), rel=1e-12)
    assert law.sum().item() == pytest.approx(1, rel=1e-12)
    pair = chain.stationary()
    torch.testing.assert_close(torch.einsum("ab,abc->bc", pair, table), pair)


def test_what_does_not_fit_is_said_in_one_line(model: LanguageModel) -> None:
    with pytest.raises(ValueError, match=r"tokens \[1, 13\]: the model reads \[B, L\] with L from 1 to 12"):
        model(torch.zeros(1, 13, dtype=torch.long))
    with pytest.raises(ValueError, match="padding stands behind"):
        model(tokens(1, 3), torch.tensor([[False, True, True]]))
    with pytest.raises(ValueError, match="booleans"):
        model(tokens(1, 3), torch.ones(1, 3))
    _, state = model.extend(tokens(1, 3), model.begin())
    with pytest.raises(ValueError, match=r"cut\(4\): the state holds 3 tokens"):
        state.cut(4)
    with pytest.raises(ValueError, match="12"):
        model.extend(tokens(1, 10), state)


def test_a_restricted_vocabulary_reads_every_token_and_writes_some() -> None:
    """Token 4 is the first of the inner model, 1 and 3 are one to it."""
    inner = NetworkLanguageModel(GRULanguageModel(4, 12, width=8), 4, 12)
    model = RestrictedVocabulary(inner, torch.tensor([4, 0, 2]), 5)
    logits = model(torch.tensor([[4, 1, 3, 2]]))
    assert torch.equal(logits[..., [4, 0, 2]], inner(torch.tensor([[0, 3, 3, 2]]))[..., :3])
    assert bool((logits[..., [1, 3]] == -torch.inf).all())
    for wrong in ([4, 0], [4, 0, 0], [4, 0, 5]):
        with pytest.raises(ValueError, match="kept"):
            RestrictedVocabulary(inner, torch.tensor(wrong), 5)


def test_an_alphabet_names_the_tokens_and_must_have_all_of_them() -> None:
    net = GRULanguageModel(3, 4, width=8)
    assert NetworkLanguageModel(net, 3, 4, "xyz").decode(torch.tensor([[2, 0, 1]])) == ["zxy"]
    assert NetworkLanguageModel(net, 3, 4).decode(torch.tensor([[2, 0, 1]])) == ["2 0 1"]
    with pytest.raises(ValueError, match="2 characters for a vocabulary of 3"):
        NetworkLanguageModel(net, 3, 4, "ab")
    with pytest.raises(ValueError, match="every row must be a law"):
        MarkovChain(torch.ones(2, 2))

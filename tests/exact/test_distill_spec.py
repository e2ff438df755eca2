"""DistillSpec: its loss in closed form, where its texts come from, and what each divergence makes of a small draft."""

import copy
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from branches import table
from torch import Tensor, nn

from fewstep.data import Dataset
from fewstep.divergences import Divergence, jsd, kl, reverse_kl, total_variation
from fewstep.exact import MarkovChain
from fewstep.language.distill_spec import (
    DistillSpec,
    DistillSpecGarden,
    DistillTarget,
    TargetTexts,
    answered,
    response_of,
    without_dropout,
)
from fewstep.language.speculative import acceptance_of
from fewstep.language_models import LanguageModel, NetworkLanguageModel, RestrictedVocabulary
from fewstep.methods.method import Batch, Networks, Progress, Update
from fewstep.methods.parts.stores import made_now
from fewstep.methods.start import Start
from fewstep.networks.causal import CausalTransformer, GRULanguageModel
from fewstep.randomness import Rng
from fewstep.runs.course import run_recipe
from fewstep.training.budget import Budget
from fewstep.training.settings import Settings

OPTIMIZER = dict.fromkeys(("kind", "betas", "eps", "weight_decay", "clip", "warmup", "decay"), ...)
#: The authors published no code; what is known is that the choice of divergence and texts depends on the task.
PUBLISHED = {
    cls.name: {**dict.fromkeys((field.name for field in dataclasses.fields(cls)), ...), "optimizer": OPTIMIZER}
    for cls in (DistillSpec, DistillSpecGarden)
}

DIVERGENCES = ("kl", "reverse-kl", "jsd:0.5", "jsd:0.1", "tvd")
FIXED = DistillSpec(fixed=1.0, draft=0.0, prompt=2)
LENGTH, VOCABULARY = 8, 5


def network(seed: int = 0, dropout: float = 0.0) -> NetworkLanguageModel:
    torch.manual_seed(seed)
    net = CausalTransformer(VOCABULARY, LENGTH, width=8, blocks=1, heads=2, dropout=dropout)
    for p in net.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return NetworkLanguageModel(net, VOCABULARY, LENGTH).double()


def texts(n: int = 6) -> Tensor:
    return torch.randint(VOCABULARY, (n, LENGTH), generator=torch.Generator().manual_seed(0))


def update(
    method: DistillSpec, target: nn.Module, draft: nn.Module, tokens: Tensor, seed: int = 0, **more: Any
) -> Update:
    nets = Networks({"student": draft, "target": target}, {})
    draft.requires_grad_(True)
    (found,) = method.updates(nets, Batch(tokens, None, Rng(seed), **more), Progress())
    assert isinstance(found, Update)
    return found


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_draft_equal_to_its_target_has_no_loss_and_acceptance_one(name: str) -> None:
    method = dataclasses.replace(FIXED, divergence=Divergence.parse(name), draft=1.0)
    found = update(method, network(), network(), texts())
    assert float(found.loss.detach()) == pytest.approx(0, abs=1e-14)
    assert float(found.logs["acceptance"]) == pytest.approx(1, abs=1e-14)


def test_the_loss_is_the_divergence_a_token_of_the_response_by_hand() -> None:
    """Two sequences of the data, two tokens of prompt in the one, and one in the other, which is shorter."""
    p, q = table(0), table(1)
    tokens = torch.tensor([[0, 2, 1, 3, 1], [3, 1, 0, 0, 0]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0]]).bool()
    method = dataclasses.replace(FIXED, divergence=Divergence("tvd"))
    found = update(method, MarkovChain(p), MarkovChain(q), tokens, columns={"mask": mask})
    variation = (p - q).abs().sum(-1) / 2
    expected = (variation[[2, 1, 3]].mean() + variation[[3, 1]].mean()) / 2
    assert float(found.loss.detach()) == pytest.approx(float(expected), rel=1e-12)
    assert float(found.logs["acceptance"]) == pytest.approx(1 - float(expected), rel=1e-12)
    whole = update(method, MarkovChain(p), MarkovChain(q), tokens)  # two tokens of prompt in each
    expected = (variation[[2, 1, 3]].mean() + variation[[1, 0, 0]].mean()) / 2
    assert float(whole.loss.detach()) == pytest.approx(float(expected), rel=1e-12)


def test_padding_of_any_value_changes_nothing() -> None:
    tokens, other = texts(), texts()
    mask = (torch.arange(LENGTH) >= 2).expand(6, -1) & (
        torch.arange(LENGTH) < torch.tensor([8, 7, 6, 5, 4, 3])[:, None]
    )
    other[mask.logical_not() & (torch.arange(LENGTH) >= 2)] = 1
    one, two = (update(FIXED, network(0), network(1), x, columns={"mask": mask}) for x in (tokens, other))
    assert float(one.loss.detach()) == pytest.approx(float(two.loss.detach()), rel=1e-12)


def test_the_temperature_divides_both_laws() -> None:
    p, q, tokens = table(0), table(1), torch.tensor([[0, 2, 1]])
    method = dataclasses.replace(FIXED, divergence=Divergence("kl"), temperature=2.0)
    found = update(method, MarkovChain(p), MarkovChain(q), tokens)
    warm = [(row.sqrt() / row.sqrt().sum()) for row in (p[2], q[2])]
    assert float(found.loss.detach()) == pytest.approx(float((warm[0] * (warm[0] / warm[1]).log()).sum()), rel=1e-10)


def test_no_gradient_flows_through_the_sampling_of_a_text() -> None:
    """The gradient on texts of the draft's own is that on the same texts given as data."""
    target, draft = network(0), network(1)
    own = dataclasses.replace(FIXED, fixed=0.0, draft=1.0)
    update(own, target, draft, texts()).loss.backward()
    grads = [p.grad.clone() for p in draft.parameters() if p.grad is not None]
    nets = Networks({"student": draft, "target": target}, {})
    tokens, mask = own.chosen_texts(nets, Batch(texts(), None, Rng(0)))
    draft.zero_grad()
    update(FIXED, target, draft, tokens, columns={"mask": mask}).loss.backward()
    again = [p.grad for p in draft.parameters() if p.grad is not None]
    assert len(grads) == len(again) > 5
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-15) for a, b in zip(grads, again, strict=True))


def test_the_texts_of_a_batch_come_from_one_source_as_often_as_its_share_says() -> None:
    """300 batches at shares of 1 : 2 : 3; five standard deviations of each count."""
    method = DistillSpec(fixed=1.0, target=2.0, draft=3.0, prompt=LENGTH - 1)
    marked = {"target": Batch(torch.full((6, LENGTH), 4), None, Rng(0), {"mask": torch.ones(6, LENGTH).bool()})}
    nets = Networks({"student": always(1), "target": always(2)}, {})
    counts = {0: 0, 4: 0, 1: 0}
    for step in range(300):
        batch = Batch(torch.zeros(6, LENGTH, dtype=torch.long), None, Rng("shares", step), of=marked)
        tokens, _ = method.chosen_texts(nets, batch)
        last = set(tokens[:, -1].tolist())
        assert len(last) == 1
        counts[last.pop()] += 1
    for count, share in zip(counts.values(), (1 / 6, 1 / 3, 1 / 2), strict=True):
        assert abs(count - 300 * share) < 5 * (300 * share * (1 - share)) ** 0.5


def always(token: int) -> MarkovChain:
    """A chain that writes nothing else."""
    return MarkovChain(torch.eye(VOCABULARY, dtype=torch.float64)[token].expand(VOCABULARY, -1), LENGTH)


def test_the_texts_of_the_target_go_on_from_the_datas_prompts() -> None:
    """Every prompt is one of the data, what follows is the target's, and a batch is the same whichever are made."""
    data = Dataset("words", texts(10))
    store = TargetTexts(always(3), data, n=20, prompt=3, temperature=1.0, end=None, batch=8)
    found = made_now(store, 0)
    prompts = {tuple(row) for row in data.x[:, :3].tolist()}
    assert found.x.shape == (20, LENGTH)
    assert {tuple(row) for row in found.x[:, :3].tolist()} == prompts  # each of ten twice
    assert bool((found.x[:, 3:] == 3).all())
    assert bool((found.columns["mask"] == (torch.arange(LENGTH) >= 3)).all())
    ((_, second),) = store.make(0, [1])
    assert torch.equal(second["x"], found.x[8:16])
    assert store.digest() != dataclasses.replace(store, temperature=2.0).digest()


def test_an_answer_is_as_long_as_the_datas_and_stops_at_the_end() -> None:
    mask = torch.zeros(6, LENGTH, dtype=torch.bool)
    mask[:3, 2:] = mask[3:, 5:7] = True
    tokens, written = answered(always(3), texts(), mask, Rng(0), 1.0, None)
    assert written.sum(1).tolist() == [6] * 3 + [3] * 3
    assert torch.equal(tokens[:3, :2], texts()[:3, :2])
    assert torch.equal(tokens[3:, :5], texts()[3:, :5])
    assert answered(always(3), texts(), mask, Rng(0), 1.0, 3).mask.sum(1).tolist() == [1] * 6
    assert torch.equal(response_of(texts(), {}, 3)[0], torch.arange(LENGTH) >= 3)


def test_dropout_is_off_in_the_draft_and_a_recurrence_stays_as_in_training() -> None:
    data = Dataset("words", texts())
    start = Start(network(), data, given={"student": network(1, dropout=0.5)})
    nets = FIXED.networks(start)
    losses = {float(next(FIXED.updates(nets, Batch(data.x, None, Rng(0)), Progress())).loss) for _ in range(3)}  # type: ignore[union-attr]
    assert len(losses) == 1
    gru = NetworkLanguageModel(GRULanguageModel(5, 8, width=4), 5, 8).train()
    without_dropout(gru)
    assert [type(m) for m in gru.modules() if m.training] == [nn.GRU]


def test_jsd_over_beta_tends_to_the_forward_and_over_its_rest_to_the_reverse_divergence() -> None:
    """Linearly: a tenth of beta, a tenth of the distance."""
    p, q = (table(seed, 20, sharpness=0.5).log() for seed in (0, 1))
    forward = [(jsd(p, q, b) / b - kl(p, q)).abs().max() for b in (1e-3, 1e-4, 1e-5)]
    reverse = [(jsd(p, q, 1 - b) / b - reverse_kl(p, q)).abs().max() for b in (1e-3, 1e-4, 1e-5)]
    for gaps in (forward, reverse):
        assert 8 < float(gaps[0] / gaps[1]) < 12
        assert 8 < float(gaps[1] / gaps[2]) < 12
    assert float(jsd(p, q, 1e-9).max()) < 1e-7


class Tabular:
    """A target of order 2 on 8 symbols and drafts of order 1, where all is known."""

    def __init__(self) -> None:
        self.p = table(0, 8, order=2)
        self.states = MarkovChain(self.p).stationary()

    def alpha(self, logits: Tensor) -> float:
        """The acceptance in the long run."""
        q = logits.softmax(-1).expand(8, 8, 8)
        return float((self.states * acceptance_of(self.p, q)).sum())

    def fitted(self, loss: Callable[[Tensor, Tensor], Tensor], states: Tensor, starts: Iterable[Tensor]) -> Tensor:
        """The draft of the least loss under a law of states; of several starts, the best."""
        found = []
        for start in starts:
            logits = start.clone().requires_grad_(True)
            optimizer = torch.optim.Adam([logits], lr=0.1)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 150)
            for _ in range(150):
                optimizer.zero_grad()
                value = (states * loss(self.p.log(), logits.expand(8, 8, 8))).sum()
                value.backward()
                optimizer.step()
                schedule.step()
            found.append((float(value.detach()), logits.detach()))
        return min(found, key=lambda pair: pair[0])[1]


def test_of_all_tabular_drafts_the_total_variation_under_the_targets_states_gives_the_most_accepted() -> None:
    """It is that acceptance, so nothing can give more; other divergences and other states give less, and all more than
    a uniform draft."""
    toy, even = Tabular(), torch.full((8, 8), 1 / 64, dtype=torch.float64)
    zero = torch.zeros(8, 8, dtype=torch.float64)
    mean = {"kl": toy.fitted(kl, toy.states, [zero])}
    mean["reverse-kl"] = toy.fitted(reverse_kl, toy.states, [zero])
    mean["jsd"] = toy.fitted(jsd, toy.states, [zero])
    best = toy.alpha(toy.fitted(total_variation, toy.states, mean.values()))
    others = {name: toy.alpha(logits) for name, logits in mean.items()}
    misplaced = toy.alpha(toy.fitted(total_variation, even, mean.values()))
    assert all(toy.alpha(zero) < alpha < best for alpha in (*others.values(), misplaced))


def test_a_garden_distils_the_draft_from_what_became_of_the_target() -> None:
    data = Dataset("words", texts(24))
    models = {"teacher": network(0), "target": network(1), "student": network(2)}
    garden = DistillSpecGarden(prompt=2, share=0.5)
    seen: list[LanguageModel] = []

    class Watched(DistillSpec):
        def networks(self, start: Start) -> Networks:
            seen.append(copy.deepcopy(start.model()))
            return super().networks(start)

    first, second = garden.stages()
    assert isinstance(first.method, DistillTarget)
    assert isinstance(second.method, DistillSpec)
    watched = Watched(**{f.name: getattr(second.method, f.name) for f in dataclasses.fields(DistillSpec)})
    object.__setattr__(garden, "stages", lambda: [first, dataclasses.replace(second, method=watched)])
    settings = Settings(Budget(8), batch=8, precision="fp32")
    given = {role: models[role] for role in ("target", "student")}
    result = run_recipe(garden, models["teacher"], data, settings, given=given, show=False)
    before, now = (next(iter(model.parameters())) for model in (models["target"], seen[0]))
    assert not torch.equal(before, now)  # the target has learned
    assert torch.equal(now, next(iter(result.made["teacher"].parameters())))
    alone = garden.__class__(prompt=2)
    made = run_recipe(alone, models["teacher"], data, settings, given={"student": models["student"]}, show=False)
    assert set(made.made) == {"student"}


def test_what_does_not_fit_is_said_in_one_line() -> None:
    data = Dataset("words", texts())
    settings = Settings(Budget(1), batch=2)
    with pytest.raises(ValueError, match="give one in the role 'student'"):
        run_recipe(DistillSpec(), network(), data, settings, show=False)
    with pytest.raises(ValueError, match="give one in the role 'student'"):
        FIXED.networks(Start(network(), data))
    with pytest.raises(ValueError, match="all 0"):
        DistillSpec(draft=0.0)
    with pytest.raises(ValueError, match="prompt=8: the data have 8 tokens"):
        DistillSpec(prompt=8).sources(Start(network(), data))
    short = NetworkLanguageModel(GRULanguageModel(5, 4, width=4), 5, 4)
    with pytest.raises(ValueError, match="the student reads 4 tokens, the data have 8"):
        FIXED.networks(Start(network(), data, given={"student": short}))
    with pytest.raises(ValueError, match="data 'more': token 9, the language model has 5"):
        run_recipe(FIXED, network(), Dataset("more", texts() + 5), settings, given={"student": network()}, show=False)
    some = RestrictedVocabulary(NetworkLanguageModel(GRULanguageModel(4, 8, width=4), 4, 8), torch.arange(3), 5)
    with pytest.raises(ValueError, match="divergence 'kl' from a draft that never writes some tokens is infinite"):
        dataclasses.replace(FIXED, divergence=Divergence("kl")).networks(
            Start(network(), data, given={"student": some})
        )
    with pytest.raises(ValueError, match="the student has 4 tokens, the teacher 5"):
        FIXED.networks(Start(network(), data, given={"student": MarkovChain(table(0))}))

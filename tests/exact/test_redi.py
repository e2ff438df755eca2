"""REDI: what each stage reads and minimises, its reference, its optimizer, and what it refuses."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.data import Dataset
from fewstep.evaluation.language import language_table
from fewstep.language.log_probs import response_log_probs, token_entropy
from fewstep.language.preferences import DPO, Pair, REDILoss, SimPO, Symmetric
from fewstep.language.redi import REDI, FineTuning, PreferenceTuning
from fewstep.language_models import FunctionLanguageModel, NetworkLanguageModel
from fewstep.methods.method import Batch, Progress, Update, alone
from fewstep.methods.start import Start
from fewstep.networks.causal import CausalTransformer
from fewstep.networks.lora import LowRank, factors_in
from fewstep.randomness import Rng
from fewstep.report.runs import RunCourse, StageCourse
from fewstep.report.tasks.redi import figures
from fewstep.runs.course import run_recipe
from fewstep.runs.stages import stage_seed, stages_of
from fewstep.training.budget import Budget
from fewstep.training.settings import Settings
from fewstep.training.trainer import train

# Tim-Siu/reinforcement-distillation: experiments_trl/recipes/sft/sft_landmv_5ep/config.yaml and
# redi/redi_1_08_1e-6/config.yaml (adamw_torch, linear, warmup_ratio); the bound is transformers' usual max_grad_norm
OPTIMIZER = {
    "kind": "adamw", "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-4, "clip": 1.0, "warmup": 0,
    "decay": "warm-linear:0.1",
}  # fmt: skip
SHARED = {"warmup": 0.1, "weight_decay": 1e-4, "clip": 1.0, "optimizer": OPTIMIZER}
PUBLISHED: dict[str, dict[str, Any]] = {
    "sft": {"lr": 5e-5, **SHARED},
    "redi": {"objective": REDILoss(alpha=0.8, damping=0.0), "sft_share": ..., "sft_lr": 5e-5, "lr": 1e-6, **SHARED},
}

VOCABULARY, LENGTH, N = 5, 6, 8
GO = Progress()


def policy(seed: int = 0) -> NetworkLanguageModel:
    torch.manual_seed(seed)
    net = CausalTransformer(VOCABULARY, LENGTH, width=8, blocks=1, heads=2)
    for p in net.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return NetworkLanguageModel(net, VOCABULARY, LENGTH).double()


def pairs() -> Dataset:
    """Responses of different lengths; the first three rows have no wrong one."""
    gen = torch.Generator().manual_seed(0)
    right, wrong = (torch.randint(VOCABULARY, (N, LENGTH), generator=gen) for _ in range(2))
    place = torch.arange(LENGTH)
    mask = (place >= 2) & (place < torch.randint(3, LENGTH + 1, (N, 1), generator=gen))
    rejected = (place >= 2) & (place < torch.randint(3, LENGTH + 1, (N, 1), generator=gen))
    rejected[:3] = False
    return Dataset("pairs", right, columns={"mask": mask, "rejected": wrong, "rejected_mask": rejected})


def batch_of(data: Dataset) -> Batch:
    return Batch(data.x, None, Rng(0), data.columns)


def said(model: NetworkLanguageModel, data: Dataset) -> Pair:
    columns = data.columns
    return Pair(
        response_log_probs(model(data.x), data.x, columns["mask"]),
        response_log_probs(model(columns["rejected"]), columns["rejected"], columns["rejected_mask"]),
    )


def test_fine_tuning_counts_every_token_of_a_batch_alike() -> None:
    """The surprise of all response tokens over their number, which is not the mean of the responses' means."""
    data, model = pairs(), policy()
    nets = FineTuning().networks(Start(model, data))
    (update,) = alone(FineTuning().updates(nets, batch_of(data), GO))
    found = response_log_probs(model(data.x), data.x, data.columns["mask"])
    tokens = data.columns["mask"].sum()
    assert float(update.loss) == pytest.approx(-float(found.total.sum() / tokens), rel=1e-14)
    assert float(update.loss) != pytest.approx(-float(found.mean.mean()), rel=1e-3)
    assert float(update.logs["chosen_log_prob"]) == pytest.approx(float(found.mean.mean()), rel=1e-14)


@pytest.mark.parametrize("objective", [REDILoss(), Symmetric(), SimPO(), DPO(beta=0.5)], ids=str)
def test_the_second_stage_minimises_the_mean_of_its_objective(objective: Any) -> None:
    data, model, before = pairs().subset(slice(3, None)), policy(1), policy(0)
    method = PreferenceTuning(objective=objective)
    nets = method.networks(Start(before, data, made={"student": model}))
    for p in nets.student.parameters():
        p.data *= 1.1  # away from the reference
    (update,) = alone(method.updates(nets, batch_of(data), GO))
    now = said(nets.student, data)
    expected = objective.loss(now, said(model, data) if objective.reference else None).mean()
    assert float(update.loss) == pytest.approx(float(expected), rel=1e-12)
    got = torch.autograd.grad(update.loss, list(nets.student.parameters()), retain_graph=True)
    for one, other in zip(got, torch.autograd.grad(expected, list(nets.student.parameters())), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)
    told = {name: float(value) for name, value in update.logs.items()}
    mask = data.columns["mask"]
    entropy = (token_entropy(nets.student(data.x), mask).sum(1) / mask.sum(1)).mean()
    assert told == pytest.approx({
        "chosen_log_prob": float(now.chosen.mean.mean()), "rejected_log_prob": float(now.rejected.mean.mean()),
        "ahead": float((now.chosen.mean > now.rejected.mean).float().mean()), "entropy": float(entropy),
    }, rel=1e-12)  # fmt: skip
    assert set(nets.groups) == {"student"} and not any(
        p.requires_grad for name, p in nets.named_parameters() if name.startswith("reference")
    )
    assert ("reference" in dict(nets.named_children())) == objective.reference


def test_rows_without_a_wrong_response_are_for_the_first_stage_alone() -> None:
    data = pairs()
    source = PreferenceTuning().sources(Start(policy(), data))["data"]
    rows = source.rows(slice(None))
    assert torch.equal(rows.columns["rejected"], data.columns["rejected"][3:]) and len(source) == N - 3
    assert len(FineTuning().sources(Start(policy(), data))["data"]) == N


def test_data_without_pairs_are_refused() -> None:
    plain = Dataset("plain", pairs().x, columns={"mask": pairs().columns["mask"]})
    with pytest.raises(ValueError, match="data 'plain': no column 'rejected', and preferences reads pairs"):
        PreferenceTuning().sources(Start(policy(), plain))
    first = pairs().subset(slice(0, 3))
    with pytest.raises(ValueError, match="no wrong responses: rejected_mask is false everywhere"):
        PreferenceTuning().sources(Start(policy(), first))
    with pytest.raises(ValueError, match="this method reads 'mask' beside each sample"):
        next(alone(FineTuning().updates(FineTuning().networks(Start(policy())), Batch(plain.x, None, Rng(0)), GO)))


def test_objectives_are_words_in_a_recipe_too() -> None:
    assert REDI(objective="dpo:beta=0.1").objective == DPO(beta=0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=re.escape("REDI: objective: symmetric has no 'alpha'")):
        REDI(objective="symmetric:alpha=0.5")  # type: ignore[arg-type]


def test_stages_share_the_budget_and_either_can_be_left_out() -> None:
    first, second = stages_of(REDI(sft_share=0.25, lr=1e-5, sft_lr=2e-3, objective=SimPO()))
    assert (first.share, second.share) == (0.25, 0.75)
    assert first.method == FineTuning(lr=2e-3) and second.method == PreferenceTuning(lr=1e-5, objective=SimPO())
    assert [stage.method.name for stage in stages_of(REDI(sft_share=0.0))] == ["preferences"]
    assert [stage.method.name for stage in stages_of(REDI(sft_share=1.0))] == ["sft"]


def weights(model: NetworkLanguageModel) -> Tensor:
    return torch.cat([p.flatten() for p in model.parameters()])


def test_the_second_stage_starts_from_the_first() -> None:
    """The whole recipe makes the bits of its stages run one after the other, the reference being the first's policy."""
    settings = Settings(Budget(6), 5, precision="fp32", log_steps=1)
    recipe = REDI(objective=DPO(beta=1.0), sft_share=0.5, lr=1e-2)
    whole = run_recipe(recipe, policy(), pairs(), settings, show=False)
    half = Settings(Budget(3), 5, precision="fp32", log_steps=1)
    first = train(FineTuning(lr=1e-3), Start(policy(), pairs()), half, show=False).model
    second = train(
        PreferenceTuning(lr=1e-2, objective=recipe.objective),
        Start(policy(), pairs(), seed=stage_seed(0, 1), made={"student": first}),
        Settings(Budget(3), 5, precision="fp32", log_steps=1, seed=stage_seed(0, 1)), show=False,
    )  # fmt: skip
    assert torch.equal(weights(whole.model), weights(second.model))
    # where the policy is its reference the loss is log 2: so it is at the first step of the second stage
    assert second.records[0]["student/loss"] == pytest.approx(0.6931471805599453, rel=1e-6)


def test_low_rank_weights_go_through_both_stages() -> None:
    nets = PreferenceTuning(objective=DPO()).networks(
        Start(policy(), pairs(), low_rank=LowRank(2), made={"student": tuned()})
    )
    assert factors_in(nets.student) and factors_in(nets.reference)
    assert all(name.rpartition(".")[0].rpartition(".")[2].startswith("lora_") for name in moved(nets))


def tuned() -> NetworkLanguageModel:
    made: NetworkLanguageModel = FineTuning().networks(Start(policy(), pairs(), low_rank=LowRank(2))).student
    return made.requires_grad_(False)


def moved(nets: Any) -> list[str]:
    return [name for name, p in nets.named_parameters() if p.requires_grad]


def test_alarms_are_those_of_scalars_that_are_logged() -> None:
    assert set(PreferenceTuning.unstable) <= set(PreferenceTuning.healthy)
    data = pairs().subset(slice(3, None))
    method = PreferenceTuning()
    (update,) = alone(method.updates(method.networks(Start(policy(), data)), batch_of(data), GO))
    assert isinstance(update, Update)
    trained = {f"student/{name}" for name in (*update.logs, "loss", "grad_norm")}
    assert trained == set(PreferenceTuning.healthy)


def test_its_report_shades_unlikely_tokens_and_draws_both_courses() -> None:
    """Policies of one certain token: where the response is that token it is white, elsewhere full."""
    data = pairs()

    def certain(token: int) -> FunctionLanguageModel:
        return FunctionLanguageModel(
            lambda tokens: nn.functional.one_hot(torch.full_like(tokens, token), VOCABULARY).double() * 100.0,
            VOCABULARY, LENGTH,
        )  # fmt: skip

    records = tuple({"step": k, "seconds": float(k), **logged(k)} for k in range(1, 4))
    course = RunCourse("run", "run", (StageCourse("preferences", records, 3, 24, 3.0),))
    traces, drawn = figures(course, certain(2), data)
    shown = re.findall(r' (\d+)%, transparent\)" title="log p = ([-\d.]+)"> (\d)</span>', str(traces.content))
    mask = data.columns["mask"][3:].sum() + data.columns["rejected_mask"][3:].sum()
    assert len(shown) == int(mask)
    assert {(share, log_p, token == "2") for share, log_p, token in shown} == {
        ("0", "0.00", True), ("100", "-100.00", False),
    }  # fmt: skip
    points = re.findall(r'points="([^"]+)"', str(drawn.content))
    assert [line.split()[-1] for line in points] == ["572.0,90.0", "572.0,170.0"]  # -3 and -6 of a range to -6
    bare = RunCourse("run", "run", (StageCourse("sft", (), 0, 0, 0.0),))
    assert [figure.title for figure in figures(bare, certain(0), data)] == ["Right and wrong traces"]
    plain = Dataset("plain", data.x, columns={"mask": data.columns["mask"]})
    assert figures(course, certain(0), plain) == ()


def logged(k: int) -> dict[str, float]:
    return {"student/chosen_log_prob": -1.0 * k, "student/rejected_log_prob": -2.0 * k}


def test_what_a_policy_is_worth_counts_responses_alone() -> None:
    """Nats a token of the mask, over all texts together; without a mask all tokens but the first count."""
    data, model = pairs(), policy()
    mask = data.columns["mask"]
    table = language_table({"policy": model}, data)
    found = response_log_probs(model(data.x), data.x, mask).total.sum() / mask.sum()
    assert table.data[0]["nats"] == pytest.approx(-float(found), rel=1e-12)
    whole = torch.ones_like(data.x, dtype=torch.bool)
    found = response_log_probs(model(data.x), data.x, whole).mean.mean()
    plain = language_table({"policy": model}, Dataset("plain", data.x))
    assert plain.data[0]["nats"] == pytest.approx(-float(found), rel=1e-12)

"""REDI on a causal model of transformers, with low-rank weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fewstep as fs
from fewstep.data import Dataset
from fewstep.hub.language import wrap_language_model
from fewstep.language.log_probs import response_log_probs
from fewstep.language.redi import REDI
from fewstep.language_models import NetworkLanguageModel
from fewstep.networks.lora import factors_in
from fewstep.runs.course import run_recipe
from fewstep.training.budget import Budget
from fewstep.training.settings import Rank, Settings

transformers = pytest.importorskip("transformers")


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=11, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, bos_token_id=None, eos_token_id=None, pad_token_id=0,
        initializer_range=0.5,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def pairs() -> Dataset:
    gen = torch.Generator().manual_seed(0)
    right, wrong = (torch.randint(11, (16, 8), generator=gen) for _ in range(2))
    mask = torch.arange(8).expand(16, -1) >= 3
    return Dataset("pairs", right, columns={"mask": mask, "rejected": wrong, "rejected_mask": mask})


def test_log_probabilities_are_those_of_transformers() -> None:
    """Its own loss of labels, which counts from the second token on and passes over -100, is our mean."""
    model, data = llama(), pairs()
    mask = data.columns["mask"]
    theirs = [
        float(model(input_ids=row[None], labels=row.masked_fill(~there, -100)[None]).loss)
        for row, there in zip(data.x, mask, strict=True)
    ]
    ours = -response_log_probs(wrap_language_model(model)(data.x), data.x, mask).mean
    torch.testing.assert_close(ours, torch.tensor(theirs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("objective", ["redi", "dpo:beta=0.1"])
def test_low_rank_weights_learn_and_come_back(objective: str, tmp_path: Path) -> None:
    """Both stages move the low-rank weights alone; the model of the run folder opens with the same logits."""
    teacher, data = wrap_language_model(llama()), pairs()
    recipe = REDI(objective=objective, lr=3e-3, sft_lr=1e-2)  # type: ignore[arg-type]
    settings = Settings(Budget(12), 8, precision="fp32", log_steps=1, lora_rank=Rank(2))
    run = run_recipe(recipe, teacher, data, settings, tmp_path / "run", show=False)
    assert factors_in(run.model)
    base = dict(teacher.named_parameters())
    assert all(torch.equal(p, base[name]) for name, p in run.model.named_parameters() if name in base)
    assert not torch.allclose(run.model(data.x), teacher(data.x), atol=1e-3)
    opened = fs.load(tmp_path / "run")
    assert isinstance(opened, NetworkLanguageModel)
    torch.testing.assert_close(opened(data.x), run.model(data.x), rtol=0, atol=1e-6)

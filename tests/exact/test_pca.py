"""PCA: which pictures are chosen, what lies on the canvases, when the networks score."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fewstep.classifiers import NetworkClassifier
from fewstep.condense.canvases import shrink, split
from fewstep.condense.pca import PCA
from fewstep.condense.scores import Scores, scores_of
from fewstep.data.condensed import Condensed
from fewstep.data.dataset import Dataset
from fewstep.evaluation.classification import from_condensed, random_subset
from fewstep.methods.method import Batch, Networks, Progress
from fewstep.methods.start import Start
from fewstep.networks.classifiers import MLPClassifier
from fewstep.randomness import Rng
from fewstep.report import read_run
from fewstep.report.tasks import Figure
from fewstep.report.tasks.pca import figures
from fewstep.runs.course import run_recipe
from fewstep.training.budget import Budget
from fewstep.training.settings import Settings
from fewstep.training.trainer import Result

#: The reference code is of the benchmark; of the method itself no hyper-parameter is known.
PUBLISHED = {
    "per_class": ...,
    "k": ...,
    "keep": ...,
    "upright": ...,
    "epochs": ...,
    "nets": ...,
    "lr": ...,
    "optimizer": {},
}
SHAPE, CLASSES, N = (1, 16, 16), 3, 72
PAGE = Path(__file__).parents[2] / "docs" / "systems" / "pca.md"


def some_data(names: tuple[str, ...] = ("a", "b", "c")) -> Dataset:
    """Every class a picture of its own with more and more noise on it."""
    rng = Rng("pca data")
    labels = torch.arange(N) % CLASSES
    means = rng.normal(CLASSES, *SHAPE)
    noise = rng.normal(N, *SHAPE) * torch.linspace(0.1, 3, N)[:, None, None, None]
    x = ((means[labels] + noise).clamp(-2, 2) / 2 * 127.5 + 127.5).to(torch.uint8)
    return Dataset("some", x, labels, names)


def classifier() -> NetworkClassifier:
    """Whose weights do not count."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return NetworkClassifier(MLPClassifier(SHAPE, CLASSES, width=8), SHAPE, CLASSES)


def made(method: PCA, steps: int = 8, folder: Path | None = None, seed: int = 0) -> Condensed:
    settings = Settings(Budget(steps), batch=36, precision="fp32", seed=seed)
    return run_recipe(method, classifier(), some_data(), settings, folder, show=False).model


def networks(method: PCA) -> Networks:
    return method.networks(Start(classifier(), some_data()))


def trained(method: PCA, steps: int) -> Networks:
    """Its networks after some steps of plain gradient descent, in evaluation mode."""
    nets, data = networks(method), some_data()
    for step in range(steps):
        index = Rng(step).shuffled(N)[:36]
        batch = Batch(data.read(index), data.conditions(index), Rng(0))
        for update in method.updates(nets, batch, Progress(step, step * 36)):
            nets.zero_grad()
            update.loss.backward()
            with torch.no_grad():
                for p in nets.group_parameters("scorers"):
                    p -= 0.1 * p.grad
    return nets.requires_grad_(False).eval()


def labels_of(data: Dataset) -> Tensor:
    assert data.labels is not None
    return data.labels


def test_canvases_hold_the_shrunk_pictures_of_their_class() -> None:
    data, model = some_data(), made(PCA(per_class=3, k=2, nets=2))
    index = model.notes["index"]
    assert model.x.dtype == torch.uint8 and model.x.shape == (9, *SHAPE)
    assert index.shape == (9, 4) and len(index.unique()) == 36
    assert torch.equal(split(model.x, 2), shrink(data.x[index], 2))
    assert torch.equal(labels_of(data)[index], model.labels[:, None].expand(9, 4))
    assert model.labels.bincount().tolist() == [3, 3, 3]
    assert str(model.views) == "cells:2" and model.class_names == ("a", "b", "c")
    # nothing but pictures and labels is stored
    assert model.bytes() == 9 * (16 * 16 + 1) and set(model.notes) == {"index", "scores"}


@pytest.mark.parametrize("keep", ["easy", "hard"])
def test_the_budget_is_taken_from_the_end_of_the_ranking_of_the_whole_class(keep: str) -> None:
    """EL2N of the networks as they stand, and no picture left out is easier (harder) than one that is kept."""
    method = PCA(per_class=2, k=2, keep=keep, nets=2)  # type: ignore[arg-type]
    nets, data = trained(method, 6), some_data()
    model = method.student(nets)
    scores = model.notes["scores"]
    assert torch.equal(scores, scores_of(tuple(nets.scorers), data).float())
    chosen = model.notes["index"].reshape(CLASSES, 8)
    sign = 1 if keep == "easy" else -1
    for c, mine in enumerate(chosen):
        others = [i for i in range(N) if int(labels_of(data)[i]) == c and i not in mine.tolist()]
        assert len(others) == N // CLASSES - 8
        assert float((sign * scores[mine]).max()) <= float((sign * scores[others]).min())


def test_easy_pictures_are_those_with_little_noise() -> None:
    """The sign of the score: noise grows with the index, so that easy ones stand early in the data."""
    nets = trained(PCA(per_class=2, k=2), 8)
    middle = {
        keep: PCA(per_class=2, k=2, keep=keep).student(nets).notes["index"].double().mean()
        for keep in ("easy", "hard")
    }  # fmt: skip
    # of 24 a class with noise from 0.1 to 3: were the sign turned round, so were these
    assert float(middle["easy"]) < 20 and float(middle["hard"]) > 45


def test_one_random_picture_a_canvas_is_the_random_subset_of_the_comparison() -> None:
    data = some_data()
    for seed in (0, 5):
        model = made(PCA(per_class=4, k=1, keep="random"), 2, seed=seed)
        subset = random_subset(data, 12, seed)
        rows = subset.data.rows(slice(0, 12))
        order = model.notes["index"][:, 0].argsort()
        candidate = from_condensed("pca", model)
        mine = candidate.data.rows(order)
        assert mine.x is not None and rows.x is not None and isinstance(mine.cond, Tensor)
        assert torch.equal(mine.x, rows.x) and torch.equal(mine.cond, rows.cond)  # type: ignore[arg-type]
        assert candidate.bytes == subset.bytes and candidate.views == subset.views


def test_training_ends_early_whatever_the_budget(tmp_path: Path) -> None:
    """Two passes over 72 pictures in batches of 36 are four steps; what is there then is saved and not resumed."""
    method = PCA(per_class=2, k=2, epochs=2, nets=1)
    settings = Settings(Budget(9), batch=36, precision="fp32")

    def run() -> Result:
        return run_recipe(method, classifier(), some_data(), settings, tmp_path / "run", show=False)

    ended = run()
    assert (tmp_path / "run" / "checkpoint.safetensors").is_file()
    again = run()
    assert [found.steps for found in (ended, again)] == [4, 4] and ended.records[-1]["step"] == 4
    for model in (ended.model, again.model):
        assert torch.equal(made(method, 4).notes["scores"], model.notes["scores"])
    assert not torch.equal(made(method, 3).notes["scores"], made(method, 4).notes["scores"])


def test_networks_are_trained_alike_however_many_there_are() -> None:
    """Each from weights of its own, and by its own loss alone."""
    one, three = (trained(PCA(per_class=2, k=2, nets=nets), 3).scorers for nets in (1, 3))
    assert all(torch.equal(a, b) for a, b in zip(one[0].parameters(), three[0].parameters(), strict=True))
    assert not torch.equal(next(three[0].parameters()), next(three[1].parameters()))


def test_a_run_folder_keeps_the_scores(tmp_path: Path) -> None:
    model = made(PCA(per_class=2, k=2, nets=2), 2, tmp_path / "run")
    stores = list((tmp_path / "run" / "stores").iterdir())
    assert [store.name.partition("-")[0] for store in stores] == ["scores"]
    again = made(PCA(per_class=2, k=2, nets=2), 2, tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), again.buffers(), strict=True))


def test_pictures_are_scored_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr("fewstep.condense.pca.Scores", lambda *given: calls.append(given) or Scores(*given))
    made(PCA(per_class=2, k=2, nets=2), 2)
    assert len(calls) == 1


def test_the_example_of_the_page_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(example, {})
    assert capsys.readouterr().out == "".join(f"{said}\n" for said in re.findall(r"# (.*)", example))


def test_a_report_shows_what_was_merged_chosen_and_left_out(tmp_path: Path) -> None:
    data, method = some_data(), PCA(per_class=3, k=2, nets=2)
    model = made(method, 6, tmp_path / "run")
    found = figures(read_run(tmp_path / "run"), model, data)
    assert [figure.title for figure in found] == ["Merged", "Chosen", "Left out"]

    def pictures(figure: Figure, columns: int) -> Tensor:
        """Of a sheet, one pixel for each that it was scaled up to; its gaps are 6 % of a picture."""
        assert isinstance(figure.content, bytes)
        pixels = torch.from_numpy(np.asarray(Image.open(io.BytesIO(figure.content)).convert("LA")).copy())[..., 0]
        rows = [row[:112] for row in pixels.split(112 + 7, 0)]
        cells = [cell[:, :112] for row in rows for cell in row.split(112 + 7, 1)]
        assert len(rows) == CLASSES and len(cells) == CLASSES * columns
        return torch.stack(cells)[:, None, ::7, ::7]

    assert torch.equal(pictures(found[0], 3), model.x)
    index = model.notes["index"].reshape(CLASSES, 12)
    assert torch.equal(pictures(found[1], 10), data.x[index[:, :10].flatten()])
    # of 24 a class 12 are left, and as far from the chosen ones as there are: the hardest
    scores = model.notes["scores"]
    hardest = [(scores + 9 * (labels_of(data) == c)).argsort(descending=True)[:10] for c in range(CLASSES)]
    assert torch.equal(pictures(found[2], 10), data.x[torch.cat(hardest)])


def test_what_cannot_be_asked_is_told_before_training() -> None:
    with pytest.raises(
        ValueError, match=r"^k=3 must divide pictures of 16x16 into cells .*; possible: 1 \(whole pictures\), 2$"
    ):
        networks(PCA(k=3))
    with pytest.raises(ValueError, match=r"^28 examples of each class are asked for, and class 0 has 24$"):
        networks(PCA(per_class=7, k=2))
    unlabelled = Dataset("some", some_data().x, labels_of(some_data()) - 1, ("a", "b", "c"))
    with pytest.raises(ValueError, match=r"^label -1: every sample must have a class, from 0 on$"):
        PCA().networks(Start(classifier(), unlabelled))
    with pytest.raises(ValueError, match=r"^PCA: keep: 'eazy' is not one of easy, hard, random; did you mean 'easy'"):
        PCA(keep="eazy")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^PCA: per_class=0 must be at least 1$"):
        PCA(per_class=0)
    with pytest.raises(ValueError, match=r"^data 'bare' has no labels"):
        PCA().networks(Start(classifier(), Dataset("bare", some_data().x)))

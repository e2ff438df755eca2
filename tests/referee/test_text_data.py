"""Captions and prompts as data: read from folders, metadata and tables, encoded once by the teacher's text encoder."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny_pipelines import autoencoder, clip_text, ddim, unet2d_condition
from torch import Tensor

import fewstep as fs
from fewstep.cli import main
from fewstep.data import Captioned, Dataset, Draw, Prior, encoded, load_samples
from fewstep.data.encoded import Latents, Table, make_table
from fewstep.hub.diffusers import load_pipeline
from fewstep.runs.conditions import as_read_by

CAPTIONS = ["a b", "c", "a b", "b", "c c", "a"]
OPTIONS: dict[str, Any] = {"budget": "3steps", "batch": 4, "show": False, "precision": "fp32"}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion of a few weights on pictures of 16x16 pixels, latents of 8x8, that reads a to c."""
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("text")
    diffusers.StableDiffusionPipeline(
        vae=autoencoder(), unet=unet2d_condition(), scheduler=ddim(), **clip_text(projected=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(place)  # fmt: skip
    return place


def pictures() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (len(CAPTIONS), 16, 16, 3), dtype=np.uint8)


def with_texts(folder: Path) -> Path:
    """``x.txt`` beside ``x.png``."""
    for i, (picture, caption) in enumerate(zip(pictures(), CAPTIONS, strict=True)):
        Image.fromarray(picture).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption + "\n")
    return folder


def with_metadata(folder: Path) -> Path:
    """One file for all, in another order."""
    lines = []
    for i, (picture, caption) in enumerate(zip(pictures(), CAPTIONS, strict=True)):
        Image.fromarray(picture).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(reversed(lines)) + "\n\n")
    return folder


def as_table(folder: Path) -> Path:
    """A column of text, and labels that captions take the place of."""
    cells = []
    for picture in pictures():
        buffer = BytesIO()
        Image.fromarray(picture).save(buffer, "PNG")
        cells.append({"bytes": buffer.getvalue(), "path": None})
    columns = {"image": cells, "text": CAPTIONS, "label": [0] * len(CAPTIONS)}
    pq.write_table(pa.table(columns), folder / "train.parquet", row_group_size=2)
    return folder


def weights(model: torch.nn.Module) -> Tensor:
    return torch.cat([p.flatten() for p in model.parameters()])


@pytest.mark.parametrize("write", [with_texts, with_metadata, as_table])
def test_pictures_with_captions_train_as_their_latents_and_embeddings(
    write: Callable[[Path], Path], pipeline: Path, tmp_path: Path
) -> None:
    """What ``distill`` makes of a folder is what it makes of latents and embeddings made by hand; read as training goes
    the folder gives the same bits as in memory."""
    loaded = load_pipeline(pipeline)
    x = torch.from_numpy(pictures()).permute(0, 3, 1, 2).float() / 127.5 - 1
    by_hand = Dataset("by hand", loaded.encode(x), loaded.embed(CAPTIONS))
    method = fs.ConsistencyDistillation()
    expected = weights(fs.distill(loaded.denoiser, method, by_hand, **OPTIONS))
    source = str(write(tmp_path))
    found = weights(fs.distill(str(pipeline), method, source, **OPTIONS))
    assert float((found - expected).abs().max()) < 1e-6  # captions are embedded in another number at a time
    held = as_read_by(loaded.denoiser, load_samples(source, captions=True))
    streamed = as_read_by(loaded.denoiser, load_samples(source, captions=True, memory=0, workers=1))
    pairs = [data.rows(torch.tensor([4, 0, 2])) for data in (held, streamed)]
    assert torch.equal(pairs[0].x, pairs[1].x) and torch.equal(*(rows.cond["prompt_embeds"] for rows in pairs))
    assert torch.equal(next(held.feed([Draw(torch.tensor([1]), torch.zeros(1), 0)])).x, held.rows(slice(1, 2)).x)


def test_the_command_line_reads_captions(pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder for a method that needs samples, a list of prompts for one that does not; else one line."""
    (tmp_path / "data").mkdir()
    folder, prompts = with_texts(tmp_path / "data"), tmp_path / "prompts.txt"
    prompts.write_text("a b\n\n  c  \n")
    quick = f"--budget 2steps --batch 4 --precision fp32 --quiet --teacher {pipeline}"
    assert main(f"distill cm --data {folder} --out {tmp_path / 'cm'} {quick}".split()) == 0
    instaflow = f"distill instaflow --data {prompts} --pairs 4 --ode-steps 2"
    assert main(f"{instaflow} --out {tmp_path / 'if'} {quick}".split()) == 0
    recipe = json.loads((tmp_path / "if" / "recipe.json").read_text())
    assert recipe["data"]["samples"] == 2 and recipe["data"]["sha256"] == Captioned(["a b", "c"]).sha256()
    assert main(f"distill cm --data {folder} --dry-run {quick}".split()) == 0
    capsys.readouterr()
    assert main(f"distill cm --data {prompts} --out {tmp_path / 'no'} {quick}".split()) == 2
    said = capsys.readouterr().err
    assert "this method reads samples" in said.splitlines()[-1] and "Traceback" not in said


def test_prompts_as_a_list(pipeline: Path) -> None:
    """In Python, and what the teacher is asked for every prompt is embedded once."""
    teacher = load_pipeline(pipeline).denoiser
    fs.distill(teacher, fs.InstaFlow(pairs=4, ode_steps=2), ["a", "b c"], **OPTIONS)
    asked: list[str] = []

    def embed(prompts: list[str]) -> dict[str, Tensor]:
        asked.extend(prompts)
        return {"prompt_embeds": torch.tensor([[float(len(prompt))] for prompt in prompts])}

    data = Captioned(CAPTIONS).encoded(embed, (3,))
    assert asked == ["a b", "c", "b", "c c", "a"] and data.shape == (3,) and len(data) == 6
    rows = data.rows(torch.tensor([2, 4]))
    assert rows.x is None and rows.cond["prompt_embeds"].tolist() == [[3.0], [3.0]]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda place: (place / "3.txt").unlink(), "1 of the 6 pictures .* have no caption, such as '3.png'"),
        (lambda place: (place / "3.txt").write_bytes(b"\xff"), "3.txt: not UTF-8 text"),
        (lambda place: (place / "metadata.jsonl").write_text('{"file_name": "0.png"}'), "line 1: it has no caption"),
        (lambda place: (place / "metadata.jsonl").write_text("{"), "metadata.jsonl, line 1: not valid JSON"),
        (lambda place: (place / "metadata.jsonl").write_text('{"text": ""}'), "line 1: .*file_name"),
        (lambda place: (place / "metadata.jsonl").write_text(""), "6 of the 6 pictures .* no line for it"),
    ],
)
def test_damaged_captions(damage: Callable[[Path], object], words: str, tmp_path: Path) -> None:
    """One line that names what is missing."""
    damage(with_texts(tmp_path))
    with pytest.raises(ValueError, match=words) as caught:
        load_samples(tmp_path, captions=True)
    assert "\n" not in str(caught.value)


def test_other_captions_that_cannot_be(pipeline: Path, tmp_path: Path) -> None:
    """Rows without a caption, no prompts, a teacher that cannot read, pictures of another size, too few captions."""
    table = pa.table({"image": [b"", b""], "text": ["a", None]})
    pq.write_table(table, tmp_path / "x.parquet")
    (tmp_path / "none.txt").write_text("\n \n")
    teacher = load_pipeline(pipeline).denoiser
    (tmp_path / "small").mkdir()
    for i in range(2):
        Image.new("RGB", (8, 8)).save(tmp_path / "small" / f"{i}.png")
        (tmp_path / "small" / f"{i}.txt").write_text("a")
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: load_samples(tmp_path / "none.txt", captions=True), "none.txt' holds no prompts"),
        (lambda: Captioned([]), "no prompts"),
        (lambda: Captioned(["a"], Dataset("x", torch.zeros(2, 1))), "2 samples but 1 captions"),
        (lambda: fs.distill("digits", fs.InstaFlow(), ["a"], **OPTIONS), "no text encoder"),
        (
            lambda: fs.distill(teacher, fs.ConsistencyDistillation(), str(tmp_path / "small"), **OPTIONS),
            r"samples \[3, 8, 8\], the teacher's autoencoder reads pictures \[3, 16, 16\]",
        ),
        (lambda: Captioned(["a"]).encoded(lambda prompts: {"e": torch.zeros(2)}, (1,)), r"e of 1 prompts .*\[2\]"),
    ]
    for case, words in cases:
        with pytest.raises(ValueError, match=words):
            case()


def test_tables_on_disk_are_those_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rows from files, which are made once: what a killed run left is taken up."""
    made: list[int] = []

    def encode(call: slice) -> dict[str, Tensor]:
        made.append(call.start)
        rows = torch.arange(call.start, call.stop)
        return {"e": rows[:, None].float().sin().expand(-1, 3), "n": rows}

    monkeypatch.setattr(encoded, "CALL", 2)
    monkeypatch.setattr(encoded, "FILE", 4)
    held = make_table(encode, 11, tmp_path)
    assert not list(tmp_path.iterdir()) and made == [0, 2, 4, 6, 8, 10]
    monkeypatch.setattr(encoded, "HELD", 0)
    make_table(encode, 11, tmp_path)
    (tmp_path / "000001.safetensors").unlink()
    made.clear()
    stored = make_table(encode, 11, tmp_path)
    assert made == [4, 6] and len(list(tmp_path.iterdir())) == 3
    order = torch.tensor([10, 0, 5, 5])
    for name, rows in held.rows(order).items():
        assert torch.equal(rows, stored.rows(order)[name]) and rows.dtype == stored.rows(order)[name].dtype


def test_prompts_of_several_lengths() -> None:
    """Padded with zeros where a mask says how long each is; refused where none does."""
    parts = [{"e": torch.ones(1, n, 2), "e_mask": torch.ones(1, n)} for n in (2, 3)]
    rows = Table(parts, 1, 2).rows(torch.tensor([0, 1]))
    assert rows["e"].shape == (2, 3, 2) and rows["e_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert rows["e"][0, 2].tolist() == [0, 0]
    with pytest.raises(ValueError, match="e of some prompts is 3 long, of others 2, and there is no mask"):
        Table([{"e": part["e"]} for part in parts], 1, 2)


def test_latents_keep_what_goes_with_samples() -> None:
    """Labels and columns, in memory."""
    x = torch.arange(6.0)[:, None]
    data = Dataset("x", x, torch.arange(6) % 2, columns={"noise": -x})
    latents = Latents.of(data, lambda x: torch.cat([x, 2 * x], dim=1))
    rows = latents.rows(torch.tensor([5, 1]))
    assert latents.shape == (2,) and latents.classes == 2 and len(latents) == 6
    assert rows.x.tolist() == [[5, 10], [1, 2]] and rows.cond.tolist() == [1, 1]
    assert rows.columns["noise"].tolist() == [[-5], [-1]]
    with pytest.raises(ValueError, match="no samples to encode"):
        Latents.of(Prior((1,)), lambda x: x)

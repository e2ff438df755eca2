"""Tokenizers in folders of transformers, against transformers: a model speaks, reads text, and keeps its tokenizer."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fewstep as fs
from fewstep.data import load as load_data
from fewstep.data.text import read_text
from fewstep.evaluation import language
from fewstep.hub.language import save_language_model
from fewstep.language.modelling import LanguageModelling
from fewstep.language_models import NetworkLanguageModel
from fewstep.networks.causal import GRULanguageModel
from fewstep.report.tasks import distill_spec

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
TEXT = "to be or not to be, that is the question: café, 日本!\n" * 120


def tokenizer() -> Any:
    """Pairs of bytes, with a mark that stands before every text."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [TEXT.replace("日", "").replace("本", "")],
        tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>"], initial_alphabet=letters),
    )
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    tokenizer().save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_a_text_has_the_tokens_of_transformers_and_comes_back(folder: Path) -> None:
    model = fs.load(folder)
    tokens = model.tokenizer.encode(TEXT)
    assert tokens.tolist() == tokenizer()(TEXT).input_ids and tokens[0] == 0
    assert model.decode(tokens[None]) == [f"<s>{TEXT}"]


def test_pieces_of_a_text_are_its_tokens_with_each_character_whole(folder: Path) -> None:
    """The tokenizer has not seen the last two characters, so that each is three bytes, a token each."""
    model = fs.load(folder)
    tokens = model.tokenizer.encode("café, 日本")
    pieces = model.pieces(tokens)
    assert pieces[-6:] == ["", "", "日", "", "", "本"] and pieces[0] == "<s>"
    assert "".join(pieces) == "<s>café, 日本"
    assert model.pieces(tokens[:-1])[-3:] == ["日", "", "\N{REPLACEMENT CHARACTER}"]
    numbers = NetworkLanguageModel(GRULanguageModel(11, 8, width=4), 11, 8)
    assert numbers.pieces(torch.tensor([3, 10, 4])) == ["3", " 10", " 4"]
    assert numbers.pieces(torch.tensor([], dtype=torch.long)) == []


@pytest.mark.parametrize("save", [fs.save, save_language_model])
def test_a_saved_model_speaks_where_the_first_is_gone(save: Callable[..., Path], folder: Path, tmp_path: Path) -> None:
    """So does one that was trained from it, and one that was saved again from there."""
    text = tmp_path / "hamlet.txt"
    text.write_text(TEXT)
    trained = fs.distill(fs.load(folder), LanguageModelling(), text, "1steps", batch=4, show=False)
    save(trained, tmp_path / "first")
    shutil.rmtree(folder)
    save(fs.load(tmp_path / "first"), tmp_path / "again")
    shutil.rmtree(tmp_path / "first")
    model = fs.load(tmp_path / "again")
    assert model.tokenizer.encode("be, that").tolist() == tokenizer()("be, that").input_ids
    assert model.decode(torch.tensor([tokenizer()("be").input_ids])) == ["<s>be"]


def test_text_data_are_read_by_the_tokenizer_of_the_model(folder: Path, tmp_path: Path) -> None:
    """Every fourth block of tokens is held out; a run notes the same data, from Python and by name."""
    text = tmp_path / "hamlet.txt"
    text.write_text(TEXT * 8)
    tokens = torch.tensor(tokenizer()(TEXT * 8).input_ids)
    assert len(tokens) > 4 * 4096
    model = fs.load(folder)
    train = load_data(text, tokenizer=model.tokenizer)
    assert torch.equal(train.x[1], tokens[16:80])
    assert torch.equal(load_data(text, "test", tokenizer=model.tokenizer).x[0], tokens[3 * 4096 : 3 * 4096 + 64])
    run = tmp_path / "run"
    fs.distill(model, LanguageModelling(), text, "1steps", batch=4, show=False, folder=run)
    assert json.loads((run / "recipe.json").read_text())["data"]["sha256"] == train.sha256()


def test_commands_read_text_by_it_too(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run from the folder, and a draft without a tokenizer beside it, which is measured on its target's tokens."""
    from fewstep.cli import main

    monkeypatch.chdir(tmp_path)
    for name in ("PROMPTS", "MEASURED", "TEXTS"):
        monkeypatch.setattr(language, name, 2)
    monkeypatch.setattr(distill_spec, "COUNTED", 2)
    train = load_data("shakespeare", tokenizer=fs.load(folder).tokenizer)
    fs.save(NetworkLanguageModel(GRULanguageModel(300, 64, width=4), 300, 64), "draft")
    words = "--teacher llama --student draft --data shakespeare --fixed 1 --draft 0 --budget 1steps --batch 4 --quiet"
    assert main(["distill", "distill-spec", *words.split(), "--out", "run", "--precision", "fp32"]) == 0
    assert json.loads(Path("run/recipe.json").read_text())["data"]["sha256"] == train.sha256()
    assert main(["evaluate", "run"]) == 0
    held_out = load_data("shakespeare", "test", tokenizer=fs.load(folder).tokenizer).x[:2]
    nats = language.cross_entropy(fs.load(folder), held_out, torch.ones_like(held_out, dtype=torch.bool))
    assert f"{nats:.4f}" in capsys.readouterr().out
    assert main(["report", "run", "--out", "page.html"]) == 0
    said = read_text("shakespeare")
    shown = Path("page.html").read_text().split('<span class="faint">&lt;s&gt;')[1].split("</span>")[0]
    assert shown and said.startswith(shown.replace("&#x27;", "'"))


def test_a_folder_without_one_has_numbers(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    model = fs.load(folder)
    assert model.tokenizer is None and model.decode(torch.tensor([[5, 7]])) == ["5 7"]


def test_what_cannot_be_read_is_said_in_one_line_when_text_is_asked_for(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    model = fs.load(folder)
    with pytest.raises(ValueError, match=r"^[^\n]*llama: [^\n]+$"):
        model.tokenizer.encode("be")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer().save_pretrained(folder)
    assert model.tokenizer.encode("be")[0] == 0  # opened again when its files have changed
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "auto_map": {"AutoTokenizer": ["a.B", None]}}))
    with pytest.raises(ValueError, match="'auto_map' names code"):
        model.decode(torch.tensor([[1]]))


def test_a_tokenizer_of_more_tokens_than_the_model_is_refused(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    grown = tokenizer()
    grown.add_tokens([f"x{i}" for i in range(300)])
    grown.save_pretrained(folder)
    with pytest.raises(ValueError, match=f"its tokenizer writes token {len(grown) - 1}, the model has 300"):
        fs.load(folder).tokenizer.encode("x299")

"""Language models of transformers, against transformers itself: a tiny Llama with weights of its own."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import fewstep as fs
from fewstep.data import Dataset
from fewstep.divergences import Divergence
from fewstep.hub.language import as_assistant, save_language_model, wrap_language_model
from fewstep.language.decoding import Decoding
from fewstep.language.distill_spec import DistillSpec
from fewstep.language.speculative import speculative_decode
from fewstep.language_models import NetworkLanguageModel, RestrictedVocabulary
from fewstep.networks.causal import CausalTransformer, GRULanguageModel
from fewstep.randomness import Rng

transformers = pytest.importorskip("transformers")
PROMPT = torch.tensor([[1, 5, 3]])


def llama(seed: int = 0, width: int = 16) -> Any:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=11, hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=40, bos_token_id=None, eos_token_id=None, pad_token_id=0,
        initializer_range=0.5,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "llama")
    (tmp_path / "llama" / "tokenizer.json").write_text("{}")
    return tmp_path / "llama"


def test_a_folder_is_opened_by_load_and_has_the_logits_of_transformers(folder: Path) -> None:
    model = fs.load(folder)
    assert isinstance(model, NetworkLanguageModel)
    assert (model.vocabulary, model.length) == (11, 40)
    torch.testing.assert_close(model(PROMPT), llama()(PROMPT).logits, rtol=0, atol=1e-6)


def test_its_cache_is_cut_back() -> None:
    model = wrap_language_model(llama().double())
    x = torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(0))
    _, state = model.extend(x, model.begin())
    logits, again = model.extend(x.flip(0)[:, 4:], state.cut(4))
    assert again.length == 9 == state.length
    whole = torch.cat([x[:, :4], x.flip(0)[:, 4:]], dim=1)
    torch.testing.assert_close(logits, model(whole)[:, 4:], rtol=0, atol=1e-12)
    torch.testing.assert_close(model.extend(x[:, 4:], state.cut(4))[0], model(x)[:, 4:], rtol=0, atol=1e-12)


def test_it_is_saved_back_as_transformers_opens_it_and_in_a_folder_of_ours(folder: Path, tmp_path: Path) -> None:
    model = fs.load(folder)
    with torch.no_grad():
        next(iter(model.parameters())).add_(0.1)
    back = transformers.LlamaForCausalLM.from_pretrained(save_language_model(model, tmp_path / "back")).eval()
    assert torch.equal(back(PROMPT).logits, model(PROMPT))
    assert (tmp_path / "back" / "tokenizer.json").is_file()
    ours = fs.load(fs.save(model, tmp_path / "ours"))
    assert torch.equal(ours(PROMPT), model(PROMPT))
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["model"]["network"]["name"] == "transformers"


def test_speculative_decoding_is_transformers_greedy_text() -> None:
    target = llama()
    expected = target.generate(PROMPT, max_new_tokens=30, do_sample=False)
    draft = wrap_language_model(llama(1, width=8))
    out = speculative_decode(wrap_language_model(target), draft, PROMPT[0], Rng(0), 30, gamma=3, decoding=Decoding(0.0))
    assert torch.equal(out.tokens, expected[0, 3:])


@pytest.mark.parametrize("kind", ["gru", "transformer", "restricted", "itself"])
def test_our_drafts_are_assistants_of_transformers(kind: str) -> None:
    """The text is the target's greedy one whatever the draft is, and a draft equal to the target saves calls."""
    target = llama()
    torch.manual_seed(2)
    gru = GRULanguageModel(11, 40, width=8)
    draft = {
        "gru": lambda: NetworkLanguageModel(gru, 11, 40),
        "transformer": lambda: NetworkLanguageModel(CausalTransformer(11, 40, width=8, blocks=1, heads=2), 11, 40),
        "restricted": lambda: RestrictedVocabulary(
            NetworkLanguageModel(GRULanguageModel(5, 40, width=8), 5, 40), torch.tensor([1, 3, 5, 7]), 11
        ),
        "itself": lambda: wrap_language_model(llama()),
    }[kind]()
    calls = []
    target.register_forward_hook(lambda *_: calls.append(1))
    plain = target.generate(PROMPT, max_new_tokens=30, do_sample=False)
    alone = len(calls)
    calls.clear()
    assisted = target.generate(PROMPT, max_new_tokens=30, do_sample=False, assistant_model=as_assistant(draft))
    assert torch.equal(assisted, plain)
    assert alone == 30
    assert len(calls) < (12 if kind == "itself" else 31)


def test_an_assistant_computes_what_is_new_alone() -> None:
    read: list[int] = []
    draft = NetworkLanguageModel(GRULanguageModel(11, 40, width=8), 11, 40)
    real = draft.extend
    draft.extend = lambda tokens, state: (read.append(tokens.shape[1]), real(tokens, state))[1]  # type: ignore[method-assign]
    assistant = as_assistant(draft)
    assistant(torch.tensor([[1, 2, 3]]))
    assistant(torch.tensor([[1, 2, 3, 4]]))
    logits = assistant(torch.tensor([[1, 2, 5, 4]])).logits
    assistant(torch.tensor([[1, 2, 5, 4]]))
    assert read == [3, 1, 2, 1]
    torch.testing.assert_close(logits[:, -1], draft(torch.tensor([[1, 2, 5, 4]]))[:, -1])


def test_what_cannot_be_opened_is_said_in_one_line(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    for key in ("auto_map", "quantization_config"):
        (folder / "config.json").write_text(json.dumps({**config, key: {"AutoModelForCausalLM": "code.Model"}}))
        with pytest.raises(ValueError, match=f"'{key}' names"):
            fs.load(folder)
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "no-such-model"}))
    with pytest.raises(ValueError, match="no-such-model"):
        fs.load(folder)
    config = transformers.MambaConfig(vocab_size=11, hidden_size=8, state_size=4, num_hidden_layers=1)
    with pytest.raises(ValueError, match="keeps no keys and values"):
        wrap_language_model(transformers.MambaForCausalLM(config))
    with pytest.raises(TypeError, match="is not a model of transformers"):
        save_language_model(NetworkLanguageModel(GRULanguageModel(11, 40, width=8), 11, 40), folder)


@pytest.mark.parametrize("divergence", ["jsd:0.5", "reverse-kl", "tvd"])
@pytest.mark.parametrize(
    "shares", [{"fixed": 1.0, "draft": 0.0}, {"target": 1.0, "draft": 0.0, "texts": 16}, {}], ids=str
)
def test_a_draft_of_a_few_tokens_is_distilled_from_it(
    divergence: str, shares: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    """On texts of the data, of the target and of the draft; what is written is opened again, and decodes beside it."""
    torch.manual_seed(0)
    inner = NetworkLanguageModel(GRULanguageModel(6, 40, width=8), 6, 40)
    draft = RestrictedVocabulary(inner, torch.tensor([1, 9, 3, 7, 5]), 11)
    data = Dataset("tokens", torch.randint(11, (32, 24)))
    method, run = DistillSpec(Divergence.parse(divergence), prompt=4, lr=1e-2, **shares), tmp_path / "run"
    settings: dict[str, Any] = {"batch": 8, "precision": "fp32", "show": False, "log_steps": 1, "folder": run}
    made = fs.distill(str(folder), method, data, "6steps", student=draft, **settings)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert all(math.isfinite(line["student/loss"]) and 0 < line["student/acceptance"] < 1 for line in lines)
    found = fs.load(run)
    assert isinstance(found, RestrictedVocabulary) and torch.equal(found.kept, draft.kept)
    assert torch.equal(found(data.x), made(data.x)) and not torch.equal(found(data.x), draft(data.x))
    text = speculative_decode(fs.load(folder), found, PROMPT[0], Rng(0), 30, gamma=3)
    assert set(text.tokens[text.accepted].tolist()) <= set(draft.kept.tolist())


def test_a_sliding_window_sees_the_same_whether_it_is_read_whole_or_in_parts() -> None:
    torch.manual_seed(0)
    sliding = transformers.MistralConfig(
        vocab_size=11, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=40, sliding_window=4,
    )  # fmt: skip
    window, x = wrap_language_model(transformers.MistralForCausalLM(sliding).eval()), torch.arange(9)[None]
    parts, state = [], window.begin()
    for token in x.split(1, dim=1):
        logits, state = window.extend(token, state)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), window(x), rtol=0, atol=1e-5)

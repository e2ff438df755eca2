"""Causal language models of transformers: opened from their folders, saved back, and our drafts beside them.

Opened, such a model is a :class:`~fewstep.language_models.NetworkLanguageModel` around :class:`TransformersNetwork`: it
can be a target, a draft or trained like any other, and fewstep's own folders hold it too.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.hub.folders import check_weights, offline, refuse_elsewhere
from fewstep.hub.requires import require
from fewstep.hub.tokenizers import FolderTokenizer, copy_tokenizer, tokenizer_in
from fewstep.language_models import Cache, LanguageModel, NetworkLanguageModel
from fewstep.schemas import Place, blaming, read_json

PURPOSE = "a language model of transformers"
#: The tokens of a model whose config does not say how many it reads.
USUAL_LENGTH = 1024
#: What a config may say of kernels, code and storage; weights are read as they are, in float32.
LEFT_OUT = ("attn_implementation", "experts_implementation", "auto_map", "quantization_config", "dtype", "torch_dtype")


class TransformersNetwork(nn.Module):
    """A causal model of transformers as a causal network of ours: tokens ``[B, L]`` to logits ``[B, L, V]``.

    Its cache is a :class:`~fewstep.language_models.Cache` of the keys and values of every layer, and every call makes a
    new one.  ``folder`` is where it came from, None for one that was made; its text is read and written by the
    tokenizer there.  ValueError for a model whose state is no list of keys and values (a recurrence, a sliding window
    that forgets), which cannot be cut back.
    """

    def __init__(self, model: Any, folder: Path | None = None) -> None:
        super().__init__()
        text = model.config.get_text_config()
        self.model, self.folder = model, folder
        self.vocabulary: int = text.vocab_size
        self.length: int = text.to_dict().get("max_position_embeddings") or USUAL_LENGTH
        taken = inspect.signature(model.forward).parameters
        self.cache_name = "cache" if "cache" in taken else "past_key_values"  # before transformers 5.20 or so
        if self.cache_name not in taken or model._is_stateful:
            raise ValueError(f"{type(model).__name__} keeps no keys and values of tokens, so it cannot go back to one")

    @property
    def tokenizer(self) -> FolderTokenizer | None:
        """The tokenizer in the folder, None where there is none."""
        return None if self.folder is None else tokenizer_in(self.folder, self.vocabulary, self.model.config)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits

    def extend(self, tokens: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        held = require("transformers", PURPOSE).DynamicCache()
        for layer, (keys, values) in enumerate(zip(cache.parts[::2], cache.parts[1::2], strict=True)):
            held.update(keys, values, layer)
        logits = self.model(input_ids=tokens, use_cache=True, **{self.cache_name: held}).logits
        parts = [vars(layer).get(name) for layer in held.layers for name in ("keys", "values")]
        length = cache.length + tokens.shape[1]
        if not parts or any(part is None or part.shape[-2] != length for part in parts):
            raise ValueError(f"{type(self.model).__name__} forgets tokens, so it cannot go back to all of them")
        return logits, Cache(length, tuple(parts))


def as_transformers(net: nn.Module) -> TransformersNetwork | None:
    """A network where it is transformers', None where it is another's."""
    return net if type(net) is TransformersNetwork else None


def wrap_language_model(model: Any, folder: Path | None = None) -> NetworkLanguageModel:
    """A causal model of transformers as a language model of ours, on its memory."""
    net = TransformersNetwork(model, folder)
    return NetworkLanguageModel(net, net.vocabulary, net.length)


def is_language_model(folder: Path) -> bool:
    """Whether the config.json of a folder is one of transformers, which names the type of a model."""
    config = read_json(folder / "config.json")
    return isinstance(config, dict) and "model_type" in config and "format" not in config


def load_language_model(folder: Path) -> NetworkLanguageModel:
    """The causal model in a folder of transformers, frozen, in float32 and evaluation mode.

    ValueError for a folder that would run code, open a pickle or ask a host, for quantised weights, and for what
    transformers cannot open.
    """
    refuse_elsewhere(folder, {"quantization_config": "numbers that are no weights"})
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder}: an adapter (adapter_config.json) of a model that is elsewhere; merge it first")
    check_weights(folder, quantised=False)
    transformers = require("transformers", PURPOSE)
    with offline(), blaming(folder):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, trust_remote_code=False, dtype=torch.float32
        )
    return wrap_language_model(model.requires_grad_(False).eval(), folder)


def save_language_model(model: NetworkLanguageModel, folder: str | Path) -> Path:
    """Write a folder that transformers' ``from_pretrained`` opens, with the tokenizer of the one it came from.

    TypeError for a model whose network is not transformers'.
    """
    net = as_transformers(model.net)
    if net is None:
        raise TypeError(f"a {type(model.net).__name__} is not a model of transformers: fewstep.save writes it")
    place = Path(folder)
    net.model.save_pretrained(place, safe_serialization=True)
    keep_tokenizers(model, place)
    return place


def keep_tokenizers(model: nn.Module, folder: Path) -> None:
    """Copy the tokenizer of the network of transformers inside a model, if it has one, into the model's folder."""
    for net in filter(None, map(as_transformers, model.modules())):
        if net.folder is not None:
            copy_tokenizer(net.folder, folder)


def find_tokenizers(model: nn.Module, folder: Path) -> None:
    """Tell the network of transformers inside a model, if it has one, that its tokenizer lies in the model's folder."""
    for net in filter(None, map(as_transformers, model.modules())):
        net.folder = folder


def causal_names() -> dict[str, str]:
    """The causal models that transformers knows: the type in a config and the name of the class."""
    auto = require("transformers.models.auto.modeling_auto", PURPOSE)
    names: dict[str, str] = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return names


def described(net: TransformersNetwork) -> dict[str, Any]:
    """A model of transformers as plain data, for fewstep's own folders."""
    config = plain(json.loads(net.model.config.to_json_string(use_diff=False)))
    return {"class": type(net.model).__name__, "config": config, "vocabulary": net.vocabulary, "length": net.length}


def plain(config: dict[str, Any]) -> dict[str, Any]:
    """A config without what says how and where it is to be run."""
    return {key: value for key, value in config.items() if not key.startswith("_") and key not in LEFT_OUT}


def fresh(description: dict[str, Any]) -> TransformersNetwork:
    """The model of :func:`described` with fresh weights; ValueError for a class that is no causal model."""
    name, config = description["class"], description["config"]
    if name not in causal_names().values():
        raise Place("network.class").wrong(name, "a causal language model of transformers")
    kind = getattr(require("transformers", PURPOSE), name)
    return TransformersNetwork(kind(kind.config_class.from_dict(plain(config))))


def as_assistant(draft: LanguageModel) -> Any:
    """A draft as transformers' ``generate`` takes it: ``target.generate(..., assistant_model=as_assistant(draft))``.

    It keeps what it has read, and goes back by itself to what it has in common with what it is given next: the target
    may keep another cache.  For one sequence at a time, as ``generate`` with an assistant is anyway.
    """
    from fewstep.hub.assistant import Assistant, AssistantConfig

    return Assistant(AssistantConfig(vocab_size=draft.vocabulary, max_position_embeddings=draft.length), draft)

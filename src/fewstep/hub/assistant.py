"""A language model of ours inside transformers' ``generate``.  Importing this module imports transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from fewstep.language_models import LanguageModel, State


class AssistantConfig(PretrainedConfig):
    """As much of a config as ``generate`` reads."""

    model_type = "fewstep-draft"

    def __init__(self, vocab_size: int = 2, max_position_embeddings: int = 2, **more: Any) -> None:
        super().__init__(**more)
        self.vocab_size, self.max_position_embeddings = vocab_size, max_position_embeddings
        self.num_hidden_layers, self.hidden_size, self.num_attention_heads = 1, 1, 1


class Assistant(PreTrainedModel, GenerationMixin):
    """A draft that reads whole sequences ``[1, L]`` at every call and computes what is new in them."""

    config_class = AssistantConfig
    main_input_name = "input_ids"

    def __init__(self, config: AssistantConfig, draft: LanguageModel) -> None:
        super().__init__(config)
        self.draft = draft
        self.read: list[int] = []
        self.state: State = draft.begin()
        self.generation_config.use_cache = False

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, cache: Any = None, past_key_values: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The whole sequence: the caches that ``generate`` hands around stay empty."""
        return {"input_ids": input_ids}

    @torch.no_grad()
    def forward(self, input_ids: Tensor, **kwargs: Any) -> CausalLMOutput:
        """The logits ``[1, k, V]`` of the tokens that were not read before, the last one among them."""
        (tokens,) = input_ids.tolist()
        same = 0
        while same < min(len(tokens) - 1, len(self.read)) and tokens[same] == self.read[same]:
            same += 1
        logits, self.state = self.draft.extend(input_ids[:, same:], self.state.cut(same))
        self.read = tokens
        return CausalLMOutput(logits=logits)

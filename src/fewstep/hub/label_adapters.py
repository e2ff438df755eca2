"""Diffusers models without text as networks: unconditional, or conditional on class labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewstep.conditions import Cond
from fewstep.hub.adapters import Adapter, UNetAdapter
from fewstep.hub.autoencoders import autoencoder_name
from fewstep.hub.origins import Origin
from fewstep.hub.requires import require


class LabelAdapter(Adapter):
    """Common to class-conditional models: ``null`` is the label that stands for "no class" (None: there is none)."""

    null: int | None = None

    def optional(self) -> dict[str, tuple[int | None, ...]]:
        return {**super().optional(), **({} if self.classes is None else {"class_labels": ()})}

    def conditions(self, cond: Cond, x: Tensor) -> dict[str, Tensor]:
        """The condition as a dict, the labels in it those that the network takes."""
        if isinstance(cond, Tensor) and self.classes is None:
            raise ValueError("class labels were given to an unconditional network")
        given = {} if cond is None else {"class_labels": cond} if isinstance(cond, Tensor) else dict(cond)
        given = self.checked(given, x)
        if self.classes is None:
            return given
        labels = given.get("class_labels", torch.full((len(x),), -1, device=x.device))
        if self.null is not None:
            labels = torch.where(labels < 0, self.null, labels)
        elif bool((labels < 0).any()):
            raise ValueError("this network was trained with class labels only: pass cond, it has no null label")
        return {**given, "class_labels": labels}


class UNet2D(UNetAdapter, LabelAdapter):
    """UNet2DModel: unconditional, or conditional on class labels; LDM's upscaler takes the small picture as
    ``concat``."""

    def __init__(self, model: Any, origin: Origin | None = None, size: tuple[int, int] | None = None) -> None:
        super().__init__(model, origin, size)
        if model.config.class_embed_type is not None:
            raise ValueError(
                f"UNet2DModel: class_embed_type '{model.config.class_embed_type}' is not read, only labels"
            )
        self.classes = model.config.num_class_embeds
        self.integer_times = model.config.time_embedding_type == "learned"

    def pipeline_class(self) -> Any:
        diffusers = require("diffusers", "exporting to diffusers")
        return diffusers.LDMPipeline if self.latent else diffusers.DDIMPipeline

    @property
    def plain(self) -> bool:
        """DDIMPipeline and LDMPipeline know no labels, no learned variances, no pictures beside the noise, no size but
        the config's, and LDM's autoencoder only."""
        return (
            self.classes is None
            and self.takes == self.gives == self.channels
            and self.model.config.sample_size is not None
            and self.size == self.config_size()
            and (self.origin is None or autoencoder_name(self.origin.pipe) in (None, "vqvae"))
        )

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None, **extras: Tensor) -> Tensor:
        self.tell(extras)
        time = t.round().long() if self.integer_times else t
        given = self.conditions(cond, x)
        out = self.called(self.with_concat(x, given), time, class_labels=given.get("class_labels"))
        return out[:, : x.shape[1]]


class DiT(LabelAdapter):
    """DiTTransformer2DModel: conditional on class labels, with a null label after the last class."""

    in_own_pipeline = True
    fixed_size = True

    def __init__(self, model: Any, origin: Origin | None = None, size: tuple[int, int] | None = None) -> None:
        super().__init__(model, origin, size)
        self.classes = self.null = model.config.num_embeds_ada_norm
        for block in model.transformer_blocks:
            # in training mode the model would drop labels by itself, with unseeded randomness
            block.norm1.emb.class_embedder.dropout_prob = 0.0

    @property
    def entrance(self) -> Any:
        return self.model.pos_embed.proj

    def time_embeddings(self) -> list[Any]:
        return [block.norm1.emb.timestep_embedder for block in self.model.transformer_blocks]

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None, **extras: Tensor) -> Tensor:
        self.tell(extras)
        labels = self.conditions(cond, x)["class_labels"]
        out = self.called(x, timestep=t, class_labels=labels)
        return out[:, : x.shape[1]]

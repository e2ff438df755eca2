"""Speculative decoding and DistillSpec, measured: acceptance, tokens a call, and seconds beside what the formula says.

    python benchmarks/speculative.py characters [--steps 300] [--target-steps 800] [--out FILE.json]
    python benchmarks/speculative.py picture FILE.json --out PICTURE.png
    python benchmarks/speculative.py lenience [--seeds 3] [--target-steps 800] [--out FILE.json]
    python benchmarks/speculative.py transformers --model FOLDER [--draft FILE] [--minutes 10] [--out FILE.json]

``characters``: a target of one GRU of 128 and a draft of 16 on the bundled Shakespeare; the draft is distilled with
each divergence on each source of texts, and its acceptance measured on held-out prompts, on the target's own texts.

``lenience``: what lossy decoding buys and costs, on such pairs of another seed each, the draft not distilled.

``transformers``: any causal model in a folder of transformers with its tokenizer (SmolLM2-135M, whose GGUF file
transformers converts, is what the page shows) continues Shakespeare.  The draft is one GRU over the 2047 tokens that
are the most frequent in that text, its table of vectors cut from the target's own: trained for a part of the minutes
while the target writes texts, then distilled from its laws on them.  Texts and draft are kept in ``--draft``.

Seconds are processor time on one thread.  "formula" is tau / (c gamma + 1) with the measured c; "with the block" also
counts that a target reads several tokens more slowly than one.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep import api
from fewstep.data import Dataset
from fewstep.data.text import LETTERS, load_text, read_text
from fewstep.divergences import Divergence
from fewstep.files import load_tensors, save_tensors, write_atomically
from fewstep.language.acceptance import measure_acceptance
from fewstep.language.costs import measure_costs
from fewstep.language.decoding import Decoding, drawn
from fewstep.language.distill_spec import DistillSpec
from fewstep.language.modelling import LanguageModelling
from fewstep.language.rollouts import rollout
from fewstep.language.speculative import (
    LOSSLESS,
    Lenience,
    Statistics,
    law_of_one_token,
    speculative_decode,
    tokens_per_call,
)
from fewstep.language_models import LanguageModel, NetworkLanguageModel, RestrictedVocabulary
from fewstep.methods.method import Recipe
from fewstep.networks.causal import GRULanguageModel
from fewstep.randomness import Rng
from fewstep.runs.course import run_recipe
from fewstep.training.budget import Budget
from fewstep.training.settings import Settings

DIVERGENCES = ("kl", "reverse-kl", "jsd:0.5", "tvd")
SOURCES = {"data": {"fixed": 1.0}, "target": {"target": 1.0}, "draft": {"draft": 1.0}}
#: Tokens of the vocabulary that the draft of a large model writes.
KEPT = 2047


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    small = kinds.add_parser("characters")
    small.add_argument("--steps", type=int, default=300, help="of each distillation")
    small.add_argument("--target-steps", type=int, default=800, help="of the target's training, and of the draft's")
    lossy = kinds.add_parser("lenience")
    lossy.add_argument("--seeds", type=int, default=3, help="pairs that are trained")
    lossy.add_argument("--target-steps", type=int, default=800, help="of the target's training, and of the draft's")
    large = kinds.add_parser("transformers")
    large.add_argument("--model", type=Path, required=True, help="a folder that transformers opens")
    large.add_argument("--draft", type=Path, default=Path("draft.safetensors"), help="where texts and draft are kept")
    large.add_argument("--minutes", type=float, default=10.0, help="of the target's writing, in processor time")
    large.add_argument("--width", type=int, default=192, help="of the draft")
    shown = kinds.add_parser("picture")
    shown.add_argument("file", type=Path, help="what characters wrote")
    shown.add_argument("--out", type=Path, required=True)
    for one in (small, large):
        one.add_argument("--gamma", type=int, nargs="+", default=[1, 2, 3, 5])
    for one in (small, lossy, large):
        one.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    if chosen.kind == "picture":
        return picture(json.loads(chosen.file.read_text())["rows"], chosen.out)
    found = {"characters": characters, "lenience": lossy_decoding, "transformers": transformers}[chosen.kind](chosen)
    if chosen.out is not None:
        write_atomically(chosen.out, (json.dumps(found, indent=1) + "\n").encode())


def say(*words: object) -> None:
    print(*words, flush=True)


# --- the pair of characters ------------------------------------------------------------------------------------------


def trained(
    recipe: Recipe, teacher: LanguageModel, data: Dataset, steps: int, seed: int = 0, **given: LanguageModel
) -> Any:
    settings = Settings(Budget(steps), batch=32, precision="fp32", seed=seed)
    return run_recipe(recipe, teacher, data, settings, given=given, show=False).model


def fresh(width: int, seed: int = 0) -> NetworkLanguageModel:
    torch.manual_seed(width + 1000 * seed)
    net = GRULanguageModel(len(LETTERS), 64, width)
    return NetworkLanguageModel(net, len(LETTERS), 64, LETTERS.characters)


def characters(chosen: argparse.Namespace) -> dict[str, Any]:
    train, test = load_text("shakespeare"), load_text("shakespeare", "test")
    assert isinstance(train, Dataset)
    prompts = test.x[:256, :16]
    target = trained(LanguageModelling(), fresh(128), train, chosen.target_steps)
    plain = trained(LanguageModelling(lr=1e-2), fresh(16), train, chosen.target_steps)
    rows = [measured("not distilled", target, plain, prompts, chosen.gamma)]
    for source, shares in SOURCES.items():
        for divergence in DIVERGENCES:
            method = DistillSpec(Divergence.parse(divergence), **{"fixed": 0.0, "draft": 0.0, **shares})
            draft = trained(method, target, train, chosen.steps, student=plain)
            rows.append(measured(f"{divergence}, texts of the {source}", target, draft, prompts, chosen.gamma))
    best = max(rows, key=lambda row: row["alpha"])
    say(f"most accepted: {best['draft']}")
    return {"rows": rows}


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Acceptance by divergence and source, and of the draft that was not distilled."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    alpha = {row["draft"]: row["alpha"] for row in rows}
    figure, axes = pyplot.subplots(figsize=(7, 3), layout="constrained")
    for k, source in enumerate(SOURCES):
        heights = [alpha[f"{divergence}, texts of the {source}"] for divergence in DIVERGENCES]
        axes.plot([i + 0.15 * (k - 1) for i in range(len(DIVERGENCES))], heights, "o", label=f"texts of the {source}")
    plain = alpha["not distilled"]
    axes.axhline(plain, color="black", linestyle="--", linewidth=1, label="not distilled")
    axes.set_xticks(range(len(DIVERGENCES)), DIVERGENCES)
    axes.set_xlim(-0.5, len(DIVERGENCES) - 0.5)
    axes.grid(axis="y", alpha=0.3)
    axes.set_ylabel("accepted, sampled")
    axes.legend(frameon=False, ncols=2, fontsize=8)
    figure.savefig(path, dpi=110)


# --- lossy decoding --------------------------------------------------------------------------------------------------

LENIENT = [LOSSLESS, *(Lenience(kind, eps) for kind in ("linear", "square", "power") for eps in (0.5, 0.25, 0.1))]
TEXTS, LENGTH, DRAFTED = 64, 48, 5


def lossy_decoding(chosen: argparse.Namespace) -> dict[str, Any]:
    """For each lenience: acceptance, tokens a call, the log-probability of a token under the target, and the total
    variation between the law of a token and the target's, in the mean over the text that was written."""
    train, test = load_text("shakespeare"), load_text("shakespeare", "test")
    prompts, rows = test.x[:TEXTS, :16], []
    for seed in range(chosen.seeds):
        target = trained(LanguageModelling(), fresh(128, seed), train, chosen.target_steps, seed)
        draft = trained(LanguageModelling(lr=1e-2), fresh(16, seed), train, chosen.target_steps, seed)
        rows += [{"seed": seed, **lossy(target, draft, prompts, seed, lenience)} for lenience in LENIENT]
        alone = rollout(draft, prompts, Rng(seed, "draft alone"), LENGTH)
        rows.append({"seed": seed, "lenience": "the draft alone", **quality(target, draft, alone.tokens, None)})
    for name in dict.fromkeys(row["lenience"] for row in rows):
        mine = [row for row in rows if row["lenience"] == name]
        say(f"{name}: " + ", ".join(f"{key} {spread([row[key] for row in mine])}" for key in mine[0] if key in SHOWN))
    return {"rows": rows}


SHOWN = ("acceptance", "tokens a call", "log-prob", "variation")


def lossy(
    target: LanguageModel, draft: LanguageModel, prompts: Tensor, seed: int, lenience: Lenience
) -> dict[str, Any]:
    told, texts = Statistics(), []
    for i, prompt in enumerate(prompts):
        rng = Rng(seed, "lenience", i)
        text = speculative_decode(target, draft, prompt, rng, LENGTH, gamma=DRAFTED, lenience=lenience)
        texts.append(torch.cat([prompt, text.tokens]))
        told += text.statistics
    found = {"acceptance": told.acceptance, "tokens a call": told.block_efficiency}
    return {"lenience": str(lenience), **found, **quality(target, draft, torch.stack(texts), lenience)}


@torch.no_grad()
def quality(target: LanguageModel, draft: LanguageModel, tokens: Tensor, lenience: Lenience | None) -> dict[str, float]:
    """What texts ``[N, 16 + LENGTH]`` are worth; a lenience of None: the draft wrote all of them."""
    p, q = (model(tokens)[:, 15:-1].softmax(-1) for model in (target, draft))
    law = q if lenience is None else law_of_one_token(p, q, lenience)
    written = p.gather(-1, tokens[:, 16:, None]).log().mean()
    return {"log-prob": float(written), "variation": float((law - p).abs().sum(-1).mean() / 2)}


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    found = torch.tensor(values, dtype=torch.float64)
    return f"{found.mean():.3f} ± {found.std():.3f}"


# --- what both measure -----------------------------------------------------------------------------------------------


def measured(
    name: str, target: LanguageModel, draft: LanguageModel, prompts: Tensor, gammas: Iterable[int], runs: int = 8,
    length: int = 48,
) -> dict[str, Any]:  # fmt: skip
    """Acceptance and seconds of a draft, sampled and greedy."""
    row: dict[str, Any] = {"draft": name}
    for way, decoding in (("sampled", Decoding()), ("greedy", Decoding(0.0))):
        found = measure_acceptance(target, draft, prompts, Rng(0, "acceptance"), length, decoding=decoding)
        row["alpha" if way == "sampled" else "alpha, greedy"] = found.rate
        say(f"{name}: {way}, alpha {found.rate:.3f}")
        alone = seconds_of(target, draft, prompts[:runs], length, 0, decoding)
        for gamma in gammas:
            told, seconds = seconds_of(target, draft, prompts[:runs], length, gamma, decoding)
            costs = measure_costs(target, draft, prompts[0], gamma)
            row[f"{way}, gamma {gamma}"] = line = {
                "block efficiency": told.block_efficiency, "tau": tokens_per_call(found.rate, gamma),
                "c": costs.ratio, "block": costs.block / costs.target, "formula": costs.speed_up(found.rate),
                "with the block": costs.real_speed_up(found.rate), "measured": alone[1] / seconds,
            }  # fmt: skip
            say(f"  gamma {gamma}: " + ", ".join(f"{key} {value:.3f}" for key, value in line.items()))
    return row


def seconds_of(
    target: LanguageModel, draft: LanguageModel, prompts: Tensor, length: int, gamma: int, decoding: Decoding,
    lenience: Lenience = LOSSLESS,
) -> tuple[Statistics, float]:  # fmt: skip
    """What speculative decoding did, and its seconds of processor time a token."""
    total, began = Statistics(), time.process_time()
    for i, prompt in enumerate(prompts):
        total += speculative_decode(
            target, draft, prompt, Rng(i, "texts"), length, gamma=gamma, decoding=decoding, lenience=lenience
        ).statistics
    return total, (time.process_time() - began) / total.tokens


# --- a large model ---------------------------------------------------------------------------------------------------


def transformers(chosen: argparse.Namespace) -> dict[str, Any]:
    from transformers import AutoTokenizer

    target: NetworkLanguageModel = api.load(chosen.model)
    text = AutoTokenizer.from_pretrained(chosen.model)(read_text("shakespeare"), return_tensors="pt").input_ids[0]
    kept = text.bincount(minlength=target.vocabulary).argsort(descending=True)[:KEPT].sort().values
    if not chosen.draft.is_file():
        save_tensors(chosen.draft, written(target, text, kept, chosen.minutes) | {"kept": kept})
    held = load_tensors(chosen.draft)
    table = target.net.model.get_input_embeddings().weight
    draft = drafted(held, text, kept, table, target.vocabulary, chosen.width)
    prompts = held["tokens"][-64:, :16]
    return {"rows": [measured("GRU", target, draft, prompts, chosen.gamma, runs=6, length=32)]}


@torch.no_grad()
def written(target: LanguageModel, text: Tensor, kept: Tensor, minutes: float) -> dict[str, Tensor]:
    """Texts of the target after 16 tokens of Shakespeare, 64 tokens in all, and its laws on the kept tokens."""
    rng, began = Rng(0, "target texts"), time.process_time()
    tokens, laws = [], []
    while time.process_time() - began < 60 * minutes:
        first = rng.integers(64, 0, len(text) - 16)
        fresh = text[first[:, None] + torch.arange(16)]
        state, whole, found = target.begin(), [fresh], []
        while sum(part.shape[1] for part in whole) < 64:
            logits, state = target.extend(fresh, state)
            found.append(coarse(logits, kept))
            fresh = drawn(logits[:, -1].softmax(-1), rng.uniform(64))[:, None]
            whole.append(fresh)
        tokens.append(torch.cat(whole, dim=1))
        laws.append(torch.cat(found, dim=1))
        say(f"{64 * len(tokens)} texts in {time.process_time() - began:.0f} s")
    return {"tokens": torch.cat(tokens), "laws": torch.cat(laws)}


def coarse(logits: Tensor, kept: Tensor) -> Tensor:
    """Log-probabilities ``[..., K + 1]`` of the kept tokens, and of all others together."""
    inside = logits.log_softmax(-1)[..., kept]
    others = torch.log1p(-inside.exp().sum(-1, keepdim=True).clamp_max(1 - 1e-6))
    return torch.cat([inside, others], dim=-1).half()


def drafted(
    held: dict[str, Tensor], text: Tensor, kept: Tensor, table: Tensor, vocabulary: int, width: int
) -> LanguageModel:
    """A GRU over the kept tokens: by cross-entropy on both texts, then by KL and total variation from the laws."""
    torch.manual_seed(0)
    inner = NetworkLanguageModel(GRULanguageModel(KEPT + 1, 256, width), KEPT + 1, 256)
    draft = RestrictedVocabulary(inner, kept, vocabulary)
    inner.net.token.weight.data.copy_(shrunk(torch.cat([table[kept], table.mean(0, keepdim=True)]), width))
    inside, x, laws = draft.inside[text], draft.inside[held["tokens"][:-128]], held["laws"][:-128]
    gen = torch.Generator().manual_seed(0)

    def texts() -> Tensor:
        first = torch.randint(len(inside) - 64, (16,), generator=gen)
        own = x[torch.randint(len(x), (16,), generator=gen)]
        return torch.cat([inside[first[:, None] + torch.arange(64)], own])

    def by_text() -> Tensor:
        both = texts()
        return torch.nn.functional.cross_entropy(
            inner(both)[:, :-1].flatten(0, 1), both[:, 1:].flatten(), ignore_index=KEPT
        )

    def by_law(divergence: Divergence) -> Tensor:
        rows = torch.randint(len(x), (32,), generator=gen)
        return divergence(laws[rows].float(), inner(x[rows])[:, :-1]).mean()

    fit(inner, by_text, 100, 3e-3)
    report(draft, held)
    for name in ("kl", "tvd"):
        fit(inner, lambda name=name: by_law(Divergence.parse(name)), 200, 2e-3)  # type: ignore[misc]
        report(draft, held)
    return draft.requires_grad_(False).eval()


def shrunk(table: Tensor, width: int) -> Tensor:
    """The ``width`` main directions of a table of vectors, at the size that our networks begin with."""
    u, s, _ = torch.linalg.svd(table.float() - table.float().mean(0), full_matrices=False)
    found = u[:, :width] * s[:width]
    return found / found.std() * width**-0.5


def fit(model: torch.nn.Module, loss: Callable[[], Tensor], steps: int, lr: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.1)
    course = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1, (i + 1) / 20) * (1 - 0.9 * i / steps))
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        course.step()


@torch.no_grad()
def report(draft: RestrictedVocabulary, held: dict[str, Tensor]) -> None:
    p = held["laws"][-128:, 15:-1, :-1].float().exp()
    q = draft(held["tokens"][-128:])[:, 15:-2][..., draft.kept].softmax(-1)
    say(f"held-out alpha {float(torch.minimum(p, q).sum(-1).mean()):.3f}, at most {float(p.sum(-1).mean()):.3f}")


if __name__ == "__main__":
    main()

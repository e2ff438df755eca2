"""A small captioning task: a digit's picture in, a sentence about it out, as analog bits of tokens.

A caption tells the digit's English name and two things that are measured on the picture: ``thin`` or ``bold`` (its mean
level below or above :data:`BOLD`) and ``upright``, ``left-leaning`` or ``right-leaning`` (by its slant, see
:func:`slant`).  The same facts can be said in four ways, so that the tokens of a caption depend on each other: a model
must choose one sentence and stick to it.  A caption is right when it is one of the four of its picture.

The vocabulary has 21 words, five bits; a sentence has six of the eight tokens at most, the others are padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.data import Dataset
from fewstep.discrete.bits import Encoding
from fewstep.discrete.levels import to_levels
from fewstep.networks import MLP

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SLANTS = ("left-leaning", "upright", "right-leaning")
WORDS = ("", "the", "this", "is", "and", ",", "thin", "bold", *SLANTS, *DIGITS)
LENGTH = 8

#: Above this mean level a digit is bold: the median of the training digits (levels 0 to 16).
BOLD = 4.89
#: A digit leans when its slant is larger: about a third of the training digits do.
LEANS = 0.1

SENTENCES = (
    "the {weight} {slant} {digit}",
    "the {digit} , {weight} and {slant}",
    "this {digit} is {slant} and {weight}",
    "this {slant} {digit} is {weight}",
)


def slant(levels: Tensor) -> Tensor:
    """How many pixels a digit moves to the left per pixel upwards: the regression of column on row, weighted with the
    level, over ``[N, H, W]``.  Positive leans to the left, as a backslash does."""
    weight = levels.double()
    rows, columns = (torch.arange(n, dtype=torch.float64) for n in levels.shape[1:])
    total = weight.sum((1, 2), keepdim=True).clamp_min(1e-12)
    row = rows[:, None] - (weight * rows[:, None]).sum((1, 2), keepdim=True) / total
    column = columns - (weight * columns).sum((1, 2), keepdim=True) / total
    return (weight * row * column).sum((1, 2)) / (weight * row**2).sum((1, 2)).clamp_min(1e-12)


def facts(levels: Tensor, labels: Tensor) -> list[dict[str, str]]:
    """What there is to say about every digit: ``digit``, ``weight`` and ``slant``."""
    leaning = slant(levels)
    place = 1 - (leaning > LEANS).long() + (leaning < -LEANS).long()
    weights = levels.double().mean((1, 2)) > BOLD
    return [
        {"digit": DIGITS[digit], "weight": "bold" if bold else "thin", "slant": SLANTS[where]}
        for digit, bold, where in zip(labels.tolist(), weights.tolist(), place.tolist(), strict=True)
    ]


def tokens(sentence: str) -> list[int]:
    """A sentence as :data:`LENGTH` token numbers; ValueError for unknown words and too many."""
    words = sentence.split()
    if unknown := [word for word in words if word not in WORDS]:
        raise ValueError(f"'{unknown[0]}' is not in the vocabulary: {' '.join(WORDS[1:])}")
    if len(words) > LENGTH:
        raise ValueError(f"'{sentence}' has {len(words)} words, {LENGTH} fit")
    return [WORDS.index(word) for word in words] + [0] * (LENGTH - len(words))


def sentence(numbers: Tensor) -> str:
    """Token numbers ``[LENGTH]`` as a sentence; a token of no word reads ``<?>``."""
    return " ".join(WORDS[n] if n >= 0 else "<?>" for n in numbers.tolist()).strip()


@dataclass(frozen=True)
class Captions:
    """Pictures ``[N, 1, H, W]`` in [-1, 1] with all their captions as tokens ``[N, 4, LENGTH]``."""

    pictures: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, data: Dataset) -> Captions:
        """The captions of the bundled digits (or other grey pictures with labels 0 to 9)."""
        if data.labels is None:
            raise ValueError(f"data '{data.name}' has no labels: a caption names the digit")
        about = facts(to_levels(data.x), data.labels)
        numbers = [[tokens(text.format(**known)) for text in SENTENCES] for known in about]
        return cls(data.read(slice(None)), torch.tensor(numbers))

    def bits(self, encoding: Encoding) -> Dataset:
        """Every caption as analog bits, ``[4 N, channels, LENGTH]``; labels are the numbers of the pictures."""
        count = self.tokens.shape[1]
        pictures = torch.arange(len(self.pictures)).repeat_interleave(count)
        return Dataset("captions", encoding.encode(self.tokens.flatten(0, 1)), pictures)

    def right(self, made: Tensor) -> Tensor:
        """Whether tokens ``[N, LENGTH]`` are one of the captions of their picture, ``[N]``."""
        return (self.tokens == made[:, None]).all(2).any(1)

    def sensible(self, made: Tensor) -> Tensor:
        """Whether tokens ``[N, LENGTH]`` are a sentence at all, about this or another digit, ``[N]``."""
        known = {tuple(tokens(text.format(digit=d, weight=w, slant=s)))
                 for text in SENTENCES for d in DIGITS for w in ("thin", "bold") for s in SLANTS}  # fmt: skip
        return torch.tensor([tuple(row) in known for row in made.tolist()])


class Captioner(nn.Module):
    """``F(x, t, pictures, beside)``: an MLP on the bits of all tokens, to which the picture is given beside the state,
    together with the network's own estimate.

    ``shape`` is ``(bits, tokens)``; ``pixels`` the number of pixels, a multiple of the number of tokens.
    """

    def __init__(self, shape: tuple[int, int], pixels: int = 64, width: int = 256, blocks: int = 3) -> None:
        super().__init__()
        if pixels % shape[1]:
            raise ValueError(f"Captioner: pixels={pixels} must be a multiple of the {shape[1]} tokens")
        self.mlp = MLP(shape, width, blocks, beside=shape[0] + pixels // shape[1])

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, beside: Tensor | None = None) -> Tensor:
        estimate = torch.zeros_like(x) if beside is None else beside
        picture = cond.to(x).reshape(len(x), -1, x.shape[2])
        made: Tensor = self.mlp(x, t, beside=torch.cat([estimate, picture], 1))
        return made


class Lookup(nn.Module):
    """A network that is conditioned on pictures, told which of a fixed set ``[N, ...]``: ``cond`` is their numbers
    ``[B]``.

    What the trainer calls class labels are numbers; ``net`` is the network itself, for pictures of other sets.
    """

    pictures: Tensor

    def __init__(self, net: nn.Module, pictures: Tensor) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("pictures", pictures, persistent=False)

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, **extras: Tensor) -> Tensor:
        made: Tensor = self.net(x, t, self.pictures[cond], **extras)
        return made

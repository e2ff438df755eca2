"""Problems whose answers a rule can check: sums, and brackets to be closed.

A row is the problem's text, which ends in ``=``, its answer, the end mark ``$`` and padding ``_``.  Sums are answered
with the lowest digit first, as one adds by hand: ``47+85=231$``.  Brackets are closed in the order in which they ask
for it: ``([]{=})$``.  A right answer is the only one there is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from fewstep.data.dataset import Dataset
from fewstep.randomness import Rng
from fewstep.ranges import Count, Most
from fewstep.values import check_fields

PAD, END, ASK = "_", "$", "="
#: The token of :data:`END`, behind which nothing counts.
END_TOKEN = 1


@dataclass(frozen=True)
class Problems(ABC):
    """A family of problems over the alphabet ``symbols``, whose first two are padding and the end; answers are made of
    the symbols ``answers``, and none is empty."""

    name: ClassVar[str]
    symbols: ClassVar[str]
    answers: ClassVar[str]

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    @abstractmethod
    def texts(self) -> Sequence[str]:
        """All problems, of one length, each ending in ``=``."""

    @property
    @abstractmethod
    def most(self) -> int:
        """The tokens of the longest answer and its end."""

    @abstractmethod
    def answer(self, text: str) -> str:
        """The right answer to a problem, without the end."""

    @property
    def asked(self) -> int:
        """The tokens of a problem."""
        return len(self.texts[0])

    @property
    def length(self) -> int:
        """The tokens of a row."""
        return self.asked + self.most

    def prompts(self, n: int, rng: Rng) -> Tensor:
        """``n`` different problems as tokens ``[n, asked]``; ValueError where there are not so many."""
        if n > len(self.texts):
            raise ValueError(f"n={n}: there are {len(self.texts)} different problems of {self.name}")
        return self.encode([self.texts[i] for i in rng.shuffled(len(self.texts))[:n].tolist()])

    def answered(self, prompts: Tensor) -> Tensor:
        """Rows ``[N, length]`` of problems with their right answers."""
        texts = self.decode(prompts)
        return self.encode([(text + self.answer(text) + END).ljust(self.length, PAD) for text in texts])

    def response(self, rows: Tensor) -> Tensor:
        """Which tokens of rows ``[N, L]`` are the answer and its end, as a mask ``[N, L]``: all where none ends."""
        ended = rows == END_TOKEN  # which no problem holds
        behind = ended.cumsum(1) - ended.long() > 0
        behind[:, : self.asked] = True
        return ~behind

    def verify(self, rows: Tensor) -> Tensor:
        """Whether the answers of rows ``[N, L]`` are right, ``[N]``; what stands behind their end does not count."""
        right = []
        for row in self.decode(rows):
            text, found = row[: self.asked], row[self.asked :]
            right.append(found.startswith(self.answer(text) + END))
        return torch.tensor(right, dtype=torch.bool)

    def dataset(self, prompts: Tensor, name: str | None = None) -> Dataset:
        """Problems with their right answers to learn from; the column ``mask`` is true on answers and their ends."""
        rows = self.answered(prompts)
        return Dataset(name or self.name, rows, columns={"mask": self.response(rows)}, alphabet=self.symbols)

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Texts of one length as tokens ``[N, L]``."""
        token = {symbol: i for i, symbol in enumerate(self.symbols)}
        return torch.tensor([[token[symbol] for symbol in text] for text in texts])

    def decode(self, rows: Tensor) -> list[str]:
        """Tokens ``[N, L]`` as texts."""
        return ["".join(self.symbols[token] for token in row) for row in rows.tolist()]


@dataclass(frozen=True)
class Addition(Problems):
    """Sums of two numbers of so many digits, answered with the lowest digit first."""

    name: ClassVar[str] = "addition"
    answers: ClassVar[str] = "0123456789"
    symbols: ClassVar[str] = f"{PAD}{END}{ASK}+{answers}"

    digits: Annotated[Count, Most(3), "digits of each number"] = 2

    @cached_property
    def texts(self) -> Sequence[str]:
        numbers = ["".join(digits) for digits in product("0123456789", repeat=self.digits)]
        return [f"{a}+{b}{ASK}" for a in numbers for b in numbers]

    @property
    def most(self) -> int:
        return self.digits + 2

    def answer(self, text: str) -> str:
        a, b = text.removesuffix(ASK).split("+")
        return str(int(a) + int(b))[::-1]


@dataclass(frozen=True)
class Brackets(Problems):
    """So many brackets of three kinds, some of which are open: the answer closes them."""

    name: ClassVar[str] = "brackets"
    answers: ClassVar[str] = ")]}"
    symbols: ClassVar[str] = f"{PAD}{END}{ASK}([{{{answers}"
    closing: ClassVar[dict[str, str]] = {"(": ")", "[": "]", "{": "}"}

    brackets: Annotated[Count, Most(8), "brackets of a problem"] = 6

    @cached_property
    def texts(self) -> Sequence[str]:
        return [begun + ASK for begun in self.beginnings(self.brackets, "")]

    def beginnings(self, left: int, stack: str) -> Iterator[str]:
        """The texts of ``left`` brackets that leave some open, where those that ``stack`` closes are already."""
        if left == 0:
            yield from [""] if stack else []
            return
        for opening, closing in self.closing.items():
            yield from (opening + rest for rest in self.beginnings(left - 1, closing + stack))
        if stack:
            yield from (stack[0] + rest for rest in self.beginnings(left - 1, stack[1:]))

    @property
    def most(self) -> int:
        return self.brackets + 1

    def answer(self, text: str) -> str:
        stack = ""
        for bracket in text.removesuffix(ASK):
            stack = self.closing[bracket] + stack if bracket in self.closing else stack[1:]
        return stack


#: The families by name.
PROBLEMS: dict[str, type[Problems]] = {kind.name: kind for kind in (Addition, Brackets)}

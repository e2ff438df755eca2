"""Budgets: steps, images and time, in words and back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewstep.training.budget import Budget


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        ("500", 500, "steps"), ("500 steps", 500, "steps"), ("1step", 1, "steps"), ("2k", 2000, "steps"),
        ("20k images", 20_000, "images"), ("1.5M img", 1_500_000, "images"), ("3 image", 3, "images"),
        ("90s", 90, "seconds"), ("2min", 120, "seconds"), ("0.5 minutes", 30, "seconds"), ("1.5h", 5400, "seconds"),
        (" 2 Hours ", 7200, "seconds"), (".5m", 30, "seconds"), ("1M", 1_000_000, "steps"),
    ],
)  # fmt: skip
def test_amounts_as_people_write_them(text: str, amount: float, unit: str) -> None:
    assert Budget.parse(text) == Budget(amount, unit)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "unit", "factor"),
    [
        ("|step|steps|it", "steps", 1), ("image|images|img", "images", 1), ("s|sec|second|seconds", "seconds", 1),
        ("m|min|minute|minutes", "seconds", 60), ("h|hour|hours", "seconds", 3600),
    ],
)  # fmt: skip
def test_every_word_for_a_unit(words: str, unit: str, factor: int) -> None:
    """Seven of each, and 7000 with a k."""
    for word in words.split("|"):
        assert Budget.parse(f"7{word}") == Budget(7 * factor, unit)  # type: ignore[arg-type]
        assert Budget.parse(f"7k {word}") == Budget(7000 * factor, unit)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "many", "5 apples", "-3", "1e3", "2 min 3", "1,5h", "k", "inf"])
def test_what_is_no_amount_is_quoted(text: str) -> None:
    """The error repeats what was written and shows what can be."""
    said = f"budget '{text}' is not an amount of training; write 500steps, 20k images, 90s, 2min or 1h"
    with pytest.raises(ValueError, match=f"^{said}$"):
        Budget.parse(text)


@pytest.mark.parametrize("text", ["0.5steps", "1.5 images", "0.0005k", "2.5"])
def test_steps_and_images_are_whole(text: str) -> None:
    """A part of a step is a slip of the hand, or was meant for another unit."""
    with pytest.raises(ValueError, match=f"^budget '{text}': steps and images are whole numbers$"):
        Budget.parse(text)


@pytest.mark.parametrize("amount", [0, -1, float("inf"), float("nan")])
def test_amounts_are_positive_and_finite(amount: float) -> None:
    with pytest.raises(ValueError, match="must be positive and finite"):
        Budget(amount)
    with pytest.raises(ValueError, match="budget 0 seconds: it must be positive"):
        Budget.parse("0min")


def test_fraction_counts_its_own_unit() -> None:
    """How much is used, never more than 1."""
    for budget, used in ((Budget(10), 0.2), (Budget(100, "images"), 0.3), (Budget(8, "seconds"), 0.5)):
        assert budget.fraction(2, 30, 4.0) == used
        assert budget.fraction(0, 0, 0.0) == 0
        assert budget.fraction(1000, 1000, 1000.0) == 1


@given(st.integers(1, 10**12), st.sampled_from(["steps", "images", "seconds"]))
def test_words_and_back(amount: int, unit: str) -> None:
    """``str`` is what ``parse`` reads, to the last digit of seconds."""
    budget = Budget(amount, unit)  # type: ignore[arg-type]
    again = Budget.parse(str(budget))
    assert again.unit == unit and again.amount == pytest.approx(amount, rel=1e-14)


def test_seconds_are_written_as_minutes_from_the_first_on() -> None:
    """As ``train --for`` prints them."""
    found = [str(Budget(amount, "seconds")) for amount in (59, 60, 90, 5400)]
    assert found == ["59seconds", "1min", "1.5min", "90min"]

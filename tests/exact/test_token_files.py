"""Sequences of tokens in array files: what is written is read, columns included; what is none is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fewstep.data import Dataset
from fewstep.data.sources import load
from fewstep.data.token_files import write_tokens

X = torch.arange(12).reshape(3, 4)
MASK = X % 3 == 1
DATA = Dataset("pairs", X, columns={"mask": MASK, "rejected": X.flip(0), "scores": torch.tensor([0.5, 1.0, 2.0])})


def test_what_is_written_is_read(tmp_path: Path) -> None:
    found = load(write_tokens(DATA, tmp_path / "pairs.safetensors"))
    assert found.name == "pairs" and found.x.dtype == torch.int64 and torch.equal(found.x, X)
    assert found.columns.keys() == DATA.columns.keys()
    assert all(torch.equal(found.columns[name], column) for name, column in DATA.columns.items())
    assert found.columns["mask"].dtype == torch.bool and found.sha256() == DATA.sha256()


def test_a_file_of_two_parts(tmp_path: Path) -> None:
    path = tmp_path / "parts.npz"
    np.savez(
        path, train_tokens=X.numpy().astype(np.uint16), train_mask=MASK.numpy(), test_tokens=X.numpy()[:2],
        test_mask=~MASK.numpy()[:2],
    )  # fmt: skip
    train, test = load(path), load(path, "test")
    assert torch.equal(train.x, X) and torch.equal(train.columns["mask"], MASK) and [*train.columns] == ["mask"]
    assert torch.equal(test.x, X[:2]) and torch.equal(test.columns["mask"], ~MASK[:2])
    np.savez(path, tokens=X.numpy(), mask=MASK.numpy(), test_tokens=X.numpy()[:2], test_mask=MASK.numpy()[:2])
    assert [*load(path).columns] == ["mask"] and len(load(path)) == 3 and len(load(path, "test")) == 2


@pytest.mark.parametrize("bad", [X.float(), X - 1, X[0], X[:0]], ids=["floats", "negative", "one row", "empty"])
def test_what_are_no_tokens_is_refused(bad: torch.Tensor, tmp_path: Path) -> None:
    np.savez(tmp_path / "bad.npz", tokens=bad.numpy())
    with pytest.raises(ValueError, match=r"array 'tokens' is .*: tokens are whole numbers from 0 on, \[N, L\]"):
        load(tmp_path / "bad.npz")


def test_a_column_has_a_row_for_each_sequence(tmp_path: Path) -> None:
    np.savez(tmp_path / "short.npz", tokens=X.numpy(), mask=MASK.numpy()[:2])
    with pytest.raises(ValueError, match=r"data 'short': 3 samples but mask of shape \[2, 4\]"):
        load(tmp_path / "short.npz")


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ends in \.safetensors"):
        write_tokens(DATA, tmp_path / "pairs.npz")
    with pytest.raises(ValueError, match="data 'floats' are no tokens"):
        write_tokens(Dataset("floats", X.float()), tmp_path / "floats.safetensors")


def test_the_alphabet_is_kept_for_both_parts(tmp_path: Path) -> None:
    data = Dataset("said", X, columns={"mask": MASK}, alphabet="abcdefghijkl")
    path = write_tokens(data, tmp_path / "said.safetensors", data.subset(torch.arange(2)))
    for split, rows in (("train", 3), ("test", 2)):
        found = load(path, split)  # type: ignore[arg-type]
        assert found.alphabet == data.alphabet and torch.equal(found.x, X[:rows]) and [*found.columns] == ["mask"]
        assert torch.equal(found.columns["mask"], MASK[:rows]) and found.subset(slice(0, 1)).alphabet == data.alphabet
    alone = load(write_tokens(data, tmp_path / "alone.safetensors"))
    assert alone.alphabet == data.alphabet and [*alone.columns] == ["mask"]
    assert load(write_tokens(DATA, tmp_path / "none.safetensors")).alphabet is None


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (list(range(97, 108)), "has 11 characters, and there is a token 11"),
        ([*range(97, 108), 97], ".*no two the same"),
        ([*range(97, 108), -1], "has 12 characters"),
        ([*range(97, 108), 0x110000], "has 12 characters"),
        ([[97, 98]], "is int64 .1, 2.: code points"),
        ([0.5] * 12, "is float64"),
    ],
)
def test_an_alphabet_that_is_none_is_refused(bad: list[int], said: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "bad.npz", tokens=X.numpy(), alphabet=np.array(bad))
    with pytest.raises(ValueError, match=f"bad.npz': array 'alphabet' {said}"):
        load(tmp_path / "bad.npz")

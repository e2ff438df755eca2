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

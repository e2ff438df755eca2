"""What a bar tells where there is no terminal."""

from __future__ import annotations

import pytest

from fewstep.training import progress
from fewstep.training.progress import Bar


def test_the_time_left_is_told_once_it_is_known(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """A run that goes on at a half says nothing of the time before it has moved; then by its pace since."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    bar = Bar("experts", every=10.0)
    for at, fraction in ((110.0, 0.5), (120.0, 0.75)):
        now[0] = at
        bar.update(fraction, "loss 2")
    assert capsys.readouterr().err == "experts:  50%  loss 2\nexperts:  75%  20 s left  loss 2\n"

"""What calls cost, on a clock that the models themselves move."""

import pytest
import torch

from fewstep.exact import MarkovChain
from fewstep.language import costs
from fewstep.language.costs import Costs, measure_costs
from fewstep.language_models import State


def test_the_costs_of_a_call_and_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """A target of 10 s a call and 1 s a token, a draft of 2 s a call; the first call of each takes longer."""
    clock, seen = [0.0], {10.0: 0, 2.0: 0}
    monkeypatch.setattr(costs.time, "process_time", lambda: clock[0])

    class Timed(MarkovChain):
        def __init__(self, call: float, token: float) -> None:
            super().__init__(torch.ones(2, 2) / 2)
            self.call, self.each = call, token

        def extend(self, tokens: torch.Tensor, state: State) -> tuple[torch.Tensor, State]:
            seen[self.call] += 1
            clock[0] += self.call + self.each * tokens.shape[1] + (100 if seen[self.call] < 3 else 0)
            return super().extend(tokens, state)

    found = measure_costs(Timed(10.0, 1.0), Timed(2.0, 0.0), torch.tensor([0, 1, 0]), 3, repeats=3)
    assert found == Costs(11.0, 2.0, 14.0, 3)
    assert found.ratio == 2 / 11


def test_the_speed_up_with_what_a_block_costs_is_the_formulas_where_a_block_is_a_token() -> None:
    alike = Costs(target=1.0, draft=0.1, block=1.0, gamma=5)
    assert alike.speed_up(0.7) == pytest.approx(2.9412 / 1.5, abs=5e-5)
    assert alike.real_speed_up(0.7) == pytest.approx(alike.speed_up(0.7), rel=1e-12)
    assert Costs(1.0, 0.1, 1.5, 5).real_speed_up(0.7) == pytest.approx(2.9412 / 2, abs=5e-5)

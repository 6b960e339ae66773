"""What a trial reports to Ray Tune."""

import pytest

from raytickets.trial import Trial


@pytest.mark.parametrize(
    ("check", "judged"),
    [
        ({"validation_accuracy": 0.2, "about_to_draw": False}, True),
        ({"validation_accuracy": 0.2, "about_to_draw": True}, False),
        ({"validation_accuracy": None, "about_to_draw": False}, False),
    ],
)
def test_halving_judges_after_whole_epochs_and_none_that_is_about_to_draw(check, judged):
    trial = Trial.__new__(Trial)
    trial._steps = iter([[{"event": "check", "epoch": 2.0} | check]])
    assert ("accuracy" in trial.step()) == judged

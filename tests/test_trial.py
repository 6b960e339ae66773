"""What a trial reports to Ray Tune."""

import dataclasses

import pytest
import torch

from raytickets import load_space, trial
from raytickets.config import Resources
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


@pytest.mark.parametrize(("gpus", "guards"), [(0.25, [0.25]), (1.0, []), (0.0, [])])
def test_trials_that_share_a_gpu_share_its_memory(monkeypatch, tmp_path, gpus, guards):
    asked, devices = [], []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", asked.append)
    monkeypatch.setattr(trial, "prepare", lambda *given: devices.append(given[-1]))
    space = dataclasses.replace(load_space("digits"), resources=Resources(gpus_per_trial=gpus))
    Trial.setup(Trial.__new__(Trial), {"prover": 0}, space, None, tmp_path, None)
    assert asked == guards
    assert devices == ["cuda" if gpus else "cpu"]

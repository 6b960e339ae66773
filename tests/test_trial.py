"""What a trial reports to Ray Tune."""

from types import SimpleNamespace

import pytest
import torch

from raytickets import load_space, trial
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


@pytest.mark.parametrize(("gpus", "guards"), [(0.25, [0.2]), (0.05, [0.025]), (1.0, []), (0.0, [])])
def test_trials_that_share_a_gpu_share_its_memory(monkeypatch, tmp_path, gpus, guards):
    asked, devices = [], []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", asked.append)
    memory = SimpleNamespace(total_memory=20 * trial.CONTEXT_BYTES)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: memory)
    monkeypatch.setattr(trial, "prepare", lambda *given: devices.append(given[-1]))
    space = load_space("digits")
    Trial.setup(Trial.__new__(Trial), {"wait": 1}, space, None, tmp_path, 1, gpus)
    assert asked == guards
    assert devices == ["cuda" if gpus else "cpu"]


def steps_of(*lists):
    trial = Trial.__new__(Trial)
    trial._steps = iter(lists)
    return trial


def event(kind, **fields):
    return {"event": kind, "validation_accuracy": 0.2, "about_to_draw": False} | fields


def test_a_trial_is_done_with_the_last_event_of_its_job_or_when_there_are_no_more():
    for last in ("trajectory", "proof", "retrained"):
        assert steps_of([event(last)]).step()["done"]
    trial = steps_of([event("check", epoch=1.0)], [])
    assert [trial.step()["done"] for _ in range(3)] == [False, False, True]


def test_of_events_that_are_told_again_at_once_the_last_check_counts():
    told = [event("check", epoch=1.0), event("check", epoch=2.0, validation_accuracy=0.7)]
    assert steps_of(told).step()["accuracy"] == 0.7


def test_a_worker_without_a_job_reports_nothing(monkeypatch):
    slept = []
    monkeypatch.setattr(trial.time, "sleep", slept.append)
    worker = Trial.__new__(Trial)
    worker._setting = None
    assert worker.reset_config({"wait": 5})
    assert worker.step() == {"events": [], "done": False}
    assert slept == [5]

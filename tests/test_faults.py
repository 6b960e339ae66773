"""Nothing is lost, doubled or lied about, whatever fails (see tests/faults/suite.py)."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "faults"))
from kills import Repeat, repeats
from suite import campaign


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_sweeps_survive_seeded_faults(tmp_path):
    disturbed = list(campaign(tmp_path, faults=20, each=5, seed=0))
    assert not [wrong for one in disturbed for wrong in one.wrong]
    assert len({fault.kind for one in disturbed for fault in one.struck}) >= 8


def test_what_was_trained_again_is_counted_in_epochs(tmp_path):
    steps = tmp_path / "faults/steps"
    steps.mkdir(parents=True)
    (steps / "1@penalty0.001-seed0@0").write_text("." * 25)  # Two and a half epochs, ...
    (steps / "2@penalty0.001-seed0@2").write_text("." * 10)  # ... one more from the second on, ...
    (steps / "3@penalty0.001-seed0@2").write_text("." * 10)  # ... which left no checkpoint.
    (steps / "4@dense@0").write_text("." * 10)
    again = [Repeat("penalty0.001-seed0", 0.5, 0), Repeat("penalty0.001-seed0", 1.0, 1)]
    assert repeats(tmp_path, epoch=10) == again

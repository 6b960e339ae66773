"""Nothing is lost, doubled or lied about, whatever fails (see tests/faults/suite.py)."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "faults"))
from suite import campaign


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_sweeps_survive_seeded_faults(tmp_path):
    disturbed = list(campaign(tmp_path, faults=20, each=5, seed=0))
    assert not [wrong for one in disturbed for wrong in one.wrong]
    assert len({fault.kind for one in disturbed for fault in one.struck}) >= 8

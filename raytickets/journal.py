"""The journal of a sweep or a comparison: every result, one JSON object a line, on disk before
anyone is told.

Events, by their `event` field (`run` is a trajectory, a ticket, or `dense`):

sweep        name, space (all fields), fingerprint, channels, dense {macs, params}, data
             {fingerprint, train, validation, test}, versions {package: version}
comparison   in place of `sweep`: the same, and penalty, prune_ratios, seeds, methods, as resolved
check        trajectory, check, epoch (a fraction within one), loss since the last check,
             validation_accuracy (null within an epoch), distances {ratio: distance or null while
             the window fills}, about_to_draw (a distance is within twice the limit), train_macs
             and seconds since the trajectory began
ticket       trajectory, ticket, path (relative to the sweep), penalty, prune_ratio, learning_rate,
             seed, method, rule, draw_check, draw_epoch, mask_distance, macs, params,
             kept {group: [kept, of]}; rule to mask_distance are null where nothing is drawn, and
             learning_rate where nothing is trained. In sweeps also proof_accuracy (validation) and
             proof_macs (training), both of the first rung; in comparisons search: the ledger of
             the search that this ticket alone would have needed
trajectory   trajectory, method, penalty, seed, changes {field: value} that Optuna chose, state
             (drawn, not converged, hopeless, diverged or failed), reason, epochs, train_macs,
             seconds, ratios {ratio: drawn, or the state}, distances_matrix {epochs, ratios {ratio:
             rows}} between the masks of every two checks. In comparisons it is of a source
proof        ticket, rung (from 2), proof_accuracy, proof_macs, seconds
winners      tickets, in order of falling proof accuracy in the last rung
epoch        run, epoch, loss, validation_accuracy, learning_rate
retrained    run, path, macs, params, epochs, validation_accuracy, test_accuracy, train_macs,
             seconds, num_workers; in comparisons also ledger, latency_ms (median of one image)
             and relative_latency (to the dense network)
end          state (done or failed), reason

MACs are of one image forward (`macs`) or of training (3 x forward x samples); accuracies are
shares between 0 and 1; seconds are wall time. A ledger is {forward_macs, backward_macs, samples,
seconds, joules, energy}, as in `raytickets.cost.Ledger`.
"""

import json
import os
from pathlib import Path
from typing import Any

Event = dict[str, Any]


class Journal:
    """Appends events to `journal.jsonl` in a sweep's folder, each one synced to disk."""

    def __init__(self, sweep: Path):
        self.path = sweep / "journal.jsonl"
        _drop_torn_line(self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def append(self, event: Event) -> None:
        self._file.write(json.dumps(event, allow_nan=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_journal(sweep: Path) -> list[Event]:
    """Every whole event of a sweep, oldest first.

    Raises FileNotFoundError if the folder holds no journal, ValueError on a damaged line.
    """
    lines = (sweep / "journal.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def _drop_torn_line(path: Path) -> None:
    """A writer that was killed may have left half a line; it was never told to anyone."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)

"""After a sweep in this folder: does its MLflow store hold the runs that it should?"""

from collections import Counter
from pathlib import Path

from mlflow import MlflowClient

client = MlflowClient(f"sqlite:///{Path.cwd()}/mlflow.db")
experiment = client.get_experiment_by_name("raytickets/digits")
assert experiment is not None, "no experiment raytickets/digits"
runs = {run.info.run_id: run for run in client.search_runs([experiment.experiment_id])}
kinds = Counter(run.data.tags["raytickets.kind"] for run in runs.values())
print(dict(kinds))
assert kinds["sweep"] == 1, kinds
assert kinds["trajectory"] == 3, kinds
assert kinds["ticket"] >= 3, kinds
assert kinds["dense"] == 1, kinds
parents = {"trajectory": "sweep", "ticket": "trajectory", "dense": "sweep"}
for run in runs.values():
    assert run.info.status == "FINISHED", run.info
    kind = run.data.tags["raytickets.kind"]
    if kind in parents:
        parent = runs[run.data.tags["mlflow.parentRunId"]]
        assert parent.data.tags["raytickets.kind"] == parents[kind], (kind, parent.info)
    if kind == "ticket":
        assert {"penalty", "prune_ratio", "learning_rate", "seed", "stop_rule"} <= set(
            run.data.params
        )
        assert {"proof_accuracy", "macs", "params", "draw_epoch", "mask_distance"} <= set(
            run.data.metrics
        )
print("the MLflow store holds the sweep, its trajectories and its tickets")

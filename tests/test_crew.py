"""Jobs of a crew: handed out once, again when a worker is lost, alone when memory ran out."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from made_up_sweep import LARGE, LOW, OPENING, check, ticket, write

import raytickets.driver  # which sets what Ray reads when it is imported
from raytickets import crew
from raytickets import room as rooms
from raytickets.crew import (
    Job,
    RayActorManager,
    Searcher,
    TuneTrial,
    Work,
    _Asked,
    _Crew,
    _Ended,
    _Heard,
    why,
)
from raytickets.room import NoRoom, Room
from raytickets.sweep import Sweep
from raytickets.trajectory import Point

exceptions = raytickets.driver.ray.exceptions
RayActorError, RayTaskError = exceptions.RayActorError, exceptions.RayTaskError

DEATH = (
    "The actor died unexpectedly before finishing this task.\n\tclass_name: Trial\n"
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker "
    "exit detail: Worker unexpectedly exits with a connection error code 2. End of file. Some "
    "common causes include: (1) the process was killed by the OOM killer due to high memory usage."
)
GONE = (
    "The actor died because its node has died. Node Id: 6f17\n"
    "\tthe actor's node was terminated unexpectedly: no heartbeats"
)
KILLED = (
    "1 worker(s) were killed due to the node running low on memory. Memory on the node was 6.91GB "
    "used / 23.54GB limit\nTo see more information about memory usage, use `ray logs`"
)


class List(Work):
    """So many jobs, without a sweep."""

    keeps_workers = True

    def __init__(self, count):
        self.jobs = [Job("trajectory", str(number), {"job": number}) for number in range(count)]
        self.told, self.done, self.failed = [], [], []

    @property
    def ready(self):
        return bool(self.jobs)

    def next(self):
        return self.jobs.pop(0)

    def tell(self, event):
        self.told.append(event)

    def complete(self, job):
        self.done.append(job.id)

    def fail(self, job, reason):
        self.failed.append((job.id, reason))


def room(slots=2, most=2):
    return Room(cpus=1, gpus=0.0, slots=slots, most=most, workers=slots)


def crew_of(count, **given):
    work = List(count)
    return work, _Crew(work, room(**given))


def test_every_job_is_handed_out_once_and_all_is_over_when_the_last_has_ended():
    work, crew = crew_of(2)
    assert [crew.suggest(name) for name in "abc"] == [{"job": 0}, {"job": 1}, None]
    crew.complete("a")
    assert not crew.over
    crew.complete("b")
    assert crew.over
    assert work.done == ["0", "1"]
    assert _Asked(crew).suggest("d") == Searcher.FINISHED


def test_a_job_whose_worker_is_lost_runs_again_three_times_and_then_fails():
    work, crew = crew_of(1)
    for attempt in range(1, 5):
        assert crew.suggest(str(attempt)) == {"job": 0}
        crew.lost(str(attempt), "lost", "gone")
    assert [event["attempt"] for event in work.told] == [1, 2, 3]
    assert work.told[0] == {"event": "retry", "trajectory": "0", "attempt": 1, "reason": "gone"}
    assert work.failed == [("0", "gone")]
    assert crew.over


def test_a_job_runs_again_as_often_as_its_machine_is_taken_after_a_notice():
    work, crew = crew_of(1)
    for attempt in range(1, 6):
        assert crew.suggest(str(attempt)) == {"job": 0}
        crew.lost(str(attempt), "taken", "gone")
    assert [event["attempt"] for event in work.told] == [1, 2, 3, 4, 5]
    assert crew.suggest("6") == {"job": 0}


def test_a_worker_that_is_to_go_does_not_wait_for_a_job():
    _, crew = crew_of(2)
    for name in "ab":
        crew.suggest(name)
    crew.complete("a", stays=False)
    assert crew.suggest("c") is None


def test_a_trajectory_that_began_anew_has_neither_spent_nor_drawn_what_it_did_before(tmp_path):
    anew = {"event": "retry", "trajectory": LOW, "attempt": 1, "reason": "", "anew": True}
    events = [check(LOW, 8.0, {}), ticket(LOW, LARGE, 0.3, 1, 0.9), anew, check(LOW, 1.0, {})]

    def ended(events):
        work = Work(Sweep(write(tmp_path / str(len(events)), [OPENING, *events])), print)
        return work.ending(Point(1e-4, 0), "early_bird", (0.3, 0.5), "failed", "gone")

    assert (ended(events[:2])["epochs"], ended(events)["epochs"]) == (8.0, 1.0)
    assert ended(events[:2])["ratios"] == {"0.3": "drawn", "0.5": "failed"}
    assert ended(events)["ratios"] == {"0.3": "failed", "0.5": "failed"}


def test_what_a_job_raised_fails_it_at_once():
    work, crew = crew_of(1)
    crew.suggest("a")
    crew.lost("a", "raised", "ValueError: no")
    assert (work.told, work.failed) == ([], [("0", "ValueError: no")])


def test_what_could_not_be_kept_ends_the_run_and_leaves_the_job_to_the_next():
    work, crew = crew_of(2)
    crew.suggest("a")
    with pytest.raises(OSError, match=r"^\[Errno 28\] No space left"):
        crew.lost("a", "storage", "OSError: [Errno 28] No space left on device")
    assert not work.failed
    assert not work.told


def test_what_ran_out_of_memory_runs_once_more_when_nothing_else_does():
    work, crew = crew_of(3)
    assert [crew.suggest(name) for name in "ab"] == [{"job": 0}, {"job": 1}]
    crew.lost("a", "memory", "too much")
    assert crew.suggest("c") == {"job": 2}
    crew.complete("b")
    assert crew.suggest("d") is None
    crew.complete("c")
    assert crew.suggest("e") == {"job": 0}
    work.jobs.append(Job("run", "late", {"job": 9}))
    assert crew.suggest("f") is None
    crew.lost("e", "memory", "too much again")
    assert work.failed == [("0", "too much again")]
    assert crew.suggest("g") == {"job": 9}


def test_a_worker_without_a_job_waits_for_one_and_leaves_off_when_there_is_one():
    work, crew = crew_of(2)
    for name in "ab":
        crew.suggest(name)
        crew.begun(name)
    assert crew.suggest("no worker is free") is None
    crew.complete("a")
    assert crew.suggest("c") == {"wait": 0.2}
    ended, result = _Ended(crew), {"config": {"wait": 0.2}}
    assert not ended("c", result)
    work.jobs.append(Job("run", "late", {"job": 9}))
    assert ended("c", result)
    assert not ended("b", {"config": {"job": 1}})
    crew.complete("c")
    assert crew.suggest("d") == {"job": 9}
    assert ended("e", result)  # for that job has no worker yet
    crew.begun("d")
    assert not ended("e", result)
    for name in "bd":
        crew.complete(name)
    assert ended.stop_all()


def test_a_cluster_that_can_grow_gets_idle_workers_back():
    _, crew = crew_of(2, most=8)
    crew.suggest("a")
    crew.suggest("b")
    crew.complete("a")
    assert crew.suggest("c") is None


def test_a_worker_that_dies_without_a_job_is_no_loss():
    work, crew = crew_of(1)
    crew.lost("waits", "lost", "gone")
    assert work.told == work.failed == []


def test_what_a_trial_reported_is_forgotten_when_it_has_ended(monkeypatch):
    """By Ray Tune, which would keep it for as long as a sweep runs: 40 KiB a trial."""
    monkeypatch.setattr(crew, "leaving", set)
    _, one = crew_of(1)
    trial = TuneTrial("none", stub=True)
    one.suggest(trial.trial_id)
    trial.update_last_result({"training_iteration": 1, "epoch": 1.0})
    assert "epoch" in trial.last_result
    assert "epoch" in trial.metric_analysis
    _Heard(one).on_trial_complete(1, [trial], trial)
    assert one.over
    assert "epoch" not in trial.last_result
    assert not trial.metric_analysis
    assert not trial.metric_n_steps


@pytest.fixture
def cluster(monkeypatch):
    """Of made-up size and time, with a deadline of 60 s; it counts how often it is looked at."""
    made_up = SimpleNamespace(slots=0, now=0.0, looks=0)

    def slots(_needed, _noticed):
        made_up.looks += 1
        return made_up.slots

    for module in (crew, rooms):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: made_up.now))
    monkeypatch.setattr(rooms, "_slots", slots)
    monkeypatch.setenv("RAYTICKETS_DEADLINE_S", "60")
    return made_up


def test_jobs_wait_for_a_machine_until_the_deadline(cluster):
    _, crew = crew_of(2)
    crew.suggest("handed out, but there is no worker")
    for cluster.now in range(100, 160):
        crew.look()
    cluster.now = 160
    with pytest.raises(NoRoom, match=r"^no machine with 1 CPU came within 60 s"):
        crew.look()


def test_a_job_that_runs_is_not_waited_for_and_no_machine_is_looked_for(cluster):
    """It may be on a machine that was given notice, which has no room for another."""
    _, crew = crew_of(2)
    crew.look()
    crew.suggest("a")
    crew.suggest("b")
    crew.begun("a")
    for cluster.now in range(10, 10_000, 10):
        crew.look()
    assert cluster.looks == 1
    crew.lost("a", "taken", "gone")
    crew.look()
    cluster.now += 59
    crew.look()
    cluster.now += 1
    with pytest.raises(NoRoom):
        crew.look()


def test_a_job_on_a_full_cluster_waits_as_long_as_it_takes(cluster):
    _, crew = crew_of(1)
    cluster.slots = 2  # which others may use
    crew.suggest("a")
    for cluster.now in range(0, 10_000, 10):
        crew.look()
    assert cluster.looks == 1000


def test_machines_are_looked_for_once_a_second_at_most(cluster):
    _, crew = crew_of(1)
    for tenth in range(50):
        cluster.now = tenth / 10
        crew.look()
    assert cluster.looks == 5


def test_nothing_is_waited_for_when_all_is_done(cluster):
    _, crew = crew_of(1)
    crew.suggest("a")
    crew.look()
    crew.complete("a")
    cluster.now = 1000
    crew.look()
    assert cluster.looks == 1


@pytest.mark.usefixtures("cluster")
def test_what_goes_wrong_when_a_trial_is_complete_ends_the_run(monkeypatch):
    """Tune itself takes it for an error of the trial."""
    work, crew_ = crew_of(1)
    monkeypatch.setattr(work, "complete", lambda _: Path("/no/such").read_bytes())
    monkeypatch.setattr(crew, "_leaves", lambda _: False)
    heard = crew._Heard(crew_)
    heard.on_step_begin(0, [])
    crew_.suggest("a")
    with pytest.raises(FileNotFoundError):
        heard.on_trial_complete(0, [], SimpleNamespace(trial_id="a"))
    with pytest.raises(FileNotFoundError):
        heard.on_step_begin(1, [])


def failed(tmp_path: Path, error: Exception, pickled: bool = True):
    """A trial of Tune's with its files as Tune writes them."""
    (tmp_path / "error.txt").write_text(f"Failure # 1 (occurred at noon)\n{error}\n")
    (tmp_path / "error.pkl").write_bytes(crew.cloudpickle.dumps(error))
    return SimpleNamespace(
        error_file=tmp_path / "error.txt",
        pickled_error_file=tmp_path / "error.pkl" if pickled else None,
    )


def raised(error: Exception) -> Exception:
    text = f"Traceback (most recent call last):\n{type(error).__name__}: {error}"
    return RayTaskError("step", text, error).as_instanceof_cause()


@pytest.mark.parametrize(
    ("error", "kind", "reason"),
    [
        (
            raised(OSError(28, "No space left on device", "/data/x")),
            *("storage", "OSError: [Errno 28] No space left on device: '/data/x'"),
        ),
        (raised(ValueError("bad\nand more")), "raised", "ValueError: bad"),
        (raised(RuntimeError("CUDA out of memory")), "raised", "RuntimeError: CUDA out of memory"),
        (raised(MemoryError()), "memory", "MemoryError"),
        (
            raised(RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")),
            *("memory", "RuntimeError: DefaultCPUAllocator: can't allocate memory: 9 bytes"),
        ),
        (
            exceptions.ActorDiedError(
                RayTaskError("__init__", "Traceback\nValueError: no", ValueError("no"))
            ),
            *("raised", "ValueError: no"),
        ),
        (
            RayActorError(error_msg=DEATH),
            "lost",
            "its worker was lost: Worker unexpectedly exits with a connection error code 2. "
            "End of file.",
        ),
        (
            RayActorError(error_msg=GONE),
            "lost",
            "its worker was lost: the actor's node was terminated unexpectedly: no heartbeats",
        ),
        (
            RayActorError(error_msg="The actor died.\n\tactor_id: d11f", preempted=True),
            "taken",
            "its machine was given notice, and taken at its end",
        ),
        (
            RayActorError(error_msg=KILLED),
            "memory",
            f"its worker was killed: {KILLED.splitlines()[0]}",
        ),
    ],
)
def test_why_a_trial_failed_is_told_in_one_line(tmp_path, error, kind, reason):
    assert why(failed(tmp_path, error)) == (kind, reason)


def test_a_worker_that_could_not_be_placed_was_lost(tmp_path):
    error = exceptions.ActorUnschedulableError("its node is dead")
    told = why(failed(tmp_path, error, pickled=False))
    assert told == ("lost", "its worker was lost: The actor is not schedulable: its node is dead")


def test_tune_goes_on_when_a_worker_is_killed_for_its_memory(monkeypatch):
    """As Ray tells of it: by an error that is not that of an actor."""
    heard, killed = [], exceptions.OutOfMemoryError(KILLED)
    task = SimpleNamespace(
        _tracked_actor=SimpleNamespace(actor_id=1, _on_error=None),
        _on_error=lambda _, error: heard.append(error),
    )
    monkeypatch.setattr(RayActorManager, "_cleanup_actor", lambda *_, **__: None)
    manager = RayActorManager(SimpleNamespace())
    with pytest.raises(RuntimeError, match="Caught unexpected exception"):
        crew._tell_of_error(manager, task, killed)
    crew._tell_of_any_error(manager, task, killed)
    assert isinstance(heard[0], RayActorError)
    assert str(heard[0]) == KILLED

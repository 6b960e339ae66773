"""The files of cluster/ are valid, hold no secret, and a sweep runs on a cluster they start."""

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jsonschema
import pytest
import yaml
from head_node import TOKEN, TOOLS, Head

ROOT = Path(__file__).parent.parent
CLUSTER = ROOT / "cluster"
DATA = Path(__file__).parent / "cluster"

PROVIDERS = ("cluster.yaml", "gcp.yaml", "onprem.yaml")
MANIFESTS = ("rayjob.yaml", "raycronjob.yaml", "cronjob.yaml")
KUBERNETES = "1.33"


def load(name):
    return yaml.safe_load((CLUSTER / name).read_text())


def manifests(name):
    return list(yaml.safe_load_all((CLUSTER / "kuberay" / name).read_text()))


def manifest(name, kind):
    return next(each for each in manifests(name) if each["kind"] == kind)


# Ray's cluster files


def check_provider(config):
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


@pytest.mark.parametrize("name", PROVIDERS)
def test_ray_takes_the_cluster_files(name):
    check_provider(load(name))


def test_ray_rejects_a_broken_cluster_file():
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        check_provider(load("cluster.yaml") | {"max_worker": 3})
    with pytest.raises(ValueError, match="head_node_type"):
        check_provider(load("cluster.yaml") | {"head_node_type": "main"})


def test_the_cluster_files_differ_in_their_providers_alone():
    own = {"provider", "auth", "head_node_type", "available_node_types", "head_setup_commands"}
    aws, gcp, onprem = (
        {key: value for key, value in load(name).items() if key not in own} for name in PROVIDERS
    )
    assert aws == gcp
    start = onprem["head_start_ray_commands"]
    start[-1] = start[-1].replace(" export RAY_enable_autoscaler_v2=0;", "")
    assert aws == onprem


@pytest.mark.parametrize("name", ["cluster.yaml", "gcp.yaml"])
def test_workers_are_spot_machines_that_come_from_zero(name):
    types = check_provider(load(name))["available_node_types"]
    assert types.pop("head")["resources"] == {"CPU": 0}
    assert types
    for node in types.values():
        assert node["min_workers"] == 0 < node["max_workers"]
        config = node["node_config"]
        spot = (
            config.get("InstanceMarketOptions", {}).get("MarketType"),
            config.get("scheduling", {}).get("provisioningModel"),
        )
        assert spot in (("spot", None), (None, "SPOT"))


@pytest.mark.parametrize("name", PROVIDERS)
def test_what_nodes_get_is_there_and_does_not_hide_the_package(name):
    for remote, local in load(name)["file_mounts"].items():
        assert remote != "~/raytickets"
        if not local.startswith("~"):
            assert (CLUSTER / local / "pyproject.toml").exists()
    assert "RAY_AUTH_MODE=token\n" in (CLUSTER / "cluster.env").read_text()


@pytest.mark.parametrize("name", ["setup.sh", "mlflow.sh"])
def test_the_shell_takes_the_scripts(name):
    subprocess.run(["bash", "-n", CLUSTER / name], check=True)


# search.py


@pytest.fixture
def script(monkeypatch):
    """cluster/search.py as a module."""
    monkeypatch.syspath_prepend(CLUSTER)
    monkeypatch.delitem(sys.modules, "search", raising=False)
    import search

    yield search
    del sys.modules["search"]


def test_ray_submit_as_typed_runs_the_script_with_plain_arguments(monkeypatch):
    from click.testing import CliRunner
    from ray.scripts import scripts

    monkeypatch.chdir(CLUSTER)
    ran = []
    monkeypatch.setattr(scripts, "rsync", lambda *_, **__: None)
    monkeypatch.setattr(scripts, "exec_cluster", lambda file, cmd, **_: ran.append((file, cmd)))
    typed = "submit cluster.yaml search.py -- cifar10_vgg16 --name nightly --smoke"
    done = CliRunner().invoke(scripts.cli, typed.split(), catch_exceptions=False)
    assert done.exit_code == 0
    assert ran == [("cluster.yaml", "python ~/search.py cifar10_vgg16 --name nightly --smoke")]


def test_bad_input_is_told_before_ray_is_asked(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["search.py", "digitz"])
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 2
    assert "did you mean digits?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "address"),
    [
        (["digits"], ["--address", "auto"]),
        (["digits", "--address", "head:1"], ["--address", "head:1"]),
        (["digits", "--address=head:1"], ["--address=head:1"]),
    ],
)
def test_the_printed_command_goes_on_on_the_same_cluster(script, monkeypatch, typed, address):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(sys, "argv", ["search.py", *typed])
    called = []

    def main():
        called.extend(sys.argv)
        raise SystemExit(0)

    monkeypatch.setattr(script.cli, "main", main)
    with pytest.raises(SystemExit):
        script.main()
    assert called == ["raytickets", "search", "digits", *address]


# Kubernetes


def check_kuberay(resource):
    """KubeRay's own fields by the kept schema, pod templates by that of Kubernetes."""
    jsonschema.validate(resource, yaml.safe_load((DATA / "kuberay.yaml").read_text()))
    groups = cluster_of(resource)
    for group in (groups["headGroupSpec"], *groups["workerGroupSpecs"]):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}}
        check_kubernetes(pod | {"spec": group["template"]["spec"]})


def check_kubernetes(resource):
    import kubernetes_validate

    kubernetes_validate.validate(resource, KUBERNETES, strict=True)


def cluster_of(resource):
    spec = resource["spec"]
    return spec.get("jobTemplate", spec).get("rayClusterSpec", spec)


@pytest.mark.parametrize(
    ("name", "kind"), [*zip(MANIFESTS, ("RayJob", "RayCronJob", "RayCluster"), strict=True)]
)
def test_kuberay_takes_the_manifests(name, kind):
    check_kuberay(manifest(name, kind))


def test_the_kuberay_schema_rejects_broken_manifests():
    job = manifest("rayjob.yaml", "RayJob")
    for path, value in (
        (("spec", "entryPoint"), "python search.py"),
        (("spec", "backoffLimit"), "2"),
        (("spec", "rayClusterSpec", "authOptions", "mode"), "password"),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "maxReplicas"), None),
        (("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "volume"), []),
    ):
        broken = copy.deepcopy(job)
        place = broken
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        with pytest.raises(jsonschema.ValidationError):
            check_kuberay(broken)


def test_kubernetes_takes_the_cron_job():
    check_kubernetes(manifest("cronjob.yaml", "CronJob"))


def test_kubernetes_rejects_a_broken_cron_job():
    job = manifest("cronjob.yaml", "CronJob")
    job["spec"]["concurrencyPolicy"] = 1
    with pytest.raises(jsonschema.ValidationError):
        check_kubernetes(job)
    job["spec"] |= {"concurrencyPolicy": "Forbid", "concurencyPolicy": "Forbid"}
    with pytest.raises(jsonschema.ValidationError):
        check_kubernetes(job)


def test_all_manifests_start_the_same_cluster():
    job, scheduled, standing = (
        cluster_of(manifest(name, kind))
        for name, kind in zip(MANIFESTS, ("RayJob", "RayCronJob", "RayCluster"), strict=True)
    )
    assert job == scheduled == standing
    assert job["authOptions"]["mode"] == "token"
    assert all(group["minReplicas"] == 0 for group in job["workerGroupSpecs"])


def test_scheduled_sweeps_do_not_overlap():
    assert manifest("cronjob.yaml", "CronJob")["spec"]["concurrencyPolicy"] == "Forbid"
    night = manifest("raycronjob.yaml", "RayCronJob")["spec"]
    assert re.fullmatch(r"\d+ \d+ \* \* \*", night["schedule"])
    assert night["jobTemplate"]["activeDeadlineSeconds"] < 24 * 3600
    assert night["jobTemplate"]["backoffLimit"] == 0
    (line,) = [e for e in (CLUSTER / "crontab").read_text().splitlines() if not e.startswith("#")]
    assert "--resume-or-start" in line
    assert not re.search(r"(?<!\\)%", line)  # which cron would take for a line's end


def test_manifests_and_their_image_name_the_ray_that_is_tested():
    import ray

    assert cluster_of(manifest("rayjob.yaml", "RayJob"))["rayVersion"] == ray.__version__


# MLflow and systemd


def check_compose(path):
    tool = [TOOLS / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", path]
    return subprocess.run(tool, capture_output=True, text=True)


def test_compose_takes_the_mlflow_server():
    done = check_compose(CLUSTER / "mlflow.compose.yaml")
    assert done.returncode == 0, done.stdout


def test_compose_rejects_a_broken_file(tmp_path):
    compose = load("mlflow.compose.yaml")
    compose["services"]["mlflow"]["port"] = compose["services"]["mlflow"].pop("ports")
    broken = tmp_path / "compose.yaml"
    broken.write_text(yaml.safe_dump(compose))
    assert check_compose(broken).returncode == 1


def test_the_mlflow_server_asks_for_passwords_and_knows_its_names():
    server = load("mlflow.compose.yaml")["services"]["mlflow"]
    assert "--app-name basic-auth" in server["command"]
    assert server["environment"]["MLFLOW_SERVER_ALLOWED_HOSTS"]


needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd is not installed"
)


def check_units(folder):
    units = [folder / "raytickets.service", folder / "raytickets.timer"]
    command = ["systemd-analyze", "verify", "--user", "--man=no", *units]
    environment = os.environ | {"XDG_RUNTIME_DIR": str(folder)}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@needs_systemd
def test_systemd_takes_the_units(tmp_path):
    for unit in ("raytickets.service", "raytickets.timer"):
        shutil.copy(CLUSTER / unit, tmp_path)
    done = check_units(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


@needs_systemd
def test_systemd_rejects_a_broken_unit(tmp_path):
    for name, right, wrong in (
        ("raytickets.service", "Type=oneshot", "Type=oneshott"),
        ("raytickets.timer", "OnCalendar=*-*-* 02:00:00", "OnCalendar=*-*-* 25:00:00"),
    ):
        for unit in ("raytickets.service", "raytickets.timer"):
            shutil.copy(CLUSTER / unit, tmp_path)
        text = (CLUSTER / name).read_text()
        assert right in text
        (tmp_path / name).write_text(text.replace(right, wrong))
        done = check_units(tmp_path)
        assert "raytickets" in done.stdout + done.stderr


# Secrets and listeners


def files():
    return [path for path in CLUSTER.rglob("*") if path.is_file() and path.suffix != ".pyc"]


NAMED = (
    r"(?i)(password|secret_?key|access_?key|token)[\"']?\s*[:=]\s*[\"']?(?![~{]|\$\()[^\s\"']{4,}"
)
DEFAULT = r"(?i)\$\{\w*(password|key|token)\w*:?-"
SHAPED = r"AKIA[0-9A-Z]{16}|BEGIN [A-Z ]*PRIVATE KEY|\b[0-9a-f]{32,}\b|://[^/\s:]+:[^@\s]+@"


def secret(line):
    """What in a line could be a secret; `${NAME:?}` and the name of Ray's mode are none."""
    line = re.sub(r"\$\{\w+:\?\}", "", line)
    line = re.sub(r"(RAY_AUTH_MODE=|mode: |value: )token", "", line)
    return re.search(f"{NAMED}|{DEFAULT}|{SHAPED}".replace("(?i)", ""), line, re.IGNORECASE)


@pytest.mark.parametrize(
    "line",
    [
        "POSTGRES_PASSWORD: mlflow123",
        "S3_SECRET_KEY=s3admin",
        "RUSTFS_SECRET_KEY: ${S3_SECRET_KEY:-}",
        "RAY_AUTH_TOKEN: " + "0123456789abcdef" * 4,
        "uri: postgresql://mlflow:mlflow@postgres/mlflow",
        "-----BEGIN OPENSSH PRIVATE KEY-----",
    ],
)
def test_what_a_secret_looks_like(line):
    assert secret(line)


@pytest.mark.parametrize("path", files(), ids=lambda path: path.name)
def test_no_file_holds_a_secret_or_a_default_for_one(path):
    assert not [line for line in path.read_text().splitlines() if secret(line)]


def test_listeners_are_on_loopback():
    for path in files():
        lines = path.read_text().splitlines()
        # The container's own network, of which nothing is published but `ports`.
        inside = "mlflow server --app-name basic-auth --host 0.0.0.0 --port 5000"
        assert not [each for each in lines if "0.0.0.0" in each and inside not in each], path
    for name in PROVIDERS:
        assert "--dashboard-host=127.0.0.1" in load(name)["head_start_ray_commands"][-1]
    published = {
        port
        for service in load("mlflow.compose.yaml")["services"].values()
        for port in service.get("ports", [])
    }
    assert published == {"${MLFLOW_BIND:-127.0.0.1}:5000:5000"}


# For real

SPACE = """
from raytickets.config import *

def space():
    return SearchSpace(
        name="tiny",
        network=Network("cifar_vgg", {"depth": 9, "width": 0.125}),
        data=Data("digits", validation=0.1, test=0.25, limit=200),
        penalties=(1e-4, 1e-3),
        prune_ratios=(0.3,),
        training=Training(epochs=4, batch_size=32, learning_rate=0.05),
        stop_rule=StopRule(window=2, threshold=0.99),
        proof=Proof(budget=0.5, batch_size=32),
        retraining=Retraining(epochs=1, batch_size=32, learning_rate=0.05),
        winners=1,
    )
"""


@pytest.fixture
def head(tmp_path):
    head = Head(tmp_path)
    try:
        head.wait()
        yield head
    finally:
        head.end()


def submit_job(head, *words, **environment):
    """Exit code and output of a job; asks again, at most five times, where nobody answered."""
    command = [TOOLS / "ray", "job", "submit", "--", sys.executable, CLUSTER / "search.py", *words]
    for _ in range(5):
        done = subprocess.run(
            command,
            env=head.environment | environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        said = done.stdout + done.stderr
        if "Failed to connect to Ray at address" not in said:
            return done.returncode, said
        assert head.process.poll() is None, head.said()
        time.sleep(3)
    raise AssertionError(f"{said}\n\n{head.said()}")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_runs_with_the_token_and_is_refused_without(head, tmp_path):
    (tmp_path / "tiny.py").write_text(SPACE)
    words = (str(tmp_path / "tiny.py"), "--name", "nightly")
    code, said = submit_job(head, *words, RAY_AUTH_MODE="disabled")
    assert code == 1, said
    assert "Missing authentication token" in said

    (tmp_path / "wrong").write_text("another-token")
    code, said = submit_job(head, *words, RAY_AUTH_TOKEN_PATH=str(tmp_path / "wrong"))
    assert code == 1, said
    assert "Invalid authentication token" in said

    code, said = submit_job(head, "digitz")
    assert code == 1, said
    assert "exit code 2" in said

    code, said = submit_job(head, *words)
    assert code == 0, said
    assert len(list((tmp_path / "sweeps/nightly/tickets").iterdir())) == 2
    logs = [said, (tmp_path / "sweeps/nightly/journal.jsonl").read_text()]
    assert not any(TOKEN in text for text in logs)


class Hosts:
    """Two hosts in namespaces of this machine, joined by a cable, with one shared folder."""

    def __init__(self, folder):
        self.folder = folder
        self.addresses = {"one": "10.77.0.1", "two": "10.77.0.2"}
        keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "key"]
        subprocess.run(keygen, check=True)
        (folder / "shared").mkdir()
        self._processes = {name: self._start(name) for name in self.addresses}
        self._inner = {name: self._first_process(name) for name in self.addresses}
        one, two = (self._inner[name] for name in self.addresses)
        run(*f"ip link add cable netns {one} type veth peer name cable netns {two}".split())
        for name, address in self.addresses.items():
            # A cable goes with the host at its other end, and a host's address with its cable.
            kept = f"addr add {address}/32 dev lo"
            for words in (kept, f"addr add {address}/24 dev cable", "link set cable up"):
                self.inside(name, "ip", *words.split())
            # Ray asks for the way to the world to learn its own address.
            self.inside(name, "ip", "route", "add", "default", "dev", "cable")

    def _start(self, name):
        home = self.folder / name
        ssh = home / ".ssh"
        ssh.mkdir(parents=True, mode=0o700)
        home.chmod(0o700)
        shutil.copy(self.folder / "key.pub", ssh / "authorized_keys")
        (ssh / "authorized_keys").chmod(0o600)
        (home / ".bashrc").write_text(f"export PATH={TOOLS}:$PATH\n")
        kept = [sys.base_prefix, sys.prefix, ROOT]
        options = ["--net", "--pid", "--mount", "--uts", "--fork", "--kill-child", "--mount-proc"]
        return subprocess.Popen(
            ["unshare", *options, "bash", DATA / "host.sh", self.folder, name, *kept],
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def _first_process(self, name):
        process = self._processes[name]
        said = process.stderr.readline()
        assert "Server listening" in said, said + process.stderr.read()
        return Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0]

    def inside(self, name, *command, timeout=30, check=True):
        enter = ["nsenter", "-t", self._inner[name], "-n", "-p", "-m", "-u", f"--wd={self.folder}"]
        return run(*enter, *command, timeout=timeout, check=check)

    def kill(self, name):
        """What a host without power does: nothing, all at once."""
        process = self._processes.pop(name)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()

    def end(self):
        for name in [*self._processes]:
            self.kill(name)


def run(*command, timeout=30, check=True):
    environment = os.environ | {"PATH": f"{TOOLS}:{os.environ['PATH']}"}
    done = subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0 or not check, done.stdout
    return done


def namespaces_work():
    programs = ("unshare", "nsenter", "ip", "rsync", "ssh-keygen", "/usr/sbin/sshd")
    if os.geteuid() != 0 or not all(shutil.which(program) for program in programs):
        return False
    return (
        subprocess.run(["unshare", "--net", "--pid", "--mount", "--fork", "true"]).returncode == 0
    )


@pytest.fixture
def hosts(tmp_path):
    hosts = Hosts(tmp_path)
    yield hosts
    hosts.end()


def onprem(hosts, **changes):
    """onprem.yaml as it is, but for its addresses, the key, and setup.sh, which would download."""
    config = load("onprem.yaml")
    one, two = hosts.addresses.values()
    config["provider"] |= {"head_ip": one, "worker_ips": [two]}
    config["auth"] = {"ssh_user": "root", "ssh_private_key": str(hosts.folder / "key")}
    (hosts.folder / "token").write_text(TOKEN)
    config["file_mounts"] = {
        "~/raytickets-checkout/cluster": str(CLUSTER),
        "~/.ray/auth_token": str(hosts.folder / "token"),
    }
    config["setup_commands"] = [
        "mkdir -p /mnt/raytickets/sweeps; "
        f"echo 'export PATH={TOOLS}:$PATH; set -a; "
        ". ~/raytickets-checkout/cluster/cluster.env; set +a' > ~/.bashrc"
    ]
    (hosts.folder / "onprem.yaml").write_text(yaml.safe_dump(config | changes))


needs_namespaces = pytest.mark.skipif(
    not namespaces_work(), reason="needs root, namespaces, sshd and rsync"
)


@pytest.mark.slow
@pytest.mark.timeout(900)
@needs_namespaces
def test_two_hosts_over_ssh_run_a_sweep_as_typed(hosts):
    onprem(hosts)
    one, two = hosts.addresses.values()
    (hosts.folder / "shared/tiny.py").write_text(SPACE)

    def ray(*words, check=True, timeout=300):
        return hosts.inside("one", "ray", *words, timeout=timeout, check=check)

    ray("up", "--yes", "onprem.yaml")
    words = ["/mnt/raytickets/tiny.py", "--name", "nightly"]
    said = ray("submit", "onprem.yaml", CLUSTER / "search.py", "--", *words).stdout
    assert "nightly: done" in said
    sweep = hosts.folder / "shared/sweeps/nightly"
    assert len(list((sweep / "tickets").iterdir())) == 2

    wrong = ray("submit", "onprem.yaml", CLUSTER / "search.py", "--", "digitz", check=False)
    assert wrong.returncode == 1
    assert "did you mean digits?" in wrong.stdout

    # What ran where: the head node has no CPUs, so trajectories were on the other host.
    found = ray("exec", "onprem.yaml", "ray list nodes --format yaml").stdout
    assert {one, two} <= set(re.findall(r"node_ip: ([\d.]+)", found))
    store = Path("~root/mlflow.db").expanduser()
    count = f"sqlite3.connect('{store}').execute('select count(*) from runs').fetchone()"
    runs = hosts.inside("one", sys.executable, "-c", f"import sqlite3; print({count}[0])").stdout
    assert int(runs) == 1 + 2 + 1 + 2  # the sweep, its trajectories, the dense network, tickets

    ray("down", "--yes", "onprem.yaml")
    assert "raylet" not in hosts.inside("one", "ps", "-e").stdout
    # `ray down` stops the head node; the others end once they have missed it for a minute.
    for _ in range(40):
        if "raylet" not in hosts.inside("two", "ps", "-e").stdout:
            break
        time.sleep(3)
    else:
        pytest.fail("the second host still runs Ray")


LONG = SPACE.replace("(1e-4, 1e-3)", "(1e-5, 1e-4, 3e-4, 1e-3)").replace("epochs=4", "epochs=100")
LONG = LONG.replace("StopRule(window=2, threshold=0.99)", "StopRule(window=90, threshold=0.99)")


@pytest.mark.slow
@pytest.mark.timeout(900)
@needs_namespaces
def test_a_sweep_ends_on_one_host_when_the_other_is_lost(hosts):
    start = load("onprem.yaml")["head_start_ray_commands"]
    start[-1] = start[-1].replace("--num-cpus=0", "--num-cpus=1")
    join = [
        line.replace("ray start", "ray start --num-cpus=1")
        for line in (load("onprem.yaml")["worker_start_ray_commands"])
    ]
    onprem(hosts, head_start_ray_commands=start, worker_start_ray_commands=join)
    (hosts.folder / "shared/tiny.py").write_text(LONG)
    hosts.inside("one", "ray", "up", "--yes", "onprem.yaml", timeout=300)

    def joined():
        said = hosts.inside("one", "ray", "exec", "onprem.yaml", "ray list nodes", timeout=60)
        return said.stdout.count("ALIVE") == 2

    def lines():
        path = hosts.folder / "shared/sweeps/nightly/journal.jsonl"
        return path.read_text().splitlines() if path.exists() else []

    def on_both():
        """Two trajectories have been checked and have not ended."""
        events = [json.loads(line) for line in lines()]
        open_ = {event["trajectory"] for event in events if event["event"] == "check"}
        return len(open_ - {e["trajectory"] for e in events if e["event"] == "trajectory"}) == 2

    def soon(true):
        for _ in range(150):
            if true():
                return
            time.sleep(1)
        pytest.fail(f"{true.__name__} never came\n" + "\n".join(lines()[-5:]))

    soon(joined)
    words = ["/mnt/raytickets/tiny.py", "--name", "nightly"]
    with ThreadPoolExecutor(1) as pool:
        command = ["ray", "submit", "onprem.yaml", CLUSTER / "search.py", "--", *words]
        sweep = pool.submit(hosts.inside, "one", *command, timeout=600)
        soon(on_both)
        hosts.kill("two")
        said = sweep.result().stdout
    assert "nightly: done" in said
    events = [json.loads(line) for line in lines()]
    assert [event for event in events if event["event"] == "retry"]
    ends = [event["state"] for event in events if event["event"] == "trajectory"]
    assert len(ends) == 4
    assert "failed" not in ends
    hosts.inside("one", "ray", "down", "--yes", "onprem.yaml", timeout=120)

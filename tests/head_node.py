"""A Ray head node of a test's own, beside whatever else runs on the machine."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from free_ports import free_ports

TOOLS = Path(sys.executable).parent
TOKEN = "a-token-for-this-test-alone"
# Ray's, written out: the driver is to import Ray first, as it sets what Ray reads then.
FAKE_NODES = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
FAKE_HEAD_NODE_ID = "f" * 51 + "00000"


class Head:
    """A head node on loopback, with every port of its own.

    With `types` its autoscaler starts workers of these types on this machine, as Ray's own
    `AutoscalingCluster` does, which begins with a `ray stop` of everything that runs here.
    """

    def __init__(self, folder, *, cpus=2, token=True, types=None, max_workers=0):
        (folder / "token").write_text(TOKEN)
        names = (
            *("port", "ray-client-server-port", "dashboard-port", "node-manager-port"),
            *("object-manager-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port"),
            *("runtime-env-agent-port", "metrics-export-port"),
        )
        ports = dict(zip(names, free_ports(len(names)), strict=True))
        self.address = f"http://127.0.0.1:{ports['dashboard-port']}"
        self.gcs = f"127.0.0.1:{ports['port']}"
        self.environment = os.environ | {
            "RAY_AUTH_MODE": "token" if token else "disabled",
            "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
            "RAY_API_SERVER_ADDRESS": self.address,
            "RAYTICKETS_STORAGE": str(folder / "sweeps"),
            "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
            # Which lets Ray keep to loopback.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{TOOLS}:{os.environ['PATH']}",
        }
        # As short as it goes: sockets have names of at most 107 characters.
        self.folder = Path("/tmp") / f"rt{os.getpid()}"
        self.output = folder / "head.txt"
        words = ["--head", "--block", f"--num-cpus={cpus}", "--disable-usage-stats"]
        words += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1"]
        words += [f"--temp-dir={self.folder}", *(f"--{name}={ports[name]}" for name in names)]
        if types is not None:
            words.append(f"--autoscaling-config={self._autoscaling(folder, types, max_workers)}")
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [TOOLS / "ray", "start", *words],
                env=self.environment,
                start_new_session=True,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def _autoscaling(self, folder, types, max_workers):
        self.environment |= {
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        }
        main = {"resources": {}, "node_config": {}, "max_workers": 0}
        lists = ("setup", "head_setup", "worker_setup", "initialization")
        lists += ("head_start_ray", "worker_start_ray")
        config = {f"{name}_commands": [] for name in lists} | {
            "cluster_name": "made-up",
            "auth": {},
            "docker": {},
            "file_mounts": {},
            "cluster_synced_files": [],
            "upscaling_speed": 1,
            "max_workers": max_workers,
            "idle_timeout_minutes": 0.2,
            "provider": {
                # By its module, as Ray's wheel lacks the defaults of the type `fake_multinode`.
                "type": "external",
                "module": FAKE_NODES,
                "gcs_address": self.gcs,
                "head_node_id": FAKE_HEAD_NODE_ID,
                "launch_multiple": True,
            },
            "available_node_types": {"ray.head.default": main, **types},
            "head_node_type": "ray.head.default",
        }
        path = folder / "autoscaling.json"
        path.write_text(json.dumps(config))
        return path

    def wait(self):
        """Until the dashboard has answered three times in a row."""
        asked = urllib.request.Request(
            f"{self.address}/api/version", headers={"Authorization": f"Bearer {TOKEN}"}
        )
        answered, deadline = 0, time.monotonic() + 180
        while answered < 3:
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            try:
                with urllib.request.urlopen(asked, timeout=10) as answer:
                    answered = answered + 1 if answer.status == 200 else 0
            except OSError:
                answered = 0
            time.sleep(1)

    def said(self):
        """What the head node and its parts said last."""
        logs = self.folder / "session_latest/logs"
        parts = ("dashboard.log", "dashboard_JobHead.log", "dashboard_agent.log", "raylet.out")
        texts = [(name, logs / name) for name in (*parts, "raylet.err")]
        texts = [("ray start", self.output), *(each for each in texts if each[1].exists())]
        return "\n\n".join(f"--- {name}\n{path.read_text()[-2500:]}" for name, path in texts)

    def _left(self):
        """Processes that this head node, or its autoscaler, has left behind."""
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if f"{self.folder}/".encode() in path.read_bytes():
                    yield int(path.parent.name)

    def end(self):
        # pytest shows this where the test failed.
        print(self.said())
        self.process.terminate()
        self.process.wait(60)
        for process in self._left():
            os.kill(process, signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)

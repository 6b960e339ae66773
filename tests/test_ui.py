"""What a person sees of a sweep and of a comparison in MLflow, in a browser without a window.

Screenshots are kept in the folder RAYTICKETS_SCREENSHOTS, to be looked at, else with the test's.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import made_up_comparison
import made_up_sweep
import pytest
from free_ports import free_ports
from mlflow import MlflowClient
from selenium import webdriver
from selenium.common.exceptions import TimeoutException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait

from raytickets import comparison
from raytickets.halving import proved
from raytickets.tracking import Tracker, prepare_store, tickets_address

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
SWITCHES = (
    "headless",
    "no-sandbox",
    "disable-gpu",
    "disable-quic",
    "no-first-run",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
    "window-size=1800,1100",
)
PATIENCE_S = 120
JOURNALS = {"first": made_up_sweep.FINISHED, "duel": made_up_comparison.finished(joules=True)}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """MLflow's server over a finished sweep and a finished comparison; its address."""
    folder = tmp_path_factory.mktemp("ui")
    uri = f"sqlite:///{folder}/mlflow.db"
    prepare_store(uri)
    for name, events in JOURNALS.items():
        (folder / name).mkdir()
        tracker = Tracker(uri, folder / name)
        for event in events:
            tracker.write(event)
        assert tracker.close() is None
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    address, quiet = f"http://127.0.0.1:{port}", subprocess.DEVNULL
    settings = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    process = subprocess.Popen(
        command, cwd=folder, env=settings, stdout=quiet, stderr=quiet, start_new_session=True
    )
    try:
        wait_for(f"{address}/health", process)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # Its workers too.
        process.wait()


def wait_for(address: str, process: subprocess.Popen) -> None:
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        assert process.poll() is None, "the server ended"
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except (urllib.error.URLError, TimeoutError):
            time.sleep(0.5)
    pytest.fail(f"{address} does not answer")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for switch in (*SWITCHES, f"user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(f"--{switch}")
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.set_script_timeout(PATIENCE_S)
    yield driver
    driver.quit()


def wait_until(browser: webdriver.Chrome, condition: str, *arguments: object) -> Any:
    """What a JavaScript expression gives once that is something."""
    wait = WebDriverWait(browser, PATIENCE_S, ignored_exceptions=[TimeoutException])
    return wait.until(lambda b: b.execute_script(f"return {condition}", *arguments), condition)


def wait_for_text(browser: webdriver.Chrome, text: str) -> None:
    wait_until(browser, "document.body.innerText.includes(arguments[0])", text)


def open_page(browser: webdriver.Chrome, address: str) -> None:
    browser.get("about:blank")  # Else only the part after the # would change.
    browser.get(address)


def screenshot(browser: webdriver.Chrome, folder: Path, name: str) -> None:
    folder = Path(os.environ.get("RAYTICKETS_SCREENSHOTS", folder))
    folder.mkdir(parents=True, exist_ok=True)
    time.sleep(3)  # What is drawn last moves into place.
    assert browser.save_screenshot(str(folder / f"{name}.png"))


LINE = """
const words = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT)
while (walker.nextNode()) {
    const range = document.createRange()
    range.selectNodeContents(walker.currentNode)
    const {left, right, top, bottom, width} = range.getBoundingClientRect()
    const text = walker.currentNode.data.trim()
    const element = walker.currentNode.parentElement
    if (text && width) words.push({text, element, left, right, middle: (top + bottom) / 2})
}
const label = words.findLast(word => word.text == arguments[0])
if (!label) return null
const line = words
    .filter(word => word.left > label.right && Math.abs(word.middle - label.middle) < 8)
    .sort((one, other) => one.left - other.left)
label.element.closest('tr, .ReactVirtualized__Grid').scrollIntoView({block: 'center'})
return line.map(word => word.text)
"""


def line(browser: webdriver.Chrome, label: str) -> list[str]:
    """What stands to the right of the last place where the page has these words, now in sight."""
    return wait_until(browser, f"(function() {{ {LINE} }})(...arguments)", label)


SWEEP = {
    f"ratio{e['prune_ratio']:g}-{e['trajectory']}": (e["prune_ratio"], e["proof_accuracy"])
    for e in proved(JOURNALS["first"])
}
COMPARISON = {
    f"{run['method']}-{run['prune_ratio']:g}-seed{run['seed']}".replace("dense-0", "dense"): (
        run["prune_ratio"],
        run["test_accuracy"],
    )
    for run in comparison.runs(JOURNALS["duel"])
}


@pytest.mark.parametrize(
    ("kind", "name", "accuracy", "tickets"),
    [
        ("sweep", "first", "proof_accuracy", SWEEP),
        ("comparison", "duel", "test_accuracy", COMPARISON),
    ],
)
def test_tickets_are_found_selected_and_compared(
    server: str,
    browser: webdriver.Chrome,
    tmp_path: Path,
    kind: str,
    name: str,
    accuracy: str,
    tickets: dict[str, tuple[float, float]],
):
    open_page(browser, tickets_address(server, "digits", kind, name))
    wait_for_text(browser, f"{len(tickets)} matching runs")
    for row in range(3):
        box = f"[row-index='{row}'] input[aria-label*='row selection']"
        wait_until(browser, "document.querySelector(arguments[0])", box).click()
    screenshot(browser, tmp_path, f"{kind}_tickets")
    button = "[...document.querySelectorAll('button')].find(b => b.innerText == 'Compare')"
    wait_until(browser, button).click()
    wait_for_text(browser, "Comparing 3 Runs")
    ratios, accuracies = line(browser, "prune_ratio"), line(browser, accuracy)
    screenshot(browser, tmp_path, f"{kind}_compared")
    shown = dict(
        zip(
            line(browser, "Run Name:"),
            zip(map(float, ratios), map(float, accuracies), strict=True),
            strict=True,
        )
    )
    # MLflow shows three decimals.
    assert shown == {run: pytest.approx(tickets[run], abs=6e-4) for run in shown}
    best = sorted((value for _, value in tickets.values()), reverse=True)[:3]
    assert sorted(map(float, accuracies), reverse=True) == pytest.approx(best, abs=6e-4)


def test_a_comparisons_table_is_shown(server: str, browser: webdriver.Chrome, tmp_path: Path):
    client = MlflowClient(server)
    experiment = client.get_experiment_by_name("raytickets/digits")
    assert experiment is not None
    found = 'tags."raytickets.kind" = "comparison"'
    (run,) = client.search_runs([experiment.experiment_id], found)
    page = f"{server}/#/experiments/{experiment.experiment_id}/runs/{run.info.run_id}"
    open_page(browser, page)
    wait_for_text(browser, "early_bird is 2.33 points above random")
    screenshot(browser, tmp_path, "comparison_run")
    open_page(browser, f"{page}/artifacts/comparison.json")
    wait_for_text(browser, "early_bird")
    screenshot(browser, tmp_path, "comparison_table")

"""The story of one machine: bare, provisioned, provisioned again, used, attacked, rebooted."""

import contextlib
import csv
import json
import re
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import ROOT, Site

with (ROOT / "loadtest" / "wines.csv").open(newline="") as _file:
    WINES = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(_file)]

SECRETS = ("prometheus", "alertmanager", "locust", "grafana", "jenkins", "jenkins.metrics")
PREDICTIONS = "fastapi_monitoring_regression_model_output_count"

PROVOKED = {"ArtifactRefused"}
"""What this story makes fire where a scrape falls into it: it tampers with a model."""


def sample(text: str, name: str) -> float:
    """Return the value of a metric without labels in an exposition."""
    return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(name + " "))


def test_check_mode_passes_on_a_bare_machine_and_leaves_it_bare(site: Site) -> None:
    site.play("site.yml", "--check")
    assert site.run("ls /opt; getent passwd winemon || true") == ""


def test_up_provisions_the_bare_machine_and_loads_it(site: Site) -> None:
    output = site.up()
    assert site.changed(output) > 0
    assert "20 seconds of load" in output
    consoles = re.findall(r"^(\w+) +http://\S+ .*?(\S+)$", output, re.MULTILINE)
    assert len(consoles) >= 5
    assert {state for _, state in consoles} == {"ok"}


def test_the_load_is_served_and_seen_from_both_sides(site: Site) -> None:
    sent = 'winemon_locust_requests_total{name="/predict"}'
    served = 'fastapi_monitoring_http_requests_total{handler="/predict",status="2xx"}'
    assert site.eventually(f"sum({sent}) > 10") > 10
    # Each is scraped at a time of its own, and what else was asked counts for the API only.
    site.eventually(f"sum({served}) >= sum({sent}) > 10")


def test_up_again_changes_nothing(site: Site) -> None:
    output = site.up()
    assert site.changed(output) == 0
    assert "20 seconds of load" not in output


def test_a_run_without_the_internet_removes_only_the_rule_that_does_not_ship(site: Site) -> None:
    site.run("echo 'groups: []' >/etc/prometheus/rules/old.yml")
    route = site.run("ip route show default")
    site.run("ip route del default")
    try:
        output = site.play("site.yml", "-e", "winemon_package_lists_max_age=0")
    finally:
        site.run(f"ip route add {route}")
    assert "The package mirror cannot be reached" in output
    assert site.changed(output) == 2  # the file, and Prometheus' reload
    assert "old.yml" not in site.run("ls /etc/prometheus/rules")


def test_a_prediction_is_what_training_said_and_names_its_model(site: Site) -> None:
    manifest = json.loads(site.run("cat /opt/winemon/current/artifacts/manifest.json"))
    for row in manifest["samples"]:
        answer = site.client.post(site.api("/predict"), json=row["wine"])
        assert answer.json()["quality"] == pytest.approx(row["quality"], abs=1e-9)
        assert answer.headers["X-Model-Version"] == manifest["version"]


@pytest.mark.parametrize("value", ["very", None, -1, "NaN", [], True])
def test_bad_input_gets_422_with_the_fields_name(site: Site, value: Any) -> None:
    answer = site.client.post(site.api("/predict"), json={**WINES[0], "alcohol_pct_vol": value})
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"][-1] == "alcohol_pct_vol"


def test_every_request_is_counted_once_even_when_a_worker_is_killed(site: Site) -> None:
    def count() -> float:
        return sample(site.client.get(site.api("/metrics")).text, PREDICTIONS)

    start = count()
    for wine in WINES[:60]:
        site.client.post(site.api("/predict"), json=wine).raise_for_status()
    assert count() == start + 60
    master = site.run("systemctl show --property=MainPID --value winemon-api")
    victim, *others = site.run(f"pgrep -P {master}").split()
    site.run(f"kill -9 {victim}")
    deadline = time.monotonic() + 30 * site.patience
    while len(site.run(f"pgrep -P {master}").split()) <= len(others):
        assert time.monotonic() < deadline, "the killed worker was not replaced"
        time.sleep(0.2)
    site.reconnect()  # the killed worker's connection is gone
    assert count() == start + 60
    for wine in WINES[:40]:
        site.client.post(site.api("/predict"), json=wine).raise_for_status()
    assert [count() for _ in range(5)] == [start + 100] * 5


def test_a_model_that_was_tampered_with_is_refused_and_said(site: Site) -> None:
    model = "/opt/winemon/current/artifacts/model.joblib"
    site.run(f"cp -p {model} /root/model.joblib")
    try:
        site.run(f"printf x >>{model} && systemctl restart winemon-api")
        answer = await_status(site, "/ready", 503)
        assert "model.joblib" in answer
        assert site.client.get(site.api("/healthcheck")).status_code == 200
        assert site.client.post(site.api("/predict"), json=WINES[0]).status_code == 503
        assert sample(site.client.get(site.api("/metrics")).text, "winemon_artifact_refused_total") > 0
    finally:
        site.run(f"mv /root/model.joblib {model} && systemctl restart winemon-api")
    await_status(site, "/ready", 200)


def await_status(site: Site, path: str, status: int) -> str:
    """Return the answer as soon as it has this status."""
    deadline = time.monotonic() + 30 * site.patience
    while (answer := site.client.get(site.api(path))).status_code != status:
        assert time.monotonic() < deadline, f"{path} says {answer.status_code}: {answer.text}"
        time.sleep(0.2)
    return answer.text


@pytest.mark.parametrize(
    ("port", "path", "secret"),
    [
        (9090, "/api/v1/status/config", "prometheus"),
        (9093, "/api/v2/status", "alertmanager"),
        (3000, "/api/user", "grafana"),
        (8089, "/", "locust"),
    ],
)
def test_consoles_ask_for_their_generated_password(site: Site, port: int, path: str, secret: str) -> None:
    url = f"http://{site.address}:{port}{path}"
    assert site.client.get(url).status_code == 401
    assert site.client.get(url, auth=("admin", "admin")).status_code == 401
    assert site.client.get(url, auth=site.secret(secret)).status_code == 200


def test_secrets_are_nobody_elses_business(site: Site) -> None:
    folder = site.secrets
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in folder.iterdir())
    # What it has of Jenkins it has of a Jenkins that is there.
    names = [name for name in SECRETS if "jenkins" not in name or (folder / "jenkins").exists()]
    passwords = [site.secret(name)[1] for name in names]
    logs = "".join(log.read_text() for log in site.build.glob("*.log")) + site.run("journalctl --no-pager")
    for password in passwords:
        assert password not in logs
        readable = site.run("grep -rlsF --file=- /etc /opt /run /var/lib || true", password).split()
        assert readable, "the password is nowhere on the machine"
        assert all(site.run(f"stat -c %A {path}")[7:] == "---" for path in readable), readable


@contextlib.contextmanager
def stranger() -> Iterator[list[str]]:
    """Yield the start of a command that runs on another host of the machine's network."""
    name, link = "winemon-e2e-strg", "vb-e2e-strg"
    least = ["address", "02:00:00:00:00:01"]  # which the bridge would take if it had no address of its own

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True)

    ip("netns", "add", name)
    try:
        ip("link", "add", link, *least, "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("link", "set", link, "master", "winemon1", "up")
        ip("-n", name, "address", "add", "10.213.1.99/24", "dev", "eth0")
        ip("-n", name, "link", "set", "eth0", "up")
        yield ["ip", "netns", "exec", name]
    finally:
        ip("netns", "delete", name)


def test_the_firewall_lets_strangers_reach_ssh_and_nothing_else_of_ours(site: Site) -> None:
    bridge = Path(f"/sys/class/net/{site.bridge}/address")
    before = bridge.read_text()
    reaches = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 2)"
    with stranger() as shell:
        assert bridge.read_text() == before
        result = {
            port: subprocess.run(
                [*shell, "/usr/bin/python3", "-c", reaches, site.address, str(port)],
                capture_output=True,
                check=False,
            ).returncode
            for port in (22, 3000, 5000, 8080, 8089, 9090, 9100, 9256)
        }
    assert result == {22: 0, 3000: 1, 5000: 1, 8080: 1, 8089: 1, 9090: 1, 9100: 1, 9256: 1}
    assert site.client.get(site.api("/healthcheck")).status_code == 200


def test_firewalls_of_others_are_left_alone(site: Site) -> None:
    site.run("nft add table inet theirs && systemctl restart winemon-firewall")
    assert "table inet theirs" in site.run("nft list tables")
    site.run("nft delete table inet theirs")


def test_our_units_are_hardened(site: Site) -> None:
    units = site.run(
        "systemctl list-units --type=service --plain --no-legend 'winemon-*' | cut -d' ' -f1"
    ).split()
    assert {"winemon-api.service", "winemon-locust.service", "winemon-locust-worker@1.service"} <= set(units)
    for unit in units:
        verdict = site.run(f"systemd-analyze security --no-pager {unit} | tail -n 1")
        assert float(verdict.split(":")[1].split()[0]) <= 2.5, verdict


def test_services_run_as_users_without_rights(site: Site) -> None:
    host = site.host()
    for unit, user in [
        ("winemon-api", "winemon"),
        ("winemon-locust", "winemon"),
        ("prometheus", "prometheus"),
    ]:
        pid = site.run(f"systemctl show --property=MainPID --value {unit}")
        process = host.process.get(pid=int(pid))
        assert process.user == user
    assert host.file("/opt/winemon/current").is_symlink
    assert host.file("/opt/winemon/current/app/main.py").user == "root"


def test_reloads_under_load_fail_no_request_and_every_request_is_counted(site: Site) -> None:
    def served() -> float:
        lines = site.client.get(site.api("/metrics")).text.splitlines()
        names = ("fastapi_monitoring_http_requests_total{", 'handler="/predict')
        return sum(float(line.split()[-1]) for line in lines if all(name in line for name in names))

    def locust(path: str, data: dict[str, str] | None = None) -> Any:
        method = "POST" if data else "GET"
        url = f"http://{site.address}:8089{path}"
        return (
            site.client.request(method, url, data=data, auth=site.secret("locust")).raise_for_status().json()
        )

    before = served()
    load = {"user_count": "20", "spawn_rate": "20", "host": site.api(""), "max_wait": "1"}
    assert locust("/swarm", load)["success"]
    for _ in range(2):
        time.sleep(5)
        site.run("systemctl reload winemon-api")
    time.sleep(15)  # the workers that were told to leave have left by then
    site.client.post(f"http://{site.address}:8089/stop", auth=site.secret("locust")).raise_for_status()
    time.sleep(5)  # the workers' last reports
    stats = locust("/stats/requests")["stats"]
    total = next(row for row in stats if row["name"] == "Aggregated")
    sent = sum(row["num_requests"] for row in stats if row["name"].startswith("/predict"))
    assert total["num_failures"] == 0, stats
    assert sent > 200
    # Requests that were on their way when Locust stopped were served but not reported: at most one a user.
    assert sent <= served() - before <= sent + 20


def test_prometheus_runs_on_rules_that_load_and_only_the_watchdog_fires(site: Site) -> None:
    def health() -> set[str]:
        url = f"http://{site.address}:9090/api/v1/rules"
        groups = site.client.get(url, auth=site.secret("prometheus")).json()["data"]["groups"]
        return {rule["health"] for group in groups for rule in group["rules"]}

    deadline = time.monotonic() + 90
    while health() != {"ok"}:  # a rule is unknown until its first evaluation
        assert time.monotonic() < deadline, health()
        time.sleep(1)
    firing = {alert["metric"]["alertname"] for alert in site.query('ALERTS{alertstate="firing"}')}
    assert firing - PROVOKED <= {"Watchdog"}


def test_everything_comes_back_after_a_reboot_and_nothing_is_lost(site: Site) -> None:
    before = site.eventually(f"max_over_time({PREDICTIONS}[1h])")
    boot = site.run("cat /proc/sys/kernel/random/boot_id; uptime -s")
    site.ssh("sudo reboot")
    time.sleep(3)
    deadline = time.monotonic() + 60
    while site.ssh("true").returncode:
        assert time.monotonic() < deadline, "the machine does not come back"
    assert site.run("cat /proc/sys/kernel/random/boot_id; uptime -s") != boot
    site.play("ansible/verify.yml")
    assert site.eventually(f"max_over_time({PREDICTIONS}[1h])") >= before
    assert site.run("systemctl --failed --no-legend") == ""

"""The life of one machine: bare, provisioned, provisioned again; used, deployed to, rebooted."""

import json
import re
import stat
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.load import WINES, Load
from tests.e2e.machines import ONE_MACHINE, keep, layer_path, locked, machines, one_machine
from tests.e2e.releases import HEALTH, Build, publish, replace, status
from tests.e2e.site import Site, until

SECRETS = ("prometheus", "alertmanager", "locust", "grafana", "jenkins", "jenkins.metrics")
PREDICTIONS = "fastapi_monitoring_regression_model_output_count"

PROVOKED = {"ApiDown", "ArtifactRefused"}
"""What this scenario makes fire: it stops the API and tampers with a model."""


@pytest.fixture(scope="module")
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    """Build the machine, bare at first; every test goes on from where the one before it left it."""
    # Who wants a machine with all of winemon waits for this one's layer.
    with locked(ONE_MACHINE):
        site = one_machine("one_machine")
        with machines(request.session, site):
            yield site


def sample(text: str, name: str) -> float:
    """Return the value of a metric without labels in an exposition."""
    return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(name + " "))


@pytest.mark.thorough
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
    if not layer_path().exists():
        keep(site)


def test_a_run_without_the_internet_removes_only_the_rule_that_does_not_ship_and_takes_a_setting(
    site: Site,
) -> None:
    site.run("echo 'groups: []' >/etc/prometheus/rules/old.yml")
    route = site.run("ip route show default")
    site.run("ip route del default")
    try:
        output = site.play("site.yml", "-e", "winemon_package_lists_max_age=0", "-e", "winemon_api_workers=5")
    finally:
        site.run(f"ip route add {route}")
    assert "The package mirror cannot be reached" in output
    assert site.changed(output) == 4  # the rule and Prometheus' reload, the setting and the API's restart
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


def alerts(site: Site) -> set[str]:
    """Return the names of the alerts that Alertmanager has and that have not ended."""
    url = f"http://{site.at('monitoring')}:9093/api/v2/alerts"
    answer = site.client.get(url, auth=site.secret("alertmanager")).raise_for_status()
    return {alert["labels"]["alertname"] for alert in answer.json()}


def test_an_alert_fires_and_resolves(site: Site) -> None:
    assert "ApiDown" not in alerts(site)
    site.run("systemctl stop winemon-api.socket winemon-api.service")
    stopped = time.monotonic()
    try:
        until(lambda: "ApiDown" in alerts(site), "ApiDown fires", 240)
        assert time.monotonic() - stopped >= 120, "it lasts two minutes before somebody is told"
    finally:
        site.run("systemctl start winemon-api.socket winemon-api.service")
    until(lambda: "ApiDown" not in alerts(site), "ApiDown ends", 120)


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
    hashes = "/etc/prometheus/web.yml /etc/prometheus/alertmanager-web.yml"
    assert site.run(f"stat -c %a {hashes}").split() == ["640", "640"]


@pytest.mark.thorough
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


def test_a_release_is_deployed_and_rolled_back_and_no_request_fails(site: Site, build: Build) -> None:
    load = Load(site, site.api(""))
    load.start()
    before = status(site)["live"]
    published = publish(site, build(replace("app/main.py", HEALTH, HEALTH.replace("ok", "deployed"))))
    for playbook, live, answer in (("deploy", published, "deployed"), ("rollback", before, "ok")):
        served = load.served()
        site.play(f"ansible/{playbook}.yml")
        assert status(site)["live"] == live
        assert site.client.get(site.api("/healthcheck")).json() == {"status": answer}
        time.sleep(4)  # Locust's worker reports every three seconds
        assert load.served() > served
    load.stop()


def test_prometheus_runs_on_rules_that_load(site: Site) -> None:
    def health() -> set[str]:
        url = f"http://{site.address}:9090/api/v1/rules"
        groups = site.client.get(url, auth=site.secret("prometheus")).json()["data"]["groups"]
        return {rule["health"] for group in groups for rule in group["rules"]}

    deadline = time.monotonic() + 90
    while health() != {"ok"}:  # a rule is unknown until its first evaluation
        assert time.monotonic() < deadline, health()
        time.sleep(1)


@pytest.mark.thorough
def test_in_its_first_ten_minutes_a_machine_fires_nothing_but_the_watchdog_and_what_was_provoked(
    site: Site,
) -> None:
    born = site.query('up{job="prometheus"}[1d]')[0]["values"][0][0]
    time.sleep(max(0.0, born + 600 - time.time()))  # usually the tests before this one have taken longer
    fired = {
        one["metric"]["alertname"] for one in site.query('count_over_time(ALERTS{alertstate="firing"}[1d])')
    }
    assert fired - PROVOKED == {"Watchdog"}


def test_everything_comes_back_after_a_reboot_and_nothing_is_lost(site: Site) -> None:
    before = site.eventually(f"max_over_time({PREDICTIONS}[1h])")
    site.reboot()
    site.play("ansible/verify.yml")
    assert site.eventually(f"max_over_time({PREDICTIONS}[1h])") >= before
    assert site.run("systemctl --failed --no-legend") == ""

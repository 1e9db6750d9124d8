"""Five machines: two APIs behind a load balancer, one that watches, one that loads.

Locust's second worker runs on the machine that watches, apart from its master.
"""

import json
import re
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from dashboards.__main__ import OUTPUT
from dashboards.queries import panel_queries
from tests.e2e.load import Load
from tests.e2e.machines import machines, new_site
from tests.e2e.releases import HEALTH, Build, publish, replace, status
from tests.e2e.site import ROOT, Site, until

BUILD = ROOT / "build" / "e2e-many"
INVENTORY = Path(__file__).parent / "many"
FIRST, SECOND, BALANCER, WATCHER, LOADER = "many-api1", "many-api2", "many-lb", "many-mon", "many-load"
APIS = {FIRST, SECOND}
OUT_SECONDS = 4
"""Two checks, a second apart, each of which may take a second: so long one that is gone may be asked."""


@pytest.fixture(scope="module")
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    site = new_site(INVENTORY, BUILD)
    with machines(request.session, site):
        yield site


def balanced(site: Site, path: str, scheme: str = "http") -> str:
    return f"{scheme}://{site.at('loadbalancer')}{path}"


def states(site: Site) -> dict[str, str]:
    """Return the state of each API for the load balancer."""
    lines = site.run("winemon-balance status", on=BALANCER).splitlines()
    return {line.split()[0]: line.split()[1] for line in lines}


def both_up(site: Site) -> None:
    until(lambda: states(site) == dict.fromkeys(APIS, "UP"), "both APIs are up for the load balancer")


def note(text: str) -> None:
    with (BUILD / "notes.log").open("a") as file:
        file.write(text + "\n")


def test_check_mode_passes_on_a_bare_load_balancer(site: Site) -> None:
    site.play("site.yml", "--check", "--limit", f"localhost,{BALANCER}")
    assert site.ssh("test -e /etc/haproxy", on=BALANCER).returncode == 1


def test_one_run_provisions_five_machines_and_a_second_changes_nothing(site: Site) -> None:
    start = time.monotonic()
    output = site.play("site.yml")
    assert "signs its own certificate" in output
    again = time.monotonic()
    assert site.changed(site.play("site.yml")) == 0
    site.play("ansible/verify.yml")
    note(f"site.yml: {again - start:.0f} s, again and verify.yml: {time.monotonic() - again:.0f} s")


@pytest.mark.parametrize(
    ("machine", "units"),
    [
        (FIRST, {"winemon-api"}),
        (SECOND, {"winemon-api"}),
        (BALANCER, {"haproxy"}),
        (LOADER, {"winemon-locust", "winemon-locust-worker@1"}),
        (WATCHER, {"prometheus", "prometheus-alertmanager", "winemon-locust-worker@1"}),
    ],
)
def test_each_machine_has_its_part_and_no_other(site: Site, machine: str, units: set[str]) -> None:
    everywhere = {"winemon-firewall", "prometheus-node-exporter", "prometheus-process-exporter"}
    patterns = "'winemon-*' 'prometheus*' 'haproxy*' 'grafana*' 'jenkins*'"
    listed = site.run(
        f"systemctl list-units --type=service --state=active --plain --no-legend {patterns}", on=machine
    )
    found = {line.split()[0].removesuffix(".service") for line in listed.splitlines()}
    assert found - {"grafana-server"} == everywhere | units
    assert site.run("systemctl --failed --no-legend", on=machine) == ""


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_clients_get_predictions_from_both_and_nothing_that_is_not_for_them(site: Site, scheme: str) -> None:
    sample = json.loads(site.run("cat /opt/winemon/current/artifacts/manifest.json"))["samples"][0]
    with httpx.Client(trust_env=False, verify=False) as client:  # noqa: S501 - self-signed, and looked at below
        for _ in range(20):
            answer = client.post(balanced(site, "/predict", scheme), json=sample["wine"])
            assert answer.json()["quality"] == pytest.approx(sample["quality"], abs=1e-9)
        for path in (
            "/metrics",
            "/docs",
            "/docs/assets/swagger-ui.css",
            "/redoc",
            "/openapi.json",
            "/%6detrics",
        ):
            assert client.get(balanced(site, path, scheme)).status_code == 404, path
        assert client.get(balanced(site, "/", scheme)).status_code == 200
    assert site.client.get(site.api("/docs")).status_code == 200, (
        "the API itself shows it to those who run it"
    )


def test_the_certificate_names_the_machine(site: Site) -> None:
    pem = ssl.get_server_certificate((site.at("loadbalancer"), 443))
    shown = subprocess.run(
        ["openssl", "x509", "-noout", "-checkip", site.at("loadbalancer")],
        input=pem,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "does match" in shown


def test_statistics_ask_for_the_generated_password(site: Site) -> None:
    url = f"http://{site.at('loadbalancer')}:8404"
    for path in ("/", "/metrics"):
        assert site.client.get(url + path).status_code == 401
        assert site.client.get(url + path, auth=("admin", "admin")).status_code == 401
        assert site.client.get(url + path, auth=site.secret("haproxy")).status_code == 200
    password = site.secret("haproxy")[1]
    for log in BUILD.glob("*.log"):
        assert password not in log.read_text()
    for machine in (BALANCER, WATCHER):
        readable = site.run("grep -rlsF --file=- /etc /run || true", password, on=machine).split()
        assert readable
        assert all(site.run(f"stat -c %A {path}", on=machine)[7:] == "---" for path in readable), readable
        assert password not in site.run("journalctl --no-pager", on=machine)


def test_the_load_balancer_is_hardened_and_no_root(site: Site) -> None:
    verdict = site.run("systemd-analyze security --no-pager haproxy.service | tail -n 1", on=BALANCER)
    assert float(verdict.split(":")[1].split()[0]) <= 2.5, verdict
    assert set(site.run("ps -C haproxy -o user=", on=BALANCER).split()) == {"haproxy"}


@pytest.fixture(scope="module")
def load(site: Site) -> Iterator[Load]:
    load = Load(site, balanced(site, ""))
    load.start()
    yield load
    load.stop()


def still_served(load: Load, before: int) -> int:
    """Return how many requests there were since, once the workers have reported; none may have failed."""
    time.sleep(4)  # Locust's workers report every three seconds
    now = load.served()
    assert now > before
    return now - before


def test_users_run_on_other_machines_than_their_master_and_both_apis_serve_them(
    site: Site, load: Load
) -> None:
    assert load.workers() == {LOADER, WATCHER}
    served = (
        'sum by (instance) (fastapi_monitoring_http_requests_total{handler="/predict", status="2xx"}) > 20'
    )
    until(lambda: {row["metric"]["instance"] for row in site.query(served)} == APIS, "both serve")


def test_a_killed_api_fails_no_request(site: Site, load: Load) -> None:
    before = load.served()
    master = site.run("systemctl show --property=MainPID --value winemon-api", on=FIRST)
    site.run(f"kill -9 {master}", on=FIRST)
    until(
        lambda: (
            site.run("systemctl show --property=MainPID --value winemon-api", on=FIRST) not in {"0", master}
        ),
        "systemd starts it again",
    )
    both_up(site)
    note(f"killed: {still_served(load, before)} requests, 0 failed")


def test_a_release_is_deployed_on_one_after_the_other_and_fails_no_request(
    site: Site, load: Load, build: Build
) -> None:
    name = publish(site, build(replace("app/main.py", HEALTH, HEALTH.replace("ok", "rolled out"))))
    before = load.served()
    since = site.run("date +%s", on=BALANCER)
    start = time.monotonic()
    site.play("ansible/deploy.yml")
    seconds = time.monotonic() - start
    for machine in APIS:
        assert status(site, on=machine)["live"] == name
        url = f"http://{site.addresses[machine]}:5000/healthcheck"
        assert site.client.get(url).json() == {"status": "rolled out"}
    log = site.run(f"journalctl --no-pager --output=cat --since=@{since} -u haproxy", on=BALANCER)
    turns = re.findall(r"^Server api/(\S+) (?:(enters drain)|is (UP))", log, re.MULTILINE)
    assert ["".join(turn) for turn in turns] == [
        f"{machine}{turn}" for machine in (FIRST, SECOND) for turn in ("enters drain", "UP")
    ]
    assert states(site) == dict.fromkeys(APIS, "UP")
    note(f"deployed on both in {seconds:.0f} s: {still_served(load, before)} requests, 0 failed")


def test_a_deployment_that_fails_leaves_nobody_out(site: Site, load: Load) -> None:
    before = load.served()
    with pytest.raises(pytest.fail.Exception, match="was never published"):
        site.play("ansible/deploy.yml", "-e", "release=v0-nobody")
    assert states(site) == dict.fromkeys(APIS, "UP")
    assert "winemon-balance" not in site.run("systemctl list-timers --no-legend", on=BALANCER)
    still_served(load, before)


def test_what_nobody_brings_back_comes_back_and_the_last_one_is_never_taken_out(
    site: Site, load: Load
) -> None:
    before = load.served()
    assert site.run(f"winemon-balance drain {FIRST} --seconds 5", on=BALANCER) == f"{FIRST} is drained"
    assert states(site) == {FIRST: "DRAIN", SECOND: "UP"}
    said = site.run(f"winemon-balance drain {SECOND}", on=BALANCER)
    assert said == f"{SECOND} is left in: no other is up"
    both_up(site)
    still_served(load, before)


def test_a_rebooting_machine_fails_no_request(site: Site, load: Load) -> None:
    before = load.served()
    site.reboot(on=SECOND)
    both_up(site)
    note(f"rebooted: {still_served(load, before)} requests, 0 failed")


def asked_again(site: Site) -> float:
    """Return how many requests were asked once more, of either API."""
    url = f"http://{site.at('loadbalancer')}:8404/metrics"
    text = site.client.get(url, auth=site.secret("haproxy")).raise_for_status().text
    return sum(
        map(
            float,
            re.findall(
                r"^haproxy_backend_(?:retry|redispatch)_warnings_total{.*} (\d+)$", text, re.MULTILINE
            ),
        )
    )


def test_a_machine_that_is_cut_off_fails_no_request_and_is_named(site: Site, load: Load) -> None:
    before, again = load.served(), asked_again(site)
    link = f"vb-{FIRST}"
    subprocess.run(["ip", "link", "set", link, "nomaster"], check=True)
    try:
        out = until(lambda: states(site)[FIRST] == "DOWN", f"{FIRST} is taken out")
        assert out < OUT_SECONDS + 2  # to ask takes its time, too
        named = f'ALERTS{{alertname="ApiDown", instance="{FIRST}"}}'
        site.eventually(named)
        site.eventually(f'ALERTS{{alertname="LoadBalancerLeavesOut", server="{FIRST}", state="DOWN"}}')
        assert {row["metric"]["instance"] for row in site.query('up{job="fastapi"} == 0')} == {FIRST}
    finally:
        subprocess.run(["ip", "link", "set", link, "master", site.bridge], check=True)
    both_up(site)
    served, again = still_served(load, before), asked_again(site) - again
    assert again > 0, "nothing was in hand or sent there meanwhile"
    note(f"cut off, taken out after {out:.1f} s: {served} requests, {again:.0f} asked again, 0 failed")


def test_another_certificate_is_served_and_fails_no_request(site: Site, load: Load) -> None:
    before = load.served()
    certificate, play = BUILD / "wine.example.pem", BUILD / "haproxy.yml"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=wine.example"]
    command += ["-keyout", str(certificate), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    play.write_text("- {hosts: loadbalancer, become: true, roles: [haproxy]}\n")
    options = ["-e", json.dumps({"haproxy_certificates": [str(certificate)]})]
    output = site.play(str(play), *options)
    assert "signs its own certificate" not in output
    assert site.changed(output) == 3  # given, the other one removed, reloaded
    assert ssl.get_server_certificate((site.at("loadbalancer"), 443)).strip() in certificate.read_text()
    files = site.run("ls /etc/haproxy/certificates; stat -c %A /etc/haproxy/certificates/*", on=BALANCER)
    assert files.split() == ["wine.example.pem", "-rw-r-----"]
    assert site.changed(site.play(str(play), *options)) == 0
    note(f"reloaded: {still_served(load, before)} requests, 0 failed")


def test_dashboards_add_up_both_machines(site: Site, load: Load) -> None:  # noqa: ARG001 - while it runs
    def at(moment: float, expression: str) -> dict[str, float]:
        answer = site.client.get(
            f"http://{site.at('monitoring')}:9090/api/v1/query",
            params={"query": expression, "time": moment},
            auth=site.secret("prometheus"),
        ).raise_for_status()
        result: list[dict[str, Any]] = answer.json()["data"]["result"]
        return {json.dumps(row["metric"], sort_keys=True): float(row["value"][1]) for row in result}

    until(
        lambda: len(at(time.time(), "rate(fastapi_monitoring_regression_model_output_count[1m]) > 0")) == 2,
        "both have a rate",
    )
    now = time.time()
    queries = panel_queries(json.loads((OUTPUT / "winemon-model.json").read_text()))
    summed = [query for query in queries if query.expr.startswith("sum by") and "/" not in query.expr]
    assert len(summed) >= 4
    for query in summed:
        everywhere, *each = (
            at(now, query.expr.replace('instance=~".+"', f'instance=~"{names}"'))
            for names in (".+", FIRST, SECOND)
        )
        assert everywhere, query
        for key, value in everywhere.items():
            assert value == pytest.approx(sum(own.get(key, 0) for own in each)), query
    by_machine = 'sum by (instance) (fastapi_inprogress{instance=~".+"})'
    assert {json.loads(key)["instance"] for key in at(now, by_machine)} == APIS


def test_the_load_was_a_load(load: Load) -> None:
    served = load.served()
    assert served > 2000
    note(f"{served} requests in all, 0 failed")

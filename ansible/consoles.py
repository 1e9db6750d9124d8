"""Where people look: the consoles of the inventory's machines.

python ansible/consoles.py urls      one tab-separated line each: name, URL, user, password file
python ansible/consoles.py table     the same for people, with what each console answers
                                     (--left-out FILE: without what ansible/preflight.yml noted there)
"""

import argparse
import base64
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Console:
    """One page for people: its group in the inventory, port, what to open and what to ask for its health."""

    name: str
    group: str
    port: int
    port_variable: str
    page: str
    health: str
    secret: str | None = None
    first_only: bool = False


CONSOLES = (
    Console("API", "api", 5000, "winemon_api_port", "/docs", "/ready"),
    Console("API, balanced", "loadbalancer", 80, "haproxy_http_port", "/", "/ready"),
    Console("HAProxy", "loadbalancer", 8404, "haproxy_stats_port", "/", "/metrics", "haproxy"),
    Console(
        "Grafana",
        "monitoring",
        3000,
        "grafana_port",
        "/",
        "/api/datasources/uid/winemon-prometheus/health",
        "grafana",
    ),
    # Debian's Prometheus has the classic interface only.
    Console(
        "Prometheus", "monitoring", 9090, "prometheus_port", "/classic/targets", "/-/ready", "prometheus"
    ),
    # Debian's Alertmanager has no pages, but an API that amtool and Prometheus talk to.
    Console(
        "Alertmanager", "monitoring", 9093, "alertmanager_port", "/api/v2/alerts", "/-/ready", "alertmanager"
    ),
    Console("Locust", "loadtest", 8089, "locust_port", "/", "/metrics", "locust", first_only=True),
    Console("Jenkins", "jenkins", 8080, "jenkins_port", "/", "/job/winemon/api/json", "jenkins"),
)


# What roles see of a machine: only Ansible resolves templates, group variables and vaults.
VARIABLES = """
{%- set machines = {} -%}
{%- for host in groups['all'] -%}
{%-   set own = hostvars[host] -%}
{%-   set known = {'address': own.winemon_address | default(own.ansible_host, true) | default(host, true),
                   'secrets': own.winemon_secrets_dir | default(own.inventory_dir ~ '/.secrets')} -%}
{%-   for name in console_variables if own[name] is defined -%}
{%-     set _ = known.update({name: own[name]}) -%}
{%-   endfor -%}
{%-   set _ = machines.update({host: known}) -%}
{%- endfor -%}
{{ {'groups': groups, 'machines': machines} }}
"""


def inventory() -> tuple[dict[str, list[str]], dict[str, dict[str, Any]]]:
    """Return the hosts of each group, and of each host its address, directory of secrets, ports and users."""
    names = [console.port_variable for console in CONSOLES]
    names += [f"{console.secret}_username" for console in CONSOLES if console.secret]
    source = os.environ.get("ANSIBLE_INVENTORY", ROOT / "inventory" / "current")
    command: list[str | Path] = [Path(sys.executable).with_name("ansible"), "localhost", "-i", source]
    command += ["-m", "ansible.builtin.debug", "-a", json.dumps({"msg": VARIABLES.strip()})]
    command += ["-e", json.dumps({"console_variables": names})]
    environment = {**os.environ, "ANSIBLE_CALLBACK_RESULT_FORMAT": "json"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)  # noqa: S603 - our own tool
    if result.returncode:
        sys.exit(result.stdout + result.stderr)
    answer = json.loads(result.stdout.partition("=>")[2])["msg"]
    return answer["groups"], answer["machines"]


def consoles() -> list[tuple[Console, str, str, str, Path | None]]:
    """Return each console with its machine, its URL without a path, its user and its password file."""
    groups, machines = inventory()
    found = []
    for console in CONSOLES:
        for host in groups.get(console.group, [])[: 1 if console.first_only else None]:
            own = machines[host]
            port = own.get(console.port_variable, console.port)
            user = own.get(f"{console.secret}_username", "admin") if console.secret else ""
            password = Path(own["secrets"], console.secret).expanduser() if console.secret else None
            found.append((console, host, f"http://{own['address']}:{port}", user, password))
    return found


def state(url: str, user: str, password: Path | None) -> str:
    """Say what a console answers to its health check."""
    request = urllib.request.Request(url)  # noqa: S310 - http from the inventory
    if password and password.exists():
        token = base64.b64encode(f"{user}:{password.read_text(encoding='utf-8').strip()}".encode())
        request.add_header("Authorization", f"Basic {token.decode()}")
    try:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=5):
            return "ok"
    except urllib.error.HTTPError as error:
        return f"answers {error.code}"
    except OSError as error:
        return f"unreachable ({error})"


def main() -> int:
    """Print the consoles as the command line asks."""
    parser = argparse.ArgumentParser(
        description="Where people look: the consoles of the inventory's machines."
    )
    parser.add_argument("form", choices=["urls", "table"])
    parser.add_argument("--left-out", type=Path)
    arguments = parser.parse_args()
    form, notes = arguments.form, arguments.left_out
    lines = notes.read_text(encoding="utf-8").splitlines() if notes and notes.exists() else []
    left_out = {tuple(line.split("\t")[:2]) for line in lines}
    rows = []
    for console, host, url, user, password in consoles():
        row = [console.name, url + console.page, user, os.path.relpath(password) if password else ""]
        if form == "table" and (console.name, host) in left_out:
            row[1:] = ["", "", "", "left out, see below"]
        elif form == "table":
            row.append(state(url + console.health, user, password))
        rows.append(row)
    if form == "urls":
        print("\n".join("\t".join(row) for row in rows))  # noqa: T201 - the command's answer
        return 0
    rows.insert(0, ["component", "URL", "user", "password in", "state"])
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())

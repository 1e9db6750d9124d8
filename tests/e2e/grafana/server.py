#!/usr/bin/python3
"""A stand-in for Grafana where its repository cannot be reached: what the role touches of it, and no more.

grafana server --config FILE ...                                          serve, provisioned as FILE says
grafana cli --config FILE ... admin reset-admin-password --password-from-stdin

It keeps to Grafana's rules where the role depends on them: the configured password counts at the first start
only, `$` expands in provisioned values, data source uids are checked, wrong passwords lock a user out,
dashboards are read while it runs.
"""

import base64
import configparser
import hashlib
import hmac
import json
import os
import re
import secrets
import sqlite3
import sys
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

VERSION_FILE = Path(__file__).resolve().parents[1] / "VERSION"


def expand(value: str) -> str:
    """Return a value with `$__file{path}`, `$__env{NAME}` and `${NAME}` replaced."""
    value = re.sub(r"\$(?:__env)?\{([^}]+)\}", lambda match: os.environ.get(match[1], ""), value)
    return re.sub(r"\$__file\{([^}]+)\}", lambda match: Path(match[1]).read_text().strip(), value)


def interpolate(value: Any) -> Any:
    """Return a provisioned value as Grafana reads it: expanded, then as a shell would; `$$` is a dollar."""
    if isinstance(value, dict):
        return {key: interpolate(each) for key, each in value.items()}
    if not isinstance(value, str):
        return value
    parts = [
        re.sub(r"\$(\w+)", lambda match: os.environ.get(match[1], ""), expand(part))
        for part in value.split("$$")
    ]
    return "$".join(parts)


class Grafana:
    """Settings, the administrator, data sources and dashboards."""

    def __init__(self, config: Path) -> None:
        self.ini = configparser.ConfigParser(interpolation=None, delimiters=("=",))
        self.ini.read_string(config.read_text())
        for section in self.ini.values():
            for key, value in section.items():
                section[key] = expand(value)
        self.database = sqlite3.connect(
            Path(self.ini["paths"]["data"]) / "grafana.db", check_same_thread=False, isolation_level=None
        )
        self.database.execute(
            "CREATE TABLE IF NOT EXISTS user (login TEXT PRIMARY KEY, salt TEXT, password TEXT)"
        )
        self.failures: dict[str, list[float]] = {}

    def provisioned(self, kind: str) -> list[dict[str, Any]]:
        """Return the documents of a directory of provisioning."""
        paths = sorted((Path(self.ini["paths"]["provisioning"]) / kind).glob("*.y*ml"))
        return [document for path in paths if (document := yaml.safe_load(path.read_text()))]

    def first_start(self) -> None:
        """Create the administrator, unless there is one."""
        if not self.database.execute("SELECT 1 FROM user").fetchone():
            self.database.execute("INSERT INTO user VALUES (?, '', '')", [self.ini["security"]["admin_user"]])
            self.set_password(self.ini["security"]["admin_password"])

    def set_password(self, password: str) -> None:
        """Give the administrator a password."""
        salt = secrets.token_hex(8)
        self.database.execute("UPDATE user SET salt = ?, password = ?", [salt, self.hash(password, salt)])

    @staticmethod
    def hash(password: str, salt: str) -> str:
        """Return what is kept of a password."""
        return hashlib.pbkdf2_hmac("sha256", password.encode(), salt.encode(), 10_000).hex()

    def knows(self, login: str, password: str) -> bool:
        """Return whether someone may log in; five wrong passwords lock a user out for five minutes."""
        recent = [at for at in self.failures.get(login, []) if at > time.monotonic() - 300]
        row = self.database.execute("SELECT salt, password FROM user WHERE login = ?", [login]).fetchone()
        if len(recent) < 5 and row and hmac.compare_digest(row[1], self.hash(password, row[0])):
            return True
        self.failures[login] = [*recent, time.monotonic()]
        return False

    def data_sources(self) -> dict[str, dict[str, Any]]:
        """Return the data sources by uid."""
        found = [
            interpolate(each)
            for document in self.provisioned("datasources")
            for each in document["datasources"]
        ]
        for each in found:
            if not re.fullmatch(r"[A-Za-z0-9_-]{1,40}", each["uid"]):
                raise ValueError(f"data source {each['name']}: invalid uid {each['uid']}")
        return {each["uid"]: each for each in found}

    def dashboards(self) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
        """Return dashboards and their providers by uid."""
        found: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
        for provider in (
            each for document in self.provisioned("dashboards") for each in document["providers"]
        ):
            for path in sorted(Path(provider["options"]["path"]).glob("**/*.json")):
                dashboard = json.loads(path.read_text())
                if not dashboard.get("uid") or not dashboard.get("title"):
                    print(f"{path} is no dashboard", file=sys.stderr)  # noqa: T201 - the journal
                    continue
                found[dashboard["uid"]] = dashboard, provider
        return found


class Handler(BaseHTTPRequestHandler):
    """The HTTP API, as far as the role and its tests use it."""

    grafana: Grafana
    protocol_version = "HTTP/1.1"

    def answer(self, status: int, body: Any) -> None:
        """Send a status and a body as JSON."""
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def user(self) -> str | None:
        """Return who asks, by basic authentication."""
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        login, _, password = (
            base64.b64decode(token).decode().partition(":") if scheme == "Basic" else ("", "", "")
        )
        return login if login and self.grafana.knows(login, password) else None

    def do_POST(self) -> None:
        """Log in by the form."""
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
        if self.path != "/login":
            self.answer(404, {"message": "Not found"})
        elif self.grafana.knows(body.get("user", ""), body.get("password", "")):
            self.answer(200, {"message": "Logged in"})
        else:
            self.answer(401, {"message": "Invalid username or password"})

    def do_GET(self) -> None:
        """Answer a question."""
        address = urlsplit(self.path)
        if address.path == "/api/health":
            self.answer(200, {"database": "ok", "version": VERSION_FILE.read_text().strip()})
            return
        user = self.user()
        anonymous = (
            self.grafana.ini.getboolean("auth.anonymous", "enabled") and "Authorization" not in self.headers
        )
        looks = address.path.startswith(("/api/search", "/api/dashboards/"))
        if not user and not (anonymous and looks):
            self.answer(401, {"message": "Unauthorized"})
        else:
            self.answer(*self.resource(address.path, parse_qs(address.query), user))

    def resource(self, path: str, query: dict[str, list[str]], user: str | None) -> tuple[int, Any]:
        """Return status and body of a path of the API."""
        public = ("uid", "name", "type", "url", "isDefault", "basicAuth", "basicAuthUser", "jsonData")
        parts = path.strip("/").split("/")[1:]
        match parts:
            case ["user"]:
                return 200, {"login": user, "isGrafanaAdmin": True}
            case ["datasources"]:
                return 200, [
                    {key: each.get(key) for key in public} | {"readOnly": not each.get("editable", False)}
                    for each in self.grafana.data_sources().values()
                ]
            case ["datasources", "uid", uid, "health"] if source := self.grafana.data_sources().get(uid):
                return self.health(source)
            case ["search"]:
                return 200, [
                    {
                        "uid": uid,
                        "title": dashboard["title"],
                        "folderTitle": provider["folder"],
                        "type": "dash-db",
                    }
                    for uid, (dashboard, provider) in self.grafana.dashboards().items()
                    if query.get("type", ["dash-db"]) == ["dash-db"]
                ]
            case ["dashboards", "uid", uid] if uid in (dashboards := self.grafana.dashboards()):
                dashboard, provider = dashboards[uid]
                meta = {"provisioned": not provider.get("allowUiUpdates"), "folderTitle": provider["folder"]}
                return 200, {"dashboard": dashboard, "meta": meta}
        return 404, {"message": "Not found"}

    def health(self, source: dict[str, Any]) -> tuple[int, Any]:
        """Ask the data source itself, with its password."""
        path = {"prometheus": "/api/v1/query?query=vector(1)", "alertmanager": "/api/v2/status"}[
            source["type"]
        ]
        login = f"{source['basicAuthUser']}:{source['secureJsonData']['basicAuthPassword']}"
        request = urllib.request.Request(source["url"] + path)  # noqa: S310 - http from the configuration
        request.add_header("Authorization", "Basic " + base64.b64encode(login.encode()).decode())
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=5):
                return 200, {"status": "OK"}
        except urllib.error.URLError as error:
            return 400, {"status": "ERROR", "message": str(error)}

    def log_message(self, *_: Any) -> None:
        """Stay silent, as Grafana does about requests."""


def main(arguments: list[str]) -> int:
    """Serve, or set the administrator's password."""
    verb, *rest = arguments
    options = [part for argument in rest for part in argument.split("=", 1)]
    grafana = Grafana(Path(options[options.index("--config") + 1]))
    if verb == "cli":
        if rest[-3:] != ["admin", "reset-admin-password", "--password-from-stdin"]:
            sys.exit(f"unknown command: {rest}")
        grafana.set_password(sys.stdin.readline().rstrip("\n"))
        return 0
    grafana.first_start()
    grafana.data_sources()
    Handler.grafana = grafana
    server = grafana.ini["server"]
    ThreadingHTTPServer((server["http_addr"], int(server["http_port"])), Handler).serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What the role Jenkins gives to Jenkins: its configuration's shape, plugins, and the keys it trusts."""

import datetime
import hashlib
import http.server
import os
import re
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator

ROLE = Path(__file__).parents[3] / "roles" / "jenkins"
SHAPE = yaml.safe_load((ROLE / "files" / "configuration.yml").read_text())
VARIABLES = yaml.safe_load((ROLE / "vars" / "main.yml").read_text())


def configuration() -> dict[str, Any]:
    """Return the configuration of the role, with templates as the texts they are."""
    found: dict[str, Any] = yaml.safe_load((ROLE / "vars" / "main.yml").read_text())["_jenkins_configuration"]
    found["jenkins"]["globalNodeProperties"][0]["envVars"]["env"] = [{"key": "INVENTORY", "value": "file"}]
    return found


def complaints(document: dict[str, Any]) -> str:
    """Return what is wrong with the shape of a configuration."""
    return " ".join(ArgumentSpecValidator(SHAPE).validate(document).error_messages)


def test_the_configuration_has_its_shape() -> None:
    assert complaints(configuration()) == ""


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("jenkin", {}, "jenkin"),
        ("jenkins.numExecutor", 2, "numExecutor"),
        ("jenkins.numExecutors", "two", "int"),
        ("jenkins.securityRealm.local.allowsSignup", True, "one of: False"),
        ("jenkins.authorizationStrategy.unsecured", {}, "unsecured"),
        ("jenkins.authorizationStrategy.globalMatrix.entries", [{"user": {"name": "a"}}], "permissions"),
        ("jenkins.crumbIssuer.standard.excludeClientIPFromCrumb", True, "crumbIssuer"),
        ("unclassified.prometheusConfiguration.useAuthenticatedEndpoint", False, "one of: True"),
        ("unclassified.prometheusConfiguration.defaultNamespace", "jenkins", "one of: default"),
        (
            "security.gitHostKeyVerificationConfiguration.sshHostKeyVerificationStrategy",
            "no",
            "one of: known",
        ),
        ("jobs", [{"script": "queue('x')"}], "script"),
    ],
)
def test_a_mistake_in_the_configuration_is_found(path: str, value: object, said: str) -> None:
    document = configuration()
    *parents, last = path.split(".")
    part = document
    for name in parents:
        part = part.setdefault(name, {})
    part[last] = value
    assert said in complaints(document)


def test_every_plugin_has_one_version_of_its_own() -> None:
    lines = (ROLE / "files" / "plugins.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z-]+:[0-9][\w.-]*", pin) for pin in pins)
    names = [pin.split(":")[0] for pin in pins]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("file", "fingerprint", "expires"),
    [
        ("jenkins.asc", VARIABLES["_jenkins_key_fingerprint"], VARIABLES["_jenkins_key_expires"]),
        ("temurin.asc", VARIABLES["_jenkins_java_key_fingerprint"], None),
    ],
)
def test_the_keys_of_the_repositories_are_those_that_the_role_names(
    file: str, fingerprint: str, expires: str | None, tmp_path: Path
) -> None:
    command = ["gpg", "--homedir", tmp_path, "--show-keys", "--with-colons", ROLE / "files" / file]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    records = [line.split(":") for line in output.splitlines()]
    primaries = [record for record in records if record[0] == "pub"]
    assert len(primaries) == 1
    assert next(record[9] for record in records if record[0] == "fpr") == fingerprint
    if expires is None:
        assert primaries[0][6] == ""
        return
    ends = datetime.datetime.fromtimestamp(int(primaries[0][6]), tz=datetime.UTC).date()
    assert ends.isoformat() == expires
    assert ends > datetime.datetime.now(tz=datetime.UTC).date() + datetime.timedelta(days=60)


class Downloads(http.server.BaseHTTPRequestHandler):
    """The plugin manager and its checksum, which can be that of something else."""

    manager = b"a jar"
    checksum = hashlib.sha256(manager).hexdigest()

    def do_GET(self) -> None:
        """Send one of them."""
        body = f"{self.checksum}  manager.jar\n".encode() if self.path.endswith(".sha256") else self.manager
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Stay silent."""


@pytest.fixture
def mirror() -> Iterator[str]:
    """Serve the plugin manager, and yield its URL."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Downloads)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/manager.jar"
    server.shutdown()
    server.server_close()


def fetch(mirror: str, directory: Path) -> "subprocess.CompletedProcess[str]":
    """Fetch plugins with a Java that notes what it is asked, and lays down one plugin."""
    java = directory / "java"
    java.write_text(
        '#!/bin/sh\nset -e\nenv >"${0%/*}/environment"; pwd >"${0%/*}/place"\n'
        'cmp -s "$2" - <<X && exit 9\nX\nprintf "%s\\n" "$@" >>"${0%/*}/asked"\n'
        'while [ "$1" != --plugin-download-directory ]; do shift; done\necho plugin >"$2/git.jpi"\n'
    )
    java.chmod(0o755)
    environment = {
        **os.environ,
        "JENKINS_JAVA_CMD": str(java),
        "JENKINS_PLUGIN_MANAGER": mirror,
        "no_proxy": "*",
        "PYTHONPATH": str(directory),
        "JAVA_TOOL_OPTIONS": "-XshowSettings",
    }
    (directory / "subprocess.py").write_text("raise SystemExit('what the caller has there is run')")
    (directory / "plugins.txt").write_text("git:5.10.1\n")
    command = [ROLE / "files/fetch-plugins", "2.580.2", "plugins.txt", "plugins"]
    return subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, check=False
    )


def test_plugins_are_fetched_in_their_own_versions_and_written_down(mirror: str, tmp_path: Path) -> None:
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "old.jpi").touch()
    result = fetch(mirror, tmp_path)
    assert result.returncode == 0, result.stderr
    asked = (tmp_path / "asked").read_text().split("\n")
    assert asked[0] == "-jar"
    assert asked[2:-1] == [
        *("--jenkins-version", "2.580.2", "--plugin-file", str(tmp_path / "plugins.txt"), "--latest=false"),
        *("--plugin-download-directory", str(tmp_path / "plugins")),
    ]
    assert {path.name for path in (tmp_path / "plugins").iterdir()} == {
        "git.jpi",
        "plugins.txt",
        "SHA256SUMS",
    }
    check = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    subprocess.run(check, cwd=tmp_path / "plugins", check=True, capture_output=True)


def test_java_gets_nothing_of_who_calls_but_proxies(mirror: str, tmp_path: Path) -> None:
    result = fetch(mirror, tmp_path)
    assert result.returncode == 0, result.stderr
    names = {line.split("=")[0] for line in (tmp_path / "environment").read_text().splitlines()}
    proxies = {"http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"}
    assert names - proxies - {"PWD", "OLDPWD", "SHLVL", "_"} == {"PATH", "LC_ALL"}  # the shell's own
    assert "no_proxy" in names
    assert (tmp_path / "place").read_text() == "/\n"


def test_a_plugin_manager_that_is_not_what_its_checksum_says_is_never_run(
    mirror: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Downloads, "checksum", "0" * 64)
    result = fetch(mirror, tmp_path)
    assert result.returncode == 1
    assert "is not what the checksum beside it says" in result.stderr
    assert not (tmp_path / "asked").exists()

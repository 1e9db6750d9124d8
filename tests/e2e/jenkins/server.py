#!/usr/bin/python3
"""A stand-in for Jenkins where its repository cannot be reached: what the role touches of it, and no more.

It keeps to Jenkins' rules where the role depends on them: it needs Java 21 or 25, stops at a key of its
configuration that no plugin explains, resolves secrets from files, loads its job from Job DSL, asks for
crumbs, refuses who has no permission, starts no build once it quiets down, and polls git over SSH as its
own user, with its own key and the hosts it knows. Its builds only check out what they would have built.

It cannot show that Jenkins itself accepts all this; docs/jenkins.md lists what remains to be seen.
"""

import base64
import hmac
import json
import os
import re
import secrets
import shlex
import socket
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

HOME = Path(os.environ["JENKINS_HOME"])
VERSION = Path("/usr/share/java/jenkins.war").read_text().strip()
OPTIONS = shlex.split(os.environ.get("JAVA_OPTS", ""))
# The plugin that explains a key of the configuration.
KEYS = {
    "globalMatrix": "matrix-auth",
    "globalJobDslSecurityConfiguration": "job-dsl",
    "jobs": "job-dsl",
    "gitHostKeyVerificationConfiguration": "git-client",
    "prometheusConfiguration": "prometheus",
}
ROOTS = {"jenkins", "security", "unclassified", "tool", "credentials", "jobs", "configuration-as-code"}
# A word of the job, and the plugin that brings it.
WORDS = {"pipelineJob": "workflow-job", "cpsScm": "workflow-cps", "git": "git", "pollSCM": "workflow-job"}


def say(text: str) -> None:
    """Write to the journal."""
    sys.stderr.write(f"{text}\n")


class StartError(Exception):
    """Why Jenkins would not start."""


def plugins() -> dict[str, str]:
    """Return name and version of what is in the directory of plugins."""
    found = {}
    for path in HOME.glob("plugins/*.jpi"):
        with zipfile.ZipFile(path) as archive:
            manifest = dict(
                line.split(": ", 1)
                for line in archive.read("META-INF/MANIFEST.MF").decode().splitlines()
                if line
            )
        found[manifest["Short-Name"]] = manifest["Plugin-Version"]
    return found


def check_java() -> None:
    """Require a Java that Jenkins takes and that works with the configured options, inside this sandbox."""
    java = [os.environ.get("JENKINS_JAVA_CMD", "java"), *OPTIONS]
    asked = subprocess.run([*java, "-version"], capture_output=True, text=True, check=False)
    version = re.search(r'version "(\d+)', asked.stderr)
    if asked.returncode or not version or version[1] not in {"21", "25"}:
        raise StartError(f"Java 21 or 25 is needed; {java} says: {asked.stdout}{asked.stderr}")
    probe = subprocess.run([*java, "/usr/share/java/Probe.java"], capture_output=True, text=True, check=False)
    if probe.stdout != "ok\n":
        raise StartError(f"Java does not work here: {probe.stdout}{probe.stderr}")
    for path in HOME.glob("probe*"):
        path.unlink()


def resolve(value: Any) -> Any:
    """Return a value of the configuration with its secrets."""
    if isinstance(value, dict):
        return {key: resolve(each) for key, each in value.items()}
    if isinstance(value, list):
        return [resolve(each) for each in value]
    if not isinstance(value, str):
        return value

    def secret(match: "re.Match[str]") -> str:
        path = Path(os.environ.get("SECRETS", "/run/secrets")) / match[1]
        if path.is_file():
            return path.read_text().strip()
        if os.environ.get("CASC_STRICT_SECRET_RESOLUTION") == "true":
            raise StartError(f"no secret {match[1]}")
        return os.environ.get(match[1], "")

    return re.sub(r"(?<!\^)\$\{([A-Za-z0-9_.-]+)\}", secret, value)


def keys(value: Any) -> set[str]:
    """Return every key of a document."""
    if isinstance(value, dict):
        return set(value) | {key for each in value.values() for key in keys(each)}
    return {key for each in value for key in keys(each)} if isinstance(value, list) else set()


def quoted(text: str, before: str) -> str:
    """Return the string that follows in a Groovy text."""
    found = re.search(re.escape(before) + r"'((?:[^'\\]|\\.)*)'", text)
    if not found:
        raise StartError(f"the job says nothing after {before}")
    return re.sub(r"\\(.)", r"\1", found[1])


class Jenkins:
    """Users, permissions, the job and its builds."""

    def __init__(self) -> None:
        check_java()
        installed = plugins()
        if "configuration-as-code" not in installed or "CASC_JENKINS_CONFIG" not in os.environ:
            raise StartError("without configuration as code it would ask a stranger to set it up")
        if "-Djenkins.install.runSetupWizard=false" not in OPTIONS:
            raise StartError("it would start the wizard")
        raw = yaml.safe_load(Path(os.environ["CASC_JENKINS_CONFIG"]).read_text())
        if unknown := set(raw) - ROOTS:
            raise StartError(f"no configurator for {unknown}")
        if lacking := {key: KEYS[key] for key in keys(raw) & set(KEYS) if KEYS[key] not in installed}:
            raise StartError(f"attributes that no plugin explains: {lacking}")
        config = resolve(raw)
        self.executors = int(config["jenkins"]["numExecutors"])
        realm = config["jenkins"]["securityRealm"]["local"]
        self.passwords = {user["id"]: user["password"] for user in realm["users"]}
        self.permissions = {
            entry["user"]["name"]: entry["user"]["permissions"]
            for entry in config["jenkins"]["authorizationStrategy"]["globalMatrix"]["entries"]
        }
        self.prometheus = config["unclassified"]["prometheusConfiguration"]
        self.sessions: dict[str, str] = {}
        self.quiet = False
        self.builds: list[str] = []
        for entry in config["jobs"]:
            self.load(Path(entry["file"]).read_text(), installed)

    def load(self, text: str, installed: dict[str, str]) -> None:
        """Load the job, with which polling begins."""
        if lacking := {word for word, plugin in WORDS.items() if word in text and plugin not in installed}:
            raise StartError(f"Job DSL does not know {lacking}")
        self.job = quoted(text, "pipelineJob(")
        self.url = quoted(text, "remote { url(")
        self.branch = quoted(text, "branch(")
        if quoted(text, "scmpoll_spec(") != "* * * * *":
            raise StartError("the stand-in polls each minute only")
        self.data = quoted(text, "stringParam('DATA', ")
        threading.Thread(target=self.poll, daemon=True).start()

    def git(self, *arguments: str) -> str:
        """Run git as Jenkins' plugin does: no questions, and only hosts that are known."""
        if not self.url.startswith("ssh://"):
            raise StartError(f"the git plugin refuses {self.url}")
        environment = {
            **os.environ,
            "GIT_TERMINAL_PROMPT": "0",
            "GIT_SSH_COMMAND": f"ssh -o BatchMode=yes -o StrictHostKeyChecking=yes"
            f" -o UserKnownHostsFile={HOME}/.ssh/known_hosts",
        }
        return subprocess.run(
            ["git", *arguments], env=environment, capture_output=True, text=True, check=True
        ).stdout

    def poll(self) -> None:
        """Build at once, then whenever the branch moved in the last minute."""
        workspace = HOME / "workspace" / self.job
        while True:
            try:
                head = self.git("ls-remote", "--exit-code", self.url, f"refs/heads/{self.branch}").split()[0]
                if not self.quiet and head != (self.builds or [""])[-1]:
                    if not (workspace / ".git").exists():
                        self.git("clone", "--quiet", "--branch", self.branch, self.url, str(workspace))
                    self.git("-C", str(workspace), "fetch", "--quiet", "origin", self.branch)
                    self.git("-C", str(workspace), "checkout", "--quiet", "--force", head)
                    if not (workspace / "Jenkinsfile").is_file():
                        raise StartError("the repository has no Jenkinsfile")
                    self.builds.append(head)
                    say(f"build {len(self.builds)} of {self.job}: {head}")
            except (StartError, subprocess.CalledProcessError) as error:
                say(f"polling: {error} {getattr(error, 'stderr', '')}")
            time.sleep(60 - time.time() % 60)

    def may(self, user: str | None, permission: str) -> bool:
        """Return whether somebody, or nobody, has a permission."""
        has = self.permissions.get(user or "anonymous", [])
        return permission in has or "Overall/Administer" in has

    @property
    def busy(self) -> int:
        """The number of builds that run: tests say so with a file."""
        return int((HOME / "busy").exists())

    def metrics(self) -> str:
        """Return the exposition of the plugins prometheus and metrics, under the names that they document."""
        label = f'{{jenkins_job="{self.job}",repo="NA",buildable="true",}}'
        samples: dict[str, float | str] = {
            f'default_jenkins_version_info{{version="{VERSION}",}}': 1.0,
            "default_jenkins_up": 1.0,
            "jenkins_executor_count_value": float(self.executors),
            "jenkins_executor_in_use_value": float(self.busy),
            "jenkins_queue_stuck_value": 0.0,
            "jenkins_health_check_score": 1.0,
            "vm_uptime_milliseconds": time.monotonic() * 1000,
        }
        if self.builds:
            samples |= {
                f"default_jenkins_builds_last_build_result_ordinal{label}": 0.0,
                f"default_jenkins_builds_success_build_count_total{label}": float(len(self.builds)),
            }
        return "".join(f"{name} {value}\n" for name, value in samples.items())


class Handler(BaseHTTPRequestHandler):
    """The pages that the role, Prometheus and the tests ask for."""

    jenkins: Jenkins
    protocol_version = "HTTP/1.1"

    def answer(self, status: int, body: str, kind: str = "text/html", **headers: str) -> None:
        """Send a page."""
        content = body.encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "X-Jenkins": VERSION, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def user(self) -> str | None:
        """Return who asks; None for nobody. A wrong password raises PermissionError."""
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        if scheme != "Basic":
            return None
        name, _, password = base64.b64decode(token).decode().partition(":")
        if not hmac.compare_digest(self.jenkins.passwords.get(name, secrets.token_hex()), password):
            raise PermissionError
        return name

    def session(self) -> str:
        """Return the session's cookie, or nothing."""
        found = re.search(r"JSESSIONID=(\w+)", self.headers.get("Cookie", ""))
        return found[1] if found else ""

    def do_GET(self) -> None:
        """Show a page."""
        jenkins, path = self.jenkins, self.path.partition("?")[0]
        try:
            user = self.user()
        except PermissionError:
            self.answer(401, "Invalid password/token")
            return
        metrics = "/" + jenkins.prometheus["path"]
        if path == "/login":
            self.answer(200, "Sign in to Jenkins")
        elif path == metrics:
            self.answer(302, "", Location=metrics + "/")
        elif path == metrics + "/":
            if jenkins.prometheus["useAuthenticatedEndpoint"] and not jenkins.may(user, "Metrics/View"):
                self.answer(403, "Forbidden")
            else:
                self.answer(200, jenkins.metrics(), "text/plain; version=0.0.4; charset=utf-8")
        elif not jenkins.may(user, "Overall/Read"):
            self.answer(403, "Authentication required")
        else:
            self.resource(path)

    def resource(self, path: str) -> None:
        """Answer somebody who may read."""
        jenkins, job = self.jenkins, f"/job/{self.jenkins.job}"
        headers = {}
        answers: dict[str, Any] = {
            "/api/json": {
                "numExecutors": jenkins.executors,
                "quietingDown": jenkins.quiet,
                "jobs": [{"name": jenkins.job}],
            },
            "/computer/api/json": {"busyExecutors": jenkins.busy, "totalExecutors": jenkins.executors},
            "/pluginManager/api/json": {
                "plugins": [{"shortName": name, "version": version} for name, version in plugins().items()]
            },
            f"{job}/api/json": {
                "builds": [{"number": n + 1, "commit": c} for n, c in enumerate(jenkins.builds)]
            },
        }
        if path == "/crumbIssuer/api/json":
            session, crumb = secrets.token_hex(), secrets.token_hex()
            jenkins.sessions[session] = crumb
            headers["Set_Cookie"] = f"JSESSIONID={session}; Path=/; HttpOnly"
            answers[path] = {"crumbRequestField": "Jenkins-Crumb", "crumb": crumb}
        if path in answers:
            self.answer(200, json.dumps(answers[path]), "application/json", **headers)
        else:
            self.answer(404, "Not Found")

    def do_POST(self) -> None:
        """Do something, for who may and has a crumb of this session."""
        try:
            user = self.user()
        except PermissionError:
            self.answer(401, "Invalid password/token")
            return
        crumb = self.jenkins.sessions.get(self.session(), secrets.token_hex())
        if not hmac.compare_digest(crumb, self.headers.get("Jenkins-Crumb", "")):
            self.answer(403, "No valid crumb was included in the request")
        elif not self.jenkins.may(user, "Overall/Administer"):
            self.answer(403, "Forbidden")
        elif self.path in {"/quietDown", "/cancelQuietDown"}:
            self.jenkins.quiet = self.path == "/quietDown"
            say(self.path)
            self.answer(302, "", Location="/")
        else:
            self.answer(404, "Not Found")

    def log_message(self, *_: Any) -> None:
        """Stay silent."""


def notify(state: str) -> None:
    """Tell systemd."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.sendto(state.encode(), os.environ["NOTIFY_SOCKET"].replace("@", "\0", 1))


def main() -> None:
    """Start as Jenkins does, or say why not and leave."""
    try:
        Handler.jenkins = Jenkins()
    except (StartError, OSError, KeyError, TypeError, yaml.YAMLError) as error:
        sys.exit(f"Jenkins would not start: {error!r}")
    address = os.environ["JENKINS_LISTEN_ADDRESS"], int(os.environ["JENKINS_PORT"])
    server = ThreadingHTTPServer(address, Handler)
    notify("READY=1")
    server.serve_forever()


if __name__ == "__main__":
    main()

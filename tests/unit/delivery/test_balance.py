"""`winemon-balance` against a socket that answers as HAProxy's does."""

import os
import socketserver
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from delivery import balance
from delivery.balance import Balancer, Timer, main


class Clock(Timer):
    """A timer that only notes what it was told."""

    def __init__(self) -> None:
        self.set: dict[str, int] = {}

    def start(self, name: str, seconds: int) -> None:
        """Note it."""
        self.set[name] = seconds

    def stop(self, name: str) -> None:
        """Forget it."""
        self.set.pop(name, None)


class HAProxy(socketserver.ThreadingUnixStreamServer):
    """APIs with their states and the requests that they have in hand, which end one at each question."""

    def __init__(self, path: Path, servers: dict[str, str]) -> None:
        super().__init__(str(path), Answer)
        self.servers = servers
        self.in_hand = dict.fromkeys(servers, 0)
        self.asked: list[str] = []
        self.comes_up = True

    def answer(self, command: str) -> str:
        """Do what a command says."""
        self.asked.append(command)
        if command == "show stat api 4 -1":
            rows = [f"api,{name},{state},{self.in_hand[name]}," for name, state in self.servers.items()]
            self.in_hand = {name: max(0, number - 1) for name, number in self.in_hand.items()}
            return "\n".join(["# pxname,svname,status,scur,", *rows, ""])
        words = command.split()
        if words[:2] != ["set", "server"] or words[3] != "state":
            return "Unknown command."
        name = words[2].removeprefix("api/")
        self.servers[name] = {"drain": "DRAIN", "ready": "UP" if self.comes_up else "DOWN"}[words[4]]
        return ""


class Answer(socketserver.StreamRequestHandler):
    """One command, as HAProxy takes it."""

    server: HAProxy

    def handle(self) -> None:
        """Answer it."""
        self.wfile.write((self.server.answer(self.rfile.readline().decode().strip()) + "\n").encode())


@pytest.fixture
def haproxy(tmp_path: Path) -> Iterator[HAProxy]:
    with HAProxy(tmp_path / "admin.sock", {"a": "UP", "b": "UP"}) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def balancer(haproxy: HAProxy, clock: Clock) -> Balancer:
    return Balancer(Path(str(haproxy.server_address)), clock)


def test_an_api_is_drained_when_it_has_nothing_in_hand(
    balancer: Balancer, haproxy: HAProxy, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    haproxy.in_hand["a"] = 3
    assert main(["drain", "a", "--seconds", "60"], balancer) == 0
    assert capsys.readouterr().out == "a is drained\n"
    assert haproxy.servers == {"a": "DRAIN", "b": "UP"}
    assert haproxy.in_hand["a"] == 0
    assert clock.set == {"a": 60}, "it comes back by itself"
    assert main(["status"], balancer) == 0
    assert capsys.readouterr().out == "a DRAIN 0\nb UP 0\n"


def test_one_that_does_not_end_its_requests_is_said(
    balancer: Balancer, haproxy: HAProxy, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(balance, "IDLE_SECONDS", 0)
    haproxy.in_hand["a"] = 100
    assert main(["drain", "a"], balancer) == 0
    assert "a is drained, with requests in hand" in capsys.readouterr().out


@pytest.mark.parametrize("other", ["DOWN", "DRAIN", "MAINT", "UP 1/2", "DOWN 1/2"])
def test_the_last_one_that_is_up_is_left_in(
    balancer: Balancer, haproxy: HAProxy, clock: Clock, capsys: pytest.CaptureFixture[str], other: str
) -> None:
    haproxy.servers["b"] = other
    assert main(["drain", "a"], balancer) == 0
    assert capsys.readouterr().out == "a is left in: no other is up\n"
    assert haproxy.servers == {"a": "UP", "b": other}
    assert clock.set == {}


def test_it_is_asked_again_and_no_timer_is_left(
    balancer: Balancer, haproxy: HAProxy, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["drain", "a"], balancer)
    assert main(["ready", "a"], balancer) == 0
    assert capsys.readouterr().out.endswith("a is up\n")
    assert haproxy.servers == {"a": "UP", "b": "UP"}
    assert clock.set == {}


def test_one_that_does_not_come_up_fails_but_is_not_left_out(
    balancer: Balancer, haproxy: HAProxy, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(balance, "READY_SECONDS", 0)
    main(["drain", "a"], balancer)
    haproxy.comes_up = False
    assert main(["ready", "a"], balancer) == 1
    assert capsys.readouterr().err == "a is asked again, but found DOWN\n"
    assert "set server api/a state ready" in haproxy.asked


@pytest.mark.parametrize("command", ["drain", "ready"])
def test_an_unknown_name_is_bad_input(
    balancer: Balancer, haproxy: HAProxy, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert main([command, "c"], balancer) == 2
    assert capsys.readouterr().err == "no API is called c; there are a, b\n"
    assert not any(asked.startswith("set") for asked in haproxy.asked)


def test_what_haproxy_says_is_passed_on(
    balancer: Balancer, haproxy: HAProxy, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = haproxy.answer
    monkeypatch.setattr(
        haproxy, "answer", lambda command: answer(command) if command.startswith("show") else "No."
    )
    assert main(["ready", "a"], balancer) == 1
    assert capsys.readouterr().err == "HAProxy: No.\n"


def test_a_haproxy_that_does_not_run_is_one_line(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status"], Balancer(tmp_path / "none", clock)) == 1
    error = capsys.readouterr().err
    assert error.startswith("HAProxy does not answer: ")
    assert error.count("\n") == 1


def test_what_it_starts_comes_from_the_machine_and_not_from_who_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("systemctl", "systemd-run"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SYSTEMD_CONFIG", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    run, seen = subprocess.run, {}

    def look(command: list[str], **options: Any) -> "subprocess.CompletedProcess[str]":
        options |= {"capture_output": True, "text": True}
        result = run(["sh", "-c", f"command -v {command[0]}; pwd; env"], **{**options, "check": False})
        seen[command[0]] = result.stdout
        return result

    monkeypatch.setattr(subprocess, "run", look)
    Timer().start("a", 60)
    assert seen.keys() == {"systemctl", "systemd-run"}
    assert [text for text in seen.values() if str(tmp_path) in text] == []

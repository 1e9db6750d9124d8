#!/usr/bin/python3 -I
"""Which APIs a load balancer asks: installed as `winemon-balance`, for deployments and for people.

    winemon-balance drain NAME [--seconds 600]     leave it alone, and wait until it has nothing in hand
    winemon-balance ready NAME                     ask it again, and wait until it is found ready
    winemon-balance status

NAME is that of the machine in the inventory. The last API that is up is never taken out. What was taken out
comes back by itself after the seconds, so that whoever asked for it may be gone before the end. Exit code 2:
bad input; 1: it failed.

Standard library only: it runs on Debian's Python 3.11 and 3.13, as root.
"""

import argparse
import csv
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

SOCKET: Final = Path("/run/haproxy/admin.sock")
BACKEND: Final = "api"
UP: Final = "UP"
IDLE_SECONDS: Final = 30.0
"""How long a drained API may take to finish what it has in hand."""
READY_SECONDS: Final = 30.0
"""How long one that is asked again may take to be found ready."""


class InputError(Exception):
    """What was asked for cannot be done; the message is one line that says why."""


class OperationError(Exception):
    """What was asked for went wrong; the message is one line that says why."""


def run(*command: str, check: bool) -> None:
    """Run a command with nothing of whoever called this one."""
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}
    subprocess.run(command, env=environment, cwd="/", capture_output=not check, check=check)  # noqa: S603 - the names in it are known to HAProxy


class Timer:
    """A timer of systemd that brings an API back."""

    def start(self, name: str, seconds: int) -> None:
        """Let it go off after so many seconds, whatever becomes of us."""
        self.stop(name)
        command = ["systemd-run", "--quiet", "--collect", f"--unit=winemon-balance-{name}"]
        command += [f"--on-active={seconds}", "--timer-property=AccuracySec=1s"]
        run(*command, str(Path(__file__).resolve()), "ready", name, check=True)

    def stop(self, name: str) -> None:
        """Forget it, if there is one."""
        run("systemctl", "--quiet", "stop", f"winemon-balance-{name}.timer", check=False)


class Balancer:
    """HAProxy, over the socket of its runtime API."""

    def __init__(self, path: Path, timer: Timer) -> None:
        self._path = path
        self._timer = timer

    def ask(self, command: str) -> str:
        """Return what HAProxy answers to a command."""
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(10)
                connection.connect(os.fspath(self._path))
                connection.sendall(f"{command}\n".encode())
                answer = b"".join(iter(lambda: connection.recv(65536), b""))
        except OSError as error:
            raise OperationError(f"HAProxy does not answer: {error}") from error
        return answer.decode().strip()

    def servers(self) -> dict[str, dict[str, str]]:
        """Return the columns of HAProxy's statistics of each API by its name."""
        table = self.ask(f"show stat {BACKEND} 4 -1").removeprefix("# ").splitlines()
        return {row["svname"]: row for row in csv.DictReader(table)}

    def _server(self, name: str) -> dict[str, str]:
        known = self.servers()
        if name not in known:
            raise InputError(f"no API is called {name}; there are {', '.join(known) or 'none'}")
        return known[name]

    def _set(self, name: str, state: str) -> None:
        if answer := self.ask(f"set server {BACKEND}/{name} state {state}"):
            raise OperationError(f"HAProxy: {answer}")

    def drain(self, name: str, seconds: int) -> str:
        """Have no more requests sent to it, and wait until it has answered those in hand."""
        self._server(name)
        if not any(row["status"] == UP for other, row in self.servers().items() if other != name):
            return f"{name} is left in: no other is up"
        self._timer.start(name, seconds)
        self._set(name, "drain")
        idle = wait(lambda: int(self._server(name)["scur"]) == 0, IDLE_SECONDS)
        return f"{name} is drained" + ("" if idle else f", with requests in hand after {IDLE_SECONDS:.0f} s")

    def ready(self, name: str) -> str:
        """Have requests sent to it again, and wait until it is found ready."""
        self._server(name)
        self._timer.stop(name)
        self._set(name, "ready")
        if not wait(lambda: self._server(name)["status"] == UP, READY_SECONDS):
            raise OperationError(f"{name} is asked again, but found {self._server(name)['status']}")
        return f"{name} is up"

    def status(self) -> str:
        """Return a line for each API: its name, its state, the requests it has in hand."""
        return "\n".join(f"{name} {row['status']} {row['scur']}" for name, row in self.servers().items())


def wait(condition: Callable[[], bool], seconds: float) -> bool:
    """Return whether a condition comes true within so many seconds."""
    deadline = time.monotonic() + seconds
    while not (true := condition()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return true


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="winemon-balance", description="Which APIs a load balancer asks.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser("drain", help="leave an API alone")
    command.add_argument("name")
    command.add_argument("--seconds", type=int, default=600, help="after which it is asked again in any case")
    command = commands.add_parser("ready", help="ask it again")
    command.add_argument("name")
    commands.add_parser("status", help="state and requests in hand of each")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str], balancer: Balancer) -> int:
    """Run the command; return its exit code."""
    options = parse(arguments)
    try:
        match options.command:
            case "drain":
                answer = balancer.drain(options.name, options.seconds)
            case "ready":
                answer = balancer.ready(options.name)
            case _:
                answer = balancer.status()
    except (InputError, OperationError) as error:
        sys.stderr.write(f"{error}\n")
        return 2 if isinstance(error, InputError) else 1
    sys.stdout.write(f"{answer}\n")
    return 0


if __name__ == "__main__":
    if os.geteuid() != 0:
        sys.exit("winemon-balance: run it as root, with sudo")
    sys.exit(main(sys.argv[1:], Balancer(SOCKET, Timer())))

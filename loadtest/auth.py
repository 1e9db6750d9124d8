"""The password of Locust's web UI: HTTP basic authentication, the same for people, Prometheus and scripts."""

import hmac
import os
import sys
from pathlib import Path
from urllib.parse import urlsplit

from flask import Flask, Response, request


def install(app: Flask) -> None:
    """Protect every route of the web UI `app`, if the environment names a password.

    `LOCUST_PASSWORD_FILE` is a file that holds it, for instance a systemd credential; `LOCUST_USERNAME` is
    `admin` by default. Without the first, the web UI is open to whoever reaches it. A file without a password
    ends the program.
    """
    if not (name := os.environ.get("LOCUST_PASSWORD_FILE")):
        return
    try:
        password = Path(name).read_text().strip()
    except OSError as error:
        sys.exit(f"LOCUST_PASSWORD_FILE: {error}")
    if not password:
        sys.exit(f"LOCUST_PASSWORD_FILE: {name} is empty: put the password there")
    expected = f"{os.environ.get('LOCUST_USERNAME', 'admin')}:{password}".encode()

    def check() -> Response | None:
        sent = request.authorization
        given = f"{sent.username}:{sent.password}".encode() if sent and sent.type == "basic" else b""
        if not hmac.compare_digest(given, expected):
            return Response("A password is needed.\n", 401, {"WWW-Authenticate": 'Basic realm="Locust"'})
        # A browser sends the password along with what another site's page makes it post.
        if (origin := request.headers.get("Origin")) and urlsplit(origin).netloc != request.host:
            return Response("Requests from other sites are refused.\n", 403)
        return None

    app.before_request(check)

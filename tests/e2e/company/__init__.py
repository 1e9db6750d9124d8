"""A company's network in short: a proxy, and a web server with a certificate of the company's own."""

import contextlib
import http.server
import shutil
import ssl
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path


class Proxy(http.server.BaseHTTPRequestHandler):
    """Passes on what is asked with a whole URL, as this computer would ask, and answers anything else."""

    asked: list[str]

    def do_GET(self) -> None:
        """Answer."""
        self.asked.append(self.path)
        if self.path.startswith("/"):
            self.send_response(204)
            self.end_headers()
            return
        try:
            answer = urllib.request.urlopen(self.path, timeout=60)  # noqa: S310 - apt's mirror
        except urllib.error.HTTPError as error:
            self.send_error(error.code)
            return
        with answer:
            self.send_response(answer.status)
            self.send_header("Content-Length", answer.headers["Content-Length"])
            self.end_headers()
            shutil.copyfileobj(answer, self.wfile)

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002 - named there
        """Say nothing: `asked` has it."""


@contextlib.contextmanager
def serve(address: str, certificate: Path | None = None) -> Iterator[tuple[str, list[str]]]:
    """Serve at an address, over TLS with a certificate and its key; yield the URL and what is asked."""
    asked: list[str] = []
    server = http.server.ThreadingHTTPServer((address, 0), type("Noting", (Proxy,), {"asked": asked}))
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"{'https' if certificate else 'http'}://{address}:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def certificate(address: str, directory: Path) -> tuple[Path, Path]:
    """Make a certificate for an address; return it alone, and with its key."""
    alone, whole = directory / "company-root.crt", directory / "company-root.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=Company",
    ]
    subprocess.run(
        [*command, "-addext", f"subjectAltName=IP:{address}", "-keyout", whole, "-out", alone],
        check=True,
        capture_output=True,
    )
    whole.write_bytes(whole.read_bytes() + alone.read_bytes())
    return alone, whole

"""`ansible/champion.yml` fetches the live release of a store and nothing else; the store here is a folder."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def fetch(tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Run the play against a store in `tmp_path`."""
    variables = {
        "ansible_connection": "local",
        "ansible_python_interpreter": sys.executable,
        "winemon_api_store": str(tmp_path / "store"),
    }
    inventory = tmp_path / "hosts.yml"
    inventory.write_text(json.dumps({"api": {"hosts": {"wine": variables}}}))
    return subprocess.run(
        [
            *(Path(sys.executable).parent / "ansible-playbook", "-i", inventory, "ansible/champion.yml"),
            *("-e", f"champion={tmp_path / 'champion.tar.gz'}"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.thorough
def test_the_live_release_is_the_champion_if_it_is_what_was_published(tmp_path: Path) -> None:
    champion, store = tmp_path / "champion.tar.gz", tmp_path / "store"

    # Nothing was published: none, and not the one of the last time.
    champion.write_bytes(b"old")
    done = fetch(tmp_path)
    assert done.returncode == 0, done.stdout
    assert not champion.exists()

    store.mkdir()
    releases = {}
    for name in ("v1", "v2"):
        content = f"release {name}".encode()
        (store / f"winemon-{name}.tar.gz").write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        releases[name] = {"archive": f"winemon-{name}.tar.gz", "sha256": digest, "environment": "app-1"}
    (store / "index.json").write_text(json.dumps({"live": "v1", "releases": releases}))
    done = fetch(tmp_path)
    assert done.returncode == 0, done.stdout
    assert champion.read_bytes() == b"release v1"

    (store / "winemon-v1.tar.gz").write_bytes(b"release v3")
    done = fetch(tmp_path)
    assert done.returncode != 0
    assert "winemon-v1.tar.gz in the store is not what was published there" in done.stdout

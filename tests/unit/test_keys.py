"""The keys that ship are those that the roles say they are, and not near their end."""

import datetime
import subprocess
from pathlib import Path

import yaml

GRAFANA = Path(__file__).parents[2] / "roles" / "grafana"


def test_the_key_of_grafanas_repository_is_the_one_that_the_role_names(tmp_path: Path) -> None:
    said = yaml.safe_load((GRAFANA / "vars" / "main.yml").read_text(encoding="utf-8"))
    command = [
        "gpg",
        "--homedir",
        tmp_path,
        "--show-keys",
        "--with-colons",
        GRAFANA / "files" / "grafana.asc",
    ]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    records = [line.split(":") for line in output.splitlines()]
    primaries = [record for record in records if record[0] == "pub"]
    assert len(primaries) == 1
    assert next(record[9] for record in records if record[0] == "fpr") == said["_grafana_key_fingerprint"]
    expires = datetime.datetime.fromtimestamp(int(primaries[0][6]), tz=datetime.UTC).date()
    assert expires.isoformat() == said["_grafana_key_expires"]
    assert expires > datetime.datetime.now(tz=datetime.UTC).date() + datetime.timedelta(days=60), (
        "its maker's newer copy belongs into roles/grafana/files/grafana.asc"
    )

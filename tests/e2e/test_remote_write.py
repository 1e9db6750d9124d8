"""A second store gets every sample, also those of a time when it was away."""

import json
import time
from typing import Any, Final

from tests.e2e.site import Site, until

PORT: Final = 9099
START: Final = f"""
systemd-run --quiet --collect --unit=other-store --property=User=prometheus \\
  --property=StateDirectory=other-store /usr/bin/prometheus --config.file=/tmp/other-store.yml \\
  --storage.tsdb.path=/var/lib/other-store --web.listen-address=:{PORT} \\
  --web.enable-remote-write-receiver --web.config.file=/etc/prometheus/web.yml
"""
"""A second Prometheus, that scrapes nothing and takes what is sent by who knows the password."""


def test_another_store_gets_every_sample_through_an_outage(site: Site) -> None:
    user, password = site.secret("prometheus")
    site.run("echo 'global: {}' >/tmp/other-store.yml")
    site.run(START)
    play, variables = site.build / "prometheus.yml", site.build / "remote-write.json"
    play.write_text("- {hosts: monitoring, become: true, roles: [prometheus]}\n")
    url = f"http://{site.address}:{PORT}/api/v1/write"
    settings = {
        "prometheus_remote_write": [{"name": "other", "url": url, "username": user, "password": password}],
        "prometheus_external_labels": {"prometheus": "{{ inventory_hostname }}"},
        "prometheus_scrape_interval": "2s",
    }
    variables.write_text(json.dumps(settings))
    assert site.changed(site.play(str(play), "-e", f"@{variables}")) > 0
    assert site.changed(site.play(str(play), "-e", f"@{variables}")) == 0
    variables.unlink()  # as it has a password

    def samples(port: int, moment: float) -> dict[str, list[Any]]:
        """Return the moments and values of three quarters of a minute, by job."""
        answer = site.client.get(
            f"http://{site.address}:{port}/api/v1/query",
            params={"query": "scrape_samples_scraped[45s]", "time": moment},
            auth=(user, password),
        ).raise_for_status()
        return {row["metric"]["job"]: row["values"] for row in answer.json()["data"]["result"]}

    until(lambda: {"fastapi", "node"} <= samples(PORT, time.time()).keys(), "samples arrive")
    began = time.time()
    time.sleep(5)
    site.run("systemctl stop other-store")
    time.sleep(20)
    site.run(START)
    moment = began + 45
    time.sleep(max(0, moment - time.time()))
    here = samples(9090, moment)
    assert all(len(values) >= 18 for values in here.values()), "every two seconds"
    until(lambda: samples(PORT, moment) == here, "what was missed arrives")
    assert password not in site.run("cat /etc/prometheus/prometheus.yml")

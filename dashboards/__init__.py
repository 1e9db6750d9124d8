"""Grafana's dashboards as code: `python -m dashboards` writes the JSON that the role grafana ships.

A dashboard is rows, a row is lines of panels, and a panel is one call that names title, unit and queries;
`panels.py` turns that into Grafana's JSON. It is plain functions over dictionaries and no library: Grafana's
Foundation SDK is a preview for Grafana 10 and later that takes several builders for what is one call here,
grafanalib is no longer maintained, and what we use of the format fits on a page. Where an alert has a limit,
the dashboards draw it, from the same source as the rules.
"""

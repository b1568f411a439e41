#!/usr/bin/env python3
"""Ask Prometheus every query of the dashboard, as Grafana would, and say which have no data.

    deploy/grafana/queries.py [http://127.0.0.1:9090]

Needs Python alone. Exit code 1 if Prometheus refuses a query; one without data is only named, since
nothing may have happened yet that it counts.
"""

import json
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Final

DASHBOARD: Final = Path(__file__).parent / "dashboards" / "era.json"
_VARIABLES: Final = {"$__rate_interval": "1m", "$level": ".*"}
"""What Grafana puts in."""
_DIRECT: Final = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def queries() -> Iterator[tuple[str, str]]:
    """Yield each panel's title with each of its queries, as Prometheus is asked."""
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", ()):
            query = target["expr"]
            for name, value in _VARIABLES.items():
                query = query.replace(name, value)
            yield panel["title"], query


def ask(url: str, query: str) -> list[tuple[dict[str, str], float]]:
    """Return what Prometheus says now: labels and value of each series."""
    parameters = urllib.parse.urlencode({"query": query})
    with _DIRECT.open(f"{url}/api/v1/query?{parameters}", timeout=30) as reply:
        found = json.load(reply)["data"]["result"]
    return [(series["metric"], float(series["value"][1])) for series in found]


def main() -> None:
    """Print a line a series."""
    url = (sys.argv[1:] or ["http://127.0.0.1:9090"])[0].rstrip("/")
    refused = 0
    for title, query in queries():
        try:
            found = ask(url, query)
        except urllib.error.HTTPError as error:
            refused += 1
            print(f"{title:<50} REFUSED: {json.load(error)['error']}")
            continue
        except OSError as error:
            sys.exit(f"{url}: {error}; needed the address of a Prometheus that is up")
        for labels, value in found or [({}, None)]:
            shown = "no data" if value is None else f"{value:.4g}"
            print(f"{title:<50} {shown:>10}  {' '.join(labels.values())}")
    sys.exit(bool(refused))


if __name__ == "__main__":
    main()

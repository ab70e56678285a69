"""Writes the dashboards that Grafana reads. From the repository's root: python -m deploy.grafana.generate"""

from __future__ import annotations

from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from deploy.grafana.service import service
from deploy.grafana.speculation import speculation

FOLDER = Path(__file__).parent / "dashboards/json"


def dashboards() -> dict[str, str]:
    """JSON by file name."""
    encoder = JSONEncoder(sort_keys=True, indent=2)
    return {f"{dashboard.uid}.json": encoder.encode(dashboard) + "\n" for dashboard in (service(), speculation())}


def main() -> None:
    """Replaces what is in the folder."""
    found = dashboards()
    for path in FOLDER.glob("*.json"):
        if path.name not in found:
            path.unlink()
    for name, text in found.items():
        (FOLDER / name).write_text(text)


if __name__ == "__main__":
    main()

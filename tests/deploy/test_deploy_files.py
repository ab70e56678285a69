"""Grafana's and Prometheus' files agree with each other and with compose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DASHBOARDS = sorted((ROOT / "deploy/grafana/dashboards/json").glob("*.json"))


def load_yaml(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text())


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    return load_yaml("docker-compose.yml")["services"]


def test_prometheus_finds_its_rules(services):
    prometheus = [service for service in services.values() if service["image"].startswith("prom/prometheus")]
    assert prometheus
    for service in prometheus:
        mounts = dict(volume.split(":")[:2] for volume in service["volumes"])
        (config,) = [source for source in mounts if source.endswith(".yml")]
        folder = Path(mounts[config]).parent
        patterns = load_yaml(config)["rule_files"]
        assert [str(folder / Path(pattern).parent) for pattern in patterns] == [mounts["./deploy/prometheus/rules"]]


def test_grafana_finds_its_dashboards_and_data_source(services):
    grafana = services["grafana"]
    mounted_at = {source: target for source, target, _ in (v.split(":") for v in grafana["volumes"] if v.startswith("."))}
    provider = load_yaml("deploy/grafana/dashboards/config/medusa.yml")["providers"][0]
    assert provider["options"]["path"] == mounted_at["./deploy/grafana/dashboards/json"]
    home = Path(grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert home.name in {dashboard.name for dashboard in DASHBOARDS}
    source = load_yaml("deploy/grafana/datasources/prometheus.yml")["datasources"][0]
    assert source["url"].removeprefix("$") in grafana["environment"]

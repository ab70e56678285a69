"""Grafana's files agree with each other, with compose and with what the server exposes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from server.metrics import EngineMetrics, GenerationMetrics, HttpMetrics
from tests.server.fakes import INFO

ROOT = Path(__file__).parents[2]
DASHBOARDS = sorted((ROOT / "deploy/grafana/dashboards/json").glob("*.json"))
SAMPLE_SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}


def load_yaml(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text())


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    return load_yaml("docker-compose.yml")["services"]


@pytest.fixture(scope="module")
def exposed() -> dict[str, set[str]]:
    """Names of the samples that /metrics shows, each with its labels."""
    registry = CollectorRegistry()
    http = HttpMetrics(registry)
    http.observe(method="GET", route="/health", status=200, duration_s=0.1)
    GenerationMetrics(registry, model_name="m", max_depth=4, max_model_len=100)
    EngineMetrics(registry, model_name="m", info=INFO)
    return {
        family.name + suffix: {label for sample in family.samples for label in sample.labels}
        for family in registry.collect()
        for suffix in SAMPLE_SUFFIXES[family.type]
    }


def expressions(dashboard: Path) -> list[str]:
    panels = json.loads(dashboard.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", ())]


def test_grafana_finds_its_dashboards_and_data_source(services):
    grafana = services["grafana"]
    mounted_at = {source: target for source, target, _ in (v.split(":") for v in grafana["volumes"] if v.startswith("."))}
    provider = load_yaml("deploy/grafana/dashboards/config/medusa.yml")["providers"][0]
    assert provider["options"]["path"] == mounted_at["./deploy/grafana/dashboards/json"]
    home = Path(grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert home.name in {dashboard.name for dashboard in DASHBOARDS}
    source = load_yaml("deploy/grafana/datasources/prometheus.yml")["datasources"][0]
    assert source["url"].removeprefix("$") in grafana["environment"]


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.name)
def test_every_metric_in_a_panel_is_exposed_with_the_labels_used(dashboard, exposed):
    found = [match for e in expressions(dashboard) for match in re.findall(r"(medusa_\w+)(?:\{([^}]*)\})?", e)]
    assert len(found) > 30
    for name, selector in found:
        assert name in exposed, f"{name} is not a metric of the server"
        labels = set(re.findall(r"(\w+)\s*=", selector))
        assert labels <= exposed[name], f"{name} has no label {labels - exposed[name]}"


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.name)
def test_panels_have_ids_of_their_own_and_do_not_overlap(dashboard):
    panels = json.loads(dashboard.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for panel in panels
        for pos in [panel["gridPos"]]
        for x in range(pos["x"], pos["x"] + pos["w"])
        for y in range(pos["y"], pos["y"] + pos["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24

"""The dashboards are what the generator makes, and ask for what the server exposes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec
import pytest
from prometheus_client import CollectorRegistry

from deploy.grafana.generate import FOLDER, dashboards
from deploy.grafana.panel_data import Line, expand, panels_of
from server.metrics import EngineMetrics, GenerationMetrics, HttpMetrics, register_build_info
from tests.server.fakes import INFO

DASHBOARDS = sorted(FOLDER.glob("*.json"))
SAMPLE_SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
each_dashboard = pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def exposed() -> dict[str, set[str]]:
    """Names of the samples that /metrics shows, each with the labels that a scrape may find on it."""
    registry = CollectorRegistry()
    http = HttpMetrics(registry)
    http.observe(method="POST", route="/v1/completions", status=200, duration_s=0.1)
    http.observe_key("k", status=200, num_tokens=1)
    GenerationMetrics(registry, model_name="m", max_depth=4, max_model_len=100, num_open_requests=lambda: 0)
    EngineMetrics(registry, model_name="m", info=msgspec.structs.replace(INFO, tree_sizes=(1, 4), head_ranks=((1, 0), (1, 1))))
    register_build_info(registry)
    return {
        family.name + suffix: {label for sample in family.samples for label in sample.labels} | {"instance", "job"}
        for family in registry.collect()
        for suffix in SAMPLE_SUFFIXES[family.type]
    }


def expressions(dashboard: Path) -> list[str]:
    return [target.expr for panel in panels_of(dashboard) for target in panel.targets]


def test_the_files_are_what_the_generator_makes():
    written = {path.name: path.read_text() for path in DASHBOARDS}
    assert written == dashboards(), "run python -m deploy.grafana.generate"


@each_dashboard
def test_every_metric_in_a_panel_is_exposed_with_the_labels_used(dashboard, exposed):
    found = [match for expr in expressions(dashboard) for match in re.findall(r"(medusa_\w+)(?:\{([^}]*)\})?", expr)]
    assert len(found) > 30
    for name, selector in found:
        assert name in exposed, f"{name} is not a metric of the server"
        labels = set(re.findall(r"(\w+)\s*=", selector))
        assert labels <= exposed[name], f"{name} has no label {labels - exposed[name]}"


def test_every_metric_in_a_rule_is_exposed(exposed):
    text = "\n".join(path.read_text() for path in (FOLDER.parents[2] / "prometheus/rules").glob("*.yml"))
    # Those with colons are recorded ones.
    found = set(re.findall(r"(?<![:\w])medusa_\w+\b(?!:)", text))
    assert len(found) > 15
    assert found - set(exposed) == set()


def test_every_metric_has_a_panel(exposed):
    text = "\n".join(expr for dashboard in DASHBOARDS for expr in expressions(dashboard))
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in exposed}
    assert [name for name in sorted(families) if not re.search(rf"{name}\b|{name}_(bucket|sum|count)\b", text)] == []


@each_dashboard
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


@each_dashboard
def test_every_panel_says_what_it_shows(dashboard):
    panels = [panel for panel in json.loads(dashboard.read_text())["panels"] if panel["type"] != "row"]
    assert all(panel["title"] and panel["description"].endswith(".") and panel["targets"] for panel in panels)
    titles = [(panel["title"], panel["type"]) for panel in panels]
    assert len(set(titles)) == len(titles)


@each_dashboard
def test_panels_use_the_data_source_model_and_server_that_are_chosen(dashboard):
    document = json.loads(dashboard.read_text())
    assert [variable["name"] for variable in document["templating"]["list"]] == ["datasource", "model_name", "instance"]
    uses = [
        use["datasource"]["uid"]
        for panel in document["panels"]
        for use in [panel, *panel.get("targets", ())]
        if "datasource" in use
    ]
    assert set(uses) == {"${datasource}"}
    selectors = [selector for expr in expressions(dashboard) for selector in re.findall(r"medusa_\w+(\{[^}]*\}|)", expr)]
    assert selectors
    assert [selector for selector in selectors if 'instance=~"$instance"' not in selector] == []


@each_dashboard
def test_rates_take_grafanas_interval_and_no_division_is_by_zero(dashboard):
    for expr in expressions(dashboard):
        assert set(re.findall(r"\[([^\]]*)\]", expr)) <= {"$__rate_interval", "$__range"}, expr
        for divisor in re.split(r" / (?:on \(\) group_left \(\) )?", expr)[1:]:
            assert divisor.startswith("(")
            assert divisor.rstrip(")").endswith("> 0"), expr


def test_a_variable_that_is_not_filled_in_is_an_error():
    assert expand('a{b=~"$instance"}[$__rate_interval]', rate_interval_s=20, range_s=60) == 'a{b=~".*"}[20s]'
    with pytest.raises(ValueError, match=r"\$other"):
        expand("$other", rate_interval_s=20, range_s=60)


def test_legends_are_filled_in_from_labels():
    assert Line({"le": "4"}, ()).name("up to {{le}}, {{ missing }}") == "up to 4, "

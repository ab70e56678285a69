"""Prometheus' own checks of its files, and what each alert owes to the person whom it wakes."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.grafana.panel_data import expand, panels_of

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy/prometheus"
RULES = sorted((PROMETHEUS / "rules").glob("*.yml"))
CASES = sorted((PROMETHEUS / "tests").glob("*.yml"))
DASHBOARDS = sorted((ROOT / "deploy/grafana/dashboards/json").glob("*.json"))
# About what is not there, so that nothing is left of the expression to have a value.
ABOUT_ABSENCE = {"MedusaTargetMissing", "MedusaModelNotLoaded"}

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed; it comes with Prometheus (apt-get install prometheus)"
)


def rules(kind: str) -> list[dict[str, Any]]:
    """All rules with the key `kind`: alert or record."""
    groups = [group for path in RULES for group in yaml.safe_load(path.read_text())["groups"]]
    return [rule for group in groups for rule in group["rules"] if kind in rule]


def cases(kind: str) -> list[dict[str, Any]]:
    """All cases of promtool's tests under the key `kind`."""
    tests = [test for path in CASES for test in yaml.safe_load(path.read_text())["tests"]]
    return [case for test in tests for case in test.get(kind, ())]


def promtool(*arguments: str | Path) -> None:
    result = subprocess.run(["promtool", *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


ALERTS = rules("alert")


@needs_promtool
def test_prometheus_takes_the_configuration_and_its_rules():
    promtool("check", "config", *PROMETHEUS.glob("*.yml"))
    promtool("check", "rules", *RULES)


@needs_promtool
def test_rules_do_in_each_case_what_is_written_there():
    promtool("test", "rules", *CASES)


@needs_promtool
@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_every_query_of_a_panel_is_promql(dashboard, tmp_path):
    targets = [target for panel in panels_of(dashboard) for target in panel.targets]
    rules = [
        {"record": f"panel:{idx}", "expr": expand(target.expr, rate_interval_s=20, range_s=300)}
        for idx, target in enumerate(targets)
    ]
    assert len(rules) > 30
    (tmp_path / "panels.yml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    promtool("check", "rules", tmp_path / "panels.yml")


def test_every_recording_rule_has_a_case():
    recorded = [rule["record"] for rule in rules("record")]
    assert len(set(recorded)) == len(recorded) > 10
    assert set(recorded) - {case["expr"] for case in cases("promql_expr_test")} == set()


def test_every_alert_has_a_case_in_which_it_fires():
    firing = {case["alertname"] for case in cases("alert_rule_test") if case.get("exp_alerts")}
    assert firing == {rule["alert"] for rule in ALERTS}


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_an_alert_says_how_bad_it_is_what_happened_and_what_to_do(rule):
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
    page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    # As GitHub makes anchors of headings of one word.
    assert anchor == rule["alert"].lower()
    assert f"### {rule['alert']}\n\n{rule['labels']['severity'].capitalize()}. " in (ROOT / page).read_text()


def test_the_page_of_alerts_has_no_others():
    headings = re.findall(r"^### (\w+)$", (ROOT / "docs/alerts.md").read_text(), flags=re.MULTILINE)
    assert headings == [rule["alert"] for rule in ALERTS]


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_an_alert_compares_a_value_that_can_be_looked_at(rule):
    *value, comparison = rule["expr"].splitlines()
    if rule["alert"] in ABOUT_ABSENCE:
        assert not value
    else:
        assert value
        assert re.fullmatch(r"(<|>|==) [\d.]+", comparison)


def test_each_job_that_is_scraped_has_an_alert_for_when_it_is_down():
    jobs = {job["job_name"] for path in PROMETHEUS.glob("*.yml") for job in yaml.safe_load(path.read_text())["scrape_configs"]}
    down = [re.match(r'up\{job=~?"([^"]+)"\}\n== 0$', rule["expr"]) for rule in ALERTS]
    patterns = [match[1] for match in down if match]
    assert {job: [bool(re.fullmatch(pattern, job)) for pattern in patterns].count(True) for job in jobs} == dict.fromkeys(jobs, 1)
    assert len(jobs) == 2


def test_what_alerts_read_is_recorded():
    recorded = {rule["record"] for rule in rules("record")}
    read = {name for rule in [*ALERTS, *rules("record")] for name in re.findall(r"\w+:\w+:\w+", rule["expr"])}
    assert read
    assert read - recorded == set()

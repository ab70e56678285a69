"""Writes Prometheus' rules as the resource that the Prometheus operator reads. Run: python -m deploy.k8s.prometheus_rule"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).parents[1]
TARGET = DEPLOY / "k8s/components/monitoring/prometheus-rule.yaml"
HEADER = "# Written by `python -m deploy.k8s.prometheus_rule` from deploy/prometheus/rules; not for editing.\n"


class _Dumper(yaml.SafeDumper):
    """Strings of several lines as blocks, which can be read."""


def _represent(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent)


def prometheus_rule() -> str:
    """The resource's text."""
    files = sorted((DEPLOY / "prometheus/rules").glob("*.yml"))
    groups: list[Any] = [group for path in files for group in yaml.safe_load(path.read_text())["groups"]]
    resource = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "medusa-server", "labels": {"app.kubernetes.io/name": "medusa-server"}},
        "spec": {"groups": groups},
    }
    return HEADER + yaml.dump(resource, Dumper=_Dumper, sort_keys=False, width=160)


if __name__ == "__main__":
    TARGET.write_text(prometheus_rule())

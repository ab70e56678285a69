"""The Kubernetes files, rendered by kubectl, held against schemas, each other, server and image. There is no cluster."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

import httpx
import jsonschema
import kubernetes_validate
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from deploy.k8s.prometheus_rule import TARGET, prometheus_rule
from server.app import create_app
from server.http_server import CLOSE_TIMEOUT_S
from server.settings import ServerSettings
from tests.deploy.deployment import ROOT, compose_services, dockerfile_stages, load_yaml, run_tool
from tests.server.background import serve_in_thread
from tests.server.fakes import FakeClient, FakeText

K8S = ROOT / "deploy/k8s"
OVERLAYS = sorted(path.name for path in (K8S / "overlays").iterdir())
SCHEMAS = {path.stem: json.loads(path.read_text()) for path in (ROOT / "tests/deploy/schemas").glob("*.json")}
# The oldest with the `sleep` hook on by default, and the newest that there are schemas of.
VERSIONS = ("1.30", "1.37")
# Made by hand, as README.md says.
SECRETS = {"medusa-keys", "medusa-hub"}

Resource = dict[str, Any]


@cache
def render(overlay: str) -> list[Resource]:
    return list(yaml.safe_load_all(run_tool("kubectl", "kustomize", str(K8S / "overlays" / overlay))))


def of_kind(overlay: str, kind: str) -> dict[str, Resource]:
    return {resource["metadata"]["name"]: resource for resource in render(overlay) if resource["kind"] == kind}


def server_of(overlay: str) -> tuple[Resource, Resource]:
    """(deployment, container) of the server."""
    deployment = of_kind(overlay, "Deployment")["medusa-server"]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    return deployment, container


def pods(overlay: str) -> list[Resource]:
    return [deployment["spec"]["template"] for deployment in of_kind(overlay, "Deployment").values()]


def check_schema(resource: Resource, version: str) -> None:
    if resource["kind"] in SCHEMAS:
        jsonschema.validate(resource, SCHEMAS[resource["kind"]])
    else:
        kubernetes_validate.validate(resource, version, strict=True)


def selected(labels: dict[str, str], resources: list[Resource]) -> list[Resource]:
    return [resource for resource in resources if labels.items() <= resource["metadata"]["labels"].items()]


@pytest.fixture(scope="module")
def exposed_names() -> set[str]:
    """Of the samples that the server's /metrics shows."""
    with serve_in_thread(FakeClient()) as url:
        text = httpx.get(f"{url}/metrics", trust_env=False).text
    return {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}


def test_the_overlays_are_those_that_the_documentation_names():
    assert OVERLAYS == ["gateway-inference-extension", "replicas", "single"]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_resource_is_as_its_schema_says(overlay, version):
    for resource in render(overlay):
        check_schema(resource, version)


@pytest.mark.parametrize(
    "kind", ["Deployment", "HorizontalPodAutoscaler", "InferencePool", "HTTPRoute", "ServiceMonitor", "PrometheusRule"]
)
def test_a_misspelt_field_would_be_found(kind):
    resource = next(resource for resource in render("gateway-inference-extension") if resource["kind"] == kind)
    spoilt = {**resource, "spec": {**resource["spec"], "replicsa": 1}}
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check_schema(spoilt, VERSIONS[-1])


@pytest.mark.parametrize("overlay", OVERLAYS)
class TestReferences:
    def test_services_and_policies_select_pods(self, overlay):
        for service in of_kind(overlay, "Service").values():
            (pod,) = selected(service["spec"]["selector"], pods(overlay))
            names = {port["name"] for container in pod["spec"]["containers"] for port in container["ports"]}
            assert {port["targetPort"] for port in service["spec"]["ports"]} <= names
        for kind, field in (("NetworkPolicy", "podSelector"), ("PodDisruptionBudget", "selector"), ("InferencePool", "selector")):
            for resource in of_kind(overlay, kind).values():
                assert selected(resource["spec"][field]["matchLabels"], pods(overlay))

    def test_every_service_is_scraped_on_a_port_that_it_has(self, overlay):
        services = of_kind(overlay, "Service")
        scraped = {}
        for monitor in of_kind(overlay, "ServiceMonitor").values():
            (service,) = selected(monitor["spec"]["selector"]["matchLabels"], list(services.values()))
            (endpoint,) = monitor["spec"]["endpoints"]
            assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
            labels = service["metadata"]["labels"]
            job = labels[monitor["spec"]["jobLabel"]] if "jobLabel" in monitor["spec"] else service["metadata"]["name"]
            scraped[service["metadata"]["name"]] = job
        assert set(scraped) == set(services)
        # As in compose; alerts take jobs named medusa... for servers.
        assert [name for name, job in scraped.items() if job.startswith("medusa")] == ["medusa-server"]
        jobs = {job["job_name"] for job in load_yaml("deploy/prometheus/scale.yml")["scrape_configs"]}
        assert {job for name, job in scraped.items() if name in ("medusa-server", "medusa-router")} <= jobs

    def test_what_pods_take_from_the_cluster_exists(self, overlay):
        maps, claims = of_kind(overlay, "ConfigMap"), of_kind(overlay, "PersistentVolumeClaim")
        for pod in pods(overlay):
            sources = [source for container in pod["spec"]["containers"] for source in container.get("envFrom", ())]
            volumes = pod["spec"]["volumes"]
            assert {s["configMapRef"]["name"] for s in sources if "configMapRef" in s} <= set(maps)
            variables = [
                v["valueFrom"] for container in pod["spec"]["containers"] for v in container.get("env", ()) if "valueFrom" in v
            ]
            secrets = {v["secretKeyRef"]["name"] for v in variables if "secretKeyRef" in v}
            assert secrets | {volume["secret"]["secretName"] for volume in volumes if "secret" in volume} <= SECRETS
            assert {volume["configMap"]["name"] for volume in volumes if "configMap" in volume} <= set(maps)
            claimed = {v["persistentVolumeClaim"]["claimName"] for v in volumes if "persistentVolumeClaim" in v}
            assert claimed <= set(claims)
            assert pod["spec"].get("serviceAccountName", "default") in {"default", *of_kind(overlay, "ServiceAccount")}
            mounts = {mount["name"] for container in pod["spec"]["containers"] for mount in container["volumeMounts"]}
            assert mounts == {volume["name"] for volume in volumes}

    def test_roles_are_bound(self, overlay):
        for binding in of_kind(overlay, "RoleBinding").values():
            assert binding["roleRef"]["name"] in of_kind(overlay, "Role")
            assert {subject["name"] for subject in binding["subjects"]} <= set(of_kind(overlay, "ServiceAccount"))


@pytest.mark.parametrize("overlay", OVERLAYS)
class TestHardening:
    def test_containers_have_no_rights_that_they_do_not_need(self, overlay):
        for pod in pods(overlay):
            assert pod["spec"]["securityContext"]["runAsNonRoot"]
            assert pod["spec"]["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            for container in pod["spec"]["containers"]:
                context = container["securityContext"]
                assert context["readOnlyRootFilesystem"]
                assert not context["allowPrivilegeEscalation"]
                assert context["capabilities"] == {"drop": ["ALL"]}
                assert "memory" in container["resources"]["limits"]

    def test_only_pods_that_ask_the_cluster_have_a_token(self, overlay):
        for pod in pods(overlay):
            assert ("serviceAccountName" in pod["spec"]) != (pod["spec"].get("automountServiceAccountToken") is False)

    def test_all_pods_of_the_server_are_behind_a_policy_for_both_directions(self, overlay):
        policy = of_kind(overlay, "NetworkPolicy")["medusa-server"]["spec"]
        assert policy["policyTypes"] == ["Ingress", "Egress"]


@pytest.mark.parametrize("overlay", OVERLAYS)
class TestServer:
    def test_the_image_is_compose_s_for_gpus_and_its_user_the_image_s(self, overlay):
        deployment, container = server_of(overlay)
        gpu = compose_services("-f", "docker-compose.yml", "-f", "deploy/compose/gpu.yml")["server"]
        assert container["image"] == gpu["image"]
        context = deployment["spec"]["template"]["spec"]["securityContext"]
        assert f"{context['runAsUser']}:{context['runAsGroup']}" == dockerfile_stages()["cuda"].last("USER")

    def test_a_pod_outlives_the_drain(self, overlay):
        deployment, container = server_of(overlay)
        (options,) = (data["data"] for name, data in of_kind(overlay, "ConfigMap").items() if name.startswith("medusa-options"))
        pre_stop_s = container["lifecycle"]["preStop"]["sleep"]["seconds"]
        needed_s = pre_stop_s + float(options["MEDUSA_DRAIN_TIMEOUT_S"]) + CLOSE_TIMEOUT_S
        assert deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > needed_s

    def test_options_are_options_of_the_server(self, overlay, monkeypatch):
        (options,) = (data["data"] for name, data in of_kind(overlay, "ConfigMap").items() if name.startswith("medusa-options"))
        for name in ServerSettings.model_fields:
            monkeypatch.delenv(f"MEDUSA_{name.upper()}", raising=False)
        for name, value in options.items():
            assert name.removeprefix("MEDUSA_").lower() in ServerSettings.model_fields
            monkeypatch.setenv(name, value)
        ServerSettings()

    def test_the_server_asks_for_keys_that_come_from_a_secret_which_must_exist(self, overlay):
        deployment, container = server_of(overlay)
        (options,) = (data["data"] for name, data in of_kind(overlay, "ConfigMap").items() if name.startswith("medusa-options"))
        (mount,) = (mount for mount in container["volumeMounts"] if mount["name"] == "keys")
        assert options["MEDUSA_API_KEY_FILE"] == f"{mount['mountPath']}/keys.toml"
        (volume,) = (volume for volume in deployment["spec"]["template"]["spec"]["volumes"] if volume["name"] == "keys")
        assert not volume["secret"].get("optional")

    def test_probes_ask_routes_that_the_server_has_on_its_port(self, overlay):
        _, container = server_of(overlay)
        paths = create_app(FakeClient(), lambda info: FakeText(), ServerSettings()).openapi()["paths"]
        probes = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")}
        assert {name: probe["path"] for name, probe in probes.items()} == {
            "startup": "/ready",
            "readiness": "/ready",
            "liveness": "/health",
        }
        assert {probe["path"] for probe in probes.values()} <= set(paths)
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert {str(ports[probe["port"]]) for probe in probes.values()} <= set(dockerfile_stages()["cuda"].entry_point)

    def test_a_slow_start_ends_before_the_roll_out_is_given_up(self, overlay):
        deployment, container = server_of(overlay)
        probe = container["startupProbe"]
        assert probe["periodSeconds"] * probe["failureThreshold"] < deployment["spec"]["progressDeadlineSeconds"]

    def test_what_the_image_writes_is_mounted(self, overlay):
        """The image's volume, the compiled kernels, and /tmp: test_read_only.py shows that it is no more."""
        _, container = server_of(overlay)
        mounts = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
        stage = dockerfile_stages()["cuda"]
        assert mounts == {stage.last("VOLUME"), "/tmp"}
        kernels = next(rest for name, rest in stage.instructions if name == "ENV" and "TRITON_CACHE_DIR" in rest)
        assert kernels.split("=")[1].startswith(stage.last("VOLUME"))


class TestMonitoring:
    @pytest.mark.parametrize("overlay", OVERLAYS)
    def test_alerts_and_dashboards_come_along(self, overlay):
        assert of_kind(overlay, "PrometheusRule")
        dashboards = of_kind(overlay, "ConfigMap")["medusa-dashboards"]
        assert set(dashboards["data"]) == {path.name for path in (ROOT / "deploy/grafana/dashboards/json").iterdir()}
        # Larger ones do not fit into the annotation in which kubectl keeps what it applied.
        assert sum(map(len, dashboards["data"].values())) < 262_144

    def test_the_alert_on_a_dead_engine_comes_before_the_probe_that_ends_the_container(self):
        (alert,) = (
            rule
            for group in of_kind("single", "PrometheusRule")["medusa-server"]["spec"]["groups"]
            for rule in group["rules"]
            if rule.get("alert") == "MedusaEngineDown"
        )
        (endpoint,) = of_kind("single", "ServiceMonitor")["medusa-server"]["spec"]["endpoints"]
        for_s = 60 * int(alert["for"].removesuffix("m"))
        # The operator evaluates each 30 s by default: once until the alert is pending, and once more when `for` has passed.
        latest_s = int(endpoint["interval"].removesuffix("s")) + for_s + 2 * 30
        _, container = server_of("single")
        probe = container["livenessProbe"]
        assert latest_s < probe["periodSeconds"] * (probe["failureThreshold"] - 1)

    def test_the_rules_are_those_of_compose(self):
        assert TARGET.read_text() == prometheus_rule(), "run python -m deploy.k8s.prometheus_rule"


class TestAutoscaling:
    METRICS = ("medusa_num_requests_waiting", "medusa_num_requests_running")

    @pytest.mark.parametrize("overlay", ["replicas", "gateway-inference-extension"])
    def test_it_scales_the_server_and_nobody_else_sets_the_number(self, overlay):
        spec = of_kind(overlay, "HorizontalPodAutoscaler")["medusa-server"]["spec"]
        deployment, _ = server_of(overlay)
        assert spec["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": "medusa-server"}
        assert "replicas" not in deployment["spec"]
        assert tuple(metric["pods"]["metric"]["name"] for metric in spec["metrics"]) == self.METRICS

    def test_the_adapter_finds_its_metrics_and_the_server_exposes_them(self, exposed_names):
        (rule,) = load_yaml("deploy/k8s/components/autoscaling/prometheus-adapter-values.yaml")["rules"]["custom"]
        pattern = re.search(r'__name__=~"([^"]+)"', rule["seriesQuery"])[1]
        assert all(re.fullmatch(pattern, name) for name in self.METRICS)
        assert set(self.METRICS) <= exposed_names

    def test_one_replica_has_no_disruption_budget_that_would_block_drains_of_its_node(self):
        assert of_kind("single", "PodDisruptionBudget") == {}


class TestRouter:
    def test_it_runs_compose_s_image_with_the_same_policy_but_finds_replicas_by_their_label(self):
        (router,) = of_kind("replicas", "Deployment")["medusa-router"]["spec"]["template"]["spec"]["containers"]
        compose = compose_services("--profile", "scale")["router"]
        assert router["image"] == compose["image"]
        flags = {flag for flag in compose["command"] if "=" in flag}
        assert flags <= set(router["args"])
        name, _, value = router["args"][router["args"].index("--selector") + 1].partition("=")
        deployment, container = server_of("replicas")
        assert deployment["spec"]["template"]["metadata"]["labels"][name] == value
        assert f"--service-discovery-port={container['ports'][0]['containerPort']}" in router["args"]


class TestGateway:
    OVERLAY = "gateway-inference-extension"

    def test_route_pool_and_picker_know_each_other(self):
        (route,) = of_kind(self.OVERLAY, "HTTPRoute").values()
        (pool,) = of_kind(self.OVERLAY, "InferencePool").values()
        backend = route["spec"]["rules"][0]["backendRefs"][0]
        assert (backend["kind"], backend["name"]) == ("InferencePool", pool["metadata"]["name"])
        assert f"{backend['group']}/v1" == pool["apiVersion"]
        reference = pool["spec"]["endpointPickerRef"]
        service = of_kind(self.OVERLAY, "Service")[reference["name"]]
        assert reference["port"]["number"] in {port["port"] for port in service["spec"]["ports"]}
        _, container = server_of(self.OVERLAY)
        assert pool["spec"]["targetPorts"] == [{"number": container["ports"][0]["containerPort"]}]

    def test_the_picker_s_arguments_name_the_pool_and_metrics_that_are_exposed(self, exposed_names):
        (picker,) = of_kind(self.OVERLAY, "Deployment")["medusa-endpoint-picker"]["spec"]["template"]["spec"]["containers"]
        flags = dict(argument.removeprefix("--").split("=", 1) for argument in picker["args"])
        assert flags["pool-name"] in of_kind(self.OVERLAY, "InferencePool")
        metrics = {value for name, value in flags.items() if name.endswith("-metric") and value}
        assert len(metrics) == 3
        assert metrics <= exposed_names
        config = next(data for name, data in of_kind(self.OVERLAY, "ConfigMap").items() if "endpoint-picker" in name)
        assert flags["config-file"].removeprefix("/config/") in config["data"]

    def test_only_the_api_is_reached_from_outside(self):
        (route,) = of_kind(self.OVERLAY, "HTTPRoute").values()
        assert [match["path"] for rule in route["spec"]["rules"] for match in rule["matches"]] == [
            {"type": "PathPrefix", "value": "/v1"}
        ]

"""docker-compose.yml as docker compose itself reads it, with each profile and with the file for GPUs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from server.settings import ServerSettings
from tests.deploy.deployment import ROOT, compose_services, dockerfile_stages, load_yaml, run_tool

SCALE = ("--profile", "scale")
GPU = ("-f", "docker-compose.yml", "-f", "deploy/compose/gpu.yml")
VARIANTS = [(), SCALE, GPU, (*GPU, *SCALE)]
DRAIN_S = ServerSettings.model_fields["drain_timeout_s"].default


def seconds(duration: str) -> int:
    """Of a duration as compose prints it."""
    match = re.fullmatch(r"(?:(\d+)m)?(?:(\d+)s)?", duration)
    return 60 * int(match[1] or 0) + int(match[2] or 0)


@pytest.mark.parametrize("arguments", VARIANTS, ids=lambda arguments: " ".join(arguments) or "default")
class TestEveryVariant:
    def test_mounted_files_exist(self, arguments):
        volumes = [volume for service in compose_services(*arguments).values() for volume in service.get("volumes", ())]
        paths = [Path(volume["source"]) for volume in volumes if volume["type"] == "bind"]
        assert paths
        assert [path for path in paths if not path.exists()] == []

    def test_images_are_pinned_and_built_from_targets_that_exist(self, arguments):
        for service in compose_services(*arguments).values():
            assert re.search(r":v?\d+\.\d+\.\d+(-cuda)?$", service["image"])
            if "build" in service:
                assert service["build"]["target"] in dockerfile_stages()

    def test_no_two_services_want_one_port(self, arguments):
        ports = [port["published"] for service in compose_services(*arguments).values() for port in service.get("ports", ())]
        assert len(ports) == len(set(ports))

    def test_our_containers_are_hardened(self, arguments):
        ours = {name: service for name, service in compose_services(*arguments).items() if "build" in service}
        assert ours
        for service in ours.values():
            assert service["read_only"]
            assert service["cap_drop"] == ["ALL"]
            assert service["security_opt"] == ["no-new-privileges:true"]
            assert service["tmpfs"] == ["/tmp"]

    def test_containers_of_the_server_outlive_its_drain(self, arguments):
        ours = [service for service in compose_services(*arguments).values() if "build" in service]
        assert all(seconds(service["stop_grace_period"]) > DRAIN_S for service in ours)

    def test_grafana_asks_a_prometheus_that_runs(self, arguments):
        services = compose_services(*arguments)
        url = services["grafana"]["environment"]["PROMETHEUS_URL"]
        networks = {name: (service.get("networks") or {}).get("default") or {} for name, service in services.items()}
        names = set(services) | {alias for network in networks.values() for alias in network.get("aliases", ())}
        assert re.fullmatch(r"http://([\w-]+):9090", url)[1] in names

    def test_prometheus_scrapes_every_server_and_the_router_and_finds_its_rules(self, arguments):
        services = compose_services(*arguments)
        (prometheus,) = (service for service in services.values() if service["image"].startswith("prom/prometheus:"))
        mounts = {volume["target"]: volume["source"] for volume in prometheus["volumes"]}
        config = load_yaml(str(Path(mounts["/etc/prometheus/prometheus.yml"]).relative_to(ROOT)))
        targets = {target for job in config["scrape_configs"] for static in job["static_configs"] for target in static["targets"]}
        ports = {"router": 29000}
        assert targets == {f"{name}:{ports.get(name, 8000)}" for name, service in services.items() if "build" in service}
        assert {f"/etc/prometheus/{Path(pattern).parent}" for pattern in config.get("rule_files", ())} <= set(mounts)


def test_the_default_is_one_server_and_the_profile_scale_two_workers_and_a_router():
    ours = {arguments: {name for name, s in compose_services(*arguments).items() if "build" in s} for arguments in ((), SCALE)}
    assert ours == {(): {"server"}, SCALE: {"worker-1", "worker-2", "router"}}


def test_users_reach_port_8000_in_either_profile_and_the_router_s_from_this_machine_only():
    (server,), (router,) = compose_services()["server"]["ports"], compose_services(*SCALE)["router"]["ports"]
    assert server["published"] == router["published"] == "8000"
    assert router["host_ip"] == "127.0.0.1"


def test_the_router_knows_the_workers_and_its_metrics_port_is_the_scraped_one():
    command = compose_services(*SCALE)["router"]["command"]
    workers = command[command.index("--worker-urls") + 1 :][:2]
    assert workers == ["http://worker-1:8000", "http://worker-2:8000"]
    assert "--prometheus-port=29000" in command


def test_the_router_has_the_flags_that_the_page_on_scaling_explains():
    page = (ROOT / "docs/scaling.md").read_text()
    shown = re.search(r"```sh\nvllm-router ([^`]*)```", page)[1].replace("\\\n", " ")
    flags = [(flag, value) for flag, value in re.findall(r"--([\w-]+) (\S+)", shown) if flag not in ("host", "port", "worker-urls")]
    assert ("balance-abs-threshold", "16") in flags
    assert {f"--{flag}={value}" for flag, value in flags} <= set(compose_services(*SCALE)["router"]["command"])


def test_with_the_gpu_file_each_worker_has_a_gpu_of_its_own():
    services = compose_services(*GPU, *SCALE)
    devices = {name: services[name]["deploy"]["resources"]["reservations"]["devices"] for name in ("worker-1", "worker-2")}
    assert devices["worker-1"][0]["device_ids"] != devices["worker-2"][0]["device_ids"]
    assert {services[name]["build"]["target"] for name in devices} == {"cuda"}


def test_the_two_configurations_of_prometheus_differ_only_in_what_they_scrape():
    single, scale = load_yaml("deploy/prometheus/prometheus.yml"), load_yaml("deploy/prometheus/scale.yml")
    assert scale.pop("scrape_configs")[0]["job_name"] == single.pop("scrape_configs")[0]["job_name"]
    assert single == scale


def test_options_come_from_a_file_that_may_be_missing(tmp_path):
    # Compose resolves paths from the folder of the first file.
    for name in ("docker-compose.yml", ".env"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / "medusa.env").write_text("MEDUSA_MAX_NUM_SEQS=16\n")
    assert "MEDUSA_MAX_NUM_SEQS" not in run_tool("docker-compose", "config")
    assert 'MEDUSA_MAX_NUM_SEQS: "16"' in run_tool("docker-compose", "config", cwd=tmp_path)

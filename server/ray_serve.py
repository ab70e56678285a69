"""The same app on Ray Serve: two applications that `serve run` and `serve deploy` build from a config file (deploy/ray).

Ray routes, queues, scales and replaces; a replica is one engine with the app in front of it. Needs the extra `ray`.

Replicas share the port of Ray's proxy, where each scrape would meet another one. So each replica shows its metrics on a port
of its own as well, and the second application lists these ports in the form of Prometheus' HTTP service discovery.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Generator
from typing import Any

import ray
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.exceptions import RayError
from ray.serve import Application
from ray.serve.exceptions import RayServeException
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from medusa_core.engine.logs import configure_logging
from medusa_core.engine.worker_client import WorkerClient
from medusa_core.errors import ConfigError, EngineDeadError
from server.answers import http_error_response, json_response
from server.app import create_app
from server.connection import connection_options
from server.serving import Serving, text_loader
from server.settings import ServerSettings, check_settings

# Options of the server that Ray has its own for, and where.
RAYS_OPTIONS = {"host": "http_options.host", "port": "http_options.port", "api_workers": "num_replicas or autoscaling_config"}
# What a replica answers on the port of its own; generation goes through Ray, which counts it.
OWN_PATHS = frozenset({"/metrics", "/health", "/ready"})
# Ports tried from `metrics_port` on: as many replicas as one machine will hold.
NUM_PORTS = 64
# A replica says this often that it is there, and is no longer listed when it has been silent for so long.
ANNOUNCE_S = 3.0
FORGET_S = 15.0
# Beyond the drain: ending the engine's process.
CLOSE_S = 15.0


class ReplicaOptions(BaseModel):
    """`args` of the application in the config file.

    server: options of `medusa-server` by field name, such as max_num_seqs. metrics_port: where the first replica of a machine
    shows its metrics, the next ones on the ports above; 0 takes any free port. targets_app: name of the application that
    lists these ports.
    """

    model_config = ConfigDict(extra="forbid")

    server: dict[str, Any] = {}
    metrics_port: int = Field(9400, ge=0, le=65535 - NUM_PORTS)
    targets_app: str = "medusa-metrics"


def build(args: dict[str, Any]) -> Application:
    """The application that answers requests; `args` as in ReplicaOptions.

    Raises ValidationError or ConfigError, which Ray shows as the reason why a deployment failed.
    """
    given = ReplicaOptions.model_validate(args)
    for name, instead in RAYS_OPTIONS.items():
        if name in given.server:
            raise ConfigError(f"server.{name} has no meaning behind Ray's proxy.", hint=f"Set {instead} in the config file.")
    settings = check_settings(given.server)
    # What the config file says under `deployments` wins over these.
    options = {
        "ray_actor_options": {"num_gpus": _num_gpus(settings)},
        "max_ongoing_requests": settings.max_num_seqs,
        "graceful_shutdown_timeout_s": settings.drain_timeout_s + CLOSE_S,
    }
    # The app writes its own access log, with durations and request ids.
    deployment = serve.deployment(name="MedusaServer", logging_config={"enable_access_log": False}, **options)
    return deployment(serve.ingress()(Replica)).bind(settings, given.metrics_port, given.targets_app)


def _num_gpus(settings: ServerSettings) -> int:
    if settings.device == "auto":
        return 1 if ray.cluster_resources().get("GPU", 0) else 0
    return 0 if settings.device == "cpu" else 1


class Replica:
    """It counts as started once it is constructed, which is when the model is loaded."""

    # Ray awaits it.
    async def __init__(self, settings: ServerSettings, metrics_port: int, targets_app: str) -> None:  # type: ignore[misc]
        log_level = settings.log_level.upper()
        configure_logging(log_level, settings.log_format)
        client = WorkerClient(settings.engine_config(), log_level=log_level, log_format=settings.log_format)
        loaded: asyncio.Future[asyncio.Task[None]] = asyncio.get_running_loop().create_future()
        self._app = create_app(client, text_loader(settings), settings, on_load_end=loaded.set_result)
        self._serving: Serving = self._app.state.serving
        self._open = contextlib.AsyncExitStack()
        try:
            await self._open.enter_async_context(self._app.router.lifespan_context(self._app))
            # Raises why the model could not be loaded; Ray shows it.
            (await loaded).result()
            address = await self._open.enter_async_context(_own_port(self._app, settings, metrics_port))
            await self._open.enter_async_context(_announced(address, targets_app))
        except BaseException:
            await self._open.aclose()
            raise

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return _inside_ray(self._app)

    async def check_health(self) -> None:
        """Ray replaces a replica of which this raises three times in a row."""
        if not self._serving.is_healthy:
            raise EngineDeadError("The engine is dead.", hint="Its log has the cause.")

    async def __del__(self) -> None:
        # Called once the requests in progress have ended or their time is up.
        await self._open.aclose()


def _inside_ray(app: FastAPI) -> ASGIApp:
    """`app` without what Ray does too: it adds x-request-id, the same id, and starts lifespans where nobody sees why one failed."""

    async def respond(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            for event in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{event}.complete"})
            return

        def send_without_id(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                del MutableHeaders(scope=message)["x-request-id"]
            return send(message)

        await app(scope, receive, send_without_id)

    return respond


class _OwnServer(uvicorn.Server):
    """Signals stay with Ray."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


@contextlib.asynccontextmanager
async def _own_port(app: FastAPI, settings: ServerSettings, first_port: int) -> AsyncIterator[str]:
    """Serves `OWN_PATHS` of `app` on this machine's address in the cluster. Gives `host:port`; raises ConfigError."""

    async def respond(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in OWN_PATHS:
            await app(scope, receive, send)
        else:
            message = f"{scope['path'][:200]}: not on a replica's own port, which has {', '.join(sorted(OWN_PATHS))}."
            await http_error_response(404, message, code="not_found")(scope, receive, send)

    host = ray.util.get_node_ip_address()
    with _listen(host, first_port) as listener:
        config = uvicorn.Config(
            respond, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=1, **connection_options(settings)
        )
        server = _OwnServer(config)
        serving = asyncio.create_task(server.serve(sockets=[listener]), name="own-port")
        try:
            port = listener.getsockname()[1]
            yield f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        finally:
            server.should_exit = True
            await serving


def _listen(host: str, first_port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in range(first_port, first_port + NUM_PORTS) if first_port else [0]:
        try:
            return socket.create_server((host, port), family=family)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
    raise ConfigError(
        f"metrics_port: {first_port} and the {NUM_PORTS - 1} ports above it are taken on {host}.", hint="Choose another, or 0."
    )


@contextlib.asynccontextmanager
async def _announced(address: str, targets_app: str) -> AsyncIterator[None]:
    """While it is open, the application `targets_app` lists `address`."""
    targets = serve.get_deployment_handle(MetricsTargets.__name__, app_name=targets_app)
    replica = serve.get_replica_context().replica_id.unique_id

    async def tell(address: str | None) -> None:
        # The application may be restarting or not there yet. Answers do not depend on it.
        with contextlib.suppress(RayError, RayServeException, TimeoutError):
            async with asyncio.timeout(ANNOUNCE_S):
                await targets.announce.remote(replica, address)

    async def announce() -> None:
        while True:
            await tell(address)
            await asyncio.sleep(ANNOUNCE_S)

    announcing = asyncio.create_task(announce(), name="announce")
    try:
        yield
    finally:
        announcing.cancel()
        await asyncio.gather(announcing, return_exceptions=True)
        await tell(None)


class MetricsTargets:
    """Where the metrics of each replica are, for Prometheus' `http_sd_configs`.

    Replicas repeat themselves, so it knows them again soon after a restart, and forgets those that were killed.
    """

    def __init__(self) -> None:
        # by replica: address, and when it was last heard of
        self._seen: dict[str, tuple[str, float]] = {}

    def announce(self, replica: str, address: str | None) -> None:
        """None: it leaves."""
        if address is None:
            self._seen.pop(replica, None)
        else:
            self._seen[replica] = (address, time.monotonic())

    async def __call__(self, request: Request) -> Response:
        if not request.scope["path"].endswith("/targets"):
            message = "Behind Ray Serve each replica has its own metrics; /metrics/targets lists where."
            return http_error_response(404, message, code="not_found")
        oldest = time.monotonic() - FORGET_S
        self._seen = {replica: seen for replica, seen in self._seen.items() if seen[1] > oldest}
        groups = [{"targets": [address], "labels": {"replica": replica}} for replica, (address, _) in sorted(self._seen.items())]
        return json_response(json.dumps(groups).encode())


# The application under /metrics. It is called every few seconds by each replica, which nobody wants to read about.
metrics_targets = serve.deployment(
    name=MetricsTargets.__name__,
    ray_actor_options={"num_cpus": 0},
    max_ongoing_requests=100,
    logging_config={"enable_access_log": False},
)(MetricsTargets).bind()

# Images of the server and of the router before several of them. Targets:
#
#   docker build -t medusa-server .                           cpu, the default
#   docker build -t medusa-server:cuda --target cuda .        NVIDIA GPUs; the host needs the NVIDIA container toolkit
#   docker build -t medusa-router --target router .           vllm-router, for several servers
#
# Arguments:
#   TORCH_INDEX   for cpu: wheel index of torch's CPU builds, as named on PyTorch's install page. Without it the image carries CUDA
#                 libraries that it does not use, some gigabytes
#   EXTRAS        "demo" (default) bakes the demo model in; empty leaves it out
#   PYTHON_IMAGE  base of all targets. For builds that are the same to the bit give its digest, PYTHON_IMAGE=python@sha256:..., which
#                 `docker buildx imagetools inspect python:3.12.12-slim-bookworm` tells
#   REVISION, CREATED   for labels: the commit, and the time of the build (RFC 3339)
#
# Every Python package comes from deploy/locks/, with hashes; torch's CPU builds alone are pinned by version only, as their files differ
# from the locked ones. torch's CUDA wheels carry the CUDA libraries, so the slim Python image is all that a GPU image needs below them.
ARG PYTHON_IMAGE=python:3.12.12-slim-bookworm

FROM ${PYTHON_IMAGE} AS base
# The id is above those that distributions give to their first user.
RUN groupadd --gid 10001 medusa \
    && useradd --uid 10001 --gid 10001 --create-home medusa \
    && install -d -o medusa -g medusa /home/medusa/.cache
COPY --chmod=755 deploy/docker/healthcheck.py /usr/local/bin/healthcheck
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1

FROM base AS build
ARG TORCH_INDEX=""
ARG TORCH_VERSION=2.13.0
ARG EXTRAS="demo"
# The largest layer, and the one that changes least.
COPY deploy/locks/torch-cuda.txt /locks/
RUN python3 -m venv /opt/venv \
    && if [ -n "${TORCH_INDEX}" ]; then \
        pip install --no-cache-dir --no-deps --index-url "${TORCH_INDEX}" "torch==${TORCH_VERSION}"; \
    else \
        pip install --no-cache-dir --no-deps --require-hashes -r /locks/torch-cuda.txt; \
    fi
COPY deploy/locks/server.txt deploy/locks/demo.txt /locks/
RUN for lock in server ${EXTRAS}; do \
        pip install --no-cache-dir --no-deps --require-hashes -r "/locks/${lock}.txt" || exit 1; \
    done
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY medusa_core medusa_core
COPY server server
# Built with the setuptools of the lock; `pip check` finds what the lock lacks.
RUN pip install --no-cache-dir --no-deps --no-build-isolation . && pip check

FROM base AS build-router
COPY deploy/locks/router.txt /locks/
RUN python3 -m venv /opt/venv && pip install --no-cache-dir --no-deps --require-hashes -r /locks/router.txt

FROM base AS router
ARG REVISION=""
ARG CREATED=""
LABEL org.opencontainers.image.title="medusa-router" \
      org.opencontainers.image.description="vllm-router, to put before several medusa-servers" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}"
COPY --from=build-router /opt/venv /opt/venv
USER 10001:10001
WORKDIR /home/medusa
EXPOSE 8000 29000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s CMD ["healthcheck", "http://127.0.0.1:8000/readiness"]
ENTRYPOINT ["vllm-router", "--host", "0.0.0.0", "--port", "8000"]

FROM base AS server
ARG REVISION=""
ARG CREATED=""
LABEL org.opencontainers.image.title="medusa-server" \
      org.opencontainers.image.description="OpenAI-compatible server for language models with Medusa heads" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}"
# Compiled kernels stay in the volume, with the models.
ENV TRITON_CACHE_DIR=/home/medusa/.cache/triton
WORKDIR /home/medusa
# Downloaded and dequantised models.
VOLUME /home/medusa/.cache
EXPOSE 8000
STOPSIGNAL SIGTERM
# Loading takes minutes for large models; /health answers as soon as the process is up.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s CMD ["healthcheck", "http://127.0.0.1:8000/health"]
ENTRYPOINT ["medusa-server", "--host", "0.0.0.0", "--port", "8000"]

FROM server AS cuda
# Triton compiles the launchers of its kernels with a C compiler, at the first start. Versions are not pinned: Debian deletes a
# package when a newer one supersedes it, and the build would fail from that day on.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
# For the NVIDIA container toolkit: all GPUs that the runtime grants, compute and nvidia-smi; it refuses drivers too old for the wheels.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility NVIDIA_REQUIRE_CUDA="cuda>=13.0"
COPY --from=build /opt/venv /opt/venv
# As a number, so that an orchestrator can tell that this is not root.
USER 10001:10001

FROM server AS cpu
COPY --from=build /opt/venv /opt/venv
USER 10001:10001

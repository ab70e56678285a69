# CPU by default. For NVIDIA GPUs (torch's wheels carry the CUDA libraries; the C compiler is for Triton's launchers):
#
#   docker build -t medusa-server:cuda \
#     --build-arg BASE_IMAGE=nvidia/cuda:12.8.1-base-ubuntu24.04 \
#     --build-arg SYSTEM_PACKAGES="python3 python3-venv python3-dev gcc" .
#
# TORCH_INDEX: wheel index for torch, e.g. the one of CPU builds named on PyTorch's install page; without it the image carries
# CUDA libraries even if it never uses them. EXTRAS: "demo" bakes the demo model in; empty leaves it out.
ARG BASE_IMAGE=python:3.12-slim-bookworm

FROM ${BASE_IMAGE} AS base
ARG SYSTEM_PACKAGES=""
RUN if [ -n "${SYSTEM_PACKAGES}" ]; then \
        apt-get update && apt-get install -y --no-install-recommends ${SYSTEM_PACKAGES} && rm -rf /var/lib/apt/lists/*; \
    fi

FROM base AS build
ARG TORCH_INDEX=""
ARG EXTRAS="demo"
RUN python3 -m venv /opt/venv
# torch first and alone: the largest layer, and the one that changes least.
RUN /opt/venv/bin/pip install --no-cache-dir "torch==2.13.0" ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"}
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY medusa_core medusa_core
COPY server server
RUN /opt/venv/bin/pip install --no-cache-dir ".${EXTRAS:+[${EXTRAS}]}"

FROM base
# The id is above those that distributions give to their first user.
RUN useradd --create-home --uid 10001 medusa && install -d -o medusa /home/medusa/.cache
COPY --from=build /opt/venv /opt/venv
# Compiled kernels stay in the volume, with the models.
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 TRITON_CACHE_DIR=/home/medusa/.cache/triton
# As a number, so that an orchestrator can tell that this is not root.
USER 10001
WORKDIR /home/medusa
# Downloaded and dequantised models.
VOLUME /home/medusa/.cache
EXPOSE 8000
# Loading takes minutes for large models; /health answers as soon as the process is up.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
    CMD ["python3", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["medusa-server", "--host", "0.0.0.0"]

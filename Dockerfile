# syntax=docker/dockerfile:1
# The image of `mla-moe launch gke`:  docker build --target cpu|tpu|cuda -t mla_moe .
# Recipes are in the folder where commands start, under the same path as in the repository: configs/quickstart.py.

FROM python:3.12-slim AS build
# math-verify and reasoning-gym, of the extra rl, compile one of their dependencies.
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
WORKDIR /source
COPY pyproject.toml requirements.lock README.md LICENSE ./
COPY mla_moe mla_moe
ARG EXTRAS=s3,gcs,serve,rl,parquet
RUN /opt/venv/bin/pip install --no-cache-dir -c requirements.lock ".[$EXTRAS]"

FROM build AS build-tpu
RUN /opt/venv/bin/pip install --no-cache-dir -c requirements.lock ".[tpu]"

FROM build AS build-cuda
RUN /opt/venv/bin/pip install --no-cache-dir -c requirements.lock ".[cuda]"

FROM python:3.12-slim AS runtime
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
WORKDIR /workspace
COPY configs configs
CMD ["mla-moe", "--help"]

FROM runtime AS tpu
COPY --from=build-tpu /opt/venv /opt/venv

# The CUDA libraries come as wheels with the extra; the driver is the host's.
FROM runtime AS cuda
COPY --from=build-cuda /opt/venv /opt/venv

FROM runtime AS cpu
COPY --from=build /opt/venv /opt/venv

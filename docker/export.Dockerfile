# The export stage: a checkpoint in, a bundle out, then the container is done. Build from the repository's root:
#   docker build -f docker/export.Dockerfile -t onnxlate-export .
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/data" onnxlate-export CHECKPOINT BUNDLE --precision int8
FROM python:3.13-slim-bookworm AS builder
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# The build of torch, handed to pip as it is; the Makefile's TORCH is the same.
ARG TORCH="torch==2.13.0"
WORKDIR /build
COPY requirements/build.txt requirements/export.txt requirements/
RUN python -m venv /opt/build && /opt/build/bin/pip install --require-hashes -r requirements/build.txt
# The locked packages first: torch then finds its dependencies there and adds only itself. TORCH may hold options, so it is split.
# hadolint ignore=SC2086
RUN python -m venv /opt/onnxlate && /opt/onnxlate/bin/pip install --require-hashes -r requirements/export.txt \
    && /opt/onnxlate/bin/pip install $TORCH
COPY LICENSE README.md pyproject.toml ./
COPY serving serving
COPY export export
RUN /opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir dist .
RUN /opt/onnxlate/bin/pip install --no-deps --no-index dist/*.whl && /opt/onnxlate/bin/pip check

FROM python:3.13-slim-bookworm
RUN apt-get update && apt-get install --yes --no-install-recommends "tini=0.19.*" && rm -rf /var/lib/apt/lists/*
COPY --from=builder /opt/onnxlate /opt/onnxlate
# torch looks for a home and a name, and the numeric user has neither.
ENV PATH=/opt/onnxlate/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HOME=/tmp USER=onnxlate
USER 10001:10001
# Checkpoints are read and bundles written below /data, which is mounted.
WORKDIR /data
# It answers no one: a healthcheck would have nothing to ask.
HEALTHCHECK NONE
ENTRYPOINT ["/usr/bin/tini", "--", "onnxlate", "export"]
CMD ["--help"]

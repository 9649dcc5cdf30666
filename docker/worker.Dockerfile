# The worker process: the model and the one HTTP route the API calls. Mount a bundle read-only at /bundle.
#   docker build -f docker/worker.Dockerfile -t padrec-worker:0.1.0 .
# For NVIDIA GPUs, name the wheel index of your CUDA version; the wheels bring the CUDA libraries, so the base image
# stays the same and the host needs only the driver and the NVIDIA container toolkit:
#   docker build -f docker/worker.Dockerfile -t padrec-worker:0.1.0-cuda \
#     --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
#   docker run --gpus 1 -e PADREC_DEVICE=cuda -v "$PWD/bundle:/bundle:ro" padrec-worker:0.1.0-cuda
# For training (deploy/jobs/train), either with --build-arg EXTRAS=worker,train.

FROM python:3.11.16-slim-trixie@sha256:e41613d42d4891e4930f79523f93f81bbc7632584ec65e36ab055f41a800b41e AS python


FROM python AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=worker
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
# The compiler stays in this stage: it builds model/native/kernel.cpp.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/padrec
WORKDIR /src
COPY constraints.txt ./
# Only torch comes from that index, and first: what it needs comes from PyPI with everything else, pinned.
RUN /opt/padrec/bin/pip install --no-deps --index-url "${TORCH_INDEX}" -c constraints.txt torch
COPY pyproject.toml README.md LICENSE ./
COPY service service
COPY model model
RUN /opt/padrec/bin/pip install -c constraints.txt ".[${EXTRAS}]" && /opt/padrec/bin/pip check


FROM python
LABEL org.opencontainers.image.title="padrec-worker" \
      org.opencontainers.image.description="padrec: the model worker" \
      org.opencontainers.image.licenses="Apache-2.0"
# The Hugging Face variable: everything is read from the bundle, nothing is ever fetched.
ENV PATH=/opt/padrec/bin:$PATH \
    HOME=/tmp \
    HF_HUB_OFFLINE=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    PADREC_HOST=0.0.0.0 \
    PADREC_PORT=8001 \
    PADREC_BUNDLE=/bundle
COPY --from=build /opt/padrec /opt/padrec
WORKDIR /tmp
USER 10001:0
EXPOSE 8001
# The proxy settings of the environment are left out: this never leaves the container. The long start is the warm-up.
HEALTHCHECK --interval=10s --timeout=3s --start-period=300s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as u; u.build_opener(u.ProxyHandler({})).open('http://127.0.0.1:' + os.environ['PADREC_PORT'] + '/healthz', timeout=2)"]
ENTRYPOINT ["padrec"]
CMD ["worker"]

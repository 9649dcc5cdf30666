# The API process: sockets only, no torch, no model code, no compiler.
#   docker build -f docker/api.Dockerfile -t padrec-api:0.1.0 .
# It holds no state. Give it PADREC_REDIS_URL and PADREC_WORKER_URLS, and PADREC_CATALOG_FILE for a durable copy of
# the catalog (catalog.jsonl of a bundle). It writes nothing, so it runs with a read-only root.

FROM python:3.11.16-slim-trixie@sha256:e41613d42d4891e4930f79523f93f81bbc7632584ec65e36ab055f41a800b41e AS python


FROM python AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/padrec
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY service service
RUN /opt/padrec/bin/pip install -c constraints.txt . && /opt/padrec/bin/pip check


FROM python
LABEL org.opencontainers.image.title="padrec-api" \
      org.opencontainers.image.description="padrec: the public API" \
      org.opencontainers.image.licenses="Apache-2.0"
ENV PATH=/opt/padrec/bin:$PATH \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    PADREC_HOST=0.0.0.0 \
    PADREC_PORT=8000
COPY --from=build /opt/padrec /opt/padrec
WORKDIR /tmp
USER 10001:0
EXPOSE 8000
# The proxy settings of the environment are left out: this never leaves the container.
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as u; u.build_opener(u.ProxyHandler({})).open('http://127.0.0.1:' + os.environ['PADREC_PORT'] + '/healthz', timeout=2)"]
ENTRYPOINT ["padrec"]
CMD ["api"]

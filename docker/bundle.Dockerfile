# A bundle as an image, to be mounted as a volume; it holds files and runs nothing. The build context is the bundle:
#   docker build -f docker/bundle.Dockerfile -t padrec-bundle:movielens-100k model/bundles/movielens-100k
FROM scratch
LABEL org.opencontainers.image.title="padrec-bundle" \
      org.opencontainers.image.description="padrec: target, draft and catalog" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY . /
USER 10001:0

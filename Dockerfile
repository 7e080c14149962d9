# docker build -t vitmodel . && docker run --rm -v "$PWD/data:/data" vitmodel etl /data/release /data/crops
# CPU only. The build step is the README's `make install`; the container runs as the user vitmodel, not as root.
FROM python:3.12-slim

RUN apt-get update && apt-get install --yes --no-install-recommends make && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 1000 vitmodel && install --directory --owner=vitmodel /opt/vitmodel /data

USER vitmodel
WORKDIR /opt/vitmodel
COPY --chown=vitmodel . .
# PyPI's torch brings CUDA; PyTorch's CPU index has the same version without it
ENV PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu PIP_NO_CACHE_DIR=1
RUN make install
# docker build --build-arg EXTRAS=node -t vitmodel .   for `vitmodel node`; several are separated by commas
ARG EXTRAS=""
RUN if [ -n "$EXTRAS" ]; then .venv/bin/pip install --constraint constraints.txt --editable ".[$EXTRAS]"; fi

WORKDIR /data
ENTRYPOINT ["/opt/vitmodel/.venv/bin/vitmodel"]
CMD ["--help"]

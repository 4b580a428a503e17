# Two images that serve a checkpoint: `docker build --target cpu .` and `docker build --target cuda .`
#     docker run --rm -p 8000:8000 -v /path/to/checkpoint:/checkpoint:ro trine          (cuda: add --gpus all)
# A CPU-only torch: docker build --target cpu --build-arg PIP_ARGS="..." .
FROM python:3.12-slim AS base
RUN apt-get update && apt-get install --yes --no-install-recommends libgomp1 make && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home trine && mkdir /trine && chown trine /trine
WORKDIR /trine
ENV PATH="/trine/.venv/bin:$PATH"
EXPOSE 8000
ENTRYPOINT ["trine"]
CMD ["serve", "/checkpoint", "--host", "0.0.0.0"]
HEALTHCHECK --interval=30s --timeout=10s --start-period=300s CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/ready', timeout=8)"]

# torch brings CUDA's libraries; Triton compiles its launchers with gcc when a kernel is first used.
FROM base AS cuda
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER trine
COPY --chown=trine . .
ARG PIP_ARGS=""
RUN make setup PIP_ARGS="$PIP_ARGS --no-cache-dir"

FROM base AS cpu
USER trine
COPY --chown=trine . .
ARG PIP_ARGS=""
RUN make setup PIP_ARGS="$PIP_ARGS --no-cache-dir"

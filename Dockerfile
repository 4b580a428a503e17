# A CPU image. A CPU-only torch: docker build --target cpu --build-arg PIP_ARGS="..." .
FROM python:3.12-slim AS cpu
ARG PIP_ARGS=""
RUN apt-get update && apt-get install --yes --no-install-recommends libgomp1 make && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home trine && mkdir /trine && chown trine /trine
USER trine
WORKDIR /trine
COPY --chown=trine . .
RUN make setup PIP_ARGS="$PIP_ARGS --no-cache-dir"
ENV PATH="/trine/.venv/bin:$PATH"
ENTRYPOINT ["trine"]
CMD ["--help"]

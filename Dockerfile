# docker build -t keepstep .
# docker run -v ./keepstep.toml:/etc/keepstep/keepstep.toml:ro -e DATABASE_URL -e REDIS_URL keepstep

FROM rust:1-bookworm AS build
WORKDIR /source
COPY . .
RUN cargo build --release --locked

FROM debian:bookworm-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /source/target/release/keepstep /usr/local/bin/keepstep
USER 65532:65532
WORKDIR /etc/keepstep
# Fails while the daemon does not answer. It does not ask whether the cache is up to date: a cache that lags must not
# take its application down.
HEALTHCHECK --start-period=30s CMD ["keepstep", "status"]
ENTRYPOINT ["keepstep"]
CMD ["run"]

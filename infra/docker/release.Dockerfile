# One release on its runtime: a layer of its files, and nothing to run.
ARG RUNTIME
FROM ${RUNTIME}
COPY release /release

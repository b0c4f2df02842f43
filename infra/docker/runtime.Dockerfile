# What all releases of one lock share. The context is made by perennial/images.py; nothing is fetched here.
# Every command is in exec form: the base need not have a shell.
ARG BASE
FROM ${BASE}

ENV PYTHONPATH=/opt/perennial/code:/opt/perennial/dependencies \
    PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 TMPDIR=/spool \
    ORT_DISABLE_TELEMETRY=1 \
    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE

COPY dependencies /opt/perennial/dependencies
RUN ["python3", "-c", "import compileall as c, re; c.compile_dir('/opt/perennial/dependencies', quiet=2, workers=0, rx=re.compile('/tests?/'), invalidation_mode=c.py_compile.PycInvalidationMode.UNCHECKED_HASH)"]

COPY code /opt/perennial/code
RUN ["python3", "-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash", "/opt/perennial/code"]

# The only folder that is written to, and by anybody: a tmpfs or a volume put over it takes its mode.
COPY spool /

LABEL perennial=image
# For whoever looks at the engine; the router asks by itself, and more often. Without `site` a look costs little.
HEALTHCHECK --interval=30s --timeout=3s --start-period=60s CMD ["python3", "-ISc", "import socket; c = socket.create_connection(('127.0.0.1', 8080), 2); c.sendall(b'GET /health/ready HTTP/1.1\\r\\nhost: here\\r\\n\\r\\n'); raise SystemExit(b' 200 ' not in c.recv(64))"]
USER 65532:65532
EXPOSE 8080
STOPSIGNAL SIGTERM
WORKDIR /release
# --environment and --prediction-log are the deployment's to say: `docker run IMAGE --environment test …`
ENTRYPOINT ["python3", "-m", "serving.server", "--release", "/release", "--host", "0.0.0.0", "--port", "8080", "--spool", "/spool"]

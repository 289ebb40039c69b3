# syntax=docker/dockerfile:1
# Who wants the same image each time pins this by its digest: --build-arg PYTHON=python@sha256:...
ARG PYTHON=python:3.11-slim
FROM ${PYTHON} AS build
WORKDIR /src
# The same bytes each time: no file knows when it was built, and bytecode is checked against nothing.
ENV SOURCE_DATE_EPOCH=0 PYTHONHASHSEED=0 PIP_NO_CACHE_DIR=1 PIP_NO_COMPILE=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv --without-pip /venv
COPY requirements-serve.lock ./
RUN pip --python /venv/bin/python install --require-hashes -r requirements-serve.lock
COPY pyproject.toml README.md ./
COPY serving serving
RUN pip --python /venv/bin/python install --no-deps .
# What nothing here runs: the packages' own tests, headers, static libraries and types, and onnxruntime for C, of which
# the module for Python has a copy of its own.
RUN find /venv/lib -depth \( -type d \( -name tests -o -name include -o -path '*/onnx/backend/test' \) \
        -o -type f \( -name '*.pyi' -o -name '*.a' -o -name '*.h' -o -name 'libonnxruntime.so.*' \) \) -exec rm -r {} + \
    && python -m compileall -q --invalidation-mode unchecked-hash /venv/lib

FROM ${PYTHON}
RUN useradd --system --uid 10001 --no-create-home --shell /usr/sbin/nologin serving
COPY --from=build /venv /venv
COPY models /models
USER 10001
# A container's own loopback can't be reached from outside it.
# Where the models are is left unsaid, for platforms to say: it is the folder `models` here.
WORKDIR /
ENV PATH=/venv/bin:$PATH SERVING_HOST=0.0.0.0 PYTHONDONTWRITEBYTECODE=1
EXPOSE 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s CMD \
    ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/v2/health/ready', timeout=2)"]
ENTRYPOINT ["serving"]
CMD ["run"]

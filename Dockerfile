# syntax=docker/dockerfile:1
FROM python:3.11-slim AS build
WORKDIR /src
RUN python -m venv /venv
COPY requirements-serve.lock ./
RUN /venv/bin/pip install --no-cache-dir --require-hashes -r requirements-serve.lock
COPY pyproject.toml README.md ./
COPY serving serving
RUN /venv/bin/pip install --no-cache-dir --no-deps .

FROM python:3.11-slim
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

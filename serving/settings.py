"""Every option, once: its name, default, help, environment variable (`SERVING_*`) and flag come from one line."""

from __future__ import annotations

import os
import re
import tomllib
from importlib.util import find_spec
from ipaddress import ip_network
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, TypeAdapter, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from serving import platforms
from serving.engine.limits import LEAST_MODEL_MEMORY
from serving.errors import InvalidRequest
from serving.repository.object_store import store_url


class Settings(BaseSettings):
    """All that one server can be told. Flags win over `SERVING_*`, which win over the TOML file given by `--config`."""

    model_config = SettingsConfigDict(frozen=True, env_prefix="SERVING_", extra="forbid")

    models: Path = Path("models")
    """Folder of models: <name>/<version>/model.onnx; or where they are in an object store: s3://bucket/prefix, gs://, az://
    (docs/object-stores.md)."""
    state_dir: Path | None = None
    """Folder for reports, prepared forms and who serves; the same for all who serve or deploy to one models folder."""
    platform: platforms.Name | None = None
    """Answer the paths that this platform asks (docs/platforms.md); without it, what the environment tells of one."""
    platform_model: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$")
    """Model that answers where a platform names none; without it the only one there is. A folder of models that is one
    itself is called so."""
    app: str | None = None
    """Application of your own to serve, as module:name, which has serving.lifespan; without it this server's own."""
    reload: bool = False
    """Replace the workers when a Python file below the current folder changes; for development."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all."""
    port: int = Field(8080, ge=0, le=65535)
    """Port to listen on; 0 takes a free one."""
    uds: Path | None = None
    """Unix socket to listen on instead of host and port, open to its owner and group; gRPC keeps its port."""
    grpc_port: int | None = Field(None, ge=0, le=65535)
    """Port to answer gRPC on too; 0 takes a free one; leave it out for none."""
    workers: int = Field(1, ge=1, le=256)
    """Server processes; cores are shared out between them."""
    extension_ops: bool = False
    """Load models with operators of the package onnxruntime-extensions (tokenizers, image decoding): its native code
    then reads what callers send."""
    strict: bool = False
    """Refuse to start if any model can't be loaded."""
    max_body_bytes: int = Field(16 * 1024 * 1024, ge=1024)
    """Largest request body of any kind, before and after inflation, in bytes."""
    max_json_bytes: int = Field(8 * 1024 * 1024, ge=1024)
    """Largest request body of JSON in bytes; tensors as binary data may have max_body_bytes."""
    max_model_bytes: int = Field(2 * 1024**3, ge=1024)
    """Largest model that may be published over HTTP, in bytes."""
    max_held_bytes: int = Field(256 * 1024 * 1024, ge=64 * 1024)
    """Bytes of bodies, and of answers not yet taken, that one worker holds; beyond it large bodies get 429."""
    model_memory_bytes: int | None = Field(None, ge=LEAST_MODEL_MEMORY)
    """Bytes that runs of one model and their answers may take at a time in one worker, beside its weights; without it a
    quarter of the memory of the machine or container, shared out between the workers."""
    max_batch_rows: int = Field(512, ge=1)
    """Rows that run together; a larger request runs alone."""
    max_queued_rows: int = Field(4096, ge=1)
    """Rows that may wait for one model; beyond it the answer is 429."""
    max_delay_ms: float = Field(0.0, ge=0, le=1000)
    """Milliseconds that an idle model waits for company; 0 never waits."""
    instances: int = Field(1, ge=1, le=64)
    """Threads that run one model at the same time."""
    deadline_s: float = Field(30.0, gt=0)
    """Seconds after which a request that still waits is answered 504."""
    drain_delay_s: float = Field(0.0, ge=0)
    """Seconds that a server goes on accepting after SIGTERM, while it says unready; for load balancers that lag."""
    drain_s: float = Field(30.0, gt=0)
    """Seconds that accepted requests get to finish once the server accepts no more."""
    hang_s: float = Field(20.0, ge=1)
    """Seconds without a sign of life after which a worker is replaced."""
    keep_alive_s: float = Field(75.0, gt=0)
    """Seconds that an idle connection is kept open."""
    tls_cert: Path | None = None
    """Certificate chain in PEM: HTTP and gRPC are then over TLS only. Read again on SIGHUP."""
    tls_key: Path | None = None
    """Private key of the certificate in PEM, not encrypted; without it, it stands in tls_cert."""
    tls_client_ca: Path | None = None
    """Certificates in PEM, one of which must have signed the one that each client then has to show (mutual TLS)."""
    keys: str | None = None
    """File of bearer keys, made by `serving keys create`, or the lines of such a file themselves."""
    jwks: Path | None = None
    """JWKS file: tokens (JWT) of its keys are taken as credentials too; needs jwt_audience and jwt_issuer."""
    jwt_audience: str | None = None
    """The `aud` that a token must have."""
    jwt_issuer: str | None = None
    """The `iss` that a token must have."""
    jwt_requests_per_s: float | None = Field(None, gt=0)
    """Predictions that the tokens of one `sub` may ask for in a second, all workers together; keys name their own."""
    jwt_rows_per_s: float | None = Field(None, gt=0)
    """Rows that the tokens of one `sub` may ask for in a second."""
    head_s: float = Field(5.0, gt=0)
    """Seconds in which the head of a request must arrive, from its first byte or from connecting."""
    max_head_bytes: int = Field(16 * 1024, ge=1024)
    """Largest request head in bytes."""
    body_s: float = Field(120.0, gt=0)
    """Seconds in which a body must arrive; a model that is being published only has to keep to min_bytes_per_s."""
    write_s: float = Field(30.0, gt=0)
    """Seconds that a client may take nothing of its answer."""
    min_bytes_per_s: int = Field(500, ge=1)
    """Slowest body that is waited for, and slowest reader of an answer, in bytes a second."""
    max_connections: int = Field(4096, ge=1)
    """Connections of one worker; beyond it those that have been idle longest are closed."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may call this server from a browser, as a JSON list."""
    root_path: str = Field("", pattern=r"^((/[A-Za-z0-9_.~-]+)+)?$")
    """Path under which a proxy serves this server, such as /ml, if it takes that off: /docs sends there."""
    trusted_proxies: tuple[str, ...] = ("127.0.0.1", "::1", "unix")
    """Addresses and networks of proxies whose X-Forwarded-Prefix is believed, as a JSON list; unix is who uses uds."""
    jobs_database_url: str | None = None
    """Database of jobs: sqlite for a file in the state folder, or postgresql://...; without it there are no jobs."""
    jobs_folder: str | None = None
    """Folder, or s3://, gs:// or az:// URL, where jobs keep inputs and results; without it one in the state folder."""
    jobs_inputs: tuple[str, ...] = ()
    """Folders and URLs of object stores below which jobs may read inputs, as a JSON list; what is sent needs none."""
    jobs_running: int = Field(4, ge=1, le=1000)
    """Jobs that run at a time, all servers of the folder together."""
    jobs_max_upload_bytes: int = Field(2 * 1024**3, ge=1024)
    """Largest file that may be sent for a job, in bytes."""
    jobs_keep_days: float = Field(7.0, gt=0)
    """Days after its end for which a job and its result are kept."""
    jobs_keep_bytes: int = Field(20 * 1024**3, ge=1024)
    """Bytes of all results together, beyond which the oldest are removed."""
    fast_path: bool = True
    """Answer plain predictions on the short path; off sends every request through ASGI."""
    metrics: bool = True
    """Count and time, and answer GET /metrics."""
    metrics_compat: Literal["triton"] | None = None
    """triton has GET /metrics give the counts by Triton's names (nv_inference_*) too."""
    access_log: float = Field(0.0, ge=0, le=1)
    """Share of requests that get a line in the log, with who asked what and how it ended: 1 all, 0.01 one of 100."""
    slow_log_s: float | None = Field(None, gt=0)
    """Seconds from which on a request gets a line in the log, with where its time went."""
    log_features: bool = False
    """Lines of requests with one row have its features, but for sensitive ones."""
    drift: bool = True
    """Compare the rows that models get with the reference in their files; a model.toml has the word for its model."""
    capture_dir: Path | None = None
    """Folder where a share of what models are asked and answer is kept, as Parquet; without it nothing is kept."""
    capture_share: float = Field(0.01, ge=0, le=1)
    """Share of predictions that are kept there; a model's own settings may say otherwise."""
    capture_max_bytes: int = Field(1024**3, ge=1024 * 1024)
    """Most bytes there, whoever wrote them; the oldest files go first."""
    server_timing: bool = False
    """Say in the header Server-Timing of predictions over HTTP where their time went."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe message to log."""
    log_format: Literal["json", "text"] | None = None
    """json writes one object a line, text is for people; without it, text on a terminal and json elsewhere."""

    @model_validator(mode="before")
    @classmethod
    def _of_platform(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Take from a platform's environment what nobody says otherwise."""
        return platforms.settings(given.get("platform"), os.environ) | given

    @field_validator("cors_origins", "trusted_proxies", "jobs_inputs", mode="before")
    @classmethod
    def _list(cls, given: Any) -> Any:
        if not isinstance(given, str):
            return given
        try:
            return TypeAdapter(tuple[str, ...]).validate_json(given)
        except ValidationError:
            raise ValueError("""write a JSON list of texts, such as '["https://a.example"]'""") from None

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:  # compared as browsers write them
            if not re.fullmatch(r"\*|(?!http:.*:80$|https:.*:443$)[a-z][a-z0-9+.-]*://[^/?#@\sA-Z]+", origin):
                raise ValueError(
                    f"{origin!r}: write scheme and host, in lower case, and a port that is not the usual one"
                )
        return origins

    @field_validator("trusted_proxies")
    @classmethod
    def _networks(cls, proxies: tuple[str, ...]) -> tuple[str, ...]:
        for proxy in proxies:
            if proxy != "unix":
                ip_network(proxy)  # what it says is wrong with it is fit to be told
        return proxies

    @field_validator("models")
    @classmethod
    def _served_from(cls, models: Path) -> Path:
        try:
            store_url(models)
        except InvalidRequest as error:
            raise ValueError(error.message.removeprefix("--models: ")) from None
        return models

    @field_validator("jobs_folder")
    @classmethod
    def _kept(cls, where: str | None) -> str | None:
        if where is not None and "://" in where and not re.match(r"(s3|gs|az)://[^/@]+(/|$)", where):
            raise ValueError("write a folder, or s3://, gs:// or az:// and a bucket")
        return where

    @field_validator("jobs_database_url")
    @classmethod
    def _database(cls, url: str | None) -> str | None:
        if url is not None and not re.match(r"sqlite$|sqlite:///(?!:memory:)[^?]+$|postgres(ql)?://.", url):
            raise ValueError("write sqlite, sqlite:///file or postgresql://user@host/name")
        if url is not None and not all(find_spec(needed) for needed in ("alembic", "obstore", "pyarrow", "sqlalchemy")):
            raise ValueError("jobs need more packages: pip install 'serving[jobs]'")
        return url

    @field_validator("capture_dir")
    @classmethod
    def _writable(cls, folder: Path | None) -> Path | None:
        if folder is not None and find_spec("pyarrow") is None:
            raise ValueError('it needs pyarrow: pip install "serving[bulk]"')
        return folder

    @field_validator("state_dir", "capture_dir")
    @classmethod
    def _outside(cls, folder: Path | None, info: ValidationInfo) -> Path | None:
        models = info.data.get("models")
        if folder is not None and models is not None and folder.resolve().is_relative_to(models.resolve()):
            raise ValueError("it lies in the models folder, where others take it for a model")
        return folder

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Put the TOML file (`_toml_file` in the configuration) below the environment."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)


def read(config: Path | None, **given: Any) -> Settings:
    """Make settings from flags, environment and an optional TOML file.

    Raises pydantic.ValidationError, and ValueError where there is no such file or it is not TOML: without what it says
    of keys and TLS a server would be open.
    """
    if config is None:
        return Settings(**given)
    try:
        tomllib.loads(config.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--config: {config} can't be read: {(error.strerror or '').lower()}") from None
    except ValueError as error:
        raise ValueError(f"--config: {config} is not TOML: {error}") from None

    class FromFile(Settings):
        model_config = SettingsConfigDict(toml_file=config)

    return Settings(**FromFile(**given).model_dump())

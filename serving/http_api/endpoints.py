"""The table of prediction paths: built when models load, so that a request costs one look-up."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from serving.access.access import Access
from serving.bodies.codec_pool import CodecPool
from serving.deploy.fleet import Fleet, Served
from serving.engine.model import Model
from serving.http_api.prediction import Endpoint, Fork
from serving.metrics.metrics import Metrics
from serving.protocols import open_inference, predict_v1
from serving.protocols.codec import Codec

TEMPLATES = {
    ("v1", "name"): "/v1/models/{model}:predict",
    ("v1", "version"): "/v1/models/{model}/versions/{version}:predict",
    ("v1", "label"): "/v1/models/{model}/labels/{label}:predict",
    ("v2", "name"): "/v2/models/{model}/infer",
    ("v2", "version"): "/v2/models/{model}/versions/{version}/infer",
}

_UNVERSIONED = frozenset(template for (_, kind), template in TEMPLATES.items() if kind == "name")


class EndpointTable:
    """Prediction targets by raw path, and by model for the ASGI routes."""

    def __init__(
        self,
        metrics: Metrics | None,
        access: Access,
        *,
        pool: CodecPool,
        max_json_bytes: int,
        max_body_bytes: int,
    ) -> None:
        self._metrics = metrics
        self._access = access
        self._pool = pool
        self._max_json_bytes = max_json_bytes
        self._max_body_bytes = max_body_bytes
        self.paths: dict[bytes, Endpoint] = {}
        self._bound: dict[str, tuple[Served, dict[bytes, Endpoint]]] = {}
        """What was made of each model, by name."""

    def bind(self, fleet: Fleet, loop: asyncio.AbstractEventLoop) -> None:
        """Make the targets of every live model that is new or changed, and forget those of models that have gone."""
        bound = {}
        for name, served in fleet.models.items():
            before, made = self._bound.get(name, (None, {}))
            bound[name] = served, made if before is served else self._made(served, loop)
        self._bound = bound
        fresh = {path: target for _, made in bound.values() for path, target in made.items()}
        self.paths.update(fresh)
        for gone in self.paths.keys() - fresh.keys():
            del self.paths[gone]

    def _made(self, served: Served, loop: asyncio.AbstractEventLoop) -> dict[bytes, Endpoint]:
        made: dict[bytes, Endpoint] = {}
        for path, template, model in _paths(served):
            target = self._target(path, template, model, loop)
            if template in _UNVERSIONED:
                target.shadow = served.shadow
                if served.canary is not None:
                    # Who may is asked once, before it is decided which version answers.
                    candidate = self._target(path, template, served.canary.candidate, loop)
                    fork = Fork(served.canary, target, candidate)
                    target.access = candidate.access = None
                    target = self._target(path, template, model, loop)
                    target.fork = fork
            made[path.encode()] = target
        return made

    def _target(self, path: str, template: str, model: Model, loop: asyncio.AbstractEventLoop) -> Endpoint:
        return Endpoint(
            model,
            codec(model, "v1" if path.startswith("/v1") else "v2"),
            template=template,
            metrics=self._metrics.model(model.name, model.version) if self._metrics else None,
            access=self._access if self._access.configured or model.limits.callers is not None else None,
            deadline=model.limits.deadline_s,
            loop=loop,
            pool=self._pool,
            max_json_bytes=self._max_json_bytes,
            max_body_bytes=self._max_body_bytes,
        )


def prepare(model: Model) -> None:
    """Make the codecs of a model, which takes longer than the event loop should be held."""
    for protocol in ("v1", "v2"):
        codec(model, protocol)


def codec(model: Model, protocol: str) -> Codec:
    """Return the codec of a model for a protocol; made once."""
    made: Codec | None = model.codecs.get(protocol)
    if made is None:
        made = predict_v1.Codec(model.described) if protocol == "v1" else open_inference.Codec(model.described)
        model.codecs[protocol] = made
    return made


def _paths(served: Served) -> Iterator[tuple[str, str, Model]]:
    for protocol in ("v1", "v2"):
        whole = {"model": served.name}
        template = TEMPLATES[protocol, "name"]
        yield template.format(**whole), template, served.default
        template = TEMPLATES[protocol, "version"]
        for version, model in served.versions.items():
            yield template.format(**whole, version=version), template, model
    template = TEMPLATES["v1", "label"]
    for label, model in served.labels.items():
        yield template.format(**whole, label=label), template, model

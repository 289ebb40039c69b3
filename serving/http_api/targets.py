"""The table of prediction paths: built when models load, so that a request costs one look-up."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from serving.access.access import Access
from serving.engine.model import Model
from serving.fleet.fleet import Fleet, Served
from serving.http_api import open_inference, predict_v1
from serving.http_api.codec import Codec
from serving.http_api.prediction import Target
from serving.metrics import Metrics

TEMPLATES = {
    ("v1", "name"): "/v1/models/{model}:predict",
    ("v1", "version"): "/v1/models/{model}/versions/{version}:predict",
    ("v1", "label"): "/v1/models/{model}/labels/{label}:predict",
    ("v2", "name"): "/v2/models/{model}/infer",
    ("v2", "version"): "/v2/models/{model}/versions/{version}/infer",
}


class Targets:
    """Prediction targets by raw path, and by model for the ASGI routes."""

    def __init__(self, metrics: Metrics | None, access: Access, *, deadline: float) -> None:
        self._metrics = metrics
        self._access = access if access.configured else None
        self._deadline = deadline
        self._codecs: dict[tuple[Model, str], Codec] = {}
        self.paths: dict[bytes, Target] = {}

    def bind(self, fleet: Fleet, loop: asyncio.AbstractEventLoop) -> None:
        """Make the targets of every live model, and forget those of models that have gone."""
        fresh: dict[bytes, Target] = {}
        for served in fleet.models.values():
            for path, template, model in _paths(served):
                protocol = "v1" if path.startswith("/v1") else "v2"
                metrics = self._metrics.model(model.name, model.version) if self._metrics else None
                fresh[path.encode()] = Target(
                    model,
                    self._codec(model, protocol),
                    template=template,
                    metrics=metrics,
                    access=self._access,
                    deadline=self._deadline,
                    loop=loop,
                )
        self.paths.update(fresh)
        for gone in self.paths.keys() - fresh.keys():
            del self.paths[gone]

    def _codec(self, model: Model, protocol: str) -> Codec:
        made = self._codecs.get((model, protocol))
        if made is None:
            made = predict_v1.Codec(model) if protocol == "v1" else open_inference.Codec(model)
            self._codecs[model, protocol] = made
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

"""The table of endpoints of one kind of transport: made when models load, so that a request costs one look-up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import TypeAlias

from serving.access.access import Access
from serving.bodies.codec_pool import CodecPool
from serving.deploy.fleet import Fleet, Served
from serving.engine.model import Model
from serving.engine.signature import Described
from serving.errors import ModelNotFound
from serving.metrics.metrics import Metrics
from serving.prediction.endpoint import CanarySplit, Endpoint
from serving.prediction.request_log import RequestLog
from serving.protocols.codec import Codec

Routes: TypeAlias = Mapping[tuple[str, str], str]
"""Templates of what names an endpoint, by protocol and by what they name: "name", "version" or "label"."""


@dataclass(eq=False, repr=False)
class EndpointTable:
    """Endpoints by what a request calls them: a path, or a name.

    routes: what they are called. codecs: makes the codec of a version, by protocol. access: who may predict; None
    where that is the caller's own affair.
    pool, max_text_bytes, max_body_bytes, log, timing: see `Endpoint`.
    """

    routes: Routes
    codecs: Mapping[str, Callable[[Described], Codec]]
    _: KW_ONLY
    metrics: Metrics | None
    access: Access | None
    pool: CodecPool
    max_text_bytes: int
    max_body_bytes: int
    log: RequestLog | None = None
    timing: bool = False
    paths: dict[bytes, Endpoint] = field(init=False, default_factory=dict)
    _get: Callable[..., Model] = field(init=False)
    _bound: dict[str, tuple[Served, dict[bytes, Endpoint]]] = field(init=False, default_factory=dict)
    """What was made of each model, by name."""

    def __post_init__(self) -> None:
        self._bare = self.routes

    def below(self, prefix: str) -> None:
        """Have all paths begin with this; called before the fleet starts."""
        self.routes = {named: prefix + path for named, path in self._bare.items()}

    def follow(self, fleet: Fleet) -> None:
        """Have an endpoint for each way to ask each live model, whatever is loaded; called before the fleet starts."""
        self._get = fleet.get
        fleet.prepare.append(self._prepare)
        fleet.changed.append(lambda: self._bind(fleet, asyncio.get_running_loop()))

    def find(self, protocol: str, model: str, version: str | None = None, label: str | None = None) -> Endpoint:
        """Return the endpoint of a model, or of one of its versions, whatever it is called in a request.

        Raises ModelNotFound where there is none, NotReady where it is in the repository and can't be served.
        """
        name = self._get(model, version, label).name
        kind = "version" if version is not None else "name" if label is None else "label"
        path = self.routes[protocol, kind].format(model=name, version=version, label=label)
        endpoint = self.paths.get(path.encode())
        if endpoint is None:
            raise ModelNotFound(f"model {name!r} has just gone")
        return endpoint

    def _prepare(self, model: Model) -> None:
        """Make the codecs of a model, which takes longer than the event loop should be held."""
        for protocol in self.codecs:
            self._codec(model, protocol)

    def _codec(self, model: Model, protocol: str) -> Codec:
        made: Codec | None = model.codecs.get(protocol)
        if made is None:
            made = model.codecs[protocol] = self.codecs[protocol](model.described)
        return made

    def _bind(self, fleet: Fleet, loop: asyncio.AbstractEventLoop) -> None:
        """Make the endpoints of every live model that is new or changed, and forget those of models that have gone."""
        bound = {}
        for name, served in fleet.models.items():
            before, made = self._bound.get(name, (None, {}))
            bound[name] = served, made if before is served else self._made(served, loop)
        self._bound = bound
        fresh = {path: endpoint for _, made in bound.values() for path, endpoint in made.items()}
        self.paths.update(fresh)
        for gone in self.paths.keys() - fresh.keys():
            del self.paths[gone]

    def _made(self, served: Served, loop: asyncio.AbstractEventLoop) -> dict[bytes, Endpoint]:
        made: dict[bytes, Endpoint] = {}
        for (protocol, kind), route in self.routes.items():
            for path, model in _named(served, kind, route):
                endpoint = self._endpoint(protocol, route, model, loop)
                if kind == "name":
                    endpoint.shadow = served.shadow
                    if served.canary is not None:
                        # Who may is asked once, before it is decided which version answers.
                        candidate = self._endpoint(protocol, route, served.canary.candidate, loop)
                        split = CanarySplit(served.canary, endpoint, candidate)
                        endpoint.access = candidate.access = None
                        endpoint = self._endpoint(protocol, route, model, loop)
                        endpoint.canary = split
                made[path.encode()] = endpoint
        return made

    def _endpoint(self, protocol: str, route: str, model: Model, loop: asyncio.AbstractEventLoop) -> Endpoint:
        limits, access = model.limits, self.access
        return Endpoint(
            model,
            self._codec(model, protocol),
            route=route,
            metrics=self.metrics.model(model.name, model.version) if self.metrics else None,
            access=access if access is not None and (limits.callers is not None or access.configured) else None,
            deadline=limits.deadline_s,
            loop=loop,
            pool=self.pool,
            max_text_bytes=self.max_text_bytes,
            max_body_bytes=self.max_body_bytes,
            log=self.log,
            timing=self.timing,
        )


def _named(served: Served, kind: str, route: str) -> Iterator[tuple[str, Model]]:
    """Give what names a model's versions in one kind of route, and the version."""
    if kind == "name":
        yield route.format(model=served.name), served.default
    for value, model in {"version": served.versions, "label": served.labels}.get(kind, {}).items():
        yield route.format(model=served.name, **{kind: value}), model

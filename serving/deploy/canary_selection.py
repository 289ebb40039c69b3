"""Which of two versions answers a request, where a canary has a share: by caller, or by turn."""

from __future__ import annotations

from collections.abc import Callable

from serving.engine.model import Model
from serving.engine.signature import Signature
from serving.errors import InvalidRequest
from serving.repository.traffic import Sticky, choose
from serving.tensors import Array, Tensors


class CanarySelection:
    """The share of one canary, with all that can be decided when it starts.

    header: lower-case name of the header that tells callers apart, or None. feature: gives the key of a request from
    its decoded inputs, in the order of stable's signature, or None. Without either each request is a caller.
    """

    __slots__ = ("_percent", "_salt", "candidate", "feature", "header")

    def __init__(self, stable: Model, candidate: Model, percent: float, sticky: Sticky | None) -> None:
        self.candidate = candidate
        self._percent = percent
        # Another trial of the same model takes other callers, or the same few would try everything.
        self._salt = f"{candidate.name}/{candidate.version}/".encode()
        self.header = sticky.header.encode() if sticky is not None and sticky.header is not None else None
        self.feature = (
            key_of(stable.signature, sticky.feature) if sticky is not None and sticky.feature is not None else None
        )

    def takes(self, key: bytes | None) -> bool:
        """Tell whether the candidate answers; None: the request does not say who is calling."""
        return choose(None if key is None else self._salt + key, self._percent)


def key_of(signature: Signature, feature: str) -> Callable[[Tensors], bytes]:
    """Return what reads a feature's value in the first row. Raises InvalidRequest where there is no such feature."""
    names = [f.name for f in signature.features]
    if feature not in names:
        known = ", ".join(names)
        raise InvalidRequest(f"canary.sticky: stable has no feature {feature[:64]!r}; features: {known}"[:500])
    index = names.index(feature)
    if signature.layout == "matrix":
        return lambda inputs: _first(inputs[0][..., index])
    return lambda inputs: _first(inputs[index])


def _first(values: Array) -> bytes:
    return str(values.ravel()[0]).encode(errors="surrogatepass") if values.size else b""

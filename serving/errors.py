"""The one error tree: facts about a request or a model; each transport owns a table from these to its statuses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self, TypeVar

DETAILS_SHOWN = 20
T = TypeVar("T")
E = TypeVar("E", bound=Exception)


@dataclass(frozen=True, slots=True)
class Detail:
    """One bad place in a request: where (a JSON pointer, RFC 6901) and what to do about it."""

    path: str
    message: str

    @property
    def row(self) -> int | None:
        """Number of the row that it names, from 0.

        >>> Detail("/instances/3/petal_width", "is missing").row, Detail("/inputs/petal_width/3", "is a string").row
        (3, 3)
        """
        number = self._cell[0]
        return int(number) if number is not None and number.isdigit() else None

    @property
    def feature(self) -> str | None:
        """Name of the feature that it names; of rows by position, the position.

        >>> Detail("/instances/3/petal_width", "is missing").feature, Detail("/instances/3", "is null").feature
        ('petal_width', None)
        """
        return self._cell[1]

    @property
    def _cell(self) -> tuple[str | None, str | None]:
        root, first, second = [*self.path.split("/")[1:4], None, None, None][:3]
        row, feature = (first, second) if root == "instances" else (second, first) if root == "inputs" else (None, None)
        return row, feature.replace("~1", "/").replace("~0", "~") if feature is not None else None


class ServingError(Exception):
    """Base of everything this server says no with. The text is for the caller: never a path, pid or trace."""

    def __init__(self, message: str, details: Iterable[Detail] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.details = tuple(details)

    def __reduce__(self) -> tuple[Any, ...]:
        """Be pickled whole, whatever a class is made of: errors cross processes, as of a pool."""
        return type(self).__new__, (type(self), *self.args), self.__dict__

    def bare(self) -> Self:
        """Forget where it was raised, and return it: kept as a value, its frames would keep the whole request."""
        self.__traceback__ = self.__cause__ = self.__context__ = None
        return self


class InvalidRequest(ServingError):
    """The request is malformed, whatever the model."""


class SignatureMismatch(ServingError):
    """The request is well formed, and its rows break the model's signature."""


class PayloadTooLarge(ServingError):
    """The body is larger than the limit, before or after inflation."""


class UnsupportedMediaType(ServingError):
    """The body's type or encoding is not one that this server reads."""


class ModelNotFound(ServingError):
    """No such model, version or label."""


class JobNotFound(ServingError):
    """The caller has no such job, or there are no jobs here."""


class NotReady(ServingError):
    """The model or the server is known and can't answer now."""


class Unauthenticated(ServingError):
    """The caller gave no credential, or, where `invalid`, one that is not good."""

    def __init__(self, message: str, *, invalid: bool = False) -> None:
        super().__init__(message)
        self.invalid = invalid


class Forbidden(ServingError):
    """The caller may not do this; with `scope`, a credential that has it may."""

    def __init__(self, message: str, *, scope: str | None = None) -> None:
        super().__init__(message)
        self.scope = scope


class QueueFull(ServingError):
    """The model's queue is full; `retry_after` says in how many whole seconds to come back."""

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class RateLimited(QueueFull):
    """The caller's own rate is used up, however much room there is."""


class DeadlineExceeded(ServingError):
    """The request's deadline passed before its turn came."""


class InferenceFailed(ServingError):
    """The model itself refused these inputs, though they fit its signature."""


class Conflict(ServingError):
    """What was asked for contradicts what is there."""


class GenerationConflict(ServingError):
    """Somebody else's change came first; `current` is the traffic document as it is now, `generation` and all."""

    def __init__(self, message: str, current: dict[str, Any]) -> None:
        super().__init__(message)
        self.current = current


class ModelInvalid(ServingError):
    """A model file can't be served: not ONNX, truncated, or not as its signature declares."""


def by_kind(table: Mapping[type[E], T], error: E, other: T) -> T:
    """Return what a table says of an error: of its class, or of the nearest one that it derives from."""
    return next((table[kind] for kind in type(error).__mro__ if kind in table), other)


def shown(name: str) -> str:
    r"""Make a name from outside fit for a log line or an answer: short, and what is no printable ASCII as an escape.

    >>> print(shown("iris"), shown("a\nb"), shown("c:\\d"), shown("caf\xe9"))
    iris a\nb c:\d caf\xe9
    """
    return "".join(c if " " <= c <= "~" else ascii(c)[1:-1] for c in name[:100])


def listed(
    problem: str, details: list[Detail], *, total: int | None = None, cut_short: bool = False
) -> SignatureMismatch:
    """Make the error that reports every bad cell: the first 20 and the count of all; or, cut short, of those seen."""
    count = len(details) if total is None else total
    shown = details[:DETAILS_SHOWN]
    first = f"{shown[0].path}: {shown[0].message}" if shown else ""
    more = f" (and {'at least ' if cut_short else ''}{count - 1} more)" if count > 1 else ""
    return SignatureMismatch(f"{problem}: {first}{more}", shown)

"""What every dialect offers: tensors decoded from a body, and an answer encoded from outputs.

What is short is read and written on the event loop; of what is long, a codec says what is to be done elsewhere.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

from serving.protocols.headers import HeaderList, Headers
from serving.tensors import Tensors

INLINE_BYTES = 64 * 1024
"""Bodies of text above it never are decoded on the event loop: that would hold it for milliseconds."""

SMALL_BYTES = 2048
"""Bodies up to it cost so little that nobody counts them."""

RAW_INLINE_BYTES = 2 * 1024 * 1024
"""Raw tensors of numbers above it are looked at on a thread: a look at each of so many takes half a millisecond."""

SMALL_ANSWER_BYTES = 4 * 1024
"""Outputs up to it are written so fast that nobody counts them."""

INLINE_ANSWER_BYTES = 32 * 1024
"""Outputs above it are never written as text on the event loop: 1,600 rows of one class and its scores take 1.5 ms."""

PIECE_BYTES = 256 * 1024
"""Bytes of a large answer that are worked on at a time, so that other connections get their turn in between."""

CONTRIBUTIONS = "contributions"
"""The output, behind those of the model, that says what features contribute."""

Spare: TypeAlias = Callable[[int], bool]
"""Tells whether so many bytes more may be worked on in this turn of the event loop, and counts them."""


class Decoded(NamedTuple):
    """A request as arrays.

    inputs: in the order of the signature's inputs, each of its dtype and shape. rows: how many (1 where the model has
    no batch dimension). context: what `encode` must remember. timeout: seconds from its arrival that the request itself
    allows. priority: its place in line, where the request itself has one.
    """

    inputs: Tensors
    rows: int
    context: Any = None
    timeout: float | None = None
    priority: int | None = None
    explain: bool = False
    """The answer's outputs are to have one more behind them: what features contribute, float64 [rows, features + 1]."""


class Blobs(NamedTuple):
    """A large body in parts, `size` bytes in all: they are written as they lie, never joined."""

    size: int
    parts: Sequence[bytes | memoryview]

    def pieces(self) -> Iterator[bytes | memoryview]:
        """Give the body in parts of PIECE_BYTES at most, for who has to copy them; once.

        What was given is freed: freeing megabytes at the end would take milliseconds.
        """
        parts = deque(self.parts)
        del self
        while parts:
            part = parts.popleft()
            for at in range(0, len(part), PIECE_BYTES):
                yield part[at : at + PIECE_BYTES]


class Mixed(NamedTuple):
    """An answer of JSON with raw tensors behind it. `headers` tell where they begin, and are shared by many answers."""

    headers: HeaderList
    body: bytes | Blobs


class Elsewhere(NamedTuple):
    """What is too long for the event loop: `work(codec, *given)`, a function of a module.

    on_thread: it takes no interpreter to speak of, and a thread is enough; else it is for the codec process.
    """

    work: Callable[..., Any]
    given: tuple[Any, ...]
    on_thread: bool = False


class Later:
    """Says that a body or an answer is quick, and has no room in this turn of the event loop: ask again in another."""


class Codec(Protocol):
    """One dialect bound to one version of a model; pickled, it is made anew from that version's signature.

    A body and an answer are what the transports of the dialect read and write: this is the same for all of them only in
    what becomes of it.
    """

    protocol: str
    raw_tensors: bool
    """Whether a body may have tensors as raw bytes, which are bounded otherwise than text is."""

    def begin(self, headers: Headers, body: Any, spare: Spare, most_text: int) -> Decoded | Elsewhere | Later:
        """Decode a request where that is quick. most_text: bytes of text that a body may have.

        Raises InvalidRequest, SignatureMismatch with all the bad cells, or PayloadTooLarge.
        """

    def begin_answer(self, outputs: Tensors, context: Any, headers: Headers, spare: Spare) -> Any:
        """Encode the answer where that is quick, else return Elsewhere or Later.

        outputs: in the order of the signature's outputs. context: what came with the decoded request. headers: of the
        request.
        """

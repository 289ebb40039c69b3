"""Rows made up for a model that is tried: distinct, seeded, and as like real ones as its signature tells.

A signed model says much: examples, ranges, categories. Of a bare graph only datatypes and shapes are known, so whether
its integers are ids in a table of thirty thousand words or flags is found by trying.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from serving.engine.rows import Rows
from serving.engine.session import OnnxSession
from serving.engine.signature import Feature, Signature, TensorSpec
from serving.errors import InferenceFailed
from serving.tensors import FLOATS, NUMPY, Array, Tensors, count, limits

_SIZES = (7, 16, 64, 1, 4, 224)
"""Of free inner dimensions, in the order in which they are tried."""
_MOST_ELEMENTS = 4 * 1024 * 1024
"""Of an input of two rows: with many free dimensions, or large ones, more would be asked for than is there."""
_TOPS = (1000, 100, 10)
"""Greatest integers that are tried where a graph takes 0 and 1."""
_WORDS = """the of and a to in is you that it for was on are with as they at be this from have or by one had not but
what all were when we there can an your which their said if do will each about how up out them then she many some so
these would other into has more her two like him see time could no make than first been its who now people my made over
did down only way find use may water long little very after words called just where most know 12 3.5 2024-01-31
A-113 red blue yes no NA"""


class MadeUpRows:
    """Makes rows for one session, which it runs a few times to learn what that takes.

    Dimensions of equal names have equal sizes.
    """

    def __init__(self, session: OnnxSession) -> None:
        self._session = session
        self._signature = signature = session.signature
        self._names = session.dimension_names
        self._real = _real(signature)
        self.inner: tuple[int, ...] = _SIZES[:1]
        """Sizes of free inner dimensions that the graph takes, two at most; empty where it takes no rows made up."""
        self.refused: tuple[int, ...] = ()
        """Sizes of free inner dimensions of which the graph takes no single row."""
        self._tops = [1] * len(signature.inputs)
        self._settle()

    def takes(self, inputs: Tensors) -> bool:
        """Tell whether the graph takes inputs."""
        try:
            self._session.run(inputs)
        except InferenceFailed:
            return False
        return True

    def _settle(self) -> None:
        rows = 1 if self._signature.batch == "dynamic" else 0  # how many dimensions in front are not for `inner`
        free = any(-1 in spec.shape[rows:] for spec in self._signature.inputs)
        sizes = [size for size in (_SIZES if free else _SIZES[:1]) if self._elements(size) <= _MOST_ELEMENTS]
        found = [size for size in sizes if self.takes(self.make(2, seed=0, inner=size))]
        self.inner = tuple(found[:2])
        self.refused = tuple(size for size in sizes if not self.takes(self.make(1, seed=0, inner=size)))
        if not found:
            return
        for index, spec in enumerate(self._signature.inputs):
            if spec.datatype not in {*FLOATS, "BOOL", "BYTES"}:
                self._raise(index, spec)

    def _elements(self, inner: int) -> int:
        """Return how many elements the largest input has for two rows."""
        return max(count(self._shape(i, spec, 2, inner)) for i, spec in enumerate(self._signature.inputs))

    def _raise(self, index: int, spec: TensorSpec) -> None:
        for top in _TOPS:
            self._tops[index] = min(top, limits(spec.datatype)[1])
            made = self.make(2, seed=0, inner=self.inner[0])
            made[index].ravel()[0] = self._tops[index]
            if self.takes(made):
                return
        self._tops[index] = 1

    def make(self, rows: int, *, seed: int, inner: int) -> Tensors:
        """Make so many rows; the same ones for the same arguments. inner: size of free dimensions behind the first.

        One example where the model takes one.
        """
        chance = np.random.default_rng((seed, inner))
        signature = self._signature
        rows = rows if signature.batch == "dynamic" else 1
        if self._real and not any(feature.shape for feature in signature.features):
            cells = [[_cell(f, self._real, chance) for f in signature.features] for _ in range(rows)]
            return Rows(signature, "made up").arrays(cells)
        made = []
        for index, spec in enumerate(signature.inputs):
            shape = self._shape(index, spec, rows, inner)
            feature = signature.features[index] if signature.layout == "columns" else None
            made.append(self._filled(index, spec, shape, feature, chance))
        return tuple(made)

    def _shape(self, index: int, spec: TensorSpec, rows: int, inner: int) -> tuple[int, ...]:
        free = [inner] * len(spec.shape)
        if self._signature.batch == "dynamic":
            names = self._names[index]
            free = [rows if i == 0 or (name and name == names[0]) else inner for i, name in enumerate(names)]
        return tuple(size if dim == -1 else dim for dim, size in zip(spec.shape, free, strict=True))

    def _filled(
        self, index: int, spec: TensorSpec, shape: tuple[int, ...], feature: Feature | None, chance: np.random.Generator
    ) -> Array:
        if spec.datatype == "BYTES":
            texts = np.empty(shape, dtype=object)
            texts.ravel()[:] = [_text(_WORDS.split(), chance) for _ in range(texts.size)]
            return texts
        if spec.datatype == "BOOL":
            return chance.integers(0, 2, shape).astype(bool)
        if spec.datatype not in FLOATS:
            return chance.integers(0, self._tops[index] + 1, shape).astype(NUMPY[spec.datatype])
        if feature is not None and feature.minimum is not None and feature.maximum is not None:
            return chance.uniform(feature.minimum, feature.maximum, shape).astype(NUMPY[spec.datatype])
        # Of rows of different size, so that one that takes part in another's answer shows.
        scale = 2.0 ** chance.integers(-3, 4, (*shape[:1], *(1 for _ in shape[1:])))
        return (chance.normal(0.3, 1.0, shape) * scale).astype(NUMPY[spec.datatype])


def _real(signature: Signature) -> list[dict[str, Any]]:
    """Return the rows that the signature brings along."""
    golden = signature.golden.rows if signature.golden is not None else ()
    return [*golden, *([signature.example] if signature.example else [])]


def _cell(feature: Feature, real: Sequence[dict[str, Any]], chance: np.random.Generator) -> Any:
    """Make one feature's value in one row: one of the real ones, or another that is like them."""
    known = [row[feature.name] for row in real if row.get(feature.name) is not None]
    if feature.nullable and chance.random() < 0.1:
        return None
    if feature.categories and chance.random() < 0.7:
        return feature.categories[int(chance.integers(len(feature.categories)))]
    if feature.datatype in FLOATS and feature.minimum is not None and feature.maximum is not None:
        return float(chance.uniform(feature.minimum, feature.maximum))
    if feature.datatype == "BYTES" and feature.unknown_category == "accept" and chance.random() < 0.3:
        return _text(" ".join(map(str, known)).split() or _WORDS.split(), chance)
    if known:
        return known[int(chance.integers(len(known)))]
    return "" if feature.datatype == "BYTES" else 0


def _text(words: Sequence[str], chance: np.random.Generator) -> str:
    """Put some words together: none, one or many, so that lengths differ."""
    number = int(chance.choice((0, 1, 1, 2, 5, 12, 30)))
    return " ".join(words[int(chance.integers(len(words)))] for _ in range(number))

"""What an export is asked for: the rows, and all that is said besides. `export` says what each of it means."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import pandas as pd

from serving.tensors import Array

Layout: TypeAlias = Literal["matrix", "columns"]
UnknownCategory: TypeAlias = Literal["accept", "refuse"]
Reference: TypeAlias = Callable[[pd.DataFrame], Array]
Image: TypeAlias = tuple[str, tuple[int, ...]]
"""The name of one tensor that all columns make up, and its shape without the rows."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The arguments of one export; both tables have the same columns in the same order."""

    train: pd.DataFrame
    held_out: pd.DataFrame
    classes: Sequence[str] | None
    metrics: Mapping[str, float]
    description: str
    descriptions: Mapping[str, str]
    sensitive: Collection[str]
    unknown_category: UnknownCategory
    tolerance: float
    double: bool
    reference: Reference | None
    image: Image | None

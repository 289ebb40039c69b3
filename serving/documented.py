"""Descriptions of fields for JSON schemas and the help of flags: their docstrings, read where somebody asks."""

from __future__ import annotations

import ast
import inspect
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import BaseModel, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema


class Documented(BaseModel):
    """A model whose JSON schema describes its fields by their docstrings.

    Pydantic's own `use_attribute_docstrings` reads the sources as classes are made: a fifth of a worker's start.
    """

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Give the schema its descriptions."""
        made = handler(core_schema)
        properties = handler.resolve_ref_schema(made).get("properties", {})
        for name, text in descriptions(cls).items():
            if name in properties:
                properties[name].setdefault("description", text)
        return made


def descriptions(kind: type[Any]) -> dict[str, str]:
    """Return the docstrings of a class's fields, inherited ones among them, by name."""
    made: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if issubclass(base, BaseModel) and not base.__module__.startswith("pydantic"):
            made |= _documented(base.__module__, inspect.getsourcefile(base)).get(base.__qualname__, {})
    return made


@cache
def _documented(module: str, file: str | None) -> dict[str, dict[str, str]]:
    """Return the docstrings of fields by class and field of one module; none where its source is not there."""
    try:
        tree = ast.parse(Path(file or "").read_bytes())
    except OSError:
        return {}
    return {
        kind.name: {
            field.target.id: inspect.cleandoc(text.value.value)
            for field, text in pairwise(kind.body)
            if isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
            and isinstance(text.value.value, str)
        }
        for kind in tree.body
        if isinstance(kind, ast.ClassDef)
    }

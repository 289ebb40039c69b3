"""Docstrings of fields, as users meet them."""

from __future__ import annotations

from pydantic import Field

from serving.documented import Documented, descriptions


class Fruit(Documented):
    weight: float
    """In grams,
    without its leaves."""
    colour: str = Field("red", description="As painters say.")
    """Not this."""
    seeds: int = 0


class Apple(Fruit):
    """A fruit."""

    sort: str
    """Its name."""
    weight: float
    """In kilograms."""


class Basket(Documented):
    fruit: list[Fruit]


def test_fields_are_described_by_their_docstrings() -> None:
    """A JSON schema says of a field what stands below it, inherited or not, and what `description` says comes first."""
    found = {name: of.get("description") for name, of in Apple.model_json_schema()["properties"].items()}
    assert found == {
        "weight": "In kilograms.",
        "colour": "As painters say.",
        "seeds": None,
        "sort": "Its name.",
    }
    assert descriptions(Fruit) == {"weight": "In grams,\nwithout its leaves.", "colour": "Not this."}
    nested = Basket.model_json_schema()["$defs"]["Fruit"]["properties"]
    assert nested["weight"]["description"] == "In grams,\nwithout its leaves."

"""Execution providers: what is made of a session that has one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from serving.engine.limits import Limits
from serving.engine.model import load
from serving.engine.providers import Provider, installed
from serving.engine.signature import METADATA_KEY
from serving.errors import InvalidRequest
from tests.conftest import MODELS

# One that onnxruntime's own package brings, and that takes no node: the processor runs all.
TAKES_NOTHING = "AzureExecutionProvider"


def test_who_is_installed_is_asked_of_onnxruntime() -> None:
    """A process that does not load onnxruntime knows which providers it has."""
    assert installed() == set(onnxruntime.get_available_providers())


@pytest.mark.skipif(TAKES_NOTHING not in onnxruntime.get_available_providers(), reason="not on this platform")
def test_a_provider_answers_golden_rows_as_the_processor_does(tmp_path: Path) -> None:
    """A model is not served by a provider that answers its golden rows otherwise; one that does not is used."""
    limits = Limits(providers=(Provider(name=TAKES_NOTHING),))
    model = onnx.load(str(MODELS / "diabetes" / "1" / "model.onnx"))
    path = tmp_path / "model.onnx"
    onnx.save(model, str(path))
    session, plain = load(path, limits=limits), load(path, limits=Limits())
    assert [provider.name for provider in session.providers] == [TAKES_NOTHING]
    assert np.array_equal(session.run(session.sample(1))[0], plain.run(plain.sample(1))[0])
    for property in model.metadata_props:
        if property.key == METADATA_KEY:
            signature = json.loads(property.value)
            ((name, rows),) = signature["golden"]["outputs"].items()
            rows[0] = (np.array(rows[0]) + 1000).tolist()
            property.value = json.dumps(signature)
    onnx.save(model, str(path))
    with pytest.raises(
        InvalidRequest, match=rf"execution.providers: with {TAKES_NOTHING} .* golden row 0: output {name}"
    ):
        load(path, limits=limits)

"""From a fitted model to a served one: `export` it with its signature, then `publish` it as the next version.

from training import export, publish
exported = export(fitted, train=X_train, held_out=X_test, metrics={"accuracy": 0.97})
publish(exported, name="iris", root=Path("models"))
"""

import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before onnxruntime is imported, as in the server

from training.export import Exported, export
from training.parity import ParityError
from training.publish import publish
from training.refusal import CannotExport

__all__ = ["CannotExport", "Exported", "ParityError", "export", "publish"]

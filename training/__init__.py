"""From a fitted model to a served one: `export` it with its signature, then `publish` it as the next version.

from training import export, publish
exported = export(fitted, train=X_train, held_out=X_test, metrics={"accuracy": 0.97})
publish(exported, name="iris", root=Path("models"))
"""

from training.export import Exported, export
from training.parity import ParityError
from training.publish import publish

__all__ = ["Exported", "ParityError", "export", "publish"]

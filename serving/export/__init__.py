"""From a fitted model to a served one: `export` it with its signature, then `publish` it as the next version.

from serving.export import export, publish
exported = export(fitted, train=X_train, held_out=X_test, metrics={"accuracy": 0.97})
publish(exported, name="iris", root="models")

Nothing of the server imports this package: what it needs comes with `pip install "serving[export]"`.
"""

try:
    from serving.export.compose import compose
    from serving.export.exported import Exported
    from serving.export.exporter import export
    from serving.export.parity import ParityError
    from serving.export.publish import publish
    from serving.export.refusal import CannotExport
except ModuleNotFoundError as error:
    if (error.name or "").startswith("serving"):
        raise
    raise ModuleNotFoundError(
        f'serving.export needs {error.name}: pip install "serving[export]"', name=error.name
    ) from error

__all__ = ["CannotExport", "Exported", "ParityError", "compose", "export", "publish"]

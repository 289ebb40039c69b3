"""Tries every export of `cases`, serves what converts, and asks it what the original is asked.

python -m tests.export.conversions            all of them, and rewrites docs/converts.md
python -m tests.export.conversions voting     those with "voting" in their name, group or data
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from fastapi.testclient import TestClient
from threadpoolctl import threadpool_limits

from serving.export import CannotExport, Exported, ParityError, export
from serving.http_api.app import create_app
from serving.settings import Settings
from tests.export.cases import cases
from tests.export.fitted import Case, Fitted

PAGE = Path(__file__).parents[2] / "docs" / "converts.md"


def table_of(rows: Any) -> pd.DataFrame:
    """Make a table of rows in any form."""
    if isinstance(rows, np.ndarray):
        return pd.DataFrame(rows)
    if isinstance(rows, pd.Series):
        return rows.to_frame()
    return rows if isinstance(rows, pd.DataFrame) else pd.DataFrame(rows.to_dict(as_series=False))


def sent(exported: Exported, rows: Any) -> list[dict[str, Any]]:
    """Write rows as a client sends them: pandas' own JSON, with the names that the model is documented with."""
    table = table_of(rows)
    table = table.set_axis([str(name) for name in table.columns], axis=1)
    if not isinstance(rows, np.ndarray | pd.Series):
        table = table[[f.name for f in exported.signature.features]]
    table.columns = [f.name for f in exported.signature.features]
    given: list[dict[str, Any]] = json.loads(table.to_json(orient="records", double_precision=15))
    return given


def originally(fitted: Fitted) -> dict[str, Any]:
    """Ask the original everything it can say of the held-out rows."""
    rows: Any = fitted.held_out
    if fitted.ask is not None:
        said: dict[str, Any] = fitted.ask(rows)
        return said
    steps = getattr(fitted.model, "steps", None)
    if isinstance(rows, pd.Series) or (steps and isinstance(rows, pd.DataFrame) and list(rows) == ["text"]):
        rows = table_of(rows).iloc[:, 0].tolist()
    elif not isinstance(rows, np.ndarray):
        rows = table_of(rows)[list(table_of(fitted.train))]
    said = {}
    for way in ("predict", "predict_proba", "decision_function", "transform", "score_samples"):
        if hasattr(fitted.model, way):
            answer = getattr(fitted.model, way)(rows)
            said[way] = answer.toarray() if hasattr(answer, "toarray") else answer
    return said


def differences(fitted: Fitted, predictions: Sequence[Any]) -> list[str]:
    """Name what was answered otherwise than the original says it."""
    said = originally(fitted)
    wrong = []
    first = predictions[0]
    if isinstance(first, dict):
        for key, ways in (
            ("label", ["predict"]),
            ("probabilities", ["predict_proba"]),
            ("scores", ["decision_function", "transform", "score_samples"]),
        ):
            due = next((said[way] for way in ways if way in said), None)
            if key in first and due is not None:
                got = [list(p[key].values()) if isinstance(p[key], dict) else p[key] for p in predictions]
                wrong += _compare(key, got, due, _near(said) if key == "label" else None)
        for key in first:
            if key.startswith("probabilities_"):
                wrong += _compare(key, [p[key] for p in predictions], said["predict_proba"][int(key[-1])])
    else:
        wrong += _compare("prediction", predictions, said.get("predict", said.get("transform")))
    return wrong


def _near(said: dict[str, Any]) -> Any:
    """Say for which rows two classes are as likely, so that either label is right."""
    scores = said.get("predict_proba", said.get("decision_function"))
    if scores is None or isinstance(scores, list) or np.asarray(scores).ndim == 1:
        return None
    ordered = np.sort(np.asarray(scores), axis=1)
    return ordered[:, -1] - ordered[:, -2] < 1e-4


def _compare(key: str, got: Any, due: Any, near: Any = None) -> list[str]:
    got, due = np.asarray(got), np.asarray(due)
    if near is not None and near.any():
        got, due = got[~near], due[~near]
    if near is not None and near.all():
        return [f"{key}: no row tells the classes apart"]
    if due.dtype.kind in "OUSTb":
        same = got.ravel().tolist() == due.ravel().tolist()
        return [] if same else [f"{key}: {got.ravel()[:4].tolist()} for {due.ravel()[:4].tolist()}"]
    got, due = got.reshape(len(got), -1).astype(float), due.reshape(len(due), -1).astype(float)
    if due.shape[1] == 1 and got.shape[1] == 2 and key == "scores":
        got = got[:, 1:]  # a margin of two classes is shown for both of them
    if got.shape != due.shape:
        return [f"{key}: shape {got.shape} for {due.shape}"]
    if not np.allclose(got, due, rtol=2e-4, atol=2e-4):
        worst = int(np.abs(got - due).max(axis=1).argmax())
        return [f"{key}: row {worst} {got[worst].tolist()} for {due[worst].tolist()}"]
    return []


def attempt(case: Case) -> tuple[Fitted, Exported | Exception]:
    """Fit and export one."""
    # Threads of OpenMP that wait for each other spin: beside another busy process that took three times as long.
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore")
        fitted = case.fit()
        try:
            return fitted, export(fitted.model, train=fitted.train, held_out=fitted.held_out, **fitted.options)
        except Exception as error:
            return fitted, error


def outcomes(chosen: Sequence[Case]) -> list[tuple[Case, str, str]]:
    """Try them all, on one server: each with "yes", "no" or "WRONG", and what is said of it."""
    found: dict[int, tuple[str, str]] = {}
    waiting: dict[int, tuple[Fitted, Exported]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for index, case in enumerate(chosen):
            if case.needs and not find_spec(case.needs):
                found[index] = ("not tried", f"{case.needs} is not installed")
                continue
            fitted, got = attempt(case)
            if isinstance(got, CannotExport | ParityError):
                found[index] = ("no", str(got))
            elif isinstance(got, Exception):
                found[index] = ("WRONG", "".join(traceback.format_exception_only(got))[:600])
            else:
                waiting[index] = (fitted, got)
                path = Path(folder) / f"m{index}" / "1" / "model.onnx"
                path.parent.mkdir(parents=True)
                path.write_bytes(got.content)
        if waiting:
            found |= _asked(Path(folder), waiting)
    return [(case, *found[index]) for index, case in enumerate(chosen)]


def _asked(folder: Path, waiting: dict[int, tuple[Fitted, Exported]]) -> dict[int, tuple[str, str]]:
    found = {}
    with TestClient(create_app(Settings(models=folder))) as client:
        for index, (fitted, exported) in waiting.items():
            for rows in ([exported.signature.example], sent(exported, fitted.held_out)):
                answer = client.post(f"/v1/models/m{index}:predict", json={"instances": rows})
                if answer.status_code != 200:
                    found[index] = ("WRONG", f"{answer.status_code} {answer.text[:300]}")
                    break
            else:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    try:
                        wrong = differences(fitted, answer.json()["predictions"])
                    except Exception as error:
                        wrong = [f"the answers can't be compared: {error!r}"]
                found[index] = ("WRONG" if wrong else "yes", "; ".join(wrong)[:600])
    return found


def faults(tried: Sequence[tuple[Case, str, str]]) -> list[str]:
    """Name what came out otherwise than `cases` says."""
    out = []
    for case, came, text in tried:
        due = "no" if case.refused else "yes"
        if came != "not tried" and (came != due or case.refused.lower() not in text.lower()):
            out.append(f"{case.group} | {case.name} | {case.data}: {came}, should be {due} {case.refused!r}: {text}")
    return out


def page(tried: Sequence[tuple[Case, str, str]]) -> str:
    """Write the manual's page."""
    tools = ("scikit-learn", "skl2onnx", "onnxmltools", "xgboost-cpu", "lightgbm", "onnxruntime")
    yes = sum(came == "yes" for _, came, _ in tried)
    lines = [
        "# What converts",
        "",
        "Each line was fitted, exported, served and asked for the rows that were held out, and its labels and scores",
        "were compared with the original's. This page is written by `python -m tests.export.conversions`, with",
        ", ".join(f"{tool} {version(tool)}" for tool in tools) + ".",
        "",
        f"{yes} of {len(tried)} convert. The others are refused with the text shown, and nothing is written.",
        "",
    ]
    for group in dict.fromkeys(case.group for case, *_ in tried):
        lines += [f"## {group.capitalize()}", "", "| model | data | converts |", "|---|---|---|"]
        for case, came, text in tried:
            if case.group == group:
                said = came if came == "yes" else f"{came}: {' '.join(text.split())}".replace("|", "\\|")
                lines.append(f"| {case.name} | {case.data} | {said} |")
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    """Try those asked for, print what is not as it should be; all of them also make the page."""
    asked = sys.argv[1:]
    chosen = [c for c in cases() if all(a.lower() in f"{c.group} {c.name} {c.data}".lower() for a in asked)]
    began = time.monotonic()
    tried = outcomes(chosen)
    wrong = faults(tried)
    for case, came, text in tried:
        print(f"{came:6} {case.group} | {case.name} | {case.data} {'' if came == 'yes' else text}")
    print(f"\n{len(tried)} tried in {time.monotonic() - began:.0f} s; {len(wrong)} not as they should be")
    print("\n".join(wrong))
    if not asked:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page(tried))
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())

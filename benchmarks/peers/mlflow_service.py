"""The forest as MLflow logs and serves it: `mlflow_service.py FOLDER PORT`. MODEL names the file."""

import os
import sys
from pathlib import Path

import mlflow.onnx
import numpy as np
import onnx
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec

folder, port = sys.argv[1:]
if not Path(folder).exists():
    rows = TensorSpec(np.dtype(np.float32), (-1, 30), "features")
    mlflow.onnx.save_model(
        onnx.load(os.environ["MODEL"]),
        folder,
        signature=ModelSignature(Schema([rows])),
        onnx_session_options={"intra_op_num_threads": 1, "inter_op_num_threads": 1},
    )
program = str(Path(sys.executable).parent / "mlflow")
serve = [program, "models", "serve", "-m", folder, "-h", "127.0.0.1", "-p", port, "--env-manager", "local"]
os.execv(program, [*serve, "--workers", "1"])

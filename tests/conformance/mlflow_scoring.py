"""Have MLflow's own client ask the real server, of folders that MLflow logged:
`python -m tests.conformance.mlflow_scoring`.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from tests.conformance.environments import environment
from tests.conftest import running

CLIENT = Path(__file__).with_name("mlflow_client.py")


def main() -> int:
    """Print a line for each point; return 1 where one is not kept."""
    python = str(environment("mlflow") / "bin" / "python")
    with tempfile.TemporaryDirectory(prefix="mlflow-") as folder:
        models = Path(folder) / "models"
        models.mkdir()
        # -P: this folder's modules are not to be found by the names of MLflow's.
        subprocess.run([python, "-P", str(CLIENT), "save", str(models)], check=True, cwd=folder)
        with running("--platform", "mlflow", "--platform-model", "frame", models=models) as server:
            ended = subprocess.run(
                [python, "-P", str(CLIENT), "ask", str(models), str(server.port)],
                check=True,
                cwd=folder,
                stdout=subprocess.PIPE,
                text=True,
            )
    print(ended.stdout, end="")
    return 0 if all(line.startswith("yes") for line in ended.stdout.splitlines()) else 1


if __name__ == "__main__":
    sys.exit(main())

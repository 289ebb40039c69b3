"""Run by `make dist` where the wheel with its exporter and client is installed, and nothing else of this project.

From an empty folder to a first prediction: the README's scikit-learn model, `serving run`, `serving predict`.
"""

import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

began = time.monotonic()
command = str(Path(sys.executable).with_name("serving"))
readme = Path(sys.argv[1]).read_text()
lines = readme.split("## Your own scikit-learn model")[1].split("```python\n")[1].split("```")[0]
present = {d.name.lower() for d in metadata.distributions()}
assert not {"lightgbm", "xgboost", "xgboost-cpu", "pytest"} & present, "more is installed than the extras bring"
with tempfile.TemporaryDirectory() as folder:
    subprocess.run([sys.executable, "-c", lines], cwd=folder, check=True)
    run = [command, "run", "--port", "0"]
    with subprocess.Popen(run, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        printed = []
        for line in server.stdout or ():
            printed.append(line)
            if found := re.search(r"serving on (http://127\.0\.0\.1:\d+)", line):
                break
        else:
            raise SystemExit("".join(printed))
        try:
            asked = (
                "from sklearn.datasets import load_wine; d = load_wine(as_frame=True).data; print(d.iloc[0].to_json())"
            )
            row = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True).stdout
            predict = [command, "predict", "wine", row, "--url", found[1]]
            said = subprocess.run(predict, capture_output=True, text=True, check=False)
            assert said.returncode == 0, said.stderr
            assert json.loads(said.stdout)["label"] == "class_0", said.stdout
        finally:
            server.send_signal(signal.SIGTERM)
    assert server.wait(40) == 0, server.returncode
print(f"a model of one's own answers {time.monotonic() - began:.0f} s after its libraries are installed")

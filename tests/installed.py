"""Run by `make dist` with an installed wheel's own Python: the command serves a folder and answers.

Only the standard library is used: what the tests install is not there.
"""

import json
import re
import signal
import subprocess
import sys
import urllib.request
from importlib import metadata, resources
from pathlib import Path

command = [str(Path(sys.executable).with_name("serving"))]
said = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
assert said == f"serving {metadata.version('serving')}\n", said
run = [*command, "run", "--port", "0", "--grpc-port", "0", "--models", sys.argv[1]]
with subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
    printed = []
    for line in server.stdout or ():
        printed.append(line)
        if found := re.search(r"serving on (http://127\.0\.0\.1:\d+)", line):
            break
    else:
        raise SystemExit("".join(printed))
    try:
        body = json.dumps({"instances": [[5.1, 3.5, 1.4, 0.2]]}).encode()
        with urllib.request.urlopen(f"{found[1]}/v1/models/iris:predict", body, timeout=20) as answer:
            assert json.load(answer)["predictions"][0]["label"] == "setosa"
        with urllib.request.urlopen(f"{found[1]}/docs", timeout=20) as page:
            assert page.status == 200
    finally:
        server.send_signal(signal.SIGTERM)
assert server.wait(40) == 0, server.returncode
exporter = subprocess.run([sys.executable, "-c", "import serving.export"], capture_output=True, text=True, check=False)
assert 'pip install "serving[export]"' in exporter.stderr, exporter.stderr
assert not {"scikit-learn", "lightgbm", "pytest"} & {d.name.lower() for d in metadata.distributions()}
assert resources.files("serving").joinpath("py.typed").is_file(), "its types are for callers too"
print(said.strip(), "installs and serves")

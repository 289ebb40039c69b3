"""KServe's own client against a server: `python kserve_client.py HTTP_URL GRPC_ADDRESS < cases.json`.

Runs where kserve is installed, and prints what came of each call as JSON. A case is a model's name and its inputs.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest, RESTConfig

DTYPES = {"FP32": "float32", "FP64": "float64", "INT64": "int64", "INT32": "int32", "BYTES": "object", "BOOL": "bool"}


def request(case: dict[str, Any], *, binary: bool) -> InferRequest:
    inputs = []
    for tensor in case["inputs"]:
        one = InferInput(tensor["name"], tensor["shape"], tensor["datatype"])
        array = np.array(tensor["data"], dtype=DTYPES.get(tensor["datatype"])).reshape(tensor["shape"])
        one.set_data_from_numpy(array, binary_data=binary)
        inputs.append(one)
    return InferRequest(case["model"], inputs, request_id="a-1")


def answer(response: Any) -> dict[str, Any]:
    outputs = []
    for output in response.outputs:
        data = [v.decode() if isinstance(v, bytes) else v for v in output.as_numpy().ravel().tolist()]
        outputs.append({"name": output.name, "datatype": output.datatype, "shape": list(output.shape), "data": data})
    return {"id": response.id, "outputs": outputs}


async def main(url: str, address: str) -> None:
    cases = json.load(sys.stdin)
    name = cases[0]["model"]
    rest = InferenceRESTClient(RESTConfig(protocol="v2", retries=0))
    found: dict[str, Any] = {}

    async def note(key: str, call: Callable[[], Awaitable[Any]]) -> None:
        try:
            found[key] = {"is": await call()}
        except Exception as error:
            found[key] = {"error": f"{type(error).__name__}: {error}"[:300]}

    def predict(shared: str, case: dict[str, Any], *, binary: bool) -> Callable[[], Awaitable[Any]]:
        async def call() -> Any:
            made = request(case, binary=binary)
            if shared == "rest":
                return answer(await rest.infer(url, made, model_name=case["model"]))
            return answer(await grpc.infer(made))

        return call

    await note("rest live", lambda: rest.is_server_live(url))
    await note("rest ready", lambda: rest.is_server_ready(url))
    await note("rest model", lambda: rest.is_model_ready(url, name))
    for case in cases:
        await note(f"rest json {case['model']}", predict("rest", case, binary=False))
        await note(f"rest binary {case['model']}", predict("rest", case, binary=True))
    await note("rest unknown", predict("rest", {**cases[0], "model": "no-such-model"}, binary=False))
    await rest.close()
    if address:
        grpc = InferenceGRPCClient(address, retries=0)
        await note("grpc live", grpc.is_server_live)
        await note("grpc ready", grpc.is_server_ready)
        await note("grpc model", lambda: grpc.is_model_ready(name))
        for case in cases:
            await note(f"grpc json {case['model']}", predict("grpc", case, binary=False))
            await note(f"grpc binary {case['model']}", predict("grpc", case, binary=True))
        await note("grpc unknown", predict("grpc", {**cases[0], "model": "no-such-model"}, binary=False))
        await grpc.close()
    print(json.dumps(found))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:3]))

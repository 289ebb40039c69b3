"""Asks with the client that openapi-python-client makes of the OpenAPI document, `made`; run with the server's URL."""

# mypy: ignore-errors
import sys

from made import AuthenticatedClient, Client
from made.api.deploy import promote, traffic_state
from made.api.iris import infer_iris, label_predict_iris, predict_iris
from made.api.models import describe_model, list_models
from made.api.open_inference_protocol import model_statistics, repository_index
from made.models import (
    Error,
    InferResponse,
    Iris2Columns,
    Iris2Predictions,
    Iris2Rows,
    Iris2Tensors,
    ModelDescription,
    ModelList,
    PromotePromote,
    Statistics,
    TrafficState,
)

client = Client(base_url=sys.argv[1])
failed = False


def point(name: str, kept: bool) -> None:
    global failed  # noqa: PLW0603  a script
    failed = failed or not kept
    print(f"{'yes' if kept else 'no'}: {name}")


ROW = {"sepal_length": 5.1, "sepal_width": 3.5, "petal_length": 1.4, "petal_width": 0.2}
rows = predict_iris.sync(client=client, body=Iris2Rows.from_dict({"instances": [ROW, [6.7, 3.0, 5.2, 2.3]]}))
point(
    "rows by feature name, and scores by class",
    isinstance(rows, Iris2Predictions)
    and [one.label for one in rows.predictions] == ["setosa", "virginica"]
    and rows.predictions[0].probabilities.setosa > 0.9,
)
columns = Iris2Rows.from_dict({"inputs": {name: [value] for name, value in ROW.items()}})
answer = label_predict_iris.sync(label="stable", client=client, body=columns, x_request_timeout=20)
point("columns, by a label, with a deadline", isinstance(answer, Iris2Columns) and answer.outputs.label == ["setosa"])
wrong = predict_iris.sync(client=client, body=Iris2Rows.from_dict({"instances": [{**ROW, "petal_width": None}]}))
point("a bad cell is named", isinstance(wrong, Error) and wrong.details[0].path == "/instances/0/petal_width")
tensor = {"name": "features", "datatype": "FP32", "shape": [1, 4], "data": list(ROW.values())}
tensors = infer_iris.sync(client=client, body=Iris2Tensors.from_dict({"inputs": [tensor]}))
point("tensors", isinstance(tensors, InferResponse) and tensors.outputs[0].data == ["setosa"])
models = list_models.sync(client=client)
point("models", isinstance(models, ModelList) and "iris" in models.models)
model = describe_model.sync("iris", client=client)
point("features", isinstance(model, ModelDescription) and [one.name for one in model.features] == list(ROW))
statistics = model_statistics.sync("iris", client=client)
point("statistics", isinstance(statistics, Statistics) and statistics.model_stats[0].name == "iris")
traffic = traffic_state.sync("iris", client=client)
point("traffic", isinstance(traffic, TrafficState) and traffic.traffic.generation == traffic.generation)
unknown = describe_model.sync("rose", client=client)
point("an unknown model", isinstance(unknown, Error) and "rose" in unknown.error)
keyed = AuthenticatedClient(base_url=sys.argv[1], token="none")
refused = promote.sync("iris", client=keyed, body=PromotePromote.from_dict({"version": "1"}))
point("a change with a wrong key", isinstance(refused, Error))
index = repository_index.sync(client=client)
point("repository index", "iris" in {one.name for one in index})
sys.exit(failed)

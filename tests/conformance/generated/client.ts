// Asks with types made of the OpenAPI document: what it says wrongly does not compile, or is not what comes.
import createClient from "openapi-fetch";
import type { components, paths } from "./schema.js";

const client = createClient<paths>({ baseUrl: process.argv[2] });
let failed = 0;

function point(name: string, kept: boolean): void {
  failed += kept ? 0 : 1;
  console.log(`${kept ? "yes" : "no"}: ${name}`);
}

const row = { sepal_length: 5.1, sepal_width: 3.5, petal_length: 1.4, petal_width: 0.2 };
const rows = await client.POST("/v1/models/iris:predict", { body: { instances: [row, [6.7, 3.0, 5.2, 2.3]] } });
if (rows.data && "predictions" in rows.data) {
  const labels: ("setosa" | "versicolor" | "virginica")[] = rows.data.predictions.map((one) => one.label);
  const first: number | null = rows.data.predictions[0].probabilities.setosa;
  point("rows by feature name, and scores by class", labels.join() === "setosa,virginica" && first !== null && first > 0.9);
} else point("rows by feature name, and scores by class", false);

const columns = await client.POST("/v1/models/iris/labels/{label}:predict", {
  params: { path: { label: "stable" }, header: { "X-Request-Timeout": 20 } },
  body: { inputs: { sepal_length: [5.1], sepal_width: [3.5], petal_length: [1.4], petal_width: [0.2] } },
});
point(
  "columns, by a label, with a deadline",
  !!columns.data && "outputs" in columns.data && columns.data.outputs.label[0] === "setosa",
);

const wrong = await client.POST("/v1/models/iris:predict", { body: { instances: [{ ...row, petal_width: NaN }] } });
const error: components["schemas"]["Error"] | undefined = wrong.error;
point("a bad cell is named", wrong.response.status === 422 && error?.details?.[0].path === "/instances/0/petal_width");

const tensors = await client.POST("/v2/models/iris/infer", {
  body: { inputs: [{ name: "features", datatype: "FP32", shape: [1, 4], data: [5.1, 3.5, 1.4, 0.2] }] },
});
const outputs = tensors.data && typeof tensors.data !== "string" ? tensors.data.outputs : [];
point("tensors", outputs.find((one) => one.name === "label")?.data[0] === "setosa");

const models = await client.GET("/v1/models");
const model = await client.GET("/v1/models/{model}", { params: { path: { model: "iris" } } });
point(
  "models and their features",
  !!models.data?.models.includes("iris") && model.data?.features.map((one) => one.name).join() === Object.keys(row).join(),
);
const statistics = await client.GET("/v2/models/{model}/stats", { params: { path: { model: "iris" } } });
point("statistics", (statistics.data?.model_stats[0].inference_stats.success.count ?? 0) >= 0 && !!statistics.data);
const traffic = await client.GET("/v1/repository/models/{model}", { params: { path: { model: "iris" } } });
point("traffic", traffic.data?.traffic.generation === traffic.data?.generation && !!traffic.data);
const nobody = await client.GET("/v1/models/{model}", { params: { path: { model: "rose" } } });
point("an unknown model", nobody.response.status === 404 && !!nobody.error?.error.includes("rose"));
const refused = await client.POST("/v1/repository/models/{model}/promote", {
  params: { path: { model: "iris" } },
  body: { version: "1", why: "" },
});
point("a change without a key", refused.response.status === 403 && !!refused.error?.error);

process.exit(failed ? 1 : 0);

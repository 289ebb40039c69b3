//! Asks a server over gRPC with hyper and h2, which tonic stands on: `client ADDRESS`; or, as `client ADDRESS on`,
//! calls until its input ends. Nothing here sends a call again.

use bytes::{Buf, Bytes};
use http_body::Body as _;
use hyper::client::HttpConnector;
use hyper::{Body, Client, Request, Response};
use prost::Message;
use std::future::Future;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::Arc;
use std::time::Duration;

type Error = Box<dyn std::error::Error + Send + Sync>;

#[derive(Message)]
struct Nothing {}

#[derive(Message)]
struct Named {
    #[prost(string, tag = "1")]
    name: String,
}

#[derive(Message)]
struct Said {
    #[prost(int32, tag = "1")]
    value: i32,
}

#[derive(Message)]
struct Tensor {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    datatype: String,
    #[prost(int64, repeated, tag = "3")]
    shape: Vec<i64>,
}

#[derive(Message)]
struct Metadata {
    #[prost(message, repeated, tag = "4")]
    inputs: Vec<Tensor>,
}

#[derive(Message)]
struct InferRequest {
    #[prost(string, tag = "1")]
    model_name: String,
    #[prost(string, tag = "3")]
    id: String,
    #[prost(message, repeated, tag = "5")]
    inputs: Vec<Tensor>,
    #[prost(bytes = "vec", repeated, tag = "7")]
    raw: Vec<Vec<u8>>,
}

#[derive(Message)]
struct InferResponse {
    #[prost(string, tag = "3")]
    id: String,
    #[prost(message, repeated, tag = "5")]
    outputs: Vec<Tensor>,
    #[prost(bytes = "vec", repeated, tag = "6")]
    raw: Vec<Vec<u8>>,
}

#[derive(Message)]
struct StreamResponse {
    #[prost(string, tag = "1")]
    error: String,
    #[prost(message, optional, tag = "2")]
    response: Option<InferResponse>,
}

const INFER: &str = "inference.GRPCInferenceService/ModelInfer";
const STREAM: &str = "inference.GRPCInferenceService/ModelStreamInfer";

fn request(model: &str, id: String, rows: usize) -> InferRequest {
    let row: Vec<u8> = [5.1f32, 3.5, 1.4, 0.2].iter().flat_map(|value| value.to_le_bytes()).collect();
    let input = Tensor { name: "features".into(), datatype: "FP32".into(), shape: vec![rows as i64, 4] };
    InferRequest { model_name: model.into(), id, inputs: vec![input], raw: vec![row.repeat(rows)] }
}

fn framed(message: &impl Message) -> Bytes {
    let body = message.encode_to_vec();
    [&[0][..], &(body.len() as u32).to_be_bytes(), &body].concat().into()
}

/// Fails unless an answer begins with the label of the row that was sent, as 4 bytes of length and text.
fn right(answer: &InferResponse) -> Result<(), Error> {
    let at = answer.outputs.iter().position(|output| output.name == "label").ok_or("no label")?;
    expect(answer.raw[at].starts_with(b"\x06\0\0\0setosa"), "the answer is another")
}

fn expect(truth: bool, otherwise: impl Into<Error>) -> Result<(), Error> {
    if truth { Ok(()) } else { Err(otherwise.into()) }
}

fn tell(name: &str, result: Result<(), Error>) {
    match result {
        Ok(()) => println!("yes: {name}"),
        Err(error) => println!("no: {name}: {error:?}"),
    }
}

#[derive(Clone)]
struct Asker {
    client: Client<HttpConnector>,
    address: String,
}

/// What came of a call: its messages, and its status.
struct Outcome {
    messages: Vec<Bytes>,
    status: i32,
}

impl Asker {
    async fn open(&self, path: &str, body: Body, timeout: &str) -> Result<Response<Body>, hyper::Error> {
        let request = Request::post(format!("http://{}/{path}", self.address))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .header("grpc-timeout", timeout);
        self.client.request(request.body(body).unwrap()).await
    }

    async fn call(&self, path: &str, body: Body, timeout: &str) -> Result<Outcome, hyper::Error> {
        let mut response = self.open(path, body, timeout).await?;
        let mut data = Vec::new();
        let mut trailers = response.headers().clone();
        if !trailers.contains_key("grpc-status") {
            while let Some(piece) = response.body_mut().data().await {
                data.extend_from_slice(&piece?);
            }
            trailers = response.body_mut().trailers().await?.unwrap_or_default();
        }
        let status = trailers.get("grpc-status").and_then(|value| value.to_str().ok()?.parse().ok()).unwrap_or(-1);
        let mut messages = Vec::new();
        let mut data = Bytes::from(data);
        while data.has_remaining() {
            data.advance(1);
            let size = data.get_u32() as usize;
            messages.push(data.split_to(size));
        }
        Ok(Outcome { messages, status })
    }

    async fn unary<A: Message + Default>(&self, path: &str, message: &impl Message) -> Result<A, Error> {
        let outcome = self.call(path, Body::from(framed(message)), "60S").await?;
        expect(outcome.status == 0, format!("status {}", outcome.status))?;
        Ok(A::decode(outcome.messages.first().ok_or("no answer")?.clone())?)
    }

    async fn infer(&self, rows: usize) -> Result<(), Error> {
        right(&self.unary(INFER, &request("iris", String::new(), rows)).await?)
    }

    async fn metadata(&self) -> Result<(), Error> {
        let live: Said = self.unary("inference.GRPCInferenceService/ServerLive", &Nothing {}).await?;
        expect(live.value == 1, "not live")?;
        let named = Named { name: "iris".into() };
        let model: Metadata = self.unary("inference.GRPCInferenceService/ModelMetadata", &named).await?;
        expect(model.inputs[0].name == "features", "another input")
    }

    async fn stream(&self) -> Result<(), Error> {
        let asked = (0..50).map(|i| Ok::<_, Error>(framed(&request("iris", i.to_string(), 1))));
        let body = Body::wrap_stream(futures_util::stream::iter(asked.collect::<Vec<_>>()));
        let outcome = self.call(STREAM, body, "60S").await?;
        expect(outcome.status == 0 && outcome.messages.len() == 50, format!("status {}", outcome.status))?;
        for (i, message) in outcome.messages.into_iter().enumerate() {
            let answer = StreamResponse::decode(message)?;
            let response = answer.response.ok_or(answer.error)?;
            expect(response.id == i.to_string(), "out of order")?;
            right(&response)?;
        }
        Ok(())
    }

    async fn health(&self) -> Result<(), Error> {
        let said: Said = self.unary("grpc.health.v1.Health/Check", &Nothing {}).await?;
        expect(said.value == 1, "not serving")?;
        let body = Body::from(framed(&Named { name: "nope".into() }));
        expect(self.call("grpc.health.v1.Health/Check", body, "60S").await?.status == 5, "not NOT_FOUND")
    }

    async fn refusals(&self) -> Result<(), Error> {
        let body = || Body::from(framed(&request("nope", String::new(), 1)));
        expect(self.call(INFER, body(), "60S").await?.status == 5, "not NOT_FOUND")?;
        let nope = self.call("inference.GRPCInferenceService/Nope", body(), "60S").await?;
        expect(nope.status == 12, "not UNIMPLEMENTED")
    }

    async fn deadline(&self) -> Result<(), Error> {
        let (_kept_open, body) = Body::channel();
        expect(self.call(STREAM, body, "300m").await?.status == 4, "not DEADLINE_EXCEEDED")?;
        self.infer(1).await
    }

    /// Opens a stream, takes its first answer, and leaves.
    async fn leave(&self) -> Result<(), Error> {
        let (mut sending, body) = Body::channel();
        sending.send_data(framed(&request("iris", String::new(), 1))).await?;
        let mut response = self.open(STREAM, body, "60S").await?;
        response.body_mut().data().await.ok_or("no answer")??;
        Ok(())
    }

    async fn cancellation(&self) -> Result<(), Error> {
        all(500, |_| async { self.leave().await }).await?;
        self.infer(1).await
    }

    async fn call_on(&self) {
        let (answered, over) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let ended = over.clone();
        std::thread::spawn(move || {
            std::io::stdin().read_line(&mut String::new()).ok();
            ended.store(true, Ordering::SeqCst);
        });
        let result = all(32, |_| async {
            while !over.load(Ordering::SeqCst) {
                match self.infer(1).await {
                    Ok(()) => {
                        let n = answered.fetch_add(1, Ordering::SeqCst) + 1;
                        if n % 1000 == 0 {
                            println!("{n}");
                        }
                    }
                    // There was no connection: the others that waited for it are told that they are cancelled.
                    Err(error) if error.downcast_ref().map_or(false, |e: &hyper::Error| e.is_connect() || e.is_canceled()) => {
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                    Err(error) => return Err(error),
                }
            }
            Ok(())
        });
        let result = result.await;
        tell(&format!("{} calls through new workers and a new server", answered.load(Ordering::SeqCst)), result);
    }
}

async fn all<F: Future<Output = Result<(), Error>>>(n: usize, call: impl Fn(usize) -> F) -> Result<(), Error> {
    let results = futures_util::future::join_all((0..n).map(call)).await;
    let failures: Vec<Error> = results.into_iter().filter_map(Result::err).collect();
    expect(failures.is_empty(), format!("{} of {n}: {:?}", failures.len(), failures.first()))
}

#[tokio::main]
async fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let client = Client::builder().http2_only(true).build_http();
    let a = Asker { client, address: arguments[1].clone() };
    if arguments.len() > 2 {
        return a.call_on().await;
    }
    tell("metadata", a.metadata().await);
    tell("unary", a.infer(1).await);
    tell("a message of 1 MB", a.infer(60_000).await);
    tell("stream", a.stream().await);
    tell("health", a.health().await);
    tell("refusals", a.refusals().await);
    tell("1,000 calls at once", all(1000, |_| a.infer(1)).await);
    tell("deadline", a.deadline().await);
    tell("500 cancelled streams", a.cancellation().await);
}

// Asks a server over gRPC with grpc-java: `Client ADDRESS`; or, as `Client ADDRESS on`, calls until its input ends.

import com.google.protobuf.ByteString;
import grpc.health.v1.HealthGrpc;
import grpc.health.v1.HealthOuterClass.HealthCheckRequest;
import grpc.health.v1.HealthOuterClass.HealthCheckResponse;
import grpc.reflection.v1.Reflection.ServerReflectionRequest;
import grpc.reflection.v1.Reflection.ServerReflectionResponse;
import grpc.reflection.v1.ServerReflectionGrpc;
import inference.GRPCInferenceServiceGrpc;
import inference.GRPCInferenceServiceGrpc.GRPCInferenceServiceBlockingStub;
import inference.GRPCInferenceServiceGrpc.GRPCInferenceServiceStub;
import inference.GrpcService.ModelInferRequest;
import inference.GrpcService.ModelInferResponse;
import inference.GrpcService.ModelMetadataRequest;
import inference.GrpcService.ModelStreamInferResponse;
import inference.GrpcService.ServerLiveRequest;
import io.grpc.CallOptions;
import io.grpc.ManagedChannel;
import io.grpc.MethodDescriptor;
import io.grpc.Status;
import io.grpc.netty.NettyChannelBuilder;
import io.grpc.protobuf.ProtoUtils;
import io.grpc.stub.ClientCallStreamObserver;
import io.grpc.stub.ClientCalls;
import io.grpc.stub.ClientResponseObserver;
import io.grpc.stub.StreamObserver;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.util.ArrayList;
import java.util.List;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.Future;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicInteger;

public class Client {
  interface Check {
    void run() throws Exception;
  }

  final ManagedChannel channel;
  final GRPCInferenceServiceBlockingStub stub;
  final GRPCInferenceServiceStub streams;

  Client(String address) {
    channel = NettyChannelBuilder.forTarget(address).usePlaintext().build();
    stub = GRPCInferenceServiceGrpc.newBlockingStub(channel);
    streams = GRPCInferenceServiceGrpc.newStub(channel);
  }

  static ModelInferRequest request(String model, String id, int rows) {
    ByteBuffer raw = ByteBuffer.allocate(16 * rows).order(ByteOrder.LITTLE_ENDIAN);
    for (int i = 0; i < rows; i++) raw.putFloat(5.1f).putFloat(3.5f).putFloat(1.4f).putFloat(0.2f);
    return ModelInferRequest.newBuilder().setModelName(model).setId(id)
        .addInputs(ModelInferRequest.InferInputTensor.newBuilder()
            .setName("features").setDatatype("FP32").addShape(rows).addShape(4))
        .addRawInputContents(ByteString.copyFrom(raw.array())).build();
  }

  /** Fails unless an answer begins with the label of the row that was sent, as 4 bytes of length and text. */
  static void right(ModelInferResponse answer) {
    for (int i = 0; i < answer.getOutputsCount(); i++) {
      if (answer.getOutputs(i).getName().equals("label")) {
        ByteString due = ByteString.copyFromUtf8("\6\0\0\0setosa");
        expect(answer.getRawOutputContents(i).startsWith(due), "the answer is another");
        return;
      }
    }
    throw new AssertionError("no label");
  }

  static void expect(boolean truth, Object otherwise) {
    if (!truth) throw new AssertionError(otherwise);
  }

  static void ended(Throwable error, Status.Code code) {
    expect(error != null && Status.fromThrowable(error).getCode() == code, error + " for " + code);
  }

  static void ended(Check call, Status.Code code) {
    Throwable thrown = null;
    try {
      call.run();
    } catch (Exception error) {
      thrown = error;
    }
    ended(thrown, code);
  }

  static void tell(String name, Check check) {
    try {
      check.run();
      System.out.println("yes: " + name);
    } catch (Throwable error) {
      System.out.println("no: " + name + ": " + error);
    }
  }

  void infer(int rows) {
    right(stub.withDeadlineAfter(60, TimeUnit.SECONDS).withWaitForReady().modelInfer(request("iris", "", rows)));
  }

  void metadata() {
    expect(stub.serverLive(ServerLiveRequest.getDefaultInstance()).getLive(), "not live");
    ModelMetadataRequest asked = ModelMetadataRequest.newBuilder().setName("iris").build();
    expect(stub.modelMetadata(asked).getInputs(0).getName().equals("features"), "another input");
  }

  /** Gathers what comes on a stream, and how it ends. */
  static class Gathering<Q, A> implements ClientResponseObserver<Q, A> {
    final List<A> answers = new ArrayList<>();
    final CountDownLatch first = new CountDownLatch(1);
    final CountDownLatch end = new CountDownLatch(1);
    volatile Throwable error;
    volatile ClientCallStreamObserver<Q> call;

    @Override public void beforeStart(ClientCallStreamObserver<Q> call) {
      this.call = call;
    }

    @Override public void onNext(A answer) {
      answers.add(answer);
      first.countDown();
    }

    @Override public void onError(Throwable error) {
      this.error = error;
      first.countDown();
      end.countDown();
    }

    @Override public void onCompleted() {
      first.countDown();
      end.countDown();
    }

    void await() throws Exception {
      expect(end.await(60, TimeUnit.SECONDS), "the stream does not end");
    }
  }

  void stream() throws Exception {
    Gathering<ModelInferRequest, ModelStreamInferResponse> gathered = new Gathering<>();
    StreamObserver<ModelInferRequest> sending = streams.modelStreamInfer(gathered);
    for (int i = 0; i < 50; i++) sending.onNext(request("iris", "" + i, 1));
    sending.onCompleted();
    gathered.await();
    expect(gathered.error == null && gathered.answers.size() == 50, gathered.error);
    for (int i = 0; i < 50; i++) {
      expect(gathered.answers.get(i).getInferResponse().getId().equals("" + i), gathered.answers.get(i));
      right(gathered.answers.get(i).getInferResponse());
    }
  }

  void health() {
    HealthGrpc.HealthBlockingStub asking = HealthGrpc.newBlockingStub(channel);
    HealthCheckResponse said = asking.check(HealthCheckRequest.getDefaultInstance());
    expect(said.getStatus() == HealthCheckResponse.ServingStatus.SERVING, said);
    ended(() -> asking.check(HealthCheckRequest.newBuilder().setService("nope").build()), Status.Code.NOT_FOUND);
  }

  void reflection() throws Exception {
    Gathering<ServerReflectionRequest, ServerReflectionResponse> gathered = new Gathering<>();
    StreamObserver<ServerReflectionRequest> asking = ServerReflectionGrpc.newStub(channel).serverReflectionInfo(gathered);
    asking.onNext(ServerReflectionRequest.newBuilder().setListServices("").build());
    asking.onCompleted();
    gathered.await();
    expect(gathered.answers.get(0).getListServicesResponse().getServiceCount() >= 3, gathered.answers);
  }

  void refusals() {
    ended(() -> stub.modelInfer(request("nope", "", 1)), Status.Code.NOT_FOUND);
    MethodDescriptor<ModelInferRequest, ModelInferResponse> nope = GRPCInferenceServiceGrpc.getModelInferMethod()
        .toBuilder().setFullMethodName("inference.GRPCInferenceService/Nope").build();
    ended(() -> ClientCalls.blockingUnaryCall(channel, nope, CallOptions.DEFAULT, request("iris", "", 1)),
        Status.Code.UNIMPLEMENTED);
  }

  void thousand() throws Exception {
    List<Future<ModelInferResponse>> asked = new ArrayList<>();
    for (int i = 0; i < 1000; i++) {
      asked.add(GRPCInferenceServiceGrpc.newFutureStub(channel).modelInfer(request("iris", "", 1)));
    }
    for (Future<ModelInferResponse> answer : asked) right(answer.get(60, TimeUnit.SECONDS));
  }

  void deadline() throws Exception {
    Gathering<ModelInferRequest, ModelStreamInferResponse> gathered = new Gathering<>();
    streams.withDeadlineAfter(300, TimeUnit.MILLISECONDS).modelStreamInfer(gathered);
    gathered.await();
    ended(gathered.error, Status.Code.DEADLINE_EXCEEDED);
    infer(1);
  }

  void cancellation() throws Exception {
    List<Gathering<ModelInferRequest, ModelStreamInferResponse>> all = new ArrayList<>();
    for (int i = 0; i < 500; i++) {
      Gathering<ModelInferRequest, ModelStreamInferResponse> gathered = new Gathering<>();
      streams.modelStreamInfer(gathered).onNext(request("iris", "", 1));
      all.add(gathered);
    }
    for (Gathering<ModelInferRequest, ModelStreamInferResponse> gathered : all) {
      expect(gathered.first.await(60, TimeUnit.SECONDS) && gathered.error == null, gathered.error);
      gathered.call.cancel("no longer wanted", null);
      gathered.await();
      ended(gathered.error, Status.Code.CANCELLED);
    }
    infer(1);
  }

  /** Calls from 32 threads; none may fail, whatever becomes of the servers behind the address meanwhile. */
  void callOn() throws Exception {
    AtomicInteger answered = new AtomicInteger();
    List<Thread> threads = new ArrayList<>();
    List<Throwable> failures = new ArrayList<>();
    CountDownLatch over = new CountDownLatch(1);
    for (int i = 0; i < 32; i++) {
      Thread calling = new Thread(() -> {
        try {
          while (over.getCount() > 0) {
            infer(1);
            int n = answered.incrementAndGet();
            if (n % 1000 == 0) System.out.println(n);
          }
        } catch (Throwable error) {
          synchronized (failures) {
            failures.add(error);
          }
        }
      });
      calling.start();
      threads.add(calling);
    }
    System.in.read();
    over.countDown();
    for (Thread calling : threads) calling.join();
    tell(answered + " calls through new workers and a new server", () -> expect(failures.isEmpty(), failures));
  }

  public static void main(String[] arguments) throws Exception {
    Client client = new Client(arguments[0]);
    if (arguments.length > 1) {
      client.callOn();
    } else {
      tell("metadata", client::metadata);
      tell("unary", () -> client.infer(1));
      tell("a message of 1 MB", () -> client.infer(60_000));
      tell("gzip", () -> right(client.stub.withCompression("gzip").modelInfer(request("iris", "", 5_000))));
      tell("stream", client::stream);
      tell("health", client::health);
      tell("reflection", client::reflection);
      tell("refusals", client::refusals);
      tell("1,000 calls at once", client::thousand);
      tell("deadline", client::deadline);
      tell("500 cancelled streams", client::cancellation);
    }
    client.channel.shutdownNow().awaitTermination(10, TimeUnit.SECONDS);
  }
}

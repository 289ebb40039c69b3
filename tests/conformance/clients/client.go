// Asks a server over gRPC with grpc-go: `client ADDRESS`; or, as `client ADDRESS on`, calls until its input ends.
package main

import (
	"context"
	"fmt"
	"math"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding/gzip"
	"google.golang.org/grpc/status"

	health "served/health"
	pb "served/inference"
	reflection "served/reflection"
)

func request(model, id string, rows int) *pb.ModelInferRequest {
	raw := make([]byte, 0, 16*rows)
	for i := 0; i < rows; i++ {
		for _, value := range []float32{5.1, 3.5, 1.4, 0.2} {
			bits := math.Float32bits(value)
			raw = append(raw, byte(bits), byte(bits>>8), byte(bits>>16), byte(bits>>24))
		}
	}
	input := &pb.ModelInferRequest_InferInputTensor{Name: "features", Datatype: "FP32", Shape: []int64{int64(rows), 4}}
	return &pb.ModelInferRequest{
		ModelName: model, Id: id, RawInputContents: [][]byte{raw},
		Inputs: []*pb.ModelInferRequest_InferInputTensor{input},
	}
}

// right tells whether an answer begins with the label of the row that was sent, as 4 bytes of length and text.
func right(answer *pb.ModelInferResponse) bool {
	for i, output := range answer.GetOutputs() {
		if output.Name == "label" {
			return string(answer.RawOutputContents[i][:10]) == "\x06\x00\x00\x00setosa"
		}
	}
	return false
}

func ended(err error, code codes.Code) error {
	if status.Code(err) != code {
		return fmt.Errorf("%v for %v: %v", status.Code(err), code, err)
	}
	return nil
}

func all(n int, call func(int) error) error {
	var waiting sync.WaitGroup
	failures := make(chan error, n)
	for i := 0; i < n; i++ {
		waiting.Add(1)
		go func(i int) {
			defer waiting.Done()
			if err := call(i); err != nil {
				failures <- err
			}
		}(i)
	}
	waiting.Wait()
	if len(failures) > 0 {
		return fmt.Errorf("%d of %d: %v", len(failures), n, <-failures)
	}
	return nil
}

type asker struct {
	stub pb.GRPCInferenceServiceClient
	conn *grpc.ClientConn
}

func (a asker) infer(ctx context.Context, rows int, options ...grpc.CallOption) error {
	answer, err := a.stub.ModelInfer(ctx, request("iris", "", rows), options...)
	if err == nil && !right(answer) {
		err = fmt.Errorf("the answer is another: %v", answer)
	}
	return err
}

func (a asker) metadata(ctx context.Context) error {
	live, err := a.stub.ServerLive(ctx, &pb.ServerLiveRequest{})
	if err != nil || !live.Live {
		return fmt.Errorf("live: %v %v", live, err)
	}
	model, err := a.stub.ModelMetadata(ctx, &pb.ModelMetadataRequest{Name: "iris"})
	if err != nil || model.Inputs[0].Name != "features" {
		return fmt.Errorf("model: %v %v", model, err)
	}
	return nil
}

func (a asker) stream(ctx context.Context) error {
	stream, err := a.stub.ModelStreamInfer(ctx)
	if err != nil {
		return err
	}
	for i := 0; i < 50; i++ {
		if err := stream.Send(request("iris", strconv.Itoa(i), 1)); err != nil {
			return err
		}
	}
	stream.CloseSend()
	for i := 0; i < 50; i++ {
		answer, err := stream.Recv()
		if err != nil {
			return err
		}
		if answer.ErrorMessage != "" || answer.InferResponse.Id != strconv.Itoa(i) || !right(answer.InferResponse) {
			return fmt.Errorf("answer %d is %v", i, answer)
		}
	}
	if _, err := stream.Recv(); err == nil || err.Error() != "EOF" {
		return fmt.Errorf("the stream does not end: %v", err)
	}
	return nil
}

func (a asker) health(ctx context.Context) error {
	stub := health.NewHealthClient(a.conn)
	said, err := stub.Check(ctx, &health.HealthCheckRequest{})
	if err != nil || said.Status != health.HealthCheckResponse_SERVING {
		return fmt.Errorf("%v %v", said, err)
	}
	_, err = stub.Check(ctx, &health.HealthCheckRequest{Service: "nope"})
	return ended(err, codes.NotFound)
}

func (a asker) reflection(ctx context.Context) error {
	stream, err := reflection.NewServerReflectionClient(a.conn).ServerReflectionInfo(ctx)
	if err != nil {
		return err
	}
	listing := &reflection.ServerReflectionRequest_ListServices{ListServices: ""}
	if err := stream.Send(&reflection.ServerReflectionRequest{MessageRequest: listing}); err != nil {
		return err
	}
	answer, err := stream.Recv()
	if err != nil || len(answer.GetListServicesResponse().GetService()) < 3 {
		return fmt.Errorf("%v %v", answer, err)
	}
	return stream.CloseSend()
}

func (a asker) refusals(ctx context.Context) error {
	_, err := a.stub.ModelInfer(ctx, request("nope", "", 1))
	if err := ended(err, codes.NotFound); err != nil {
		return err
	}
	err = a.conn.Invoke(ctx, "/inference.GRPCInferenceService/Nope", &pb.ServerLiveRequest{}, &pb.ServerLiveResponse{})
	return ended(err, codes.Unimplemented)
}

func (a asker) deadline(ctx context.Context) error {
	short, stop := context.WithTimeout(ctx, 300*time.Millisecond)
	defer stop()
	stream, err := a.stub.ModelStreamInfer(short)
	if err != nil {
		return err
	}
	_, err = stream.Recv()
	if err := ended(err, codes.DeadlineExceeded); err != nil {
		return err
	}
	return a.infer(ctx, 1)
}

func (a asker) cancellation(ctx context.Context) error {
	err := all(500, func(int) error {
		cancelled, cancel := context.WithCancel(ctx)
		stream, err := a.stub.ModelStreamInfer(cancelled)
		if err == nil {
			if err = stream.Send(request("iris", "", 1)); err == nil {
				_, err = stream.Recv()
			}
		}
		cancel()
		if err != nil {
			return err
		}
		for err == nil {
			_, err = stream.Recv()
		}
		return ended(err, codes.Canceled)
	})
	if err != nil {
		return err
	}
	return a.infer(ctx, 1)
}

// callOn calls from 32 goroutines; none may fail, whatever becomes of the servers behind the address meanwhile.
func (a asker) callOn() {
	var answered, over int64
	go func() {
		os.Stdin.Read(make([]byte, 1))
		atomic.StoreInt64(&over, 1)
	}()
	err := all(32, func(int) error {
		for atomic.LoadInt64(&over) == 0 {
			ctx, stop := context.WithTimeout(context.Background(), 30*time.Second)
			err := a.infer(ctx, 1, grpc.WaitForReady(true))
			stop()
			if err != nil {
				return err
			}
			if n := atomic.AddInt64(&answered, 1); n%1000 == 0 {
				fmt.Println(n)
			}
		}
		return nil
	})
	tell(fmt.Sprintf("%d calls through new workers and a new server", answered), err)
}

func tell(name string, err error) {
	if err != nil {
		fmt.Printf("no: %s: %v\n", name, err)
	} else {
		fmt.Printf("yes: %s\n", name)
	}
}

func main() {
	conn, err := grpc.Dial(os.Args[1], grpc.WithInsecure())
	if err != nil {
		panic(err)
	}
	a := asker{pb.NewGRPCInferenceServiceClient(conn), conn}
	if len(os.Args) > 2 {
		a.callOn()
		return
	}
	ctx, stop := context.WithTimeout(context.Background(), 60*time.Second)
	defer stop()
	tell("metadata", a.metadata(ctx))
	tell("unary", a.infer(ctx, 1))
	tell("a message of 1 MB", a.infer(ctx, 60_000))
	tell("gzip", a.infer(ctx, 5_000, grpc.UseCompressor(gzip.Name)))
	tell("stream", a.stream(ctx))
	tell("health", a.health(ctx))
	tell("reflection", a.reflection(ctx))
	tell("refusals", a.refusals(ctx))
	tell("1,000 calls at once", all(1000, func(int) error { return a.infer(ctx, 1) }))
	tell("deadline", a.deadline(ctx))
	tell("500 cancelled streams", a.cancellation(ctx))
}

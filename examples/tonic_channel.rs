//! The layers under a gRPC client, on tonic's `Channel`.
//!
//! The client is tonic's own, with plain bytes instead of generated messages. A generated client
//! takes the same service: `PaymentsClient::new(service)`.
//!
//! ```text
//! cargo run --example tonic_channel --features test-util
//! ```

#![allow(clippy::print_stdout)]

use std::error::Error;
use std::time::Duration;

use aegis_hitl::layer::{
    AegisLayer, Attempts, Backoff, ClassifyGrpc, Failure, RetryLayer, TrackDeliveryLayer,
    judge_hyper,
};
use aegis_hitl::testing::{Act, Peer};
use bytes::{Buf, BufMut, Bytes};
use http::Request;
use http::uri::PathAndQuery;
use http_body_util::{BodyExt, Full};
use tonic::Status;
use tonic::client::Grpc;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::transport::Endpoint;
use tower::ServiceBuilder;
use tower::filter::AsyncFilterLayer;

type BoxError = Box<dyn Error + Send + Sync>;

/// Reads the one message of a call, so that it can be sent again.
async fn read(request: Request<tonic::body::Body>) -> Result<Request<Full<Bytes>>, tonic::Status> {
    let (parts, body) = request.into_parts();
    let message = body.collect().await?.to_bytes();
    Ok(Request::from_parts(parts, Full::new(message)))
}

/// Says what a channel's error proves: if the connect failed, nothing was sent.
fn judge(error: &tonic::transport::Error) -> Failure {
    let mut source = error.source();
    while let Some(cause) = source {
        if cause.is::<tonic::ConnectError>() {
            return Failure::NeverSent;
        }
        source = cause.source();
    }
    judge_hyper(error)
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let grpc = |status: u16| Act::answer(status).header("content-type", "application/grpc");
    // One empty gRPC frame, which is a message of no bytes.
    let message = [0; 5].as_slice();
    let peer = Peer::start([
        Act::lose_reply(),
        Act::refuse_stream(),
        grpc(200).header("grpc-status", "14"),
        grpc(200).body(message).trailer("grpc-status", "0"),
        // No layer on HTTP can see this in time, because the head says 200.
        grpc(200).body(message).trailer("grpc-status", "14"),
    ])
    .await;

    let channel = Endpoint::from_shared(peer.url())?.connect_lazy();
    let retry = RetryLayer::new()
        .backoff(Backoff::constant(Duration::from_millis(20)))
        .classify(ClassifyGrpc);
    let service = ServiceBuilder::new()
        .layer(AsyncFilterLayer::new(read))
        .layer(AegisLayer::new().mint_idempotency_key().retry(retry))
        .layer(TrackDeliveryLayer::new(judge))
        .map_request(|request: Request<Full<Bytes>>| request.map(tonic::body::Body::new))
        .service(channel);
    let mut client = Grpc::new(service);

    let path = PathAndQuery::from_static("/payments.Payments/Pay");
    for _ in 0..2 {
        client.ready().await?;
        let request = tonic::Request::new(Bytes::from_static(b"10 EUR"));
        match client.unary(request, path.clone(), Plain).await {
            Ok(response) => println!("done: {:?}", response.extensions().get::<Attempts>()),
            Err(status) => println!("failed: {:?}", status.code()),
        }
    }
    for request in peer.requests() {
        println!(
            "the peer saw {} with key {}",
            request.path(),
            request.header("idempotency-key").unwrap_or("(none)"),
        );
    }
    Ok(())
}

/// A codec for messages of plain bytes.
struct Plain;

impl Codec for Plain {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Plain {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, message: Bytes, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put(message);
        Ok(())
    }
}

impl Decoder for Plain {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(buffer.copy_to_bytes(buffer.remaining())))
    }
}

//! What the server does with the connections of many clients.

use std::net::SocketAddr;

use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;

use crate::support::h2::{self, H2};
use crate::support::{Disk, Faulty, HANG, Mood, Running, SHORT, start_with};

/// A server that closes no connection because it is idle, as long as a test lasts.
async fn patient(
    store: impl aegis_hitl::store::Store,
    settings: impl FnOnce(aegis_hitl::server::Server) -> aegis_hitl::server::Server,
) -> Running {
    start_with(
        store,
        |service| service.store_timeout(10 * HANG),
        |server| settings(server.header_timeout(10 * HANG)),
    )
    .await
}

#[tokio::test]
async fn a_newcomer_takes_the_place_of_the_connection_that_was_idle_longest() {
    let server = patient(Disk::default(), |server| server.max_connections(3)).await;
    let mut first = H2::kept(server.addr).await;
    let mut second = H2::kept(server.addr).await;
    let mut third = H2::kept(server.addr).await;
    // The first is now the one that was used last.
    first.get("/livez", &[]).await;
    first.until(h2::DATA).await;
    let mut newcomer = H2::kept(server.addr).await;
    second.until_closed(HANG).await;
    for kept in [&mut first, &mut third, &mut newcomer] {
        kept.get("/livez", &[]).await;
        kept.until(h2::DATA).await;
    }
}

#[tokio::test]
async fn a_connection_with_a_request_keeps_its_place() {
    let store = Faulty::new(Disk::default(), Mood::Hangs);
    let server = patient(store.clone(), |server| server.max_connections(1)).await;
    let in_flight = tokio::spawn(server.approve("k").http2().send());
    store.arrived().await;
    let waits = tokio::spawn(server.get("/livez").send());
    // Nothing tells when it waits: it is given the time in which it would have been served.
    tokio::time::sleep(SHORT).await;
    assert!(!waits.is_finished());
    store.release();
    assert_eq!(in_flight.await.unwrap().status, 202);
    assert_eq!(waits.await.unwrap().status, 200);
}

/// Connects from this address.
#[cfg(target_os = "linux")]
async fn connect_from(address: &str, to: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket
        .bind(format!("{address}:0").parse().unwrap())
        .unwrap();
    socket.connect(to).await.unwrap()
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn one_address_has_its_own_places_and_no_more() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    let store = Faulty::new(Disk::default(), Mood::Hangs);
    let server = patient(store.clone(), |server| {
        server.max_connections(8).max_connections_per_peer(2)
    })
    .await;
    let ask = async |address: &str| {
        let mut stream = connect_from(address, server.addr).await;
        let request = "GET /livez HTTP/1.1\r\nHost: h\r\n\r\n";
        // One that is turned away may be gone before it has written.
        _ = stream.write_all(request.as_bytes()).await;
        let mut answer = vec![0; 12];
        let read = timeout(HANG, stream.read_exact(&mut answer)).await.unwrap();
        (read.is_ok().then_some(stream), answer)
    };
    // Both of its places are idle, so there is always one for a newcomer.
    let mut kept = Vec::new();
    for _ in 0..4 {
        let (stream, answer) = ask("127.0.0.1").await;
        assert_eq!(answer, b"HTTP/1.1 200");
        kept.push(stream);
    }
    let busy = [server.approve("k-1"), server.approve("k-2")].map(|call| tokio::spawn(call.send()));
    while store.asked() < 2 {
        store.arrived().await;
    }
    let (stream, _) = ask("127.0.0.1").await;
    assert!(stream.is_none());
    let (stream, answer) = ask("127.0.0.2").await;
    assert!(stream.is_some() && answer == b"HTTP/1.1 200");
    for call in busy {
        store.release();
        assert_eq!(timeout(HANG, call).await.unwrap().unwrap().status, 202);
    }
}

#[tokio::test]
async fn a_proxy_on_this_machine_may_have_all_places() {
    let store = Faulty::new(Disk::default(), Mood::Hangs);
    let server = patient(store.clone(), |server| server.max_connections(4)).await;
    let calls = ["k-1", "k-2", "k-3", "k-4"].map(|key| tokio::spawn(server.approve(key).send()));
    while store.asked() < 4 {
        store.arrived().await;
    }
    for call in calls {
        store.release();
        assert_eq!(timeout(HANG, call).await.unwrap().unwrap().status, 202);
    }
}

//! A network in memory: one server, some clients, and connections that behave as TCP does.
//!
//! Bytes arrive late and in pieces, but in order. A partition holds them back until it heals, as TCP sends them again; a
//! connection may be cut in the middle of a write, with or without a word to either side.

use std::collections::VecDeque;
use std::future::Future;
use std::hash::{DefaultHasher, Hasher};
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use hyper_util::client::legacy::connect::{Connected, Connection as HyperConnection};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, Sleep, sleep, sleep_until};

use super::world::World;
use crate::support::random::Random;

/// How many bytes of one direction may be under way.
const WINDOW: usize = 16 * 1024;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Direction {
    ToServer,
    ToClient,
}

impl Direction {
    fn back(self) -> Self {
        match self {
            Self::ToServer => Self::ToClient,
            Self::ToClient => Self::ToServer,
        }
    }
}

/// What the server's host does with a new connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Host {
    Up,
    /// The host runs and the server does not: connections are refused.
    Refuses,
    /// The host is gone: nothing answers.
    Silent,
}

/// How a connection ends before its time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cut {
    /// Both sides see a reset.
    Reset,
    /// Both sides see an end, as of a balancer that closes.
    Close,
    /// Neither side sees anything.
    Silence,
}

#[derive(Clone)]
pub struct Network {
    state: Arc<Mutex<State>>,
    /// Something that connects wait for has changed.
    changed: Arc<Notify>,
    world: World,
}

struct State {
    random: Random,
    /// Whether each client's link takes bytes, in either direction.
    links: Vec<[bool; 2]>,
    /// The longest delay of a link, in milliseconds.
    slowness: u64,
    /// The chance that a new connection is cut, in percent.
    cuts: u64,
    host: Host,
    accepting: Option<mpsc::UnboundedSender<Endpoint>>,
    connections: Vec<Connection>,
}

struct Connection {
    client: usize,
    is_silent: bool,
    pipes: [Pipe; 2],
}

struct Pipe {
    chunks: VecDeque<(Instant, Vec<u8>)>,
    len: usize,
    /// When the last chunk arrives, as none overtakes another.
    last: Instant,
    end: Option<(Instant, End)>,
    reader_is_gone: bool,
    /// The write that cuts the connection.
    cut: Option<PlannedCut>,
    writes: u64,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

#[derive(Clone, Copy)]
struct PlannedCut {
    at: u64,
    /// How much of that write still goes out, in quarters.
    quarters: usize,
    cut: Cut,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Close,
    Reset,
}

impl Network {
    pub fn new(seed: u64, clients: usize, world: World) -> Self {
        Self {
            state: Arc::new(Mutex::new(State {
                random: Random::new(seed, 1),
                links: vec![[true; 2]; clients],
                slowness: 20,
                cuts: 0,
                host: Host::Silent,
                accepting: None,
                connections: Vec::new(),
            })),
            changed: Arc::new(Notify::new()),
            world,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Starts to listen; what is accepted comes out of the receiver.
    pub fn listen(&self) -> mpsc::UnboundedReceiver<Endpoint> {
        let (sender, receiver) = mpsc::unbounded_channel();
        let mut state = self.state();
        state.host = Host::Up;
        state.accepting = Some(sender);
        drop(state);
        self.changed.notify_waiters();
        receiver
    }

    /// Stops to listen. The connections go silent with the host if that is what it is.
    pub fn stop_listening(&self, host: Host) {
        let mut state = self.state();
        state.host = host;
        state.accepting = None;
        if host == Host::Silent {
            for connection in &mut state.connections {
                connection.is_silent = true;
            }
        }
    }

    pub fn set_link(&self, client: usize, direction: Direction, works: bool) {
        let mut state = self.state();
        state.links[client][direction as usize] = works;
        if works {
            let State {
                connections,
                random,
                slowness,
                ..
            } = &mut *state;
            for connection in connections.iter_mut().filter(|one| one.client == client) {
                connection.pipes[direction as usize].retransmit(random.millis(1, *slowness));
            }
        }
        drop(state);
        self.changed.notify_waiters();
    }

    pub fn set_slowness(&self, millis: u64) {
        self.state().slowness = millis;
    }

    pub fn set_cuts(&self, percent: u64) {
        self.state().cuts = percent;
    }

    /// Ends all faults.
    pub fn heal(&self) {
        let clients = self.state().links.len();
        for client in 0..clients {
            self.set_link(client, Direction::ToServer, true);
            self.set_link(client, Direction::ToClient, true);
        }
        let mut state = self.state();
        (state.slowness, state.cuts) = (20, 0);
        for pipe in state.connections.iter_mut().flat_map(|one| &mut one.pipes) {
            pipe.cut = None;
        }
    }

    /// Cuts one of the connections that are open.
    pub fn cut_one(&self, cut: Cut) {
        let mut state = self.state();
        let open = |one: &Connection| !one.is_silent && one.pipes.iter().all(|p| p.end.is_none());
        let open: Vec<_> = (0..state.connections.len())
            .filter(|id| open(&state.connections[*id]))
            .collect();
        if open.is_empty() {
            return;
        }
        let id = state.random.pick(&open);
        self.world.note(format_args!("connection {id}: {cut:?}"));
        state.cut(id, cut);
    }

    /// Connects a client, as long as that may take.
    pub async fn connect(&self, client: usize) -> io::Result<Endpoint> {
        loop {
            let delay = {
                let mut state = self.state();
                let slowness = state.slowness;
                state.random.millis(1, slowness)
            };
            sleep(delay).await;
            let changed = self.changed.notified();
            {
                let mut state = self.state();
                if state.links[client] == [true; 2] {
                    match state.host {
                        Host::Up => return Ok(self.open(&mut state, client)),
                        Host::Refuses => return Err(io::ErrorKind::ConnectionRefused.into()),
                        Host::Silent => {}
                    }
                }
            }
            changed.await;
        }
    }

    fn open(&self, state: &mut State, client: usize) -> Endpoint {
        let id = state.connections.len();
        let mut pipes = [Pipe::new(), Pipe::new()];
        if state.random.below(100) < state.cuts {
            let direction = state.random.below(2) as usize;
            let planned = PlannedCut {
                at: state.random.below(8),
                quarters: state.random.below(5) as usize,
                cut: state.random.pick(&[Cut::Reset, Cut::Close, Cut::Silence]),
            };
            pipes[direction].cut = Some(planned);
        }
        state.connections.push(Connection {
            client,
            is_silent: false,
            pipes,
        });
        self.world
            .note(format_args!("connection {id}: client {client}"));
        let endpoint = |outgoing| Endpoint {
            network: self.clone(),
            id,
            outgoing,
            timer: None,
        };
        if let Some(accepting) = &state.accepting {
            // A server that has just ended drops it, which closes it.
            _ = accepting.send(endpoint(Direction::ToClient));
        }
        endpoint(Direction::ToServer)
    }
}

impl State {
    fn delay(&mut self) -> Duration {
        let slowness = self.slowness;
        self.random.millis(1, slowness)
    }

    fn cut(&mut self, id: usize, cut: Cut) {
        let (there, back) = (self.delay(), self.delay());
        let connection = &mut self.connections[id];
        let end = match cut {
            Cut::Silence => {
                connection.is_silent = true;
                return;
            }
            Cut::Close => End::Close,
            Cut::Reset => End::Reset,
        };
        connection.pipes[0].end(there, end);
        connection.pipes[1].end(back, end);
    }
}

impl Pipe {
    fn new() -> Self {
        Self {
            chunks: VecDeque::new(),
            len: 0,
            last: Instant::now(),
            end: None,
            reader_is_gone: false,
            cut: None,
            writes: 0,
            reader: None,
            writer: None,
        }
    }

    fn push(&mut self, delay: Duration, bytes: &[u8]) {
        if bytes.is_empty() || self.end.is_some() {
            return;
        }
        self.last = self.last.max(Instant::now() + delay);
        self.chunks.push_back((self.last, bytes.to_vec()));
        self.len += bytes.len();
        self.wake_reader();
    }

    /// Ends the pipe behind what is under way. The first end counts.
    fn end(&mut self, delay: Duration, end: End) {
        if self.end.is_none() {
            self.last = self.last.max(Instant::now() + delay);
            self.end = Some((self.last, end));
        }
        self.wake_reader();
        self.wake_writer();
    }

    fn retransmit(&mut self, delay: Duration) {
        let at = Instant::now() + delay;
        for (arrival, _) in &mut self.chunks {
            *arrival = at.max(*arrival);
        }
        if let Some((arrival, _)) = &mut self.end {
            *arrival = at.max(*arrival);
        }
        self.last = self.last.max(at);
        self.wake_reader();
    }

    fn wake_reader(&mut self) {
        if let Some(waker) = self.reader.take() {
            waker.wake();
        }
    }

    fn wake_writer(&mut self) {
        if let Some(waker) = self.writer.take() {
            waker.wake();
        }
    }
}

/// One side of a connection.
pub struct Endpoint {
    network: Network,
    id: usize,
    outgoing: Direction,
    timer: Option<Pin<Box<Sleep>>>,
}

impl AsyncRead for Endpoint {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let incoming = this.outgoing.back();
        loop {
            let arrival = {
                let mut state = this.network.state();
                let client = state.connections[this.id].client;
                let works = state.links[client][incoming as usize];
                let pipe = &mut state.connections[this.id].pipes[incoming as usize];
                pipe.reader = Some(cx.waker().clone());
                let next = pipe.chunks.front().map(|(arrival, _)| *arrival);
                let next = next.or(pipe.end.map(|(arrival, _)| arrival));
                let Some(arrival) = next.filter(|_| works) else {
                    return Poll::Pending;
                };
                if arrival <= Instant::now() {
                    return Poll::Ready(pipe.read(buffer, |bytes| {
                        this.network.world.bytes(this.id, incoming, bytes);
                    }));
                }
                arrival
            };
            let timer = this.timer.insert(Box::pin(sleep_until(arrival)));
            ready!(timer.as_mut().poll(cx));
        }
    }
}

impl Pipe {
    fn read(&mut self, buffer: &mut ReadBuf<'_>, seen: impl FnOnce(&[u8])) -> io::Result<()> {
        let Some((_, chunk)) = self.chunks.front_mut() else {
            return match self.end {
                Some((_, End::Reset)) => Err(io::ErrorKind::ConnectionReset.into()),
                _ => Ok(()),
            };
        };
        let len = chunk.len().min(buffer.remaining());
        seen(&chunk[..len]);
        buffer.put_slice(&chunk[..len]);
        if len == chunk.len() {
            self.chunks.pop_front();
        } else {
            chunk.drain(..len);
        }
        self.len -= len;
        self.wake_writer();
        Ok(())
    }
}

impl AsyncWrite for Endpoint {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let mut state = self.network.state();
        let (delay, back) = (state.delay(), state.delay());
        let connection = &mut state.connections[self.id];
        let incoming = &mut connection.pipes[self.outgoing.back() as usize];
        if let Some((arrival, End::Reset)) = incoming.end
            && arrival <= Instant::now()
        {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let is_silent = connection.is_silent;
        let pipe = &mut connection.pipes[self.outgoing as usize];
        let len = bytes.len().min(WINDOW - pipe.len);
        if len == 0 && !bytes.is_empty() {
            pipe.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        if is_silent {
            // Nobody acknowledges it: it fills the window.
            pipe.len += len;
            return Poll::Ready(Ok(len));
        }
        if pipe.reader_is_gone {
            connection.pipes[self.outgoing.back() as usize].end(delay + back, End::Reset);
            return Poll::Ready(Ok(len));
        }
        let number = pipe.writes;
        pipe.writes += 1;
        match pipe.cut {
            Some(planned) if planned.at == number => {
                pipe.push(delay, &bytes[..len * planned.quarters / 4]);
                let (id, cut) = (self.id, planned.cut);
                self.network.world.note(format_args!(
                    "connection {id}: {cut:?} {:?} in write {number} after {} quarters",
                    self.outgoing, planned.quarters
                ));
                state.cut(id, cut);
            }
            _ => pipe.push(delay, &bytes[..len]),
        }
        Poll::Ready(Ok(len))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut state = self.network.state();
        let delay = state.delay();
        let connection = &mut state.connections[self.id];
        if !connection.is_silent {
            connection.pipes[self.outgoing as usize].end(delay, End::Close);
        }
        Poll::Ready(Ok(()))
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        let mut state = self.network.state();
        let delay = state.delay();
        let connection = &mut state.connections[self.id];
        let incoming = &mut connection.pipes[self.outgoing.back() as usize];
        incoming.reader_is_gone = true;
        // As an operating system does: what was not read makes the end a reset.
        let end = if incoming.chunks.is_empty() {
            End::Close
        } else {
            End::Reset
        };
        if !connection.is_silent {
            connection.pipes[self.outgoing as usize].end(delay, end);
        }
    }
}

impl HyperConnection for Endpoint {
    fn connected(&self) -> Connected {
        Connected::new()
    }
}

/// A fingerprint of all bytes that were read, in order.
#[derive(Default)]
pub struct Fingerprint(DefaultHasher);

impl Fingerprint {
    pub fn add(&mut self, connection: usize, direction: Direction, bytes: &[u8]) {
        self.0.write_usize(connection * 2 + direction as usize);
        self.0.write(bytes);
    }

    pub fn finish(&self) -> u64 {
        self.0.finish()
    }
}

//! What clients asked and what they were told, attempt by attempt.

use std::fmt;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use aegis_hitl::protocol::{Closed, EventKind};
use aegis_hitl::{Decision, Execution, Status};

use crate::support::reference::{Answer, Request, Shown};

/// Microseconds since 1970.
pub type Time = i64;

/// A clock that does not go back, and shows what the database's clock shows.
#[derive(Clone, Copy)]
pub struct WallClock {
    begun: Instant,
    time: SystemTime,
}

impl WallClock {
    pub fn start() -> Self {
        Self {
            begun: Instant::now(),
            time: SystemTime::now(),
        }
    }

    pub fn now(&self) -> Time {
        micros(self.time + self.begun.elapsed())
    }
}

pub fn micros(time: SystemTime) -> Time {
    let since = time.duration_since(UNIX_EPOCH).unwrap();
    Time::try_from(since.as_micros()).unwrap()
}

/// One attempt of a call about one action.
#[derive(Debug, Clone)]
pub struct Attempt {
    pub client: usize,
    /// Before the first byte was sent.
    pub sent: Time,
    pub asked: Asked,
    /// What was told, after its last byte was read. Without it nobody knows the outcome: the request
    /// may take effect at any time after it was sent, or never.
    pub told: Option<(Time, Told)>,
}

#[derive(Debug, Clone)]
pub enum Asked {
    /// A request that may change the action.
    Request(Request),
    /// How the action stands.
    Status,
    /// The same with its history.
    History,
}

/// What an answer shows.
#[derive(Debug, Clone, PartialEq)]
pub struct Told {
    pub word: &'static str,
    pub state: Option<State>,
    pub claim: Option<ToldClaim>,
    pub kinds: Option<Vec<EventKind>>,
}

/// How an action stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct State {
    pub status: Status,
    pub decision: Option<Decision>,
    pub closed: Option<Closed>,
    pub execution: Option<Execution>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ToldClaim {
    pub fence: u64,
    pub until: Time,
}

impl State {
    pub fn of(shown: &Shown) -> Self {
        Self {
            status: shown.status,
            decision: shown.decision,
            closed: shown.closed,
            execution: shown.execution,
        }
    }
}

impl Told {
    /// An answer that shows how the action stands.
    pub fn new(word: &'static str, state: State) -> Self {
        Self {
            word,
            state: Some(state),
            claim: None,
            kinds: None,
        }
    }

    /// Whether it is what the model answers. The end of a claim is judged apart.
    pub fn agrees(&self, answer: &Answer) -> bool {
        let fence = |claim: &Option<ToldClaim>| claim.map(|claim| claim.fence);
        self.word == answer.word
            && self.state == answer.shown.as_ref().map(State::of)
            && fence(&self.claim) == answer.claim.as_ref().map(|claim| claim.fence)
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.status)?;
        for word in [
            self.decision.map(Decision::as_str),
            self.closed.map(Closed::as_str),
            self.execution.map(Execution::as_str),
        ]
        .into_iter()
        .flatten()
        {
            write!(f, " {word}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Asked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self::Request(request) = self else {
            return write!(f, "{self:?}");
        };
        match request {
            Request::Submit {
                call,
                payload,
                expires,
                ..
            } => write!(
                f,
                "submit {payload:?} until {expires:?} by {}",
                call.unwrap_or_default()
            ),
            Request::Decide {
                decision,
                call,
                payload,
                ..
            } => write!(f, "{decision} {payload:?} by {}", call.unwrap_or_default()),
            Request::DecideById {
                decision,
                call,
                digest,
                ..
            } => write!(
                f,
                "{decision} of {digest:?} by {}",
                call.unwrap_or_default()
            ),
            Request::Cancel { call, .. } => write!(f, "cancel by {}", call.unwrap_or_default()),
            Request::Acquire {
                digest,
                lease,
                call,
                ..
            } => write!(
                f,
                "claim of {digest:?} for {lease} us by {}",
                call.unwrap_or_default()
            ),
            Request::Renew { token, lease, .. } => write!(f, "renew {token:?} for {lease} us"),
            Request::Finish {
                token,
                report,
                call,
                ..
            } => {
                let verb = if report.is_ok() { "complete" } else { "fail" };
                write!(f, "{verb} {token:?} by {}", call.unwrap_or_default())
            }
        }
    }
}

impl fmt::Display for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word)?;
        if let Some(state) = &self.state {
            write!(f, " ({state})")?;
        }
        if let Some(ToldClaim { fence, until }) = self.claim {
            write!(f, " claim {fence} until {until}")?;
        }
        if let Some(kinds) = &self.kinds {
            let kinds: Vec<_> = kinds.iter().map(|kind| kind.as_str()).collect();
            write!(f, " after {}", kinds.join(", "))?;
        }
        Ok(())
    }
}

impl fmt::Display for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} client {:<2} ", self.sent, self.client)?;
        match &self.told {
            Some((at, told)) => write!(f, "{}: {told}, {} us later", self.asked, at - self.sent),
            None => write!(f, "{}: unknown", self.asked),
        }
    }
}

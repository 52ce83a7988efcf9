//! Who is signed in to the inbox.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sha2::{Digest, Sha256};
use tokio::time::Instant;
use uuid::Uuid;

/// How long a session lasts at most.
pub(crate) const LIFETIME: Duration = Duration::from_secs(12 * 60 * 60);

/// The most sessions of one holder. The oldest makes room for the next.
const MOST: usize = 32;

/// For whom a session was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Holder {
    /// The holder of the API key with this digest. The session ends with the key.
    Key([u8; 32]),
    /// Whoever opened the one-time link of a server without API keys.
    Local,
}

/// A secret that a browser keeps: the token of a session, or the code of a one-time link.
///
/// Its text is shown once, to whom it is for. Only the digest is stored.
pub(crate) struct Secret(String);

impl Secret {
    /// 244 random bits.
    fn random() -> Self {
        let [first, second] = [Uuid::new_v4(), Uuid::new_v4()];
        Self(format!("{}{}", first.simple(), second.simple()))
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

#[derive(Debug, Clone, Copy)]
struct Session {
    holder: Holder,
    opened: Instant,
}

impl Session {
    fn is_over(&self, now: Instant) -> bool {
        now.duration_since(self.opened) >= LIFETIME
    }
}

/// The sessions of this process, by the digests of their tokens. They do not outlive it.
#[derive(Default)]
pub(crate) struct Sessions(Mutex<HashMap<[u8; 32], Session>>);

impl Sessions {
    /// Opens a session, and returns its token.
    pub(crate) fn open(&self, holder: Holder) -> Secret {
        let now = Instant::now();
        let mut sessions = self.lock();
        sessions.retain(|_, session| !session.is_over(now));
        let own = sessions
            .iter()
            .filter(|(_, session)| session.holder == holder);
        let oldest = own.clone().min_by_key(|(_, session)| session.opened);
        if own.count() >= MOST
            && let Some(oldest) = oldest.map(|(digest, _)| *digest)
        {
            sessions.remove(&oldest);
        }
        let token = Secret::random();
        let opened = Session {
            holder,
            opened: now,
        };
        sessions.insert(digest(token.as_str()), opened);
        token
    }

    /// Returns for whom the session with this token was opened, if it is not over.
    pub(crate) fn holder(&self, token: &str) -> Option<Holder> {
        let session = self.lock().get(&digest(token)).copied()?;
        (!session.is_over(Instant::now())).then_some(session.holder)
    }

    /// Ends a session.
    pub(crate) fn close(&self, token: &str) {
        self.lock().remove(&digest(token));
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<[u8; 32], Session>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Sessions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sessions")
            .field("open", &self.lock().len())
            .finish()
    }
}

/// The code of the one-time link to the inbox, until somebody has used it.
#[derive(Default)]
pub(crate) struct OneTimeCode(Mutex<Option<[u8; 32]>>);

impl OneTimeCode {
    /// Makes a code. An earlier one is no longer valid.
    pub(crate) fn issue(&self) -> Secret {
        let code = Secret::random();
        *self.lock() = Some(digest(code.as_str()));
        code
    }

    /// Returns whether this is the code. It is then used up.
    pub(crate) fn spend(&self, code: &str) -> bool {
        let mut issued = self.lock();
        // Digests are compared, so the time says nothing of the code.
        let is_it = *issued == Some(digest(code));
        if is_it {
            *issued = None;
        }
        is_it
    }

    fn lock(&self) -> MutexGuard<'_, Option<[u8; 32]>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for OneTimeCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OneTimeCode(..)")
    }
}

fn digest(secret: &str) -> [u8; 32] {
    Sha256::digest(secret.as_bytes()).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_session_ends_by_itself_and_on_request() {
        let sessions = Sessions::default();
        let [first, second] = [Holder::Local, Holder::Key([7; 32])].map(|holder| {
            let token = sessions.open(holder);
            assert_eq!(sessions.holder(token.as_str()), Some(holder));
            token
        });
        sessions.close(first.as_str());
        assert_eq!(sessions.holder(first.as_str()), None);
        assert!(sessions.holder(second.as_str()).is_some());
        tokio::time::advance(LIFETIME).await;
        assert_eq!(sessions.holder(second.as_str()), None);
    }

    #[tokio::test(start_paused = true)]
    async fn the_sessions_of_one_holder_do_not_end_those_of_another() {
        let sessions = Sessions::default();
        let other = sessions.open(Holder::Key([1; 32]));
        let mut own = Vec::new();
        for _ in 0..MOST + 1 {
            own.push(sessions.open(Holder::Key([2; 32])));
            tokio::time::advance(Duration::from_secs(1)).await;
        }
        assert!(sessions.holder(other.as_str()).is_some());
        let is_open = |token: &Secret| sessions.holder(token.as_str()).is_some();
        assert!(!is_open(&own[0]) && own[1..].iter().all(is_open));
    }

    #[test]
    fn a_code_is_spent_once_and_only_the_newest() {
        let codes = OneTimeCode::default();
        assert!(!codes.spend(""));
        let old = codes.issue();
        let new = codes.issue();
        assert!(!codes.spend(old.as_str()));
        assert!(codes.spend(new.as_str()));
        assert!(!codes.spend(new.as_str()));
    }
}

//! What a standby may not have, though it can be read.
//!
//! A row can be read when the wait of its commit for a synchronous standby has ended. That wait can
//! be cut off: by a signal of an operator, or of another program, to the session that waits. The
//! server of that session is warned, and takes the commit for unknown. No other server learns of it,
//! and all of them can read the row, which a failover may lose.
//!
//! A durable write covers whatever was in the log before it. So where commits wait for standbys, what
//! is read is answered if this server began a durable write less than [`COVERS`] ago, and else it
//! writes its heartbeat first. Decisions keep that up by themselves. What waited for [`COVERS`] or longer
//! before it was cut off is then shown by nobody: a durable write that began while it waited would have
//! waited for the same standby. What was cut off sooner is shown for less than [`COVERS`]. A
//! wait that this server itself gives up is cut off later than that.
//!
//! Where commits wait for no standby, this costs nothing. What is set is read with the statements of a
//! task that runs anyway. Operations that change nothing, such as a duplicate, need none of this: they
//! lock what they are about, which makes their commits durable writes.

use std::time::{Duration, Instant};

use tokio_postgres::Row;

use super::Inner;
use super::fault::Fault;
use super::rows::get;
use super::session::Session;
use super::wall::Scope;

/// How long a durable write covers what is read after it began.
pub(super) const COVERS: Duration = Duration::from_secs(1);

/// Reads whether commits wait for standbys.
pub(super) const WAITS: &str = "SELECT current_setting('synchronous_standby_names') <> '' \
     AND current_setting('synchronous_commit') <> 'local' AS waits";

impl Inner {
    /// Ends a session that has read, once nobody can lose what was read.
    pub(super) async fn cover(&self, mut session: Session) -> Result<(), Fault> {
        let read = Instant::now();
        if !self.state.knows_standbys(read) {
            let found = session.query(WAITS, &[]).await?;
            self.note_standbys(&found, read)?;
        }
        session.release();
        if self.state.is_covered(read) {
            return Ok(());
        }
        // One writes for all who wait, and the others keep no connection meanwhile.
        let _writing = self.covering.lock().await;
        if self.state.is_covered(read) {
            return Ok(());
        }
        self.beat(Session::open(&self.pool, Scope::Nobody).await?)
            .await
    }

    /// Notes what [`WAITS`] found, which was sent then.
    pub(super) fn note_standbys(&self, found: &[Row], sent: Instant) -> Result<(), Fault> {
        if let Some(row) = found.first() {
            self.state.set_standbys(get(row, "waits")?, sent);
        }
        Ok(())
    }
}

//! Watching when the certificate of a server ends.

use std::convert::Infallible;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use jiff::Timestamp;
use tokio::sync::watch;
use tokio::time::sleep;

use super::Tls;
use crate::server::ops::metrics::Metrics;

/// How long before its end a certificate is reported.
const SOON: Duration = Duration::from_secs(14 * DAY.as_secs());

/// How often it is reported.
const DAY: Duration = Duration::from_secs(24 * 3600);

/// Tells the metrics when the present certificate ends, and the log each day if that is soon.
pub(super) async fn watch(mut tls: watch::Receiver<Tls>, metrics: &Metrics) -> Infallible {
    loop {
        let end = tls.borrow_and_update().expires_at();
        let since = end.and_then(|end| end.duration_since(UNIX_EPOCH).ok());
        metrics.set_certificate_end(since.map_or(0, |since| since.as_secs()));
        if let Some(end) = end {
            report(end, SystemTime::now());
        }
        tokio::select! {
            Ok(()) = tls.changed() => {}
            () = sleep(DAY) => {}
        }
    }
}

fn report(end: SystemTime, now: SystemTime) {
    let left = end.duration_since(now).unwrap_or_default();
    if left > SOON {
        return;
    }
    let time = Timestamp::try_from(end).map_or_else(|_| "?".to_owned(), |end| end.to_string());
    if left.is_zero() {
        tracing::error!(end = time, "the certificate has ended; clients refuse it");
    } else {
        let days = left.as_secs() / DAY.as_secs();
        tracing::warn!(end = time, days, "the certificate ends soon; renew it");
    }
}

//! Webhook endpoints, and what they have not received, as they are read.

use std::time::{Duration, SystemTime};

use tokio_postgres::types::Type;

use super::Inner;
use super::load;
use super::read::events;
use super::rows::{self, get};
use super::wall::Scope;
use crate::store::delivery::COUNTED;
use crate::store::operation::Standing;
use crate::store::{DeadLetter, DueDeliveries, DueDelivery, EndpointState, StoreError};

/// What an event shows, beside its delivery.
const UNDELIVERED: &str = "u.parked_at, u.attempts, u.due, u.given_up_at, u.failure";

/// The longest wait that is told from longer ones: a century.
const MAX_WAIT: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// Selects undelivered events.
fn undelivered(rest: &str) -> String {
    let sql = events(rest).replacen("SELECT ", &format!("SELECT {UNDELIVERED}, "), 1);
    sql.replacen(
        "FROM feed f ",
        "FROM undelivered u JOIN feed f ON f.position = u.position ",
        1,
    )
}

impl Inner {
    /// Reads what is to be attempted now.
    pub(super) async fn due(
        &self,
        endpoint: &str,
        limit: usize,
        longest_wait: Duration,
    ) -> Result<DueDeliveries, StoreError> {
        const NEXT: &str = "SELECT clock_timestamp() AS now, (SELECT min(due) FROM undelivered \
             WHERE endpoint = $1 AND due IS NOT NULL AND due > $2 AND due <= $3) AS next";
        let now = self.state.now();
        // What is due later than any wait takes is due now. PostgreSQL keeps times up to the year
        // 294276.
        let latest = now + longest_wait.min(MAX_WAIT);
        let mut deliveries = Vec::new();
        for (is_due, time) in [("u.due <= $2", now), ("u.due > $2", latest)] {
            let left = rows::number(limit - deliveries.len());
            let due = undelivered(&format!(
                "u.endpoint = $1 AND u.due IS NOT NULL AND {is_due} ORDER BY u.due, u.position LIMIT $3"
            ));
            let found = self
                .read(
                    Scope::All,
                    &due,
                    &[
                        (&endpoint, Type::TEXT),
                        (&time, Type::TIMESTAMPTZ),
                        (&left, Type::INT8),
                    ],
                )
                .await?;
            for row in &found {
                deliveries.push(DueDelivery {
                    position: rows::count(row, "position")?,
                    event: rows::shown_event(row)?,
                    attempts: get::<i32>(row, "attempts")?.unsigned_abs(),
                });
            }
        }
        let found = self
            .read(
                Scope::Nobody,
                NEXT,
                &[
                    (&endpoint, Type::TEXT),
                    (&now, Type::TIMESTAMPTZ),
                    (&latest, Type::TIMESTAMPTZ),
                ],
            )
            .await?;
        let next: Option<SystemTime> = match found.first() {
            Some(row) => {
                self.state.set_time(get(row, "now")?);
                get(row, "next")?
            }
            None => None,
        };
        Ok(DueDeliveries {
            deliveries,
            next: next.and_then(|next| next.duration_since(now).ok()),
        })
    }

    pub(super) async fn all_endpoints(&self) -> Result<Vec<EndpointState>, StoreError> {
        self.publish().await?;
        let found = self
            .read(
                Scope::All,
                "SELECT n.name, n.position, n.stopped_at, n.held_until, greatest(p.position - n.position, 0) AS behind, \
                 (SELECT f.at FROM feed f WHERE f.position > n.position ORDER BY f.position LIMIT 1) AS behind_since, \
                 (SELECT count(*) FROM (SELECT FROM undelivered u WHERE u.endpoint = n.name \
                 AND u.given_up_at IS NULL LIMIT $1) AS counted) AS parked, \
                 (SELECT count(*) FROM (SELECT FROM undelivered u WHERE u.endpoint = n.name \
                 AND u.given_up_at IS NOT NULL LIMIT $1) AS counted) AS dead \
                 FROM endpoint n, publisher p ORDER BY n.name",
                &[(&rows::number(COUNTED), Type::INT8)],
            )
            .await?;
        let states = found.iter().map(|row| {
            Ok(EndpointState {
                name: get(row, "name")?,
                position: rows::count(row, "position")?,
                stopped_at: get(row, "stopped_at")?,
                held_until: get(row, "held_until")?,
                behind: rows::count(row, "behind")?,
                behind_since: get(row, "behind_since")?,
                parked: rows::count(row, "parked")?,
                dead: rows::count(row, "dead")?,
            })
        });
        states.collect()
    }

    pub(super) async fn letters(
        &self,
        endpoint: &str,
        limit: usize,
    ) -> Result<Vec<DeadLetter>, StoreError> {
        let limit = rows::number(limit);
        let dead = undelivered(
            "u.endpoint = $1 AND u.given_up_at IS NOT NULL ORDER BY u.position LIMIT $2",
        );
        let found = self
            .read(
                Scope::All,
                &dead,
                &[(&endpoint, Type::TEXT), (&limit, Type::INT8)],
            )
            .await?;
        let mut letters = Vec::with_capacity(found.len());
        for row in &found {
            let dead = load::parse(row)?;
            if let Standing::Dead(given_up_at) = dead.standing {
                letters.push(DeadLetter {
                    position: dead.position,
                    event: rows::shown_event(row)?,
                    attempts: dead.attempts,
                    parked_at: dead.since,
                    given_up_at,
                    failure: dead.failure.unwrap_or_default(),
                });
            }
        }
        Ok(letters)
    }
}

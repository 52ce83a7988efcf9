//! Webhook endpoints, and what they have not received, as they are read.

use std::time::SystemTime;

use tokio_postgres::types::Type;

use super::Inner;
use super::load;
use super::read::events;
use super::rows::{self, get};
use crate::store::operation::Standing;
use crate::store::{DeadLetter, DueDeliveries, DueDelivery, EndpointState, StoreError};

/// What an event shows, beside its delivery.
const UNDELIVERED: &str = "u.parked_at, u.attempts, u.due, u.given_up_at, u.failure";

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
    ) -> Result<DueDeliveries, StoreError> {
        const NEXT: &str = "SELECT clock_timestamp() AS now, (SELECT min(due) FROM undelivered \
             WHERE endpoint = $1 AND due IS NOT NULL AND due > $2) AS next";
        let (now, limit) = (self.state.now(), rows::number(limit));
        let due = undelivered(
            "u.endpoint = $1 AND u.due IS NOT NULL AND u.due <= $2 ORDER BY u.due, u.position LIMIT $3",
        );
        let found = self
            .read(
                &due,
                &[
                    (&endpoint, Type::TEXT),
                    (&now, Type::TIMESTAMPTZ),
                    (&limit, Type::INT8),
                ],
            )
            .await?;
        let deliveries = found.iter().map(|row| {
            Ok(DueDelivery {
                position: rows::count(row, "position")?,
                event: rows::shown_event(row)?,
                attempts: get::<i32>(row, "attempts")?.unsigned_abs(),
            })
        });
        let deliveries = deliveries.collect::<Result<_, StoreError>>()?;
        let found = self
            .read(NEXT, &[(&endpoint, Type::TEXT), (&now, Type::TIMESTAMPTZ)])
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
                "SELECT n.name, n.position, n.stopped_at, n.held_until, greatest(p.position - n.position, 0) AS behind, \
                 (SELECT count(*) FROM undelivered u WHERE u.endpoint = n.name AND u.given_up_at IS NULL) AS parked, \
                 (SELECT count(u.given_up_at) FROM undelivered u WHERE u.endpoint = n.name) AS dead \
                 FROM endpoint n, publisher p ORDER BY n.name",
                &[],
            )
            .await?;
        let states = found.iter().map(|row| {
            Ok(EndpointState {
                name: get(row, "name")?,
                position: rows::count(row, "position")?,
                stopped_at: get(row, "stopped_at")?,
                held_until: get(row, "held_until")?,
                behind: rows::count(row, "behind")?,
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
            .read(&dead, &[(&endpoint, Type::TEXT), (&limit, Type::INT8)])
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

//! The PostgreSQL store as a side, where a case has one.

use aegis_hitl::store::{Clock, PostgresStore};
use proptest::prelude::*;
use proptest::test_runner::TestCaseError;

use super::side::Side;
use crate::support::postgres;
use crate::support::reference::{Answer, Reference, Request};

pub struct Postgres(Option<(String, Side<PostgresStore>)>);

/// Makes a database with the schema, and returns its URL.
pub async fn database() -> String {
    let url = postgres::Postgres::shared().database().await;
    connect(&url, &Clock::new()).await.close().await;
    url
}

async fn connect(url: &str, clock: &Clock) -> PostgresStore {
    let store = PostgresStore::builder(url)
        .clock(clock.clone())
        .connections(4);
    store.connect().await.unwrap()
}

impl Postgres {
    /// Empties the database, and opens a store in it.
    pub async fn open(url: Option<&str>, clock: &Clock) -> Self {
        let Some(url) = url else {
            return Self(None);
        };
        let client = postgres::connect(url).await;
        // The store before may still be at a pass, which locks the publisher before the feed.
        let empty = "UPDATE publisher SET position = 0; UPDATE sweep SET position = 0, tombstones = 0; \
                     TRUNCATE action, claim, event, feed, undelivered, endpoint, heartbeat, postponed, swept";
        client.batch_execute(empty).await.unwrap();
        let side = Side::new("postgres", connect(url, clock).await, clock);
        Self(Some((url.to_owned(), side)))
    }

    pub async fn reopen(&mut self, clock: &Clock) {
        if let Some((url, side)) = &mut self.0 {
            side.store.close().await;
            side.store = connect(url, clock).await;
        }
    }

    pub async fn touch(&mut self, slot: usize) {
        if let Some((_, side)) = &mut self.0 {
            side.touch(slot).await;
        }
    }

    pub async fn sweep(&mut self, expected: usize) -> Result<(), TestCaseError> {
        if let Some((_, side)) = &mut self.0 {
            prop_assert_eq!(side.sweep().await, expected, "postgres");
        }
        Ok(())
    }

    pub async fn apply(
        &mut self,
        request: &Request,
        expected: &Answer,
    ) -> Result<(), TestCaseError> {
        if let Some((_, side)) = &mut self.0 {
            let answer = side.apply(request).await?;
            prop_assert_eq!(&answer, expected, "postgres on {:?}", request);
        }
        Ok(())
    }

    pub async fn compare(&self, reference: &Reference, slot: usize) -> Result<(), TestCaseError> {
        match &self.0 {
            Some((_, side)) => side.compare(reference, slot).await,
            None => Ok(()),
        }
    }

    pub async fn compare_all(&self, reference: &Reference) -> Result<(), TestCaseError> {
        let Some((_, side)) = &self.0 else {
            return Ok(());
        };
        side.compare_all(reference, true).await?;
        side.store.close().await;
        Ok(())
    }
}

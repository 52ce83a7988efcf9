//! The PostgreSQL store is not built.

use aegis_hitl::store::Clock;
use proptest::test_runner::TestCaseError;

use crate::support::reference::{Answer, Reference, Request};

pub struct Postgres;

pub async fn database() -> String {
    String::new()
}

impl Postgres {
    pub async fn open(_: Option<&str>, _: &Clock) -> Self {
        Self
    }

    pub async fn reopen(&mut self, _: &Clock) {}

    pub async fn touch(&mut self, _: usize) {}

    pub async fn sweep(&mut self, _: usize) -> Result<(), TestCaseError> {
        Ok(())
    }

    pub async fn apply(&mut self, _: &Request, _: &Answer) -> Result<(), TestCaseError> {
        Ok(())
    }

    pub async fn compare(&self, _: &Reference, _: usize) -> Result<(), TestCaseError> {
        Ok(())
    }

    pub async fn compare_all(&self, _: &Reference) -> Result<(), TestCaseError> {
        Ok(())
    }
}

//! How long the oldest actions have waited.

use std::time::Duration;

use super::claims::claim;
use super::{Stores, decision, identity, submission};
use crate::protocol::Decision::Reject;
use crate::store::{Backlog, Decide, Decided, Store, Submit, Submitted};

impl<S: Store> Stores<S> {
    async fn backlog(&self, index: usize) -> Backlog {
        let backlog = self.at(index).backlog().await;
        Backlog {
            // Not every store has these.
            unchained: None,
            tombstones: None,
            ..backlog.expect("the backlog was answered")
        }
    }
}

/// Lets some time pass by the clock of the stores, which cannot be set from here.
async fn a_while() -> Duration {
    let time = Duration::from_millis(20);
    tokio::time::sleep(time).await;
    time
}

pub(super) async fn the_oldest_of_all_tenants_tell_how_long_they_waited<S: Store>(
    stores: &Stores<S>,
) {
    assert_eq!(stores.backlog(0).await, Backlog::default());
    // An action that was decided without a submission waits for nobody.
    stores.approve("bare").await;
    assert_eq!(stores.backlog(1).await, Backlog::default());

    stores.submitted("first", None).await;
    let between = a_while().await;
    let other = Submit {
        identity: identity("other", "h", "k"),
        ..submission("k")
    };
    unwrap_variant!(stores.submit(1, other).await, Submitted::Recorded);
    let both = stores.backlog(2).await;
    assert!(both.pending.unwrap() >= between, "{both:?}");
    assert_eq!(both.unclaimed, None);

    // The time begins anew with the decision, and the other tenant's action is now the oldest.
    let first = stores.approve("first").await;
    let between = a_while().await;
    let second = stores.approved("second").await;
    let both = stores.backlog(0).await;
    assert!(both.pending.unwrap() >= between, "{both:?}");
    assert!(both.unclaimed.unwrap() >= between, "{both:?}");

    // What is claimed waits no more, and neither does what is rejected.
    for action in [first, second] {
        assert!(stores.backlog(2).await.unclaimed.is_some());
        stores.claimed(1, claim(&action)).await;
    }
    let rejected = Decide {
        identity: identity("other", "h", "k"),
        ..decision("k", Reject)
    };
    unwrap_variant!(stores.decide(0, rejected).await, Decided::Recorded);
    assert_eq!(stores.backlog(1).await, Backlog::default());
}

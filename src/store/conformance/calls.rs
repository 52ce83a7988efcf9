//! Call ids: whose retry a call is, and which action it names.

use uuid::Uuid;

use super::{Stores, decision, id, identity, submission};
use crate::protocol::Decision::{Approve, Reject};
use crate::protocol::RequestId;
use crate::store::{Decide, Decided, Store, Submit, Submitted};

pub(super) async fn a_call_id_finds_the_one_action_that_it_names<S: Store>(stores: &Stores<S>) {
    let call = |uuid: Uuid| Some(RequestId::from(uuid));
    let [submitting, deciding, twice] = [Uuid::new_v4(), Uuid::new_v4(), Uuid::new_v4()];
    let submit = Submit {
        call_id: call(submitting),
        ..submission("k")
    };
    unwrap_variant!(stores.submit(0, submit).await, Submitted::Recorded);
    let request = Decide {
        call_id: call(deciding),
        ..decision("k", Approve)
    };
    let action = unwrap_variant!(stores.decide(1, request.clone()).await, Decided::Recorded);
    for id in [submitting, deciding, id(&action)] {
        assert_eq!(stores.find(2, id).await.as_ref(), Some(&action));
    }

    // A call that changed nothing also names its action, at the store that answered it.
    let [confirmed, existing] = [Uuid::new_v4(), Uuid::new_v4()];
    for call_id in [call(confirmed), call(twice)] {
        let duplicate = Decide {
            call_id,
            ..request.clone()
        };
        unwrap_variant!(stores.decide(0, duplicate).await, Decided::Duplicate);
    }
    let again = Submit {
        call_id: call(existing),
        ..submission("k")
    };
    unwrap_variant!(stores.submit(0, again).await, Submitted::Existing);
    for id in [confirmed, existing, twice] {
        assert_eq!(stores.find(0, id).await.as_ref(), Some(&action));
    }
    // It does not count once the id is on record for another action.
    for (key, found) in [("k-1", true), ("k-2", false)] {
        let request = Decide {
            call_id: call(twice),
            ..decision(key, Reject)
        };
        unwrap_variant!(stores.decide(2, request).await, Decided::Recorded);
        let named = stores.find(0, twice).await;
        let named = named.map(|action| action.idempotency_key.unwrap().as_str() == key);
        assert_eq!(named, found.then_some(true), "{key}");
    }

    // The store's own id comes first, so no call id can hide an action.
    let request = Decide {
        call_id: call(id(&action)),
        ..decision("k-3", Reject)
    };
    unwrap_variant!(stores.decide(1, request).await, Decided::Recorded);
    assert_eq!(stores.find(2, id(&action)).await, Some(action));
}

pub(super) async fn a_tenants_call_id_is_its_own<S: Store>(stores: &Stores<S>) {
    let [recorded, confirmed] = [Uuid::new_v4(), Uuid::new_v4()];
    let mut actions = Vec::new();
    for tenant in ["tenant-1", "tenant-2"] {
        let request = |key: &str, call: Uuid| Decide {
            identity: identity(tenant, "thread", key),
            call_id: Some(RequestId::from(call)),
            ..decision(key, Approve)
        };
        let decided = stores.decide(0, request("k", recorded)).await;
        let action = unwrap_variant!(decided, Decided::Recorded);
        let decided = stores.decide(0, request("k", confirmed)).await;
        unwrap_variant!(decided, Decided::Duplicate);
        actions.push(action);
    }
    for (action, other) in [(&actions[0], &actions[1]), (&actions[1], &actions[0])] {
        let tenant = action.tenant_id.as_ref();
        for call in [recorded, confirmed, id(action)] {
            let found = stores.at(0).find(call, tenant).await.unwrap();
            assert_eq!(found.as_ref(), Some(action));
        }
        // Another tenant's id finds nothing.
        assert_eq!(stores.at(1).find(id(other), tenant).await.unwrap(), None);
    }
    let stranger = "tenant-3".parse().unwrap();
    for call in [recorded, confirmed] {
        // Without a tenant, the id is ambiguous.
        assert_eq!(stores.find(0, call).await, None);
        let found = stores.at(0).find(call, Some(&stranger)).await;
        assert_eq!(found.unwrap(), None);
    }
}

pub(super) async fn a_call_id_of_any_form_tells_a_retry<S: Store>(stores: &Stores<S>) {
    let version_1 = "c232ab00-9414-11ec-b3c8-9f6bdeced846";
    for (key, call_id) in [("k-1", "call-1"), ("k-2", version_1)] {
        let request = Decide {
            call_id: Some(call_id.parse().unwrap()),
            ..decision(key, Approve)
        };
        unwrap_variant!(stores.decide(0, request.clone()).await, Decided::Recorded);
        unwrap_variant!(stores.decide(1, request).await, Decided::Replayed);
    }
    assert!(stores.find(2, version_1.parse().unwrap()).await.is_some());
    // Two spellings of one id are the same id.
    let spellings = [
        "9f1b2c3d-0000-4000-8000-00000000abcd",
        "9F1B2C3D-0000-4000-8000-00000000ABCD",
    ];
    let [one, other] = spellings.map(|call_id| Decide {
        call_id: Some(call_id.parse().unwrap()),
        ..decision("k-3", Approve)
    });
    let recorded = unwrap_variant!(stores.decide(0, one).await, Decided::Recorded);
    unwrap_variant!(stores.decide(1, other).await, Decided::Replayed);
    let found = stores.find(2, spellings[0].parse().unwrap()).await;
    assert_eq!(found, Some(recorded));
}

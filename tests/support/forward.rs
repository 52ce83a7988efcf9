//! The operations of a store that a test double passes on unchanged.

/// Implements what webhooks and metrics need by a store of the double's. `$first` runs before each.
macro_rules! forward_deliveries {
    ($self:ident, $store:expr, $first:block) => {
        async fn all_events(
            &$self,
            after: u64,
            limit: usize,
        ) -> Result<Vec<(u64, aegis_hitl::protocol::Event)>, aegis_hitl::store::StoreError> {
            $first;
            $store.all_events(after, limit).await
        }

        async fn take_endpoint(
            &$self,
            request: aegis_hitl::store::TakeEndpoint,
        ) -> Result<aegis_hitl::store::EndpointTaken, aegis_hitl::store::StoreError> {
            $first;
            $store.take_endpoint(request).await
        }

        async fn due_deliveries(
            &$self,
            endpoint: &str,
            limit: usize,
            longest_wait: std::time::Duration,
        ) -> Result<aegis_hitl::store::DueDeliveries, aegis_hitl::store::StoreError> {
            $first;
            $store.due_deliveries(endpoint, limit, longest_wait).await
        }

        async fn mark_deliveries(
            &$self,
            request: aegis_hitl::store::MarkDeliveries,
        ) -> Result<aegis_hitl::store::Marked, aegis_hitl::store::StoreError> {
            $first;
            $store.mark_deliveries(request).await
        }

        async fn resend(
            &$self,
            request: aegis_hitl::store::Resend,
        ) -> Result<aegis_hitl::store::Resent, aegis_hitl::store::StoreError> {
            $first;
            $store.resend(request).await
        }

        async fn resume(
            &$self,
            request: aegis_hitl::store::Resume,
        ) -> Result<aegis_hitl::store::Resumed, aegis_hitl::store::StoreError> {
            $first;
            $store.resume(request).await
        }

        async fn forget_endpoint(
            &$self,
            request: aegis_hitl::store::Forget,
        ) -> Result<aegis_hitl::store::Forgotten, aegis_hitl::store::StoreError> {
            $first;
            $store.forget_endpoint(request).await
        }

        async fn endpoints(
            &$self,
        ) -> Result<Vec<aegis_hitl::store::EndpointState>, aegis_hitl::store::StoreError> {
            $first;
            $store.endpoints().await
        }

        async fn dead_letters(
            &$self,
            endpoint: &str,
            limit: usize,
        ) -> Result<Vec<aegis_hitl::store::DeadLetter>, aegis_hitl::store::StoreError> {
            $first;
            $store.dead_letters(endpoint, limit).await
        }

        async fn backlog(
            &$self,
        ) -> Result<aegis_hitl::store::Backlog, aegis_hitl::store::StoreError> {
            $first;
            $store.backlog().await
        }

        async fn sweep(
            &$self,
            request: aegis_hitl::store::Sweep,
        ) -> Result<aegis_hitl::store::Swept, aegis_hitl::store::StoreError> {
            $first;
            $store.sweep(request).await
        }

        fn statistics(&$self) -> aegis_hitl::store::Statistics {
            $store.statistics()
        }

        fn watch_all(&$self) -> aegis_hitl::store::Watch {
            $store.watch_all()
        }
    };
}

pub(crate) use forward_deliveries;

/// Implements the operations on submitted actions by a store of the double's. `$first` runs before
/// each.
macro_rules! forward_the_human_loop {
    ($self:ident, $store:expr, $first:block) => {
        async fn decide_by_id(
            &$self,
            request: aegis_hitl::store::DecideById,
        ) -> Result<aegis_hitl::store::Decided, aegis_hitl::store::StoreError> {
            $first;
            $store.decide_by_id(request).await
        }

        async fn cancel(
            &$self,
            request: aegis_hitl::store::Cancel,
        ) -> Result<aegis_hitl::store::Cancelled, aegis_hitl::store::StoreError> {
            $first;
            $store.cancel(request).await
        }

        async fn acquire(
            &$self,
            request: aegis_hitl::store::Acquire,
        ) -> Result<aegis_hitl::store::Acquired, aegis_hitl::store::StoreError> {
            $first;
            $store.acquire(request).await
        }

        async fn renew(
            &$self,
            request: aegis_hitl::store::Renew,
        ) -> Result<aegis_hitl::store::Renewed, aegis_hitl::store::StoreError> {
            $first;
            $store.renew(request).await
        }

        async fn finish(
            &$self,
            request: aegis_hitl::store::Finish,
        ) -> Result<aegis_hitl::store::Finished, aegis_hitl::store::StoreError> {
            $first;
            $store.finish(request).await
        }

        async fn list(
            &$self,
            request: aegis_hitl::store::List,
        ) -> Result<aegis_hitl::store::Page, aegis_hitl::store::StoreError> {
            $first;
            $store.list(request).await
        }

        async fn tenants(
            &$self,
            after: Option<&aegis_hitl::TenantId>,
            limit: usize,
        ) -> Result<Vec<aegis_hitl::TenantId>, aegis_hitl::store::StoreError> {
            $first;
            $store.tenants(after, limit).await
        }

        async fn look_up(
            &$self,
            id: uuid::Uuid,
            tenant: &aegis_hitl::TenantId,
        ) -> Result<Option<aegis_hitl::Action>, aegis_hitl::store::StoreError> {
            $first;
            $store.look_up(id, tenant).await
        }

        async fn events(
            &$self,
            tenant: &aegis_hitl::TenantId,
            after: u64,
            limit: usize,
        ) -> Result<Vec<(u64, aegis_hitl::protocol::Event)>, aegis_hitl::store::StoreError> {
            $first;
            $store.events(tenant, after, limit).await
        }

        async fn newest_event(&$self) -> Result<u64, aegis_hitl::store::StoreError> {
            $first;
            $store.newest_event().await
        }

        crate::support::forward_deliveries!($self, $store, $first);

        fn watch_tenant(&$self, tenant: &aegis_hitl::TenantId) -> aegis_hitl::store::Watch {
            $store.watch_tenant(tenant)
        }
    };
}

pub(crate) use forward_the_human_loop;

//! What the server counts, and its text for Prometheus.
//!
//! A label holds the name of an endpoint, a status, a word of the protocol, or the name of a
//! webhook, which the operator chose. None comes from a request.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use http::StatusCode;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeGaugeValue, MetricEncoder, NoLabelSet, prometheus_text,
};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

use crate::outbox::Counters;
use crate::protocol::EventKind;
use crate::server::reloads::Reloads;
use crate::store::{Backlog, DurationCounter, Durations, EndpointState, Statistics};

/// The media type of the text.
pub(crate) const CONTENT_TYPE: &str = prometheus_text::CONTENT_TYPE;

/// More than there are endpoints.
const ENDPOINTS: usize = 48;

/// The statuses of HTTP.
const FIRST_STATUS: u16 = 100;
const STATUSES: usize = 500;

/// What the server counts. To count takes a few atomic operations and, but for the first request to
/// an endpoint, no allocation.
#[derive(Debug)]
pub(crate) struct Metrics {
    /// Each endpoint takes the next slot at its first request.
    endpoints: [OnceLock<Box<Endpoint>>; ENDPOINTS],
    /// The number of open connections.
    pub(crate) connections: Arc<AtomicUsize>,
    /// When the certificate ends, in seconds since 1970; 0 if there is none.
    certificate_end: AtomicU64,
}

#[derive(Debug)]
struct Endpoint {
    name: &'static str,
    durations: DurationCounter,
    statuses: [AtomicU64; STATUSES],
}

impl Endpoint {
    fn new(name: &'static str) -> Box<Self> {
        Box::new(Self {
            name,
            durations: DurationCounter::default(),
            statuses: [const { AtomicU64::new(0) }; STATUSES],
        })
    }
}

impl Metrics {
    pub(crate) fn new() -> Self {
        Self {
            endpoints: [const { OnceLock::new() }; ENDPOINTS],
            connections: Arc::default(),
            certificate_end: AtomicU64::new(0),
        }
    }

    /// Sets when the certificate ends that new connections get, in seconds since 1970; 0 if that is
    /// not known.
    #[cfg(feature = "tls")]
    pub(crate) fn set_certificate_end(&self, end: u64) {
        self.certificate_end.store(end, Ordering::Relaxed);
    }

    /// Counts a request that was answered.
    pub(crate) fn answered(&self, endpoint: &'static str, status: StatusCode, took: Duration) {
        let endpoint = self.endpoints.iter().find_map(|slot| {
            let taken = slot.get_or_init(|| Endpoint::new(endpoint));
            (taken.name == endpoint).then_some(taken)
        });
        let Some(endpoint) = endpoint else {
            return;
        };
        endpoint.durations.add(took);
        let index = usize::from(status.as_u16().saturating_sub(FIRST_STATUS));
        if let Some(count) = endpoint.statuses.get(index) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn endpoints(&self) -> impl Iterator<Item = &Endpoint> {
        self.endpoints
            .iter()
            .map_while(OnceLock::get)
            .map(|endpoint| &**endpoint)
    }

    /// Writes everything as text.
    pub(crate) fn text(self: &Arc<Self>, reading: Reading) -> Result<String, fmt::Error> {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Scrape {
            metrics: Arc::clone(self),
            reading,
        }));
        let mut text = String::new();
        prometheus_text::encode(&mut text, &registry)?;
        Ok(text)
    }
}

/// What was read of the store for one scrape.
#[derive(Debug, Default)]
pub(crate) struct Reading {
    pub(crate) statistics: Statistics,
    /// `None` if the store cannot be read.
    pub(crate) backlog: Option<Backlog>,
    /// `None` if the store cannot be read.
    pub(crate) webhooks: Option<Vec<EndpointState>>,
    /// The endpoints that this server delivers to. Those of others are not shown.
    pub(crate) tally: Option<BTreeMap<String, Arc<Counters>>>,
    pub(crate) reloads: Option<Reloads>,
}

#[derive(Debug)]
struct Scrape {
    metrics: Arc<Metrics>,
    reading: Reading,
}

type Labels<'a> = &'a [(&'static str, Cow<'a, str>)];

/// Metrics of one name.
struct Family<'a>(MetricEncoder<'a>);

impl<'a> Family<'a> {
    fn new(
        encoder: &'a mut DescriptorEncoder<'_>,
        kind: MetricType,
        name: &'a str,
        help: &str,
    ) -> Result<Self, fmt::Error> {
        let family = encoder.encode_descriptor(name, help, None, kind)?;
        Ok(Self(family))
    }

    fn counter(&mut self, labels: Labels<'_>, value: u64) -> fmt::Result {
        let mut metric = self.0.encode_family(&labels)?;
        metric.encode_counter::<NoLabelSet, _, u64>(&value, None)
    }

    fn gauge(&mut self, labels: Labels<'_>, value: impl EncodeGaugeValue) -> fmt::Result {
        self.0.encode_family(&labels)?.encode_gauge(&value)
    }

    fn histogram(&mut self, labels: Labels<'_>, durations: &Durations) -> fmt::Result {
        let buckets = durations.buckets.iter();
        let buckets: Vec<_> = buckets
            .map(|(bound, count)| (bound.as_secs_f64(), *count))
            .collect();
        let total = durations.total.as_secs_f64();
        let mut metric = self.0.encode_family(&labels)?;
        metric.encode_histogram::<NoLabelSet>(total, durations.count, &buckets, None)
    }
}

impl Collector for Scrape {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        self.server(&mut encoder)?;
        self.settings(&mut encoder)?;
        self.events(&mut encoder)?;
        self.store(&mut encoder)?;
        self.webhooks(&mut encoder)
    }
}

impl Scrape {
    fn server(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        use MetricType::{Counter, Gauge, Histogram};

        let help = "The version of the server";
        let version = [("version", Cow::from(env!("CARGO_PKG_VERSION")))];
        Family::new(encoder, Gauge, "aegis_build_info", help)?.gauge(&version, 1_u64)?;

        let help = "Open connections";
        let connections = self.metrics.connections.load(Ordering::Relaxed) as u64;
        Family::new(encoder, Gauge, "aegis_connections", help)?.gauge(&[], connections)?;

        let help = "Requests that were answered";
        let mut requests = Family::new(encoder, Counter, "aegis_requests", help)?;
        for endpoint in self.metrics.endpoints() {
            for (status, count) in (FIRST_STATUS..).zip(&endpoint.statuses) {
                let count = count.load(Ordering::Relaxed);
                if count > 0 {
                    let status = status.to_string().into();
                    let labels = [("endpoint", endpoint.name.into()), ("status", status)];
                    requests.counter(&labels, count)?;
                }
            }
        }

        let help = "The time from the head of a request to the beginning of its answer";
        let name = "aegis_request_duration_seconds";
        let mut durations = Family::new(encoder, Histogram, name, help)?;
        for endpoint in self.metrics.endpoints() {
            let labels = [("endpoint", endpoint.name.into())];
            durations.histogram(&labels, &endpoint.durations.read())?;
        }
        Ok(())
    }

    /// What a reload replaces.
    fn settings(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        use MetricType::{Counter, Gauge};

        let end = self.metrics.certificate_end.load(Ordering::Relaxed);
        if end > 0 {
            let help = "When the certificate ends that new connections get, since 1970";
            let name = "aegis_tls_certificate_expiry_timestamp_seconds";
            Family::new(encoder, Gauge, name, help)?.gauge(&[], end)?;
        }
        if let Some(reloads) = &self.reading.reloads {
            let help = "Reloads of which a part is not in force";
            let failures = Family::new(encoder, Counter, "aegis_reload_failures", help);
            failures?.counter(&[], reloads.failures())?;
            let help = "When all settings were last read and put in force, since 1970";
            let name = "aegis_reload_last_success_timestamp_seconds";
            let success = Family::new(encoder, Gauge, name, help);
            success?.gauge(&[], reloads.last_success())?;
        }
        Ok(())
    }

    fn events(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        use MetricType::Counter;

        let recorded = &self.reading.statistics.events;
        let count = |kind| {
            let found = recorded.iter().find(|(other, _)| *other == kind);
            found.map_or(0, |(_, count)| *count)
        };
        let help = "Decisions that were recorded, without expiries and cancellations";
        let mut decisions = Family::new(encoder, Counter, "aegis_decisions", help)?;
        for (decision, kind) in [
            ("approve", EventKind::Approved),
            ("reject", EventKind::Rejected),
        ] {
            decisions.counter(&[("decision", decision.into())], count(kind))?;
        }

        let help = "Claims that were granted";
        let claims = count(EventKind::Claimed);
        Family::new(encoder, Counter, "aegis_claims", help)?.counter(&[], claims)?;

        let help = "Transitions of actions that were recorded";
        let mut events = Family::new(encoder, Counter, "aegis_events", help)?;
        for (kind, count) in recorded {
            events.counter(&[("event", kind.as_str().into())], *count)?;
        }
        Ok(())
    }

    fn store(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        use MetricType::{Counter, Gauge, Histogram};

        let writer = self.reading.statistics.writer.as_ref();
        let can_write = writer.is_none_or(|writer| writer.is_ready);
        let is_ready = can_write && self.reading.backlog.is_some();
        let help = "Whether the store is ready: 1, or 0";
        let ready = Family::new(encoder, Gauge, "aegis_store_ready", help);
        ready?.gauge(&[], u64::from(is_ready))?;

        let help = "Actions that were removed because they had been over for long enough";
        let removed = self.reading.statistics.removed;
        Family::new(encoder, Counter, "aegis_removed_actions", help)?.counter(&[], removed)?;

        if let Some(writer) = writer {
            let help = "Requests that wait for the writer of the store";
            let queued = Family::new(encoder, Gauge, "aegis_store_queued_requests", help);
            queued?.gauge(&[], writer.queued)?;
            let help = "Requests that commits of the store made durable";
            let requests = Family::new(encoder, Counter, "aegis_store_committed_requests", help);
            requests?.counter(&[], writer.requests)?;
            let help = "The time of a commit of the store, with its fsync";
            let name = "aegis_store_commit_duration_seconds";
            let commits = Family::new(encoder, Histogram, name, help);
            commits?.histogram(&[], &writer.commits)?;
        }

        if let Some(connections) = &self.reading.statistics.connections {
            let help = "The connections to the database that are open, by what they do";
            let mut open = Family::new(encoder, Gauge, "aegis_store_connections", help)?;
            open.gauge(&[("state", "idle".into())], connections.idle)?;
            open.gauge(&[("state", "busy".into())], connections.busy)?;
            let help = "The most connections to the database";
            let limit = Family::new(encoder, Gauge, "aegis_store_connections_limit", help);
            limit?.gauge(&[], connections.limit)?;
            let help = "Requests that wait for a connection to the database";
            let waiting = Family::new(encoder, Gauge, "aegis_store_connections_waiting", help);
            waiting?.gauge(&[], connections.waiting)?;
        }

        if let Some(backlog) = &self.reading.backlog {
            let seconds = |age: Option<Duration>| age.unwrap_or_default().as_secs_f64();
            let help = "The age of the oldest action that is pending, or 0";
            let pending = Family::new(encoder, Gauge, "aegis_oldest_pending_seconds", help);
            pending?.gauge(&[], seconds(backlog.pending))?;
            let help = "The time since the approval of the submitted action that waits longest \
                        to be claimed, or 0";
            let unclaimed = Family::new(encoder, Gauge, "aegis_oldest_unclaimed_seconds", help);
            unclaimed?.gauge(&[], seconds(backlog.unclaimed))?;
            let counts = [
                (
                    "aegis_tombstones",
                    "Removed actions whose keys stay decided",
                    backlog.tombstones,
                ),
                (
                    "aegis_audit_unchained_events",
                    "Events that are not in the audit chain yet",
                    backlog.unchained,
                ),
            ];
            for (name, help, count) in counts {
                if let Some(count) = count {
                    Family::new(encoder, Gauge, name, help)?.gauge(&[], count)?;
                }
            }
        }
        Ok(())
    }

    fn webhooks(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        type Value = fn(&EndpointState) -> f64;

        let Some(tally) = &self.reading.tally else {
            return Ok(());
        };
        let help =
            "Attempts to deliver that were accepted or failed, and events that were given up";
        let kind = MetricType::Counter;
        let mut deliveries = Family::new(encoder, kind, "aegis_webhook_deliveries", help)?;
        for (name, counters) in tally {
            for (outcome, count) in counters.outcomes() {
                let labels = [("webhook", (&**name).into()), ("outcome", outcome.into())];
                deliveries.counter(&labels, count)?;
            }
        }

        let Some(webhooks) = &self.reading.webhooks else {
            return Ok(());
        };
        let families: [(&str, &str, Value); 5] = [
            (
                "aegis_webhook_behind_events",
                "Events of all tenants that a webhook has not come to",
                |state| state.behind as f64,
            ),
            (
                "aegis_webhook_behind_seconds",
                "The age of the oldest event that a webhook has not come to, or 0",
                |state| {
                    let age = state.behind_since.map(|since| since.elapsed());
                    age.map_or(0.0, |age| age.unwrap_or_default().as_secs_f64())
                },
            ),
            (
                "aegis_webhook_parked_events",
                "Events that wait for another attempt, or behind one that does; at most 10000",
                |state| state.parked as f64,
            ),
            (
                "aegis_webhook_dead_events",
                "Events that were given up; at most 10000",
                |state| state.dead as f64,
            ),
            (
                "aegis_webhook_stopped",
                "Whether a webhook is stopped: 1, or 0",
                |state| f64::from(u8::from(state.stopped_at.is_some())),
            ),
        ];
        let is_shown = |state: &&EndpointState| tally.contains_key(&state.name);
        for (name, help, value) in families {
            let mut family = Family::new(encoder, MetricType::Gauge, name, help)?;
            for state in webhooks.iter().filter(is_shown) {
                family.gauge(&[("webhook", (&*state.name).into())], value(state))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_counted_apart_and_without_a_limit_that_loses_one() {
        let metrics = Arc::new(Metrics::new());
        for (endpoint, status) in [("approve", 202), ("approve", 409), ("claim", 200)] {
            let status = StatusCode::from_u16(status).unwrap();
            metrics.answered(endpoint, status, Duration::from_millis(3));
        }
        let text = metrics.text(Reading::default()).unwrap();
        for line in [
            r#"aegis_requests_total{endpoint="approve",status="202"} 1"#,
            r#"aegis_requests_total{endpoint="approve",status="409"} 1"#,
            r#"aegis_requests_total{endpoint="claim",status="200"} 1"#,
            r#"aegis_request_duration_seconds_count{endpoint="approve"} 2"#,
            r#"aegis_request_duration_seconds_sum{endpoint="approve"} 0.006"#,
            "aegis_store_ready 0",
            "aegis_connections 0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}: {text}");
        }
    }
}

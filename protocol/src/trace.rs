//! Spans that name a transaction: what processes do for it can be put together by its id.
//!
//! They are at level `debug`, so they cost nothing unless somebody wants them: a log at that level, or,
//! with the feature `otlp`, a collector. Then every process makes the same trace of a transaction without
//! telling the others: its id is the trace's id, and its hash says whether it is one of those that are sent.

use tracing::Span;

use crate::id::TxnId;

/// A span at level `debug` for a part of a transaction: `txn_span!("prepare", txn, shard = %shard)`.
#[macro_export]
macro_rules! txn_span {
    ($name:literal, $txn:expr $(, $($fields:tt)+)?) => {{
        let txn: $crate::TxnId = $txn;
        let span = ::tracing::debug_span!($name, %txn $(, $($fields)+)?);
        $crate::trace::join(&span, txn);
        span
    }};
}

/// Makes a span that was not entered yet part of a transaction's trace.
pub fn join(span: &Span, txn: TxnId) {
    #[cfg(feature = "otlp")]
    if !span.is_disabled() {
        export::join(span, txn);
    }
    #[cfg(not(feature = "otlp"))]
    let _ = (span, txn);
}

#[cfg(feature = "otlp")]
pub(crate) mod export {
    //! Sending spans to a collector: OTLP over HTTP.

    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Duration;

    use bytes::Bytes;
    use opentelemetry::trace::{
        SpanContext, SpanId, TraceContextExt, TraceFlags, TraceId, TraceState, TracerProvider,
    };
    use opentelemetry::{Context, KeyValue};
    use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig, WithHttpConfig};
    use opentelemetry_sdk::Resource;
    use opentelemetry_sdk::trace::{Sampler, SdkTracerProvider, Tracer};
    use tracing::Span;
    use tracing_opentelemetry::{OpenTelemetrySpanExt, SetParentError};
    use xxhash_rust::xxh3::xxh3_64;

    use crate::id::TxnId;

    /// How long the collector may take for one batch.
    const TIMEOUT: Duration = Duration::from_secs(5);

    /// Traces of transactions whose hash is below this are sent.
    static SENT_BELOW: AtomicU64 = AtomicU64::new(0);

    pub fn join(span: &Span, txn: TxnId) {
        let bytes = txn.to_bytes();
        let hash = xxh3_64(&bytes);
        let sent = hash < SENT_BELOW.load(Ordering::Relaxed);
        let flags = if sent { TraceFlags::SAMPLED } else { TraceFlags::NOT_SAMPLED };
        // Nobody has this span: it is where all of them hang.
        let root = SpanId::from(hash | 1);
        let context = SpanContext::new(TraceId::from_bytes(bytes), root, flags, true, TraceState::default());
        match span.set_parent(Context::new().with_remote_span_context(context)) {
            Ok(()) | Err(SetParentError::LayerNotFound | SetParentError::SpanDisabled) => {}
            Err(error) => tracing::trace!(%txn, %error, "a span is not part of the trace"),
        }
    }

    /// Starts sending: `share` of all transactions, as `service`, number `instance`.
    pub fn start(
        endpoint: &str,
        share: f64,
        service: String,
        instance: u64,
    ) -> Result<(SdkTracerProvider, Tracer), String> {
        let agent: ureq::Agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(TIMEOUT))
            .build()
            .into();
        let exporter = SpanExporter::builder()
            .with_http()
            .with_http_client(Http(agent))
            .with_protocol(Protocol::HttpBinary)
            .with_endpoint(format!("{}/v1/traces", endpoint.trim_end_matches('/')))
            .with_timeout(TIMEOUT)
            .build()
            .map_err(|error| error.to_string())?;
        let about = Resource::builder()
            .with_service_name(service)
            .with_attribute(KeyValue::new("service.instance.id", instance.to_string()))
            .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
            .build();
        // What is no part of a transaction is not sent.
        let provider = SdkTracerProvider::builder()
            .with_resource(about)
            .with_sampler(Sampler::ParentBased(Box::new(Sampler::AlwaysOff)))
            .with_batch_exporter(exporter)
            .build();
        SENT_BELOW.store((share * u64::MAX as f64) as u64, Ordering::Relaxed);
        let tracer = provider.tracer("troth");
        Ok((provider, tracer))
    }

    /// Blocks, which it may: batches are sent by a thread of their own.
    #[derive(Debug)]
    struct Http(ureq::Agent);

    #[async_trait::async_trait]
    impl opentelemetry_http::HttpClient for Http {
        async fn send_bytes(
            &self,
            request: opentelemetry_http::Request<Bytes>,
        ) -> Result<opentelemetry_http::Response<Bytes>, opentelemetry_http::HttpError> {
            let (parts, body) = request.into_parts();
            let answer = self.0.run(ureq::http::Request::from_parts(parts, body.to_vec()))?;
            let (parts, mut body) = answer.into_parts();
            let body = body.read_to_vec()?;
            Ok(opentelemetry_http::Response::from_parts(parts, body.into()))
        }
    }
}

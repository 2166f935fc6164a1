//! A server's process from its command line to its end: what coordinators and participants have in
//! common.

use std::fmt::Display;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prometheus_client::metrics::info::Info;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use troth_protocol::ClusterId;
use troth_protocol::net::quic::{EndpointError, Quic};
use troth_protocol::net::tls::Credentials;
use troth_protocol::net::{BoxFuture, Role};
use troth_protocol::process::{
    self, Basics, ConfigError, EXIT_FAILED, EXIT_USAGE, HttpConfig, LogFormat, ServerFile, Source, Traces,
    load_server,
};

use crate::group::StartError;
use crate::http::{Http, HttpError, Vitals};
use crate::log::LogWriter;
use crate::metrics::{PREFIX, Registry, Sampler, Shown};
use crate::rocks::{Family, OpenError, Store};

/// Flags of both servers. They override the configuration file.
#[derive(clap::Args)]
pub struct ServerFlags {
    /// The configuration file.
    #[arg(long, short, value_name = "FILE", env = "TROTH_CONFIG")]
    config: Option<PathBuf>,
    /// This server's number: unique among its kind, and never changed.
    #[arg(long)]
    id: Option<u64>,
    /// Where to listen; port 0: the system chooses one, and `address` in the data folder tells.
    #[arg(long, value_name = "HOST:PORT")]
    listen: Option<String>,
    /// Where others find this server, if not where it listens.
    #[arg(long, value_name = "HOST:PORT")]
    advertise: Option<String>,
    /// The data folder.
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// The authority's certificate.
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// This server's certificate.
    #[arg(long, value_name = "FILE")]
    cert: Option<PathBuf>,
    /// The private key of the certificate.
    #[arg(long, value_name = "FILE")]
    key: Option<PathBuf>,
    /// Threads that serve requests; half of the machine's cores if left out.
    #[arg(long, value_name = "NUMBER")]
    threads: Option<usize>,
    /// Stop when standard input ends, as it does when whoever started this process has ended.
    #[arg(long)]
    stop_with_parent: bool,
    /// How to write the log: pretty or json.
    #[arg(long, value_name = "FORMAT")]
    log_format: Option<LogFormat>,
    /// What to log: error, warn, info, debug, trace.
    #[arg(long, value_name = "LEVEL")]
    log_level: Option<String>,
}

impl ServerFlags {
    fn file<F: ServerFile>(&self) -> Result<(F, Source), ConfigError> {
        let (mut file, source) = match &self.config {
            Some(path) => load_server::<F>(path)?,
            None => Default::default(),
        };
        let common = file.common();
        *common.id = self.id.or(*common.id);
        let texts = [(&self.listen, common.listen), (&self.advertise, common.advertise)];
        for (flag, own) in texts {
            *own = flag.clone().or(own.take());
        }
        *common.data = self.data.clone().or(common.data.take());
        common.tls.override_with(self.ca.clone(), self.cert.clone(), self.key.clone());
        common.log.override_with(self.log_format, self.log_level.clone());
        Ok((file, source))
    }

    fn configure<F: ServerFile, C>(
        &self,
        role: Role,
        resolve: impl FnOnce(F, &Source) -> Result<C, ConfigError>,
    ) -> Result<(C, Credentials, Traces), ConfigError> {
        let (mut file, source) = self.file::<F>()?;
        let common = file.common();
        let traces = common.log.start(common.trace, role, *common.id, &source)?;
        let tls = common.tls.clone();
        let config = resolve(file, &source)?;
        Ok((config, tls.load(role, &source)?, traces))
    }
}

/// How long a server that has handed over goes on answering.
const FAREWELL: Duration = Duration::from_millis(200);

/// How long a server may take to stop.
const SHUTDOWN_PATIENCE: Duration = Duration::from_secs(20);

/// How long what is left of it may take then.
const RUNTIME_PATIENCE: Duration = Duration::from_secs(2);

/// A server that runs. Its futures are boxed, so that they are compiled with the server and not in every program
/// that runs one.
pub trait Running {
    /// Returns why it cannot go on, once it cannot.
    fn failed(&self) -> BoxFuture<'_, String>;
    /// Hands over to others what it leads, if somebody can have it, and tells whether it did.
    fn hand_over(&self) -> BoxFuture<'_, bool>;
    /// Stops it. What was acknowledged stays.
    fn shutdown(self) -> BoxFuture<'static, ()>;
}

/// The `main` of a server: reads its configuration, starts it, and stops it when asked to or when it
/// cannot go on. Whatever goes wrong is one line on standard error.
pub fn main<F: ServerFile, C, S: Running, E: Display>(
    role: Role,
    flags: &ServerFlags,
    resolve: impl FnOnce(F, &Source) -> Result<C, ConfigError>,
    start: impl AsyncFnOnce(C, Credentials) -> Result<S, E>,
) -> ExitCode {
    let complain = |error: &dyn Display| eprintln!("troth-{role}: {error}");
    let (config, credentials, traces) = match flags.configure(role, resolve) {
        Ok(configured) => configured,
        Err(error) => {
            complain(&error);
            return EXIT_USAGE.into();
        }
    };
    process::abort_on_panic();
    process::take_descriptors();
    process::work_in_batches();
    let run = async {
        let asked = process::asked_to_stop(flags.stop_with_parent);
        tokio::pin!(asked);
        let stopped = |asked: io::Result<()>| asked.map_err(|error| error.to_string());
        // It may have to wait for others before it has started.
        let server = tokio::select! {
            started = start(config, credentials) => started.map_err(|error| error.to_string())?,
            asked = &mut asked => return stopped(asked),
        };
        let reason = tokio::select! {
            asked = asked => stopped(asked),
            reason = server.failed() => Err(reason),
        };
        if reason.is_ok() && server.hand_over().await {
            // Whoever asks meanwhile is told where to go, and whoever waits gets an answer.
            sleep(FAREWELL).await;
        }
        if timeout(SHUTDOWN_PATIENCE, server.shutdown()).await.is_err() {
            // What was acknowledged is on the disk; whoever waits for this process must not wait for ever.
            tracing::error!("something does not stop; the process ends all the same");
        }
        reason
    };
    let result = process::runtime(flags.threads).map_err(|error| error.to_string());
    let result = result.and_then(|runtime| {
        let result = runtime.block_on(run);
        runtime.shutdown_timeout(RUNTIME_PATIENCE);
        result
    });
    traces.flush();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&error);
            EXIT_FAILED.into()
        }
    }
}

/// A server cannot start. Every message is one line and says what to do.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The server may not take part.
    #[error("{0}")]
    Refused(String),
    /// The address cannot be listened on.
    #[error("{0}")]
    Endpoint(#[from] EndpointError),
    /// The HTTP port cannot be listened on.
    #[error("{0}")]
    Http(#[from] HttpError),
    /// The data folder cannot be used.
    #[error("{0}")]
    Open(#[from] OpenError),
    /// What is stored is damaged.
    #[error("{0}")]
    Start(#[from] StartError),
    /// The address cannot be written into the data folder.
    #[error("cannot write into the data folder: {0}")]
    Publish(#[from] io::Error),
}

/// What every server stands on: its data folder and its socket.
pub struct Base {
    /// The data folder.
    pub store: Store,
    /// The socket.
    pub quic: Arc<Quic>,
    /// Where others find this server.
    pub address: String,
    http_config: Option<HttpConfig>,
    data: PathBuf,
    about: About,
    http: Option<Http>,
}

/// The vitals of a server that nobody can connect to when its certificate has ended.
struct Certified {
    vitals: Arc<dyn Vitals>,
    quic: Weak<Quic>,
}

impl Vitals for Certified {
    fn health(&self) -> Result<(), String> {
        self.vitals.health()
    }

    fn readiness(&self) -> (bool, serde_json::Value) {
        let (ready, mut details) = self.vitals.readiness();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs() as i64;
        let expires_at = self.quic.upgrade().map_or(now, |quic| quic.expires_at());
        let valid = now < expires_at;
        if let Some(details) = details.as_object_mut() {
            details.insert("certificate_days".into(), ((expires_at - now).div_euclid(24 * 3600)).into());
            if !valid {
                details.insert("ready".into(), false.into());
                details.insert(
                    "certificate".into(),
                    "has expired: nobody can connect; renew it with `troth cert`".into(),
                );
            }
        }
        (ready && valid, details)
    }
}

/// What a server is, for its metrics.
struct About {
    role: Role,
    id: u64,
}

/// Whose data that of a server is, as [`Store::open`] asks.
pub fn owner(role: Role, id: u64, cluster: ClusterId) -> String {
    format!("{role} {id} of cluster {cluster}")
}

impl Base {
    /// Opens the data folder and the socket. Nothing is answered yet.
    ///
    /// # Errors
    /// See [`ServerError`].
    pub fn open(
        basics: &Basics,
        credentials: &Credentials,
        families: &[Family],
    ) -> Result<Base, ServerError> {
        let identity = credentials.identity();
        let owner = owner(identity.role, basics.id, identity.cluster);
        let store = Store::open(&basics.data, &owner, families, basics.memory)?;
        let quic = Quic::bind(basics.quic.clone(), credentials)?;
        if let Some(files) = credentials.files() {
            quic.follow_files(files.clone());
        }
        process::publish(&basics.data, "address", quic.local_addr())?;
        let address = basics.advertise.clone().unwrap_or_else(|| quic.local_addr().to_string());
        tracing::info!(id = basics.id, cluster = %identity.cluster, address, "{}", identity.role);
        let about = About { role: identity.role, id: basics.id };
        let (http_config, data) = (basics.http.clone(), basics.data.clone());
        Ok(Base { store, quic, address, http_config, data, about, http: None })
    }

    /// A registry with what all servers show.
    pub fn registry(&self, writer: &LogWriter) -> Registry {
        let mut registry = Registry::with_prefix(PREFIX);
        let About { role, id } = self.about;
        let quic = Arc::downgrade(&self.quic);
        let labels = vec![
            ("role", role.name().to_owned()),
            ("id", id.to_string()),
            ("version", env!("CARGO_PKG_VERSION").to_owned()),
        ];
        registry.register("server", "What this server is", Info::new(labels));
        let began = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        Sampler::register(&mut registry, move |samples| {
            let help = "When this server was started: seconds since the Unix epoch";
            samples.gauge("start_time_seconds", help, began)?;
            let help = "When its certificate ends: seconds since the Unix epoch";
            if let Some(quic) = quic.upgrade() {
                samples.gauge("certificate_expiry_seconds", help, quic.expires_at() as f64)?;
            }
            let help = "Lines of the log that were counted and not written, since they repeat others";
            samples.counter("log_lines_unwritten", help, process::unwritten())?;
            let (open, most) = process::descriptors();
            samples.gauge("open_descriptors", "Files and sockets that are open", open as f64)?;
            samples.gauge("descriptors_max", "How many may be", most as f64)
        });
        let data = self.data.clone();
        Sampler::register(&mut registry, move |samples| {
            // A folder that cannot be asked shows elsewhere.
            let Ok(disk) = rustix::fs::statvfs(&data) else { return Ok(()) };
            let help = "Bytes that are free on the disk of the data folder";
            samples.gauge("disk_free_bytes", help, (disk.f_bavail * disk.f_frsize) as f64)?;
            samples.gauge("disk_bytes", "Bytes of that disk", (disk.f_blocks * disk.f_frsize) as f64)
        });
        self.store.register(&mut registry);
        writer.register(&mut registry);
        registry
    }

    /// Shows metrics and health, if that is configured, and other pages; see [`Http::serve`].
    ///
    /// # Errors
    /// If the address cannot be listened on.
    pub async fn show(
        &mut self,
        registry: Registry,
        vitals: Arc<dyn Vitals>,
        more: impl FnOnce(&HttpConfig, &CancellationToken) -> axum::Router,
    ) -> Result<(), ServerError> {
        if let Some(config) = &self.http_config {
            let vitals = Arc::new(Certified { vitals, quic: Arc::downgrade(&self.quic) });
            let http =
                Http::serve(config.listen, Shown::new(registry), vitals, |stop| more(config, stop)).await?;
            process::publish(&self.data, "http-address", http.address())?;
            self.http = Some(http);
        }
        Ok(())
    }

    /// Where metrics and health are shown, if anywhere.
    pub fn http_addr(&self) -> Option<SocketAddr> {
        self.http.as_ref().map(Http::address)
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.quic.local_addr()
    }

    /// Returns when the data folder can be opened again. Everybody else must have let go of it.
    pub async fn close(self) {
        if let Some(http) = self.http {
            http.close().await;
        }
        drop(self.quic);
        self.store.closed().await;
    }
}

//! How an application finds its cluster.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use troth_protocol::net::quic::Sockets;
use troth_protocol::net::tls::{CredentialFiles, Credentials, Issued};
use troth_protocol::process::{self, Source, TlsSection};

use crate::error::Error;

/// How an application finds its cluster, and how patient it is.
#[derive(Clone, Debug)]
pub struct ClientConfig {
    /// Some of the coordinators, `host:port` each; one that answers is enough.
    pub coordinators: Vec<String>,
    /// Who the application is.
    pub credentials: Credentials,
    /// The local address to talk from; port 0: the system chooses one.
    pub bind: SocketAddr,
    /// Where sockets come from, if not from the operating system.
    pub sockets: Option<Arc<dyn Sockets>>,
    /// How long a transaction may take, with all its retries.
    pub timeout: Duration,
}

/// The file `client.toml`, as `troth init` writes it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    coordinators: Vec<String>,
    tls: TlsSection,
    timeout_ms: Option<u64>,
}

impl ClientConfig {
    /// A configuration with defaults for everything that has one: a timeout of 30 s.
    pub fn new(
        coordinators: impl IntoIterator<Item = impl Into<String>>,
        credentials: Credentials,
    ) -> ClientConfig {
        let coordinators: Vec<String> = coordinators.into_iter().map(Into::into).collect();
        let any =
            if coordinators.iter().all(|address| is_loopback(address)) { [127, 0, 0, 1] } else { [0; 4] };
        ClientConfig {
            coordinators,
            credentials,
            bind: SocketAddr::from((any, 0)),
            sockets: None,
            timeout: Duration::from_secs(30),
        }
    }

    /// Reads a file like this one; relative paths are relative to it:
    ///
    /// ```toml
    /// coordinators = ["127.0.0.1:7450"]
    /// timeout_ms = 30000
    /// [tls]
    /// ca = "ca.pem"
    /// cert = "client.pem"
    /// key = "client-key.pem"
    /// ```
    ///
    /// # Errors
    /// [`Error::Config`] names the file and line.
    pub fn load(path: impl AsRef<Path>) -> Result<ClientConfig, Error> {
        let path = path.as_ref();
        let config = |error: &dyn std::fmt::Display| Error::Config(error.to_string());
        let (file, source): (File, Source) = process::load(path).map_err(|error| config(&error))?;
        if file.coordinators.is_empty() {
            let reason = "must name at least one coordinator: host:port";
            return Err(config(&source.error("coordinators", reason)));
        }
        let relative = |path: &PathBuf| source.path(path);
        let files = CredentialFiles {
            ca: relative(&file.tls.ca),
            cert: relative(&file.tls.cert),
            key: relative(&file.tls.key),
            crl: file.tls.crl.as_ref().map(relative),
        };
        let credentials = files.load().map_err(|error| config(&error))?;
        let mut loaded = ClientConfig::new(file.coordinators, credentials);
        if let Some(millis) = file.timeout_ms {
            loaded.timeout = Duration::from_millis(millis);
        }
        Ok(loaded)
    }
}

/// Who an application is, from PEM text: the authority's certificate, its own, and its private key.
///
/// # Errors
/// [`Error::Config`] if the text is not what it should be.
pub fn credentials_from_pem(ca: &str, certificate: &str, key: &str) -> Result<Credentials, Error> {
    let issued = Issued { certificate: certificate.to_owned(), key: key.to_owned() };
    Credentials::from_pem(ca, &issued).map_err(|error| Error::Config(error.to_string()))
}

fn is_loopback(address: &str) -> bool {
    address.parse::<SocketAddr>().is_ok_and(|address| address.ip().is_loopback())
        || address.starts_with("localhost:")
}

//! The files of a cluster: its authority, certificates, and configurations.
//!
//! ```text
//! <folder>/ca.pem  ca-key.pem                 the authority; keep its key safe
//!         coordinator-1.toml  coordinator-1.pem  coordinator-1-key.pem  …
//!         participant-1.toml  participant-1.pem  participant-1-key.pem  …
//!         client.toml  client.pem  client-key.pem
//!         admin.toml  admin.pem  admin-key.pem
//!         console-token                       if there is a console
//!         data/coordinator-1  data/participant-1  …
//! ```

use std::fs;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rand::distr::{Alphanumeric, SampleString};
use troth_protocol::net::Role;
use troth_protocol::net::tls::{Authority, CERTIFICATE_VALIDITY, CredentialFiles, Issued, TlsError};
use troth_protocol::{ClusterId, FoundingId, FoundingIdError};

/// The files cannot be made or read.
#[derive(Debug, thiserror::Error)]
pub enum LayoutError {
    /// A file cannot be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Something is there already.
    #[error("{path} exists already; choose another folder, or remove it if you mean to start anew")]
    Exists {
        /// What is there.
        path: PathBuf,
    },
    /// A server has no port for HTTP.
    #[error(
        "{listen} leaves no room for HTTP, at a port that is {HTTP_PORT_DISTANCE} higher: choose a port from 1 to {}, or \
         --http off",
        u16::MAX - HTTP_PORT_DISTANCE
    )]
    HttpPort {
        /// Where the server shall listen.
        listen: String,
    },
    /// The authority is not usable.
    #[error("{0}")]
    Tls(#[from] TlsError),
}

/// What a cluster shall be like.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Addresses of the coordinators, `host:port` each: 1, 3 or 5.
    pub coordinators: Vec<String>,
    /// Addresses of the participants, `host:port` each.
    pub participants: Vec<String>,
    /// The number of shards.
    pub shards: u16,
    /// How many replicas a shard has.
    pub replicas: u16,
    /// How its servers live on their machines.
    pub hosting: Hosting,
}

/// How servers live on their machines.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Hosting {
    /// The folder of their data folders; if relative, then to their configurations.
    pub data: String,
    /// Where they show metrics and health.
    pub http: HttpPlan,
    /// Whether coordinators show the console there; its token is made with the cluster.
    pub console: bool,
}

impl Default for Hosting {
    /// Data beside the configurations, and nothing shown.
    fn default() -> Hosting {
        Hosting { data: "data".into(), http: HttpPlan::Off, console: false }
    }
}

impl Hosting {
    /// The data folder of a server, as TOML.
    fn data_of(&self, name: &str) -> toml::Value {
        format!("{}/{name}", self.data.trim_end_matches('/')).into()
    }

    /// The section about HTTP of a server that listens there.
    fn section(&self, listen: &str, role: Role) -> String {
        let (host, port) = listen.rsplit_once(':').unwrap_or((listen, ""));
        let beside = || port.parse::<u16>().ok().and_then(|own| own.checked_add(HTTP_PORT_DISTANCE));
        let place = match self.http {
            HttpPlan::Off => None,
            HttpPlan::Loopback => beside().map(|port| ("127.0.0.1", port)),
            HttpPlan::Network => beside().map(|port| (host, port)),
        };
        let Some((host, port)) = place else { return String::new() };
        let console = match role {
            Role::Coordinator if self.console => format!("console_token = \"{CONSOLE_TOKEN}\"\n"),
            _ => String::new(),
        };
        format!("[http]\nlisten = \"{host}:{port}\"\n{console}\n")
    }
}

/// How far the HTTP port of a server is from the one where it listens.
pub const HTTP_PORT_DISTANCE: u16 = 2000;

/// The file with the word by which embedded coordinators found their cluster.
const FOUNDING: &str = "founding";

/// How a certificate ends.
const PEM_END: &str = "-----END CERTIFICATE-----";

/// The list of certificates that do not count any more.
const REVOKED: &str = "crl.pem";

/// The file with the token of the console.
const CONSOLE_TOKEN: &str = "console-token";

/// How long it is: 190 bits of chance.
const CONSOLE_TOKEN_CHARS: usize = 32;

/// Where servers show metrics and health over HTTP.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
pub enum HttpPlan {
    /// Nowhere.
    Off,
    /// On loopback, at the port where the server listens and 2000 more.
    #[default]
    Loopback,
    /// At the address where the server listens, and 2000 more: for networks that are trusted.
    Network,
}

/// A participant that shall be.
#[derive(Clone, Debug)]
pub struct Newcomer {
    /// Its number: unique among participants, and never used before.
    pub id: u64,
    /// Where it will listen: `host:port`.
    pub listen: String,
    /// Some of the coordinators, `host:port` each.
    pub coordinators: Vec<String>,
    /// What fails together with it; may be empty.
    pub zone: String,
    /// Its share of the shards, relative to others.
    pub weight: u32,
    /// How it lives on its machine.
    pub hosting: Hosting,
}

/// A coordinator that shall be let in.
#[derive(Clone, Debug)]
pub struct NewCoordinator {
    /// Its number: unique among coordinators.
    pub id: u64,
    /// Where it will listen: `host:port`.
    pub listen: String,
    /// Where some of the others listen: it asks them whether it is let in.
    pub others: Vec<String>,
    /// How it lives on its machine.
    pub hosting: Hosting,
}

/// A folder with the files of a cluster.
#[derive(Clone, Debug)]
pub struct Layout {
    folder: PathBuf,
}

impl Layout {
    /// The files in a folder.
    pub fn at(folder: impl Into<PathBuf>) -> Layout {
        Layout { folder: folder.into() }
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Whether there is a cluster here.
    pub fn exists(&self) -> bool {
        self.folder.join("ca.pem").exists()
    }

    /// Makes a new authority, and nothing else.
    ///
    /// # Errors
    /// If there is one already, or the folder cannot be written.
    pub fn create_authority(&self) -> Result<Authority, LayoutError> {
        let path = self.folder.join("ca.pem");
        if path.exists() {
            return Err(LayoutError::Exists { path });
        }
        fs::create_dir_all(&self.folder)
            .map_err(|source| LayoutError::Io { path: self.folder.clone(), source })?;
        let authority = Authority::create(ClusterId(rand::random()))?;
        self.write("ca-key.pem", &authority.key(), true)?;
        self.write("ca.pem", authority.certificate(), false)?;
        self.write(REVOKED, &authority.revoke(None, &[])?, false)?;
        Ok(authority)
    }

    /// Reads the authority back.
    ///
    /// # Errors
    /// If it is not there, or its key is kept elsewhere.
    pub fn authority(&self) -> Result<Authority, LayoutError> {
        Ok(Authority::from_pem(&self.read("ca.pem")?, &self.read("ca-key.pem")?)?)
    }

    /// Makes another authority for the same cluster, which issues certificates from now on. Those of the one before count
    /// still, until [`Layout::retire_authorities`].
    ///
    /// # Errors
    /// If there is none yet, or the folder cannot be written.
    pub fn renew_authority(&self) -> Result<Authority, LayoutError> {
        let before = self.authority()?;
        let authority = Authority::create(before.cluster())?;
        // The one that issues stands first.
        let both = format!("{}{}", authority.certificate(), self.read("ca.pem")?);
        self.write("ca-key.pem", &authority.key(), true)?;
        self.write("ca.pem", &both, false)?;
        Ok(authority)
    }

    /// Makes only the certificates count that the newest authority has issued.
    ///
    /// # Errors
    /// If there is none, or the folder cannot be written.
    pub fn retire_authorities(&self) -> Result<(), LayoutError> {
        let text = self.read("ca.pem")?;
        let end = text.find(PEM_END).map_or(text.len(), |at| at + PEM_END.len());
        self.write("ca.pem", &format!("{}\n", &text[..end]), false)
    }

    /// Puts the certificate `<name>.pem` on the list of those that do not count any more, `crl.pem`.
    ///
    /// # Errors
    /// If there is no such certificate, or the folder cannot be written.
    pub fn revoke(&self, authority: &Authority, name: &str) -> Result<PathBuf, LayoutError> {
        let before = match self.read(REVOKED) {
            Ok(list) => Some(list),
            Err(LayoutError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        let certificate = self.read(&format!("{name}.pem"))?;
        self.write(REVOKED, &authority.revoke(before.as_deref(), &[&certificate])?, false)?;
        Ok(self.folder.join(REVOKED))
    }

    /// Issues another certificate under a name that has one, in its place.
    ///
    /// # Errors
    /// If there is none yet, the name cannot be one, or the folder cannot be written.
    pub fn renew(
        &self,
        authority: &Authority,
        role: Role,
        name: &str,
        validity: Duration,
    ) -> Result<Issued, LayoutError> {
        self.read(&format!("{name}.pem"))?;
        let issued = authority.issue(role, name, validity)?;
        self.write(&format!("{name}-key.pem"), &issued.key, true)?;
        self.write(&format!("{name}.pem"), &issued.certificate, false)?;
        Ok(issued)
    }

    /// Issues a certificate as `<name>.pem` and `<name>-key.pem`. `subject` is the name in it.
    ///
    /// # Errors
    /// If it exists already, or the name cannot be one.
    pub fn issue(
        &self,
        authority: &Authority,
        role: Role,
        name: &str,
        validity: Duration,
    ) -> Result<Issued, LayoutError> {
        let path = self.folder.join(format!("{name}.pem"));
        if path.exists() {
            return Err(LayoutError::Exists { path });
        }
        let issued = authority.issue(role, name, validity)?;
        self.write(&format!("{name}-key.pem"), &issued.key, true)?;
        self.write(&format!("{name}.pem"), &issued.certificate, false)?;
        Ok(issued)
    }

    /// Whether a server that listens there has a port for HTTP.
    ///
    /// # Errors
    /// What to do if not.
    fn check_hosting(hosting: &Hosting, listen: &str) -> Result<(), LayoutError> {
        let port = listen.rsplit(':').next().and_then(|port| port.parse::<u16>().ok());
        let fits = port.is_some_and(|port| port.checked_add(HTTP_PORT_DISTANCE).is_some());
        if hosting.http == HttpPlan::Off || fits {
            return Ok(());
        }
        Err(LayoutError::HttpPort { listen: listen.to_owned() })
    }

    /// Makes everything that a new cluster needs to start.
    ///
    /// # Errors
    /// If there is one already, or the folder cannot be written.
    pub fn create(&self, plan: &Plan) -> Result<ClusterId, LayoutError> {
        for listen in plan.coordinators.iter().chain(&plan.participants) {
            Layout::check_hosting(&plan.hosting, listen)?;
        }
        let authority = self.create_authority()?;
        let issue =
            |role: Role, name: &str| self.issue(&authority, role, name, CERTIFICATE_VALIDITY).map(drop);
        let founding = FoundingId(rand::random());
        for (at, address) in plan.coordinators.iter().enumerate() {
            let name = format!("coordinator-{}", at + 1);
            issue(Role::Coordinator, &name)?;
            self.write(
                &format!("{name}.toml"),
                &coordinator_file(plan, founding, at as u64 + 1, address, &name),
                false,
            )?;
        }
        for (listen, id) in plan.participants.iter().zip(1..) {
            let coordinators = plan.coordinators.clone();
            let newcomer = Newcomer {
                id,
                listen: listen.clone(),
                coordinators,
                zone: String::new(),
                weight: 1,
                hosting: plan.hosting.clone(),
            };
            self.write_participant(&authority, &newcomer)?;
        }
        for role in [Role::Client, Role::Admin] {
            issue(role, role.name())?;
            self.write(&format!("{role}.toml"), &client_file(&plan.coordinators, role), false)?;
        }
        if plan.hosting.console {
            self.console_token()?;
        }
        Ok(authority.cluster())
    }

    /// The token of the console; made if there is none.
    ///
    /// # Errors
    /// If the folder cannot be read or written.
    pub fn console_token(&self) -> Result<String, LayoutError> {
        match self.read(CONSOLE_TOKEN) {
            Ok(token) => return Ok(token.trim().to_owned()),
            Err(LayoutError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let token = Alphanumeric.sample_string(&mut rand::rng(), CONSOLE_TOKEN_CHARS);
        self.write(CONSOLE_TOKEN, &format!("{token}\n"), true)?;
        Ok(token)
    }

    /// The word by which coordinators of this folder found their cluster; drawn if there is none.
    ///
    /// # Errors
    /// If the folder cannot be read or written, or holds something else.
    pub fn founding(&self) -> Result<FoundingId, LayoutError> {
        let path = self.folder.join(FOUNDING);
        match fs::read_to_string(&path) {
            Ok(word) => {
                let word = word.trim().parse();
                word.map_err(|error: FoundingIdError| LayoutError::Io {
                    path,
                    source: io::Error::other(error),
                })
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let founding = FoundingId(rand::random());
                self.write(FOUNDING, &format!("{founding}\n"), false)?;
                Ok(founding)
            }
            Err(source) => Err(LayoutError::Io { path, source }),
        }
    }

    /// Where a coordinator of this machine shows the console, with the token; `None`: it has said nowhere.
    ///
    /// # Errors
    /// If the folder cannot be read.
    pub fn console(&self, coordinator: u64) -> Result<Option<String>, LayoutError> {
        let path = self.folder.join(format!("data/coordinator-{coordinator}/http-address"));
        if !self.folder.join(CONSOLE_TOKEN).exists() {
            return Ok(None);
        }
        match fs::read_to_string(&path) {
            Ok(address) => Ok(Some(console_url(address.trim(), &self.console_token()?))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(LayoutError::Io { path, source }),
        }
    }

    /// Makes what one more participant needs to start: `participant-<id>.toml`, and its certificate.
    ///
    /// # Errors
    /// If it is there already, the folder holds no cluster, or cannot be written.
    pub fn add_participant(&self, newcomer: &Newcomer) -> Result<PathBuf, LayoutError> {
        Layout::check_hosting(&newcomer.hosting, &newcomer.listen)?;
        self.write_participant(&self.authority()?, newcomer)
    }

    /// Makes what one more coordinator needs to start: `coordinator-<id>.toml`, and its certificate.
    ///
    /// # Errors
    /// If it is there already, the folder holds no cluster, or cannot be written.
    pub fn add_coordinator(&self, newcomer: &NewCoordinator) -> Result<PathBuf, LayoutError> {
        let NewCoordinator { id, listen, others, hosting } = newcomer;
        Layout::check_hosting(hosting, listen)?;
        let name = format!("coordinator-{id}");
        let path = self.folder.join(format!("{name}.toml"));
        if path.exists() {
            return Err(LayoutError::Exists { path });
        }
        self.issue(&self.authority()?, Role::Coordinator, &name, CERTIFICATE_VALIDITY)?;
        if hosting.console {
            self.console_token()?;
        }
        let text = format!(
            "id = {id}\nlisten = \"{listen}\"\ndata = {}\ncoordinators = {others:?}\n\n{}",
            hosting.data_of(&name),
            hosting.section(listen, Role::Coordinator) + &tls(&name)
        );
        self.write(&format!("{name}.toml"), &text, false)?;
        Ok(path)
    }

    fn write_participant(&self, authority: &Authority, newcomer: &Newcomer) -> Result<PathBuf, LayoutError> {
        let name = format!("participant-{}", newcomer.id);
        let path = self.folder.join(format!("{name}.toml"));
        if path.exists() {
            return Err(LayoutError::Exists { path });
        }
        self.issue(authority, Role::Participant, &name, CERTIFICATE_VALIDITY)?;
        self.write(&format!("{name}.toml"), &participant_file(newcomer, &name), false)?;
        Ok(path)
    }

    /// The certificate files of somebody.
    pub fn credentials(&self, name: &str) -> CredentialFiles {
        CredentialFiles::in_folder(&self.folder, name)
    }

    /// Writes `client.toml` and `admin.toml` anew, for coordinators at these addresses.
    ///
    /// # Errors
    /// If the folder cannot be written.
    pub fn write_clients(&self, coordinators: &[String]) -> Result<(), LayoutError> {
        for role in [Role::Client, Role::Admin] {
            self.write(&format!("{role}.toml"), &client_file(coordinators, role), false)?;
        }
        Ok(())
    }

    fn read(&self, name: &str) -> Result<String, LayoutError> {
        let path = self.folder.join(name);
        fs::read_to_string(&path).map_err(|source| LayoutError::Io { path, source })
    }

    /// Writes a file, whole or not at all; a secret one so that only its owner can read it.
    fn write(&self, name: &str, text: &str, secret: bool) -> Result<(), LayoutError> {
        let path = self.folder.join(name);
        let part = self.folder.join(format!("{name}.part"));
        let mode = if secret { 0o600 } else { 0o644 };
        let write = || {
            let mut options = fs::OpenOptions::new();
            let mut file = options.write(true).create(true).truncate(true).mode(mode).open(&part)?;
            io::Write::write_all(&mut file, text.as_bytes())?;
            file.sync_all()?;
            fs::rename(&part, &path)
        };
        write().map_err(|source| LayoutError::Io { path: path.clone(), source })
    }
}

fn tls(name: &str) -> String {
    format!("[tls]\nca = \"ca.pem\"\ncert = \"{name}.pem\"\nkey = \"{name}-key.pem\"\ncrl = \"crl.pem\"\n")
}

fn coordinator_file(plan: &Plan, founding: FoundingId, id: u64, address: &str, name: &str) -> String {
    let peer = |(at, address): (usize, &String)| {
        format!("[[coordinator]]\nid = {}\naddress = \"{address}\"\n\n", at + 1)
    };
    let peers: String = match plan.coordinators.len() {
        0 | 1 => String::new(),
        _ => plan.coordinators.iter().enumerate().map(peer).collect(),
    };
    format!(
        "id = {id}\nlisten = \"{address}\"\ndata = {}\n\n{peers}[cluster]\nshards = {}\nreplicas = {}\nnodes = {}\nfounding = \"{founding}\"\n\n{}",
        plan.hosting.data_of(name),
        plan.shards,
        plan.replicas,
        plan.participants.len(),
        plan.hosting.section(address, Role::Coordinator) + &tls(name)
    )
}

fn participant_file(newcomer: &Newcomer, name: &str) -> String {
    let Newcomer { id, listen, coordinators, zone, weight, hosting } = newcomer;
    let mut place = String::new();
    if !zone.is_empty() {
        place += &format!("zone = {zone:?}\n");
    }
    if *weight != 1 {
        place += &format!("weight = {weight}\n");
    }
    format!(
        "id = {id}\nlisten = \"{listen}\"\ndata = {}\ncoordinators = {coordinators:?}\n{place}\n{}",
        hosting.data_of(name),
        hosting.section(listen, Role::Participant) + &tls(name)
    )
}

fn client_file(coordinators: &[String], role: Role) -> String {
    format!("coordinators = {coordinators:?}\n\n{}", tls(role.name()))
}

/// Where a page is, for a browser: the token is in the fragment, which is not sent.
pub(crate) fn console_url(address: &str, token: &str) -> String {
    format!("http://{address}/console#token={token}")
}

//! The files of a cluster: its authority, certificates, and configurations.
//!
//! ```text
//! <folder>/ca.pem  ca-key.pem                 the authority; keep its key safe
//!         coordinator-1.toml  coordinator-1.pem  coordinator-1-key.pem  …
//!         participant-1.toml  participant-1.pem  participant-1-key.pem  …
//!         client.toml  client.pem  client-key.pem
//!         admin.toml  admin.pem  admin-key.pem
//!         data/coordinator-1  data/participant-1  …
//! ```

use std::fs;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use troth_protocol::ClusterId;
use troth_protocol::net::Role;
use troth_protocol::net::tls::{Authority, CERTIFICATE_VALIDITY, CredentialFiles, Issued, TlsError};

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
    /// Where servers show metrics and health.
    pub http: HttpPlan,
}

/// Where servers show metrics and health over HTTP.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HttpPlan {
    /// Nowhere.
    Off,
    /// On loopback, at the port where the server listens and 2000 more.
    Beside,
    /// On loopback, at any port; the file `http-address` in the data folder tells.
    Anywhere,
}

impl HttpPlan {
    /// The section of a server that listens there.
    fn section(self, listen: &str) -> String {
        let port = match self {
            HttpPlan::Off => None,
            HttpPlan::Beside => {
                let own = listen.rsplit(':').next().and_then(|port| port.parse::<u16>().ok());
                own.and_then(|own| own.checked_add(2000))
            }
            HttpPlan::Anywhere => Some(0),
        };
        port.map(|port| format!("[http]\nlisten = \"127.0.0.1:{port}\"\n\n")).unwrap_or_default()
    }
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
    /// Where it shows metrics and health.
    pub http: HttpPlan,
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
        Ok(authority)
    }

    /// Reads the authority back.
    ///
    /// # Errors
    /// If it is not there, or its key is kept elsewhere.
    pub fn authority(&self) -> Result<Authority, LayoutError> {
        Ok(Authority::from_pem(&self.read("ca.pem")?, &self.read("ca-key.pem")?)?)
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

    /// Makes everything that a new cluster needs to start.
    ///
    /// # Errors
    /// If there is one already, or the folder cannot be written.
    pub fn create(&self, plan: &Plan) -> Result<ClusterId, LayoutError> {
        let authority = self.create_authority()?;
        let issue =
            |role: Role, name: &str| self.issue(&authority, role, name, CERTIFICATE_VALIDITY).map(drop);
        for (at, address) in plan.coordinators.iter().enumerate() {
            let name = format!("coordinator-{}", at + 1);
            issue(Role::Coordinator, &name)?;
            self.write(
                &format!("{name}.toml"),
                &coordinator_file(plan, at as u64 + 1, address, &name),
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
                http: plan.http,
            };
            self.write_participant(&authority, &newcomer)?;
        }
        for role in [Role::Client, Role::Admin] {
            issue(role, role.name())?;
            self.write(&format!("{role}.toml"), &client_file(plan, role), false)?;
        }
        Ok(authority.cluster())
    }

    /// Makes what one more participant needs to start: `participant-<id>.toml`, and its certificate.
    ///
    /// # Errors
    /// If it is there already, the folder holds no cluster, or cannot be written.
    pub fn add_participant(&self, newcomer: &Newcomer) -> Result<PathBuf, LayoutError> {
        self.write_participant(&self.authority()?, newcomer)
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
        let plan = Plan {
            coordinators: coordinators.to_vec(),
            participants: Vec::new(),
            shards: 0,
            replicas: 0,
            http: HttpPlan::Off,
        };
        for role in [Role::Client, Role::Admin] {
            self.write(&format!("{role}.toml"), &client_file(&plan, role), false)?;
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
    format!("[tls]\nca = \"ca.pem\"\ncert = \"{name}.pem\"\nkey = \"{name}-key.pem\"\n")
}

fn coordinator_file(plan: &Plan, id: u64, address: &str, name: &str) -> String {
    let peer = |(at, address): (usize, &String)| {
        format!("[[coordinator]]\nid = {}\naddress = \"{address}\"\n\n", at + 1)
    };
    let peers: String = match plan.coordinators.len() {
        0 | 1 => String::new(),
        _ => plan.coordinators.iter().enumerate().map(peer).collect(),
    };
    format!(
        "id = {id}\nlisten = \"{address}\"\ndata = \"data/{name}\"\n\n{peers}[cluster]\nshards = {}\nreplicas = {}\nnodes = {}\n\n{}",
        plan.shards,
        plan.replicas,
        plan.participants.len(),
        plan.http.section(address) + &tls(name)
    )
}

fn participant_file(newcomer: &Newcomer, name: &str) -> String {
    let Newcomer { id, listen, coordinators, zone, weight, http } = newcomer;
    let mut place = String::new();
    if !zone.is_empty() {
        place += &format!("zone = {zone:?}\n");
    }
    if *weight != 1 {
        place += &format!("weight = {weight}\n");
    }
    format!(
        "id = {id}\nlisten = \"{listen}\"\ndata = \"data/{name}\"\ncoordinators = {coordinators:?}\n{place}\n{}",
        http.section(listen) + &tls(name)
    )
}

fn client_file(plan: &Plan, role: Role) -> String {
    format!("coordinators = {:?}\n\n{}", plan.coordinators, tls(role.name()))
}

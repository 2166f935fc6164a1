//! Finding the cluster that a command is about.

use std::fs;
use std::path::{Path, PathBuf};

use troth_sdk::{Client, ClientConfig};

use crate::Context;
use crate::output::{EXIT_USAGE, Failure};

/// The folder that `troth dev` uses if not told otherwise.
pub const DEV_FOLDER: &str = "troth-dev";

/// Remembers the folder of the last `troth dev` of this user.
pub fn remember_dev(folder: &Path) {
    if let (Some(note), Ok(folder)) = (note(), folder.canonicalize()) {
        // A convenience: without it, --cluster is needed.
        let _ = note.parent().map(fs::create_dir_all);
        let _ = fs::write(note, folder.to_string_lossy().as_bytes());
    }
}

fn note() -> Option<PathBuf> {
    let state = std::env::var_os("XDG_STATE_HOME").map(PathBuf::from);
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".local/state"));
    state.or_else(home).map(|state| state.join("troth/dev"))
}

impl Context {
    /// The configuration of an operator of the cluster that is meant.
    pub fn admin_config(&self) -> Result<ClientConfig, Failure> {
        let path = self.client_file()?;
        let admin = path.with_file_name("admin.toml");
        let is_client = path.file_name().is_some_and(|name| name == "client.toml");
        let path = if is_client && admin.exists() { admin } else { path };
        let mut config = ClientConfig::load(&path)?;
        config.timeout = self.timeout;
        Ok(config)
    }

    /// The configuration of the cluster that is meant.
    pub fn client_config(&self) -> Result<ClientConfig, Failure> {
        let path = self.client_file()?;
        let mut config = ClientConfig::load(&path)?;
        config.timeout = self.timeout;
        Ok(config)
    }

    /// Connects to the cluster that is meant.
    pub async fn connect(&self) -> Result<Client, Failure> {
        Ok(Client::connect(self.client_config()?).await?)
    }

    fn client_file(&self) -> Result<PathBuf, Failure> {
        let file = |path: PathBuf| {
            if path.is_dir() { path.join("client.toml") } else { path }
        };
        if let Some(path) = &self.cluster {
            return Ok(file(path.clone()));
        }
        let here = Path::new(DEV_FOLDER).join("client.toml");
        if here.exists() {
            return Ok(here);
        }
        let noted = note().and_then(|note| fs::read_to_string(note).ok());
        match noted.map(|folder| PathBuf::from(folder).join("client.toml")) {
            Some(path) if path.exists() => Ok(path),
            _ => Err(Failure::new(
                EXIT_USAGE,
                "which cluster? name its folder with --cluster or TROTH_CLUSTER, or start one with `troth dev`",
            )),
        }
    }
}

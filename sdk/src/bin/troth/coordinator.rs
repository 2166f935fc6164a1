//! `troth coordinator`: who belongs to the coordinators, and changing that while they serve.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::{Args, Subcommand};
use serde_json::json;
use troth_protocol::{CoordinatorMember, MemberState, NodeId};
use troth_sdk::ClientConfig;
use troth_sdk::layout::{Layout, NewCoordinator};
use troth_sdk::operator::{CoordinatorChange, Operator};

use crate::Context;
use crate::output::{EXIT_FAILED, EXIT_USAGE, Failure, line, table};
use crate::setup::HostingOptions;

/// How often it is looked whether a change is done.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);

/// What `troth coordinator` does.
#[derive(Subcommand)]
pub enum CoordinatorCommand {
    /// Show all coordinators, and who is on the way in or out.
    List,
    /// Make the files of one more coordinator: its configuration and its certificate.
    Init(InitOptions),
    /// Let coordinators in, each with an empty data folder. They vote when all of them run and have what the others
    /// have; name those together that shall come together.
    Add(AddOptions),
    /// Send coordinators away. Each ends by itself when it has no vote any more.
    Remove(RemoveOptions),
    /// Let a coordinator whose data folder is lost start with an empty one. It loses its vote at once.
    Replace(ReplaceOptions),
}

/// Options of `troth coordinator init`.
#[derive(Args)]
pub struct InitOptions {
    /// Its number: 1 or more, and none of another coordinator.
    id: u64,
    /// The folder that `troth init` made, with ca.pem and ca-key.pem.
    #[arg(long, default_value = "troth-cluster")]
    dir: PathBuf,
    /// Where it will listen.
    #[arg(long, value_name = "HOST:PORT")]
    listen: String,
    /// Let it show the console at its HTTP port.
    #[arg(long)]
    console: bool,
    #[command(flatten)]
    hosting: HostingOptions,
}

/// Options of `troth coordinator add`.
#[derive(Args)]
pub struct AddOptions {
    /// Their numbers, and where they listen: `2 host:port`, or `2=host:port`, and so on.
    #[arg(required = true, value_name = "ID HOST:PORT")]
    members: Vec<String>,
    #[command(flatten)]
    wait: Wait,
}

/// Options of `troth coordinator remove`.
#[derive(Args)]
pub struct RemoveOptions {
    /// Their numbers.
    #[arg(required = true)]
    ids: Vec<u64>,
    #[command(flatten)]
    wait: Wait,
}

/// Options of `troth coordinator replace`.
#[derive(Args)]
pub struct ReplaceOptions {
    /// Its number.
    id: u64,
    /// Where it listens from now on, if somewhere else than before.
    #[arg(value_name = "HOST:PORT")]
    address: Option<String>,
    #[command(flatten)]
    wait: Wait,
}

#[derive(Args)]
struct Wait {
    /// Wait until it is done; --timeout says for how long.
    #[arg(long)]
    wait: bool,
}

/// `troth coordinator`.
pub async fn run(context: &Context, command: CoordinatorCommand) -> Result<(), Failure> {
    let (change, wait) = match command {
        CoordinatorCommand::Init(options) => return init(context, options),
        CoordinatorCommand::List => {
            let operator = operator(context).await?;
            let members = operator.members().await;
            operator.close().await;
            return show(context, &members?);
        }
        CoordinatorCommand::Add(AddOptions { members, wait }) => {
            (CoordinatorChange::Add { members: places(&members)? }, wait)
        }
        CoordinatorCommand::Remove(RemoveOptions { ids, wait }) => {
            (CoordinatorChange::Remove { ids: ids.into_iter().map(NodeId).collect() }, wait)
        }
        CoordinatorCommand::Replace(ReplaceOptions { id, address, wait }) => {
            (CoordinatorChange::Replace { id: NodeId(id), address }, wait)
        }
    };
    let operator = operator(context).await?;
    let done = apply(context, &operator, change, wait.wait).await;
    operator.close().await;
    done
}

async fn operator(context: &Context) -> Result<Operator, Failure> {
    let operator = Operator::new(&context.admin_config()?)?;
    operator.refresh_map().await;
    Ok(operator)
}

async fn apply(
    context: &Context,
    operator: &Operator,
    change: CoordinatorChange,
    wait: bool,
) -> Result<(), Failure> {
    operator.change_coordinators(change.clone()).await?;
    let deadline = Instant::now() + context.timeout;
    let members = loop {
        match operator.members().await {
            Ok(members) if !wait || members.iter().all(votes) => break members,
            // The leader may be the one that goes.
            Err(error) if !wait => return Err(error.into()),
            Ok(members) if Instant::now() >= deadline => return Err(late(&members)),
            Err(error) if Instant::now() >= deadline => return Err(error.into()),
            Ok(_) | Err(_) => tokio::time::sleep(LOOK_INTERVAL).await,
        }
    };
    show(context, &members)?;
    if context.json || members.iter().all(votes) {
        return Ok(());
    }
    match change {
        CoordinatorChange::Add { .. } => line(
            "Start those that are joining, each with an empty data folder; `troth coordinator list` shows how far they are.",
        ),
        CoordinatorChange::Replace { id, .. } => line(format!(
            "Start coordinator {id} with an empty data folder; `troth coordinator list` shows how far it is."
        )),
        CoordinatorChange::Remove { .. } => {
            line("Those that leave end by themselves; then take them out of the lists in all configurations.")
        }
    }
}

fn votes(member: &CoordinatorMember) -> bool {
    member.state == MemberState::Voting
}

fn late(members: &[CoordinatorMember]) -> Failure {
    let told = |member: &&CoordinatorMember| {
        format!("{} at {} is {}", member.id, member.address, member.state.name())
    };
    let waits: Vec<String> =
        members.iter().filter(|member| !votes(member)).map(|member| told(&member)).collect();
    let advice = "those that join must run, each with an empty data folder; --timeout waits longer";
    Failure::new(EXIT_FAILED, format!("not done yet: {}; {advice}", waits.join(", ")))
}

fn show(context: &Context, members: &[CoordinatorMember]) -> Result<(), Failure> {
    if context.json {
        let members: Vec<_> = members
            .iter()
            .map(|member| {
                json!({
                    "id": member.id.0, "address": member.address, "state": member.state.name(),
                    "since": member.since,
                })
            })
            .collect();
        return line(json!({ "coordinators": members }));
    }
    let row = |member: &CoordinatorMember| {
        vec![member.id.to_string(), member.address.clone(), member.state.name().to_owned()]
    };
    table(&["COORDINATOR", "ADDRESS", "STATE"], &members.iter().map(row).collect::<Vec<_>>())
}

/// Numbers and addresses, in one word each or in two.
fn places(words: &[String]) -> Result<Vec<(NodeId, String)>, Failure> {
    let wrong = |word: &str| {
        let reason = format!("{word:?}: name a number and where it listens, as in `2 host:port`");
        Failure::new(EXIT_USAGE, reason)
    };
    let mut places = Vec::new();
    let mut words = words.iter();
    while let Some(word) = words.next() {
        let (id, address) = match word.split_once('=') {
            Some((id, address)) => (id, address),
            None => (word.as_str(), words.next().ok_or_else(|| wrong(word))?.as_str()),
        };
        let id = id.parse().ok().filter(|id| *id > 0).ok_or_else(|| wrong(word))?;
        if !address.contains(':') {
            return Err(wrong(address));
        }
        places.push((NodeId(id), address.to_owned()));
    }
    Ok(places)
}

/// Makes the files of one more coordinator.
fn init(context: &Context, options: InitOptions) -> Result<(), Failure> {
    let InitOptions { id, dir, listen, console, hosting } = options;
    if id == 0 || !listen.contains(':') {
        return Err(Failure::new(EXIT_USAGE, "an id is 1 or more, and an address host:port"));
    }
    let others = ClientConfig::load(dir.join("client.toml"))?.coordinators;
    let newcomer = NewCoordinator { id, listen: listen.clone(), others, hosting: hosting.hosting(console) };
    let made = Layout::at(&dir).add_coordinator(&newcomer);
    let config = made.map_err(|error| Failure::new(EXIT_FAILED, error))?;
    if context.json {
        return line(json!({ "coordinator": id, "config": config }));
    }
    line(format!("Let it in: troth --cluster {} coordinator add {id} {listen}", dir.display()))?;
    line(format!("Then start it: troth-coordinator --config {}", config.display()))
}

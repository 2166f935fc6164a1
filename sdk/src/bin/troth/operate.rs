//! `troth switchover`: what an operator does to a running cluster.

use clap::Args;
use serde_json::json;
use tokio::time::Instant;
use troth_protocol::message::admin::{Request as Ask, Response as Told};
use troth_protocol::message::{Request, Response};
use troth_protocol::net::Peer;
use troth_protocol::{NodeId, Reject};
use troth_sdk::Client;

use crate::Context;
use crate::output::{EXIT_FAILED, Failure, line};

/// Options of `troth switchover`.
#[derive(Args)]
pub struct SwitchoverOptions {
    /// The coordinator that shall lead; the one that is fit best if left out.
    #[arg(long, value_name = "ID")]
    to: Option<u64>,
}

/// Hands the leadership of the coordinators to another one. Transactions wait, and none fails.
pub async fn switchover(context: &Context, options: SwitchoverOptions) -> Result<(), Failure> {
    let client = context.connect_as_admin().await?;
    client.refresh_map().await;
    let began = Instant::now();
    let switched = hand_over(&client, options.to.map(NodeId), began + context.timeout).await;
    client.close().await;
    let to = switched?;
    let took = began.elapsed().as_millis() as u64;
    if context.json {
        line(json!({ "leader": to.0, "took_ms": took }))
    } else {
        line(format!("coordinator {to} leads now; handing over took {took} ms"))
    }
}

async fn hand_over(client: &Client, to: Option<NodeId>, deadline: Instant) -> Result<NodeId, Failure> {
    let mut last = Failure::new(EXIT_FAILED, "no coordinator leads");
    for node in &client.map().coordinators {
        let peer = Peer::coordinator(&node.address);
        let request = Request::Admin(Ask::Switchover { to });
        match client.transport().call(&peer, request, deadline).await {
            Ok(Response::Admin(Told::Switched { to })) => return Ok(to),
            Ok(Response::Rejected(Reject::NotLeader { .. })) => {}
            Ok(Response::Rejected(Reject::Overloaded { .. })) => {
                let reason = "called off: not everything under way has ended in time; try again";
                return Err(Failure::new(EXIT_FAILED, reason));
            }
            Ok(Response::Rejected(reject)) => return Err(Failure::new(EXIT_FAILED, reject)),
            Ok(_) => last = Failure::new(EXIT_FAILED, "a coordinator answered something else"),
            Err(error) => last = Failure::new(EXIT_FAILED, error),
        }
    }
    Err(last)
}

//! `troth get`, `put`, `delete`, `scan`: single operations.

use clap::Args;
use serde_json::json;
use troth_sdk::{Commit, Key, KeyRange, Transaction};

use crate::Context;
use crate::output::{EXIT_ABORTED, EXIT_NO_VALUE, EXIT_UNKNOWN, Failure, bytes_line, json_bytes, line};

/// Options of `troth get`.
#[derive(Args)]
pub struct GetOptions {
    /// The key.
    key: String,
}

/// Options of `troth put`.
#[derive(Args)]
pub struct PutOptions {
    /// The key.
    key: String,
    /// Its value.
    value: String,
}

/// Options of `troth delete`.
#[derive(Args)]
pub struct DeleteOptions {
    /// The key.
    key: String,
}

/// Options of `troth scan`.
#[derive(Args)]
pub struct ScanOptions {
    /// Keys that begin with this; left out: all.
    #[arg(default_value = "")]
    prefix: String,
    /// Instead of a prefix: keys from this one on.
    #[arg(long, conflicts_with = "prefix")]
    from: Option<String>,
    /// With --from: keys before this one.
    #[arg(long, requires = "from")]
    to: Option<String>,
    /// The most keys to print.
    #[arg(long, default_value_t = 1000)]
    limit: usize,
}

/// Prints a value.
pub async fn get(context: &Context, options: GetOptions) -> Result<(), Failure> {
    let client = context.connect().await?;
    let value = client.snapshot().await?.get(&options.key).await?;
    client.close().await;
    if context.json {
        let found = value.is_some();
        line(json!({ "key": options.key, "found": found, "value": value.as_deref().map(json_bytes) }))?;
    } else if let Some(value) = &value {
        bytes_line(value)?;
    }
    match value {
        Some(_) => Ok(()),
        None if context.json => Err(Failure::new(EXIT_NO_VALUE, "")),
        None => Err(Failure::new(EXIT_NO_VALUE, format!("{} has no value", options.key))),
    }
}

/// Sets a key.
pub async fn put(context: &Context, options: PutOptions) -> Result<(), Failure> {
    write(context, &options.key, async |tx| tx.put(&options.key, &options.value)).await
}

/// Deletes a key.
pub async fn delete(context: &Context, options: DeleteOptions) -> Result<(), Failure> {
    write(context, &options.key, async |tx| tx.delete(&options.key)).await
}

async fn write(
    context: &Context,
    key: &str,
    change: impl AsyncFn(&Transaction) -> Result<(), troth_sdk::Error>,
) -> Result<(), Failure> {
    let client = context.connect().await?;
    let deadline = tokio::time::Instant::now() + context.timeout;
    let committed = loop {
        let tx = client.begin().await?;
        change(&tx).await?;
        match tx.commit().await? {
            // Written without a look at anything: it only met somebody who was faster.
            Commit::Aborted { cause } if cause.is_retriable() && tokio::time::Instant::now() < deadline => {
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            }
            commit => break finish(commit),
        }
    };
    client.close().await;
    let commit_ts = committed?;
    if context.json {
        line(json!({ "key": key, "committed": true, "commit_ts": commit_ts.0 }))?;
    }
    Ok(())
}

/// The moment of a commit, or how it failed.
pub fn finish(commit: Commit) -> Result<troth_sdk::Timestamp, Failure> {
    match commit {
        Commit::Committed { commit_ts } => Ok(commit_ts),
        Commit::Aborted { cause } => Err(Failure::new(EXIT_ABORTED, format!("aborted: {cause}"))),
        Commit::Unknown { handle } => {
            let message = format!("it is not known whether transaction {} was committed", handle.txn());
            Err(Failure::new(EXIT_UNKNOWN, message))
        }
    }
}

/// Prints keys and values.
pub async fn scan(context: &Context, options: ScanOptions) -> Result<(), Failure> {
    let key = |text: &String| Key::copy_from(text.as_bytes());
    let range = match &options.from {
        Some(from) => KeyRange::new(key(from), options.to.as_ref().map(key)),
        None => KeyRange::prefix(options.prefix.as_bytes()),
    };
    let client = context.connect().await?;
    let rows = client.snapshot().await?.scan(range, options.limit).await?;
    client.close().await;
    for (key, value) in rows {
        if context.json {
            line(json!({ "key": json_bytes(key.as_bytes()), "value": json_bytes(&value) }))?;
        } else {
            bytes_line(&[key.as_bytes(), b"\t", &value].concat())?;
        }
    }
    Ok(())
}

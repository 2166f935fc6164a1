//! `troth txn`: a script of reads and writes as one transaction.

use std::fs;
use std::io::Read;

use clap::Args;
use serde_json::{Value, json};
use troth_sdk::{Client, Commit, Error, KeyRange, Transaction};

use crate::Context;
use crate::keys::finish;
use crate::operate::TxnCommand;
use crate::output::{EXIT_ABORTED, EXIT_USAGE, Failure, json_bytes, line};

/// Options of `troth txn`.
#[derive(Args)]
#[command(after_help = "A script has one step a line; words may be quoted as in a shell; # begins a comment:
  get KEY              print the value
  put KEY VALUE        set a key
  add KEY NUMBER       add to a decimal number; a key without value counts as 0
  delete KEY           delete a key
  scan PREFIX [LIMIT]  print keys and values
  expect KEY VALUE     abort unless the key has this value; `expect KEY` unless it has none
All of it happens at one moment, or nothing does. Output is printed after the commit.")]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Options {
    /// The script; - for standard input.
    #[arg(required = true)]
    file: Option<String>,
    #[command(subcommand)]
    pub command: Option<TxnCommand>,
}

enum Step {
    Get(String),
    Put(String, String),
    Add(String, i64),
    Delete(String),
    Scan(String, usize),
    Expect(String, Option<String>),
}

/// Why a run of the script ended.
enum Stop {
    Troth(Error),
    /// An expectation was not met, or a value is not a number.
    Refused(String),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Stop {
        Stop::Troth(error)
    }
}

/// Runs a script.
pub async fn run(context: &Context, options: Options) -> Result<(), Failure> {
    let file = options.file.unwrap_or_default();
    let unreadable = |error| Failure::new(EXIT_USAGE, format!("{file}: {error}"));
    let text = if file == "-" {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text).map_err(unreadable)?;
        text
    } else {
        fs::read_to_string(&file).map_err(unreadable)?
    };
    let steps = parse(&text)
        .map_err(|(number, reason)| Failure::new(EXIT_USAGE, format!("{file}:{number}: {reason}")))?;
    let client = context.connect().await?;
    let result = commit(&client, &steps, context).await;
    client.close().await;
    let (txn, commit_ts, printed) = result?;
    if context.json {
        let (txn, commit_ts) = (txn.to_string(), commit_ts.0);
        return line(json!({ "txn": txn, "committed": true, "commit_ts": commit_ts, "results": printed }));
    }
    for result in printed {
        let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        match &result["value"] {
            Value::Null => line(format!("{} has no value", text(&result["key"])))?,
            value => line(format!("{}\t{}", text(&result["key"]), text(value)))?,
        }
    }
    line(format!("committed {txn} at {commit_ts}"))
}

type Committed = (troth_sdk::TxnId, troth_sdk::Timestamp, Vec<Value>);

async fn commit(client: &Client, steps: &[Step], context: &Context) -> Result<Committed, Failure> {
    let deadline = tokio::time::Instant::now() + context.timeout;
    loop {
        let tx = client.begin().await?;
        let id = tx.id();
        let error = match perform(&tx, steps).await {
            Ok(printed) => match tx.commit().await {
                Ok(Commit::Aborted { cause }) => Error::Aborted { cause },
                Ok(commit) => return Ok((id, finish(commit)?, printed)),
                Err(error) => error,
            },
            Err(Stop::Refused(reason)) => return Err(Failure::new(EXIT_ABORTED, reason)),
            Err(Stop::Troth(error)) => error,
        };
        if !error.is_retriable() || tokio::time::Instant::now() >= deadline {
            return Err(error.into());
        }
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
}

async fn perform(tx: &Transaction, steps: &[Step]) -> Result<Vec<Value>, Stop> {
    let mut printed = Vec::new();
    for step in steps {
        match step {
            Step::Get(key) => {
                let value = tx.get(key).await?;
                printed.push(json!({ "key": key, "value": value.as_deref().map(json_bytes) }));
            }
            Step::Put(key, value) => tx.put(key, value)?,
            Step::Add(key, number) => {
                let value = tx.get(key).await?.unwrap_or_default();
                let text = if value.is_empty() { "0" } else { std::str::from_utf8(&value).unwrap_or("") };
                let sum = text.trim().parse::<i64>().ok().and_then(|old| old.checked_add(*number));
                let sum =
                    sum.ok_or_else(|| Stop::Refused(format!("{key} is no number, or too large to add to")))?;
                tx.put(key, sum.to_string())?;
            }
            Step::Delete(key) => tx.delete(key)?,
            Step::Scan(prefix, limit) => {
                for (key, value) in tx.scan(KeyRange::prefix(prefix.as_bytes()), *limit).await? {
                    printed.push(json!({ "key": json_bytes(key.as_bytes()), "value": json_bytes(&value) }));
                }
            }
            Step::Expect(key, expected) => {
                let value = tx.get(key).await?;
                if value.as_deref() != expected.as_deref().map(str::as_bytes) {
                    let actual = value
                        .map_or("no value".into(), |value| format!("{:?}", value.escape_ascii().to_string()));
                    return Err(Stop::Refused(format!("aborted: {key} has {actual}, expected {expected:?}")));
                }
            }
        }
    }
    Ok(printed)
}

/// Reads a script; an error names its line.
fn parse(text: &str) -> Result<Vec<Step>, (usize, String)> {
    let mut steps = Vec::new();
    for (number, text) in text.lines().enumerate().map(|(at, text)| (at + 1, text)) {
        let words = shlex::split(text).ok_or_else(|| (number, "a quote is not closed".to_owned()))?;
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let owned = |text: &str| text.to_owned();
        let wrong = |reason: String| (number, reason);
        let step = match words[..] {
            [] => continue,
            ["get", key] => Step::Get(owned(key)),
            ["put", key, value] => Step::Put(owned(key), owned(value)),
            ["add", key, by] => {
                Step::Add(owned(key), by.parse().map_err(|_| wrong(format!("{by:?} is not a whole number")))?)
            }
            ["delete", key] => Step::Delete(owned(key)),
            ["scan", prefix] => Step::Scan(owned(prefix), 1000),
            ["scan", prefix, limit] => Step::Scan(
                owned(prefix),
                limit.parse().map_err(|_| wrong(format!("{limit:?} is not a number of keys")))?,
            ),
            ["expect", key] => Step::Expect(owned(key), None),
            ["expect", key, value] => Step::Expect(owned(key), Some(owned(value))),
            [word, ..] => {
                let steps = "get KEY, put KEY VALUE, add KEY NUMBER, delete KEY, scan PREFIX [LIMIT], expect KEY [VALUE]";
                return Err(wrong(format!(
                    "{word:?} with {} words is no step; steps are: {steps}",
                    words.len()
                )));
            }
        };
        steps.push(step);
    }
    Ok(steps)
}

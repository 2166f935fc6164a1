//! Histories as text: a map of EDN for each event, each on a line of its own, as Jepsen writes them.
//!
//! ```text
//! {:index 0, :time 81, :type :invoke, :process 0, :f :txn, :value [[:r 1 nil] [:append 1 2]]}
//! {:index 1, :time 97, :type :ok, :process 0, :f :txn, :value [[:r 1 []] [:append 1 2]], :commit-ts 5}
//! ```
//!
//! The text does not say which workload it is of, and `:f :read` means something else in each: whoever
//! reads a text has to know.

mod value;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Display};
use std::fs::File;
use std::io::{self, BufRead, BufWriter, Write};
use std::path::Path;

use value::{Quoted, Value};

use super::{Event, History, Kind, Mop, Op, RwMop, Workload};

/// Writes all events of a history.
///
/// # Errors
/// Besides those of the output, `InvalidData` if a number is beyond the integers of EDN readers, which
/// end at `i64::MAX`.
pub fn write(history: &History, output: &mut impl Write) -> io::Result<()> {
    for event in &history.events {
        let long = |number: &u64| i64::try_from(*number).is_ok();
        let numbers = [event.index, event.time_nanos, event.commit_ts.unwrap_or(0)];
        if !numbers.iter().all(long) {
            let problem = format!("event {} has a number beyond {}", event.index, i64::MAX);
            return Err(io::Error::new(io::ErrorKind::InvalidData, problem));
        }
        writeln!(output, "{}", Line(event))?;
    }
    Ok(())
}

/// Writes all events of a history into a new file.
///
/// # Errors
/// As [`write()`].
pub fn save(history: &History, path: &Path) -> io::Result<()> {
    let mut file = BufWriter::new(File::create(path)?);
    write(history, &mut file)?;
    file.flush()
}

/// Why a text could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The input fails.
    #[error("line {line}: {error}")]
    Input {
        /// The line, from 1.
        line: usize,
        /// What happened.
        error: io::Error,
    },
    /// A line is not an event of this workload.
    #[error("line {line}: {problem}")]
    Line {
        /// The line, from 1.
        line: usize,
        /// What is wrong with it.
        problem: String,
    },
}

/// Reads a history. Empty lines and lines that begin with `;` are skipped. Events without `:index` are
/// numbered as they come, and those without `:time` take place when their number says.
///
/// # Errors
/// The first line that is not an event of this workload.
pub fn read(input: impl BufRead, workload: Workload) -> Result<History, ReadError> {
    let mut history = History::default();
    for (number, text) in input.lines().enumerate() {
        let line = number + 1;
        let text = text.map_err(|error| ReadError::Input { line, error })?;
        let text = text.trim();
        if !text.is_empty() && !text.starts_with(';') {
            let next = history.events.last().map_or(0, |event| event.index + 1);
            let event = Value::read(text).and_then(|value| event(value, next, workload));
            history.events.push(event.map_err(|problem| ReadError::Line { line, problem })?);
        }
    }
    Ok(history)
}

struct Line<'e>(&'e Event);

impl Display for Line<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Event { index, time_nanos, process, kind, op, error, commit_ts } = self.0;
        let kind = match kind {
            Kind::Invoke => "invoke",
            Kind::Ok => "ok",
            Kind::Fail => "fail",
            Kind::Info => "info",
        };
        write!(f, "{{:index {index}, :time {time_nanos}, :type :{kind}, :process {process}, ")?;
        write!(f, ":f :{}, :value {op}", op.function())?;
        if let Op::Increment(Some(count)) = op {
            write!(f, ", :count {count}")?;
        }
        if let Some(error) = error {
            write!(f, ", :error {}", Quoted(error))?;
        }
        if let Some(commit_ts) = commit_ts {
            write!(f, ", :commit-ts {commit_ts}")?;
        }
        f.write_str("}")
    }
}

/// The value of an operation, as histories have it after `:value`.
impl Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Op::Txn(mops) => bracketed(f, "[", mops, "]"),
            Op::RwTxn(mops) | Op::Fork(mops) => bracketed(f, "[", mops, "]"),
            Op::Transfer { from, to, amount } => write!(f, "{{:from {from}, :to {to}, :amount {amount}}}"),
            Op::Balances(Some(balances)) => {
                f.write_str("{")?;
                for (place, (account, balance)) in balances.iter().enumerate() {
                    write!(f, "{}{account} {balance}", if place == 0 { "" } else { ", " })?;
                }
                f.write_str("}")
            }
            Op::Add(element) => element.fmt(f),
            Op::Elements(Some(elements)) => bracketed(f, "#{", elements, "}"),
            Op::Increment(_) => f.write_str("1"),
            Op::Count(Some(count)) => count.fmt(f),
            Op::Balances(None) | Op::Elements(None) | Op::Count(None) => f.write_str("nil"),
        }
    }
}

impl Display for Mop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Mop::Append { key, value } => write!(f, "[:append {key} {value}]"),
            Mop::Read { key, list: None } => write!(f, "[:r {key} nil]"),
            Mop::Read { key, list: Some(list) } => {
                write!(f, "[:r {key} ")?;
                bracketed(f, "[", list, "]]")
            }
        }
    }
}

impl Display for RwMop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RwMop::Write { key, value } => write!(f, "[:w {key} {value}]"),
            RwMop::Read { key, value: None } => write!(f, "[:r {key} nil]"),
            RwMop::Read { key, value: Some(value) } => write!(f, "[:r {key} {value}]"),
        }
    }
}

fn bracketed<T: Display>(
    f: &mut fmt::Formatter<'_>,
    open: &str,
    items: impl IntoIterator<Item = T>,
    close: &str,
) -> fmt::Result {
    f.write_str(open)?;
    for (place, item) in items.into_iter().enumerate() {
        write!(f, "{}{item}", if place == 0 { "" } else { " " })?;
    }
    f.write_str(close)
}

/// An event, from its map.
fn event(value: Value, next: u64, workload: Workload) -> Result<Event, String> {
    let mut fields = Fields::new(value)?;
    let index = fields.number("index")?.unwrap_or(next);
    let time_nanos = fields.number("time")?.unwrap_or(index);
    let kind = match fields.keyword("type")?.as_str() {
        "invoke" => Kind::Invoke,
        "ok" => Kind::Ok,
        "fail" => Kind::Fail,
        "info" => Kind::Info,
        other => return Err(format!(":type is :{other}")),
    };
    let process = fields.number("process")?.ok_or("there is no :process")?;
    let process = u32::try_from(process).map_err(|_| format!(":process is {process}"))?;
    let function = fields.keyword("f")?;
    let mut op = op(workload, &function, fields.take("value").unwrap_or(Value::Nil))?;
    if let Op::Increment(count) = &mut op {
        *count = fields.take("count").map(int).transpose()?;
    }
    let error = match fields.take("error") {
        None | Some(Value::Nil) => None,
        Some(Value::Str(text)) => Some(text),
        Some(Value::Keyword(name)) => Some(name),
        Some(other) => return Err(format!(":error is {other}, not a string")),
    };
    let commit_ts = fields.number("commit-ts")?;
    Ok(Event { index, time_nanos, process, kind, op, error, commit_ts })
}

/// The entries of a map that has keywords for keys.
struct Fields(Vec<(Value, Value)>);

impl Fields {
    fn new(value: Value) -> Result<Fields, String> {
        match value {
            Value::Map(entries) => Ok(Fields(entries)),
            other => Err(format!("{other} is not a map")),
        }
    }

    fn take(&mut self, name: &str) -> Option<Value> {
        let is_it = |(key, _): &(Value, Value)| matches!(key, Value::Keyword(key) if key == name);
        let place = self.0.iter().position(is_it)?;
        Some(self.0.swap_remove(place).1)
    }

    fn number(&mut self, name: &str) -> Result<Option<u64>, String> {
        let number = match self.take(name) {
            None | Some(Value::Nil) => return Ok(None),
            Some(value) => int(value)?,
        };
        u64::try_from(number).map(Some).map_err(|_| format!(":{name} is {number}"))
    }

    fn keyword(&mut self, name: &str) -> Result<String, String> {
        match self.take(name) {
            Some(Value::Keyword(keyword)) => Ok(keyword),
            Some(other) => Err(format!(":{name} is {other}, not a keyword")),
            None => Err(format!("there is no :{name}")),
        }
    }
}

fn op(workload: Workload, function: &str, value: Value) -> Result<Op, String> {
    match (workload, function) {
        (Workload::Append | Workload::WriteSkew, "txn") => Ok(Op::Txn(each(value, mop)?)),
        (Workload::Register, "txn") => Ok(Op::RwTxn(each(value, rw_mop)?)),
        (Workload::LongFork, "read" | "write") => {
            let op = Op::Fork(each(value, rw_mop)?);
            if op.function() == function { Ok(op) } else { Err(format!("{op} is not a {function}")) }
        }
        (Workload::Bank, "transfer") => {
            let mut fields = Fields::new(value)?;
            let mut amount =
                |name| int(fields.take(name).ok_or_else(|| format!("a transfer has no :{name}"))?);
            Ok(Op::Transfer { from: amount("from")?, to: amount("to")?, amount: amount("amount")? })
        }
        (Workload::Bank, "read") => optional(value, balances).map(Op::Balances),
        (Workload::Set, "add") => int(value).map(Op::Add),
        (Workload::Set, "read") => optional(value, elements).map(Op::Elements),
        (Workload::Counter, "add") => match int(value)? {
            1 => Ok(Op::Increment(None)),
            other => Err(format!("this counter grows by 1, not by {other}")),
        },
        (Workload::Counter, "read") => optional(value, int).map(Op::Count),
        (
            Workload::Append
            | Workload::WriteSkew
            | Workload::Register
            | Workload::LongFork
            | Workload::Bank
            | Workload::Set
            | Workload::Counter,
            other,
        ) => Err(format!("the workload {workload} has no :f :{other}")),
    }
}

fn mop(value: Value) -> Result<Mop, String> {
    let (name, key, value) = triple(value)?;
    match name.as_str() {
        "append" => Ok(Mop::Append { key, value: int(value)? }),
        "r" => Ok(Mop::Read { key, list: optional(value, |list| each(list, int))? }),
        other => Err(format!("a transaction on lists has no :{other}")),
    }
}

fn rw_mop(value: Value) -> Result<RwMop, String> {
    let (name, key, value) = triple(value)?;
    match name.as_str() {
        "w" => Ok(RwMop::Write { key, value: int(value)? }),
        "r" => Ok(RwMop::Read { key, value: optional(value, int)? }),
        other => Err(format!("a transaction on registers has no :{other}")),
    }
}

fn triple(value: Value) -> Result<(String, i64, Value), String> {
    let parts = each(value, Ok)?;
    match <[Value; 3]>::try_from(parts) {
        Ok([Value::Keyword(name), key, value]) => Ok((name, int(key)?, value)),
        Ok(_) | Err(_) => Err("a step of a transaction is not [:name key value]".to_owned()),
    }
}

fn balances(value: Value) -> Result<BTreeMap<i64, i64>, String> {
    match value {
        Value::Map(entries) => {
            entries.into_iter().map(|(account, balance)| Ok((int(account)?, int(balance)?))).collect()
        }
        other => Err(format!("{other} is not a map of balances")),
    }
}

fn elements(value: Value) -> Result<BTreeSet<i64>, String> {
    match value {
        Value::Set(elements) => elements.into_iter().map(int).collect(),
        other => Err(format!("{other} is not a set")),
    }
}

fn int(value: Value) -> Result<i64, String> {
    match value {
        Value::Int(number) => Ok(number),
        other => Err(format!("{other} is not an integer")),
    }
}

fn optional<T>(value: Value, read: impl FnOnce(Value) -> Result<T, String>) -> Result<Option<T>, String> {
    if value == Value::Nil { Ok(None) } else { read(value).map(Some) }
}

fn each<T>(value: Value, read: impl FnMut(Value) -> Result<T, String>) -> Result<Vec<T>, String> {
    match value {
        Value::Vector(items) => items.into_iter().map(read).collect(),
        other => Err(format!("{other} is not a vector")),
    }
}

#[cfg(test)]
mod tests;

//! Printing results and failures, for people or programs.

use std::io::{self, Write};
use std::process::ExitCode;

use serde_json::{Value, json};

/// It failed on the way.
pub const EXIT_FAILED: u8 = 1;
/// The command line or configuration makes no sense; nothing was done.
pub const EXIT_USAGE: u8 = 2;
/// The key has no value.
pub const EXIT_NO_VALUE: u8 = 3;
/// The transaction was aborted: nothing happened.
pub const EXIT_ABORTED: u8 = 4;
/// It is not known whether the transaction was committed.
pub const EXIT_UNKNOWN: u8 = 5;

/// A command failed: what to say, and how to exit.
pub struct Failure {
    code: u8,
    message: String,
}

impl Failure {
    /// A failure with an exit code.
    pub fn new(code: u8, message: impl std::fmt::Display) -> Failure {
        Failure { code, message: message.to_string() }
    }

    /// Prints one line, and gives the exit code.
    pub fn report(&self, json: bool) -> ExitCode {
        if json {
            eprintln!("{}", json!({ "error": self.message, "exit": self.code }));
        } else if !self.message.is_empty() {
            eprintln!("troth: {}", self.message);
        }
        ExitCode::from(self.code)
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Failure {
        Failure::new(EXIT_FAILED, format!("{error:#}"))
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Failure {
        Failure::new(EXIT_FAILED, error)
    }
}

/// Prints a line to standard output. A reader that has gone is no failure.
pub fn line(text: impl std::fmt::Display) -> Result<(), Failure> {
    match writeln!(io::stdout().lock(), "{text}") {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

/// Prints bytes and a newline.
pub fn bytes_line(bytes: &[u8]) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.write_all(b"\n")) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

/// Bytes as JSON: a string if they are UTF-8, else `{"hex": "…"}`.
pub fn json_bytes(bytes: &[u8]) -> Value {
    match std::str::from_utf8(bytes) {
        Ok(text) => json!(text),
        Err(_) => json!({ "hex": bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>() }),
    }
}

/// A number of bytes for people.
pub fn bytes_text(bytes: u64) -> String {
    let mut value = bytes as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if value < 1024.0 {
            return if unit == "B" { format!("{bytes} B") } else { format!("{value:.1} {unit}") };
        }
        value /= 1024.0;
    }
    format!("{value:.1} TiB")
}

/// Prints rows in aligned columns.
pub fn table(header: &[&str], rows: &[Vec<String>]) -> Result<(), Failure> {
    let mut widths: Vec<usize> = header.iter().map(|cell| cell.len()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let print = |cells: Vec<&str>| {
        let padded: Vec<String> =
            cells.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        line(padded.join("  ").trim_end())
    };
    print(header.to_vec())?;
    rows.iter().try_for_each(|row| print(row.iter().map(String::as_str).collect()))
}

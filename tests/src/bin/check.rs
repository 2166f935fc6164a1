//! Checks a history that was written to a file.

use std::fs::File;
use std::io::BufReader;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use troth_tests::checker::{Options, check};
use troth_tests::history::{Workload, edn};

/// Checks whether a history can be one of a strictly serializable system.
#[derive(Parser)]
struct Arguments {
    /// What the clients did: append, write-skew, register, long-fork, bank, set or counter.
    workload: Workload,
    /// The history, in EDN, one event per line.
    file: PathBuf,
    /// Leaves commit timestamps out of account.
    #[arg(long)]
    without_timestamps: bool,
    /// Print the report as JSON.
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let history = match File::open(&arguments.file) {
        Ok(file) => edn::read(BufReader::new(file), arguments.workload).map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    };
    let history = match history {
        Ok(history) => history,
        Err(error) => {
            eprintln!("{}: {error}", arguments.file.display());
            return ExitCode::from(2);
        }
    };
    let options = Options { witness: !arguments.without_timestamps, ..Options::default() };
    let report = check(&history, arguments.workload, &options);
    if arguments.json {
        println!("{}", report.to_json());
    } else {
        print!("{report}");
    }
    if report.valid() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

//! One of the things that take bytes, for libFuzzer. `TROTH_FUZZ` names it; see `scripts/fuzz`.
#![no_main]

use std::path::PathBuf;
use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use troth_tests::fuzz::{TARGETS, Target, target};

/// Which one.
const CHOICE: &str = "TROTH_FUZZ";

/// Where to write what it was made for, to begin with.
const SAMPLES: &str = "TROTH_FUZZ_SAMPLES";

fn chosen() -> &'static Target {
    static CHOSEN: OnceLock<Target> = OnceLock::new();
    CHOSEN.get_or_init(|| {
        let names = TARGETS.map(|target| target.name).join(", ");
        let choice = std::env::var(CHOICE).unwrap_or_default();
        let target = target(&choice).unwrap_or_else(|| panic!("{CHOICE} must name one of: {names}"));
        if let Some(folder) = std::env::var_os(SAMPLES).map(PathBuf::from) {
            for (number, sample) in (target.samples)().iter().enumerate() {
                std::fs::write(folder.join(format!("sample-{number}")), sample)
                    .expect("a folder to write to");
            }
        }
        target
    })
}

fuzz_target!(
    init: {
        chosen();
    },
    |bytes: &[u8]| (chosen().run)(bytes)
);

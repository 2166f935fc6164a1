//! Kinds of faults, and their names on the command line.

use std::fmt;
use std::str::FromStr;

/// A kind of fault.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Nemesis {
    /// SIGKILL of a coordinator, the leader more often than not.
    KillCoordinator,
    /// SIGKILL of a participant.
    KillParticipant,
    /// SIGKILL of several at the same moment: a minority, a majority, or all, of one role or both.
    KillMany,
    /// SIGSTOP, and SIGCONT later, of one or several.
    Pause,
    /// Links are cut: around one server, between halves, in one direction, in a ring of majorities, on and off.
    Partition,
    /// Links are slow, lossy, double, out of order, or damage what passes.
    Network,
    /// Wall clocks jump, and jump back.
    Clock,
    /// Participants join, and others leave.
    Move,
    /// All servers are stopped with SIGTERM and started again, one after the other.
    Restart,
    /// SIGKILL, and what was not synced is lost.
    PowerCut,
    /// A disk is full.
    DiskFull,
    /// Syncs take long.
    DiskSlow,
    /// Reads of a disk fail.
    DiskReadError,
    /// A bit of a stored file flips.
    DiskBitFlip,
}

impl Nemesis {
    /// All of them.
    pub const ALL: [Nemesis; 14] = [
        Nemesis::KillCoordinator,
        Nemesis::KillParticipant,
        Nemesis::KillMany,
        Nemesis::Pause,
        Nemesis::Partition,
        Nemesis::Network,
        Nemesis::Clock,
        Nemesis::Move,
        Nemesis::Restart,
        Nemesis::PowerCut,
        Nemesis::DiskFull,
        Nemesis::DiskSlow,
        Nemesis::DiskReadError,
        Nemesis::DiskBitFlip,
    ];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Nemesis::KillCoordinator => "kill-coordinator",
            Nemesis::KillParticipant => "kill-participant",
            Nemesis::KillMany => "kill-many",
            Nemesis::Pause => "pause",
            Nemesis::Partition => "partition",
            Nemesis::Network => "network",
            Nemesis::Clock => "clock",
            Nemesis::Move => "move",
            Nemesis::Restart => "restart",
            Nemesis::PowerCut => "power-cut",
            Nemesis::DiskFull => "disk-full",
            Nemesis::DiskSlow => "disk-slow",
            Nemesis::DiskReadError => "disk-read-error",
            Nemesis::DiskBitFlip => "disk-bit-flip",
        }
    }

    /// Whether servers need disks that can be spoiled.
    pub fn is_of_disks(self) -> bool {
        matches!(
            self,
            Nemesis::PowerCut
                | Nemesis::DiskFull
                | Nemesis::DiskSlow
                | Nemesis::DiskReadError
                | Nemesis::DiskBitFlip
        )
    }

    /// Those of a word of the command line: a name, or a name for several.
    fn named(word: &str) -> Option<Vec<Nemesis>> {
        let all = Nemesis::ALL.into_iter();
        Some(match word {
            "all" => all.collect(),
            "kill" => vec![Nemesis::KillCoordinator, Nemesis::KillParticipant, Nemesis::KillMany],
            "disk" => all.filter(|nemesis| nemesis.is_of_disks()).collect(),
            name => vec![all.into_iter().find(|nemesis| nemesis.name() == name)?],
        })
    }
}

impl fmt::Display for Nemesis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A choice of nemeses: names with commas between them.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Nemeses(pub Vec<Nemesis>);

/// Some word is not the name of one.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("there is no nemesis {0:?}; there are none, all, kill, disk, {names}", names = Nemesis::ALL.map(Nemesis::name).join(", "))]
pub struct UnknownNemesis(String);

impl FromStr for Nemeses {
    type Err = UnknownNemesis;

    fn from_str(text: &str) -> Result<Nemeses, UnknownNemesis> {
        let mut chosen = Vec::new();
        if text != "none" {
            for word in text.split(',') {
                chosen.extend(Nemesis::named(word).ok_or_else(|| UnknownNemesis(word.to_owned()))?);
            }
        }
        chosen.sort();
        chosen.dedup();
        Ok(Nemeses(chosen))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_chosen_and_groups_are_taken_apart() {
        let chosen = |text: &str| text.parse::<Nemeses>().map(|nemeses| nemeses.0);
        assert_eq!(chosen("none"), Ok(vec![]));
        assert_eq!(chosen("all"), Ok(Nemesis::ALL.to_vec()));
        assert_eq!(chosen("pause,kill-coordinator"), Ok(vec![Nemesis::KillCoordinator, Nemesis::Pause]));
        assert_eq!(chosen("disk,power-cut").map(|disk| disk.len()), Ok(5));
        for nemesis in Nemesis::ALL {
            assert_eq!(chosen(nemesis.name()), Ok(vec![nemesis]));
        }
        let error = chosen("pause,laziness").expect_err("there is none").to_string();
        assert!(error.contains("no nemesis \"laziness\"; there are none, all, kill, disk, kill-coordinator"));
    }
}

//! Which fault comes next, whom it hits, and for how long.

use std::collections::BTreeSet;
use std::time::Duration;

use rand::RngExt;
use rand::rngs::StdRng;
use rand::seq::{IndexedRandom, SliceRandom};
use tokio::time::Instant;

use super::links::{self, Impaired, Party};
use super::ring::change_ring;
use super::{Faults, Undo};
use crate::chaos::nemesis::Nemesis;
use crate::chaos::servers::{Condition, Trouble};
use crate::disk::FailReads;
use crate::drill::Server;

/// Participants there are at most.
const NODES_MAX: usize = 6;

/// How long one that is cut off now and then is cut off at first.
const FLAP_FIRST: Duration = Duration::from_millis(500);

impl Faults {
    /// What happens, for how many seconds, and how it is undone. `None`: it is not possible now.
    pub(super) async fn begin(&mut self, nemesis: Nemesis) -> Result<Option<(String, f64, Undo)>, Trouble> {
        let seconds = |from: f64, to: f64, rng: &mut StdRng| rng.random_range(from..to);
        Ok(match nemesis {
            Nemesis::KillCoordinator => {
                let Some((server, who)) = self.one_coordinator() else { return Ok(None) };
                self.kill(&[server])?;
                Some((who, seconds(0.2, 5.0, &mut self.rng), Undo::Start(vec![server])))
            }
            Nemesis::KillParticipant => {
                let Some(server) = self.one(|server| matches!(server, Server::Participant(_))) else {
                    return Ok(None);
                };
                self.kill(&[server])?;
                Some((server.to_string(), seconds(0.2, 8.0, &mut self.rng), Undo::Start(vec![server])))
            }
            Nemesis::KillMany => {
                let Some((who, servers)) = self.many() else { return Ok(None) };
                self.kill(&servers)?;
                Some((who, seconds(0.2, 3.0, &mut self.rng), Undo::Start(servers)))
            }
            Nemesis::Pause => {
                let several = self.rng.random_bool(0.3);
                let Some((who, servers)) = (if several { self.many() } else { self.anyone() }) else {
                    return Ok(None);
                };
                for server in &servers {
                    self.servers.pause(*server)?;
                    self.tally.pauses += 1;
                }
                Some((who, seconds(0.2, 8.0, &mut self.rng), Undo::Resume(servers)))
            }
            Nemesis::Partition => {
                let leader = self.leader.lock().map(|leader| self.party(leader));
                let impaired = links::partition(self.parties(), leader, &mut self.rng);
                Some(self.impair(impaired))
            }
            Nemesis::Network => {
                let impaired = links::spoil(&self.parties(), &mut self.rng);
                Some(self.impair(impaired))
            }
            Nemesis::Clock => self.move_clocks()?,
            Nemesis::Move => self.change_ring().await?,
            Nemesis::Restart => {
                if self.active.iter().any(|active| active.nemesis == Nemesis::Restart) {
                    return Ok(None);
                }
                let mut servers: Vec<Server> = self.free().collect();
                servers.shuffle(&mut self.rng);
                let story = format!("of {} servers, one after the other", servers.len());
                Some((story, 0.0, Undo::Restart { waiting: servers.into(), stopping: None }))
            }
            Nemesis::PowerCut => {
                let several = self.rng.random_bool(0.5);
                let Some((who, servers)) = (if several { self.many() } else { self.anyone() }) else {
                    return Ok(None);
                };
                self.tally.sigkills += self.servers.cut_power(&servers)?.len() as u64;
                self.tally.power_cuts += servers.len() as u64;
                Some((who, seconds(0.2, 4.0, &mut self.rng), Undo::Start(servers)))
            }
            Nemesis::DiskFull => {
                let Some(server) = self.one(|_| true) else { return Ok(None) };
                self.excuse(server, 30.0);
                self.servers.disk(server).set_full(true);
                Some((format!("at {server}"), seconds(2.0, 10.0, &mut self.rng), Undo::Space(server)))
            }
            Nemesis::DiskSlow => {
                let Some((who, servers)) = self.anyone() else { return Ok(None) };
                let delay = Duration::from_millis(self.rng.random_range(20..600));
                for server in &servers {
                    self.servers.disk(*server).set_sync_delay(Some(delay));
                }
                let story = format!("syncs take {} ms longer at {who}", delay.as_millis());
                Some((story, seconds(2.0, 12.0, &mut self.rng), Undo::Speed(servers)))
            }
            Nemesis::DiskReadError => {
                let Some(server) = self.one(|_| true) else { return Ok(None) };
                self.excuse(server, 30.0);
                let part = [0.05, 0.5, 1.0].choose(&mut self.rng).copied().unwrap_or(1.0);
                self.servers.disk(server).fail_reads("", FailReads::Fraction(part));
                // What is in memory is not read, so it begins anew.
                self.kill(&[server])?;
                self.servers.start(server)?;
                let story = format!("{:.0} % of the reads fail at {server}, which begins anew", 100.0 * part);
                Some((story, seconds(2.0, 8.0, &mut self.rng), Undo::Reads(server)))
            }
            Nemesis::DiskBitFlip => self.flip_bit()?,
        })
    }

    pub(super) fn kill(&mut self, servers: &[Server]) -> Result<(), Trouble> {
        self.tally.sigkills += self.servers.kill(servers)?.len() as u64;
        Ok(())
    }

    /// A server may end because of its disk for so long.
    fn excuse(&mut self, server: Server, seconds: f64) {
        self.excused.insert(server, Instant::now() + Duration::from_secs_f64(seconds));
    }

    /// Servers that run and that no fault concerns but those of the network.
    fn free(&self) -> impl Iterator<Item = Server> {
        let concerned: BTreeSet<Server> =
            self.active.iter().flat_map(|active| active.undo.concerns()).collect();
        let free =
            |server: &Server| self.servers.condition(*server) == Condition::Up && !concerned.contains(server);
        self.servers.all().filter(free).collect::<Vec<_>>().into_iter()
    }

    fn one(&mut self, which: impl Fn(&Server) -> bool) -> Option<Server> {
        self.free().filter(which).collect::<Vec<_>>().choose(&mut self.rng).copied()
    }

    fn one_coordinator(&mut self) -> Option<(Server, String)> {
        let leader = *self.leader.lock();
        if let Some(leader) = leader.filter(|leader| self.free().any(|server| server == *leader))
            && self.rng.random_bool(0.7)
        {
            return Some((leader, format!("{leader}, the leader")));
        }
        let server = self.one(|server| matches!(server, Server::Coordinator(_)))?;
        Some((server, server.to_string()))
    }

    fn anyone(&mut self) -> Option<(String, Vec<Server>)> {
        if self.rng.random_bool(0.4) {
            let (server, who) = self.one_coordinator()?;
            return Some((who, vec![server]));
        }
        let server = self.one(|_| true)?;
        Some((server.to_string(), vec![server]))
    }

    /// A minority, a majority or all of the coordinators, the participants, or both.
    fn many(&mut self) -> Option<(String, Vec<Server>)> {
        let (role, which): (&str, fn(&Server) -> bool) = match self.rng.random_range(0..3) {
            0 => ("coordinators", |server| matches!(server, Server::Coordinator(_))),
            1 => ("participants", |server| matches!(server, Server::Participant(_))),
            _ => ("servers", |_| true),
        };
        let mut servers: Vec<Server> = self.free().filter(which).collect();
        let all = self.servers.all().filter(which).count();
        servers.shuffle(&mut self.rng);
        let (how_many, count) = match self.rng.random_range(0..4) {
            0 => ("a minority", (all - 1) / 2),
            1 => ("a majority", all / 2 + 1),
            _ => ("all", all),
        };
        servers.truncate(count);
        servers.sort();
        if servers.is_empty() {
            return None;
        }
        Some((format!("{how_many} of the {role}: {}", list(&servers)), servers))
    }

    fn party(&self, server: Server) -> Party {
        (server.to_string(), self.servers.address(server))
    }

    /// Servers and applications.
    fn parties(&self) -> Vec<Party> {
        let servers = self.servers.all().map(|server| self.party(server));
        let applications = self.applications.iter().enumerate();
        servers.chain(applications.map(|(at, address)| (format!("application-{at}"), *address))).collect()
    }

    fn impair(&mut self, impaired: Impaired) -> (String, f64, Undo) {
        let Impaired { story, ways, link, flaps } = impaired;
        let impairment = self.servers.network().links().impair(ways, link);
        let undo = if flaps {
            Undo::Flap { impairment, is_cut: true, next: Instant::now() + FLAP_FIRST }
        } else {
            Undo::Heal(impairment)
        };
        (story, self.rng.random_range(1.0..12.0), undo)
    }

    fn move_clocks(&mut self) -> Result<Option<(String, f64, Undo)>, Trouble> {
        let several = self.rng.random_bool(0.3);
        let Some((who, servers)) = (if several { self.many() } else { self.anyone() }) else {
            return Ok(None);
        };
        // From milliseconds to an hour, each size as likely as another.
        let size = 10.0_f64.powf(self.rng.random_range(0.7..6.55)) as i64;
        let offset = if self.rng.random_bool(0.5) { size } else { -size };
        for server in &servers {
            self.servers.set_clock(*server, offset)?;
        }
        let story = format!("{:+.3} s at {who}", offset as f64 / 1e3);
        Ok(Some((story, self.rng.random_range(2.0..12.0), Undo::SetClock(servers))))
    }

    async fn change_ring(&mut self) -> Result<Option<(String, f64, Undo)>, Trouble> {
        if self.active.iter().any(|active| active.nemesis == Nemesis::Move) {
            return Ok(None);
        }
        let nodes: Vec<Server> =
            self.servers.all().filter(|server| matches!(server, Server::Participant(_))).collect();
        let leaves = nodes.len() >= NODES_MAX || (nodes.len() > 4 && self.rng.random_bool(0.7));
        let node = if leaves {
            *nodes.choose(&mut self.rng).expect("there are several")
        } else {
            self.servers.add_participant().await?
        };
        let story = format!("{node} {}", if leaves { "leaves" } else { "joins" });
        let ended = tokio::spawn(change_ring(self.operator.clone(), node, leaves));
        Ok(Some((story, 0.0, Undo::Move { node, leaves, ended })))
    }

    fn flip_bit(&mut self) -> Result<Option<(String, f64, Undo)>, Trouble> {
        // One replica of all may be damaged at a time: what is written on a majority only must survive.
        if self.active.iter().any(|active| active.nemesis == Nemesis::DiskBitFlip) {
            return Ok(None);
        }
        let Some(server) = self.one(|_| true) else { return Ok(None) };
        let suffix = if self.rng.random_bool(0.5) { ".log" } else { ".sst" };
        let Some(flipped) = self.servers.disk(server).flip_bit(suffix) else { return Ok(None) };
        self.excuse(server, 60.0);
        let before = self.endings(server);
        // It is read for certain only by a server that begins anew.
        self.kill(&[server])?;
        self.servers.start(server)?;
        let story = format!(
            "bit {} of byte {} of {} at {server}",
            flipped.bit,
            flipped.offset,
            flipped.path.display()
        );
        Ok(Some((story, self.rng.random_range(4.0..10.0), Undo::Repair(server, flipped, before))))
    }
}

fn list(servers: &[Server]) -> String {
    servers.iter().map(Server::to_string).collect::<Vec<_>>().join(", ")
}

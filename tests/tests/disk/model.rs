//! Random operations, syncs and power cuts against a model of what may and what must be there after.
//!
//! The model is made of sectors. Each write fills whole ones with a stamp that says which file and which
//! write it is from, so a sector of another file, or half of one, is found out.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::common::{Scene, create, names};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use troth_tests::disk::{Lost, Options};

const SECTOR: usize = 512;
const SECTORS_MAX: usize = 64;
const NAMES: [&str; 6] = ["a", "b", "c", "d", "e", "f"];

/// A value of a sector that a file has had since it was synced.
#[derive(Clone)]
struct Written {
    sector: usize,
    stamp: u64,
    /// The last change of size before it, and the one that has cut it off.
    after: usize,
    dropped: Option<usize>,
}

/// A file. Operations of the journal have numbers from 1 on, which begin anew when it is committed.
#[derive(Clone, Default)]
struct Inode {
    live: Vec<u64>,
    durable: Vec<u64>,
    written: Vec<Written>,
    /// How long it has been, and after which change of size.
    lengths: Vec<(usize, usize)>,
    resizes: Vec<(usize, usize)>,
}

impl Inode {
    /// What is durable if the journal is, up to here.
    fn durable_at(&self, op: usize) -> Vec<u64> {
        let mut durable = self.durable.clone();
        for (_, length) in self.resizes.iter().filter(|(at, _)| *at <= op) {
            durable.resize(*length, 0);
        }
        durable
    }

    fn last_resize(&self, op: usize) -> usize {
        self.resizes.iter().map(|(at, _)| *at).filter(|at| *at <= op).max().unwrap_or(0)
    }

    fn write(&mut self, sector: usize, stamps: &[u64]) {
        let after = self.last_resize(usize::MAX);
        self.live.resize(self.live.len().max(sector + stamps.len()), 0);
        for (sector, stamp) in (sector..).zip(stamps) {
            self.live[sector] = *stamp;
            self.written.push(Written { sector, stamp: *stamp, after, dropped: None });
        }
        self.lengths.push((self.live.len(), after));
    }

    fn resize(&mut self, op: usize, length: usize) {
        self.live.resize(length, 0);
        self.resizes.push((op, length));
        self.lengths.push((length, op));
        for written in self.written.iter_mut().filter(|written| written.sector >= length) {
            written.dropped.get_or_insert(op);
        }
    }

    /// The journal is durable.
    fn commit(&mut self) {
        let last = self.last_resize(usize::MAX);
        self.durable = self.durable_at(usize::MAX);
        self.written.retain(|written| written.dropped.is_none());
        self.written.iter_mut().for_each(|written| written.after = 0);
        self.lengths.retain(|(_, after)| *after == last);
        self.lengths.iter_mut().for_each(|(_, after)| *after = 0);
        self.resizes.clear();
    }

    /// The file is.
    fn sync(&mut self) {
        *self = Inode { live: self.live.clone(), durable: self.live.clone(), ..Inode::default() };
    }

    /// Whether a power cut may have left this, with the journal durable up to here.
    fn may_be(&self, op: usize, found: &[u64]) -> bool {
        let durable = self.durable_at(op);
        let last = self.last_resize(op);
        let lengths = self.lengths.iter().filter(|(_, after)| *after == last).map(|(length, _)| *length);
        let longest = lengths.fold(durable.len(), usize::max);
        let written = |sector: usize, stamp: u64| {
            self.written.iter().any(|written| {
                (written.sector, written.stamp) == (sector, stamp)
                    && written.after <= op
                    && written.dropped.is_none_or(|dropped| dropped > op)
            })
        };
        (durable.len()..=longest).contains(&found.len())
            && found.iter().enumerate().all(|(sector, stamp)| {
                *stamp == durable.get(sector).copied().unwrap_or(0) || written(sector, *stamp)
            })
    }
}

struct Model {
    inodes: Vec<Inode>,
    /// The names after each operation that is not durable, and first those that are.
    names: Vec<BTreeMap<String, usize>>,
    stamp: u64,
}

impl Model {
    fn live(&self) -> &BTreeMap<String, usize> {
        self.names.last().expect("never empty")
    }

    fn note(&mut self, change: impl FnOnce(&mut BTreeMap<String, usize>)) -> usize {
        let mut names = self.live().clone();
        change(&mut names);
        self.names.push(names);
        self.names.len() - 1
    }

    fn commit(&mut self) {
        self.names = vec![self.live().clone()];
        self.inodes.iter_mut().for_each(Inode::commit);
    }

    /// What was found after a power cut is one of the things that may be. It is what there is from now on.
    fn check_cut(
        &mut self,
        found: &BTreeMap<String, Vec<u64>>,
        lost: Lost,
        exact: bool,
    ) -> Result<(), String> {
        let fits = |(op, names): (usize, &BTreeMap<String, usize>)| {
            names.keys().eq(found.keys())
                && names.iter().all(|(name, inode)| self.inodes[*inode].may_be(op, &found[name]))
        };
        let mut fitting = (0..).zip(&self.names).filter(|(op, names)| fits((*op, names)));
        let last = self.names.len() - 1;
        let right = |op: usize| !exact || last - op == lost.metadata_ops as usize;
        let Some((_, names)) = fitting.find(|(op, _)| right(*op)) else {
            return Err(format!("{found:x?} is none of {:?}", self.names));
        };
        let names = names.clone();
        for (name, inode) in &names {
            self.inodes[*inode].live = found[name].clone();
            self.inodes[*inode].sync();
        }
        self.names = vec![names];
        Ok(())
    }
}

fn bytes(stamps: &[u64]) -> Vec<u8> {
    stamps.iter().flat_map(|stamp| stamp.to_be_bytes().repeat(SECTOR / 8)).collect()
}

fn stamps(bytes: &[u8]) -> Vec<u64> {
    assert!(bytes.len().is_multiple_of(SECTOR), "a length of {}", bytes.len());
    let stamp = |sector: &[u8]| {
        assert!(sector.chunks(8).all(|chunk| chunk == &sector[..8]), "a sector is torn");
        u64::from_be_bytes(sector[..8].try_into().expect("8 bytes"))
    };
    bytes.chunks(SECTOR).map(stamp).collect()
}

fn contents(folder: &Path) -> BTreeMap<String, Vec<u64>> {
    let content = |name: String| (name.clone(), stamps(&fs::read(folder.join(name)).expect("read")));
    names(folder).into_iter().map(content).collect()
}

fn open(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).open(path).expect("opened")
}

fn run(seed: u64) -> Lost {
    let mut chance = StdRng::seed_from_u64(seed);
    // Every other one has little memory, so much is written back and committed early.
    let exact = seed.is_multiple_of(2);
    let dirty_bytes_max = if exact { 1 << 30 } else { 32 << 10 };
    let scene = Scene::with(seed, Options { dirty_bytes_max, threads: 2, ..Options::default() });
    let mut model = Model { inodes: Vec::new(), names: vec![BTreeMap::new()], stamp: 0 };
    let mut lost = Lost::default();
    for step in 0..150 {
        let name = NAMES[chance.random_range(0..NAMES.len())].to_owned();
        let other = NAMES[chance.random_range(0..NAMES.len())].to_owned();
        let (path, other_path) = (scene.at(&name), scene.at(&other));
        let inode = model.live().get(&name).copied();
        match (chance.random_range(0..100), inode) {
            (0..40, None) => {
                create(&path);
                model.inodes.push(Inode::default());
                let inode = model.inodes.len() - 1;
                model.note(|names| _ = names.insert(name, inode));
            }
            (0..45, Some(inode)) => {
                let sector = chance.random_range(0..SECTORS_MAX);
                let count = chance.random_range(1..=(SECTORS_MAX - sector).min(20));
                let stamp = |number| ((inode as u64) << 32) | (model.stamp + number);
                let new: Vec<u64> = (1..=count as u64).map(stamp).collect();
                model.stamp += count as u64;
                open(&path).write_all_at(&bytes(&new), (sector * SECTOR) as u64).expect("written");
                model.inodes[inode].write(sector, &new);
            }
            (45..55, Some(inode)) => {
                let length = chance.random_range(0..SECTORS_MAX);
                open(&path).set_len((length * SECTOR) as u64).expect("resized");
                let op = model.note(|_| ());
                model.inodes[inode].resize(op, length);
            }
            (55..65, Some(inode)) if name != other && model.live().get(&other) != Some(&inode) => {
                fs::rename(&path, &other_path).expect("renamed");
                model.note(|names| {
                    names.remove(&name);
                    names.insert(other, inode);
                });
            }
            (65..70, Some(_)) => {
                fs::remove_file(&path).expect("deleted");
                model.note(|names| _ = names.remove(&name));
            }
            (70..75, Some(inode)) if !model.live().contains_key(&other) => {
                fs::hard_link(&path, &other_path).expect("linked");
                model.note(|names| _ = names.insert(other, inode));
            }
            (75..83, Some(inode)) => {
                open(&path).sync_data().expect("synced");
                model.commit();
                model.inodes[inode].sync();
            }
            (83..85, _) => {
                scene.sync_folder();
                model.commit();
            }
            (85..95, _) => {
                let live = model.live().iter().map(|(name, inode)| (name, &model.inodes[*inode].live));
                let found = contents(scene.disk.path());
                assert!(live.eq(&found), "step {step}: {found:x?} is not what was written");
            }
            (95..100, _) => {
                let cut = scene.disk.power_cut();
                let found = contents(scene.disk.path());
                assert_eq!(found, contents(&scene.backing), "step {step}: the folder is what is served");
                model.check_cut(&found, cut, exact).unwrap_or_else(|why| panic!("step {step}: {why}"));
                lost += cut;
            }
            (_, None | Some(_)) => {}
        }
    }
    lost
}

#[test]
fn whatever_happens_what_was_synced_survives_and_nothing_else_appears() {
    let seeds = match std::env::var("DISK_SEED").ok().and_then(|seed| seed.parse().ok()) {
        Some(seed) => seed..seed + 1,
        None => 0..200,
    };
    let mut lost = Lost::default();
    for seed in seeds {
        lost += std::panic::catch_unwind(|| run(seed)).unwrap_or_else(|panic| {
            eprintln!("replay it with DISK_SEED={seed} cargo test --test model");
            std::panic::resume_unwind(panic)
        });
    }
    println!("{lost:?}");
    assert!(lost.pages > 0 && lost.torn > 0 && lost.metadata_ops > 0, "{lost:?}");
}

//! Slips of operators and old disks: lists that were edited, folders that were emptied, copied or put back. Each is
//! refused with a sentence that says what to do, and nothing that was acknowledged is lost.

use std::fs;
use std::path::Path;
use std::time::Duration;

use rustix::process::Signal;
use troth_protocol::NodeId;
use troth_sdk::harness::processes::{Process, Processes, Shape, free_ports};
use troth_sdk::operator::{CoordinatorChange, FaultPoint, Operator};
use troth_sdk::{Client, Role};
use troth_tests::drill::{Drill, Server};
use troth_tests::ledger::{Findings, Ledger, TIMEOUT, Writers};
use troth_tests::{PATIENCE, eventually, in_time};

/// Clients that write meanwhile.
const CLIENTS: usize = 8;

/// Enough transactions that something must be lost if a folder forgets.
const MANY: usize = 60;

const ONE: Shape = Shape { coordinators: 1, nodes: 3, replicas: 1, shards: 8 };
const THREE: Shape = Shape { coordinators: 3, nodes: 3, replicas: 1, shards: 8 };
const REPLICATED: Shape = Shape { coordinators: 1, nodes: 3, replicas: 3, shards: 4 };

/// A client that does not wait for long.
async fn hasty(cluster: &Processes) -> Client {
    let mut config = cluster.client_config().expect("certificates");
    config.timeout = PATIENCE;
    let client = in_time(Client::connect(config.clone())).await.expect("the cluster is there");
    client.close().await;
    config.timeout = TIMEOUT;
    in_time(Client::connect(config)).await.expect("the cluster is there")
}

/// Lets clients write until so many more are acknowledged.
async fn until_more(writers: &Writers, more: usize) {
    let before = writers.count();
    eventually("transactions are acknowledged", async || writers.count() >= before + more).await;
}

/// Waits until a process has ended by itself, and returns its last words.
async fn until_refused(process: &mut Process) -> String {
    let mut status = None;
    eventually("it ends by itself", async || {
        status = process.ended().expect("it was started");
        status.is_some()
    })
    .await;
    assert_eq!(status.and_then(|status| status.code()), Some(1), "{}", process.name);
    process.last_words().expect("it has a log")
}

fn copy_folder(from: &Path, to: &Path) {
    let _ = fs::remove_dir_all(to);
    fs::create_dir_all(to).expect("writable");
    for entry in fs::read_dir(from).expect("a folder") {
        let path = entry.expect("an entry").path();
        // A table may go while it is copied, as it would with any tool; RocksDB would not open the copy then.
        fs::copy(&path, to.join(path.file_name().expect("a name"))).expect("copied");
    }
}

fn stop(process: &mut Process) {
    assert!(process.stop(PATIENCE).expect("it stops").success(), "{}", process.name);
}

impl Scene {
    fn data(&self, name: &str) -> std::path::PathBuf {
        self.drill.cluster.layout().folder().join("data").join(name)
    }

    async fn start(shape: Shape) -> Scene {
        let folder = tempfile::tempdir().expect("a folder");
        let drill = Drill::start(folder.path(), shape).await;
        Scene { drill, _folder: folder }
    }

    fn coordinator(&mut self, id: usize) -> &mut Process {
        &mut self.drill.cluster.coordinators[id - 1]
    }

    fn participant(&mut self, id: usize) -> &mut Process {
        &mut self.drill.cluster.participants[id - 1]
    }

    /// Everything is served, and nothing that was acknowledged is missing.
    async fn nothing_is_lost(&self, ledgers: &[&Ledger]) {
        self.drill.until_served().await;
        let client = hasty(&self.drill.cluster).await;
        for ledger in ledgers {
            assert!(
                ledger.acknowledged.len() >= MANY,
                "{} acknowledged: this shows nothing",
                ledger.acknowledged.len()
            );
            assert_eq!(ledger.audit(&client).await, Findings::default());
        }
        client.close().await;
    }

    /// A load until so many were acknowledged.
    async fn load(&self, many: usize) -> Ledger {
        let client = hasty(&self.drill.cluster).await;
        let writers = Writers::start(&client, CLIENTS);
        until_more(&writers, many).await;
        let ledger = writers.stop().await;
        client.close().await;
        ledger
    }

    /// Writes another configuration of a server beside its own: elsewhere, and with another folder.
    fn configure_copy(&mut self, role: Role, id: usize, name: &str) -> Process {
        let process = if role == Role::Coordinator { self.coordinator(id) } else { self.participant(id) };
        let (text, own) =
            (fs::read_to_string(process.config()).expect("readable"), format!("data/{role}-{id}\""));
        let port = free_ports(1).expect("a free port")[0];
        let lines = text.lines().map(|line| match line {
            line if line.starts_with("listen") => format!("listen = \"127.0.0.1:{port}\""),
            line => line.replace(&own, &format!("data/{name}\"")),
        });
        let text: Vec<String> = lines.collect();
        let folder = self.drill.cluster.layout().folder().to_owned();
        fs::write(folder.join(format!("{name}.toml")), text.join("\n")).expect("writable");
        self.drill.cluster.beside(role, name).expect("the program is there")
    }
}

/// A cluster in the hands of an operator.
struct Scene {
    drill: Drill,
    _folder: tempfile::TempDir,
}

/// Asks for a change of the coordinators, as soon as somebody leads.
async fn change(operator: &Operator, change: CoordinatorChange) {
    eventually("the leader takes it", async || operator.change_coordinators(change.clone()).await.is_ok())
        .await;
}

async fn members(operator: &Operator) -> Vec<(u64, &'static str)> {
    let members = operator.members().await.unwrap_or_default();
    members.iter().map(|member| (member.id.0, member.state.name())).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_list_of_coordinators_edited_from_one_to_three_founds_no_second_group() {
    let mut scene = Scene::start(ONE).await;
    let first = scene.drill.cluster.addresses()[0].clone();
    let mut addresses = vec![first];
    for _ in 0..2 {
        addresses.push(scene.drill.cluster.add_coordinator().expect("laid out").1);
    }
    // The operator writes all three into all files, with the same words as in the first one.
    let list: String = addresses
        .iter()
        .zip(1..)
        .map(|(address, id)| format!("[[coordinator]]\nid = {id}\naddress = \"{address}\"\n"))
        .collect();
    let text = fs::read_to_string(scene.coordinator(1).config()).expect("readable");
    let (head, section) = text.split_once("[cluster]").expect("it has a section about the cluster");
    for id in 1..=3 {
        let edited = head
            .replace("id = 1\n", &format!("id = {id}\n"))
            .replace(&addresses[0], &addresses[id - 1])
            .replace("coordinator-1", &format!("coordinator-{id}"));
        let section = section.replace("coordinator-1", &format!("coordinator-{id}"));
        fs::write(scene.coordinator(id).config(), format!("{edited}{list}[cluster]{section}"))
            .expect("writable");
    }
    let before = scene.load(MANY).await;
    stop(scene.coordinator(1));
    // First without the one that belongs to the cluster: the two do not agree with it, and wait.
    for id in [2, 3] {
        scene.coordinator(id).start().expect("started");
    }
    scene.coordinator(1).start().expect("started");
    for id in [2, 3] {
        let words = until_refused(scene.coordinator(id)).await;
        assert!(words.contains(&format!("`troth coordinator add {id} {}`", addresses[id - 1])), "{words}");
    }
    scene.drill.until_served().await;
    let log = fs::read_to_string(scene.coordinator(1).log()).expect("readable");
    assert!(log.contains("the configuration lists coordinators 1, 2, 3, and the cluster has 1"), "{log}");

    // The first one dies with decisions that participants have not heard of; the others do not take its place.
    let client = hasty(&scene.drill.cluster).await;
    let writers = Writers::start(&client, CLIENTS);
    until_more(&writers, MANY).await;
    let leader = Server::Coordinator(1);
    scene.drill.hold_all_at(leader, FaultPoint::BeforeFinish).await;
    scene.drill.until_held(leader, FaultPoint::BeforeFinish).await;
    scene.coordinator(1).kill().expect("it runs");
    let during = writers.stop().await;
    client.close().await;
    for id in [2, 3] {
        scene.coordinator(id).start().expect("started");
    }
    scene.participant(2).signal(Signal::STOP).expect("it runs");
    scene.coordinator(1).start().expect("started");
    scene.participant(2).signal(Signal::CONT).expect("it runs");
    for id in [2, 3] {
        until_refused(scene.coordinator(id)).await;
    }
    scene.nothing_is_lost(&[&before, &during]).await;
    // And by the command that was named both come in.
    let add = CoordinatorChange::Add {
        members: vec![(NodeId(2), addresses[1].clone()), (NodeId(3), addresses[2].clone())],
    };
    change(&scene.drill.operator, add).await;
    for id in [2, 3] {
        scene.coordinator(id).start().expect("started");
    }
    eventually("all three vote", async || {
        members(&scene.drill.operator).await == [(1, "voting"), (2, "voting"), (3, "voting")]
    })
    .await;
    scene.coordinator(1).kill().expect("it runs");
    scene.nothing_is_lost(&[&before, &during]).await;
    scene.drill.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_emptied_coordinator_elects_nobody_with_one_that_was_away() {
    let mut scene = Scene::start(THREE).await;
    let Server::Coordinator(leader) = scene.drill.leading_coordinator().await else { unreachable!() };
    let leader = leader as usize;
    let (emptied, away) = (leader % 3 + 1, (leader + 1) % 3 + 1);
    stop(scene.coordinator(away));
    let ledger = scene.load(MANY).await;
    // A power cut; one of the two comes back with a new disk, and with it the one that was away.
    scene.coordinator(leader).kill().expect("it runs");
    scene.coordinator(emptied).kill().expect("it runs");
    fs::remove_dir_all(scene.data(&format!("coordinator-{emptied}"))).expect("removed");
    scene.coordinator(emptied).start().expect("started");
    scene.coordinator(away).start().expect("started");
    let words = until_refused(scene.coordinator(emptied)).await;
    assert!(words.contains(&format!("`troth coordinator replace {emptied}`")), "{words}");
    let operator = scene.drill.operator.clone();
    assert_eq!(operator.status().await.leader(), None, "one of three is no majority");
    // With the one that has everything it goes on, and the command that was named mends the rest.
    scene.coordinator(leader).start().expect("started");
    scene.drill.until_served().await;
    let replace = CoordinatorChange::Replace { id: NodeId(emptied as u64), address: None };
    change(&operator, replace).await;
    let joining = async || members(&operator).await.contains(&(emptied as u64, "joining"));
    eventually("it has lost its vote", joining).await;
    scene.coordinator(emptied).start().expect("started");
    let all = async || members(&operator).await.iter().filter(|(_, state)| *state == "voting").count() == 3;
    eventually("all three vote", all).await;
    scene.coordinator(away).kill().expect("it runs");
    scene.nothing_is_lost(&[&ledger]).await;
    scene.drill.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_only_coordinator_emptied_is_refused_by_the_participants() {
    let mut scene = Scene::start(ONE).await;
    let ledger = scene.load(MANY).await;
    stop(scene.coordinator(1));
    let (data, kept) = (scene.data("coordinator-1"), scene.data("kept"));
    fs::rename(&data, &kept).expect("moved");
    scene.coordinator(1).start().expect("started");
    let words = until_refused(scene.coordinator(1)).await;
    assert!(words.contains("has founded another cluster: participant"), "{words}");
    fs::remove_dir_all(&data).expect("removed");
    fs::rename(&kept, &data).expect("moved back");
    scene.coordinator(1).start().expect("started");
    scene.nothing_is_lost(&[&ledger]).await;
    scene.drill.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_older_copy_of_the_only_coordinator_is_refused_by_the_participants() {
    let mut scene = Scene::start(ONE).await;
    let before = scene.load(MANY).await;
    stop(scene.coordinator(1));
    let (data, older, newest) = (scene.data("coordinator-1"), scene.data("older"), scene.data("newest"));
    copy_folder(&data, &older);
    scene.coordinator(1).start().expect("started");
    let after = scene.load(MANY).await;
    stop(scene.coordinator(1));
    fs::rename(&data, &newest).expect("moved");
    fs::rename(&older, &data).expect("moved");
    scene.coordinator(1).start().expect("started");
    let words = until_refused(scene.coordinator(1)).await;
    assert!(words.contains("is an older copy"), "{words}");
    fs::remove_dir_all(&data).expect("removed");
    fs::rename(&newest, &data).expect("moved back");
    scene.coordinator(1).start().expect("started");
    scene.nothing_is_lost(&[&before, &after]).await;
    scene.drill.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_older_copy_of_one_of_three_coordinators_is_refused_by_the_others() {
    let mut scene = Scene::start(THREE).await;
    let Server::Coordinator(leader) = scene.drill.leading_coordinator().await else { unreachable!() };
    let victim = leader as usize % 3 + 1;
    let name = format!("coordinator-{victim}");
    stop(scene.coordinator(victim));
    let (data, older) = (scene.data(&name), scene.data("older"));
    copy_folder(&data, &older);
    scene.coordinator(victim).start().expect("started");
    let ledger = scene.load(MANY).await;
    // A copy that runs beside its original.
    copy_folder(&older, &scene.data("clone"));
    let mut clone = scene.configure_copy(Role::Coordinator, victim, "clone");
    clone.start().expect("started");
    let words = until_refused(&mut clone).await;
    assert!(words.contains("that this folder does not know"), "{words}");
    let told = scene.drill.operator.status().await;
    let noticed = told
        .up_coordinators()
        .flat_map(|status| &status.notices)
        .any(|notice| notice.what.contains("has ended"));
    assert!(noticed, "{told:?}");
    // And one that takes its place.
    stop(scene.coordinator(victim));
    fs::remove_dir_all(&data).expect("removed");
    fs::rename(&older, &data).expect("moved");
    scene.coordinator(victim).start().expect("started");
    let words = until_refused(scene.coordinator(victim)).await;
    assert!(words.contains(&format!("`troth coordinator replace {victim}`")), "{words}");
    scene.nothing_is_lost(&[&ledger]).await;
    scene.drill.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_older_copy_of_a_participant_is_refused() {
    let mut scene = Scene::start(ONE).await;
    let before = scene.load(MANY).await;
    let (data, older, newest) = (scene.data("participant-1"), scene.data("older"), scene.data("newest"));
    stop(scene.participant(1));
    copy_folder(&data, &older);
    scene.participant(1).start().expect("started");
    let after = scene.load(MANY).await;
    stop(scene.participant(1));
    fs::rename(&data, &newest).expect("moved");
    fs::rename(&older, &data).expect("moved");
    scene.participant(1).start().expect("started");
    let words = until_refused(scene.participant(1)).await;
    assert!(words.contains("the data folder of node 1 is a copy"), "{words}");
    fs::remove_dir_all(&data).expect("removed");
    fs::rename(&newest, &data).expect("moved back");
    scene.participant(1).start().expect("started");
    scene.nothing_is_lost(&[&before, &after]).await;
    scene.drill.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_of_a_participant_that_was_made_while_it_ran_is_refused() {
    let mut scene = Scene::start(ONE).await;
    let before = scene.load(MANY).await;
    let (data, older, newest) = (scene.data("participant-1"), scene.data("older"), scene.data("newest"));
    // As an image of a machine does it: at one instant.
    scene.participant(1).signal(Signal::STOP).expect("it runs");
    copy_folder(&data, &older);
    scene.participant(1).signal(Signal::CONT).expect("it runs");
    let after = scene.load(MANY).await;
    stop(scene.participant(1));
    fs::rename(&data, &newest).expect("moved");
    fs::rename(&older, &data).expect("moved");
    scene.participant(1).start().expect("started");
    let words = until_refused(scene.participant(1)).await;
    assert!(words.contains("the data folder of node 1 is an older copy"), "{words}");
    fs::remove_dir_all(&data).expect("removed");
    fs::rename(&newest, &data).expect("moved back");
    scene.participant(1).start().expect("started");
    scene.nothing_is_lost(&[&before, &after]).await;
    scene.drill.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_of_a_participant_beside_its_original_does_not_vote() {
    let mut scene = Scene::start(REPLICATED).await;
    let before = scene.load(MANY).await;
    stop(scene.participant(1));
    copy_folder(&scene.data("participant-1"), &scene.data("clone"));
    scene.participant(1).start().expect("started");
    scene.drill.until_served().await;
    stop(scene.participant(3));
    let mut clone = scene.configure_copy(Role::Participant, 1, "clone");
    clone.start().expect("started");
    let words = until_refused(&mut clone).await;
    assert!(words.contains("the data folder of node 1 is a copy"), "{words}");
    // Nor one that was made while the original ran, though it comes after all that it has begun.
    scene.participant(1).signal(Signal::STOP).expect("it runs");
    copy_folder(&scene.data("participant-1"), &scene.data("clone"));
    scene.participant(1).signal(Signal::CONT).expect("it runs");
    let after = scene.load(MANY).await;
    clone.start().expect("started");
    let words = until_refused(&mut clone).await;
    assert!(words.contains("is an older copy") || words.contains("runs already"), "{words}");
    // The one that was away and the original are a majority that has everything.
    scene.participant(2).kill().expect("it runs");
    scene.participant(3).start().expect("started");
    scene.nothing_is_lost(&[&before, &after]).await;
    scene.drill.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_folder_without_its_newest_log_and_its_mark_is_refused() {
    let mut scene = Scene::start(ONE).await;
    let ledger = scene.load(MANY).await;
    stop(scene.participant(1));
    let (data, kept) = (scene.data("participant-1"), scene.data("kept"));
    copy_folder(&data, &kept);
    let is_log = |path: &std::path::PathBuf| path.extension().is_some_and(|kind| kind == "log");
    let logs = fs::read_dir(&data).expect("a folder").map(|entry| entry.expect("an entry").path());
    let newest = logs.filter(is_log).max().expect("there is a write-ahead log");
    fs::remove_file(newest).expect("removed");
    fs::remove_file(data.join("synced")).expect("removed");
    for _ in 0..2 {
        scene.participant(1).start().expect("started");
        let words = until_refused(scene.participant(1)).await;
        assert!(words.contains("`synced` is gone or damaged"), "{words}");
    }
    fs::remove_dir_all(&data).expect("removed");
    fs::rename(&kept, &data).expect("moved back");
    scene.participant(1).start().expect("started");
    scene.nothing_is_lost(&[&ledger]).await;
    scene.drill.end().await;
}

/// How long coordinators that found a cluster are watched while one of them is missing.
const A_WHILE: Duration = Duration::from_secs(2);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn founding_asks_for_all_that_are_listed_and_for_the_same_list() {
    let folder = tempfile::tempdir().expect("a folder");
    let shape = Shape { coordinators: 3, nodes: 1, replicas: 1, shards: 4 };
    let mut cluster = Processes::create(folder.path(), troth_tests::programs(), shape).expect("laid out");
    for at in [0, 1] {
        cluster.coordinators[at].start().expect("started");
    }
    let operator = cluster.operator().expect("certificates");
    tokio::time::sleep(A_WHILE).await;
    assert_eq!(operator.status().await.leader(), None, "two of three would be a majority");
    // The third one was told another word.
    let config = cluster.coordinators[2].config().to_owned();
    let text = fs::read_to_string(&config).expect("readable");
    let at = text.find("founding = \"").expect("it has a word") + "founding = \"".len();
    let other = format!("{}0123456789abcdef{}", &text[..at], &text[at + 16..]);
    fs::write(&config, other).expect("writable");
    cluster.coordinators[2].start().expect("started");
    let words = until_refused(&mut cluster.coordinators[2]).await;
    assert!(words.contains("`cluster.founding` must be the same"), "{words}");
    fs::write(&config, text).expect("writable");
    for process in &mut cluster.coordinators {
        // The others may have heard of the wrong word before the third one ended, and then they have ended too.
        if process.ended().map_or(true, |ended| ended.is_some()) {
            process.start().expect("started");
        }
    }
    eventually("a coordinator leads", async || operator.status().await.leader().is_some()).await;
    operator.close().await;
}

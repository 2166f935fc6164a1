//! Slips of operators and old disks: lists that were edited, folders that were emptied, copied or put back. Each is
//! refused with a sentence that says what to do, and nothing that was acknowledged is lost.

use std::fs;
use std::time::Duration;

use rustix::process::Signal;
use troth_protocol::NodeId;
use troth_protocol::mutation::Bug;
use troth_sdk::Role;
use troth_sdk::harness::processes::{Processes, Shape};
use troth_sdk::operator::{CoordinatorChange, FaultPoint};
use troth_tests::drill::Server;
use troth_tests::eventually;
use troth_tests::hands::{
    CLIENTS, MANY, ONE, REPLICATED, Scene, THREE, change, copy_folder, emptied_coordinator, hasty, members,
    older_copy, stop, until_more, until_refused,
};
use troth_tests::ledger::{Findings, Writers};

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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn servers_that_accept_an_older_copy_are_found() {
    assert_eq!(older_copy(None).await, None, "without the bug it is refused");
    let findings = older_copy(Some(Bug::AcceptsAnOlderCopy)).await.expect("with the bug it is not");
    assert!(findings != Findings::default(), "the ledger shows it");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn servers_that_form_a_group_from_an_empty_folder_are_found() {
    assert_eq!(emptied_coordinator(None).await, None, "without the bug it is refused");
    let bug = Bug::FormsAGroupFromAnEmptyFolder;
    let findings = emptied_coordinator(Some(bug)).await.expect("with the bug it is not");
    assert!(findings != Findings::default(), "the ledger shows it");
}

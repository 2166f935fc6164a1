//! Finding leaders, over a network in memory whose members follow scripts.

mod members;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Barrier;
use tokio::task::JoinSet;
use tokio::time::Instant;
use troth_protocol::message::shard;
use troth_protocol::net::{CallError, Peer};
use troth_protocol::routing::{Resend, RouteError};
use troth_protocol::{MapEpoch, NodeId, Reject};

use members::Step::{self, Answer, Hang, Refuse};
use members::{Scene, blocked, map, not_leader, overloaded, stale_map};

/// How long a call may take in which nothing goes wrong for good.
const LONG: Duration = Duration::from_secs(10);

/// A call that succeeds after asking these, in this order.
async fn check(scripts: &[(&str, &[Step])], resend: Resend, asked: &str) {
    let scene = Scene::new(scripts);
    let answer = scene.ask_shard(resend, LONG).await;
    assert_eq!(answer, Ok(shard::Response::Finished), "after {}", scene.asked());
    assert_eq!(scene.asked(), asked);
}

/// A call that fails with this after asking these.
async fn check_fails(scripts: &[(&str, &[Step])], resend: Resend, asked: &str, error: &RouteError) {
    let scene = Scene::new(scripts);
    let answer = scene.ask_shard(resend, Duration::from_millis(500)).await;
    assert_eq!(answer.as_ref(), Err(error), "after {}", scene.asked());
    assert_eq!(scene.asked(), asked, "{error}");
}

const BOTH: [Resend; 2] = [Resend::Idempotent, Resend::OnlyUnsent];

#[tokio::test]
async fn redirects_are_followed_and_remembered() {
    let scene = Scene::new(&[("n1", &[not_leader(3)]), ("n2", &[Answer]), ("n3", &[Answer])]);
    for asked in ["n1 n3", "n3", "n3"] {
        let answer = scene.ask_shard(Resend::OnlyUnsent, LONG).await;
        assert_eq!(answer, Ok(shard::Response::Finished));
        assert_eq!(scene.asked(), asked);
    }
}

#[tokio::test]
async fn without_a_hint_the_others_are_asked_in_turn() {
    for resend in BOTH {
        let nobody = &[not_leader(None)][..];
        check(&[("n1", nobody), ("n2", nobody), ("n3", &[Answer])], resend, "n1 n2 n3").await;
        // A hint to somebody the map does not know is none.
        check(&[("n1", &[not_leader(9)]), ("n2", &[Answer])], resend, "n1 n2").await;
        // An election under way: all of them again, until one has won.
        let later = &[not_leader(None), Answer][..];
        check(&[("n1", later), ("n2", nobody)], resend, "n1 n2 n1").await;
    }
}

#[tokio::test]
async fn whoever_is_not_there_is_passed_over() {
    for resend in BOTH {
        check(&[("n1", &[]), ("n2", &[Answer]), ("c1", &[Answer])], resend, "c1 n2").await;
        let stopping = &[Refuse(Reject::ShuttingDown)][..];
        check(&[("n1", stopping), ("n2", &[Answer])], resend, "n1 n2").await;
        // A leader that is named and gone.
        let scripts = [("n1", &[not_leader(2), Answer][..]), ("n2", &[])];
        check(&scripts, resend, "n1 n1").await;
    }
}

#[tokio::test]
async fn a_member_that_names_a_dead_leader_does_not_hide_the_living_one() {
    let scripts: [(&str, &[Step]); 4] =
        [("n1", &[not_leader(4)]), ("n2", &[Answer]), ("n3", &[not_leader(None)]), ("n4", &[])];
    check(&scripts, Resend::Idempotent, "n1 n2").await;
}

#[tokio::test]
async fn members_that_name_each_other_are_not_asked_without_a_pause() {
    let scene = Scene::new(&[("n1", &[not_leader(2)]), ("n2", &[not_leader(1)])]);
    let error = scene.ask_shard(Resend::Idempotent, Duration::from_millis(500)).await;
    let error = error.expect_err("nobody leads");
    assert!(matches!(error.reject(), Some(Reject::NotLeader { .. })), "{error}");
    let asked = scene.asked().split(' ').count();
    assert!((4..60).contains(&asked), "asked {asked} times in half a second");
}

#[tokio::test]
async fn a_redirect_that_many_callers_are_given_serves_them_all() {
    const CALLERS: usize = 50;
    let together =
        Step::RefuseTogether(Arc::new(Barrier::new(CALLERS)), Reject::NotLeader { leader: Some(NodeId(3)) });
    let scene = Scene::new(&[("n1", &[together]), ("n2", &[not_leader(3)]), ("n3", &[Answer])]);
    let scene = Arc::new(scene);
    let mut calls = JoinSet::new();
    for _ in 0..CALLERS {
        let scene = scene.clone();
        calls.spawn(async move { scene.ask_shard(Resend::Idempotent, LONG).await });
    }
    for answer in calls.join_all().await {
        assert_eq!(answer, Ok(shard::Response::Finished));
    }
    let asked = scene.asked();
    let count = |name: &str| asked.split(' ').filter(|&asked| asked == name).count();
    assert_eq!((count("n1"), count("n2"), count("n3")), (CALLERS, 0, CALLERS));
}

#[tokio::test]
async fn a_refusal_that_comes_late_does_not_undo_what_others_found_meanwhile() {
    let barrier = Arc::new(Barrier::new(2));
    let late = Step::RefuseTogether(barrier.clone(), Reject::NotLeader { leader: None });
    let scene = Arc::new(Scene::new(&[("n1", &[late, not_leader(3)]), ("n2", &[Answer]), ("n3", &[Answer])]));
    let ask = async |scene: Arc<Scene>| scene.ask_shard(Resend::Idempotent, LONG).await;
    let mut slow = Box::pin(ask(scene.clone()));
    let quick = async {
        scene.until_asked(1).await;
        let answer = ask(scene.clone()).await;
        barrier.wait().await;
        answer
    };
    let (slow, quick) = tokio::join!(&mut slow, quick);
    assert_eq!((slow, quick), (Ok(shard::Response::Finished), Ok(shard::Response::Finished)));
    assert_eq!(scene.asked(), "n1 n1 n3 n3");
}

#[tokio::test]
async fn a_stale_map_is_refreshed_from_a_coordinator() {
    let fresh = Step::Map(map(2, &[2], &[1]));
    let scripts: [(&str, &[Step]); 2] = [("c1", &[fresh]), ("n2", &[Answer])];
    let with_old_map = |extra: (&'static str, &[Step])| {
        let [first, second] = scripts;
        let scene = Scene::without_map(&[first, second, extra]);
        scene.router.learn(map(1, &[1], &[1]));
        scene
    };
    let check = async |scene: Scene, asked: &str| {
        let answer = scene.ask_shard(Resend::OnlyUnsent, LONG).await;
        assert_eq!(answer, Ok(shard::Response::Finished), "after {}", scene.asked());
        assert_eq!(scene.asked(), asked);
        assert_eq!(scene.router.map().epoch, MapEpoch(2));
        scene.router.learn(map(1, &[1], &[1]));
        assert_eq!(scene.router.map().epoch, MapEpoch(2), "an older map is not learned");
    };
    check(with_old_map(("n1", &[stale_map()])), "n1 c1 n2").await;
    let wrong_node = Refuse(Reject::WrongNode { actual: NodeId(5) });
    check(with_old_map(("n1", &[wrong_node])), "n1 c1 n2").await;
    // The node has gone with its shards.
    check(with_old_map(("n1", &[])), "c1 n2").await;
    // Nothing is known yet.
    check(Scene::without_map(&scripts), "c1 n2").await;
}

#[tokio::test]
async fn a_coordinator_that_never_answers_does_not_keep_the_map_stale() {
    let fresh = Step::Map(map(2, &[2], &[1, 2]));
    let scene =
        Scene::without_map(&[("c1", &[Hang]), ("c2", &[fresh]), ("n1", &[stale_map()]), ("n2", &[Answer])]);
    scene.router.learn(map(1, &[1], &[1, 2]));
    let answer = scene.ask_shard(Resend::Idempotent, Duration::from_secs(2)).await;
    assert_eq!(answer, Ok(shard::Response::Finished), "after {}", scene.asked());
}

#[tokio::test]
async fn a_refresh_waits_for_another_no_longer_than_its_deadline() {
    let scene = Scene::new(&[("c1", &[Hang]), ("n1", &[stale_map()])]);
    let router = scene.router.clone();
    let patient = tokio::spawn(async move { router.refresh_map(Instant::now() + LONG).await });
    let answer = scene.ask_shard(Resend::Idempotent, Duration::from_millis(300)).await;
    let stale = Reject::StaleMap { epoch: MapEpoch(2) };
    assert_eq!(answer, Err(RouteError::Rejected(stale)));
    assert!(!patient.is_finished(), "it was in the way all the time");
    patient.abort();
}

#[tokio::test]
async fn a_busy_leader_is_waited_for_as_long_as_it_asks_unless_others_wait_meanwhile() {
    let since = Instant::now();
    let scripts: [(&str, &[Step]); 2] = [("n1", &[overloaded(150), Answer]), ("n2", &[Answer])];
    check(&scripts, Resend::Idempotent, "n1 n1").await;
    let waited = since.elapsed();
    assert!(waited >= Duration::from_millis(150), "{waited:?}");
    let busy = RouteError::Rejected(Reject::Overloaded { retry_after_millis: 150 });
    check_fails(&scripts, Resend::OnlyUnsent, "n1", &busy).await;
    for resend in BOTH {
        check(&[("n1", &[blocked(), blocked(), Answer]), ("n2", &[Answer])], resend, "n1 n1 n1").await;
    }
}

#[tokio::test]
async fn many_callers_in_trouble_do_not_add_to_it() {
    const CALLERS: usize = 200;
    let nobody = &[not_leader(None)][..];
    let scene = Arc::new(Scene::new(&[("n1", nobody), ("n2", nobody), ("n3", nobody)]));
    let mut calls = JoinSet::new();
    for _ in 0..CALLERS {
        let scene = scene.clone();
        // So short that the longest pause is too long: only quick attempts are counted.
        calls.spawn(async move { scene.ask_shard(Resend::Idempotent, Duration::from_millis(90)).await });
    }
    for answer in calls.join_all().await {
        answer.expect_err("nobody leads");
    }
    let asked = scene.asked().split(' ').count();
    // A budget of ten a second over ten seconds, and a fifth of the calls.
    assert!((CALLERS + 50..=CALLERS + 150).contains(&asked), "{asked} attempts of {CALLERS} calls");
}

#[tokio::test]
async fn what_may_have_happened_is_repeated_only_if_that_is_harmless() {
    let deposed = [("n1", &[Refuse(Reject::Deposed)][..]), ("n2", &[Answer])];
    check(&deposed, Resend::Idempotent, "n1 n2").await;
    check_fails(&deposed, Resend::OnlyUnsent, "n1", &RouteError::Rejected(Reject::Deposed)).await;

    let late = [("n1", &[Refuse(Reject::DeadlineExceeded)][..]), ("n2", &[Answer])];
    check(&late, Resend::Idempotent, "n1 n2").await;
    let error = RouteError::Rejected(Reject::DeadlineExceeded);
    check_fails(&late, Resend::OnlyUnsent, "n1", &error).await;

    let silent = [("n1", &[Hang][..]), ("n2", &[Answer]), ("c1", &[Answer])];
    check(&silent, Resend::Idempotent, "n1 c1 n2").await;
    let error = RouteError::Call(CallError::DeadlineExceeded { peer: Peer::participant("n1") });
    check_fails(&silent, Resend::OnlyUnsent, "n1", &error).await;
    assert!(error.is_ambiguous());
}

#[tokio::test]
async fn a_silent_leader_is_given_up_as_soon_as_another_leads() {
    let scripts = |second: Step| [("n1", vec![Hang]), ("n2", vec![second]), ("n3", vec![not_leader(2)])];
    let ask = async |scripts: &[(&str, Vec<Step>)], resend| {
        let scripts: Vec<(&str, &[Step])> = scripts.iter().map(|(name, steps)| (*name, &steps[..])).collect();
        let scene = Scene::new(&scripts);
        let since = Instant::now();
        let answer = scene.ask_shard(resend, Duration::from_millis(1500)).await;
        (answer, scene.asked(), since.elapsed())
    };
    let (answer, asked, took) = ask(&scripts(Step::Lead), Resend::Idempotent).await;
    assert_eq!((answer, asked.as_str()), (Ok(shard::Response::Finished), "n1 n2"));
    assert!(took < Duration::from_millis(1000), "{took:?}");

    // What may have happened is not repeated, but the caller learns at once that it must ask.
    let (answer, asked, took) = ask(&scripts(Step::Lead), Resend::OnlyUnsent).await;
    assert!(answer.is_err_and(|error| error.is_ambiguous()) && asked == "n1");
    assert!(took < Duration::from_millis(1000), "{took:?}");

    // Nobody else leads: it may still answer.
    let alone = [("n1", vec![Hang]), ("n2", vec![not_leader(1)]), ("n3", vec![Hang])];
    let (answer, asked, took) = ask(&alone, Resend::OnlyUnsent).await;
    assert!(answer.is_err() && asked == "n1" && took >= Duration::from_millis(1500), "{took:?}");
}

#[tokio::test]
async fn what_no_retry_can_mend_is_not_retried() {
    let too_large = Reject::TooLarge { reason: "x".into() };
    let forbidden = Reject::Forbidden { role: "client".into(), request: "Finish".into() };
    let internal = Reject::Internal { reason: "disk".into() };
    for reject in [internal, too_large, forbidden, Reject::malformed("x"), Reject::SnapshotTooOld] {
        for resend in BOTH {
            let scripts = [("n1", &[Refuse(reject.clone())][..]), ("n2", &[Answer])];
            check_fails(&scripts, resend, "n1", &RouteError::Rejected(reject.clone())).await;
        }
    }
    let scene = Scene::new(&[("c1", &[Step::WrongAnswer])]);
    assert_eq!(scene.ask_coordinator(LONG).await, Err(RouteError::WrongAnswer));
}

#[tokio::test]
async fn everything_ends_by_the_deadline_with_the_last_error() {
    let patience = Duration::from_millis(300);
    let check = async |scripts: &[(&str, &[Step])], expected: &str| {
        for resend in BOTH {
            let scene = Scene::new(scripts);
            let error = scene.ask_shard(resend, patience).await.expect_err(expected);
            assert_eq!(error.to_string(), expected, "{resend:?}");
        }
    };
    check(&[("n1", &[not_leader(None)])], "not the leader").await;
    check(&[("n1", &[not_leader(1)])], "not the leader; node 1 is").await;
    check(&[("n1", &[])], "participant at n1 cannot be reached: nobody is there").await;
    check(&[("n1", &[Hang])], "participant at n1 did not answer before the deadline").await;
    check(&[("n1", &[overloaded(60_000)])], "overloaded; try again in 60000 ms").await;
    check(&[], "no member of the shard 0 is known").await;
    check(&[("c1", &[Hang])], "no member of the shard 0 is known").await;
}

#[tokio::test]
async fn coordinators_are_found_through_seeds_redirects_and_maps() {
    // By the seed alone; it redirects, but to nobody this router knows.
    let scene = Scene::without_map(&[("c1", &[not_leader(2), Answer])]);
    scene.ask_coordinator(LONG).await.expect("the seed leads in the end");
    assert_eq!(scene.asked(), "c1 c1");
    // By a map in which the seed is not any more.
    let scene = Scene::without_map(&[("c2", &[not_leader(3)]), ("c3", &[Answer])]);
    scene.router.learn(map(1, &[], &[2, 3]));
    scene.ask_coordinator(LONG).await.expect("c3 leads");
    assert_eq!(scene.asked(), "c2 c3");
    // By the seed, because all of the map are gone.
    let scene = Scene::without_map(&[("c1", &[Answer])]);
    scene.router.learn(map(1, &[], &[2, 3]));
    scene.ask_coordinator(LONG).await.expect("the seed leads");
    assert_eq!(scene.asked(), "c1");
}

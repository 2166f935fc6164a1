//! The scripts, and what each step leads to.

use expect_test::expect;

use super::check;

#[test]
fn a_commit_is_answered_when_it_is_decided_and_forgotten_when_all_have_applied_it() {
    check(
        "cluster shards=2
         apply
         now
         commit #1 T1 epoch=1 s0 s1
         vote T1 s1 yes above=7
         vote T1 s0 yes above=3
         resolve T1
         apply
         resolve T1
         now
         delivered s0
         failed s1
         delivered s1
         time +100ms
         lose
         time +100ms
         apply
         time +100ms
         outcome #2 T1 s0 s1",
        expect![[r#"
            cluster shards=2
                epoch 1
            apply
            now
                1
            commit #1 T1 epoch=1 s0 s1
                prepare T1 at s0, epoch 1, floor 1
                prepare T1 at s1, epoch 1, floor 1
            vote T1 s1 yes above=7
            vote T1 s0 yes above=3
                propose commit of T1 at 8
            resolve T1
                T1: in flight
            apply
                #1: committed at 8
                finish at s0: T1 commit@8
                finish at s1: T1 commit@8
            resolve T1
                T1: committed at 8
            now
                9
            delivered s0
            failed s1
                finish at s1: T1 commit@8
            delivered s1
            time +100ms
                propose to forget T1
            lose
                1 proposals lost
            time +100ms
                propose to forget T1
            apply
            time +100ms
            outcome #2 T1 s0 s1
                #2: committed at 8
        "#]],
    );
}

#[test]
fn one_no_aborts_at_once_and_nothing_is_logged() {
    check(
        "cluster shards=3
         apply
         now
         commit #1 T1 epoch=1 s0 s1 s2
         vote T1 s0 yes
         vote T1 s1 no
         vote T1 s2 yes
         commit #2 T1 epoch=1 s0 s1 s2
         resolve T1
         failed s0
         delivered s1",
        expect![[r#"
            cluster shards=3
                epoch 1
            apply
            now
                1
            commit #1 T1 epoch=1 s0 s1 s2
                prepare T1 at s0, epoch 1, floor 1
                prepare T1 at s1, epoch 1, floor 1
                prepare T1 at s2, epoch 1, floor 1
            vote T1 s0 yes
            vote T1 s1 no
                #1: aborted: key k is locked by transaction 999
                finish at s0: T1 abort
                finish at s1: T1 abort
                finish at s2: T1 abort
            vote T1 s2 yes
            commit #2 T1 epoch=1 s0 s1 s2
                #2: aborted: its outcome was asked for before it was decided
            resolve T1
                T1: aborted
            failed s0
            delivered s1
        "#]],
    );
}

#[test]
fn votes_that_do_not_come_in_time_abort() {
    check(
        "cluster shards=2
         apply
         now
         now
         commit #1 T1 epoch=1 s0 s1
         vote T1 s0 yes
         time +4900ms
         time +100ms
         commit #2 T2 epoch=1 s0 s1
         vote T2 s0 none",
        expect![[r#"
            cluster shards=2
                epoch 1
            apply
            now
                1
            now
                2
            commit #1 T1 epoch=1 s0 s1
                prepare T1 at s0, epoch 1, floor 2
                prepare T1 at s1, epoch 1, floor 2
            vote T1 s0 yes
            time +4900ms
            time +100ms
                #1: aborted: shard 1 did not vote before the deadline
                finish at s0: T1 abort
                finish at s1: T1 abort
            commit #2 T2 epoch=1 s0 s1
                prepare T2 at s0, epoch 1, floor 2
                prepare T2 at s1, epoch 1, floor 2
            vote T2 s0 none
                #2: aborted: shard 0 did not vote before the deadline
                finish at s0: T2 abort
                finish at s1: T2 abort
        "#]],
    );
}

#[test]
fn a_resubmission_is_never_started() {
    check(
        "cluster shards=2
         apply
         now
         now
         commit #1 T1 epoch=1 s0 s1 again
         commit #2 T1 epoch=1 s0 s1
         apply
         commit #3 T1 epoch=1 s0 s1
         commit #4 T2 epoch=1 s0 s1
         commit #5 T2 epoch=1 s0 s1 again
         vote T2 s0 yes
         vote T2 s1 yes
         apply
         commit #6 T2 epoch=1 s0 s1 again",
        expect![[r#"
            cluster shards=2
                epoch 1
            apply
            now
                1
            now
                2
            commit #1 T1 epoch=1 s0 s1 again
                propose that T1 never commits
            commit #2 T1 epoch=1 s0 s1
            apply
                #1: aborted: the coordinator leader changed before the decision
                #2: aborted: the coordinator leader changed before the decision
            commit #3 T1 epoch=1 s0 s1
                #3: aborted: its outcome was asked for before it was decided
            commit #4 T2 epoch=1 s0 s1
                prepare T2 at s0, epoch 1, floor 2
                prepare T2 at s1, epoch 1, floor 2
            commit #5 T2 epoch=1 s0 s1 again
            vote T2 s0 yes
            vote T2 s1 yes
                propose commit of T2 at 3
            apply
                #4: committed at 3
                #5: committed at 3
                finish at s0: T2 commit@3
                finish at s1: T2 commit@3
            commit #6 T2 epoch=1 s0 s1 again
                #6: committed at 3
        "#]],
    );
}

#[test]
fn the_leader_dies_after_the_decision_and_the_next_one_finishes_it() {
    check(
        "cluster shards=2
         apply
         now
         commit #1 T1 epoch=1 s0 s1
         vote T1 s0 yes
         vote T1 s1 yes
         apply
         restart
         lead
         commit #2 T1 epoch=1 s0 s1 again
         page s0 T1
         delivered s0
         delivered s1
         time +100ms
         apply
         page s1 T1",
        expect![[r#"
            cluster shards=2
                epoch 1
            apply
            now
                1
            commit #1 T1 epoch=1 s0 s1
                prepare T1 at s0, epoch 1, floor 1
                prepare T1 at s1, epoch 1, floor 1
            vote T1 s0 yes
            vote T1 s1 yes
                propose commit of T1 at 2
            apply
                #1: committed at 2
                finish at s0: T1 commit@2
                finish at s1: T1 commit@2
            restart
                1 unfinished, ceiling 1572864000
            lead
                epoch 5
                collect from s0
                collect from s1
                finish at s0: T1 commit@2
                finish at s1: T1 commit@2
            commit #2 T1 epoch=1 s0 s1 again
                #2: committed at 2
            page s0 T1
            delivered s0
            delivered s1
            time +100ms
                propose to forget T1
            apply
            page s1 T1
                finish at s1: T1 commit@2
        "#]],
    );
}

#[test]
fn the_leader_dies_before_the_decision_and_the_next_one_aborts() {
    check(
        "cluster shards=2
         apply
         now
         commit #1 T1 epoch=1 s0 s1
         vote T1 s0 yes
         vote T1 s1 yes
         lose
         restart
         lead
         page s0 T1 more
         page s1 T1
         page s0
         commit #2 T1 epoch=1 s0 s1 again
         commit #3 T1 epoch=4 s0 s1
         apply",
        expect![[r#"
            cluster shards=2
                epoch 1
            apply
            now
                1
            commit #1 T1 epoch=1 s0 s1
                prepare T1 at s0, epoch 1, floor 1
                prepare T1 at s1, epoch 1, floor 1
            vote T1 s0 yes
            vote T1 s1 yes
                propose commit of T1 at 2
            lose
                1 proposals lost
            restart
                0 unfinished, ceiling 1572864000
            lead
                epoch 4
                collect from s0
                collect from s1
            page s0 T1 more
                collect from s0 after T1
                finish at s0: T1 abort
            page s1 T1
                finish at s1: T1 abort
            page s0
            commit #2 T1 epoch=1 s0 s1 again
                propose that T1 never commits
            commit #3 T1 epoch=4 s0 s1
            apply
                #2: aborted: the coordinator leader changed before the decision
                #3: aborted: the coordinator leader changed before the decision
        "#]],
    );
}

#[test]
fn what_a_deposed_leader_proposed_is_void() {
    check(
        "cluster shards=2
         apply
         now
         commit #1 T1 epoch=1 s0 s1
         vote T1 s0 yes
         vote T1 s1 yes
         lead
         commit #2 T1 epoch=4 s0 s1 again
         apply
         commit #3 T1 epoch=1 s0 s1",
        expect![[r#"
            cluster shards=2
                epoch 1
            apply
            now
                1
            commit #1 T1 epoch=1 s0 s1
                prepare T1 at s0, epoch 1, floor 1
                prepare T1 at s1, epoch 1, floor 1
            vote T1 s0 yes
            vote T1 s1 yes
                propose commit of T1 at 2
            lead
                epoch 4
                collect from s0
                collect from s1
            commit #2 T1 epoch=4 s0 s1 again
                propose that T1 never commits
            apply
                #2: aborted: the coordinator leader changed before the decision
            commit #3 T1 epoch=1 s0 s1
                #3: refused: the coordinator leader is in epoch 4
        "#]],
    );
}

#[test]
fn a_fence_stands_in_the_way_of_a_decision() {
    check(
        "cluster shards=2
         apply
         now
         outcome #1 T1 s0 s1
         lead
         commit #2 T1 epoch=4 s0 s1
         apply
         vote T1 s0 yes
         vote T1 s1 yes
         apply
         commit #3 T1 epoch=4 s0 s1
         restart
         lead
         apply
         commit #4 T1 epoch=8 s0 s1",
        expect![[r#"
            cluster shards=2
                epoch 1
            apply
            now
                1
            outcome #1 T1 s0 s1
                propose that T1 never commits
            lead
                epoch 4
                collect from s0
                collect from s1
            commit #2 T1 epoch=4 s0 s1
                prepare T1 at s0, epoch 4, floor 1572864000
                prepare T1 at s1, epoch 4, floor 1572864000
            apply
            vote T1 s0 yes
            vote T1 s1 yes
                propose commit of T1 at 1572864001
            apply
                #2: aborted: its outcome was asked for before it was decided
                finish at s0: T1 abort
                finish at s1: T1 abort
            commit #3 T1 epoch=4 s0 s1
                #3: aborted: its outcome was asked for before it was decided
            restart
                0 unfinished, ceiling 3145728000
            lead
                epoch 8
                collect from s0
                collect from s1
            apply
            commit #4 T1 epoch=8 s0 s1
                #4: aborted: its outcome was asked for before it was decided
        "#]],
    );
}

#[test]
fn a_first_submission_of_what_is_decided_gets_the_same_answer() {
    check(
        "cluster shards=2
         apply
         now
         commit #1 T1 epoch=1 s0 s1
         vote T1 s0 yes
         vote T1 s1 yes
         apply
         commit #2 T1 epoch=1 s0 s1
         delivered s0
         delivered s1
         time +100ms
         apply
         commit #3 T1 epoch=1 s0 s1",
        expect![[r#"
            cluster shards=2
                epoch 1
            apply
            now
                1
            commit #1 T1 epoch=1 s0 s1
                prepare T1 at s0, epoch 1, floor 1
                prepare T1 at s1, epoch 1, floor 1
            vote T1 s0 yes
            vote T1 s1 yes
                propose commit of T1 at 2
            apply
                #1: committed at 2
                finish at s0: T1 commit@2
                finish at s1: T1 commit@2
            commit #2 T1 epoch=1 s0 s1
                #2: committed at 2
            delivered s0
            delivered s1
            time +100ms
                propose to forget T1
            apply
            commit #3 T1 epoch=1 s0 s1
                #3: committed at 2
        "#]],
    );
}

#[test]
fn one_shard_commits_by_itself_and_time_covers_it_before_anybody_hears() {
    check(
        "cluster shards=2
         apply
         now
         now
         commit #1 T1 epoch=1 s0
         resolve T1
         one T1 s0 committed@40
         now
         commit #2 T2 epoch=1 s1
         one T2 s1 committed@9999999999
         apply
         now",
        expect![[r#"
            cluster shards=2
                epoch 1
            apply
            now
                1
            now
                2
            commit #1 T1 epoch=1 s0
                let s0 commit T1, floor 2
            resolve T1
                T1: in flight
            one T1 s0 committed@40
                #1: committed at 40
            now
                41
            commit #2 T2 epoch=1 s1
                let s1 commit T2, floor 41
            one T2 s1 committed@9999999999
            apply
                #2: committed at 9999999999
            now
                10000000000
        "#]],
    );
}

#[test]
fn a_shard_that_does_not_answer_is_asked_until_it_does() {
    check(
        "cluster shards=2
         apply
         now
         commit #1 T1 epoch=1 s0
         one T1 s0 unknown
         one T1 s0 unknown
         commit #2 T1 epoch=1 s0 again
         one T1 s0 aborted",
        expect![[r#"
            cluster shards=2
                epoch 1
            apply
            now
                1
            commit #1 T1 epoch=1 s0
                let s0 commit T1, floor 1
            one T1 s0 unknown
                ask s0 about T1
            one T1 s0 unknown
                ask s0 about T1
            commit #2 T1 epoch=1 s0 again
            one T1 s0 aborted
                #1: aborted: its outcome was asked for before it was decided
                #2: aborted: its outcome was asked for before it was decided
        "#]],
    );
}

#[test]
fn a_shard_that_had_nothing_to_do_with_a_transaction_does_not_say_how_it_ended() {
    check(
        "cluster shards=2
         lead
         apply
         now
         outcome #1 T1
         apply
         one T1 s1 committed@2
         outcome #2 T1 s1
         one T1 s0 aborted
         one T1 s1 committed@2",
        expect![[r#"
            cluster shards=2
                epoch 1
            lead
                epoch 3
                collect from s0
                collect from s1
            apply
            now
                1
            outcome #1 T1
                propose that T1 never commits
            apply
                ask s0 about T1
                ask s1 about T1
            one T1 s1 committed@2
                #1: committed at 2
            outcome #2 T1 s1
                ask s1 about T1
            one T1 s0 aborted
            one T1 s1 committed@2
                #2: committed at 2
        "#]],
    );
}

#[test]
fn a_stranger_asks_about_a_transaction_of_unknown_participants() {
    check(
        "cluster shards=2
         apply
         now
         outcome #1 T1
         apply
         one T1 s0 aborted
         one T1 s1 aborted
         commit #2 T1 epoch=1 s0
         now
         outcome #3 T2
         apply
         one T2 s1 committed@5
         outcome #4 T77
         outcome #5 T1 s9
         now
         outcome #6 T3
         apply
         one T3 s0 expired
         one T3 s1 aborted",
        expect![[r#"
            cluster shards=2
                epoch 1
            apply
            now
                1
            outcome #1 T1
                propose that T1 never commits
            apply
                ask s0 about T1
                ask s1 about T1
            one T1 s0 aborted
            one T1 s1 aborted
                #1: aborted: its outcome was asked for before it was decided
            commit #2 T1 epoch=1 s0
                #2: aborted: its outcome was asked for before it was decided
            now
                2
            outcome #3 T2
                propose that T2 never commits
            apply
                ask s0 about T2
                ask s1 about T2
            one T2 s1 committed@5
                #3: committed at 5
            outcome #4 T77
                #4: refused: malformed request: transaction 77 begins in the future
            outcome #5 T1 s9
                #5: refused: malformed request: transaction 1 names a shard that is not
            now
                6
            outcome #6 T3
                propose that T3 never commits
            apply
                ask s0 about T3
                ask s1 about T3
            one T3 s0 expired
            one T3 s1 aborted
                #6: expired
        "#]],
    );
}

#[test]
fn too_much_and_nonsense_are_refused() {
    check(
        "cluster shards=2
         apply
         now
         now
         now
         now
         commit #1 T1 epoch=1 s0 s1
         commit #2 T2 epoch=1 s0 s1
         commit #3 T3 epoch=1 s0 s1
         commit #4 T4 epoch=1 s0 s1
         commit #5 T5 epoch=1 s0 s1
         commit #6 T4 epoch=1 s0 s9
         commit #7 T4 epoch=1 s0 s0
         commit #8 T4 epoch=1
         commit #9 T4 epoch=0 s0 s1",
        expect![[r#"
            cluster shards=2
                epoch 1
            apply
            now
                1
            now
                2
            now
                3
            now
                4
            commit #1 T1 epoch=1 s0 s1
                prepare T1 at s0, epoch 1, floor 4
                prepare T1 at s1, epoch 1, floor 4
            commit #2 T2 epoch=1 s0 s1
                prepare T2 at s0, epoch 1, floor 4
                prepare T2 at s1, epoch 1, floor 4
            commit #3 T3 epoch=1 s0 s1
                prepare T3 at s0, epoch 1, floor 4
                prepare T3 at s1, epoch 1, floor 4
            commit #4 T4 epoch=1 s0 s1
                #4: refused: overloaded; try again in 20 ms
            commit #5 T5 epoch=1 s0 s1
                #5: refused: malformed request: transaction 5 begins in the future
            commit #6 T4 epoch=1 s0 s9
                #6: refused: malformed request: transaction 4 names a shard that is not
            commit #7 T4 epoch=1 s0 s0
                #7: refused: malformed request: transaction 4 names a participant twice
            commit #8 T4 epoch=1
                #8: refused: malformed request: transaction 4 has no participants
            commit #9 T4 epoch=0 s0 s1
                #9: refused: the coordinator leader is in epoch 1
        "#]],
    );
}

#[test]
fn nobody_gets_the_time_before_the_ceiling_is_committed() {
    check(
        "cluster shards=1
         now
         apply
         now
         restart
         lead
         now
         apply
         now",
        expect![[r#"
            cluster shards=1
                epoch 1
            now
                not yet
            apply
            now
                1
            restart
                0 unfinished, ceiling 1572864000
            lead
                epoch 4
                collect from s0
            now
                not yet
            apply
            now
                1572864001
        "#]],
    );
}

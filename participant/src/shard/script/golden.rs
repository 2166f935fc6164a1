//! The scripts, and what each step leads to.

use expect_test::expect;

use super::check;

#[test]
fn two_phases_lock_write_and_release() {
    check(
        "lead fresh=5
         prepare T10 epoch=1 floor=12 r:a@0 w:b=1
         read #1 at=11 b
         read #2 at=20 b
         finish epoch=1 T10 commit@15
         read #3 at=14 b
         finish epoch=1 T10 commit@15",
        expect![[r#"
            lead fresh=5
            prepare T10 epoch=1 floor=12 r:a@0 w:b=1
                vote yes, above 5
            read #1 at=11 b
                #1 sees b has none
            read #2 at=20 b
                #2 waits for T10, which writes b
            finish epoch=1 T10 commit@15
                version b@15 = 1
                #2 sees b@15=1
                locks: 2 before, 0 after
            read #3 at=14 b
                #3 sees b has none
            finish epoch=1 T10 commit@15
                locks: 0 before, 0 after
        "#]],
    );
}

#[test]
fn an_abort_leaves_nothing_and_may_come_before_its_prepare() {
    check(
        "lead fresh=5
         prepare T10 epoch=1 floor=12 w:b=1
         finish epoch=1 T10 abort
         read #1 at=20 b
         finish epoch=1 T11 abort
         prepare T11 epoch=1 floor=21 w:b=2
         prepare T11 epoch=2 floor=21 w:b=2
         finish epoch=2 T11 abort
         finish epoch=2 T12 abort
         late-prepare T12 epoch=2 floor=22 w:b=3
         finish epoch=2 T12 abort
         read #2 at=30 b
         finish epoch=2 T13 abort
         restart
         lead fresh=40
         prepare T13 epoch=2 floor=41 w:b=4
         time +1000ms
         answer epoch=2 T13=aborted",
        expect![[r#"
            lead fresh=5
            prepare T10 epoch=1 floor=12 w:b=1
                vote yes, above 5
            finish epoch=1 T10 abort
                locks: 1 before, 0 after
            read #1 at=20 b
                #1 sees b has none
            finish epoch=1 T11 abort
                locks: 0 before, 0 after
            prepare T11 epoch=1 floor=21 w:b=2
                vote no: aborted before
            prepare T11 epoch=2 floor=21 w:b=2
                vote yes, above 20
            finish epoch=2 T11 abort
                locks: 1 before, 0 after
            finish epoch=2 T12 abort
                locks: 0 before, 0 after
            late-prepare T12 epoch=2 floor=22 w:b=3
                propose finish, epoch 2
                vote yes, above 20
            finish epoch=2 T12 abort
                locks: 0 before, 0 after
            read #2 at=30 b
                #2 sees b has none
            finish epoch=2 T13 abort
                locks: 0 before, 0 after
            restart
                0 prepared, 0 locks
            lead fresh=40
            prepare T13 epoch=2 floor=41 w:b=4
                vote yes, above 40
            time +1000ms
                ask the coordinator about T13
            answer epoch=2 T13=aborted
                propose finish, epoch 2
        "#]],
    );
}

#[test]
fn locks_are_shared_for_reads_and_exclusive_for_writes_and_ranges() {
    check(
        "lead fresh=5
         prepare T10 epoch=1 floor=12 r:a@0 s:m-p w:z=1
         prepare T11 epoch=1 floor=12 r:a@0 w:y=1
         prepare T12 epoch=1 floor=12 w:a=2
         prepare T13 epoch=1 floor=12 w:n=2
         prepare T14 epoch=1 floor=12 r:z@0
         prepare T15 epoch=1 floor=12 s:x-
         finish epoch=1 T10 commit@20
         prepare T16 epoch=1 floor=21 w:n=3",
        expect![[r#"
            lead fresh=5
            prepare T10 epoch=1 floor=12 r:a@0 s:m-p w:z=1
                vote yes, above 5
            prepare T11 epoch=1 floor=12 r:a@0 w:y=1
                vote yes, above 5
            prepare T12 epoch=1 floor=12 w:a=2
                vote no: key a is locked by transaction 10
            prepare T13 epoch=1 floor=12 w:n=2
                vote no: key n is locked by transaction 10
            prepare T14 epoch=1 floor=12 r:z@0
                vote no: key z is locked by transaction 10
            prepare T15 epoch=1 floor=12 s:x-
                vote no: key y is locked by transaction 11
            finish epoch=1 T10 commit@20
                version z@20 = 1
                locks: 4 before, 2 after
            prepare T16 epoch=1 floor=21 w:n=3
                vote yes, above 20
        "#]],
    );
}

#[test]
fn what_was_read_must_still_be_true() {
    check(
        "lead fresh=5
         one T10 floor=10 w:a=1 w:b=1
         prepare T20 epoch=1 floor=21 r:a@11 w:c=1
         finish epoch=1 T20 commit@22
         one T23 floor=23 w:a=2
         prepare T21 epoch=1 floor=24 r:a@11 w:d=1
         prepare T22 epoch=1 floor=24 s:a-c w:e=1
         prepare T30 epoch=1 floor=31 s:a-c r:a@24 w:e=1",
        expect![[r#"
            lead fresh=5
            one T10 floor=10 w:a=1 w:b=1
                chosen: 11
                version a@11 = 1
                version b@11 = 1
                committed at 11
            prepare T20 epoch=1 floor=21 r:a@11 w:c=1
                vote yes, above 11
            finish epoch=1 T20 commit@22
                version c@22 = 1
                locks: 2 before, 0 after
            one T23 floor=23 w:a=2
                chosen: 24
                version a@24 = 2
                committed at 24
            prepare T21 epoch=1 floor=24 r:a@11 w:d=1
                vote no: key a was written at 24, after it was read
            prepare T22 epoch=1 floor=24 s:a-c w:e=1
                vote no: key a in range [a, c) was written at 24, after the range was read
            prepare T30 epoch=1 floor=31 s:a-c r:a@24 w:e=1
                vote yes, above 24
        "#]],
    );
}

#[test]
fn a_one_shard_transaction_commits_after_all_that_was_read_and_readers_of_later_moments_wait_for_it() {
    check(
        "lead fresh=5
         read #1 at=50 a
         propose-one T40 floor=41 w:a=1
         read #2 at=50 a
         read #3 at=60 a
         scan #4 at=60 a-b
         apply
         one T42 floor=42 r:a@51 w:a=2
         one T42 floor=42 r:a@51 w:a=2
         prepare T61 epoch=1 floor=62 w:q=1",
        expect![[r#"
            lead fresh=5
            read #1 at=50 a
                #1 sees a has none
            propose-one T40 floor=41 w:a=1
                chosen: 51
            read #2 at=50 a
                #2 sees a has none
            read #3 at=60 a
                #3 waits for T40, which writes a
            scan #4 at=60 a-b
                #4 waits for T40, which writes a
            apply
                version a@51 = 1
                #3 sees a@51=1
                #4 sees a@51=1
                committed at 51
            one T42 floor=42 r:a@51 w:a=2
                chosen: 61
                version a@61 = 2
                committed at 61
            one T42 floor=42 r:a@51 w:a=2
                chosen: 62
                committed at 61
            prepare T61 epoch=1 floor=62 w:q=1
                vote yes, above 61
        "#]],
    );
}

#[test]
fn a_one_shard_transaction_that_was_refused_or_asked_about_can_never_commit() {
    check(
        "lead fresh=5
         prepare T10 epoch=1 floor=12 w:a=1
         one T11 floor=12 w:a=2
         finish epoch=1 T10 abort
         one T11 floor=13 w:a=2
         fence T14
         one T14 floor=15 w:b=1
         one T16 floor=16 w:b=2
         fence T16",
        expect![[r#"
            lead fresh=5
            prepare T10 epoch=1 floor=12 w:a=1
                vote yes, above 5
            one T11 floor=12 w:a=2
                hopeless: key a is locked by transaction 10
                aborted: key a is locked by transaction 10
            finish epoch=1 T10 abort
                locks: 1 before, 0 after
            one T11 floor=13 w:a=2
                chosen: 14
                aborted: key a is locked by transaction 10
            fence T14
                aborted: its outcome was asked for before it was decided
            one T14 floor=15 w:b=1
                chosen: 16
                aborted: its outcome was asked for before it was decided
            one T16 floor=16 w:b=2
                chosen: 17
                version b@17 = 2
                committed at 17
            fence T16
                committed at 17
        "#]],
    );
}

#[test]
fn what_is_prepared_and_was_fenced_off_as_a_one_shard_transaction_is_still_asked_about() {
    check(
        "lead fresh=5
         prepare T10 epoch=1 floor=12 w:a=1
         fence T10
         time +1000ms
         answer epoch=1 T10=aborted",
        expect![[r#"
            lead fresh=5
            prepare T10 epoch=1 floor=12 w:a=1
                vote yes, above 5
            fence T10
                aborted: its outcome was asked for before it was decided
            time +1000ms
                ask the coordinator about T10
            answer epoch=1 T10=aborted
                propose finish, epoch 1
        "#]],
    );
}

#[test]
fn what_an_earlier_leader_proposed_is_void() {
    check(
        "lead fresh=5
         propose-one T10 floor=10 w:a=1
         lead fresh=90
         apply
         one T91 floor=91 w:a=2",
        expect![[r#"
            lead fresh=5
            propose-one T10 floor=10 w:a=1
                chosen: 11
            lead fresh=90
            apply
                aborted: a newer leader, of the coordinators or of a shard, has taken over
            one T91 floor=91 w:a=2
                chosen: 92
                version a@92 = 2
                committed at 92
        "#]],
    );
}

#[test]
fn a_promise_survives_a_restart_and_is_resolved() {
    check(
        "lead fresh=5
         prepare T10 epoch=1 floor=12 r:a@0 w:b=1
         restart
         lead fresh=40
         read #1 at=41 b
         prepare T42 epoch=1 floor=43 w:b=2
         time +20ms
         no-answer T10
         time +20ms
         answer epoch=1 T10=in-flight
         time +20ms
         answer epoch=2 T10=committed@15",
        expect![[r#"
            lead fresh=5
            prepare T10 epoch=1 floor=12 r:a@0 w:b=1
                vote yes, above 5
            restart
                1 prepared, 2 locks
            lead fresh=40
            read #1 at=41 b
                #1 waits for T10, which writes b
            prepare T42 epoch=1 floor=43 w:b=2
                vote no: key b is locked by transaction 10
            time +20ms
                ask the coordinator about T10
            no-answer T10
            time +20ms
                ask the coordinator about T10
            answer epoch=1 T10=in-flight
            time +20ms
                ask the coordinator about T10
            answer epoch=2 T10=committed@15
                propose finish, epoch 2
                version b@15 = 1
                #1 sees b@15=1
        "#]],
    );
}

#[test]
fn a_deposed_coordinator_is_not_obeyed() {
    check(
        "lead fresh=5
         prepare T10 epoch=1 floor=12 w:a=1
         prepare T10 epoch=2 floor=14 w:a=1
         finish epoch=1 T10 abort
         prepare T11 epoch=1 floor=14 w:b=1
         finish epoch=1 T10 commit@20",
        expect![[r#"
            lead fresh=5
            prepare T10 epoch=1 floor=12 w:a=1
                vote yes, above 5
            prepare T10 epoch=2 floor=14 w:a=1
                vote yes, above 5
            finish epoch=1 T10 abort
                locks: 1 before, 1 after
            prepare T11 epoch=1 floor=14 w:b=1
                vote no: a newer leader, of the coordinators or of a shard, has taken over
            finish epoch=1 T10 commit@20
                version a@20 = 1
                locks: 1 before, 0 after
        "#]],
    );
}

#[test]
fn nothing_below_the_safe_point_is_promised_and_it_waits_for_the_prepared() {
    check(
        "lead fresh=5
         one T10 floor=10 w:a=1
         prepare T20 epoch=1 floor=21 w:b=1
         retire T30
         finish epoch=1 T20 commit@25
         retire T30
         prepare T29 epoch=1 floor=31 w:c=1
         one T28 floor=31 w:c=1
         prepare T31 epoch=1 floor=32 r:a@0 w:c=1",
        expect![[r#"
            lead fresh=5
            one T10 floor=10 w:a=1
                chosen: 11
                version a@11 = 1
                committed at 11
            prepare T20 epoch=1 floor=21 w:b=1
                vote yes, above 11
            retire T30
                safe point 20
            finish epoch=1 T20 commit@25
                version b@25 = 1
                locks: 1 before, 0 after
            retire T30
                safe point 30
            prepare T29 epoch=1 floor=31 w:c=1
                vote no: the transaction is older than transactions may be
            one T28 floor=31 w:c=1
                chosen: 32
                Expired
            prepare T31 epoch=1 floor=32 r:a@0 w:c=1
                vote yes, above 25
        "#]],
    );
}

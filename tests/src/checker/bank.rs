//! Accounts that money moves between: every read shows all accounts at one instant, so whatever moves,
//! the total stays.

use std::collections::BTreeMap;

use super::Options;
use super::report::{Class, Report, UNCHECKED, describe};
use crate::history::{History, Kind, Op, Operation, Workload};

/// Balances, by account.
pub(super) type Balances = BTreeMap<i64, i64>;

/// Transfers of unknown outcome of which every subset is tried, to explain final balances.
pub(super) const UNKNOWN_MAX: usize = 16;

/// Checks a history of transfers and reads of all accounts.
pub(super) fn check(history: &History, options: &Options) -> Report {
    let mut report = Report::new(Workload::Bank, options.explained_max);
    let operations = history.operations();
    let reads: Vec<_> = operations.iter().filter_map(|read| Some((read, balances(read)?))).collect();
    report.count("reads", reads.len());
    let opening = if options.opening.is_empty() { None } else { Some(&options.opening) };
    let Some(model) = opening.or_else(|| reads.first().map(|(_, balances)| *balances)) else {
        return report;
    };
    let total = sum(model);
    for (read, balances) in &reads {
        let found = sum(balances);
        if found != total {
            report.add(Class::WrongTotal, || format!("{found} instead of {total}\n{}", describe(read)));
        }
        if !balances.keys().eq(model.keys()) {
            let accounts: Vec<_> = model.keys().collect();
            report.add(Class::WrongAccounts, || format!("the accounts are {accounts:?}\n{}", describe(read)));
        }
        let overdrawn = balances.iter().find(|(_, balance)| **balance < 0);
        if let Some((account, balance)) = overdrawn.filter(|_| !options.negative_balances) {
            report.add(Class::NegativeBalance, || {
                format!("account {account} holds {balance}\n{}", describe(read))
            });
        }
    }
    if let Some(opening) = opening {
        final_balances(&operations, opening, &mut report);
    }
    report
}

/// What a read has found, if it was acknowledged.
pub(super) fn balances<'h>(operation: &'h Operation) -> Option<&'h Balances> {
    match operation.op() {
        Op::Balances(balances) => balances.as_ref(),
        Op::Txn(_)
        | Op::RwTxn(_)
        | Op::Fork(_)
        | Op::Transfer { .. }
        | Op::Add(_)
        | Op::Elements(_)
        | Op::Increment(_)
        | Op::Count(_) => None,
    }
}

/// The balances that a read found after all was done must be those at first with all acknowledged
/// transfers and some of those of unknown outcome. If those are too many, that is counted as `unchecked`.
fn final_balances(operations: &[Operation], opening: &Balances, report: &mut Report) {
    let transfers = operations.iter().filter(|operation| matches!(operation.op(), Op::Transfer { .. }));
    let quiet = transfers.clone().filter_map(Operation::acknowledged).max();
    let last = operations.iter().rev().find(|operation| balances(operation).is_some());
    let Some(last) = last.filter(|last| Some(last.begun()) > quiet) else { return };
    let mut expected = opening.clone();
    let mut unknown = Vec::new();
    for transfer in transfers {
        match transfer.outcome() {
            Kind::Ok => apply(&mut expected, transfer.op(), 1),
            Kind::Info | Kind::Invoke => unknown.push(transfer.op()),
            Kind::Fail => {}
        }
    }
    let found = balances(last).expect("it was looked for");
    if unknown.len() > UNKNOWN_MAX {
        report.count(UNCHECKED, 1);
    } else if subset(&unknown, &difference(found, &expected)).is_none() {
        report.add(Class::WrongFinalBalances, || {
            let many = unknown.len();
            let expected = Op::Balances(Some(expected));
            let story = format!("acknowledged transfers lead to {expected}");
            format!("{story}, and no subset of {many} of unknown outcome leads on to\n{}", describe(last))
        });
    }
}

/// Moves the money of a transfer so many times.
pub(super) fn apply(balances: &mut Balances, transfer: &Op, times: i64) {
    if let Op::Transfer { from, to, amount } = transfer {
        *balances.entry(*from).or_default() -= amount * times;
        *balances.entry(*to).or_default() += amount * times;
    }
}

/// What has to be added to the one to get the other, without the accounts where that is nothing.
pub(super) fn difference(found: &Balances, expected: &Balances) -> Balances {
    let mut difference = found.clone();
    for (account, balance) in expected {
        *difference.entry(*account).or_default() -= balance;
    }
    difference.retain(|_, balance| *balance != 0);
    difference
}

/// Transfers that together make a difference.
pub(super) struct Subset {
    /// Their places.
    pub places: Vec<usize>,
    /// Whether no others do.
    pub unique: bool,
}

/// The smallest subset of at most [`UNKNOWN_MAX`] transfers that makes a difference.
pub(super) fn subset(transfers: &[&Op], difference: &Balances) -> Option<Subset> {
    assert!(transfers.len() <= UNKNOWN_MAX, "there are too many subsets of {} transfers", transfers.len());
    let mut found: Option<(u32, bool)> = None;
    let mut rest = difference.clone();
    // In the order of Gray, in which one transfer comes or goes at a time.
    let mut subset: u32 = 0;
    for step in 1..=1_u32 << transfers.len() {
        if rest.values().all(|balance| *balance == 0) {
            let smallest =
                found.map_or(
                    subset,
                    |(other, _)| {
                        if other.count_ones() <= subset.count_ones() { other } else { subset }
                    },
                );
            found = Some((smallest, found.is_none()));
        }
        let place = step.trailing_zeros() as usize;
        if let Some(transfer) = transfers.get(place) {
            subset ^= 1 << place;
            apply(&mut rest, transfer, if subset >> place & 1 == 1 { -1 } else { 1 });
        }
    }
    let (subset, unique) = found?;
    let places = (0..transfers.len()).filter(|place| subset >> place & 1 == 1).collect();
    Some(Subset { places, unique })
}

fn sum(balances: &Balances) -> i128 {
    balances.values().map(|balance| i128::from(*balance)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checker::planted;

    fn check(text: &str, expected: &[Class]) {
        let opening = BTreeMap::from([(1, 10), (2, 20)]);
        planted::check_with(Workload::Bank, text, &Options { opening, ..Options::default() }, expected);
    }

    #[test]
    fn the_total_must_stay() {
        let read =
            |balances: &str| format!("0 info :transfer {{:from 1, :to 2, :amount 5}}\n1 ok :read {balances}");
        check(&read("{1 5, 2 20}"), &[Class::WrongTotal, Class::WrongFinalBalances]);
        check(&read("{1 5, 2 25}"), &[]);
        check(&read("{1 10, 2 20}"), &[]);
    }

    #[test]
    fn the_total_of_the_first_read_must_stay_if_none_is_known() {
        let read = |second: &str| format!("0 ok :read {{1 5}}\n0 ok :read {{1 {second}}}");
        planted::check(Workload::Bank, &read("6"), &[Class::WrongTotal]);
        planted::check(Workload::Bank, &read("5"), &[]);
    }

    #[test]
    fn all_accounts_must_be_there() {
        check("0 ok :read {1 30}", &[Class::WrongAccounts, Class::WrongFinalBalances]);
        check("0 invoke :transfer {:from 1, :to 2, :amount 0}\n1 ok :read {1 10, 2 20}", &[]);
    }

    #[test]
    fn no_account_may_be_overdrawn_unless_that_is_allowed() {
        let text = "0 ok :transfer {:from 1, :to 2, :amount 11}\n1 ok :read {1 -1, 2 31}";
        check(text, &[Class::NegativeBalance]);
        let options = Options { negative_balances: true, ..Options::default() };
        planted::check_with(Workload::Bank, text, &options, &[]);
    }

    #[test]
    fn final_balances_must_be_what_was_acknowledged() {
        let last = |balances: &str| {
            format!(
                "0 ok :transfer {{:from 1, :to 2, :amount 5}}
                 0 fail :transfer {{:from 1, :to 2, :amount 1}}
                 1 ok :read {balances}"
            )
        };
        check(&last("{1 10, 2 20}"), &[Class::WrongFinalBalances]);
        check(&last("{1 4, 2 26}"), &[Class::WrongFinalBalances]);
        check(&last("{1 5, 2 25}"), &[]);
        let concurrent =
            "1 invoke :read nil\n0 ok :transfer {:from 1, :to 2, :amount 5}\n1 ok :read {1 10, 2 20}";
        check(concurrent, &[]);
    }

    #[test]
    fn final_balances_may_have_transfers_of_unknown_outcome() {
        let last = |balances: &str| {
            format!(
                "0 info :transfer {{:from 1, :to 2, :amount 5}}
                 1 info :transfer {{:from 2, :to 1, :amount 2}}
                 2 ok :read {balances}"
            )
        };
        for balances in ["{1 10, 2 20}", "{1 5, 2 25}", "{1 12, 2 18}", "{1 7, 2 23}"] {
            check(&last(balances), &[]);
        }
        check(&last("{1 9, 2 21}"), &[Class::WrongFinalBalances]);
    }
}

//! The coordinators in the replicated state: who belongs to them, and who is on the way in or out.
//!
//! ```text
//!              add             they vote                remove           they do not vote
//!   (nothing) ─────► joining ───────────► voting ─────────────► leaving ─────────────────► (nothing)
//!                       ▲                   │ replace
//!                       └── replacing ◄─────┘
//!              it does not vote
//! ```
//!
//! The state says what shall be. The leader changes the members of the group until they are that, and says so with
//! `Seated`.

use troth_protocol::message::admin::CoordinatorChange;
use troth_protocol::{CoordinatorMember, MemberState, Node, NodeId, NodeState};

use super::{Catalog, Mutation, State};

/// How many coordinators there may be.
const COORDINATORS_MAX: usize = 9;

impl Catalog {
    /// A coordinator by its number.
    pub fn coordinator(&self, id: NodeId) -> Option<&CoordinatorMember> {
        self.coordinators.iter().find(|member| member.id == id)
    }

    /// The coordinators that shall vote.
    pub fn wanted_voters(&self) -> impl Iterator<Item = &CoordinatorMember> {
        let stays =
            |member: &&CoordinatorMember| matches!(member.state, MemberState::Voting | MemberState::Joining);
        self.coordinators.iter().filter(stays)
    }

    /// Makes the map show those that may lead.
    pub(super) fn show_coordinators(&mut self) {
        let may_lead =
            |member: &&CoordinatorMember| matches!(member.state, MemberState::Voting | MemberState::Leaving);
        let node = |member: &CoordinatorMember| Node {
            id: member.id,
            address: member.address.clone(),
            zone: String::new(),
            weight: 0,
            state: NodeState::Active,
            incarnation: Default::default(),
        };
        self.map.coordinators = self.coordinators.iter().filter(may_lead).map(node).collect();
        // Also where it shows the same as before: by its version it is noticed that something has changed.
        self.map.epoch.0 += 1;
    }
}

impl State {
    pub(super) fn change_coordinators(
        &mut self,
        index: u64,
        change: CoordinatorChange,
    ) -> Result<(), String> {
        let catalog = self.catalog.as_mut().ok_or("there is no cluster yet")?;
        match change {
            CoordinatorChange::Add { members } => add(&mut catalog.coordinators, index, members)?,
            CoordinatorChange::Remove { ids } => remove(&mut catalog.coordinators, &ids)?,
            CoordinatorChange::Replace { id, address } => replace(&mut catalog.coordinators, id, address)?,
        }
        catalog.show_coordinators();
        Ok(())
    }

    /// The group has these voters.
    pub(super) fn seat(&mut self, index: u64, voters: &[NodeId], mutations: &mut Vec<Mutation>) {
        let Some(catalog) = &mut self.catalog else { return };
        let before = catalog.coordinators.clone();
        let votes = |member: &CoordinatorMember| voters.contains(&member.id);
        catalog.coordinators.retain(|member| member.state != MemberState::Leaving || votes(member));
        for member in &mut catalog.coordinators {
            match member.state {
                MemberState::Joining if votes(member) => member.state = MemberState::Voting,
                MemberState::Replacing if !votes(member) => {
                    // What its folder had does not count from here on.
                    (member.state, member.since) = (MemberState::Joining, index);
                }
                _ => {}
            }
        }
        if catalog.coordinators != before {
            catalog.show_coordinators();
            mutations.push(Mutation::Catalog);
        }
    }

    /// A coordinator says where it listens.
    pub(super) fn find(&mut self, id: NodeId, address: String, mutations: &mut Vec<Mutation>) {
        let Some(catalog) = &mut self.catalog else { return };
        let moved = |member: &&mut CoordinatorMember| member.id == id && member.address != address;
        if let Some(member) = catalog.coordinators.iter_mut().find(moved) {
            member.address = address;
            catalog.show_coordinators();
            mutations.push(Mutation::Catalog);
        }
    }
}

fn add(
    coordinators: &mut Vec<CoordinatorMember>,
    index: u64,
    members: Vec<(NodeId, String)>,
) -> Result<(), String> {
    for (at, (id, address)) in members.iter().enumerate() {
        if id.0 == 0 || !address.contains(':') {
            return Err(format!("{id}={address}: a number is 1 or more, and an address is host:port"));
        }
        if members[..at].iter().any(|(other, place)| other == id || place == address) {
            return Err(format!("{id}={address}: a number or address is named twice"));
        }
        if let Some(other) = coordinators.iter().find(|member| member.id != *id && member.address == *address)
        {
            return Err(format!("coordinator {} is at {address} already", other.id));
        }
        match coordinators.iter().find(|member| member.id == *id) {
            // Whoever asks once more, because the answer was lost, has what was asked for.
            Some(member) if member.address == *address && member.state != MemberState::Leaving => {}
            Some(member) if member.state == MemberState::Joining => {}
            Some(member) => {
                let (state, place) = (member.state.name(), &member.address);
                return Err(format!(
                    "coordinator {id} is {state} at {place}; if its folder is lost: `troth coordinator replace {id}`"
                ));
            }
            None => {}
        }
    }
    let newcomers = members.iter().filter(|(id, _)| coordinators.iter().all(|member| member.id != *id));
    if coordinators.len() + newcomers.count() > COORDINATORS_MAX {
        return Err(format!("there may be {COORDINATORS_MAX} coordinators at most"));
    }
    for (id, address) in members {
        match coordinators.iter_mut().find(|member| member.id == id) {
            Some(member) => member.address = address,
            None => {
                coordinators.push(CoordinatorMember {
                    id,
                    address,
                    since: index,
                    state: MemberState::Joining,
                });
            }
        }
    }
    coordinators.sort_by_key(|member| member.id);
    Ok(())
}

fn remove(coordinators: &mut [CoordinatorMember], ids: &[NodeId]) -> Result<(), String> {
    if let Some(unknown) = ids.iter().find(|id| coordinators.iter().all(|member| member.id != **id)) {
        return Err(format!("there is no coordinator {unknown}"));
    }
    let stays =
        |member: &&CoordinatorMember| member.state == MemberState::Voting && !ids.contains(&member.id);
    if !coordinators.iter().any(|member| stays(&member)) {
        return Err("nobody would be left who votes; add another coordinator first".into());
    }
    for member in coordinators.iter_mut().filter(|member| ids.contains(&member.id)) {
        member.state = MemberState::Leaving;
    }
    Ok(())
}

fn replace(
    coordinators: &mut [CoordinatorMember],
    id: NodeId,
    address: Option<String>,
) -> Result<(), String> {
    if let Some(address) = &address
        && !address.contains(':')
    {
        return Err(format!("{address}: an address is host:port"));
    }
    let others =
        coordinators.iter().filter(|member| member.id != id && member.state == MemberState::Voting).count();
    let unknown =
        || format!("there is no coordinator {id}; `troth coordinator add {id} HOST:PORT` lets one in");
    let member = coordinators.iter_mut().find(|member| member.id == id).ok_or_else(unknown)?;
    match member.state {
        MemberState::Leaving => return Err(format!("coordinator {id} is leaving already")),
        MemberState::Voting if others == 0 => {
            return Err(format!("coordinator {id} is the only one; there is nobody to take its place from"));
        }
        MemberState::Voting => member.state = MemberState::Replacing,
        MemberState::Joining | MemberState::Replacing => {}
    }
    if let Some(address) = address {
        member.address = address;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io;

    use troth_protocol::{Incarnation, TxnId};

    use super::*;
    use crate::command::{Command, Founding, Output, Record};
    use crate::state::View;

    struct Empty;

    impl View for Empty {
        fn record(&self, _: TxnId) -> io::Result<Option<Record>> {
            Ok(None)
        }
    }

    /// Changes the coordinators of a cluster that one has founded, entry by entry.
    struct Scene {
        state: State,
        index: u64,
    }

    impl Scene {
        fn new() -> Scene {
            let mut scene = Scene { state: State::default(), index: 0 };
            let founding = Founding { founders: vec![(NodeId(1), "c:1".into())], ..Founding::default() };
            scene.apply(Command::Lead { leader: Incarnation(1), founding });
            scene
        }

        fn apply(&mut self, command: Command) -> Output {
            self.index += 1;
            self.state.apply(self.index, command, &Empty, &mut Vec::new()).expect("nothing is stored")
        }

        /// What is refused is said, else who stands where: `1 voting@0`, and after a slash whom the map shows.
        fn check(&mut self, change: CoordinatorChange, expected: &str) {
            match self.apply(Command::Coordinators(change)) {
                Output::Refused(reason) => assert_eq!(reason, expected),
                _ => self.check_members(expected),
            }
        }

        fn seated(&mut self, voters: &[u64], expected: &str) {
            self.apply(Command::Seated { voters: voters.iter().copied().map(NodeId).collect() });
            self.check_members(expected);
        }

        fn check_members(&self, expected: &str) {
            let catalog = self.state.catalog().expect("founded");
            let told = |member: &CoordinatorMember| {
                format!("{} {}@{}", member.id, member.state.name(), member.since)
            };
            let members: Vec<String> = catalog.coordinators.iter().map(told).collect();
            let shown: Vec<String> =
                catalog.map.coordinators.iter().map(|node| node.id.to_string()).collect();
            assert_eq!(format!("{} / {}", members.join(", "), shown.join(" ")), expected);
        }
    }

    fn add(members: &[(u64, &str)]) -> CoordinatorChange {
        let member = |(id, address): &(u64, &str)| (NodeId(*id), (*address).to_owned());
        CoordinatorChange::Add { members: members.iter().map(member).collect() }
    }

    fn remove(ids: &[u64]) -> CoordinatorChange {
        CoordinatorChange::Remove { ids: ids.iter().copied().map(NodeId).collect() }
    }

    fn replace(id: u64) -> CoordinatorChange {
        CoordinatorChange::Replace { id: NodeId(id), address: None }
    }

    #[test]
    fn they_come_go_and_are_replaced() {
        let mut scene = Scene::new();
        scene.check(add(&[(2, "c:2"), (3, "c:3")]), "1 voting@0, 2 joining@2, 3 joining@2 / 1");
        // Asked once more, as an answer may be lost, it changes nothing.
        scene.check(add(&[(2, "c:2"), (3, "c:3")]), "1 voting@0, 2 joining@2, 3 joining@2 / 1");
        scene.seated(&[1], "1 voting@0, 2 joining@2, 3 joining@2 / 1");
        scene.seated(&[1, 2, 3], "1 voting@0, 2 voting@2, 3 voting@2 / 1 2 3");
        scene.check(replace(2), "1 voting@0, 2 replacing@2, 3 voting@2 / 1 3");
        scene.seated(&[1, 2, 3], "1 voting@0, 2 replacing@2, 3 voting@2 / 1 3");
        scene.seated(&[1, 3], "1 voting@0, 2 joining@8, 3 voting@2 / 1 3");
        scene.seated(&[1, 2, 3], "1 voting@0, 2 voting@8, 3 voting@2 / 1 2 3");
        scene.check(remove(&[1]), "1 leaving@0, 2 voting@8, 3 voting@2 / 1 2 3");
        scene.seated(&[2, 3], "2 voting@8, 3 voting@2 / 2 3");
        // The number may be used again, by another folder.
        scene.check(add(&[(1, "c:9")]), "1 joining@12, 2 voting@8, 3 voting@2 / 2 3");
        // One that never came is let go without ever having had a vote.
        scene.check(remove(&[1]), "1 leaving@12, 2 voting@8, 3 voting@2 / 1 2 3");
        scene.seated(&[2, 3], "2 voting@8, 3 voting@2 / 2 3");
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_what_would() {
        let mut scene = Scene::new();
        scene.check(remove(&[1]), "nobody would be left who votes; add another coordinator first");
        scene.check(remove(&[4]), "there is no coordinator 4");
        scene.check(replace(1), "coordinator 1 is the only one; there is nobody to take its place from");
        scene.check(replace(4), "there is no coordinator 4; `troth coordinator add 4 HOST:PORT` lets one in");
        scene.check(
            add(&[(1, "c:9")]),
            "coordinator 1 is voting at c:1; if its folder is lost: `troth coordinator replace 1`",
        );
        scene.check(add(&[(2, "c:1")]), "coordinator 1 is at c:1 already");
        scene.check(add(&[(2, "c:2"), (3, "c:2")]), "3=c:2: a number or address is named twice");
        scene.check(add(&[(0, "c:2")]), "0=c:2: a number is 1 or more, and an address is host:port");
        let many: Vec<(u64, String)> = (2..=10).map(|id| (id, format!("c:{id}"))).collect();
        let many: Vec<(u64, &str)> = many.iter().map(|(id, address)| (*id, address.as_str())).collect();
        scene.check(add(&many), "there may be 9 coordinators at most");
        scene.check_members("1 voting@0 / 1");
    }
}

//! What coordinators say to each other before they take part, and again and again while they do: who they are.
//!
//! A coordinator neither votes nor leads before a majority of the others has taken note of its incarnation. Each of
//! them remembers the last one that it took note of, on its disk, and takes note of another one only if that one
//! knows of the one before: a copy of a folder that was made before then does not, and is told so.
//!
//! ```text
//!   coordinator 2, started again                          coordinator 1
//!     │ I am incarnation c, and have no predecessor here    │ remembers b
//!     ├───────────────────────────────────────────────────►│
//!     │◄────────────────────────────── it was b, at 4711 ───┤
//!     │ its folder has begun b, and has synced 4711         │
//!     │ I am incarnation c, after b                         │ remembers c
//!     ├───────────────────────────────────────────────────►│
//!     │◄──────────────────────────────────────── noted ─────┤
//! ```

#![expect(missing_docs, reason = "what rkyv derives for enums has none; all that is written here does")]

use crate::id::{FoundingId, Incarnation, NodeId};

/// A coordinator says who it is.
#[derive(Clone, PartialEq, Eq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct Greeting {
    /// Which coordinator speaks.
    pub from: NodeId,
    /// Where others find it.
    pub address: String,
    /// Which coordinator is meant; another one at the same address refuses. `None`: whichever is there.
    pub to: Option<NodeId>,
    /// What it has.
    pub folder: Folder,
}

/// What a coordinator has in its data folder.
#[derive(Clone, PartialEq, Eq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub enum Folder {
    /// Nothing.
    Empty(Plan),
    /// What it needs to take part, from its starts before.
    Used {
        /// The entry of the coordinators' log that let it in; 0: it has founded the group.
        since: u64,
        /// This start.
        incarnation: Incarnation,
        /// What the other one remembers, if it has said so, and the folder has begun that too.
        previous: Option<Incarnation>,
        /// How many batches the folder has synced. It never becomes less.
        progress: u64,
    },
}

/// What an empty coordinator was told by its configuration.
#[derive(Clone, PartialEq, Eq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct Plan {
    /// The word to found a group; `None`: it shall found none.
    pub founding: Option<FoundingId>,
    /// The coordinators that it lists, itself among them, ascending.
    pub listed: Vec<NodeId>,
}

/// The answer to a [`Greeting`].
#[derive(Clone, PartialEq, Eq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub enum Welcome {
    /// The folder of the one that answers is empty too.
    Empty(Plan),
    /// To an empty one: the one that answers belongs to a group.
    Formed {
        /// The word by which it was founded, if this one was there then.
        founding: Option<FoundingId>,
        /// Its members, and where they are.
        members: Vec<(NodeId, String)>,
        /// What it knows of the empty one.
        place: Place,
    },
    /// To one that is not: it is remembered.
    Noted,
    /// To one that is not: this is what was remembered, and is still.
    Remembered {
        /// The incarnation.
        incarnation: Incarnation,
        /// How many batches it had synced when it said so last.
        progress: u64,
        /// Where it was.
        address: String,
    },
    /// Another incarnation was heard of just now, at another place. Who asks again later may be noted.
    Elsewhere {
        /// Where.
        address: String,
    },
    /// The group has sent it away, or let another folder take its place.
    Removed,
}

/// What a group knows of an empty coordinator.
#[derive(Clone, Copy, PartialEq, Eq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub enum Place {
    /// It is no member.
    Stranger,
    /// It is a founding member, and was never heard of.
    Founder,
    /// It is a member, and had something in its folder.
    Emptied,
    /// An operator has said that its folder is lost; it may join when it has lost its vote.
    Replacing,
    /// An operator has let it in.
    Awaited {
        /// The entry of the coordinators' log that says so.
        since: u64,
    },
}

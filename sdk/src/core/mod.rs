//! What a client decides by itself: pure, so that the simulator and the model checker run it too.
//!
//! | module | what it is |
//! | --- | --- |
//! | [`buffer`] | what a transaction has read and wants to write, and what each shard has to check of it |
//! | [`submission`] | a commit on its way, until it is known how it ended |

pub mod buffer;
pub mod submission;

pub use self::buffer::Buffer;
pub use self::submission::{Step, Submission};

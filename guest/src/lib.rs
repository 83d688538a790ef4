//! The half of instar that reads image metadata.
//!
//! Everything here runs inside a sandbox: a micro-VM without devices, or a
//! process without system calls. It is sans-I/O. The engine asks a [`Host`] for
//! bytes by file number and offset and answers every [`Request`] with facts,
//! extents or a [`Plan`] of ordered writes; it never performs a write itself.
//! Because nothing else comes in or goes out, the same code runs in unit tests
//! over a byte vector and in fuzzers.
//!
//! What may not enter: I/O, clocks, randomness (the host passes in what a new
//! image needs), `unsafe`, and anything that can panic on what an image says.
//! The host links this crate for the types that cross the boundary ([`proto`],
//! [`plan`], [`facts`], [`error`]) and never calls the engine on an image.

#![cfg_attr(not(any(test, feature = "testing")), no_std)]
#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::indexing_slicing,
        clippy::unreachable
    )
)]

extern crate alloc;

pub mod engine;
pub mod error;
pub mod facts;
pub mod findings;
pub mod layout;
pub mod plan;
pub mod proto;

mod bytes;
mod chance;
mod disk;
mod extents;
mod options;
mod prepare;
mod probe;
mod qcow2;
mod raw;
mod resize;
mod tell;
mod units;
mod vhd;
mod vhdx;
mod vmdk;

#[cfg(test)]
mod engine_tests;
#[cfg(test)]
mod field_tests;
#[cfg(any(test, feature = "testing"))]
pub mod testing;

pub use engine::{Engine, Host, Read};
pub use error::{Failure, FailureKind};
pub use facts::Facts;
pub use plan::{Plan, Stage, Step};
pub use proto::{Extent, ExtentKind, FileNo, Format, Reply, Request};

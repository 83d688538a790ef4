//! The messages that cross the boundary, in both directions.
//!
//! They are encoded with postcard. Host and guest are one build, so the
//! protocol has no version. Neither side trusts a length: a message is at most
//! [`MAX_MESSAGE`] bytes, every list in it is at most as long as the message,
//! and no type here is recursive, so that decoding is bounded in time, memory
//! and stack.
//!
//! The guest sends [`ToHost`] by putting the encoded message anywhere in its
//! memory and ringing the doorbell; the host copies it, decodes the copy,
//! serves it and answers with [`ToGuest`].

use crate::error::Failure;
use crate::facts::Facts;
use crate::findings::{Finding, Repair, Report};
use crate::plan::Plan;
use alloc::string::String;
use alloc::vec::Vec;
use serde::{Deserialize, Serialize};

/// The longest message in either direction, in bytes.
pub const MAX_MESSAGE: usize = 8 << 20;
/// The longest request: names and options, never image bytes.
pub const MAX_REQUEST: usize = 64 << 10;
/// Bytes of the file's start that the host puts into guest memory before the
/// first entry, so that the facts of most images need one exit.
pub const HEAD: usize = 64 << 10;
/// Bytes of the file's end that come with them.
pub const TAIL: usize = 4 << 10;
/// The most ranges in one [`ToHost::Read`].
pub const MAX_READS: usize = 4 << 10;
/// The most extents in one reply; a longer mapping is asked for in pieces.
pub const MAX_EXTENTS: usize = 16 << 10;
/// The most bytes that one [`Request::Inflate`] may ask for.
pub const MAX_INFLATE: u64 = 4 << 20;
/// The most findings in one [`ToHost::Findings`].
pub const MAX_FINDINGS: usize = 4 << 10;

/// A file by number. 0 is the image itself; 1 and up are the files that hold
/// parts of it, in the order of [`Facts::files`]; then come those that a plan
/// creates, in the order of their [steps](crate::plan::Step::Create).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct FileNo(pub u32);

impl FileNo {
    /// The image itself.
    pub const IMAGE: Self = Self(0);
    /// The first file that the facts name: qcow2's external data file.
    pub const DATA: Self = Self(1);
}

/// The formats that instar handles.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Format {
    /// The disk's bytes and nothing else.
    Raw,
    /// QEMU's copy-on-write format, versions 2 and 3.
    Qcow2,
    /// VMware's virtual disk: a descriptor and its extents, or one sparse file.
    Vmdk,
    /// Microsoft's virtual hard disk, version 1 (qemu calls it vpc).
    Vhd,
    /// Microsoft's virtual hard disk, version 2.
    Vhdx,
}

impl Format {
    /// Every format, in the order in which messages list them.
    pub const ALL: [Self; 5] = [Self::Raw, Self::Qcow2, Self::Vmdk, Self::Vhd, Self::Vhdx];

    /// The name that qemu-img uses for the format.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Vmdk => "vmdk",
            Self::Vhd => "vpc",
            Self::Vhdx => "vhdx",
        }
    }

    /// The format of that name.
    pub fn of_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|format| format.name() == name)
    }
}

/// What only the host can give: chance and the time. A session draws every new
/// identifier from it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fresh {
    /// Random bytes, new for each session.
    pub seed: [u8; 32],
    /// Seconds since 1970.
    pub time: u64,
}

/// How much of an added range is allocated at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Preallocation {
    /// Nothing.
    #[default]
    Off,
    /// The mapping, over sparse data.
    Metadata,
    /// The mapping, and disk space for the data.
    Falloc,
    /// The mapping, and zeroes written as data.
    Full,
}

/// What the host asks. The first request of a session is `Open` or `Create`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Parse and check the image; answered by [`Reply::Opened`]. Sent again
    /// after a resize: whatever the session knew is dropped.
    Open {
        /// The format to read the file as; `None` probes.
        format: Option<Format>,
        /// Length of the image file in bytes.
        file_len: u64,
        /// Whether the session may be asked for changes. The engine then checks
        /// what a writer must know (unknown feature bits, dirty and corrupt
        /// flags) and fills [`Facts::no_write`] and [`Facts::no_resize`].
        write: bool,
        /// What new identifiers are made from.
        fresh: Fresh,
    },
    /// The files that the facts named are open; answered by [`Reply::Opened`]
    /// with all that is known now.
    Attach {
        /// Their lengths in bytes, in the order of [`Facts::files`].
        lens: Vec<u64>,
    },
    /// What lies behind a guest range; answered by [`Reply::Extents`].
    Map {
        /// Guest offset of the first byte, any alignment.
        offset: u64,
        /// Length in bytes; `offset + len` is at most the virtual size.
        len: u64,
    },
    /// The content of compressed clusters; answered by [`Reply::Inflated`].
    Inflate {
        /// Guest offset, cluster aligned, inside a compressed extent.
        offset: u64,
        /// Bytes wanted, at most [`MAX_INFLATE`]; the range lies in compressed
        /// clusters only.
        len: u64,
    },
    /// The plan that puts an image in order that was not closed in order
    /// ([`Facts::unsettled`] says why one is needed, or a resize was refused for
    /// it: [`SettleFirst`](crate::FailureKind::SettleFirst)); answered by
    /// [`Reply::Plan`]. After it the host opens the image again.
    Settle,
    /// Whether the image is sound, told by [`ToHost::Findings`]; answered by
    /// [`Reply::Checked`]. Nothing may be waiting for a flush.
    Check {
        /// What the plan of the answer repairs, if anything.
        repair: Option<Repair>,
    },
    /// A plan to change the virtual size; answered by [`Reply::Plan`]. Nothing
    /// may be waiting for a flush, and the image is settled.
    Resize {
        /// The size asked for, in bytes.
        size: u64,
        /// How much of the added range is allocated.
        preallocation: Preallocation,
        /// Whether the size may become smaller.
        shrink: bool,
        /// Virtual size of the backing image, where there is one.
        backing_size: Option<u64>,
    },
    /// Places to put data for a guest range; answered by [`Reply::Placed`]. The
    /// mapping changes in the session at once and on disk with the next flush,
    /// so the host writes the data to those places now.
    Allocate {
        /// Guest offset, a multiple of [`Facts::write_unit`].
        offset: u64,
        /// Length, a multiple of the unit except where it ends at the disk's end.
        len: u64,
    },
    /// Forget the last [`Request::Allocate`]: its data could not be written.
    Undo,
    /// A plan that makes all allocations since the last flush durable; answered
    /// by [`Reply::Plan`]. The host executes it before the next request.
    Flush,
    /// A plan that writes a new image into an empty file; answered by
    /// [`Reply::Plan`], whose last stage commits.
    Create {
        /// What it is to be.
        create: Create,
        /// The name of the new file, without a directory: images of several
        /// files name the others after it.
        name: String,
        /// What new identifiers are made from.
        fresh: Fresh,
    },
}

/// What a new image is to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Create {
    /// The format to create.
    pub format: Format,
    /// Virtual size in bytes, already rounded up to 512.
    pub size: u64,
    /// Options, as `-o key=value` gave them, unchecked.
    pub options: Vec<(String, String)>,
    /// Backing image: name to store, format to store.
    pub backing: Option<crate::facts::NamedFile>,
    /// Virtual size of the backing image, where there is one.
    pub backing_size: Option<u64>,
    /// [`Facts::identity`] of the backing image, where there is one.
    pub backing_identity: Option<String>,
}

/// What the guest answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// To `Open` and `Attach`.
    Opened(Facts),
    /// To `Map`: extents without gaps from the offset asked for. They may end
    /// before the range does (ask again from there), and never after it.
    Extents(Vec<Extent>),
    /// To `Inflate`: exactly the bytes asked for.
    Inflated(#[serde(with = "serde_bytes")] Vec<u8>),
    /// To `Settle`, `Resize`, `Flush` and `Create`.
    Plan(PlanReply),
    /// To `Check`: the sums, and the plan that repairs what was asked for.
    Checked {
        /// Sums over what was found.
        report: Report,
        /// Empty where nothing was to be repaired, or nothing can be.
        repair: PlanReply,
    },
    /// To `Allocate`: places without gaps for exactly the range asked for. From
    /// now on the file counts as reaching to the end of every place, whether
    /// the host writes all of it or not; the next flush makes that true.
    Placed(Vec<Place>),
    /// To `Allocate`: nothing has changed, as only whole clusters can be placed
    /// here (compressed, or shared with a snapshot): ask for this range, which
    /// contains the one asked for.
    Wider {
        /// Guest offset of the first byte.
        offset: u64,
        /// Length in bytes.
        len: u64,
    },
    /// To `Undo`.
    Done,
}

/// A plan and what is to be said about it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlanReply {
    /// The plan. Empty where nothing has to change.
    pub plan: Plan,
    /// For `Create`: every effective option as `(key, value)` in the order in
    /// which qemu-img prints them after `Formatting`. Empty otherwise.
    pub options: Vec<(String, String)>,
    /// Warnings for the user.
    pub warnings: Vec<String>,
    /// For `Flush`: once the plan is executed more can be overwritten in place
    /// than `Map` said before.
    pub remap: bool,
}

/// What lies behind a guest-visible range. Offsets and lengths are bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    /// Guest offset of the first byte.
    pub offset: u64,
    /// Length, never 0.
    pub len: u64,
    /// What is there.
    pub kind: ExtentKind,
}

/// See [`Extent`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExtentKind {
    /// The bytes of a file from `at` on.
    Data {
        /// The file.
        file: FileNo,
        /// Host offset of the first byte.
        at: u64,
        /// Whether the bytes may be overwritten in place: nothing else (a
        /// snapshot) refers to them.
        in_place: bool,
    },
    /// Reads as zeroes whatever the backing image holds.
    Zero {
        /// Host offset that is reserved for the range, if one is.
        at: Option<u64>,
    },
    /// Not in this image: the backing image's bytes, zeroes without one.
    Unallocated {
        /// Host offset in a unit that the image has for a part of which this is
        /// not one, if that is so.
        at: Option<u64>,
    },
    /// Compressed clusters: ask for them with [`Request::Inflate`].
    Compressed,
}

/// Where the data of a guest range goes. Offsets and lengths are bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// Guest offset of the first byte.
    pub offset: u64,
    /// Length, never 0.
    pub len: u64,
    /// The file to write to.
    pub file: FileNo,
    /// Host offset of the first byte.
    pub at: u64,
    /// What is at the place before the write.
    pub content: Content,
}

/// What is at a [`Place`] before the host writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Content {
    /// The range's current content: write only what changes.
    Current,
    /// Zeroes, past the old end of the file: bytes that are to be zero need no
    /// write.
    Zero,
    /// Bytes of no meaning: write all of it.
    Stale,
}

/// Guest to host.
#[expect(
    clippy::large_enum_variant,
    reason = "a message lives from one exit to the next, alone"
)]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToHost {
    /// Read file ranges into guest memory; answered by [`ToGuest::Resume`].
    Read(Vec<ReadOp>),
    /// A first part of a plan that is too large for guest memory: the host
    /// executes it at once. It may write only past the old end of the file.
    Stream(Plan),
    /// What a check has found since the last of these, at most
    /// [`MAX_FINDINGS`], in the order in which they are to be told.
    Findings(Vec<Finding>),
    /// The answer to the request.
    Reply(Result<Reply, Failure>),
}

/// One read into guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadOp {
    /// The file.
    pub file: FileNo,
    /// Host offset in bytes. What lies past the end of the file reads as zero.
    pub offset: u64,
    /// Guest address of the buffer.
    pub addr: u64,
    /// Length in bytes.
    pub len: u32,
}

/// Host to guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToGuest {
    /// A new request.
    Request(Request),
    /// What the guest asked for ([`ToHost::Read`], [`ToHost::Stream`],
    /// [`ToHost::Findings`]) is done, or has failed.
    Resume(Result<(), Failure>),
}

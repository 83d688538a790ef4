//! Replies of more than one value: attributes, listings, data and extended
//! attributes.

use super::super::attributes::Attributes;
use super::super::error::Result;
use super::super::nodes::NodeId;
use super::super::source::Kind;
use super::convert::file_attr;
use super::{Adapter, MAX_REQUEST, TTL};
use fuser::{Errno, FileHandle, INodeNo, ReplyAttr, ReplyXattr};
use std::cell::RefCell;
use std::ffi::OsStr;
use std::path::Path;

impl Adapter {
    /// Hands the lines of a listing from `offset` on to `add`, until that says
    /// `Some(true)`: full. `None` leaves a line out. The two dots come first,
    /// without a path.
    pub(super) fn list(
        &self,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        mut add: impl FnMut(NodeId, u64, Kind, &OsStr, Option<&Path>) -> Option<bool>,
    ) -> Result<()> {
        let listing = self.filesystem.listing(fh.0)?;
        let id = NodeId(ino.0);
        let dots = [(id, "."), (self.filesystem.parent(id).unwrap_or(id), "..")];
        let dots = dots
            .iter()
            .map(|(id, name)| (*id, Kind::Directory, OsStr::new(*name), None));
        let files = listing.iter().map(|line| {
            let path = Some(line.path.as_path());
            (line.id, line.kind, line.name.as_os_str(), path)
        });
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        for (index, (id, kind, name, path)) in dots.chain(files).enumerate().skip(start) {
            if add(id, index as u64 + 1, kind, name, path) == Some(true) {
                break;
            }
        }
        Ok(())
    }
}

impl Adapter {
    /// Answers with attributes, or with the failure's errno.
    pub(super) fn send_attributes(
        &self,
        ino: INodeNo,
        call: &str,
        attributes: Result<Attributes>,
        reply: ReplyAttr,
    ) {
        match attributes {
            Ok(attributes) => reply.attr(&TTL, &file_attr(&attributes)),
            Err(error) => reply.error(self.errno(ino, call, &error)),
        }
    }
}

/// Lends a buffer that each thread keeps, since a fresh one per request would
/// be cleared and mapped anew each time.
pub(super) fn with_buffer(size: u32, work: impl FnOnce(&mut [u8])) {
    thread_local! {
        static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    }
    BUFFER.with_borrow_mut(|buffer| {
        let size = size.min(MAX_REQUEST) as usize;
        if buffer.len() < size {
            buffer.resize(size, 0);
        }
        work(&mut buffer[..size]);
    });
}

pub(super) fn send_xattr(value: &[u8], size: u32, reply: ReplyXattr) {
    match u32::try_from(value.len()) {
        Ok(len) if size == 0 => reply.size(len),
        Ok(len) if len <= size => reply.data(value),
        _ => reply.error(Errno::ERANGE),
    }
}

//! Plays an image that exists in the script only.

use crate::{refusal, reply, request, tell};
use alloc::vec;
use alloc::vec::Vec;
use instar_guest::proto::{Extent, ExtentKind, PlanReply, ReadOp, Reply, Request, ToHost};
use instar_test_guest::Image;

pub fn play(image: Image) -> ! {
    let mut opens = image.opens.iter().cycle_last();
    loop {
        let answer = match request() {
            Some(Request::Open { .. }) => {
                read_ranges(&image);
                opens.next().map(|facts| Reply::Opened(facts.clone()))
            }
            Some(Request::Map { offset, len }) => {
                Some(Reply::Extents(part(&image.extents, offset, len)))
            }
            Some(Request::Resize { .. }) => Some(Reply::Plan(image.resize.clone())),
            Some(Request::Flush) => Some(Reply::Plan(PlanReply::default())),
            Some(Request::Attach { .. } | Request::Undo) => Some(Reply::Done),
            _ => None,
        };
        reply(answer.ok_or_else(refusal));
    }
}

fn read_ranges(image: &Image) {
    let mut buffers: Vec<Vec<u8>> = Vec::new();
    let mut ops = Vec::new();
    for &(file, offset, len) in &image.reads {
        let mut buffer = vec![0; len as usize];
        let addr = buffer.as_mut_ptr() as u64;
        buffers.push(buffer);
        ops.push(ReadOp {
            file,
            offset,
            addr,
            len,
        });
    }
    if !ops.is_empty() {
        tell(&ToHost::Read(ops));
    }
}

/// The part of a mapping that lies in a range.
fn part(extents: &[Extent], offset: u64, len: u64) -> Vec<Extent> {
    let end = offset + len;
    let inside = extents.iter().filter_map(|extent| {
        let from = extent.offset.max(offset);
        let to = (extent.offset + extent.len).min(end);
        let skipped = from.checked_sub(extent.offset)?;
        (from < to).then(|| Extent {
            offset: from,
            len: to - from,
            kind: moved(extent.kind, skipped),
        })
    });
    inside.collect()
}

fn moved(kind: ExtentKind, by: u64) -> ExtentKind {
    match kind {
        ExtentKind::Data { file, at, in_place } => ExtentKind::Data {
            file,
            at: at + by,
            in_place,
        },
        ExtentKind::Zero { at } => ExtentKind::Zero {
            at: at.map(|at| at + by),
        },
        other => other,
    }
}

/// An iterator that never ends: it repeats its last item.
trait CycleLast<T> {
    fn cycle_last(self) -> impl Iterator<Item = T>;
}

impl<T: Clone, I: Iterator<Item = T>> CycleLast<T> for I {
    fn cycle_last(mut self) -> impl Iterator<Item = T> {
        let mut last = None;
        core::iter::from_fn(move || {
            last = self.next().or_else(|| last.take());
            last.clone()
        })
    }
}

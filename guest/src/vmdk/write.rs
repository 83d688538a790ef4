//! Places for new data: in flat extents every byte has one already.

use super::{Body, Vmdk};
use crate::disk::Disk;
use crate::error::Failure;
use crate::proto::{Content, Place, Reply};
use alloc::vec::Vec;

impl Vmdk {
    /// The places of a guest range of flat extents.
    pub fn places(&mut self, offset: u64, len: u64) -> Result<Reply, Failure> {
        if let Some(refusal) = self.no_write() {
            return Err(refusal);
        }
        let end = offset + len;
        let mut places = Vec::new();
        let mut at = offset;
        while at < end {
            let index = self.extent_at(at);
            let Some(extent) = self.extents.get_mut(index) else {
                break;
            };
            let stop = end.min(extent.end());
            let inside = at - extent.start;
            let Body::Flat {
                file,
                at: first,
                file_len,
                ..
            } = &mut extent.body
            else {
                return Err(self.refuse("takes no new data here"));
            };
            let place = *first + inside;
            let there = file_len.saturating_sub(place).min(stop - at);
            let parts = [
                (0, there, Content::Current),
                (there, stop - at - there, Content::Zero),
            ];
            places.extend(parts.into_iter().filter(|&(_, len, _)| len > 0).map(
                |(skip, len, content)| Place {
                    offset: at + skip,
                    len,
                    file: *file,
                    at: place + skip,
                    content,
                },
            ));
            *file_len = (*file_len).max(place + (stop - at));
            at = stop;
        }
        Ok(Reply::Placed(places))
    }
}

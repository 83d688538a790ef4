//! What the host's filesystem says about the files of an open image.

use super::disk::Image;
use std::fs::Metadata;
use std::io;

impl Image {
    /// Attributes of the image's open files, by number: the image itself comes
    /// first.
    pub fn on_disk(&self) -> io::Result<Vec<Metadata>> {
        let look = |file| self.files.file(file)?.file.metadata();
        self.files.numbers().map(look).collect()
    }

    /// Attributes of what stands under the names of the image's other files
    /// now: not of the open ones where somebody has replaced them. `None` if
    /// there is nothing any more.
    pub fn parts_by_name(&self) -> io::Result<Vec<Option<Metadata>>> {
        let look = |file| {
            let handle = self.files.file(file)?;
            match handle.home.get() {
                Some(home) => home.metadata(),
                None => handle.file.metadata().map(Some),
            }
        };
        self.files.numbers().skip(1).map(look).collect()
    }
}

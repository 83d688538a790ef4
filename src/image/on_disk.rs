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
}

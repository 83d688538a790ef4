//! An image of the mount that is open, or an empty file that becomes one with
//! its first size above 0. With size 0, an image becomes an empty file again.

use super::disk::{Disk, Part, Run};
use super::error::{Error, Result};
use super::library::Images;
use super::source::{FileId, Time};
use super::sync::{read, try_read, write};
use crate::image::{Access, Blank, Image, Location, ResizeOptions, SegmentKind, Space};
use instar_guest::proto::{Create, Format, Preallocation};
use nix::errno::Errno;
use std::fs::File;
use std::os::unix::fs::MetadataExt as _;
use std::sync::RwLock;
use std::time::Duration;

/// Runs that one call answers at most: an image that changes between data and
/// holes all the time has millions of them, and they take memory.
const MOST_RUNS: usize = 16 << 10;
/// Sizes of what is no image yet are multiples of this, in bytes.
const SECTOR: u64 = 512;

/// See the module.
pub struct OpenImage {
    form: RwLock<Form>,
    maker: Option<Maker>,
}

/// What it is at the moment.
pub enum Form {
    /// An image.
    Image(Image),
    /// An empty file.
    Blank(Blank),
}

/// What turns an empty file into an image and back.
pub struct Maker {
    /// What opens the image.
    pub images: Images,
    /// Where it lies.
    pub location: Location,
    /// What its name says.
    pub format: Format,
    /// A descriptor of the same opening as the image's, which keeps the lock.
    pub file: File,
}

impl OpenImage {
    /// Without a maker it stays what it is.
    pub fn new(form: Form, maker: Option<Maker>) -> Self {
        Self {
            form: RwLock::new(form),
            maker,
        }
    }

    fn with<R>(&self, work: impl FnOnce(&dyn Disk) -> R) -> R {
        match &*read(&self.form) {
            Form::Image(image) => work(image),
            Form::Blank(blank) => work(blank),
        }
    }

    /// Whether the size asks for another form, and from which.
    fn changes_form(&self, size: u64) -> Option<&Maker> {
        let changes = match &*read(&self.form) {
            Form::Image(image) => {
                size == 0 && image.virtual_size() > 0 && image.facts().files.is_empty()
            }
            Form::Blank(_) => size > 0,
        };
        self.maker.as_ref().filter(|_| changes)
    }
}

impl Maker {
    /// Makes a fresh image of the size.
    fn make(&self, blank: &Blank, size: u64, how: Preallocation) -> Result<(Image, Vec<String>)> {
        // The disk has exactly the size that was asked for.
        let options = match self.format {
            Format::Vhd => vec![("force_size".to_owned(), "on".to_owned())],
            _ => Vec::new(),
        };
        let request = Create {
            format: self.format,
            size,
            options,
            backing: None,
            backing_size: None,
            backing_identity: None,
        };
        let images = &self.images;
        let opening = images.options(Some(self.format), Access::Write, images.backing);
        let (image, created) = blank.create(&images.pool, &request, &opening)?;
        if matches!(how, Preallocation::Falloc | Preallocation::Full) {
            let allocated = image.preallocate(0, size).and_then(|()| image.flush());
            if let Err(error) = allocated {
                self.empty()?;
                drop(image);
                // It has taken the lock with it.
                blank.lock()?;
                return Err(error.into());
            }
        }
        Ok((image, created.warnings))
    }

    fn empty(&self) -> Result<Blank> {
        let file = self.file.try_clone()?;
        Ok(Blank::empty(file, self.location.clone(), self.format)?)
    }
}

impl Disk for OpenImage {
    fn gathers(&self) -> bool {
        self.with(|disk| disk.gathers())
    }

    fn format(&self) -> Format {
        self.with(|disk| disk.format())
    }

    /// While it changes from one form to the other, its size is, or is about to
    /// be, or has been just now: 0. Whoever asks does not wait.
    fn virtual_size(&self) -> u64 {
        match try_read(&self.form).as_deref() {
            Some(Form::Image(image)) => image.virtual_size(),
            Some(Form::Blank(_)) | None => 0,
        }
    }

    fn size_unit(&self) -> u64 {
        self.with(|disk| disk.size_unit())
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.with(|disk| disk.read_at(buf, offset))
    }

    fn write_at(&self, data: &[u8], offset: u64) -> Result<()> {
        self.with(|disk| disk.write_at(data, offset))
    }

    fn preallocate(&self, offset: u64, len: u64) -> Result<()> {
        self.with(|disk| disk.preallocate(offset, len))
    }

    fn zero(&self, offset: u64, len: u64, space: Space) -> Result<()> {
        self.with(|disk| disk.zero(offset, len, space))
    }

    fn flush(&self) -> Result<()> {
        self.with(|disk| disk.flush())
    }

    fn is_dirty(&self) -> bool {
        self.with(|disk| disk.is_dirty())
    }

    fn rest(&self, after: Duration) {
        if let Some(Form::Image(image)) = try_read(&self.form).as_deref() {
            image.rest(after);
        }
    }

    fn unlock(&self) -> Result<()> {
        self.with(|disk| disk.unlock())
    }

    fn lock(&self) -> Result<()> {
        self.with(|disk| disk.lock())
    }

    fn file(&self) -> Option<FileId> {
        self.with(|disk| disk.file())
    }

    fn parts(&self) -> Result<Vec<Part>> {
        self.with(|disk| disk.parts())
    }

    fn resize(&self, size: u64, preallocation: Preallocation) -> Result<Vec<String>> {
        let Some(maker) = self.changes_form(size) else {
            return self.with(|disk| disk.resize(size, preallocation));
        };
        let mut form = write(&self.form);
        let (changed, warnings) = match &*form {
            Form::Image(_) => (Form::Blank(maker.empty()?), Vec::new()),
            Form::Blank(blank) => {
                let (image, warnings) = maker.make(blank, size, preallocation)?;
                (Form::Image(image), warnings)
            }
        };
        *form = changed;
        if let Form::Blank(blank) = &*form {
            // The image has taken the lock with it.
            blank.lock()?;
        }
        Ok(warnings)
    }

    fn is_resizable(&self) -> bool {
        self.with(|disk| disk.is_resizable())
    }

    fn is_unsettled(&self) -> bool {
        self.with(|disk| disk.is_unsettled())
    }

    fn runs(&self, offset: u64, len: u64) -> Result<Vec<Run>> {
        self.with(|disk| disk.runs(offset, len))
    }
}

impl Disk for Image {
    /// An image of several files is not among those: its growth may put another
    /// file in the place of the image's, which is for the caller to see.
    fn gathers(&self) -> bool {
        let facts = self.facts();
        facts.no_write.is_none() && facts.no_resize.is_none() && facts.files.is_empty()
    }

    fn format(&self) -> Format {
        self.facts().format
    }

    fn virtual_size(&self) -> u64 {
        self.virtual_size()
    }

    fn size_unit(&self) -> u64 {
        self.facts().size_unit.max(1)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        Ok(self.read_at(buf, offset)?)
    }

    fn write_at(&self, data: &[u8], offset: u64) -> Result<()> {
        Ok(self.write_at(data, offset)?)
    }

    fn preallocate(&self, offset: u64, len: u64) -> Result<()> {
        Ok(self.preallocate(offset, len)?)
    }

    fn zero(&self, offset: u64, len: u64, space: Space) -> Result<()> {
        Ok(self.zero(offset, len, space)?)
    }

    fn flush(&self) -> Result<()> {
        Ok(self.flush()?)
    }

    fn is_dirty(&self) -> bool {
        self.is_dirty()
    }

    fn unlock(&self) -> Result<()> {
        Ok(self.unlock()?)
    }

    fn lock(&self) -> Result<()> {
        Ok(self.lock()?)
    }

    fn file(&self) -> Option<FileId> {
        let files = self.on_disk().ok()?;
        files.first().map(|file| FileId {
            dev: file.dev(),
            ino: file.ino(),
        })
    }

    fn parts(&self) -> Result<Vec<Part>> {
        if self.facts().files.is_empty() {
            return Ok(Vec::new());
        }
        let files = self.parts_by_name()?.into_iter().flatten();
        Ok(files
            .map(|file| Part {
                id: FileId {
                    dev: file.dev(),
                    ino: file.ino(),
                },
                size: file.len(),
                mtime: Time::new(file.mtime(), file.mtime_nsec()),
            })
            .collect())
    }

    fn resize(&self, size: u64, preallocation: Preallocation) -> Result<Vec<String>> {
        let how = ResizeOptions {
            preallocation,
            shrink: size < self.virtual_size(),
        };
        Ok(self.resize(size, &how)?)
    }

    fn is_resizable(&self) -> bool {
        self.facts().no_resize.is_none()
    }

    fn is_unsettled(&self) -> bool {
        self.facts().unsettled.is_some()
    }

    fn runs(&self, offset: u64, len: u64) -> Result<Vec<Run>> {
        let segments = self.first_segments(offset, len, MOST_RUNS)?;
        Ok(segments
            .into_iter()
            .map(|segment| Run {
                offset: segment.offset,
                len: segment.len,
                data: matches!(segment.kind, SegmentKind::Data | SegmentKind::Compressed),
            })
            .collect())
    }
}

impl Disk for Blank {
    fn gathers(&self) -> bool {
        true
    }

    fn format(&self) -> Format {
        self.format()
    }

    fn virtual_size(&self) -> u64 {
        0
    }

    fn size_unit(&self) -> u64 {
        SECTOR
    }

    fn read_at(&self, buf: &mut [u8], _offset: u64) -> Result<()> {
        nothing_there(buf.is_empty())
    }

    fn write_at(&self, data: &[u8], _offset: u64) -> Result<()> {
        nothing_there(data.is_empty())
    }

    fn preallocate(&self, _offset: u64, len: u64) -> Result<()> {
        nothing_there(len == 0)
    }

    fn zero(&self, _offset: u64, len: u64, _space: Space) -> Result<()> {
        nothing_there(len == 0)
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn is_dirty(&self) -> bool {
        false
    }

    fn unlock(&self) -> Result<()> {
        Ok(self.unlock()?)
    }

    fn lock(&self) -> Result<()> {
        Ok(self.lock()?)
    }

    fn file(&self) -> Option<FileId> {
        let metadata = self.file().metadata().ok()?;
        Some(FileId {
            dev: metadata.dev(),
            ino: metadata.ino(),
        })
    }

    fn parts(&self) -> Result<Vec<Part>> {
        Ok(Vec::new())
    }

    fn resize(&self, size: u64, _preallocation: Preallocation) -> Result<Vec<String>> {
        nothing_there(size == 0).map(|()| Vec::new())
    }

    fn is_resizable(&self) -> bool {
        true
    }

    fn is_unsettled(&self) -> bool {
        false
    }

    fn runs(&self, _offset: u64, len: u64) -> Result<Vec<Run>> {
        nothing_there(len == 0).map(|()| Vec::new())
    }
}

/// A range of what is no image yet is refused, unless it is none.
fn nothing_there(is_nothing: bool) -> Result<()> {
    match is_nothing {
        true => Ok(()),
        false => Err(Error::new(Errno::EINVAL, "the file is empty")),
    }
}

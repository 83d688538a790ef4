//! The images of the mount, opened through [`crate::image`].

use super::disk::{At, Disk, Library, Part, Portrait, Run};
use super::error::{Error, Result};
use super::source::{FileId, Time};
use crate::compat::info::{self, Layer, OnDisk};
use crate::image::{
    self, Access, BackingPolicy, Image, Location, OpenOptions, ResizeOptions, SegmentKind, Space,
    Tree,
};
use crate::sandbox::{Pool, escape_deceptive};
use instar_guest::proto::{Format, Preallocation};
use nix::errno::Errno;
use std::fs::File;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::sync::Arc;

/// Opens images in sandboxes of a pool.
pub struct Images {
    /// Where the sandboxes come from.
    pub pool: Arc<Pool>,
    /// The directory below which images may name files.
    pub tree: Arc<Tree>,
    /// More directories below which images may name files.
    pub allow_paths: Vec<PathBuf>,
    /// What happens with images that name a backing image.
    pub backing: BackingPolicy,
}

/// Runs that one call answers at most: an image that changes between data and
/// holes all the time has millions of them, and they take memory.
const MOST_RUNS: usize = 16 << 10;

/// The longest reason from an image that is passed on, in bytes.
const MOST_REASON: usize = 1024;

struct OpenImage(Image);

impl Images {
    fn open_image(
        &self,
        at: At<'_>,
        file: File,
        access: Access,
        backing: BackingPolicy,
    ) -> Result<Image> {
        let options = OpenOptions {
            format: at.format,
            force_share: access == Access::Info,
            backing,
            trust_names: true,
            allow_paths: self.allow_paths.clone(),
            ..OpenOptions::new(access)
        };
        let location = Location {
            path: at.source.display(at.path),
            tree: Arc::clone(&self.tree),
            inside: at.path.to_path_buf(),
        };
        Ok(options.open_file(&self.pool, file, location)?)
    }
}

impl Library for Images {
    fn describe(&self, at: At<'_>, file: File) -> Result<Portrait> {
        let image = self.open_image(at, file, Access::Info, BackingPolicy::Skip)?;
        let facts = image.facts();
        Ok(Portrait {
            format: facts.format,
            virtual_size: facts.virtual_size,
            cluster_size: facts.cluster_size,
            backing: facts.backing.clone(),
            files: facts.files.clone(),
        })
    }

    fn info(&self, at: At<'_>, file: File) -> Result<String> {
        let image = self.open_image(at, file, Access::Info, BackingPolicy::Skip)?;
        let facts = image.facts();
        let on_disk: Vec<OnDisk> = image.on_disk()?.iter().map(OnDisk::from).collect();
        let file = image.path().to_string_lossy().into_owned();
        Ok(info::to_json(&Layer::new(file, &facts, &on_disk)))
    }

    fn open(&self, at: At<'_>, file: File, access: Access) -> Result<Arc<dyn Disk>> {
        let image = self.open_image(at, file, access, self.backing)?;
        if access == Access::Write {
            changeable(&image)?;
        }
        Ok(Arc::new(OpenImage(image)))
    }
}

/// Refuses to open an image for writing in which nothing can be changed. One
/// that can be resized at least is open to truncate(1), which opens for
/// writing.
fn changeable(image: &Image) -> Result<()> {
    match (&image.facts().no_write, &image.facts().no_resize) {
        (Some(why), Some(_)) => Err(Error::new(
            Errno::EROFS,
            format!(
                "{}: {}",
                image.path().display(),
                escape_deceptive(&why.message, MOST_REASON)
            ),
        )),
        _ => Ok(()),
    }
}

impl Disk for OpenImage {
    fn format(&self) -> Format {
        self.0.facts().format
    }

    fn virtual_size(&self) -> u64 {
        self.0.virtual_size()
    }

    fn size_unit(&self) -> u64 {
        self.0.facts().size_unit.max(1)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        Ok(self.0.read_at(buf, offset)?)
    }

    fn write_at(&self, data: &[u8], offset: u64) -> Result<()> {
        Ok(self.0.write_at(data, offset)?)
    }

    fn preallocate(&self, offset: u64, len: u64) -> Result<()> {
        Ok(self.0.preallocate(offset, len)?)
    }

    fn zero(&self, offset: u64, len: u64, space: Space) -> Result<()> {
        Ok(self.0.zero(offset, len, space)?)
    }

    fn flush(&self) -> Result<()> {
        Ok(self.0.flush()?)
    }

    fn is_dirty(&self) -> bool {
        self.0.is_dirty()
    }

    fn unlock(&self) -> Result<()> {
        Ok(self.0.unlock()?)
    }

    fn lock(&self) -> Result<()> {
        Ok(self.0.lock()?)
    }

    fn file(&self) -> Option<FileId> {
        let files = self.0.on_disk().ok()?;
        files.first().map(|file| FileId {
            dev: file.dev(),
            ino: file.ino(),
        })
    }

    fn parts(&self) -> Result<Vec<Part>> {
        if self.0.facts().files.is_empty() {
            return Ok(Vec::new());
        }
        let files = self.0.parts_by_name()?.into_iter().flatten();
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
            shrink: true,
        };
        Ok(self.0.resize(size, &how)?)
    }

    fn is_resizable(&self) -> bool {
        self.0.facts().no_resize.is_none()
    }

    fn is_unsettled(&self) -> bool {
        self.0.facts().unsettled.is_some()
    }

    fn runs(&self, offset: u64, len: u64) -> Result<Vec<Run>> {
        let segments = self.0.first_segments(offset, len, MOST_RUNS)?;
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

impl From<image::Error> for Error {
    fn from(error: image::Error) -> Self {
        let mut text = error.to_string();
        if let Some(hint) = error.hint() {
            text.push_str(". ");
            text.push_str(hint);
        }
        Self::new(Errno::from_raw(error.errno()), text)
    }
}

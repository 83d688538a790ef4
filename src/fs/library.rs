//! The images of the mount, opened through [`crate::image`].

use super::disk::{At, Disk, Library, Portrait};
use super::error::{Error, Result};
use super::open_image::{Form, Maker, OpenImage};
use crate::compat::info::{self, Layer, OnDisk};
use crate::compat::version::QemuVersion;
use crate::image::{self, Access, BackingPolicy, Blank, Image, Location, OpenOptions, Tree};
use crate::sandbox::{Pool, escape_deceptive};
use instar_guest::proto::Format;
use nix::errno::Errno;
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

/// Opens images in sandboxes of a pool.
#[derive(Clone)]
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

/// The longest reason from an image that is passed on, in bytes.
const MOST_REASON: usize = 1024;

impl Images {
    fn open_image(
        &self,
        at: At<'_>,
        file: File,
        access: Access,
        backing: BackingPolicy,
    ) -> Result<Image> {
        let options = self.options(at.format, access, backing);
        Ok(options.open_file(&self.pool, file, self.location(at))?)
    }

    pub(super) fn options(
        &self,
        format: Option<Format>,
        access: Access,
        backing: BackingPolicy,
    ) -> OpenOptions {
        OpenOptions {
            format,
            force_share: access == Access::Info,
            backing,
            trust_names: true,
            allow_paths: self.allow_paths.clone(),
            ..OpenOptions::new(access)
        }
    }

    fn location(&self, at: At<'_>) -> Location {
        Location {
            path: at.source.display(at.path),
            tree: Arc::clone(&self.tree),
            inside: at.path.to_path_buf(),
        }
    }

    /// What turns a file into an image and back, for one that a name of that
    /// format may be written to.
    fn maker(&self, at: At<'_>, file: &File, access: Access) -> Result<Option<Maker>> {
        let format = at.format.filter(|format| *format != Format::Raw);
        let Some(format) = format.filter(|_| access == Access::Write) else {
            return Ok(None);
        };
        Ok(Some(Maker {
            images: self.clone(),
            location: self.location(at),
            format,
            file: file.try_clone()?,
        }))
    }
}

impl Library for Images {
    fn describe(&self, at: At<'_>, file: File) -> Result<Portrait> {
        let image = self.open_image(at, file, Access::Info, BackingPolicy::Skip)?;
        let facts = image.facts();
        Ok(Portrait {
            format: facts.format,
            virtual_size: facts.virtual_size,
            backing: facts.backing.clone(),
            files: facts.files.clone(),
        })
    }

    fn info(&self, at: At<'_>, file: File) -> Result<String> {
        let image = self.open_image(at, file, Access::Info, BackingPolicy::Skip)?;
        let facts = image.facts();
        let on_disk: Vec<OnDisk> = image.on_disk()?.iter().map(OnDisk::from).collect();
        let file = image.path().to_string_lossy().into_owned();
        Ok(info::to_json(
            &Layer::new(file, &facts, &on_disk),
            QemuVersion::CURRENT,
        ))
    }

    fn open(&self, at: At<'_>, file: File, access: Access) -> Result<Arc<dyn Disk>> {
        let maker = self.maker(at, &file, access)?;
        let len = file.metadata()?.len();
        let blank = at
            .format
            .filter(|&format| format != Format::Raw && len == 0);
        let form = match blank {
            Some(format) => Form::Blank(Blank::open(file, self.location(at), format, access)?),
            None => {
                let image = self.open_image(at, file, access, self.backing)?;
                if access == Access::Write {
                    changeable(&image)?;
                }
                Form::Image(image)
            }
        };
        Ok(Arc::new(OpenImage::new(form, maker)))
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

impl From<image::Error> for Error {
    fn from(error: image::Error) -> Self {
        let mut text = error.to_string();
        if let Some(hint) = error.hint() {
            text.push_str(". ");
            text.push_str(hint);
        }
        Self {
            below: error.kind() == image::ErrorKind::Os(libc::EIO),
            ..Self::new(Errno::from_raw(error.errno()), text)
        }
    }
}

//! Images that exist in memory only. An image file is a line of text:
//! `size=N`, and optionally `backing=NAME`, `data=NAME` (any number), `as=vmdk` or
//! `damaged`.

use crate::fs::disk::{At, Disk, Library, Part, Portrait, Run};
use crate::fs::error::{Error, Result};
use crate::fs::source::FileId;
use crate::fs::sync::lock;
use crate::image::{Access, Space};
use instar_guest::facts::{Backing, NamedFile};
use instar_guest::proto::{Format, Preallocation};
use nix::errno::Errno;
use std::collections::HashMap;
use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Where the data of every fake disk ends and its hole begins.
pub const MIB: u64 = 1 << 20;

/// What happened to an image, in order, and what other processes do to it.
#[derive(Default)]
pub struct Shelf {
    pub content: HashMap<u64, Vec<u8>>,
    pub allocated: Vec<(u64, u64)>,
    /// What is appended may wait.
    pub gathers: bool,
    pub zeroed: Vec<(u64, u64, Space)>,
    pub events: Vec<&'static str>,
    pub locked_by_others: bool,
    pub changed_by_others: bool,
    pub fail_flush: bool,
    /// After how long without a request the image was last told to rest.
    pub rested: Option<Duration>,
    pub full: bool,
    /// The next resize fails after the new size is on disk.
    pub resizes_halfway: bool,
    /// What such a resize has left behind.
    pub unsettled: bool,
    /// Whether the image itself knows that.
    pub tells_unsettled: bool,
    /// Sizes cannot be changed.
    pub fixed: bool,
    /// The size in bytes to which a disk shrinks just before it is written.
    pub shrinks_to: Option<usize>,
    pub fail_describe: Option<Errno>,
    /// Whether that is the fault of a disk below.
    pub fails_below: bool,
    /// What keeps an image from being opened or locked.
    pub fail_open: Option<Errno>,
    pub opens_as_raw: bool,
    /// The inode of the file that a resize has put in the image's place.
    pub replaced_by: Option<u64>,
    /// The other files of every image.
    pub parts: Vec<Part>,
    /// What others do once a disk has been asked for its size, while a range is
    /// zeroed, and while an image is being opened.
    pub after_size: Option<Box<dyn FnOnce() + Send>>,
    pub during_zero: Option<Box<dyn FnOnce() + Send>>,
    pub during_open: Option<Box<dyn FnOnce() + Send>>,
}

impl Shelf {
    fn may_open(&self) -> Result<()> {
        if self.locked_by_others {
            return Err(Error::new(Errno::EBUSY, "locked by qemu"));
        }
        self.fail_open.map_or(Ok(()), |errno| Err(errno.into()))
    }
}

pub struct FakeLibrary(pub Arc<Mutex<Shelf>>);

struct FakeDisk {
    shelf: Arc<Mutex<Shelf>>,
    dev: u64,
    ino: u64,
    format: Format,
    dirty: Mutex<bool>,
}

fn parse(mut file: File) -> Result<Portrait> {
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    let field = |name: &str| {
        text.split_whitespace()
            .find_map(|word| word.strip_prefix(name))
            .map(str::to_string)
    };
    let named = |name: &str| field(name).map(|name| NamedFile { name, format: None });
    match field("size=") {
        Some(_) if text.contains("damaged") => Err(Error::new(Errno::EIO, "damaged")),
        Some(size) => Ok(Portrait {
            format: match field("as=") {
                Some(_) => Format::Vmdk,
                None => Format::Qcow2,
            },
            virtual_size: size.parse().unwrap(),
            backing: named("backing=").map(Backing::named),
            files: text
                .split_whitespace()
                .filter_map(|word| word.strip_prefix("data="))
                .map(|name| NamedFile {
                    name: name.to_string(),
                    format: None,
                })
                .collect(),
        }),
        None => Ok(Portrait {
            format: Format::Raw,
            virtual_size: text.len() as u64,
            backing: None,
            files: Vec::new(),
        }),
    }
}

impl Library for FakeLibrary {
    fn describe(&self, at: At<'_>, file: File) -> Result<Portrait> {
        let mut shelf = lock(&self.0);
        shelf.events.push("describe");
        if let Some(errno) = shelf.fail_describe {
            let below = shelf.fails_below;
            return Err(Error {
                below,
                ..errno.into()
            });
        }
        let portrait = parse(file)?;
        if at.format.is_some_and(|format| format != portrait.format) {
            return Err(Error::new(Errno::EIO, "not this format"));
        }
        Ok(portrait)
    }

    fn info(&self, _at: At<'_>, file: File) -> Result<String> {
        Ok(format!(
            "{{\"virtual-size\":{}}}",
            parse(file)?.virtual_size
        ))
    }

    fn open(&self, _at: At<'_>, file: File, access: Access) -> Result<Arc<dyn Disk>> {
        let (dev, ino) = (file.metadata()?.dev(), file.metadata()?.ino());
        let meanwhile = lock(&self.0).during_open.take();
        meanwhile.into_iter().for_each(|act| act());
        let Portrait {
            format,
            virtual_size: size,
            ..
        } = parse(file)?;
        let mut shelf = lock(&self.0);
        shelf.may_open()?;
        shelf.events.push(match access {
            Access::Write => "open to write",
            Access::Read | Access::Info => "open to read",
        });
        let size = usize::try_from(size).unwrap();
        shelf.content.entry(ino).or_insert_with(|| vec![0; size]);
        Ok(Arc::new(FakeDisk {
            shelf: Arc::clone(&self.0),
            dev,
            ino,
            format: if shelf.opens_as_raw {
                Format::Raw
            } else {
                format
            },
            dirty: Mutex::new(false),
        }))
    }
}

impl FakeDisk {
    fn with<R>(&self, work: impl FnOnce(&mut Vec<u8>) -> R) -> R {
        work(lock(&self.shelf).content.get_mut(&self.ino).unwrap())
    }
}

impl Drop for FakeDisk {
    fn drop(&mut self) {
        lock(&self.shelf).events.push("close");
    }
}

impl Disk for FakeDisk {
    fn format(&self) -> Format {
        self.format
    }

    fn virtual_size(&self) -> u64 {
        let size = self.with(|content| content.len() as u64);
        let next = lock(&self.shelf).after_size.take();
        next.into_iter().for_each(|act| act());
        size
    }

    fn size_unit(&self) -> u64 {
        512
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let offset = usize::try_from(offset).unwrap();
        self.with(|content| buf.copy_from_slice(&content[offset..offset + buf.len()]));
        Ok(())
    }

    fn write_at(&self, data: &[u8], offset: u64) -> Result<()> {
        let offset = usize::try_from(offset).unwrap();
        let shrinks_to = lock(&self.shelf).shrinks_to.take();
        if let Some(size) = shrinks_to {
            self.with(|content| content.truncate(size));
        }
        self.with(|content| {
            let range = content.get_mut(offset..offset + data.len());
            range.ok_or(Errno::EINVAL)?.copy_from_slice(data);
            *lock(&self.dirty) = true;
            Ok(())
        })
    }

    fn rest(&self, after: Duration) {
        lock(&self.shelf).rested = Some(after);
    }

    fn preallocate(&self, offset: u64, len: u64) -> Result<()> {
        assert!(offset + len <= self.virtual_size());
        if lock(&self.shelf).full {
            return Err(Error::new(Errno::ENOSPC, "no space"));
        }
        lock(&self.shelf).allocated.push((offset, len));
        *lock(&self.dirty) = true;
        Ok(())
    }

    fn gathers(&self) -> bool {
        lock(&self.shelf).gathers
    }

    fn zero(&self, offset: u64, len: u64, space: Space) -> Result<()> {
        lock(&self.shelf).zeroed.push((offset, len, space));
        let meanwhile = lock(&self.shelf).during_zero.take();
        meanwhile.into_iter().for_each(|act| act());
        self.write_at(&vec![0; usize::try_from(len).unwrap()], offset)
    }

    fn flush(&self) -> Result<()> {
        let mut shelf = lock(&self.shelf);
        if shelf.fail_flush {
            return Err(Error::new(Errno::ENOSPC, "no space"));
        }
        let dirty = std::mem::take(&mut *lock(&self.dirty));
        shelf
            .events
            .push(if dirty { "flush" } else { "flush nothing" });
        Ok(())
    }

    fn is_dirty(&self) -> bool {
        *lock(&self.dirty)
    }

    fn unlock(&self) -> Result<()> {
        assert!(!self.is_dirty());
        lock(&self.shelf).events.push("unlock");
        Ok(())
    }

    fn lock(&self) -> Result<()> {
        let mut shelf = lock(&self.shelf);
        shelf.may_open()?;
        if std::mem::take(&mut shelf.changed_by_others) {
            return Err(Error::new(Errno::ESTALE, "changed"));
        }
        shelf.events.push("lock");
        Ok(())
    }

    fn file(&self) -> Option<FileId> {
        let shelf = lock(&self.shelf);
        let ino = shelf.replaced_by.unwrap_or(self.ino);
        Some(FileId { dev: self.dev, ino })
    }

    fn parts(&self) -> Result<Vec<Part>> {
        Ok(lock(&self.shelf).parts.clone())
    }

    fn resize(&self, size: u64, preallocation: Preallocation) -> Result<Vec<String>> {
        let old = self.virtual_size();
        if lock(&self.shelf).full && size > old {
            return Err(Error::new(Errno::ENOSPC, "no space"));
        }
        assert!(size > old || preallocation == Preallocation::Off);
        self.with(|content| content.resize(usize::try_from(size).unwrap(), 0));
        let mut shelf = lock(&self.shelf);
        shelf.events.push("resize");
        shelf.unsettled = std::mem::take(&mut shelf.resizes_halfway);
        if shelf.unsettled {
            return Err(Error::new(Errno::EIO, "half way"));
        }
        drop(shelf);
        if preallocation == Preallocation::Falloc {
            lock(&self.shelf).allocated.push((old, size - old));
        }
        Ok(Vec::new())
    }

    fn is_resizable(&self) -> bool {
        !lock(&self.shelf).fixed
    }

    fn is_unsettled(&self) -> bool {
        let shelf = lock(&self.shelf);
        shelf.unsettled && shelf.tells_unsettled
    }

    fn runs(&self, offset: u64, len: u64) -> Result<Vec<Run>> {
        let end = offset + len;
        let split = end.min(MIB);
        let mut runs = Vec::new();
        if offset < split {
            runs.push(Run {
                offset,
                len: split - offset,
                data: true,
            });
        }
        if end > split.max(offset) {
            runs.push(Run {
                offset: split.max(offset),
                len: end - split.max(offset),
                data: false,
            });
        }
        // Whoever asks must be content with the start of the range.
        runs.truncate(1);
        Ok(runs)
    }
}

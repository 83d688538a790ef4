//! Making a new image: complete under its name, or not there at all.

use super::change::{SLACK, limits, streamed_part};
use super::error::{Error, Fault, Operation, printable_name};
use super::execute::{Aborted, execute};
use super::files::FileTable;
use super::guest::{Guest, Serving, Stream};
use super::handles::{Id, id, id_of};
use super::home::{Home, directory};
use super::lock::LockSet;
use super::names::{Names, Place};
use super::open::{check_regular, fresh, replaced};
use super::plan_check::{Commits, Limits, check};
use super::plan_names::NameLimits;
use super::reach::spare_files;
use super::read::unexpected;
use crate::sandbox::Pool;
use instar_guest::plan::{NewName, Step};
use instar_guest::proto::{Create, PlanReply};
use instar_guest::{FileNo, Plan, Reply, Request};
use nix::fcntl::{AtFlags, OFlag};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::Mode;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;

/// The most memory that the plan takes, in bytes; a longer one is made twice.
const PLAN: usize = 64 << 20;
/// Permissions of a new image, before the umask; QEMU's choice.
const MODE: u32 = 0o644;

/// What [`create`] has done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Created {
    /// Every effective option, in the order in which qemu-img prints them.
    pub options: Vec<(String, String)>,
    /// Warnings for the user.
    pub warnings: Vec<String>,
}

/// Makes a new image at `path`, and beside it the other files that an image of
/// several files consists of.
///
/// A path without a file gets the complete image or nothing. A file that is
/// there already, under the path or under the name of another file that the
/// image consists of, is locked, emptied and written in place; a refused request
/// leaves it as it was. A failure after that says which files are empty now.
pub fn create(pool: &Arc<Pool>, path: &Path, create: &Create) -> Result<Created, Error> {
    pool.session()
        .map_err(Fault::from)
        .and_then(|mut session| create_with(&mut session, path, create))
        .map_err(|fault| fault.at(Operation::Create, path))
}

pub(super) fn create_with(
    guest: &mut dyn Guest,
    path: &Path,
    create: &Create,
) -> Result<Created, Fault> {
    let existing = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path);
    let mut making = Making::new(guest, path, Home::Path(path.to_path_buf()), create)?;
    let reply = match existing {
        Ok(file) => making.overwrite(file)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => making.make()?,
        Err(error) => return Err(error.into()),
    };
    Ok(created(reply))
}

/// Makes an image of a file that is open, and stays locked; its name is durable
/// then, too.
pub(super) fn create_over(
    guest: &mut dyn Guest,
    file: File,
    home: &Home,
    path: &Path,
    create: &Create,
) -> Result<Created, Fault> {
    let mut making = Making::new(guest, path, home.clone(), create)?;
    making.keeps_lock = true;
    let reply = making.overwrite(file)?;
    Place::of(home)?.dir.sync_all()?;
    Ok(created(reply))
}

fn created(reply: PlanReply) -> Created {
    Created {
        options: reply.options,
        warnings: reply.warnings,
    }
}

/// An image that is being made.
struct Making<'a> {
    guest: &'a mut dyn Guest,
    path: &'a Path,
    /// Where it is to be found.
    home: Home,
    /// Whether the file stays locked when the image is complete.
    keeps_lock: bool,
    create: &'a Create,
    request: Request,
}

/// The plan of a new image.
struct Draft {
    reply: PlanReply,
    /// Whether it is all of the plan: its first parts were not too many.
    whole: bool,
}

impl<'a> Making<'a> {
    fn new(
        guest: &'a mut dyn Guest,
        path: &'a Path,
        home: Home,
        create: &'a Create,
    ) -> Result<Self, Fault> {
        let name = path.file_name().unwrap_or_default();
        let request = Request::Create {
            create: create.clone(),
            name: name.to_string_lossy().into_owned(),
            fresh: fresh()?,
        };
        Ok(Self {
            guest,
            path,
            home,
            keeps_lock: false,
            create,
            request,
        })
    }

    /// Writes the image over a file. Until the last step, which writes its
    /// first sector, it is no image at all.
    fn overwrite(&mut self, file: File) -> Result<PlanReply, Fault> {
        check_regular(&file, self.path)?;
        LockSet::CREATE.take(&file, self.path)?;
        if !self.home.holds(&file)? {
            return Err(replaced());
        }
        let draft = self.draft()?;
        let names = self.names(&draft.reply.plan, &[id_of(&file)?])?;
        file.set_len(0)?;
        let mut files = table(file, names)?;
        files.locked = !self.keeps_lock;
        let written = self.write(&files, draft);
        written.map_err(|fault| {
            let fault = tidy(&files, fault);
            match files.set_len(FileNo::IMAGE, 0) {
                Ok(()) => fault.and("the file is empty now"),
                Err(_) => fault.and("the file is no image now"),
            }
        })
    }

    /// Writes the image to a file without a name and then gives it one.
    fn make(&mut self) -> Result<PlanReply, Fault> {
        let dir = directory(self.path);
        let nameless = OFlag::O_TMPFILE | OFlag::O_RDWR | OFlag::O_CLOEXEC;
        let mode = Mode::from_bits_truncate(MODE);
        let draft = self.draft()?;
        let names = self.names(&draft.reply.plan, &[])?;
        let reply = match nix::fcntl::open(dir, nameless, mode) {
            Ok(file) => {
                let file = File::from(file);
                let name = format!("/proc/self/fd/{}", file.as_raw_fd());
                self.write_and_name(table(file, names)?, draft, |path| {
                    let here = nix::fcntl::AT_FDCWD;
                    let follow = AtFlags::AT_SYMLINK_FOLLOW;
                    Ok(nix::unistd::linkat(
                        here,
                        name.as_str(),
                        here,
                        path,
                        follow,
                    )?)
                })?
            }
            // The filesystem has no files without names.
            Err(nix::errno::Errno::EOPNOTSUPP | nix::errno::Errno::EISDIR) => {
                let file = tempfile::Builder::new()
                    .prefix(".instar-new-")
                    .permissions(std::fs::Permissions::from_mode(MODE))
                    .tempfile_in(dir)?;
                let same = file.as_file().try_clone()?;
                self.write_and_name(table(same, names)?, draft, |path| {
                    file.persist_noclobber(path).map_err(|error| error.error)?;
                    Ok(())
                })?
            }
            Err(errno) => return Err(io::Error::from(errno).into()),
        };
        File::open(dir)?.sync_all()?;
        Ok(reply)
    }

    /// The image appears last. Where it does not, nothing that was made for it
    /// stays.
    fn write_and_name(
        &mut self,
        files: FileTable,
        draft: Draft,
        name: impl FnOnce(&Path) -> io::Result<()>,
    ) -> Result<PlanReply, Fault> {
        let written = self.write(&files, draft).and_then(|reply| {
            name(self.path)?;
            Ok(reply)
        });
        written.map_err(|fault| tidy(&files, fault))
    }

    /// Asks for the plan and checks it, before anything is touched.
    fn draft(&mut self) -> Result<Draft, Fault> {
        let empty = memfd_create(c"instar-new", MFdFlags::MFD_CLOEXEC).map_err(io::Error::from)?;
        let blank = FileTable::new(empty.into(), true, None)?;
        let stream = Stream::Draft {
            stages: Some(Vec::new()),
            room: PLAN,
        };
        let (mut reply, stream) = self.ask(&blank, stream)?;
        let whole = match stream {
            Stream::Draft {
                stages: Some(stages),
                ..
            } => {
                reply.plan.stages.splice(0..0, stages);
                check(&reply.plan, &self.limits(&blank))?;
                true
            }
            _ => false,
        };
        Ok(Draft { reply, whole })
    }

    /// Asks for the plan; answers it, and what became of its first parts.
    fn ask(&mut self, files: &FileTable, stream: Stream) -> Result<(PlanReply, Stream), Fault> {
        let mut serving = Serving::new(files, stream);
        let answer = self.guest.call(&self.request, &mut serving);
        if let (Err(_), Some(refusal)) = (&answer, serving.refusal) {
            return Err(refusal);
        }
        match answer? {
            Reply::Plan(reply) => Ok((reply, serving.stream)),
            _ => Err(unexpected("Create")),
        }
    }

    fn limits(&self, files: &FileTable) -> Limits {
        let create = self.create;
        let metadata = SLACK + create.size / 8;
        let allocated = |(key, value): &(String, String)| key == "preallocation" && value != "off";
        let fill = match create.options.iter().any(allocated) {
            // Reserved first, then written.
            true => metadata.saturating_add(create.size.saturating_mul(2)),
            false => metadata,
        };
        let room = metadata.saturating_add(create.size);
        Limits {
            names: Some(NameLimits {
                most: spare_files(1),
                cap: room,
                has: None,
            }),
            ..limits(files, room, fill, Commits::Last, false)
        }
    }

    /// The names that the plan makes. Files that are there already are locked:
    /// nothing has been done to any of them.
    fn names(&self, plan: &Plan, image: &[Id]) -> Result<Names, Fault> {
        let steps = plan.stages.iter().flat_map(|stage| &stage.steps);
        let plain = steps.filter_map(|step| match step {
            Step::Create {
                name: NewName::Plain(name),
                ..
            } => Some(name.as_str()),
            _ => None,
        });
        let place = Place::of(&self.home)?;
        let wanted: Vec<&str> = plain.collect();
        let avoid: Vec<Id> = image.iter().copied().chain(self.backing()).collect();
        Names::beside(place, Mode::from_bits_truncate(MODE), &wanted, &avoid)
    }

    /// The backing file, if it is there: its name is relative to the image.
    fn backing(&self) -> Option<Id> {
        let named = self.create.backing.as_ref()?;
        let path = directory(self.path).join(&named.name);
        Some(id(&std::fs::metadata(path).ok()?))
    }

    /// Writes a whole plan, or has the plan made once more and writes it as it
    /// comes: it is the same plan.
    fn write(&mut self, files: &FileTable, draft: Draft) -> Result<PlanReply, Fault> {
        let mut limits = self.limits(files);
        let reply = match draft.whole {
            true => draft.reply,
            false => {
                let stream = Stream::Execute(streamed_part(&limits));
                let (reply, stream) = self.ask(files, stream)?;
                if let Stream::Execute(left) = stream {
                    limits.go_on(&left);
                }
                files.sync()?;
                reply
            }
        };
        check(&reply.plan, &limits)?;
        execute(files, &reply.plan, &files.lens()).map_err(Aborted::cause)?;
        Ok(reply)
    }
}

/// Removes the files that were made beside an image that there is not going to
/// be, and says of those that had been there what has become of them.
fn tidy(files: &FileTable, fault: Fault) -> Fault {
    let emptied = files.empty_again();
    files.remove_made(1);
    emptied.iter().fold(fault, |fault, name| {
        fault.and(&format!("'{}' is empty now", printable_name(name)))
    })
}

/// The table of a new image.
fn table(file: File, names: Names) -> io::Result<FileTable> {
    let mut files = FileTable::new(file, true, None)?;
    files.locked = true;
    files.allow_names(names);
    Ok(files)
}

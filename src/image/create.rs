//! Making a new image: complete under its name, or not there at all.

use super::change::limits;
use super::error::{Error, ErrorKind, Fault, Operation};
use super::execute::{Aborted, execute};
use super::files::FileTable;
use super::guest::{Guest, Serving, Stream};
use super::home::Home;
use super::lock::LockSet;
use super::open::{check_regular, fresh};
use super::plan_check::{Commits, check};
use super::read::unexpected;
use crate::sandbox::Pool;
use instar_guest::proto::{Create, PlanReply};
use instar_guest::{Plan, Reply, Request};
use nix::fcntl::{AtFlags, OFlag};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::Mode;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;

/// Room for metadata besides an eighth of the disk's size, in bytes.
const SLACK: u64 = 64 << 20;
/// The most memory that the plan takes, in bytes.
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

/// Makes a new image at `path`.
///
/// A path without a file gets the complete image or nothing. A file that is
/// there already is locked, emptied and written in place; a refused request
/// leaves it as it was.
pub fn create(pool: &Arc<Pool>, path: &Path, create: &Create) -> Result<Created, Error> {
    pool.session()
        .map_err(Fault::from)
        .and_then(|mut session| create_with(&mut session, path, create))
        .map_err(|fault| fault.at(Operation::Create, path))
}

fn create_with(guest: &mut dyn Guest, path: &Path, create: &Create) -> Result<Created, Fault> {
    let existing = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path);
    let reply = match existing {
        Ok(file) => overwrite(guest, file, path, create)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => make(guest, path, create)?,
        Err(error) => return Err(error.into()),
    };
    Ok(Created {
        options: reply.options,
        warnings: reply.warnings,
    })
}

/// Writes the image over a file. Until the last step, which writes its first
/// sector, it is no image at all.
fn overwrite(
    guest: &mut dyn Guest,
    file: File,
    path: &Path,
    create: &Create,
) -> Result<PlanReply, Fault> {
    check_regular(&file)?;
    LockSet::CREATE.take(&file, path)?;
    if !Home::Path(path.to_path_buf()).holds(&file)? {
        return Err(Fault::new(
            ErrorKind::Stale,
            "The file was replaced by another while it was being opened",
        ));
    }
    let reply = plan(guest, path, create)?;
    file.set_len(0)?;
    write(file, &reply.plan, create).map_err(|fault| fault.and("the file is empty now"))?;
    Ok(reply)
}

/// Writes the image to a file without a name and then gives it one.
fn make(guest: &mut dyn Guest, path: &Path, create: &Create) -> Result<PlanReply, Fault> {
    let dir = match path.parent() {
        Some(dir) if dir != Path::new("") => dir,
        _ => Path::new("."),
    };
    let nameless = OFlag::O_TMPFILE | OFlag::O_RDWR | OFlag::O_CLOEXEC;
    let mode = Mode::from_bits_truncate(MODE);
    let reply = plan(guest, path, create)?;
    match nix::fcntl::open(dir, nameless, mode) {
        Ok(file) => {
            let file = File::from(file);
            write(file.try_clone()?, &reply.plan, create)?;
            let open = format!("/proc/self/fd/{}", file.as_raw_fd());
            let here = nix::fcntl::AT_FDCWD;
            nix::unistd::linkat(here, open.as_str(), here, path, AtFlags::AT_SYMLINK_FOLLOW)
                .map_err(io::Error::from)?;
        }
        // The filesystem has no files without names.
        Err(nix::errno::Errno::EOPNOTSUPP | nix::errno::Errno::EISDIR) => {
            let file = tempfile::Builder::new()
                .prefix(".instar-new-")
                .permissions(std::fs::Permissions::from_mode(MODE))
                .tempfile_in(dir)?;
            write(file.as_file().try_clone()?, &reply.plan, create)?;
            file.persist_noclobber(path).map_err(|error| error.error)?;
        }
        Err(errno) => return Err(io::Error::from(errno).into()),
    }
    File::open(dir)?.sync_all()?;
    Ok(reply)
}

/// Asks for the plan and checks it, before anything is touched.
fn plan(guest: &mut dyn Guest, path: &Path, create: &Create) -> Result<PlanReply, Fault> {
    let empty = memfd_create(c"instar-new", MFdFlags::MFD_CLOEXEC).map_err(io::Error::from)?;
    let blank = FileTable::new(empty.into(), true, None)?;
    let stream = Stream::Collect {
        stages: Vec::new(),
        room: PLAN,
    };
    let mut serving = Serving::new(&blank, stream);
    let name = path.file_name().unwrap_or_default();
    let request = Request::Create {
        create: create.clone(),
        name: name.to_string_lossy().into_owned(),
        fresh: fresh()?,
    };
    let answer = guest.call(&request, &mut serving);
    if let (Err(_), Some(refusal)) = (&answer, serving.refusal) {
        return Err(refusal);
    }
    let Reply::Plan(mut reply) = answer? else {
        return Err(unexpected("Create"));
    };
    if let Stream::Collect { stages, .. } = serving.stream {
        reply.plan.stages.splice(0..0, stages);
    }
    check_plan(&blank, &reply.plan, create)?;
    Ok(reply)
}

fn check_plan(files: &FileTable, plan: &Plan, create: &Create) -> Result<(), Fault> {
    let metadata = SLACK + create.size / 8;
    let allocated = |(key, value): &(String, String)| key == "preallocation" && value != "off";
    let fill = match create.options.iter().any(allocated) {
        // Reserved first, then written.
        true => metadata.saturating_add(create.size.saturating_mul(2)),
        false => metadata,
    };
    let room = metadata.saturating_add(create.size);
    check(plan, &limits(files, room, fill, Commits::Last, false))?;
    Ok(())
}

fn write(file: File, plan: &Plan, create: &Create) -> Result<(), Fault> {
    let mut files = FileTable::new(file, true, None)?;
    files.locked = true;
    check_plan(&files, plan, create)?;
    execute(&files, plan, &files.lens()).map_err(Aborted::cause)
}

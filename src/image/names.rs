//! The names of an image's files while a plan changes them: in which directory
//! each is, what a new file gets from the image, what is to be made durable.

use super::error::{ErrorKind, Fault, printable_name};
use super::gate::{may_rename, may_use};
use super::handles::{Handle, Id, id_of};
use super::home::{Home, directory};
use super::lock::LockSet;
use instar_guest::FileNo;
use instar_guest::plan::NewName;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat, renameat};
use nix::sys::stat::{Mode, SFlag, fstatat};
use nix::unistd::{UnlinkatFlags, unlinkat};
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::fs::{File, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
use std::path::Path;
use std::sync::Arc;
use xattr::FileExt;

/// What is put behind the image's name for the file that takes its place.
const REPLACEMENT: &str = ".instar-new";
/// Extended attributes that a new file gets from the image: what users set, who
/// else may use the file, and its label. All others describe the old content.
const ATTRIBUTES: [&str; 3] = ["user.", ACCESS_LIST, "security.selinux"];
/// Who else may use a file than its permissions say.
const ACCESS_LIST: &str = "system.posix_acl_access";

/// A name in an open directory.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    pub dir: Arc<File>,
    pub name: OsString,
}

impl Place {
    /// The place of a file's name.
    pub fn of(home: &Home) -> io::Result<Self> {
        let (tree, path) = home.tree()?;
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
        Ok(Self {
            dir: Arc::new(tree.open_below(directory(&path), flags)?),
            name: path.file_name().unwrap_or_default().to_owned(),
        })
    }

    /// Another name in the same directory.
    fn beside(&self, name: OsString) -> Self {
        let dir = Arc::clone(&self.dir);
        Self { dir, name }
    }

    /// Where the file waits that takes the place of this one.
    fn replacement(&self) -> Self {
        let mut name = self.name.clone();
        name.push(REPLACEMENT);
        self.beside(name)
    }

    /// Whether the name is that of anything.
    fn is_taken(&self) -> io::Result<bool> {
        let name = self.name.as_os_str();
        match fstatat(&*self.dir, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(_) => Ok(true),
            Err(Errno::ENOENT) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    /// The same, with the directory of a known place where it is the same one:
    /// it is made durable once.
    fn of_known(home: &Home, known: &[Self]) -> io::Result<Self> {
        let mut place = Self::of(home)?;
        let id = id_of(&place.dir)?;
        let same = |known: &&Self| id_of(&known.dir).is_ok_and(|known| known == id);
        if let Some(known) = known.iter().find(same) {
            place.dir = Arc::clone(&known.dir);
        }
        Ok(place)
    }

    /// Refuses changes of names in a directory in which one of the owners could
    /// not make them himself: that of `file`, or of none that is there yet.
    fn check_owners(&self, owners: &[u32], file: Option<&File>) -> Result<(), Fault> {
        let dir = self.dir.metadata()?;
        let file = file.map(File::metadata).transpose()?;
        let mut owners = owners.iter();
        match owners.all(|&owner| may_rename(owner, &dir, file.as_ref())) {
            true => Ok(()),
            false => Err(Fault::new(
                ErrorKind::Forbidden,
                format!(
                    "'{}' lies in a directory in which the owner of the image may not change it; \
                     change a copy in a directory of his",
                    printable_name(&self.name.to_string_lossy())
                ),
            )),
        }
    }

    /// Refuses to remove what may be anything but a file that nothing refers to
    /// and nobody uses. It is closed again: there may be more of them than may be
    /// open.
    fn check_left(&self, lock: Option<LockSet>, owners: &[u32]) -> Result<(), Fault> {
        let flags = OFlag::O_RDWR | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
        let shown = printable_name(&self.name.to_string_lossy());
        let file = open_at(&self.dir, &self.name, flags, Mode::empty())
            .map_err(|error| Fault::os(format_args!("Could not open '{shown}'"), error))?;
        super::open::check_regular(&file)?;
        self.check(&file)?;
        self.check_owners(owners, Some(&file))?;
        let metadata = file.metadata()?;
        if !owners.iter().all(|&owner| may_use(owner, &metadata, true)) {
            return Err(Fault::new(
                ErrorKind::Forbidden,
                format!("'{shown}' belongs to another user"),
            ));
        }
        match lock {
            Some(lock) => lock.take(&file, Path::new(&self.name)),
            None => Ok(()),
        }
    }

    /// Refuses a name that cannot be given to another file so that the file
    /// that has it now is gone.
    fn check(&self, file: &File) -> Result<(), Fault> {
        let shown = printable_name(&self.name.to_string_lossy());
        let stat = fstatat(
            &*self.dir,
            self.name.as_os_str(),
            AtFlags::AT_SYMLINK_NOFOLLOW,
        )
        .map_err(|errno| Fault::os(format_args!("Could not look at '{shown}'"), errno.into()))?;
        if SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits()) == SFlag::S_IFLNK {
            return Err(unsupported(format!(
                "'{shown}' is a symbolic link, and the change would replace the link; \
                 name the file that it leads to"
            )));
        }
        if (stat.st_dev, stat.st_ino) != id_of(file)? {
            return Err(super::open::replaced());
        }
        match stat.st_nlink {
            0 | 1 => Ok(()),
            count => Err(unsupported(format!(
                "'{shown}' has {count} names (hard links), and the change would leave the old \
                 file under the others; remove those, or change a copy"
            ))),
        }
    }
}

fn both(name: &str) -> Fault {
    Fault::new(
        ErrorKind::InvalidRequest,
        format!(
            "'{}' would be a part of the image, and is the image itself or its backing file",
            printable_name(name)
        ),
    )
}

fn unsupported(message: String) -> Fault {
    Fault::new(ErrorKind::Unsupported, message)
}

/// How a new file comes into being.
#[derive(Debug)]
enum Birth {
    /// As a copy of the image's attributes.
    Like(Arc<Handle>),
    /// With these permissions, or by emptying a file that is there.
    New {
        mode: Mode,
        there: BTreeMap<OsString, File>,
        emptied: Vec<(OsString, File)>,
    },
}

/// The names of an image's files.
#[derive(Debug)]
pub(crate) struct Names {
    image: Place,
    birth: Birth,
    lock: Option<LockSet>,
    /// By file number.
    places: BTreeMap<FileNo, Place>,
    /// What is there of what an interrupted plan left and this one removes.
    left: BTreeSet<OsString>,
    /// Directories in which names changed since they were durable.
    changed: Vec<Arc<File>>,
}

impl Names {
    /// The names that a plan over an open image changes. `targets` are the
    /// files, with where they are, whose names it gives to others or removes.
    /// Besides come the names of its own that it gives to new files, which nobody
    /// has yet, and those under which it removes what is left. Each of `owners`
    /// must be allowed to change them, and to make new ones.
    pub fn over(
        home: &Home,
        image: Arc<Handle>,
        targets: Vec<(FileNo, Arc<Handle>)>,
        [wanted, left]: [&[&str]; 2],
        lock: Option<LockSet>,
        owners: &[u32],
    ) -> Result<Self, Fault> {
        let own = Place::of(home)?;
        own.check_owners(owners, None)?;
        let mut known = vec![own.clone()];
        let mut places = BTreeMap::new();
        for (number, target) in targets {
            let place = match (number, target.home.get()) {
                (FileNo::IMAGE, _) => own.clone(),
                (_, Some(home)) => Place::of_known(home, &known)?,
                (_, None) => return Err(super::open::replaced()),
            };
            place.check(&target.file)?;
            place.check_owners(owners, Some(&target.file))?;
            if !known
                .iter()
                .any(|other| Arc::ptr_eq(&other.dir, &place.dir))
            {
                known.push(place.clone());
            }
            places.insert(number, place);
        }
        wanted.iter().try_for_each(|name| check_free(&own, name))?;
        let left = left_over(&own, left, lock, owners)?;
        Ok(Self {
            image: own,
            birth: Birth::Like(image),
            lock,
            places,
            left,
            changed: Vec::new(),
        })
    }

    /// The names beside a new image. Files that are there already are emptied
    /// when their turn comes: they are locked from now on.
    pub fn beside(image: Place, mode: Mode, wanted: &[&str], avoid: &[Id]) -> Result<Self, Fault> {
        let mut there = BTreeMap::new();
        for name in wanted {
            if *image.name == **name {
                return Err(both(name));
            }
            let flags = OFlag::O_RDWR | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
            let file = match open_at(&image.dir, OsStr::new(name), flags, Mode::empty()) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => {
                    let shown = printable_name(name);
                    return Err(Fault::os(format_args!("Could not open '{shown}'"), error));
                }
            };
            super::open::check_regular(&file)?;
            if avoid.contains(&id_of(&file)?) {
                return Err(both(name));
            }
            LockSet::CREATE.take(&file, Path::new(name))?;
            there.insert(OsString::from(name), file);
        }
        Ok(Self {
            image,
            birth: Birth::New {
                mode,
                there,
                emptied: Vec::new(),
            },
            lock: Some(LockSet::CREATE),
            places: BTreeMap::new(),
            left: BTreeSet::new(),
            changed: Vec::new(),
        })
    }

    /// Makes an empty file, which gets the number; locks it.
    pub fn create(&mut self, number: FileNo, name: &NewName) -> io::Result<Handle> {
        let (place, leftover) = match name {
            NewName::Plain(name) => (self.image.beside(name.into()), false),
            NewName::Replacement => (self.image.replacement(), true),
        };
        if let Birth::New { there, emptied, .. } = &mut self.birth
            && let Some(file) = there.remove(&place.name)
        {
            let same = file.try_clone()?;
            file.set_len(0)?;
            emptied.push((place.name, same));
            return Handle::made(file);
        }
        if leftover {
            remove_if_there(&place)?;
        }
        self.note(&place);
        let file = self.make(&place)?;
        self.places.insert(number, place);
        Handle::made(file)
    }

    /// Empties the files that were there and had their turn; answers their
    /// names.
    pub fn empty_again(&self) -> Vec<String> {
        let Birth::New { emptied, .. } = &self.birth else {
            return Vec::new();
        };
        let empty = emptied.iter().map(|(name, file)| {
            // The failure at hand is the one to tell; what stays is no image.
            let _ = file.set_len(0);
            name.to_string_lossy().into_owned()
        });
        empty.collect()
    }

    /// Makes the file itself; removes it again where it cannot be made ready.
    fn make(&self, place: &Place) -> io::Result<File> {
        let mode = match &self.birth {
            Birth::Like(_) => Mode::S_IRUSR | Mode::S_IWUSR,
            Birth::New { mode, .. } => *mode,
        };
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL;
        let file = open_at(&place.dir, &place.name, flags, mode)?;
        self.make_ready(&file, place)
            // The failure at hand is the one to tell.
            .inspect_err(|_| drop(remove(place)))?;
        Ok(file)
    }

    fn make_ready(&self, file: &File, place: &Place) -> io::Result<()> {
        if let Some(lock) = self.lock {
            lock.take(file, Path::new(&place.name))
                .map_err(|fault| io::Error::from_raw_os_error(fault.kind.errno()))?;
        }
        match &self.birth {
            Birth::Like(image) => resemble(file, &image.file),
            Birth::New { .. } => Ok(()),
        }
    }

    /// Gives a file the name of another, which then has none.
    pub fn rename(&mut self, number: FileNo, over: FileNo) -> io::Result<()> {
        let (from, to) = (self.place(number)?, self.place(over)?);
        renameat(
            &*from.dir,
            from.name.as_os_str(),
            &*to.dir,
            to.name.as_os_str(),
        )?;
        self.note(&from);
        self.note(&to);
        self.places.remove(&over);
        self.places.insert(number, to);
        Ok(())
    }

    /// Removes a file's name.
    pub fn unlink(&mut self, number: FileNo) -> io::Result<()> {
        let place = self.place(number)?;
        remove(&place)?;
        self.note(&place);
        self.places.remove(&number);
        Ok(())
    }

    /// Removes what an interrupted plan left under a name.
    pub fn remove(&mut self, name: &NewName) -> io::Result<()> {
        let place = match name {
            NewName::Replacement => self.image.replacement(),
            NewName::Plain(name) => self.image.beside(name.into()),
        };
        let found = self.left.remove(&place.name);
        if found || *name == NewName::Replacement {
            remove_if_there(&place)?;
            self.note(&place);
        }
        Ok(())
    }

    /// Makes the changes of names durable.
    pub fn sync(&mut self) -> io::Result<()> {
        for dir in &self.changed {
            dir.sync_all()?;
        }
        self.changed.clear();
        Ok(())
    }

    fn place(&self, number: FileNo) -> io::Result<Place> {
        let place = self.places.get(&number);
        place.cloned().ok_or(io::ErrorKind::NotFound.into())
    }

    /// Takes note of a directory in which a name changes.
    fn note(&mut self, place: &Place) {
        let known = |dir: &Arc<File>| Arc::ptr_eq(dir, &place.dir);
        if !self.changed.iter().any(known) {
            self.changed.push(Arc::clone(&place.dir));
        }
    }
}

/// Refuses a name for a new file that is not free.
fn check_free(image: &Place, name: &str) -> Result<(), Fault> {
    match image.beside(OsString::from(name)).is_taken()? {
        false => Ok(()),
        true => Err(unsupported(format!(
            "the change needs the name '{}', and a file has it that is no part of the image; \
             move it away, or remove it if an earlier change left it there",
            printable_name(name)
        ))),
    }
}

/// What is there of the files that an interrupted plan may have left. Each is a
/// file of its own that the owners could use and remove, and nobody is using it.
fn left_over(
    image: &Place,
    names: &[&str],
    lock: Option<LockSet>,
    owners: &[u32],
) -> Result<BTreeSet<OsString>, Fault> {
    let mut left = BTreeSet::new();
    for name in names {
        let place = image.beside(OsString::from(name));
        if !place.is_taken()? {
            continue;
        }
        let in_the_way = |fault: Fault| {
            fault.with_hint(format!(
                "An interrupted change may have left '{}', which has to go before the next; \
                 move it away if it is something else.",
                printable_name(name)
            ))
        };
        place.check_left(lock, owners).map_err(in_the_way)?;
        left.insert(place.name);
    }
    Ok(left)
}

fn open_at(dir: &File, name: &OsStr, flags: OFlag, mode: Mode) -> io::Result<File> {
    let flags = flags | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    Ok(openat(dir, name, flags, mode)?.into())
}

fn remove_if_there(place: &Place) -> io::Result<()> {
    remove(place).or_else(|error| match error.kind() {
        io::ErrorKind::NotFound => Ok(()),
        _ => Err(error),
    })
}

fn remove(place: &Place) -> io::Result<()> {
    let flags = UnlinkatFlags::NoRemoveDir;
    Ok(unlinkat(&*place.dir, place.name.as_os_str(), flags)?)
}

/// Gives a file the owner, the permissions and the attributes of another.
fn resemble(file: &File, model: &File) -> io::Result<()> {
    let wanted = model.metadata()?;
    let found = file.metadata()?;
    if (found.uid(), found.gid()) != (wanted.uid(), wanted.gid()) {
        fchown(file, Some(wanted.uid()), Some(wanted.gid()))?;
    }
    copy_attributes(file, model)?;
    // Last: a change of owner takes bits away, an access list sets some.
    file.set_permissions(Permissions::from_mode(wanted.mode() & 0o7777))
}

fn copy_attributes(file: &File, model: &File) -> io::Result<()> {
    let names = match model.list_xattr() {
        Ok(names) => names,
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => return Ok(()),
        Err(error) => return Err(error),
    };
    let names: Vec<OsString> = names.collect();
    // The directory may have given the file one for everybody that it makes.
    if !names.iter().any(|name| *name == *ACCESS_LIST) {
        remove_attribute(file, ACCESS_LIST)?;
    }
    for name in names {
        let shown = name.to_string_lossy();
        if !ATTRIBUTES.iter().any(|kind| shown.starts_with(kind)) {
            continue;
        }
        let Some(value) = model.get_xattr(&name)? else {
            continue;
        };
        match file.set_xattr(&name, &value) {
            // The label is the kernel's business: it has given the file one.
            Err(_) if shown.starts_with("security.") => {}
            done => done?,
        }
    }
    Ok(())
}

fn remove_attribute(file: &File, name: &str) -> io::Result<()> {
    match file.remove_xattr(name) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENODATA | libc::EOPNOTSUPP)) => {
            Ok(())
        }
        done => done,
    }
}

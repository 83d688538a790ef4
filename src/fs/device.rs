//! Mounting and unmounting: directly where that is allowed, through
//! `fusermount3` where not.
#![allow(unsafe_code)]

use nix::cmsg_space;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, recvmsg, socketpair,
};
use nix::sys::stat::Mode;
use nix::unistd::{getegid, geteuid};
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The type that the kernel's list of mounts shows.
pub const TYPE: &str = "fuse.instar";

/// How to mount, apart from how the filesystem behaves.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KernelOptions {
    /// The kernel refuses every change.
    pub read_only: bool,
    /// Users other than the one who mounts may see the mount.
    pub allow_other: bool,
    /// Generic mount options by name, such as `noexec`.
    pub generic: Vec<String>,
}

/// One line of the kernel's list of mounts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mounted {
    /// Device number of the mounted filesystem, `major:minor`.
    pub device: String,
    /// Where.
    pub mountpoint: PathBuf,
    /// Type, with the subtype.
    pub kind: String,
}

/// The generic mount options that mean something to the kernel.
const GENERIC: [(&str, MsFlags, bool); 15] = [
    ("nodev", MsFlags::MS_NODEV, true),
    ("nosuid", MsFlags::MS_NOSUID, true),
    ("noexec", MsFlags::MS_NOEXEC, true),
    ("exec", MsFlags::MS_NOEXEC, false),
    ("noatime", MsFlags::MS_NOATIME, true),
    ("atime", MsFlags::MS_NOATIME, false),
    ("nodiratime", MsFlags::MS_NODIRATIME, true),
    ("diratime", MsFlags::MS_NODIRATIME, false),
    ("relatime", MsFlags::MS_RELATIME, true),
    ("norelatime", MsFlags::MS_RELATIME, false),
    ("strictatime", MsFlags::MS_STRICTATIME, true),
    ("sync", MsFlags::MS_SYNCHRONOUS, true),
    ("async", MsFlags::MS_SYNCHRONOUS, false),
    ("dirsync", MsFlags::MS_DIRSYNC, true),
    ("lazytime", MsFlags::MS_LAZYTIME, true),
];

/// Generic mount options that are accepted and change nothing. `dev` and `suid`
/// are among them: what an image's owner says about its files is never trusted
/// that far.
const WITHOUT_EFFECT: [&str; 5] = ["dev", "suid", "defaults", "silent", "loud"];

/// The generic mount options that are known.
pub fn generic_options() -> impl Iterator<Item = &'static str> {
    let effective = GENERIC.iter().map(|(name, ..)| *name);
    effective.chain(WITHOUT_EFFECT)
}

/// Mounts, and answers the descriptor on which the kernel waits for INIT.
pub fn attach(source: &Path, mountpoint: &Path, options: &KernelOptions) -> io::Result<OwnedFd> {
    match attach_directly(source, mountpoint, options) {
        Err(error) if is_refusal(&error) && !geteuid().is_root() => {
            attach_by_helper(source, mountpoint, options)
        }
        other => other,
    }
}

fn is_refusal(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EPERM | libc::EACCES))
}

fn attach_directly(
    source: &Path,
    mountpoint: &Path,
    options: &KernelOptions,
) -> io::Result<OwnedFd> {
    let device = nix::fcntl::open("/dev/fuse", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty())
        .map_err(|errno| match errno {
            Errno::ENOENT | Errno::ENODEV | Errno::ENXIO => io::Error::new(
                io::ErrorKind::NotFound,
                "/dev/fuse does not exist: load the kernel module with 'modprobe fuse'",
            ),
            other => other.into(),
        })?;
    let mut data = format!(
        "fd={},rootmode=40000,user_id={},group_id={},default_permissions",
        device.as_raw_fd(),
        geteuid(),
        getegid()
    );
    if options.allow_other {
        data.push_str(",allow_other");
    }
    mount(
        Some(source),
        mountpoint,
        Some(TYPE),
        flags(options),
        Some(data.as_str()),
    )?;
    Ok(device)
}

fn flags(options: &KernelOptions) -> MsFlags {
    let mut flags = MsFlags::empty();
    for option in &options.generic {
        for (name, flag, on) in GENERIC {
            if name == option {
                flags.set(flag, on);
            }
        }
    }
    flags.set(MsFlags::MS_RDONLY, options.read_only);
    flags | MsFlags::MS_NODEV | MsFlags::MS_NOSUID
}

fn attach_by_helper(
    source: &Path,
    mountpoint: &Path,
    options: &KernelOptions,
) -> io::Result<OwnedFd> {
    // Without close-on-exec: the helper inherits its end. Ours must not reach
    // it, or it would wait for its own end to close.
    let (ours, theirs) = socketpair(
        AddressFamily::Unix,
        SockType::Stream,
        None,
        SockFlag::empty(),
    )?;
    fcntl(&ours, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    let child = Command::new("fusermount3")
        .arg("-o")
        .arg(helper_options(source, options))
        .arg("--")
        .arg(mountpoint)
        .env("_FUSE_COMMFD", theirs.as_raw_fd().to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => io::Error::new(
                io::ErrorKind::NotFound,
                "fusermount3 is not installed, and only root can mount without it",
            ),
            _ => error,
        })?;
    drop(theirs);
    let device = receive_descriptor(&ours);
    let output = child.wait_with_output()?;
    match device? {
        Some(device) => {
            fcntl(&device, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
            Ok(device)
        }
        None => Err(io::Error::other(
            String::from_utf8_lossy(&output.stderr).trim().to_string(),
        )),
    }
}

/// `fusermount3`'s option list; a comma or backslash in the name is escaped.
fn helper_options(source: &Path, options: &KernelOptions) -> OsString {
    let mut list = b"subtype=instar,default_permissions,fsname=".to_vec();
    for &byte in source.as_os_str().as_bytes() {
        if matches!(byte, b',' | b'\\') {
            list.push(b'\\');
        }
        list.push(byte);
    }
    let flags = [
        (options.read_only, "ro"),
        (options.allow_other, "allow_other"),
    ];
    let chosen = flags.iter().filter(|(on, _)| *on).map(|(_, name)| *name);
    let generic = options.generic.iter().map(String::as_str);
    for option in chosen.chain(generic.filter(|name| GENERIC.iter().any(|g| g.0 == *name))) {
        list.push(b',');
        list.extend_from_slice(option.as_bytes());
    }
    OsString::from_vec(list)
}

/// The descriptor that the helper sends, if it does.
fn receive_descriptor(socket: &OwnedFd) -> io::Result<Option<OwnedFd>> {
    let mut byte = [0];
    let mut space = cmsg_space!(RawFd);
    let mut vector = [IoSliceMut::new(&mut byte)];
    let message = loop {
        match recvmsg::<UnixAddr>(
            socket.as_raw_fd(),
            &mut vector,
            Some(&mut space),
            MsgFlags::MSG_CMSG_CLOEXEC,
        ) {
            Err(Errno::EINTR) => {}
            other => break other?,
        }
    };
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(descriptors) = control
            && let Some(&descriptor) = descriptors.first()
        {
            // SAFETY: the kernel has just made this descriptor for us, and
            // nothing else knows its number.
            return Ok(Some(unsafe { OwnedFd::from_raw_fd(descriptor) }));
        }
    }
    Ok(None)
}

/// Unmounts; lazily means that whoever uses the mount keeps it until done.
pub fn detach(mountpoint: &Path, lazy: bool) -> io::Result<()> {
    let flags = if lazy {
        MntFlags::MNT_DETACH
    } else {
        MntFlags::empty()
    };
    match umount2(mountpoint, flags | MntFlags::UMOUNT_NOFOLLOW) {
        Err(Errno::EPERM) if !geteuid().is_root() => detach_by_helper(mountpoint, lazy),
        other => Ok(other?),
    }
}

fn detach_by_helper(mountpoint: &Path, lazy: bool) -> io::Result<()> {
    let output = Command::new("fusermount3")
        .arg("-u")
        .args(lazy.then_some("-z"))
        .arg("--")
        .arg(mountpoint)
        .stdin(Stdio::null())
        .output()?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr).trim().to_string();
    if text.contains("busy") {
        return Err(Errno::EBUSY.into());
    }
    Err(io::Error::other(text))
}

/// What is mounted at exactly that path, the topmost.
pub fn mounted_at(mountpoint: &Path) -> io::Result<Option<Mounted>> {
    let mut mounts = mounts()?;
    mounts.retain(|mounted| mounted.mountpoint == mountpoint);
    Ok(mounts.pop())
}

/// Everything that is mounted, later mounts after earlier ones.
pub fn mounts() -> io::Result<Vec<Mounted>> {
    let table = fs::read("/proc/self/mountinfo")?;
    Ok(table
        .split(|&byte| byte == b'\n')
        .filter_map(parse_mount)
        .collect())
}

/// proc(5): id, parent, major:minor, root, mount point, options, optional
/// fields, a dash, type...
fn parse_mount(line: &[u8]) -> Option<Mounted> {
    let mut fields = line.split(|&byte| byte == b' ');
    let device = fields.nth(2)?;
    let mountpoint = fields.nth(1)?;
    let kind = fields.skip_while(|field| *field != b"-").nth(1)?;
    Some(Mounted {
        device: String::from_utf8_lossy(device).into_owned(),
        mountpoint: PathBuf::from(unescape(mountpoint)),
        kind: String::from_utf8_lossy(kind).into_owned(),
    })
}

/// Undoes the kernel's `\ooo` for blanks, tabs, newlines and backslashes.
fn unescape(field: &[u8]) -> OsString {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, after)) = rest.split_first() {
        let code = after
            .get(..3)
            .filter(|_| first == b'\\')
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match code {
            Some(byte) => {
                bytes.push(byte);
                rest = &after[3..];
            }
            None => {
                bytes.push(first);
                rest = after;
            }
        }
    }
    OsString::from_vec(bytes)
}

/// Lets the kernel read ahead as much as one request holds. Only root may, and
/// without it everything works, only slower.
pub fn raise_readahead(mounted: &Mounted, kilobytes: u32) {
    let path = format!("/sys/class/bdi/{}/read_ahead_kb", mounted.device);
    if let Err(error) = fs::write(&path, kilobytes.to_string()) {
        log::debug!("{path}: {error}");
    }
}

/// The absolute path of a mountpoint, found without touching what is mounted
/// there: that may be a mount whose daemon is dead.
pub fn absolute_mountpoint(path: &Path) -> io::Result<PathBuf> {
    match path.canonicalize() {
        Err(error) if is_dead(&error) => {
            let absolute = std::path::absolute(path)?;
            let parent = absolute.parent().unwrap_or(Path::new("/"));
            let name = absolute.file_name().unwrap_or(OsStr::new("."));
            Ok(parent.canonicalize()?.join(name))
        }
        other => other,
    }
}

/// Whether the daemon behind a mount is gone.
pub fn is_dead(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ENOTCONN | libc::ECONNABORTED)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_mountinfo_is_read_with_blanks_in_the_path() {
        let line = b"86 25 0:47 / /mnt/a\\040b rw,nosuid,nodev - fuse.instar /images rw,user_id=0";
        assert_eq!(
            parse_mount(line),
            Some(Mounted {
                device: "0:47".to_string(),
                mountpoint: PathBuf::from("/mnt/a b"),
                kind: TYPE.to_string(),
            })
        );
    }

    #[test]
    fn a_line_with_optional_fields_is_read_too() {
        let line = b"25 1 254:0 / / rw,relatime shared:1 master:2 - ext4 /dev/vda rw";
        assert_eq!(parse_mount(line).unwrap().kind, "ext4");
        assert_eq!(parse_mount(b""), None);
    }

    #[test]
    fn a_mount_is_always_nosuid_and_nodev() {
        let options = KernelOptions {
            generic: vec!["suid".to_string(), "dev".to_string(), "noexec".to_string()],
            ..KernelOptions::default()
        };
        assert_eq!(
            flags(&options),
            MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC
        );
    }

    #[test]
    fn a_comma_in_the_source_reaches_the_helper_as_part_of_the_name() {
        let options = KernelOptions {
            read_only: true,
            ..KernelOptions::default()
        };
        assert_eq!(
            helper_options(Path::new("/a,b\\c"), &options),
            "subtype=instar,default_permissions,fsname=/a\\,b\\\\c,ro"
        );
    }
}

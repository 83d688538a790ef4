//! Attributes and times between the filesystem's types and `fuser`'s.

use crate::fs::attributes::Attributes;
use crate::fs::entries::Birth;
use crate::fs::source::{Kind, NewTime, Time};
use fuser::{FileAttr, FileType, INodeNo, Request, TimeOrNow};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Attributes as the kernel gets them.
pub fn file_attr(attributes: &Attributes) -> FileAttr {
    let stat = &attributes.stat;
    FileAttr {
        ino: INodeNo(attributes.id.0),
        size: attributes.size,
        blocks: stat.blocks,
        atime: system_time(stat.atime),
        mtime: system_time(stat.mtime),
        ctime: system_time(stat.ctime),
        crtime: UNIX_EPOCH,
        kind: file_type(stat.kind),
        perm: stat.perm,
        nlink: stat.nlink,
        uid: stat.uid,
        gid: stat.gid,
        rdev: 0,
        blksize: attributes.block,
        flags: 0,
    }
}

/// Whose a new file is: the caller's. The kernel has applied the umask.
pub fn birth(req: &Request, mode: u32) -> Birth {
    Birth {
        perm: mode & 0o7777,
        uid: req.uid(),
        gid: req.gid(),
    }
}

/// Kinds of files as the kernel gets them.
pub fn file_type(kind: Kind) -> FileType {
    match kind {
        Kind::Directory => FileType::Directory,
        Kind::File => FileType::RegularFile,
    }
}

fn system_time(time: Time) -> SystemTime {
    let nanoseconds = Duration::from_nanos(u64::from(time.nsec));
    match u64::try_from(time.sec) {
        Ok(sec) => UNIX_EPOCH + Duration::from_secs(sec) + nanoseconds,
        Err(_) => UNIX_EPOCH - Duration::from_secs(time.sec.unsigned_abs()) + nanoseconds,
    }
}

/// A time that the kernel sends.
pub fn new_time(time: TimeOrNow) -> NewTime {
    let time = match time {
        TimeOrNow::Now => return NewTime::Now,
        TimeOrNow::SpecificTime(time) => time,
    };
    NewTime::At(match time.duration_since(UNIX_EPOCH) {
        Ok(since) => Time {
            sec: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
            nsec: since.subsec_nanos(),
        },
        Err(before) => {
            let before = before.duration();
            let up = i64::from(before.subsec_nanos() > 0);
            Time {
                sec: -i64::try_from(before.as_secs()).unwrap_or(i64::MAX) - up,
                nsec: (1_000_000_000 - before.subsec_nanos()) % 1_000_000_000,
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_the_epoch_survive_both_ways() {
        for time in [
            Time { sec: -2, nsec: 0 },
            Time { sec: -2, nsec: 5 },
            Time { sec: 7, nsec: 999 },
        ] {
            let back = new_time(TimeOrNow::SpecificTime(system_time(time)));
            assert_eq!(back, NewTime::At(time));
        }
    }
}

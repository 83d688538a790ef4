//! The few effects that a plan and a guest's write can have on a file, as a
//! trait: the real ones, and room for tests that record or fail them.

use super::copy;
use super::handles::{Handle, Handles};
use super::names::Names;
use instar_guest::FileNo;
use instar_guest::plan::NewName;
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, PoisonError};

/// Effects on the files of one image. Offsets and lengths are bytes.
///
/// Writes, zeroes and copies extend the file where it ends before their end.
/// All but [`write`](Self::write) are called by one thread at a time.
pub trait Effects: Send + Sync {
    /// Writes all of `data`.
    fn write(&self, file: FileNo, offset: u64, data: &[u8]) -> io::Result<()>;
    /// Makes a range read as zeroes.
    fn zero(&self, file: FileNo, offset: u64, len: u64) -> io::Result<()>;
    /// Writes zeroes, so that the range has disk space.
    fn fill(&self, file: FileNo, offset: u64, len: u64) -> io::Result<()> {
        let mut done = 0;
        while done < len {
            let n = (len - done).min(CHUNK as u64);
            self.write(file, offset + done, &ZEROES[..n as usize])?;
            done += n;
        }
        Ok(())
    }
    /// Copies a range; source and destination do not overlap.
    fn copy(&self, file: FileNo, from: u64, to: u64, len: u64) -> io::Result<()>;
    /// Copies a range of another file.
    fn copy_from(
        &self,
        file: FileNo,
        source: FileNo,
        from: u64,
        to: u64,
        len: u64,
    ) -> io::Result<()>;
    /// Allocates disk space, length and content unchanged.
    fn reserve(&self, file: FileNo, offset: u64, len: u64) -> io::Result<()>;
    /// Gives disk space back; the range reads as zeroes afterwards.
    fn punch(&self, file: FileNo, offset: u64, len: u64) -> io::Result<()>;
    /// Sets the file's length.
    fn set_len(&self, file: FileNo, len: u64) -> io::Result<()>;
    /// Makes everything before it durable (`fdatasync`).
    fn sync(&self, file: FileNo) -> io::Result<()>;
    /// Makes an empty file in the image's directory, which gets the number.
    /// This and the next four are refused by effects that know no names.
    fn create(&self, _file: FileNo, _name: &NewName) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
    /// Gives a file the name of another, which then has none.
    fn rename(&self, _file: FileNo, _over: FileNo) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
    /// Removes a file's name.
    fn unlink(&self, _file: FileNo) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
    /// Removes what an interrupted plan left under a name, if it is there.
    fn remove(&self, _name: &NewName) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
    /// Makes the changes of names durable (`fsync` of directories).
    fn sync_names(&self) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// Puts something around the real effects; see
/// [`OpenOptions::effects`](super::OpenOptions::effects).
pub type WrapEffects = Arc<dyn Fn(Box<dyn Effects>) -> Box<dyn Effects> + Send + Sync>;

/// The names of an image's files, for as long as a plan changes them.
pub(crate) type PlanNames = Arc<Mutex<Option<Names>>>;

/// The effects on real files, by file number.
pub(crate) struct DiskEffects {
    pub handles: Handles,
    pub names: PlanNames,
}

/// Chunk of what has to be written or copied through memory.
pub(super) const CHUNK: usize = 256 << 10;
static ZEROES: [u8; CHUNK] = [0; CHUNK];

impl DiskEffects {
    fn file(&self, file: FileNo) -> io::Result<Arc<Handle>> {
        Ok(self.handles.get(file).ok_or(Errno::EBADF)?)
    }

    fn with_names<T>(&self, act: impl FnOnce(&mut Names) -> io::Result<T>) -> io::Result<T> {
        let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        act(names.as_mut().ok_or(io::ErrorKind::Unsupported)?)
    }
}

impl Effects for DiskEffects {
    fn write(&self, file: FileNo, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file(file)?.file.write_all_at(data, offset)
    }

    fn zero(&self, file: FileNo, offset: u64, len: u64) -> io::Result<()> {
        zero(&self.file(file)?.file, offset, len)
    }

    fn copy(&self, file: FileNo, from: u64, to: u64, len: u64) -> io::Result<()> {
        self.copy_from(file, file, from, to, len)
    }

    fn copy_from(
        &self,
        file: FileNo,
        source: FileNo,
        from: u64,
        to: u64,
        len: u64,
    ) -> io::Result<()> {
        let (file, source) = (self.file(file)?, self.file(source)?);
        copy::copy(&source.file, from, &file.file, to, len)
    }

    fn reserve(&self, file: FileNo, offset: u64, len: u64) -> io::Result<()> {
        let mode = FallocateFlags::FALLOC_FL_KEEP_SIZE;
        allocate(&self.file(file)?.file, mode, offset, len)
    }

    fn punch(&self, file: FileNo, offset: u64, len: u64) -> io::Result<()> {
        let file = &self.file(file)?.file;
        let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        match allocate(file, mode, offset, len) {
            Err(error) if is_unsupported(&error) => write_zeroes(file, offset, len),
            done => done,
        }
    }

    fn set_len(&self, file: FileNo, len: u64) -> io::Result<()> {
        self.file(file)?.file.set_len(len)
    }

    fn sync(&self, file: FileNo) -> io::Result<()> {
        let handle = self.file(file)?;
        match handle.made {
            true => handle.file.sync_all(),
            false => handle.file.sync_data(),
        }
    }

    fn create(&self, file: FileNo, name: &NewName) -> io::Result<()> {
        let made = self.with_names(|names| names.create(file, name))?;
        self.handles.push(Arc::new(made));
        Ok(())
    }

    fn rename(&self, file: FileNo, over: FileNo) -> io::Result<()> {
        self.with_names(|names| names.rename(file, over))
    }

    fn unlink(&self, file: FileNo) -> io::Result<()> {
        self.with_names(|names| names.unlink(file))
    }

    fn remove(&self, name: &NewName) -> io::Result<()> {
        self.with_names(|names| names.remove(name))
    }

    fn sync_names(&self) -> io::Result<()> {
        self.with_names(Names::sync)
    }
}

/// Zeroes a range. What lies past the end only moves the end: it reads as zeroes
/// then, and takes no disk space.
pub(super) fn zero(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let (old, end) = (file.metadata()?.len(), offset + len);
    let inside = end.min(old).saturating_sub(offset);
    if inside > 0 {
        zero_inside(file, offset, inside)?;
    }
    if end > old {
        file.set_len(end)?;
    }
    Ok(())
}

/// Zeroes a range inside the file. Short ranges are cheaper to write than to
/// send through the filesystem's allocator.
fn zero_inside(file: &File, offset: u64, len: u64) -> io::Result<()> {
    if len <= CHUNK as u64 {
        return write_zeroes(file, offset, len);
    }
    let keep = FallocateFlags::FALLOC_FL_KEEP_SIZE;
    for mode in [
        FallocateFlags::FALLOC_FL_ZERO_RANGE,
        FallocateFlags::FALLOC_FL_PUNCH_HOLE,
    ] {
        match allocate(file, mode | keep, offset, len) {
            Err(error) if is_unsupported(&error) => {}
            done => return done,
        }
    }
    write_zeroes(file, offset, len)
}

fn write_zeroes(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let mut done = 0;
    while done < len {
        let n = (len - done).min(CHUNK as u64);
        file.write_all_at(&ZEROES[..n as usize], offset + done)?;
        done += n;
    }
    Ok(())
}

fn allocate(file: &File, mode: FallocateFlags, offset: u64, len: u64) -> io::Result<()> {
    let (offset, len) = (offset as i64, len as i64);
    loop {
        match fallocate(file, mode, offset, len) {
            Err(Errno::EINTR) => {}
            done => return Ok(done?),
        }
    }
}

fn is_unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(content: &[u8]) -> (DiskEffects, File) {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(content, 0).unwrap();
        let handles = Handles::default();
        let same = file.try_clone().unwrap();
        handles.push(Arc::new(Handle::new(file, true).unwrap()));
        let names = PlanNames::default();
        (DiskEffects { handles, names }, same)
    }

    fn content(file: &File) -> Vec<u8> {
        let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    #[test]
    fn zero_clears_inside_and_extends_past_the_end() {
        let (disk, file) = disk(&[7; 1000]);
        disk.zero(FileNo::IMAGE, 900, 300).unwrap();
        let mut expected = vec![7; 900];
        expected.resize(1200, 0);
        assert_eq!(content(&file), expected);
    }

    #[test]
    fn a_long_range_is_zeroed_exactly() {
        let (disk, file) = disk(&vec![7; 2 << 20]);
        disk.zero(FileNo::IMAGE, 12345, 1 << 20).unwrap();
        let mut expected = vec![7; 2 << 20];
        expected[12345..12345 + (1 << 20)].fill(0);
        assert!(content(&file) == expected);
    }

    #[test]
    fn copy_moves_more_than_one_chunk() {
        let data: Vec<u8> = (0..CHUNK * 2 + 777).map(|i| (i % 251) as u8).collect();
        let (disk, file) = disk(&data);
        let len = data.len() as u64;
        disk.copy(FileNo::IMAGE, 0, len, len).unwrap();
        assert!(content(&file) == [&data[..], &data[..]].concat());
    }

    #[test]
    fn reserve_takes_space_and_keeps_length_and_content() {
        use std::os::unix::fs::MetadataExt;
        let (disk, file) = disk(b"abc");
        disk.reserve(FileNo::IMAGE, 0, 1 << 20).unwrap();
        assert_eq!(content(&file), b"abc");
        assert!(file.metadata().unwrap().blocks() * 512 >= 1 << 20);
    }

    #[test]
    fn punch_leaves_zeroes_and_the_length() {
        let (disk, file) = disk(&[7; 20000]);
        disk.punch(FileNo::IMAGE, 100, 19000).unwrap();
        let mut expected = vec![7; 20000];
        expected[100..19100].fill(0);
        assert_eq!(content(&file), expected);
    }

    #[test]
    fn an_unknown_file_is_refused() {
        let (disk, _file) = disk(b"");
        let error = disk.write(FileNo(1), 0, b"x").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EBADF));
    }
}

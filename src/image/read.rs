//! Reading: from the files at the offsets of extents, from inflated clusters,
//! from the backing image.

use super::Access;
use super::disk::{Image, Link, exclusive, hold, shared};
use super::error::{Error, ErrorKind, Fault, Operation};
use super::extents::check_extents;
use super::guest::{Serving, Stream};
use crate::sandbox::CallError;
use instar_guest::proto::MAX_INFLATE;
use instar_guest::{Extent, ExtentKind, FailureKind, Reply, Request};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Clusters whose mapping is asked for at once. With the usual cluster size a
/// region of the disk is then what one table of the format describes.
const REGION_CLUSTERS: u64 = 8192;
/// Bounds of the region in bytes.
const MIN_REGION: u64 = 8 << 20;
const MAX_REGION: u64 = 1 << 30;

impl Image {
    /// Fills `buf` from the disk. The range must lie inside the disk.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<(), Error> {
        self.inside(offset, buf.len() as u64)
            .and_then(|()| self.fill(buf, offset, &mut None))
            .map_err(|fault| fault.at(Operation::Read, &self.path))
    }

    /// Fills `buf` if all of it is known to lie in one piece of a file and that is
    /// in memory, or is zero; whether it did. Waits for nothing. If it did not,
    /// `buf` may hold anything.
    pub fn try_read_at(&self, buf: &mut [u8], offset: u64) -> bool {
        let fits = self
            .inside(offset, buf.len() as u64)
            .and_then(|()| self.alive());
        // Held until the bytes are read.
        let (Ok(()), Ok(_traffic)) = (fits, self.traffic.try_read()) else {
            return false;
        };
        let found = shared(&self.extents).find(offset);
        match found.filter(|extent| extent.len >= buf.len() as u64) {
            Some(Extent {
                kind: ExtentKind::Data { file, at, .. },
                ..
            }) => self.files.try_read(file, at, buf),
            Some(Extent {
                kind: ExtentKind::Zero { .. },
                ..
            }) => {
                buf.fill(0);
                true
            }
            _ => false,
        }
    }

    /// What this layer says about a range inside the disk: extents without
    /// gaps, from `offset` to `offset + len`.
    pub fn map(&self, offset: u64, len: u64) -> Result<Vec<Extent>, Error> {
        self.inside(offset, len)
            .and_then(|()| self.extents_of(offset, len))
            .map_err(|fault| fault.at(Operation::Map, &self.path))
    }

    fn extents_of(&self, offset: u64, len: u64) -> Result<Vec<Extent>, Fault> {
        let mut extents: Vec<Extent> = Vec::new();
        let (mut next, end) = (offset, offset + len);
        while next < end {
            let extent = self.look(next, end - next, &mut None)?;
            next += extent.len;
            extents.push(extent);
        }
        Ok(extents)
    }

    /// What lies at an offset, at most `len` bytes of it, asking the guest if
    /// need be. The caller must not hold `traffic`.
    pub(super) fn look(
        &self,
        offset: u64,
        len: u64,
        held: &mut Option<&mut Link>,
    ) -> Result<Extent, Fault> {
        loop {
            self.alive()?;
            if let Some(extent) = shared(&self.extents).find(offset) {
                return Ok(super::extents::slice(extent, 0, len));
            }
            self.load(offset, len, held)?;
        }
    }

    /// Reads, as the holder of the session or not.
    pub(super) fn fill(
        &self,
        buf: &mut [u8],
        offset: u64,
        held: &mut Option<&mut Link>,
    ) -> Result<(), Fault> {
        self.alive()?;
        let mut done = 0;
        while done < buf.len() {
            let (at, rest) = (offset + done as u64, &mut buf[done..]);
            // Whoever holds the session knows that nothing is moved.
            let traffic = held.is_none().then(|| shared(&self.traffic));
            let Some(extent) = shared(&self.extents).find(at) else {
                drop(traffic);
                self.load(at, rest.len() as u64, held)?;
                continue;
            };
            let n = extent.len.min(rest.len() as u64) as usize;
            let part = &mut rest[..n];
            done += match extent.kind {
                ExtentKind::Data { file, at, .. } => {
                    self.files.read(file, at, part)?;
                    n
                }
                ExtentKind::Zero { .. } => {
                    part.fill(0);
                    n
                }
                ExtentKind::Unallocated { .. } => {
                    self.fill_from_backing(part, at)?;
                    n
                }
                ExtentKind::Compressed => {
                    drop(traffic);
                    self.fill_inflated(part, at, held)?
                }
            };
        }
        Ok(())
    }

    /// Reads from the backing image; past its end there are zeroes.
    fn fill_from_backing(&self, buf: &mut [u8], offset: u64) -> Result<(), Fault> {
        let Some(backing) = &self.backing else {
            self.no_backing_named()?;
            buf.fill(0);
            return Ok(());
        };
        let inside = backing.virtual_size().saturating_sub(offset);
        let inside = inside.min(buf.len() as u64) as usize;
        let (head, tail) = buf.split_at_mut(inside);
        tail.fill(0);
        if head.is_empty() {
            return Ok(());
        }
        backing.fill(head, offset, &mut None).map_err(|fault| {
            let path = backing.path.display();
            Fault::new(
                fault.kind,
                format!("Backing file '{path}': {}", fault.message),
            )
        })
    }

    /// Refuses an image that needs a backing file which was not opened.
    pub(super) fn no_backing_named(&self) -> Result<(), Fault> {
        match &shared(&self.facts).backing {
            None => Ok(()),
            Some(_) => Err(Fault::new(
                ErrorKind::InvalidRequest,
                "The image was opened without its backing file",
            )),
        }
    }

    /// Reads from one compressed cluster; answers how many bytes, 0 if the
    /// range is not compressed any more.
    fn fill_inflated(
        &self,
        buf: &mut [u8],
        offset: u64,
        held: &mut Option<&mut Link>,
    ) -> Result<usize, Fault> {
        let unit = self.cluster();
        if unit > MAX_INFLATE {
            return Err(Fault::new(
                ErrorKind::Unsupported,
                format!(
                    "Compressed clusters of {unit} bytes, more than {MAX_INFLATE}, cannot be read"
                ),
            ));
        }
        let (cluster, skip) = (offset / unit * unit, (offset % unit) as usize);
        let known = hold(&self.inflated).get(cluster);
        let data = match known {
            Some(data) => data,
            None => {
                let wanted = skip as u64 + buf.len() as u64;
                let loaded = self.with_link(held, |link| self.inflate(link, cluster, wanted));
                match loaded? {
                    Some(data) => data,
                    None => return Ok(0),
                }
            }
        };
        let from = data.get(skip..).unwrap_or_default();
        let n = from.len().min(buf.len());
        if n == 0 {
            return Err(Fault::new(
                ErrorKind::BadGuest,
                format!("The sandbox's inflated cluster at {cluster:#x} is too short"),
            ));
        }
        buf[..n].copy_from_slice(&from[..n]);
        Ok(n)
    }

    /// Has clusters inflated from `cluster` on, as many as are wanted and
    /// compressed; keeps all and answers the first. `None` if it is not
    /// compressed any more.
    fn inflate(
        &self,
        link: &mut Link,
        cluster: u64,
        wanted: u64,
    ) -> Result<Option<Arc<[u8]>>, Fault> {
        let unit = self.cluster();
        let wanted = wanted.next_multiple_of(unit);
        let extent = self.look(cluster, wanted, &mut Some(&mut *link))?;
        if extent.kind != ExtentKind::Compressed {
            return Ok(None);
        }
        let most = MAX_INFLATE / unit * unit;
        let len = wanted.min(most).min(extent.len);
        let offset = cluster;
        let data = match self.ask(link, &Request::Inflate { offset, len })? {
            Reply::Inflated(data) if data.len() as u64 == len => data,
            _ => return Err(unexpected("Inflate")),
        };
        let mut inflated = hold(&self.inflated);
        for (index, piece) in data.chunks(unit as usize).enumerate() {
            inflated.put(cluster + index as u64 * unit, piece.into());
        }
        Ok(inflated.get(cluster))
    }

    /// The cluster size, or more than any disk has for a format without one.
    fn cluster(&self) -> u64 {
        shared(&self.facts).cluster_size.unwrap_or(1 << 62)
    }

    /// How much of the mapping is asked for at once, in bytes of the disk.
    fn region(&self) -> u64 {
        match shared(&self.facts).cluster_size {
            Some(cluster) => (cluster * REGION_CLUSTERS).clamp(MIN_REGION, MAX_REGION),
            None => 1 << 62,
        }
    }

    /// Asks the guest for the mapping around an offset.
    fn load(&self, offset: u64, len: u64, held: &mut Option<&mut Link>) -> Result<(), Fault> {
        if self.access == Access::Info {
            return Err(Fault::new(
                ErrorKind::InvalidRequest,
                "The image was opened for its facts only",
            ));
        }
        self.with_link(held, |link| {
            // The disk may have become smaller while the session was waited for.
            self.inside(offset, 1)?;
            // Another thread may have been quicker.
            let known = |at| shared(&self.extents).find(at).is_some();
            if known(offset) {
                return Ok(());
            }
            let region = self.region();
            let start = offset / region * region;
            let end = start.saturating_add(region).max(offset + len);
            let start = if known(start) { offset } else { start };
            let end = end.min(self.virtual_size());
            match self.load_range(link, start, end) {
                // A damaged table must not hide the sound ones around it.
                Err(fault) if fault.kind == ErrorKind::Damaged => {
                    self.load_range(link, offset, (offset + len).min(end))
                }
                Ok(()) if !known(offset) => self.load_range(link, offset, end),
                done => done,
            }
        })
    }

    fn load_range(&self, link: &mut Link, offset: u64, end: u64) -> Result<(), Fault> {
        let len = end - offset;
        match self.ask(link, &Request::Map { offset, len })? {
            Reply::Extents(extents) => {
                check_extents(&extents, offset, len, |file| self.files.len(file))?;
                exclusive(&self.extents).load(&extents);
                Ok(())
            }
            _ => Err(unexpected("Map")),
        }
    }

    /// Does something with the session: the one that is held, or after waiting
    /// for it. The caller must not hold `traffic`.
    fn with_link<T>(
        &self,
        held: &mut Option<&mut Link>,
        act: impl FnOnce(&mut Link) -> Result<T, Fault>,
    ) -> Result<T, Fault> {
        match held {
            Some(link) => act(link),
            None => {
                let mut link = hold(&self.session);
                self.catch_up(&mut link)?;
                act(&mut link)
            }
        }
    }

    /// Sends a request that changes nothing in the files.
    pub(super) fn ask(&self, link: &mut Link, request: &Request) -> Result<Reply, Fault> {
        self.ask_serving(
            link,
            request,
            &mut Serving::new(&self.files, Stream::Refuse),
        )
    }

    /// Sends a request. If the sandbox ends the session, changes that it held
    /// are lost.
    pub(super) fn ask_serving(
        &self,
        link: &mut Link,
        request: &Request,
        serving: &mut Serving<'_>,
    ) -> Result<Reply, Fault> {
        self.alive()?;
        self.make_ready(link)?;
        link.seat.guest()?.call(request, serving).map_err(|error| {
            if matches!(error, CallError::Sandbox(_)) && self.unflushed.load(Ordering::Acquire) {
                self.lose();
            }
            // The guest repeats that a part of its plan was refused; why is
            // known here.
            match (serving.refusal.take(), &error) {
                (Some(refusal), CallError::Refused(failure)) if failure.kind == FailureKind::Io => {
                    refusal
                }
                _ => Fault::from(error),
            }
        })
    }

    /// Gives up: what was not flushed is lost, and nothing of it is written.
    pub(super) fn lose(&self) {
        self.lost.store(true, Ordering::Release);
    }
}

/// A reply that does not answer the request.
pub(super) fn unexpected(request: &str) -> Fault {
    Fault::new(
        ErrorKind::BadGuest,
        format!("The sandbox's reply does not answer the request ({request})"),
    )
}

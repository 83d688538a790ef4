//! Changing what the headers and the tables before the BAT say: the steps and
//! stages that growing, shrinking, writing and settling have in common.

use super::Vhdx;
use super::format::log::MAX_LEN;
use super::format::{PAGE, header as header_at, region as region_at};
use super::guid::Guid;
use super::header::{Change, Header, Headers};
use super::log;
use super::refuse::unsupported;
use crate::bytes;
use crate::chance::Chance;
use crate::engine::{Host, Read};
use crate::error::Failure;
use crate::plan::{Purpose, SECTOR, Stage, Step};
use crate::proto::FileNo;
use alloc::collections::BTreeMap;
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;

/// A new identifier.
pub fn fresh_guid(chance: &mut Chance) -> Guid {
    Guid::from_text_order(chance.uuid())
}

/// A write to the image file.
pub fn write(offset: u64, data: Vec<u8>) -> Step {
    Step::Write {
        file: FileNo::IMAGE,
        offset,
        data,
    }
}

/// A stage of one step.
pub fn stage(purpose: Purpose, step: Step) -> Stage {
    Stage {
        purpose,
        steps: vec![step],
    }
}

/// Writes headers, each to the slot that is not current.
#[derive(Debug)]
pub struct HeaderWriter {
    current: Header,
    slot: usize,
    other: Vec<u8>,
    file_write: Guid,
}

impl HeaderWriter {
    /// Begins a change of the file, which gets a new identifier.
    pub fn new(headers: &Headers, chance: &mut Chance) -> Self {
        Self {
            current: headers.current.clone(),
            slot: headers.slot,
            other: headers.other.clone(),
            file_write: fresh_guid(chance),
        }
    }

    /// The next header. Only the sector that differs from what is in the slot
    /// is written; from the second time on it is the first.
    pub fn write(&mut self, data_write: Option<Guid>, log: Option<Guid>) -> Result<Step, Failure> {
        let next = self.current.next(&Change {
            file_write: self.file_write,
            data_write,
            log,
        })?;
        let slot = 1 - self.slot.min(1);
        let at = header_at::SLOTS.get(slot).copied().unwrap_or(0);
        let rest = |bytes: &[u8]| bytes.get(SECTOR as usize..).map(<[u8]>::to_vec);
        let len = match rest(&self.other) == rest(&next.bytes) {
            true => SECTOR as usize,
            false => next.bytes.len(),
        };
        let data = bytes::slice(&next.bytes, 0, len)?.to_vec();
        self.other = core::mem::replace(&mut self.current, next).bytes;
        self.slot = slot;
        Ok(write(at, data))
    }

    /// Both headers, in one stage and before anything else changes: a new
    /// identifier tells programs that remember the image. The slot that is
    /// written second differs in one sector, so that one header is valid in every
    /// state.
    pub fn announce(&mut self, data_write: Option<Guid>) -> Result<[Step; 2], Failure> {
        Ok([self.write(data_write, None)?, self.write(None, None)?])
    }

    /// Both headers without a log, in one stage. They were written before, so
    /// that each differs in one sector.
    pub fn give_log_up(&mut self) -> Result<[Step; 2], Failure> {
        let none = Some(Guid::ZERO);
        Ok([self.write(None, none)?, self.write(None, none)?])
    }

    /// The headers as they are once everything is written.
    pub fn finish(self) -> Headers {
        Headers {
            current: self.current,
            slot: self.slot,
            other: self.other,
            other_flaw: None,
        }
    }
}

/// Single-sector changes that belong together: either flipped, the last one
/// behind the others, or carried by one entry of the log.
#[derive(Debug, Default)]
pub struct Flips {
    list: Vec<(u64, Vec<u8>)>,
}

impl Flips {
    /// Adds a change. The last one added commits.
    pub fn add(&mut self, at: u64, data: Vec<u8>) {
        self.list.push((at, data));
    }

    /// Whether each lies inside one sector.
    pub fn are_atomic(&self) -> bool {
        self.list
            .iter()
            .all(|(at, data)| at % SECTOR + data.len() as u64 <= SECTOR)
    }

    /// The stage of the last one, which commits, and before it one for the others,
    /// which make no difference to a reader.
    pub fn stages(mut self) -> Vec<Stage> {
        let last = self.list.pop();
        let others = self.list.into_iter();
        let link = Stage {
            purpose: Purpose::Link,
            steps: others.map(|(at, data)| write(at, data)).collect(),
        };
        let commit = last.map(|(at, data)| stage(Purpose::Commit, write(at, data)));
        let link = Some(link).filter(|link| !link.steps.is_empty());
        link.into_iter().chain(commit).collect()
    }

    /// The whole pages that the changes make of what is in the file.
    pub fn pages(self, host: &mut dyn Host, vhdx: &Vhdx) -> Result<Vec<(u64, Vec<u8>)>, Failure> {
        let mut pages = BTreeMap::new();
        for (at, data) in &self.list {
            let end = at + data.len() as u64;
            for page in (at / PAGE..end.div_ceil(PAGE)).map(|number| number * PAGE) {
                pages.entry(page).or_insert_with(|| vec![0; PAGE as usize]);
            }
        }
        let reads = pages.iter_mut().map(|(&offset, buf)| Read {
            file: FileNo::IMAGE,
            offset,
            buf,
        });
        let mut reads: Vec<Read<'_>> = reads.collect();
        vhdx.source.read(host, &mut reads)?;
        for (at, data) in self.list {
            for (offset, byte) in (at..).zip(data) {
                let page = pages.get_mut(&(offset - offset % PAGE));
                let place = page.and_then(|page| page.get_mut((offset % PAGE) as usize));
                if let Some(place) = place {
                    *place = byte;
                }
            }
        }
        Ok(pages.into_iter().collect())
    }
}

/// What one entry of the log carries.
#[derive(Debug)]
pub struct Logged {
    /// Whole pages by host offset.
    pub pages: Vec<(u64, Vec<u8>)>,
    /// Host offset and length of a range of pages that become zero.
    pub zeroes: (u64, u64),
    /// The length that the file has by then, durably.
    pub file_len: u64,
    /// What no log may carry, and what is done before the log is given up: who
    /// replays it here does that, too.
    pub besides: Option<Step>,
}

impl Vhdx {
    /// The stages that change pages together by way of the log: the entry, the
    /// header that makes it count, which commits, the pages themselves, and the
    /// headers without a log.
    pub(super) fn log_stages(
        &mut self,
        headers: &mut HeaderWriter,
        change: Logged,
    ) -> Result<Vec<Stage>, Failure> {
        let Logged {
            pages,
            zeroes,
            file_len,
            besides,
        } = change;
        let current = &self.headers.current;
        if current.log_len > MAX_LEN {
            return Err(unsupported(format!(
                "the log has {} bytes: it could not be replayed after an interruption, which at \
                 most {MAX_LEN} can; convert the image with `qemu-img convert -O vhdx`",
                current.log_len
            )));
        }
        let guid = fresh_guid(&mut self.chance);
        let entry = log::encode(&pages, zeroes, guid, file_len, current.log_len)?;
        let entry = entry.ok_or_else(|| {
            unsupported(
                "the image has no log, which this change needs; convert it with `qemu-img convert \
                 -O vhdx`",
            )
        })?;
        let entry = write(current.log_offset, entry);
        let mut apply: Vec<Step> = pages
            .into_iter()
            .map(|(at, page)| write(at, page))
            .collect();
        if zeroes.1 > 0 {
            apply.push(Step::Zero {
                file: FileNo::IMAGE,
                offset: zeroes.0,
                len: zeroes.1,
            });
        }
        apply.extend(besides);
        Ok(vec![
            stage(Purpose::Prepare, entry),
            stage(Purpose::Commit, headers.write(None, Some(guid))?),
            Stage {
                purpose: Purpose::Release,
                steps: apply,
            },
            Stage {
                purpose: Purpose::Release,
                steps: headers.give_log_up()?.into(),
            },
        ])
    }

    /// The stages of changes of which the last commits: behind the others, where
    /// each is atomic, or together.
    pub(super) fn flip_stages(
        &mut self,
        host: &mut dyn Host,
        headers: &mut HeaderWriter,
        flips: Flips,
        file_len: u64,
    ) -> Result<Vec<Stage>, Failure> {
        if flips.are_atomic() {
            return Ok(flips.stages());
        }
        let change = Logged {
            pages: flips.pages(host, self)?,
            zeroes: (0, 0),
            file_len,
            besides: None,
        };
        self.log_stages(headers, change)
    }

    /// The changes of both region tables that move the BAT.
    pub(super) fn bat_flips(
        &self,
        offset: u64,
        len: u64,
        flips: &mut Flips,
    ) -> Result<(), Failure> {
        let new = self.table.with_bat(offset, len)?;
        let differs = |(a, b): (&u8, &u8)| a != b;
        let last = new
            .iter()
            .zip(&self.table.bytes)
            .rposition(differs)
            .map_or(0, |last| last + 1);
        let data = bytes::slice(&new, 0, last)?;
        for at in region_at::TABLES {
            flips.add(at, data.to_vec());
        }
        Ok(())
    }
}

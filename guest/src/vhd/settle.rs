//! What an interrupted change of size leaves, and how it is put in order.
//!
//! Each footer changes atomically, but there are two of them; and the footer of
//! a disk of fixed size moves by appending a sector, which a file system may
//! tear into a new length and its bytes.

use super::footer::{Footer, Kind, Place};
use super::format::footer as field;
use super::{Layout, Vhd, open, parent};
use crate::disk::Opening;
use crate::engine::{Host, Read};
use crate::error::Failure;
use crate::plan::{Plan, Purpose, SECTOR, Stage, Step};
use crate::proto::{FileNo, PlanReply};
use alloc::vec;
use alloc::vec::Vec;

/// Bytes that a search for a footer reads at once.
const PIECE: u64 = 4 << 20;

/// What has to be put in order before a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unsettled {
    /// The footers differ, each is valid.
    Differ(Place),
    /// One of the footers is missing or damaged.
    Missing(Place),
    /// Behind the footer there are zeroes: the file ends here, in bytes.
    Torn(u64),
}

impl Unsettled {
    /// Whether the file does not end with a footer.
    pub fn lacks_end(self) -> bool {
        matches!(self, Self::Missing(Place::End) | Self::Torn(_))
    }

    /// What it is, for people.
    pub fn text(self) -> &'static str {
        match self {
            Self::Differ(_) => {
                "the footer at the end of the file and its copy at the start differ: a change of \
                 the size was interrupted"
            }
            Self::Missing(Place::Start) => {
                "the footer copy at the start of the file is missing or damaged"
            }
            Self::Missing(Place::End) => "the footer at the end of the file is missing or damaged",
            Self::Torn(_) => {
                "the footer is not at the end of the file: a change of the size was interrupted"
            }
        }
    }
}

/// What is wrong with the two footers, given the one that counts.
pub fn judge_copies(
    footer: &Footer,
    start: Option<&Footer>,
    end: Option<&Footer>,
) -> Option<Unsettled> {
    match (start, end) {
        (None, _) => Some(Unsettled::Missing(Place::Start)),
        (_, None) => Some(Unsettled::Missing(Place::End)),
        (Some(start), _) if start != footer => Some(Unsettled::Differ(Place::Start)),
        (_, Some(end)) if end != footer => Some(Unsettled::Differ(Place::End)),
        _ => None,
    }
}

/// The image, if the file ends in zeroes and the last sector before them is the
/// footer of a disk of fixed size.
pub fn find_torn(host: &mut dyn Host, opening: &Opening<'_>) -> Result<Option<Vhd>, Failure> {
    let file_len = opening.file_len;
    let ends_in_zeroes = opening.tail.iter().all(|&byte| byte == 0);
    if !file_len.is_multiple_of(SECTOR) || !ends_in_zeroes || file_len == 0 {
        return Ok(None);
    }
    let mut buffer = vec![0; file_len.min(PIECE) as usize];
    let mut end = file_len;
    while end > 0 {
        let start = end.saturating_sub(PIECE);
        let piece = buffer.get_mut(..(end - start) as usize).unwrap_or_default();
        host.read(&mut [Read {
            file: FileNo::IMAGE,
            offset: start,
            buf: piece,
        }])?;
        let (sectors, _) = piece.as_chunks::<{ field::LEN }>();
        let last = sectors
            .iter()
            .rposition(|sector| sector.iter().any(|&byte| byte != 0));
        if let Some(number) = last {
            let at = start + number as u64 * SECTOR;
            let sector = sectors.get(number).map_or(&[][..], |sector| sector);
            return torn_at(at, sector, file_len);
        }
        end = start;
    }
    Ok(None)
}

fn torn_at(at: u64, sector: &[u8], file_len: u64) -> Result<Option<Vhd>, Failure> {
    match Footer::read(sector, Place::End) {
        Ok(footer) if footer.kind == Kind::Fixed && footer.current_size() == at => {
            let unsettled = Some(Unsettled::Torn(at + SECTOR));
            Vhd::fixed(footer, file_len, unsettled).map(Some)
        }
        _ => Ok(None),
    }
}

impl Vhd {
    /// The plan that puts the image in order.
    pub fn plan_settle(&mut self, host: &mut dyn Host) -> Result<PlanReply, Failure> {
        let step = match self.unsettled {
            None => return Ok(PlanReply::default()),
            Some(Unsettled::Torn(len)) => Step::SetLength {
                file: FileNo::IMAGE,
                len,
            },
            Some(Unsettled::Differ(Place::Start) | Unsettled::Missing(Place::Start)) => {
                self.footer_write(0)
            }
            Some(Unsettled::Differ(Place::End)) => self.footer_write(self.file_len - SECTOR),
            Some(Unsettled::Missing(Place::End)) => {
                let at = self.place_of_missing(host)?;
                self.footer_write(at)
            }
        };
        Ok(PlanReply {
            plan: Plan {
                stages: Vec::from([Stage {
                    purpose: Purpose::Commit,
                    steps: vec![step],
                }]),
            },
            ..PlanReply::default()
        })
    }

    /// Where the footer that is missing at the end goes: to the last sector, if
    /// nothing else is there, or behind it.
    fn place_of_missing(&mut self, host: &mut dyn Host) -> Result<u64, Failure> {
        let Layout::Dynamic(dynamic) = &self.layout else {
            return Ok(self.file_len);
        };
        if dynamic.has_old_footer {
            return Err(open::old_footer());
        }
        let names = parent::located(&self.footer, &dynamic.header)?;
        let names_end = names.iter().map(|name| name.end).max();
        let end = self.survey(host, 0)?.used_end.max(names_end.unwrap_or(0));
        let last_sector = self.file_len / SECTOR * SECTOR - SECTOR;
        let is_whole = self.file_len.is_multiple_of(SECTOR);
        Ok(match is_whole && last_sector >= end {
            true => last_sector,
            false => self.file_len.next_multiple_of(SECTOR),
        })
    }

    /// The write of the footer at a place.
    fn footer_write(&self, offset: u64) -> Step {
        write_footer(&self.footer, offset)
    }
}

/// The write of a footer at a place.
pub fn write_footer(footer: &Footer, offset: u64) -> Step {
    Step::Write {
        file: FileNo::IMAGE,
        offset,
        data: footer.bytes().to_vec(),
    }
}

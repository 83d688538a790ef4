//! Opening: from the first and last bytes of the file to a checked [`Vhd`].
//!
//! The footer at the end decides whether the disk is of fixed size: a guest can
//! write whatever it likes to the first sector of such a disk. For the others
//! both footers count. Where they differ, a change of size was interrupted, and
//! the larger size that the table covers is the one under which no data is
//! lost: it is cut off only after both footers have the smaller one.

use super::footer::{Footer, Kind, Place};
use super::format::{footer as field, header};
use super::header::Header;
use super::refuse::damaged;
use super::settle::{self, Unsettled};
use super::table::Table;
use super::write::Pending;
use super::{Dynamic, Layout, Vhd};
use crate::disk::Opening;
use crate::engine::{Host, Read};
use crate::error::{Failure, FailureKind};
use crate::plan::SECTOR;
use crate::proto::FileNo;
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;
use core::cmp::Reverse;

impl Vhd {
    /// Opens an image.
    pub fn open(host: &mut dyn Host, opening: &Opening<'_>) -> Result<Self, Failure> {
        let first = opening.head.get(..field::LEN).unwrap_or(opening.head);
        let last = opening.tail.len().saturating_sub(field::LEN);
        let last = opening.tail.get(last..).unwrap_or(&[]);
        let start = Footer::read(first, Place::Start);
        let end = Footer::read(last, Place::End);
        match (start, end) {
            (_, Ok(end)) if end.kind == Kind::Fixed => Self::fixed(end, opening.file_len, None),
            (Ok(start), end) if start.kind != Kind::Fixed => {
                Self::dynamic(host, opening, Some(start), end.ok())
            }
            (_, Ok(end)) => Self::dynamic(host, opening, None, Some(end)),
            (start, Err(end)) => {
                if let Some(torn) = settle::find_torn(host, opening)? {
                    return Ok(torn);
                }
                check_old_footer(opening)?;
                // What starts with a cookie was a footer: its flaw is the one to tell.
                Err(match start {
                    Err(start) if start.kind != FailureKind::NotThisFormat => start,
                    _ => end,
                })
            }
        }
    }

    /// An image of fixed size.
    pub(super) fn fixed(
        footer: Footer,
        file_len: u64,
        unsettled: Option<Unsettled>,
    ) -> Result<Self, Failure> {
        let room = file_len.saturating_sub(SECTOR);
        if unsettled.is_none() && footer.virtual_size() > room {
            return Err(damaged(format!(
                "the file is cut off: the footer says that the disk has {} bytes, {room} are \
                 before the footer",
                footer.virtual_size()
            )));
        }
        Ok(Self {
            file_len,
            footer,
            layout: Layout::Fixed,
            unsettled,
        })
    }

    fn dynamic(
        host: &mut dyn Host,
        opening: &Opening<'_>,
        start: Option<Footer>,
        end: Option<Footer>,
    ) -> Result<Self, Failure> {
        let footers: Vec<&Footer> = end.iter().chain(&start).collect();
        let header = match footers.as_slice() {
            [footer] => read_header(host, opening, footer)?,
            [one, other] if one.data_offset() == other.data_offset() => {
                read_header(host, opening, one)?
            }
            _ => {
                return Err(damaged(
                    "the two footers do not agree on where the dynamic header is",
                ));
            }
        };
        let footer = choose(footers, &header)?.clone();
        let unsettled = settle::judge_copies(&footer, start.as_ref(), end.as_ref());
        let has_old_footer = end.is_none() && check_old_footer(opening).is_err();
        Ok(Self {
            file_len: opening.file_len,
            footer,
            layout: Layout::Dynamic(Dynamic {
                table: Table::new(&header),
                header,
                pending: Pending::default(),
                write: opening.write,
                has_batmap: false,
                has_old_footer,
            }),
            unsettled,
        })
    }
}

/// The footer with the largest size that the table covers; of two, the last.
fn choose<'a>(mut footers: Vec<&'a Footer>, header: &Header) -> Result<&'a Footer, Failure> {
    footers.sort_by_key(|footer| Reverse(footer.virtual_size()));
    let covers = |footer: &&Footer| header.entries_for(footer.virtual_size()) <= header.entries;
    let found = footers.iter().copied().find(covers);
    found.ok_or_else(|| {
        let size = footers.last().map_or(0, |footer| footer.virtual_size());
        damaged(format!(
            "the block allocation table has {} entries for blocks of {} bytes: too few for a disk \
             of {size} bytes",
            header.entries, header.block_size
        ))
    })
}

fn read_header(
    host: &mut dyn Host,
    opening: &Opening<'_>,
    footer: &Footer,
) -> Result<Header, Failure> {
    let at = footer.data_offset();
    let end = at.checked_add(header::LEN as u64);
    if end.is_none_or(|end| end > opening.file_len) {
        return Err(damaged(format!(
            "the dynamic header at {at:#x} lies past the end of the file"
        )));
    }
    let placed = usize::try_from(at)
        .ok()
        .and_then(|at| opening.head.get(at..at.checked_add(header::LEN)?));
    let raw = match placed {
        Some(raw) => raw.to_vec(),
        None => {
            let mut raw = vec![0; header::LEN];
            host.read(&mut [Read {
                file: FileNo::IMAGE,
                offset: at,
                buf: &mut raw,
            }])?;
            raw
        }
    };
    Header::read(raw, at, opening.file_len)
}

/// Refuses the short footer of old programs.
fn check_old_footer(opening: &Opening<'_>) -> Result<(), Failure> {
    let last = opening.tail.len().saturating_sub(field::OLD_LEN as usize);
    let is_old = opening.file_len % SECTOR == field::OLD_LEN
        && opening
            .tail
            .get(last..)
            .is_some_and(|footer| footer.starts_with(field::COOKIE_VALUE));
    match is_old {
        false => Ok(()),
        true => Err(old_footer()),
    }
}

/// The refusal of the short footer of old programs.
pub(super) fn old_footer() -> Failure {
    Failure::new(
        FailureKind::Unsupported,
        "the footer has 511 bytes, as Virtual PC before 2004 wrote it; make it whole with \
         `truncate -s +1` on a copy of the image",
    )
}

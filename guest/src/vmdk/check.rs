//! Whether an image is sound, in qemu-img's words; what qemu-img does not look
//! at is a warning.
//!
//! The grain tables are what counts. Redundant ones are compared with them and
//! repaired from them; an entry that leads nowhere is repaired from its
//! redundant copy. A repair never changes what else the disk shows.

use super::descriptor::ExtentType;
use super::format::{entry, flag};
use super::scan::{self, Scan};
use super::slots::Slots;
use super::sparse::{Grain, Sparse};
use super::{Body, DiskExtent, Shape, Vmdk};
use crate::engine::Host;
use crate::error::{Failure, FailureKind};
use crate::findings::{Repair, Report, Severity};
use crate::plan::{Plan, Purpose, SECTOR, Stage, Step};
use crate::proto::{ExtentKind, PlanReply};
use crate::tell::Tell;
use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;

/// Most entries that one plan repairs.
const MAX_REPAIRS: usize = 64 << 10;
/// Most compressed bytes, as they are on the disk, that are inflated at once.
const INFLATE: u64 = 1 << 20;

/// A check under way.
struct Check<'a> {
    host: &'a mut dyn Host,
    tell: Tell,
    repair: bool,
    repairs: Vec<Step>,
    /// Entries that lead nowhere and are repaired.
    fixed: u64,
}

/// What one extent's tables add up to.
struct Sums {
    slots: Slots,
    /// The sector behind the last grain.
    end: u64,
    /// Entries that are told of once, by count.
    beyond: u64,
    odd: u64,
    metadata: u64,
    twice: u64,
    empty: u64,
    scattered: bool,
}

impl Vmdk {
    /// Checks the image, and plans what repairs it.
    pub fn plan_check(
        &mut self,
        host: &mut dyn Host,
        repair: Option<Repair>,
    ) -> Result<(Report, PlanReply), Failure> {
        self.tables.clear();
        let mut check = Check {
            host,
            tell: Tell::default(),
            repair: repair == Some(Repair::All) && self.no_change().is_none(),
            repairs: Vec::new(),
            fixed: 0,
        };
        for (index, extent) in self.extents.iter().enumerate() {
            let line = self.descriptor.extents.get(index);
            let name = match (&self.shape, line) {
                (Shape::Descriptor { .. }, Some(line)) => format!("extent '{}': ", line.name),
                _ => String::new(),
            };
            match &extent.body {
                Body::Zero => {}
                Body::Flat { at, file_len, .. } => {
                    check.flat(&name, extent, *at, *file_len)?;
                }
                Body::Sparse(sparse) => {
                    if let Some(line) = line
                        && line.kind == ExtentType::Sparse
                        && line.sectors != sparse.header.capacity
                    {
                        check.warn(format!(
                            "{name}the descriptor says {} sectors, the header {}",
                            line.sectors, sparse.header.capacity
                        ))?;
                    }
                    check.sparse(&name, extent.start, sparse)?;
                }
            }
        }
        let compressed = self.is_compressed();
        if compressed {
            self.check_compressed(&mut check)?;
        }
        check.finish()
    }

    fn is_compressed(&self) -> bool {
        matches!(
            self.extents.first().map(|extent| &extent.body),
            Some(Body::Sparse(sparse)) if sparse.header.compressed
        )
    }

    /// Inflates every compressed grain.
    fn check_compressed(&mut self, check: &mut Check<'_>) -> Result<(), Failure> {
        let grain = self
            .extents
            .first()
            .map_or(SECTOR, |extent| match &extent.body {
                Body::Sparse(sparse) => sparse.header.grain_len(),
                _ => SECTOR,
            });
        let size = self.size();
        let mut at = 0;
        while at < size {
            let extents = match self.extents(check.host, at, size - at) {
                Ok(extents) => extents,
                // The tables have been told about.
                Err(_) => return Ok(()),
            };
            for extent in &extents {
                at = extent.offset + extent.len;
                if extent.kind != ExtentKind::Compressed {
                    continue;
                }
                let step = INFLATE.max(grain) / grain * grain;
                for from in (extent.offset..at).step_by(step as usize) {
                    let len = step.min(at - from);
                    if self.inflated(check.host, from, len).is_err() {
                        self.check_each(check, from..from + len, grain)?;
                    }
                }
            }
            if extents.is_empty() {
                break;
            }
        }
        Ok(())
    }

    /// Tells of every compressed grain of a range that cannot be inflated.
    fn check_each(
        &mut self,
        check: &mut Check<'_>,
        range: Range<u64>,
        grain: u64,
    ) -> Result<(), Failure> {
        for at in range.clone().step_by(grain as usize) {
            let len = grain.min(range.end - at);
            if let Err(failure) = self.inflated(check.host, at, len) {
                check.warn(failure.message)?;
            }
        }
        Ok(())
    }
}

impl Check<'_> {
    fn warn(&mut self, text: impl Into<String>) -> Result<(), Failure> {
        self.tell.add(self.host, Severity::Warning, text)
    }

    fn points_after_end(&mut self, guest: u64) -> Result<(), Failure> {
        let text = format!(
            "ERROR: cluster offset for sector {} points after EOF",
            guest / SECTOR
        );
        self.tell.add(self.host, Severity::Corruption, text)
    }

    fn flat(
        &mut self,
        name: &str,
        extent: &DiskExtent,
        at: u64,
        file_len: u64,
    ) -> Result<(), Failure> {
        if at >= file_len {
            return self.points_after_end(extent.start);
        }
        match (at + extent.len).checked_sub(file_len) {
            Some(missing) if missing > 0 => self.warn(format!(
                "{name}the file is {missing} bytes shorter than the extent"
            )),
            _ => Ok(()),
        }
    }

    fn sparse(&mut self, name: &str, start: u64, sparse: &Sparse) -> Result<(), Failure> {
        let header = &sparse.header;
        let sectors = sparse.file_len.div_ceil(SECTOR);
        let front = header.overhead;
        let mut sums = Sums {
            slots: Slots::new(front, header.grain, sectors),
            end: front,
            beyond: 0,
            odd: 0,
            metadata: 0,
            twice: 0,
            empty: 0,
            scattered: false,
        };
        let mut scan = Scan::new(sparse, true);
        let entries = (header.directory_entries() * entry::LEN).div_ceil(SECTOR);
        let sets = [Some(header.directory), header.redundant];
        let mut next = sets.map(|set| set.map(|directory| directory + entries));
        while let Some(batch) = scan.advance(self.host)? {
            for number in batch.first..batch.first + batch.count {
                let (raw, table) = scan.table(&batch, 0, number)?;
                let second = match header.redundant {
                    Some(_) => Some(scan.table(&batch, 1, number)?),
                    None => None,
                };
                for (next, raw) in next.iter_mut().zip([Some(raw), second.map(|(raw, _)| raw)]) {
                    if let (Some(next), Some(raw)) = (next, raw) {
                        sums.scattered |= u64::from(raw) != *next;
                        *next = u64::from(raw) + header.table_len().div_ceil(SECTOR);
                    }
                }
                match sparse.table(number, raw) {
                    Ok(Some(_)) => {}
                    Ok(None) => {
                        sums.empty += 1;
                        continue;
                    }
                    Err(failure) => {
                        self.warn(format!("{name}{}", failure.message))?;
                        continue;
                    }
                }
                let view = View {
                    name,
                    start,
                    sparse,
                    number,
                    at: raw,
                };
                self.table(&view, table, &mut sums, second)?;
            }
        }
        self.summary(name, sparse, &sums)
    }

    fn table(
        &mut self,
        view: &View<'_>,
        table: &[u8],
        sums: &mut Sums,
        second: Option<(u32, &[u8])>,
    ) -> Result<(), Failure> {
        let header = &view.sparse.header;
        let mut differ = 0u64;
        let mut kept = 0u64;
        let pairs = scan::grains(table, view.number);
        let seconds = second.map(|(_, table)| scan::grains(table, view.number));
        let mut seconds = seconds.into_iter().flatten();
        for (grain, raw) in pairs {
            let other = seconds.next().map(|(_, raw)| raw);
            if grain >= header.grains() {
                sums.beyond += u64::from(raw != entry::NONE);
                continue;
            }
            let found = view.sparse.grain(grain, raw);
            if let Ok(Grain::At(sector)) = found {
                sums.note(header, sector);
            }
            let Some(other) = other.filter(|&other| other != raw) else {
                if found.is_err() {
                    self.points_after_end(view.start + grain * header.grain_len())?;
                }
                continue;
            };
            let place = (grain % u64::from(header.table_entries)) * entry::LEN;
            let other_is_good = view.sparse.grain(grain, other).is_ok();
            let second_at = second.map_or(0, |(raw, _)| raw);
            match found {
                Err(_) if other_is_good && self.patch(view.sparse, view.at, place, other) => {
                    self.fixed += 1;
                    let text = format!(
                        "Repairing the grain table entry of grain {grain} from its redundant copy"
                    );
                    self.tell.add(self.host, Severity::Repaired, text)?;
                }
                Err(_) => self.points_after_end(view.start + grain * header.grain_len())?,
                // Which of two places holds the data, nobody can tell.
                Ok(Grain::At(_)) if other > entry::ZEROED && other_is_good => kept += 1,
                Ok(_) if self.patch(view.sparse, second_at, place, raw) => differ += 1,
                Ok(_) => kept += 1,
            }
        }
        if kept > 0 {
            self.warn(format!(
                "{}grain table {} differs from its redundant copy in {kept} entries",
                view.name, view.number
            ))?;
        }
        if differ > 0 {
            let text = format!(
                "{}Repairing {differ} entries of redundant grain table {}",
                view.name, view.number
            );
            self.tell.add(self.host, Severity::Repaired, text)?;
        }
        Ok(())
    }

    /// Plans the write of an entry, if repairs are wanted and there is room.
    fn patch(&mut self, sparse: &Sparse, table: u32, place: u64, raw: u32) -> bool {
        let at = u64::from(table) * SECTOR + place;
        let inside = table != 0 && at + entry::LEN <= sparse.file_len;
        if !self.repair || !inside || self.repairs.len() >= MAX_REPAIRS {
            return false;
        }
        match self.repairs.last_mut() {
            Some(Step::Write { file, offset, data })
                if *file == sparse.file && *offset + data.len() as u64 == at =>
            {
                data.extend_from_slice(&raw.to_le_bytes());
            }
            _ => self.repairs.push(Step::Write {
                file: sparse.file,
                offset: at,
                data: raw.to_le_bytes().to_vec(),
            }),
        }
        true
    }

    fn summary(&mut self, name: &str, sparse: &Sparse, sums: &Sums) -> Result<(), Failure> {
        let header = &sparse.header;
        let stream = sparse.at_end || header.flags & flag::MARKERS != 0;
        if header.unclean {
            self.warn(format!("{name}the extent was not closed in order"))?;
        }
        let counts = [
            (sums.beyond, "grain table entries lie behind the disk's end"),
            (sums.metadata, "grain table entries lead into the metadata"),
            (sums.twice, "grains have more than one entry"),
        ];
        for (count, what) in counts.into_iter().filter(|&(count, _)| count > 0) {
            self.warn(format!("{name}{count} {what}"))?;
        }
        if stream {
            return Ok(());
        }
        let counts = [
            (
                sums.odd,
                "grains do not begin at a multiple of the grain size",
            ),
            (
                sums.empty,
                "grain directory entries have no grain table: QEMU must not write to the image",
            ),
        ];
        for (count, what) in counts.into_iter().filter(|&(count, _)| count > 0) {
            self.warn(format!("{name}{count} {what}"))?;
        }
        if sums.scattered {
            self.warn(format!(
                "{name}the grain tables do not follow their directory in order, as VMware programs \
                 expect"
            ))?;
        }
        let unused = (sparse.file_len / SECTOR).saturating_sub(sums.end);
        if unused >= header.grain {
            self.warn(format!(
                "{name}{} bytes behind the last grain are not used",
                unused * SECTOR
            ))?;
        }
        Ok(())
    }

    fn finish(mut self) -> Result<(Report, PlanReply), Failure> {
        self.tell.flush(self.host)?;
        let mut report = self.tell.report;
        if report.corruptions > 0 && !self.repair {
            // QEMU's check of this format fails where it finds something.
            return Err(Failure::new(
                FailureKind::Damaged,
                "Check failed: Invalid argument",
            ));
        }
        report.corruptions_fixed = self.fixed;
        let mut plan = Plan::default();
        if !self.repairs.is_empty() {
            plan.stages = vec![Stage {
                purpose: Purpose::Link,
                steps: self.repairs,
            }];
        }
        let reply = PlanReply {
            plan,
            ..PlanReply::default()
        };
        Ok((report, reply))
    }
}

/// A grain table that is looked at.
struct View<'a> {
    name: &'a str,
    /// Guest offset of the extent.
    start: u64,
    sparse: &'a Sparse,
    number: u64,
    /// Its sector.
    at: u32,
}

impl Sums {
    /// Takes note of a grain's place.
    fn note(&mut self, header: &super::sparse::Header, sector: u64) {
        self.end = self.end.max(sector + header.grain);
        if sector < header.overhead {
            self.metadata += 1;
            return;
        }
        if !sector.is_multiple_of(header.grain) {
            self.odd += 1;
        } else if !self.slots.take(sector) {
            self.twice += 1;
        }
    }
}

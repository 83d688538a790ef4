//! Whether an image is sound, in qemu-img's words; what qemu-img does not look
//! at is a warning.
//!
//! Of two entries for a grain the one that leads to it repairs the other, which
//! leads nowhere. Nothing is repaired where a table might not be one: it has to
//! lie in order behind its directory, and no grain in the metadata.

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
    /// The places of the extent's grains, where its tables may be repaired.
    used: Option<Slots>,
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
            used: None,
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
        let mut removal = Plan::default();
        if let Shape::Descriptor { tail, .. } = &self.shape {
            let extents = &self.descriptor.extents;
            let repair = repair.is_some() && self.no_change().is_none();
            check.left_over(&tail.names(extents), repair)?;
            if repair {
                removal = tail.plan(extents);
            }
        }
        check.finish(removal)
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

    /// Files that an interrupted resize may have left.
    fn left_over(&mut self, names: &[String], repair: bool) -> Result<(), Failure> {
        for name in names {
            let (severity, text) = match repair {
                true => (Severity::Repaired, format!("Removing the file '{name}'")),
                false => (
                    Severity::Leak,
                    format!("Leaked file '{name}', if it is there: a resize was interrupted"),
                ),
            };
            self.tell.add(self.host, severity, text)?;
        }
        if repair {
            self.tell.report.leaks_fixed = names.len() as u64;
        }
        Ok(())
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
        self.used = self.usage(sparse)?;
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
                        *next = u64::from(raw) + header.table_sectors();
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

    /// The places that an extent's grains take, if its tables are to be repaired
    /// and no grain lies where they might.
    fn usage(&mut self, sparse: &Sparse) -> Result<Option<Slots>, Failure> {
        let header = &sparse.header;
        if !self.repair || header.redundant.is_none() {
            return Ok(None);
        }
        let sectors = sparse.file_len.div_ceil(SECTOR);
        let mut used = Slots::new(header.overhead, header.grain, sectors);
        let mut scan = Scan::new(sparse, false);
        while let Some(batch) = scan.advance(self.host)? {
            for number in batch.first..batch.first + batch.count {
                let (_, table) = scan.table(&batch, 0, number)?;
                for (grain, raw) in scan::grains(table, number) {
                    match sparse.grain(grain, raw) {
                        _ if grain >= header.grains() => {}
                        Ok(Grain::At(sector)) if sector < header.overhead => return Ok(None),
                        Ok(Grain::At(sector)) => {
                            used.take(sector);
                        }
                        _ => {}
                    }
                }
            }
        }
        Ok(Some(used))
    }

    fn table(
        &mut self,
        view: &View<'_>,
        table: &[u8],
        sums: &mut Sums,
        second: Option<(u32, &[u8])>,
    ) -> Result<(), Failure> {
        let header = &view.sparse.header;
        let second_at = second.map_or(0, |(raw, _)| raw);
        let seconds = second.map(|(_, table)| scan::grains(table, view.number));
        let mut seconds = seconds.into_iter().flatten();
        let (mut repaired, mut kept) = (0u64, 0u64);
        for (grain, raw) in scan::grains(table, view.number) {
            let other = seconds.next().map(|(_, raw)| raw);
            if grain >= header.grains() {
                sums.beyond += u64::from(raw != entry::NONE);
                continue;
            }
            let found = view.sparse.grain(grain, raw);
            if let Ok(Grain::At(sector)) = found {
                sums.note(header, sector);
            }
            let mended = match other.filter(|&other| other != raw) {
                Some(other) => self.mend(view, second_at, grain, (raw, other)),
                None if found.is_ok() => continue,
                None => Mended::Not,
            };
            match mended {
                Mended::First => {
                    self.fixed += u64::from(found.is_err());
                    let text = format!(
                        "Repairing the grain table entry of grain {grain} from its redundant copy"
                    );
                    self.tell.add(self.host, Severity::Repaired, text)?;
                }
                Mended::Second => repaired += 1,
                Mended::Not if found.is_ok() => kept += 1,
                Mended::Not => self.points_after_end(view.start + grain * header.grain_len())?,
            }
        }
        self.sum_up(view, kept, repaired)
    }

    fn sum_up(&mut self, view: &View<'_>, kept: u64, repaired: u64) -> Result<(), Failure> {
        if kept > 0 {
            self.warn(format!(
                "{}grain table {} differs from its redundant copy in {kept} entries",
                view.name, view.number
            ))?;
        }
        if repaired > 0 {
            let text = format!(
                "{}Repairing {repaired} entries of redundant grain table {}",
                view.name, view.number
            );
            self.tell.add(self.host, Severity::Repaired, text)?;
        }
        Ok(())
    }

    /// Plans the repair of one of two entries that differ, if one of them leads
    /// to a grain and the other nowhere. Of two that lead to a grain, or say
    /// that it is zero, nobody can tell which is right.
    fn mend(
        &mut self,
        view: &View<'_>,
        second_at: u32,
        grain: u64,
        (raw, other): (u32, u32),
    ) -> Mended {
        let header = &view.sparse.header;
        let place = grain % u64::from(header.table_entries) * entry::LEN;
        let redundant = header.redundant.unwrap_or(0);
        let found = view.sparse.grain(grain, raw);
        let second = view.sparse.grain(grain, other);
        match (found, second) {
            (Err(_) | Ok(Grain::None), Ok(Grain::At(sector))) => {
                let is_free = self.used.as_mut().is_some_and(|used| used.claim(sector));
                match is_free && self.patch(view, (header.directory, view.at), place, other) {
                    true => Mended::First,
                    false => Mended::Not,
                }
            }
            (Ok(Grain::At(_) | Grain::Zeroed), Err(_) | Ok(Grain::None)) => {
                match self.patch(view, (redundant, second_at), place, raw) {
                    true => Mended::Second,
                    false => Mended::Not,
                }
            }
            _ => Mended::Not,
        }
    }

    /// Plans the write of an entry of a directory's table, if repairs are
    /// wanted, the table is one, and there is room.
    fn patch(
        &mut self,
        view: &View<'_>,
        (directory, table): (u64, u32),
        place: u64,
        raw: u32,
    ) -> bool {
        let sparse = view.sparse;
        let is_table = sparse.is_orderly(directory, view.number, table.into());
        if self.used.is_none() || !is_table || self.repairs.len() >= MAX_REPAIRS {
            return false;
        }
        let at = u64::from(table) * SECTOR + place;
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

    /// The sums, and the plan: entries are repaired before files go.
    fn finish(mut self, removal: Plan) -> Result<(Report, PlanReply), Failure> {
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
        plan.stages.extend(removal.stages);
        let reply = PlanReply {
            plan,
            ..PlanReply::default()
        };
        Ok((report, reply))
    }
}

/// Which of two entries that differ is repaired.
enum Mended {
    First,
    Second,
    Not,
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

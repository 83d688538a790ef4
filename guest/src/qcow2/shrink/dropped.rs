//! What nothing refers to any more once the disk has its new size.

use super::super::Qcow2;
use super::super::format::entry;
use super::super::l2_table::Visit;
use super::super::layout::Run;
use super::super::tables::Kind;
use super::bitmaps::Cuts;
use super::survey::Survey;
use crate::engine::Host;
use crate::error::Failure;
use crate::units::HostOffset;
use alloc::vec::Vec;

/// Bytes of L2 tables that are read with one exit from the sandbox.
const BATCH: u64 = 1 << 20;

/// Visits every run of clusters to which the shrink drops a reference, once for
/// each reference, in the same order each time.
pub fn each_dropped(
    image: &mut Qcow2,
    host: &mut dyn Host,
    survey: &Survey,
    cuts: &Cuts,
    visit: &mut Visit<'_>,
) -> Result<(), Failure> {
    let geometry = image.header.geometry;
    if let Some(boundary) = &survey.boundary {
        let first = survey.kept - boundary.index * geometry.l2_entries();
        let entries = first..geometry.l2_entries();
        image.held_runs(host, &boundary.old, boundary.index, entries, visit)?;
    }
    each_table(image, host, survey.l1_kept, visit)?;
    let header = &image.header;
    let clusters = geometry.l1_clusters(u64::from(header.l1.count));
    let kept = geometry.l1_clusters(survey.l1_kept);
    if kept < clusters {
        let first = header.l1.offset.0 / geometry.cluster_size() + kept;
        let count = clusters - kept;
        visit(host, Run { first, count })?;
    }
    cuts.dropped(image, host, visit)
}

/// The L2 tables from an L1 entry on, and what they hold.
fn each_table(
    image: &mut Qcow2,
    host: &mut dyn Host,
    from: u64,
    visit: &mut Visit<'_>,
) -> Result<(), Failure> {
    let geometry = image.header.geometry;
    let end = u64::from(image.header.l1.count);
    let step = image.tables.slice_len() / entry::LEN;
    let batch = (BATCH / geometry.cluster_size()).max(1) as usize;
    let mut found: Vec<(u64, HostOffset)> = Vec::new();
    for index in from..end {
        if (index - from).is_multiple_of(16 * step) {
            let places: Vec<HostOffset> = (index..end.min(index + 16 * step))
                .step_by(step as usize)
                .map(|index| image.header.l1.offset.plus(index * entry::LEN))
                .collect();
            image.tables.prefetch(host, Kind::L1, &places)?;
        }
        if let Some(table) = image.l1_entry(host, index)?.table {
            found.push((index, table));
        }
        if found.len() == batch {
            visit_tables(image, host, &found, visit)?;
            found.clear();
        }
    }
    visit_tables(image, host, &found, visit)
}

fn visit_tables(
    image: &Qcow2,
    host: &mut dyn Host,
    found: &[(u64, HostOffset)],
    visit: &mut Visit<'_>,
) -> Result<(), Failure> {
    let geometry = image.header.geometry;
    let places: Vec<HostOffset> = found.iter().map(|&(_, table)| table).collect();
    let contents = image.whole_tables(host, &places)?;
    for (&(index, table), content) in found.iter().zip(&contents) {
        let entries = 0..geometry.l2_entries();
        image.held_runs(host, content, index, entries, visit)?;
        let first = table.0 / geometry.cluster_size();
        visit(host, Run { first, count: 1 })?;
    }
    Ok(())
}

//! The cache of table pieces: what it reads, keeps and drops.

use super::tables::{CLEAN_LIMIT, Kind, Tables};
use crate::testing::MemHost;
use crate::units::HostOffset;
use alloc::vec;
use alloc::vec::Vec;

const KIB: u64 = 1 << 10;

fn numbered(len: u64) -> MemHost {
    MemHost::new((0..len / 8).flat_map(u64::to_be_bytes).collect())
}

#[test]
fn a_slice_is_read_once() {
    let mut host = numbered(256 * KIB);
    let mut tables = Tables::new(64 * KIB, 256 * KIB);
    for at in [64 * KIB, 64 * KIB + 8, 127 * KIB] {
        let value = tables.read(&mut host, Kind::L2, HostOffset(at)).unwrap();
        assert_eq!(value, at / 8);
    }
    assert_eq!((host.reads, host.bytes_read), (1, 64 * KIB));
}

#[test]
fn what_is_missing_is_read_at_once_and_clipped_to_the_file() {
    let mut host = numbered(100 * KIB);
    let mut tables = Tables::new(64 * KIB, 100 * KIB);
    let offsets = [0, 64 * KIB, 8, 64 * KIB + 8, 1 << 40].map(HostOffset);
    tables.prefetch(&mut host, Kind::L2, &offsets).unwrap();
    assert_eq!((host.reads, host.bytes_read), (1, 100 * KIB));
    let past_the_end = tables.read(&mut host, Kind::L2, HostOffset(127 * KIB));
    assert_eq!(past_the_end, Ok(0));
    assert_eq!(host.reads, 1);
}

#[test]
fn changes_are_kept_by_sector_and_kind_until_they_are_written() {
    let mut host = numbered(64 * KIB);
    let mut tables = Tables::new(4 * KIB, 64 * KIB);
    for (kind, at) in [
        (Kind::L2, 4 * KIB),
        (Kind::L2, 4 * KIB + 1016),
        (Kind::L2, 4 * KIB + 3 * KIB),
        (Kind::L1, 8 * KIB),
    ] {
        tables.write(&mut host, kind, HostOffset(at), !0).unwrap();
    }
    let runs = |tables: &Tables, kind| -> Vec<(u64, usize)> {
        let dirty = tables.dirty(kind);
        dirty.map(|(at, bytes)| (at.0, bytes.len())).collect()
    };
    assert_eq!(runs(&tables, Kind::L2), [(4096, 1024), (4096 + 3072, 512)]);
    assert_eq!(runs(&tables, Kind::L1), [(8192, 512)]);
    tables.mark_planned(Kind::L2);
    assert_eq!(runs(&tables, Kind::L2), []);
    assert!(tables.is_dirty());
    let value = tables.read(&mut host, Kind::L2, HostOffset(4 * KIB));
    assert_eq!(value, Ok(!0));
}

#[test]
fn a_new_table_is_all_zeroes_and_all_changed() {
    let mut host = numbered(64 * KIB);
    let mut tables = Tables::new(64 * KIB, 64 * KIB);
    tables.insert_zeroed(Kind::L2, HostOffset(128 * KIB), 128 * KIB);
    let dirty: Vec<_> = tables
        .dirty(Kind::L2)
        .map(|(at, bytes)| (at.0, bytes.to_vec()))
        .collect();
    let zeroes = vec![0; 64 << 10];
    assert!(dirty == [(128 * KIB, zeroes.clone()), (192 * KIB, zeroes)]);
    assert_eq!(tables.dirty_len(), 128 * KIB);
    let value = tables.read(&mut host, Kind::L2, HostOffset(192 * KIB));
    assert_eq!((value, host.reads), (Ok(0), 0));
}

#[test]
fn a_forgotten_place_is_read_again() {
    let mut host = numbered(64 * KIB);
    let mut tables = Tables::new(4 * KIB, 64 * KIB);
    let at = HostOffset(4 * KIB);
    tables.write(&mut host, Kind::L2, at, 5).unwrap();
    tables.forget(at, 4 * KIB);
    assert!(!tables.is_dirty());
    assert_eq!(tables.read(&mut host, Kind::L2, at), Ok(512));
    assert_eq!(host.reads, 2);
}

#[test]
fn clean_slices_are_bounded_and_changed_ones_stay() {
    let slices = 3 * CLEAN_LIMIT / (64 * KIB);
    let file_len = slices * 64 * KIB;
    let mut host = MemHost::new(vec![0; file_len as usize]);
    let mut tables = Tables::new(64 * KIB, file_len);
    tables
        .write(&mut host, Kind::L2, HostOffset(64 * KIB), 7)
        .unwrap();
    let place = |slice: u64| HostOffset(slice * 64 * KIB);
    for slice in 0..slices {
        tables.read(&mut host, Kind::L2, place(slice)).unwrap();
    }
    let held = (0..slices).filter(|&slice| tables.holds(place(slice)));
    assert_eq!(held.count() as u64, CLEAN_LIMIT / (64 * KIB));
    assert!(tables.holds(HostOffset(64 * KIB)));
    assert!(tables.holds(place(slices - 1)));
}

#[test]
fn what_is_planned_is_not_read_from_the_file_before_it_is_there() {
    let mut host = numbered(CLEAN_LIMIT + 128 * KIB);
    let mut tables = Tables::new(64 * KIB, CLEAN_LIMIT + 128 * KIB);
    let read = |tables: &mut Tables, host: &mut MemHost| {
        tables.read(host, Kind::L2, HostOffset(0)).unwrap()
    };
    let flood = |tables: &mut Tables, host: &mut MemHost| {
        for at in (64 * KIB..CLEAN_LIMIT + 128 * KIB).step_by(64 << 10) {
            tables.read(host, Kind::L2, HostOffset(at)).unwrap();
        }
    };
    let zero = HostOffset(0);
    tables.write(&mut host, Kind::L2, zero, !0).unwrap();
    tables.mark_planned(Kind::L2);
    assert!(!tables.is_dirty());
    flood(&mut tables, &mut host);
    flood(&mut tables, &mut host);
    assert_eq!(read(&mut tables, &mut host), !0);
    tables.executed();
    flood(&mut tables, &mut host);
    flood(&mut tables, &mut host);
    assert_eq!(read(&mut tables, &mut host), 0);
}

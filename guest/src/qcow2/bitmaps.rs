//! The bitmap directory.

use super::extensions::BitmapsRef;
use super::format::{bitmap, entry, limit};
use super::geometry::Geometry;
use super::header::TableRef;
use super::refuse;
use super::snapshots::{Directory, check_names_len};
use crate::bytes::{be16, be32, be64, byte, slice};
use crate::engine::Host;
use crate::error::Failure;
use crate::units::HostOffset;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

/// A persistent bitmap, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bitmap {
    /// Its table: place and entries.
    pub table: TableRef,
    /// Flag bits, all known.
    pub flags: u32,
    /// log2 of the bytes that one bit stands for.
    pub granularity_bits: u32,
    /// Its name.
    pub name: String,
    /// The directory entry as it stands in the file, without padding.
    pub raw: Vec<u8>,
}

impl Bitmap {
    /// A writer was interrupted, or is at work: the content is unknown.
    pub fn in_use(&self) -> bool {
        self.flags & bitmap::IN_USE != 0
    }

    /// Writers have to track their writes in it.
    pub fn auto(&self) -> bool {
        self.flags & bitmap::AUTO != 0
    }
}

/// Bitmap table entries that a disk of `size` bytes needs: one for each cluster
/// of bits.
pub fn table_entries(size: u64, granularity_bits: u32, geometry: Geometry) -> u64 {
    let bits = size.div_ceil(1 << granularity_bits.min(limit::MAX_GRANULARITY_BITS));
    bits.div_ceil(8).div_ceil(geometry.cluster_size())
}

/// Checks what the header extension says and returns the directory's length.
pub fn check_place(place: BitmapsRef, geometry: Geometry, file_len: u64) -> Result<u64, Failure> {
    let count = u64::from(place.count);
    let len = place.directory_len;
    if count == 0 {
        return Err(refuse::header(
            "bitmaps_ext: found bitmaps extension with zero bitmaps (field nb_bitmaps)",
        ));
    }
    if count > limit::MAX_BITMAPS {
        return Err(refuse::header(format!(
            "bitmaps_ext: image has {count} bitmaps (field nb_bitmaps), at most {}",
            limit::MAX_BITMAPS
        )));
    }
    if len > limit::MAX_DIRECTORY_LEN || len < count * bitmap::LEN as u64 {
        return Err(refuse::header(format!(
            "bitmaps_ext: bitmap directory size ({len}) is too large or too small for {count} \
             bitmaps (field bitmap_directory_size, at most {})",
            limit::MAX_DIRECTORY_LEN
        )));
    }
    let at = place.directory;
    refuse::misplaced(geometry, file_len, at.0, len).map_or(Ok(len), |why| {
        Err(refuse::header(format!(
            "bitmaps_ext: invalid bitmap directory offset (field bitmap_directory_offset is {at}, \
             {len} bytes: {why})"
        )))
    })
}

/// Reads and checks the directory.
pub fn read(
    host: &mut dyn Host,
    place: BitmapsRef,
    geometry: Geometry,
    file_len: u64,
    size: u64,
) -> Result<Vec<Bitmap>, Failure> {
    let mut directory = Directory::new(place.directory, place.directory_len, file_len);
    let mut list: Vec<Bitmap> = Vec::new();
    let mut at = 0;
    let mut names_len = 0;
    for index in 0..place.count {
        let bitmap = read_one(host, &mut directory, at, index)?;
        check(&bitmap, geometry, file_len, size).map_err(|why| {
            refuse::table(format!(
                "Bitmap '{}' doesn't satisfy the constraints: {why}",
                bitmap.name
            ))
        })?;
        at = (at + bitmap.raw.len()).next_multiple_of(8);
        names_len += bitmap.name.len();
        check_names_len("bitmap directory", names_len)?;
        list.push(bitmap);
    }
    if at as u64 != place.directory_len {
        return Err(refuse::table(format!(
            "bitmap directory: {} bytes (field bitmap_directory_size), its {} entries take {at}",
            place.directory_len, place.count
        )));
    }
    Ok(list)
}

fn read_one(
    host: &mut dyn Host,
    directory: &mut Directory,
    at: usize,
    index: u32,
) -> Result<Bitmap, Failure> {
    let cut_short = || {
        refuse::table(format!(
            "bitmap directory: entry {index} reaches past its end"
        ))
    };
    let fixed = directory
        .get(host, at, bitmap::LEN)?
        .ok_or_else(cut_short)?;
    let extra_len = be32(fixed, bitmap::EXTRA_LEN)? as usize;
    let name_len = usize::from(be16(fixed, bitmap::NAME_LEN)?);
    let name_at = bitmap::LEN.saturating_add(extra_len);
    let raw = directory
        .get(host, at, name_at.saturating_add(name_len))?
        .ok_or_else(cut_short)?;
    let flags = be32(raw, bitmap::FLAGS)?;
    let kind = byte(raw, bitmap::TYPE)?;
    if kind != bitmap::DIRTY_TRACKING {
        return Err(refuse::table(format!(
            "bitmap directory entry {index}: unknown bitmap type {kind}"
        )));
    }
    if flags & !bitmap::KNOWN_FLAGS != 0 {
        return Err(refuse::table(format!(
            "bitmap directory entry {index}: reserved flags are set ({flags:#x})"
        )));
    }
    if extra_len != 0 && flags & bitmap::EXTRA_COMPATIBLE == 0 {
        return Err(refuse::table(format!(
            "bitmap directory entry {index}: extra data is not supported ({extra_len} bytes)"
        )));
    }
    if name_len == 0 || name_len as u64 > limit::MAX_BITMAP_NAME {
        return Err(refuse::table(format!(
            "bitmap directory entry {index}: the name is {name_len} bytes long, 1 to {} are \
             allowed",
            limit::MAX_BITMAP_NAME
        )));
    }
    Ok(Bitmap {
        table: TableRef {
            offset: HostOffset(be64(raw, bitmap::TABLE_OFFSET)?),
            count: be32(raw, bitmap::TABLE_SIZE)?,
        },
        flags,
        granularity_bits: u32::from(byte(raw, bitmap::GRANULARITY_BITS)?),
        name: String::from_utf8_lossy(slice(raw, name_at, name_len)?).into_owned(),
        raw: raw.to_vec(),
    })
}

/// What QEMU calls the constraints: a bitmap that violates them is refused by
/// every program.
fn check(bitmap: &Bitmap, geometry: Geometry, file_len: u64, size: u64) -> Result<(), String> {
    let bits = bitmap.granularity_bits;
    if !(limit::MIN_GRANULARITY_BITS..=limit::MAX_GRANULARITY_BITS).contains(&bits) {
        return Err(format!(
            "its granularity is 2^{bits} bytes, 2^{} to 2^{} are allowed",
            limit::MIN_GRANULARITY_BITS,
            limit::MAX_GRANULARITY_BITS
        ));
    }
    let entries = u64::from(bitmap.table.count);
    if entries == 0 || entries > limit::MAX_BITMAP_TABLE {
        return Err(format!(
            "its table has {entries} entries, 1 to {} are allowed",
            limit::MAX_BITMAP_TABLE
        ));
    }
    let needed = table_entries(size, bits, geometry);
    if !bitmap.in_use() && entries != needed {
        return Err(format!(
            "its table has {entries} entries, the virtual size needs {needed}"
        ));
    }
    let at = bitmap.table.offset;
    refuse::misplaced(geometry, file_len, at.0, entries * entry::LEN).map_or(Ok(()), |why| {
        Err(format!("its table at {at} ({entries} entries) is {why}"))
    })
}

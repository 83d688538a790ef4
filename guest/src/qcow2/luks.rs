//! The LUKS header of an encrypted image, as far as `info` shows it: names,
//! iterations, slots. Never keys.
//!
//! Offsets are those of the "LUKS1 On-Disk Format Specification", section
//! "Partition header"; numbers are big endian, places count 512-byte sectors.

use super::facts::Tree;
use super::refuse;
use crate::bytes::{be16, be32, slice};
use crate::engine::{Host, Read};
use crate::error::{Failure, FailureKind};
use crate::facts::FactValue;
use crate::plan::SECTOR;
use crate::proto::FileNo;
use crate::units::HostOffset;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;

const MAGIC: &[u8] = b"LUKS\xba\xbe";
const VERSION: usize = 6;
const CIPHER_NAME: usize = 8;
const CIPHER_MODE: usize = 40;
const HASH: usize = 72;
const NAME_LEN: usize = 32;
const PAYLOAD_OFFSET: usize = 104;
const KEY_LEN: usize = 108;
const ITERATIONS: usize = 164;
const UUID: usize = 168;
const UUID_LEN: usize = 40;
const SLOTS: usize = 208;
const SLOT_COUNT: usize = 8;
const SLOT_LEN: usize = 48;
const SLOT_ITERATIONS: usize = 4;
const SLOT_KEY_OFFSET: usize = 40;
const SLOT_STRIPES: usize = 44;
const SLOT_ACTIVE: u32 = 0x00ac_71f3;
const SLOT_INACTIVE: u32 = 0x0000_dead;
/// Length of the partition header in bytes.
pub const LEN: usize = SLOTS + SLOT_COUNT * SLOT_LEN;

const _: () = assert!(LEN == 592 && UUID + UUID_LEN == SLOTS);

/// A partition header, checked.
pub struct Luks {
    cipher: String,
    mode: String,
    iv_generator: String,
    iv_hash: Option<String>,
    hash: String,
    payload: u64,
    iterations: u32,
    uuid: String,
    slots: Vec<Slot>,
}

struct Slot {
    active: bool,
    iterations: u32,
    key: u64,
    stripes: u32,
}

impl Luks {
    /// Reads the header that lies at `at` in the image.
    pub fn read(host: &mut dyn Host, at: HostOffset) -> Result<Self, Failure> {
        let mut header = vec![0; LEN];
        host.read(&mut [Read {
            file: FileNo::IMAGE,
            offset: at.0,
            buf: &mut header,
        }])?;
        Self::parse(&header)
    }

    fn parse(header: &[u8]) -> Result<Self, Failure> {
        if !header.starts_with(MAGIC) {
            return Err(refuse::header(
                "Volume is not in LUKS format (encryption header)",
            ));
        }
        let version = be16(header, VERSION)?;
        if version != 1 {
            return Err(Failure::new(
                FailureKind::Unsupported,
                format!(
                    "LUKS version {version} is not supported (encryption header, field version)"
                ),
            ));
        }
        let mode = text(header, CIPHER_MODE, NAME_LEN)?;
        let Some((mode, iv)) = mode.split_once('-') else {
            return Err(refuse::header(format!(
                "Unexpected cipher mode string format '{mode}' (encryption header)"
            )));
        };
        let (iv_generator, iv_hash) = match iv.split_once(':') {
            Some((generator, hash)) => (generator, Some(hash)),
            None => (iv, None),
        };
        let key_bits = u64::from(be32(header, KEY_LEN)?) * 8;
        let key_bits = if mode == "xts" {
            key_bits / 2
        } else {
            key_bits
        };
        Ok(Self {
            cipher: format!("{}-{key_bits}", text(header, CIPHER_NAME, NAME_LEN)?),
            mode: mode.to_string(),
            iv_generator: iv_generator.to_string(),
            iv_hash: iv_hash
                .filter(|_| iv_generator == "essiv")
                .map(String::from),
            hash: text(header, HASH, NAME_LEN)?,
            payload: sectors(header, PAYLOAD_OFFSET)?,
            iterations: be32(header, ITERATIONS)?,
            uuid: text(header, UUID, UUID_LEN)?,
            slots: (0..SLOT_COUNT)
                .map(|index| slot(header, index))
                .collect::<Result<_, _>>()?,
        })
    }

    /// Adds the facts, in the order in which qemu-img prints them.
    pub fn add_to(&self, tree: &mut Tree) -> Result<(), Failure> {
        let text = |value: &str| FactValue::Text(value.to_string());
        tree.add("ivgen-alg", text(&self.iv_generator));
        tree.add("detached-header", FactValue::Bool(false));
        tree.add("hash-alg", text(&self.hash));
        tree.add("cipher-alg", text(&self.cipher));
        tree.add("uuid", text(&self.uuid));
        if let Some(hash) = &self.iv_hash {
            tree.add("ivgen-hash-alg", text(hash));
        }
        tree.add("format", text("luks"));
        tree.add("cipher-mode", text(&self.mode));
        tree.nest("slots", FactValue::List, |tree| {
            self.slots
                .iter()
                .try_for_each(|slot| tree.nest("", FactValue::Object, |tree| slot.add_to(tree)))
        })?;
        tree.add("payload-offset", FactValue::Number(self.payload));
        let iterations = u64::from(self.iterations);
        tree.add("master-key-iters", FactValue::Number(iterations));
        Ok(())
    }
}

impl Slot {
    fn add_to(&self, tree: &mut Tree) -> Result<(), Failure> {
        tree.add("active", FactValue::Bool(self.active));
        if self.active {
            let iterations = u64::from(self.iterations);
            tree.add("iters", FactValue::Number(iterations));
        }
        tree.add("key-offset", FactValue::Number(self.key));
        if self.active {
            tree.add("stripes", FactValue::Number(u64::from(self.stripes)));
        }
        Ok(())
    }
}

fn slot(header: &[u8], index: usize) -> Result<Slot, Failure> {
    let at = SLOTS + index * SLOT_LEN;
    let active = match be32(header, at)? {
        SLOT_ACTIVE => true,
        SLOT_INACTIVE => false,
        state => {
            return Err(refuse::header(format!(
                "Keyslot {index} state (active/disable) is corrupted (encryption header, \
                 {state:#010x})"
            )));
        }
    };
    Ok(Slot {
        active,
        iterations: be32(header, at + SLOT_ITERATIONS)?,
        key: sectors(header, at + SLOT_KEY_OFFSET)?,
        stripes: be32(header, at + SLOT_STRIPES)?,
    })
}

fn sectors(header: &[u8], at: usize) -> Result<u64, Failure> {
    Ok(u64::from(be32(header, at)?) * SECTOR)
}

/// A text that ends with a zero byte or with its field.
fn text(header: &[u8], at: usize, len: usize) -> Result<String, Failure> {
    let field = slice(header, at, len)?;
    let text = field.split(|&byte| byte == 0).next().unwrap_or_default();
    Ok(String::from_utf8_lossy(text).into_owned())
}

//! What a new qcow2 image is to be: the creation options, checked, and the list
//! of them in the order in which QEMU prints it.

use super::format::{autoclear, incompatible, limit};
use super::geometry::Geometry;
use super::width::Width;
use crate::error::{Failure, FailureKind};
use crate::options::{self, invalid};
use crate::proto::{Create, Preallocation};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

/// What the options of encryption begin with, which instar does not have.
const ENCRYPTION: &str = "encrypt.";

/// Checked creation options.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// 2 or 3.
    pub version: u32,
    /// Cluster size, L2 entries, refcount width.
    pub geometry: Geometry,
    /// Whether the compatible feature bit is set.
    pub lazy_refcounts: bool,
    /// Whether compressed clusters are zstd instead of deflate.
    pub zstd: bool,
    /// How much of the disk is allocated at once.
    pub preallocation: Preallocation,
    /// The file that holds the data, where that is a file of its own.
    pub data_file: Option<DataFile>,
}

/// A file of its own for the data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataFile {
    /// Its name, without a directory: it lies beside the image.
    pub name: String,
    /// Whether it can be read as a raw image: all of it is mapped.
    pub raw: bool,
}

impl Options {
    /// The incompatible feature bits of the new image.
    pub fn incompatible(&self) -> u64 {
        let mut bits = 0;
        if self.zstd {
            bits |= incompatible::COMPRESSION;
        }
        if self.geometry.extended_l2() {
            bits |= incompatible::EXTENDED_L2;
        }
        if self.data_file.is_some() {
            bits |= incompatible::DATA_FILE;
        }
        bits
    }

    /// The autoclear feature bits of the new image.
    pub fn autoclear(&self) -> u64 {
        match &self.data_file {
            Some(file) if file.raw => autoclear::RAW_DATA_FILE,
            _ => 0,
        }
    }
}

/// The options as they were given, each the last of its name.
#[derive(Default)]
struct Given {
    cluster_size: Option<u64>,
    extended_l2: Option<String>,
    preallocation: Option<String>,
    compression_type: Option<String>,
    compat: Option<String>,
    lazy_refcounts: Option<String>,
    refcount_bits: Option<u64>,
    encryption: Option<String>,
    data_file: Option<String>,
    data_file_raw: Option<String>,
    nocow: Option<String>,
    extent_size_hint: Option<u64>,
}

/// Checks the options of a creation. Also answers every option that has a
/// value, in QEMU's order.
pub fn parse(create: &Create) -> Result<(Options, Vec<(String, String)>), Failure> {
    let given = Given::read(&create.options)?;
    Ok((given.check(create)?, given.list(create)))
}

impl Given {
    fn read(options: &[(String, String)]) -> Result<Self, Failure> {
        let mut given = Self::default();
        for (key, value) in options {
            given.set(key, value)?;
        }
        Ok(given)
    }

    fn set(&mut self, key: &str, value: &str) -> Result<(), Failure> {
        match key {
            "cluster_size" => self.cluster_size = Some(options::size(key, value)?),
            "refcount_bits" => self.refcount_bits = Some(options::number(key, value)?),
            "extent_size_hint" => self.extent_size_hint = Some(options::size(key, value)?),
            "extended_l2" => self.extended_l2 = switch(key, value)?,
            "lazy_refcounts" => self.lazy_refcounts = switch(key, value)?,
            "data_file_raw" => self.data_file_raw = switch(key, value)?,
            "nocow" => self.nocow = switch(key, value)?,
            "encryption" => self.encryption = switch(key, value)?,
            "data_file" => self.data_file = Some(value.to_string()),
            "preallocation" => self.preallocation = Some(value.to_string()),
            "compression_type" => self.compression_type = Some(value.to_string()),
            "compat" => self.compat = Some(value.to_string()),
            _ if key.starts_with(ENCRYPTION) => return Err(encrypted(key)),
            _ => return Err(options::unknown(key)),
        }
        Ok(())
    }

    fn check(&self, create: &Create) -> Result<Options, Failure> {
        let version = self.version()?;
        if on(&self.encryption) {
            return Err(encrypted("encryption"));
        }
        let preallocation = self.preallocation()?;
        let zstd = self.zstd()?;
        let cluster_bits = self.cluster_bits()?;
        let extended_l2 = on(&self.extended_l2);
        let lazy_refcounts = on(&self.lazy_refcounts);
        let width = self.width()?;
        if version == 2 {
            let newer = [
                (
                    extended_l2,
                    "Extended L2 entries are only supported with compatibility level 1.1 and above",
                ),
                (
                    lazy_refcounts,
                    "Lazy refcounts only supported with compatibility level 1.1 and above",
                ),
                (
                    width != Width::DEFAULT,
                    "Different refcount widths than 16 bits require compatibility level 1.1 or above",
                ),
                (
                    self.data_file.is_some(),
                    "External data files are only supported with compatibility level 1.1 and above",
                ),
                (
                    zstd,
                    "Non-zlib compression type is only supported with compatibility level 1.1 and above",
                ),
            ];
            if let Some((_, message)) = newer.iter().find(|(asked, _)| *asked) {
                return Err(invalid(format!("{message} (use version=v3 or greater)")));
            }
        }
        if extended_l2 && cluster_bits < limit::MIN_EXTENDED_CLUSTER_BITS {
            return Err(invalid(
                "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes",
            ));
        }
        if preallocation != Preallocation::Off && create.backing.is_some() && !extended_l2 {
            return Err(invalid(
                "Backing file and preallocation can only be used at the same time if extended_l2 \
                 is on",
            ));
        }
        let data_file = self.data_file(create.backing.is_some())?;
        let raw = data_file.as_ref().is_some_and(|file| file.raw);
        Ok(Options {
            version,
            geometry: Geometry::new(cluster_bits, extended_l2, width.order()),
            lazy_refcounts,
            zstd,
            preallocation: match preallocation {
                Preallocation::Off if raw => Preallocation::Metadata,
                mode => mode,
            },
            data_file,
        })
    }

    fn version(&self) -> Result<u32, Failure> {
        match self.compat.as_deref() {
            None | Some("1.1" | "v3") => Ok(3),
            Some("0.10" | "v2") => Ok(2),
            Some(other) => Err(invalid(format!(
                "Parameter 'version' does not accept value '{other}'"
            ))),
        }
    }

    fn preallocation(&self) -> Result<Preallocation, Failure> {
        let Some(value) = self.preallocation.as_deref() else {
            return Ok(Preallocation::Off);
        };
        options::preallocation(value).ok_or_else(|| {
            invalid(format!(
                "Parameter 'preallocation' does not accept value '{value}'"
            ))
        })
    }

    fn data_file(&self, has_backing: bool) -> Result<Option<DataFile>, Failure> {
        let raw = on(&self.data_file_raw);
        let Some(name) = &self.data_file else {
            return match raw {
                true => Err(invalid("data-file-raw requires data-file")),
                false => Ok(None),
            };
        };
        if raw && has_backing {
            return Err(invalid(
                "Backing file and data-file-raw cannot be used at the same time",
            ));
        }
        if name.is_empty() || name.len() > MAX_NAME || name.contains(['/', ':', '\0']) {
            return Err(invalid(format!(
                "Could not create '{name}': the data file needs a name of 1 to {MAX_NAME} bytes \
                 without '/' and ':', and lies beside the image"
            )));
        }
        let name = name.clone();
        Ok(Some(DataFile { name, raw }))
    }

    fn zstd(&self) -> Result<bool, Failure> {
        match self.compression_type.as_deref() {
            None | Some("zlib") => Ok(false),
            Some("zstd") => Ok(true),
            Some(other) => Err(invalid(format!(
                "Parameter 'compression-type' does not accept value '{other}'"
            ))),
        }
    }

    fn cluster_bits(&self) -> Result<u32, Failure> {
        let size = self.cluster_size();
        let bits = size.trailing_zeros();
        if size.is_power_of_two()
            && (limit::MIN_CLUSTER_BITS..=limit::MAX_CLUSTER_BITS).contains(&bits)
        {
            return Ok(bits);
        }
        Err(invalid(
            "Cluster size must be a power of two between 512 and 2048k",
        ))
    }

    fn width(&self) -> Result<Width, Failure> {
        Width::from_bits(self.refcount_bits()).ok_or_else(|| {
            invalid("Refcount width must be a power of two and may not exceed 64 bits")
        })
    }

    fn cluster_size(&self) -> u64 {
        self.cluster_size.unwrap_or(65536)
    }

    fn refcount_bits(&self) -> u64 {
        self.refcount_bits.unwrap_or(Width::DEFAULT.bits())
    }

    /// Every option with a value, as typed or its default, in QEMU's order.
    fn list(&self, create: &Create) -> Vec<(String, String)> {
        let or = |value: &Option<String>, default: &str| {
            Some(value.clone().unwrap_or_else(|| default.to_string()))
        };
        let backing = create.backing.as_ref();
        let number = |value: Option<u64>| value.map(|value| value.to_string());
        [
            ("encryption", self.encryption.clone()),
            ("cluster_size", Some(self.cluster_size().to_string())),
            ("extended_l2", or(&self.extended_l2, "off")),
            ("preallocation", self.preallocation.clone()),
            ("compression_type", or(&self.compression_type, "zlib")),
            ("size", Some(create.size.to_string())),
            ("compat", self.compat.clone()),
            ("backing_file", backing.map(|file| file.name.clone())),
            ("backing_fmt", backing.and_then(|file| file.format.clone())),
            ("data_file", self.data_file.clone()),
            ("data_file_raw", self.data_file_raw.clone()),
            ("lazy_refcounts", or(&self.lazy_refcounts, "off")),
            ("refcount_bits", Some(self.refcount_bits().to_string())),
            ("nocow", self.nocow.clone()),
            ("extent_size_hint", number(self.extent_size_hint)),
        ]
        .into_iter()
        .filter_map(|(key, value)| Some((key.to_string(), value?)))
        .collect()
    }
}

/// The longest name that a file can have, in bytes.
const MAX_NAME: usize = 255;

/// A switch as it was typed, checked.
fn switch(key: &str, value: &str) -> Result<Option<String>, Failure> {
    options::switch(key, value)?;
    Ok(Some(value.to_string()))
}

fn encrypted(key: &str) -> Failure {
    Failure::new(
        FailureKind::Unsupported,
        format!("Option '{key}' is not supported; create the image with `qemu-img create`"),
    )
}

/// Whether a switch that was checked when it was read is on.
fn on(value: &Option<String>) -> bool {
    value
        .as_deref()
        .is_some_and(|value| options::switch("", value) == Ok(true))
}

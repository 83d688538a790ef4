//! The 41 resizes that are recorded and repeated: one table for every test.

/// What is resized: the folders of the recordings.
pub const TARGETS: &[&str] = &["qcow2", "raw", "vmdk", "vhd", "vhdx"];

/// `create` and then `resize` of an image called `disk`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Case {
    /// One of [`TARGETS`].
    pub target: &'static str,
    pub name: &'static str,
    /// The size to begin with, as `create` takes it.
    pub start: &'static str,
    /// The new size, as `resize` takes it.
    pub end: &'static str,
    /// What `create` gets as `-o`.
    pub options: Option<&'static str>,
    pub preallocation: Option<&'static str>,
    /// Whether `resize` gets `--shrink`.
    pub shrink: bool,
}

const fn case(
    target: &'static str,
    name: &'static str,
    start: &'static str,
    end: &'static str,
) -> Case {
    Case {
        target,
        name,
        start,
        end,
        options: None,
        preallocation: None,
        shrink: false,
    }
}

impl Case {
    const fn with(self, options: &'static str) -> Self {
        Self {
            options: Some(options),
            ..self
        }
    }

    const fn preallocated(self, mode: &'static str) -> Self {
        Self {
            preallocation: Some(mode),
            ..self
        }
    }

    const fn shrinking(self) -> Self {
        Self {
            shrink: true,
            ..self
        }
    }

    /// The format's name on the command line.
    pub fn format(&self) -> &'static str {
        match self.target {
            "vhd" => "vpc",
            target => target,
        }
    }

    /// Whether qemu-img resizes the format.
    pub fn qemu_resizes(&self) -> bool {
        matches!(self.target, "qcow2" | "raw")
    }

    /// The command line of `create`, without the program.
    pub fn create(&self) -> String {
        let options = self.options.map(|options| format!("-o {options}"));
        line(
            &["create -f", self.format()],
            &[options],
            "disk",
            self.start,
        )
    }

    /// The command line of `resize`, without the program.
    pub fn resize(&self) -> String {
        let shrink = self.shrink.then(|| "--shrink".to_owned());
        let mode = self
            .preallocation
            .map(|mode| format!("--preallocation={mode}"));
        let begin = ["resize -f", self.format()];
        line(&begin, &[shrink, mode], "disk", self.end)
    }

    /// The size in bytes of a disk that had `start` bytes; `None` if the table
    /// is wrong.
    pub fn size_from(&self, start: u64) -> Option<u64> {
        match self.end.split_at_checked(1)? {
            ("+", more) => start.checked_add(bytes(more)?),
            ("-", less) => start.checked_sub(bytes(less)?),
            _ => bytes(self.end),
        }
    }

    /// The size in bytes if the disk has exactly the size that it begins with.
    pub fn size(&self) -> Option<u64> {
        self.size_from(bytes(self.start)?)
    }
}

fn line(begin: &[&str], options: &[Option<String>], file: &str, size: &str) -> String {
    let options = options.iter().flatten().map(String::as_str);
    let all: Vec<&str> = begin
        .iter()
        .copied()
        .chain(options)
        .chain([file, size])
        .collect();
    all.join(" ")
}

/// Reads `64M`.
fn bytes(text: &str) -> Option<u64> {
    let number: u64 = text.strip_suffix('M')?.parse().ok()?;
    number.checked_mul(1 << 20)
}

#[rustfmt::skip] // A table.
pub const CASES: &[Case] = &[
    case("qcow2", "1M-to-64M-default", "1M", "64M"),
    case("qcow2", "1M-to-4M-default", "1M", "4M"),
    case("qcow2", "1M-plus-63M-default", "1M", "+63M"),
    case("qcow2", "64M-to-256M-default", "64M", "256M"),
    case("qcow2", "64M-to-64M-noop", "64M", "64M"),
    case("qcow2", "64M-to-1M-no-shrink", "64M", "1M"),
    case("qcow2", "64M-minus-32M-shrink", "64M", "-32M").shrinking(),
    case("qcow2", "1M-to-4M-prealloc-off", "1M", "4M").preallocated("off"),
    case("qcow2", "1M-to-4M-prealloc-metadata", "1M", "4M").preallocated("metadata"),
    case("qcow2", "1M-to-4M-prealloc-falloc", "1M", "4M").preallocated("falloc"),
    case("qcow2", "1M-to-4M-prealloc-full", "1M", "4M").preallocated("full"),
    case("qcow2", "1M-to-64M-compat-v2", "1M", "64M").with("compat=0.10"),
    case("qcow2", "1M-to-64M-cs-512", "1M", "64M").with("cluster_size=512"),
    case("qcow2", "1M-to-64M-cs-4k", "1M", "64M").with("cluster_size=4k"),
    case("qcow2", "1M-to-64M-cs-1M", "1M", "64M").with("cluster_size=1M"),
    case("qcow2", "1M-to-64M-extended-l2", "1M", "64M").with("extended_l2=on,cluster_size=64k"),
    case("qcow2", "1M-to-64M-lazy-refcounts", "1M", "64M").with("lazy_refcounts=on"),
    case("qcow2", "1M-to-64M-rb-1", "1M", "64M").with("refcount_bits=1"),
    case("qcow2", "1M-to-64M-rb-64", "1M", "64M").with("refcount_bits=64"),
    case("raw", "1M-to-64M-default", "1M", "64M"),
    case("raw", "1M-plus-63M-default", "1M", "+63M"),
    case("raw", "64M-to-256M-default", "64M", "256M"),
    case("raw", "64M-to-1M-no-shrink", "64M", "1M"),
    case("raw", "64M-to-1M-shrink", "64M", "1M").shrinking(),
    case("raw", "1M-to-4M-prealloc-off", "1M", "4M").preallocated("off"),
    case("raw", "1M-to-4M-prealloc-falloc", "1M", "4M").preallocated("falloc"),
    case("raw", "1M-to-4M-prealloc-full", "1M", "4M").preallocated("full"),
    case("vmdk", "1M-to-64M-default", "1M", "64M"),
    case("vmdk", "1M-plus-63M-default", "1M", "+63M"),
    case("vmdk", "64M-to-256M-default", "64M", "256M"),
    case("vhd", "1M-to-64M-default", "1M", "64M"),
    case("vhd", "1M-plus-63M-default", "1M", "+63M"),
    case("vhd", "64M-to-256M-default", "64M", "256M"),
    case("vhd", "1M-to-4M-fixed", "1M", "4M").with("subformat=fixed"),
    case("vhd", "1M-to-4M-prealloc-off", "1M", "4M").preallocated("off"),
    case("vhd", "1M-to-4M-prealloc-full", "1M", "4M").preallocated("full"),
    case("vhdx", "1M-to-64M-default", "1M", "64M"),
    case("vhdx", "1M-plus-63M-default", "1M", "+63M"),
    case("vhdx", "64M-to-256M-default", "64M", "256M"),
    case("vhdx", "1M-to-64M-block-16M", "1M", "64M").with("block_size=16M"),
    case("vhdx", "1M-to-4M-prealloc-off", "1M", "4M").preallocated("off"),
];

const _: () = assert!(CASES.len() == 41);

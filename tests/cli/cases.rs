//! Commands whose output has to be qemu-img's, over the images of
//! `tests/data/images`.

/// Commands in one folder.
pub struct Case {
    pub name: &'static str,
    /// Images that are copied into the folder.
    pub files: &'static [&'static str],
    /// Command lines without the program; see `transcript::words`.
    pub commands: &'static [&'static str],
}

const fn case(
    name: &'static str,
    files: &'static [&'static str],
    commands: &'static [&'static str],
) -> Case {
    Case {
        name,
        files,
        commands,
    }
}

pub const CASES: &[Case] = &[
    case("info-plain", &["base.qcow2"], INFO_BASE),
    case(
        "info-snapshots",
        &["snapshots.qcow2"],
        &["info snapshots.qcow2", "info --output=json snapshots.qcow2"],
    ),
    case(
        "info-bitmaps",
        &["bitmaps.qcow2"],
        &["info bitmaps.qcow2", "info --output json bitmaps.qcow2"],
    ),
    case(
        "info-extended-l2-zstd",
        &["extended.qcow2"],
        &["info extended.qcow2", "info --output json extended.qcow2"],
    ),
    case(
        "info-dirty-lazy-refcounts",
        &["dirty.qcow2"],
        &["info dirty.qcow2", "info --output json dirty.qcow2"],
    ),
    case(
        "info-corrupt",
        &["corrupt.qcow2"],
        &["info corrupt.qcow2", "info --output json corrupt.qcow2"],
    ),
    case(
        "info-encrypted",
        &["aes.qcow2"],
        &["info aes.qcow2", "info --output json aes.qcow2"],
    ),
    case(
        "info-data-file",
        &["datafile.qcow2", "data.raw"],
        &["info datafile.qcow2", "info --output json datafile.qcow2"],
    ),
    case(
        "info-without-data-file",
        &["datafile.qcow2"],
        &["info datafile.qcow2"],
    ),
    case(
        "info-version-2",
        &["v2snap.qcow2"],
        &["info --output json v2snap.qcow2"],
    ),
    case(
        "info-raw",
        &["tail.raw"],
        &["info tail.raw", "info -f raw --output=json tail.raw"],
    ),
    case(
        "info-qcow2-as-raw",
        &["base.qcow2"],
        &["info -f raw base.qcow2"],
    ),
    case("info-chain", &["overlay.qcow2", "base.qcow2"], INFO_CHAIN),
    case(
        "info-chain-raw",
        &["on-raw.qcow2", "tail.raw"],
        &[
            "info --backing-chain on-raw.qcow2",
            "info --backing-chain --output json on-raw.qcow2",
        ],
    ),
    case(
        "info-chain-of-one",
        &["tail.raw"],
        &["info --backing-chain --output=json tail.raw"],
    ),
    case(
        "info-missing-backing-file",
        &["orphan.qcow2"],
        &["info orphan.qcow2", "info --output json orphan.qcow2"],
    ),
    case("info-refused", &["future.qcow2"], INFO_REFUSED),
    case("info-usage", &["base.qcow2"], INFO_USAGE),
    case("map-plain", &["base.qcow2"], MAP_BASE),
    case(
        "map-compressed",
        &["compressed.qcow2"],
        &["map compressed.qcow2", "map --output=json compressed.qcow2"],
    ),
    case("map-chain", &["overlay.qcow2", "base.qcow2"], MAP_CHAIN),
    case(
        "map-chain-raw",
        &["on-raw.qcow2", "tail.raw"],
        &["map on-raw.qcow2", "map --output=json on-raw.qcow2"],
    ),
    case(
        "map-extended-l2",
        &["extended.qcow2"],
        &["map extended.qcow2"],
    ),
    case(
        "map-data-file",
        &["datafile.qcow2", "data.raw"],
        &["map datafile.qcow2", "map --output=json datafile.qcow2"],
    ),
    case(
        "map-raw",
        &["tail.raw"],
        &["map tail.raw", "map --output=json tail.raw"],
    ),
    case(
        "map-refused",
        &["orphan.qcow2", "aes.qcow2"],
        &["map orphan.qcow2", "map nowhere.qcow2"],
    ),
    case("map-usage", &["base.qcow2"], MAP_USAGE),
    case("create-qcow2", &[], CREATE_QCOW2),
    case("create-qcow2-options", &[], CREATE_OPTIONS),
    case("create-qcow2-refused", &[], CREATE_REFUSED),
    case("create-raw", &[], CREATE_RAW),
    case(
        "create-overlay",
        &["base.qcow2", "tail.raw"],
        CREATE_OVERLAY,
    ),
    case("create-usage", &["base.qcow2"], CREATE_USAGE),
    case("create-vmdk", &[], CREATE_VMDK),
    case("create-vmdk-refused", &[], CREATE_VMDK_REFUSED),
    case("create-vmdk-overlay", &["base.qcow2"], CREATE_VMDK_OVERLAY),
    case("create-vpc", &[], CREATE_VPC),
    case("create-vhdx", &[], CREATE_VHDX),
    case("create-data-file", &[], CREATE_DATA_FILE),
    case("create-preallocated", &[], CREATE_PREALLOCATED),
    case(
        "check-refused",
        &["tail.raw", "future.qcow2"],
        CHECK_REFUSED,
    ),
    case("check-usage", &["base.qcow2"], CHECK_USAGE),
    case("resize-sizes", &[], RESIZE_SIZES),
    case("resize-usage", &["base.qcow2"], RESIZE_USAGE),
    case("no-command", &[], &["bogus", "", "-q", "--bogus", "-z"]),
];

const INFO_BASE: &[&str] = &[
    "info base.qcow2",
    "info --output=json base.qcow2",
    "info -U -f qcow2 --output human base.qcow2",
    "info --out json -f qcow2 -f qcow2 base.qcow2",
];

const INFO_CHAIN: &[&str] = &[
    "info overlay.qcow2",
    "info --output=json overlay.qcow2",
    "info --backing-chain overlay.qcow2",
    "info --backing-chain --output=json overlay.qcow2",
];

const INFO_REFUSED: &[&str] = &[
    "info future.qcow2",
    "info nowhere.qcow2",
    "info nowhere/nowhere.qcow2",
];

const INFO_USAGE: &[&str] = &[
    "info",
    "info base.qcow2 base.qcow2",
    "info -f bogus base.qcow2",
    "info --output=xml base.qcow2",
    "info --bogus base.qcow2",
    "info -Z base.qcow2",
    "info --output",
    "info ''",
    "info .",
    "info --output= base.qcow2",
    "info --bogus=1 base.qcow2",
    "info --version",
    "info -V",
    "info -xU base.qcow2",
    "info -- base.qcow2",
    "info -fqcow2 base.qcow2",
    "info -f raw -f qcow2 base.qcow2",
];

const MAP_BASE: &[&str] = &[
    "map base.qcow2",
    "map --output=json base.qcow2",
    "map -f qcow2 -s 5k -l 6k base.qcow2",
    "map --output=json --start-offset=5k --max-length=6k base.qcow2",
    "map --output=json -s 40k base.qcow2",
    "map --output=json -l 0 base.qcow2",
    "map --output=json -s 1M base.qcow2",
    "map --output=json -s 2M base.qcow2",
    "map -s 2M base.qcow2",
];

const MAP_CHAIN: &[&str] = &[
    "map overlay.qcow2",
    "map --output=json overlay.qcow2",
    "map --output=json -s 6k -l 3k overlay.qcow2",
];

const MAP_USAGE: &[&str] = &[
    "map",
    "map -s 1e3 base.qcow2",
    "map -s 16E base.qcow2",
    "map -s -1 base.qcow2",
    "map -l x base.qcow2",
    "map base.qcow2 base.qcow2",
    "map --output=xml base.qcow2",
    "map ''",
    "map --for base.qcow2",
    "map --output= base.qcow2",
    "map -l 16E base.qcow2",
    "map -U -fqcow2 base.qcow2",
];

const CREATE_QCOW2: &[&str] = &[
    "create -f qcow2 disk 64M",
    "info --output=json disk",
    "create -f qcow2 disk 1000",
    "info --output=json disk",
    "create -f qcow2 disk 0",
    "info disk",
    "create -q -f qcow2 disk 1P",
    "info disk",
    "create -f qcow2 -o size=1M disk",
    "create -f qcow2 with~blank,comma 1M",
];

const CREATE_OPTIONS: &[&str] = &[
    "create -f qcow2 -o cluster_size=4k,lazy_refcounts=on disk 1M",
    "info --output=json disk",
    "create -f qcow2 -o cluster_size=2M -o refcount_bits=1 disk 1M",
    "info --output=json disk",
    "create -f qcow2 -o compat=0.10 disk 1M",
    "info --output=json disk",
    "create -f qcow2 -o compat=v3 disk 1M",
    "create -f qcow2 -o extended_l2=on disk 1M",
    "info --output=json disk",
    "create -f qcow2 -o compression_type=zstd disk 1M",
    "info --output=json disk",
    "create -f qcow2 -o lazy_refcounts disk 1M",
    "create -f qcow2 -o lazy_refcounts=yes disk 1M",
    "create -f qcow2 -o preallocation=off disk 1M",
    "create -f qcow2 -o nolazy_refcounts disk 1M",
    "create -f qcow2 -o nocow=on,extent_size_hint=1M disk 1M",
    "create -f qcow2 -o size=1M,size=2M disk",
    "create -f qcow2 -o lazy_refcounts=on -o lazy_refcounts=off disk 1M",
    "create -qf qcow2 disk 1M",
    "create -f qcow2 -- disk 1M",
];

const CREATE_REFUSED: &[&str] = &[
    "create -f qcow2 -o bogus=1 disk 1M",
    "create -f qcow2 -o cluster_size=3k disk 1M",
    "create -f qcow2 -o cluster_size=4M disk 1M",
    "create -f qcow2 -o cluster_size=1x disk 1M",
    "create -f qcow2 -o compat=2 disk 1M",
    "create -f qcow2 -o refcount_bits=3 disk 1M",
    "create -f qcow2 -o refcount_bits=xx disk 1M",
    "create -f qcow2 -o preallocation=bogus disk 1M",
    "create -f qcow2 -o cluster_size=512 disk 200G",
    "create -f qcow2 disk 7E",
    "create -f qcow2 disk 8E",
    "create -f qcow2 nowhere/disk 1M",
    "create -f qcow2 . 1M",
    "create -f qcow2 -o cluster_size=16E disk 1M",
    "create -f qcow2 -o cluster_size=-1 disk 1M",
    "create -f qcow2 -o , disk 1M",
    "create -f qcow2 -o cluster_size=4k, disk 1M",
    "create -f qcow2 -o ,cluster_size=4k disk 1M",
    "create -f qcow2 -o ,,size=1M disk",
    "create -f qcow2 -o cluster_size=4k,,x disk 1M",
    "create -f qcow2 -o size=-1 disk",
    "create -f qcow2 -o nosize disk",
    "create -f qcow2 -o help=on",
    "create -f qcow2 '' 1M",
];

const CREATE_RAW: &[&str] = &[
    "create -f raw disk 1M",
    "info -f raw --output=json disk",
    "create disk 1001",
    "info -f raw disk",
    "create -f raw -o preallocation=falloc disk 1M",
    "info -f raw disk",
    "create -f raw -o preallocation=metadata disk 1M",
    "create -f raw -o cluster_size=4k disk 1M",
    "create -f raw -b base.qcow2 -F qcow2 disk",
    "create -f raw -o nocow=on,preallocation=off disk 1M",
    "create -f raw -o extent_size_hint=1M,nonocow disk 1M",
    "create -f raw -o nocow=maybe disk 1M",
    "create -f raw -F qcow2 disk 1M",
    "create -f raw disk 7E",
];

const CREATE_OVERLAY: &[&str] = &[
    "create -f qcow2 -b base.qcow2 -F qcow2 top",
    "info --output=json top",
    "create -f qcow2 -b base.qcow2 -F qcow2 top 512k",
    "create -f qcow2 -o backing_file=base.qcow2,backing_fmt=qcow2 top",
    "create -f qcow2 -b tail.raw -F raw -o compat=0.10 top",
    "info --output=json top",
    "create -f qcow2 -b base.qcow2 top",
    "create -f qcow2 -b base.qcow2 top 1M",
    "create -f qcow2 -b nowhere -F qcow2 top",
    "create -f qcow2 -u -b nowhere -F qcow2 top",
    "create -f qcow2 -u -b nowhere -F qcow2 top 1M",
    "create -f qcow2 -u -b nowhere top 1M",
    "create -f qcow2 -b top -F qcow2 top",
    "create -f qcow2 -b '' -F qcow2 top",
    "create -f qcow2 -b nowhere -F qcow2 top 1M",
    "create -f qcow2 -b tail.raw -F qcow2 top",
    "create -f qcow2 -b base.qcow2 -F bogus top",
    "create -f qcow2 -b . -F raw top",
    "create -f qcow2 -F qcow2 top 1M",
];

const CREATE_USAGE: &[&str] = &[
    "create",
    "create -f qcow2",
    "create -f qcow2 new",
    "create -f qcow2 new 1M 2M",
    "create -f qcow2 new 1e3",
    "create -f qcow2 new ''",
    "create -f qcow2 new -- -1",
    "create -f qcow2 new -- -1M",
    "create -f bogus new 1M",
    "create -f qcow2 -o size=1M new 2M",
    "create -f",
];

const CREATE_VMDK: &[&str] = &[
    "create -f vmdk disk 64M",
    "info --output=json disk",
    "create -f vmdk disk 1000",
    "info disk",
    "create -q -f vmdk disk 1T",
    "info disk",
    "create -f vmdk -o adapter_type=lsilogic,hwversion=7,zeroed_grain=on disk 1G",
    "info --output=json disk",
    "create -f vmdk -o compat6 disk 1M",
    "create -f vmdk -o toolsversion=9 disk 1M",
    "create -f vmdk -o subformat=monolithicSparse disk 1M",
    "create -f vmdk -o subformat=monolithicFlat flat.vmdk 3M",
    "info --output=json flat.vmdk",
    "create -f vmdk -o subformat=twoGbMaxExtentSparse split.vmdk 5G",
    "info --output=json split.vmdk",
    "map --output=json split.vmdk",
    "create -f vmdk -o subformat=twoGbMaxExtentFlat both.vmdk 5G",
    "info --output=json both.vmdk",
];

const CREATE_VMDK_REFUSED: &[&str] = &[
    "create -f vmdk -o bogus=1 disk 1M",
    "create -f vmdk -o subformat=bogus disk 1M",
    "create -f vmdk -o adapter_type=bogus disk 1M",
    "create -f vmdk -o compat6=on,hwversion=4 disk 1M",
    "create -f vmdk -o zeroed_grain=on,subformat=monolithicFlat disk 1M",
    "create -f vmdk -o zeroed_grain=2 disk 1M",
    "create -f vmdk nowhere/disk 1M",
];

const CREATE_VMDK_OVERLAY: &[&str] = &[
    "create -q -f vmdk below 1M",
    "create -f vmdk -b below -F vmdk top",
    "create -f vmdk -b below top",
    "create -f vmdk -b base.qcow2 -F qcow2 top",
    "create -f vmdk -o subformat=monolithicFlat -b below -F vmdk flat",
    "create -f vmdk -F raw top 1M",
];

const CREATE_VPC: &[&str] = &[
    "create -f vpc disk 64M",
    "info --output=json disk",
    "create -f vpc disk 1M",
    "info disk",
    "create -f vpc disk 127G",
    "info disk",
    "create -f vpc disk 1000",
    "info disk",
    "create -f vpc -o force_size disk 64M",
    "info disk",
    "create -f vpc -o subformat=fixed disk 1M",
    "info -f vpc --output=json disk",
    "create -f vpc -o subformat=fixed,force_size=on disk 1M",
    "info -f vpc disk",
    "create -f vpc disk 2040G",
    "info disk",
    "create -f vpc disk 2041G",
    "create -f vpc -o subformat=bogus disk 1M",
    "create -f vpc -o bogus=1 disk 1M",
    "create -f vpc -b disk -F vpc top",
    "create -f vpc -F raw top 1M",
];

const CREATE_VHDX: &[&str] = &[
    "create -f vhdx disk 64M",
    "info --output=json disk",
    "create -f vhdx disk 1000",
    "info disk",
    "create -f vhdx disk 10G",
    "info disk",
    "create -f vhdx disk 1T",
    "info disk",
    "create -f vhdx -o block_size=1M,log_size=2M,block_state_zero=off disk 64M",
    "info disk",
    "check disk",
    "create -f vhdx -o subformat=fixed disk 8M",
    "info disk",
    "create -f vhdx disk 65T",
    "create -f vhdx -o block_size=3M disk 8M",
    "create -f vhdx -o log_size=4G disk 8M",
    "create -f vhdx -o subformat=bogus disk 8M",
    "create -f vhdx -o bogus=1 disk 8M",
    "create -f vhdx -b disk -F vhdx top",
    "create -f vhdx empty 0",
];

const CREATE_DATA_FILE: &[&str] = &[
    "create -f qcow2 -o data_file=data.raw disk 1M",
    "info --output=json disk",
    "map --output=json disk",
    "create -f qcow2 -o data_file=other.raw,data_file_raw=on disk 1M",
    "info --output=json disk",
    "create -f qcow2 -o data_file_raw=on disk 1M",
    "create -f qcow2 -o data_file=data.raw,compat=0.10 disk 1M",
];

const CREATE_PREALLOCATED: &[&str] = &[
    "create -f qcow2 -o preallocation=metadata disk 1M",
    "info disk",
    "create -f qcow2 -o preallocation=full disk 1M",
    "info disk",
    "check disk",
    "create -f raw -o preallocation=full disk 1M",
    "info -f raw disk",
];

const CHECK_REFUSED: &[&str] = &[
    "check tail.raw",
    "check -f raw --output=json tail.raw",
    "check -q -f raw tail.raw",
    "check nowhere.qcow2",
    "check future.qcow2",
];

const CHECK_USAGE: &[&str] = &[
    "check",
    "check base.qcow2 base.qcow2",
    "check -f bogus base.qcow2",
    "check -r bogus base.qcow2",
    "check -r",
    "check --output=xml base.qcow2",
    "check -U -r all base.qcow2",
    "check -p base.qcow2",
    "check --bogus base.qcow2",
    "check -T none base.qcow2",
    "check --cache=bogus base.qcow2",
    "check -q base.qcow2 --",
];

const RESIZE_SIZES: &[&str] = &[
    "create -q -f raw disk 1M",
    "resize -f raw disk 1.5M",
    "resize -f raw disk 0x200000",
    "resize -f raw disk +1b",
    "resize -f raw disk 2098000",
    "resize -f raw disk +1k",
    "resize -f raw disk ~3m",
    "resize -f raw -q disk +1M",
    "resize -f raw disk +0",
    "resize -f raw disk -0",
    "info -f raw --output=json disk",
    "resize -f raw disk -1M",
    "resize -f raw disk -- -1M",
    "resize -f raw --shrink disk -8M",
    "resize -f raw disk 0",
    "resize -f raw disk 8E",
    "resize -f raw disk +9E",
    "resize -f raw disk 16E",
    "resize -f raw disk 1e3",
    "resize -f raw disk 1kb",
    "resize -f raw disk ''",
    "resize -f raw disk +-1M",
    "resize -f raw disk +-1",
    "resize -f raw --preallocation=metadata disk 8M",
    "resize -f raw --preallocation=falloc disk +0",
    "resize -f raw --preallocation=falloc --shrink disk 1M",
    "resize disk +1M",
    "info -f raw --output=json disk",
    "resize -f raw disk 9223372036854775807",
    "resize -f raw disk 7E",
];

const RESIZE_USAGE: &[&str] = &[
    "resize",
    "resize base.qcow2",
    "resize base.qcow2 1M 2M",
    "resize --preallocation=bogus base.qcow2 2M",
    "resize --preallocation",
    "resize --bogus base.qcow2 2M",
    "resize base.qcow2 --bogus",
    "resize -f bogus base.qcow2 2M",
    "resize nowhere.qcow2 2M",
    "resize '' 1M",
    "resize --preallocation= base.qcow2 2M",
    "resize --bogus=1 base.qcow2 2M",
    "resize . 2M",
];

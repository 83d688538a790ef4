//! Builds the guest program and hands its path, with the id of the build, to
//! the library, which embeds it.

use std::collections::hash_map::DefaultHasher;
use std::env;
use std::fs;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::exit;

#[path = "guest/build_program.rs"]
mod build_program;

/// What the guest program is made of, relative to the root package.
const SOURCES: [&str; 6] = [
    "guest/src",
    "guest/Cargo.toml",
    "guest/guest.ld",
    "guest/build_program.rs",
    "Cargo.toml",
    "Cargo.lock",
];

fn main() {
    let root = PathBuf::from(variable("CARGO_MANIFEST_DIR"));
    let target_dir = Path::new(&variable("OUT_DIR")).join("guest");
    let build_id = build_id(&root);
    let recipe = build_program::Recipe {
        cargo: variable("CARGO"),
        root: &root,
        target_dir: &target_dir,
        package: "instar-guest",
        build_id: &build_id,
    };
    match recipe.build() {
        Ok(elf) => println!("cargo::rustc-env=INSTAR_GUEST_ELF={}", elf.display()),
        Err(error) => {
            println!("cargo::error={error}");
            exit(1);
        }
    }
    println!("cargo::rustc-env=INSTAR_BUILD_ID={build_id}");
    println!("cargo::rerun-if-changed=build.rs");
    for source in SOURCES {
        println!("cargo::rerun-if-changed={source}");
    }
}

fn variable(name: &str) -> std::ffi::OsString {
    env::var_os(name).unwrap_or_else(|| panic!("cargo sets {name}"))
}

/// A number that two builds share only if the guest is the same.
fn build_id(root: &Path) -> String {
    let mut hasher = DefaultHasher::new();
    for source in SOURCES {
        hash_tree(&root.join(source), &mut hasher);
    }
    format!("{:016x}", hasher.finish())
}

fn hash_tree(path: &Path, hasher: &mut DefaultHasher) {
    if let Ok(entries) = fs::read_dir(path) {
        let mut children: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
        children.sort();
        children.iter().for_each(|child| hash_tree(child, hasher));
    } else if let Ok(bytes) = fs::read(path) {
        path.file_name().hash(hasher);
        bytes.hash(hasher);
    }
}

//! Guest programs that do what a test says: the scripted guest, built once per
//! test binary and patched for each script.

#[path = "../../guest/build_program.rs"]
mod build_program;

use instar::sandbox::{BUILD_ID, GuestProgram};
use instar_test_guest::{SECTION, SECTION_SIZE, Script};
use object::{Object, ObjectSection};
use std::path::Path;
use std::sync::OnceLock;

/// The test guest with this script in it.
pub fn program(script: &Script) -> GuestProgram {
    GuestProgram::from_elf(&patched(script)).expect("the test guest is a valid program")
}

/// The ELF file of the test guest with this script in it.
pub fn patched(script: &Script) -> Vec<u8> {
    let encoded = postcard::to_allocvec(script).expect("a script can be encoded");
    assert!(
        encoded.len() <= SECTION_SIZE - 4,
        "the script fits its section"
    );
    let mut elf = unscripted().to_vec();
    let section = script_section(&elf);
    let len = u32::try_from(encoded.len()).expect("the section is small");
    elf[section..section + 4].copy_from_slice(&len.to_le_bytes());
    elf[section + 4..section + 4 + encoded.len()].copy_from_slice(&encoded);
    elf
}

fn unscripted() -> &'static [u8] {
    static ELF: OnceLock<Result<Vec<u8>, String>> = OnceLock::new();
    let built = ELF.get_or_init(|| {
        let recipe = build_program::Recipe {
            cargo: env!("CARGO").into(),
            root: Path::new(env!("CARGO_MANIFEST_DIR")),
            target_dir: &Path::new(env!("CARGO_TARGET_TMPDIR")).join("guests"),
            package: "instar-test-guest",
            build_id: BUILD_ID,
        };
        std::fs::read(recipe.build()?).map_err(|error| error.to_string())
    });
    match built {
        Ok(elf) => elf,
        Err(error) => panic!("{error}"),
    }
}

/// Offset of the script's section in the file.
fn script_section(elf: &[u8]) -> usize {
    let file = object::File::parse(elf).expect("the test guest is an ELF file");
    let section = file.section_by_name(SECTION).expect("it has a script");
    let (offset, len) = section.file_range().expect("the script is in the file");
    assert_eq!(len, SECTION_SIZE as u64);
    usize::try_from(offset).expect("the file is in memory")
}

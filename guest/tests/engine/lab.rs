//! A directory to make images in, and the programs that make and judge them.

use instar_guest::plan::{Plan, Purpose};
use instar_guest::{FileNo, Step};
use nix::fcntl::{FallocateFlags, fallocate};
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::process::{Command, Output};
use tempfile::TempDir;

/// The tool that these tests cannot do without and that is not installed.
pub fn missing_tool() -> Option<&'static str> {
    ["qemu-img", "qemu-io", "bzip2"]
        .into_iter()
        .find(|tool| Command::new(tool).arg("--version").output().is_err())
}

/// Zeroes of this many bytes become a hole.
const BLOCK: usize = 64 << 10;
static ZEROES: [u8; BLOCK] = [0; BLOCK];

/// A check that a trial runs.
pub type Check = Box<dyn FnOnce() + Send>;

/// A temporary directory.
pub struct Lab {
    dir: TempDir,
}

impl Lab {
    /// An empty directory.
    pub fn new() -> Self {
        Self {
            dir: tempfile::tempdir().expect("a temporary directory"),
        }
    }

    /// The path of a file in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The bytes of a file in it.
    pub fn bytes(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).expect("a file of the lab")
    }

    /// Writes a file in it, with holes for long zeroes.
    pub fn write(&self, name: &str, bytes: &[u8]) {
        let file = File::create(self.path(name)).expect("room in the lab");
        file.set_len(bytes.len() as u64).expect("room in the lab");
        let blocks = (0u64..).step_by(BLOCK).zip(bytes.chunks(BLOCK));
        for (offset, block) in blocks.filter(|(_, block)| **block != ZEROES[..block.len()]) {
            file.write_all_at(block, offset).expect("room in the lab");
        }
    }

    /// Runs a tool with the words of a line; it has to fail. What it says.
    pub fn failing(&self, tool: &str, line: &str) -> String {
        let output = self.output(tool, &line.split_whitespace().collect::<Vec<_>>());
        assert!(!output.status.success(), "{tool} {line} succeeded");
        String::from_utf8(output.stderr).expect("text")
    }

    fn output(&self, tool: &str, words: &[&str]) -> Output {
        Command::new(tool)
            .args(words)
            .current_dir(self.dir.path())
            .output()
            .expect("an installed tool")
    }

    /// Runs a tool in the directory; it has to succeed. Its standard output.
    pub fn run(&self, tool: &str, words: &[&str]) -> String {
        let output = self.output(tool, words);
        assert!(
            output.status.success(),
            "{tool} {words:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).expect("text")
    }

    /// Runs a tool in the directory; it has to succeed. Its standard output.
    pub fn output_bytes(&self, tool: &str, words: &[&str]) -> Vec<u8> {
        let output = self.output(tool, words);
        assert!(output.status.success(), "{tool} {words:?} failed");
        output.stdout
    }

    /// Runs `qemu-img` with the words of a line.
    pub fn qemu_img(&self, line: &str) -> String {
        self.run("qemu-img", &line.split_whitespace().collect::<Vec<_>>())
    }

    /// Runs `qemu-io` commands on an image.
    pub fn qemu_io(&self, image: &str, commands: &[&str]) {
        let mut words = vec!["-f", "qcow2"];
        for command in commands {
            words.extend(["-c", command]);
        }
        words.push(image);
        let output = self.run("qemu-io", &words);
        assert!(!output.contains("failed"), "qemu-io {commands:?}: {output}");
    }

    /// Length of a file and the disk space that it takes, in bytes.
    pub fn size_of(&self, name: &str) -> (u64, u64) {
        let metadata = std::fs::metadata(self.path(name)).expect("a file of the lab");
        (metadata.len(), metadata.blocks() * 512)
    }

    /// Carries plans out on a file of the lab, disk space included.
    pub fn carry_out(&self, plans: &[Plan], name: &str) {
        let file = File::options().write(true).read(true).open(self.path(name));
        let file = file.expect("a file of the lab");
        let stages = plans.iter().flat_map(|plan| &plan.stages);
        let keep = FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let allocate = |mode: FallocateFlags, offset: u64, len: u64| {
            let (offset, len) = (offset as i64, len as i64);
            fallocate(&file, mode, offset, len).map_err(std::io::Error::from)
        };
        for step in stages.flat_map(|stage| &stage.steps) {
            assert_eq!(step.file(), FileNo::IMAGE);
            match step {
                Step::Write { offset, data, .. } => file.write_all_at(data, *offset),
                Step::Fill { offset, len, .. } => {
                    file.write_all_at(&vec![0; *len as usize], *offset)
                }
                Step::SetLength { len, .. } => file.set_len(*len),
                Step::Copy { from, to, len, .. } => {
                    let mut data = vec![0; *len as usize];
                    file.read_exact_at(&mut data, *from)
                        .and_then(|()| file.write_all_at(&data, *to))
                }
                Step::Zero { offset, len, .. } if *len <= 64 << 10 => {
                    file.write_all_at(&vec![0; *len as usize], *offset)
                }
                Step::Zero { offset, len, .. } => {
                    allocate(FallocateFlags::FALLOC_FL_ZERO_RANGE, *offset, *len)
                }
                Step::Punch { offset, len, .. } => {
                    allocate(keep | FallocateFlags::FALLOC_FL_PUNCH_HOLE, *offset, *len)
                }
                Step::Reserve { offset, len, .. } => allocate(keep, *offset, *len),
                Step::CopyFrom { .. }
                | Step::Create { .. }
                | Step::Rename { .. }
                | Step::Unlink { .. }
                | Step::Remove { .. } => panic!("the lab has one file: {step:?}"),
            }
            .expect("room in the lab");
        }
    }

    /// What `qemu-img` says in JSON.
    pub fn json(&self, line: &str) -> serde_json::Value {
        serde_json::from_str(&self.qemu_img(line)).expect("JSON")
    }
}

/// What the stages of a plan are for, in order.
pub fn purposes(plan: &Plan) -> Vec<Purpose> {
    plan.stages.iter().map(|stage| stage.purpose).collect()
}

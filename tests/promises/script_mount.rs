//! The mount acts on the guest's script alone, whatever the files' bytes are: a
//! real mount, served by this process over scripted guests.
//!
//! This process never opens a file of the mount itself. A sandbox process that
//! it starts would inherit the descriptor and close it before the start is
//! complete, which asks for a flush that nobody is free to answer.

use crate::script::{NEW, OLD, contents, disk, honest_pool, resized};
use crate::tools::{must, read, scratch, write};
use instar::fs::device::{self, KernelOptions};
use instar::fs::fuse::Adapter;
use instar::fs::{Filesystem, FormatRules, Images, Options, Source};
use instar::image::{BackingPolicy, Tree};
use instar::sandbox::Isolation;
use instar_guest::proto::Preallocation;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

/// A mount; gone when dropped.
struct Mount {
    at: PathBuf,
    served: Option<JoinHandle<()>>,
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = device::detach(&self.at, true);
        if let Some(served) = self.served.take() {
            let _ = served.join();
        }
    }
}

fn mount(source: &Path, at: &Path, isolation: Isolation) -> Result<Mount, String> {
    let told = |error: std::io::Error| error.to_string();
    let images = Images {
        pool: honest_pool(isolation)?,
        tree: Arc::new(Tree::open(source).map_err(told)?),
        allow_paths: Vec::new(),
        backing: BackingPolicy::Open,
    };
    let options = Options {
        read_only: false,
        grow: true,
        shrink: false,
        rw_backing: false,
        preallocation: Preallocation::Off,
        formats: FormatRules::default(),
        idle: Options::IDLE,
    };
    let opened = Source::open(source).map_err(told)?;
    let filesystem = Filesystem::new(opened, Box::new(images), options);
    let filesystem = Arc::new(filesystem.map_err(|error| error.to_string())?);
    let device = device::attach(source, at, &KernelOptions::default()).map_err(told)?;
    let session = fuser::Session::from_fd(
        Adapter(filesystem),
        device,
        fuser::SessionACL::All,
        fuser::Config::default(),
    );
    let mut mount = Mount {
        at: at.to_owned(),
        served: None,
    };
    let session = session.map_err(told)?;
    mount.served = Some(std::thread::spawn(move || drop(session.run())));
    Ok(mount)
}

/// Sizes, content and a truncate on the mount are the script's.
pub fn the_script_decides(isolation: Isolation) -> Result<(), String> {
    let dir = scratch()?;
    let (source, at) = (dir.path().join("source"), dir.path().join("mount"));
    for new in [&source, &at] {
        std::fs::create_dir(new).map_err(|error| error.to_string())?;
    }
    let files: Vec<(String, Vec<u8>)> = contents()
        .into_iter()
        .enumerate()
        .map(|(number, (_, content))| (format!("{number}.qcow2"), content))
        .collect();
    for (name, content) in &files {
        write(&source.join(name), content)?;
    }
    let mount = mount(&source, &at, isolation)?;
    for (name, content) in &files {
        let path = at.join(name);
        let path = path.to_string_lossy();
        let size = must(dir.path(), "stat", &["-c", "%s", &path])?.text;
        if size.trim() != OLD.to_string() {
            return Err(format!("{name}: {size} bytes"));
        }
        must(dir.path(), "cp", &[&path, "copy"])?;
        if read(&dir.path().join("copy"))? != disk(content, OLD) {
            return Err(format!("{name}: another disk than the script's"));
        }
        must(dir.path(), "truncate", &["-s", &NEW.to_string(), &path])?;
        if read(&source.join(name))? != resized(content) {
            return Err(format!("{name}: another file than the script's"));
        }
    }
    drop(mount);
    Ok(())
}

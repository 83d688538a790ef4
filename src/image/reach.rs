//! The files that hold parts of an image: those that its facts name, opened
//! through the gate and locked.

use super::error::{Fault, printable_name};
use super::gate::{Gate, Role, Spot, Tree};
use super::handles::{Handle, Id, id_of};
use super::home::Home;
use super::lock::LockSet;
use super::open::{BackingPolicy, OpenOptions, replaced};
use super::{Access, ErrorKind};
use instar_guest::Facts;
use nix::sys::resource::{Resource, getrlimit};
use std::fs::File;
use std::sync::Arc;

/// Descriptors that are left for everything besides an image's files.
const SPARE: u64 = 64;

/// What an image may reach besides its own file, and how.
pub(super) struct Reach {
    pub options: OpenOptions,
    pub access: Access,
    pub home: Home,
    /// Images of the chain so far, this one included.
    pub chain: Vec<Id>,
    /// Owner of the image.
    pub owner: u32,
    /// Made when the first name has to pass it.
    pub gate: Option<Gate>,
}

impl Reach {
    /// The gate for the names in the image.
    pub fn gate(&mut self) -> Result<&Gate, Fault> {
        let gate = match self.gate.take() {
            Some(gate) => gate,
            None => self.first_gate()?,
        };
        Ok(self.gate.insert(gate))
    }

    /// Those who must be able to do by themselves what the image has done.
    pub fn owners(&self) -> Vec<u32> {
        match &self.gate {
            Some(gate) => gate.owners.clone(),
            None => vec![self.owner],
        }
    }

    fn first_gate(&self) -> Result<Gate, Fault> {
        let (tree, path) = self.home.tree()?;
        let mut trees = vec![tree];
        for path in &self.options.allow_paths {
            let tree = Tree::open(path).map_err(|error| {
                Fault::os(
                    format_args!("Could not open the allowed path '{}'", path.display()),
                    error,
                )
            })?;
            trees.push(Arc::new(tree));
        }
        Ok(Gate {
            trees: trees.into(),
            from: Spot { tree: 0, path },
            owners: vec![self.owner],
        })
    }

    /// The files to open, if these facts name any. Facts alone may not need
    /// them.
    pub fn wants_files(&self, facts: &Facts) -> Result<bool, Fault> {
        let Some(first) = facts.files.first() else {
            return Ok(false);
        };
        if self.options.backing == BackingPolicy::Refuse {
            return Err(refused_name(self.role(facts).noun(), &first.name));
        }
        Ok(facts.files_first || self.access != Access::Info)
    }

    /// Opens the files that the facts name, in that order. One of `open` that
    /// is named is taken as it is: it is locked already.
    pub fn files(
        &mut self,
        facts: &Facts,
        open: &[Arc<Handle>],
    ) -> Result<Vec<Arc<Handle>>, Fault> {
        let role = self.role(facts);
        check_count(facts.files.len())?;
        let mut files: Vec<Arc<Handle>> = Vec::new();
        let mut ids = self.chain.clone();
        for named in &facts.files {
            let name = named.name.as_str();
            let passed = self.gate()?.pass(name, role)?;
            let id = id_of(&passed.file)?;
            if ids.contains(&id) {
                return Err(self.named_again(role, name, self.chain.contains(&id)));
            }
            ids.push(id);
            let same = |file: &&Arc<Handle>| id_of(&file.file).is_ok_and(|open| open == id);
            let file = match open.iter().find(same) {
                Some(file) => Arc::clone(file),
                None => {
                    self.lock(&passed.file, &passed.spot, self.access)?;
                    let writable = self.access == Access::Write;
                    Arc::new(Handle::new(passed.file, writable)?)
                }
            };
            let home = passed.spot.home(self.gate()?);
            file.home.get_or_init(|| home);
            files.push(file);
        }
        Ok(files)
    }

    /// Locks a file that passed the gate; answers where its name is.
    pub fn lock(&mut self, file: &File, spot: &Spot, access: Access) -> Result<Home, Fault> {
        let home = spot.home(self.gate()?);
        if self.options.force_share {
            return Ok(home);
        }
        LockSet::of(access).take(file, &spot.path)?;
        match home.holds(file)? {
            true => Ok(home),
            false => Err(replaced()),
        }
    }

    /// What is complete only with its files consists of them.
    fn role(&self, facts: &Facts) -> Role {
        let write = self.access == Access::Write;
        match facts.files_first {
            true => Role::Extent { write },
            false => Role::Data { write },
        }
    }

    fn named_again(&self, role: Role, name: &str, in_chain: bool) -> Fault {
        match in_chain {
            true => cycle(role.noun(), name),
            false => Fault::new(
                ErrorKind::Damaged,
                format!(
                    "The {} '{}' is named twice",
                    role.noun(),
                    printable_name(name)
                ),
            ),
        }
    }
}

/// How many files may be opened besides so many, of all that the process may
/// have open.
pub(super) fn spare_files(open: usize) -> usize {
    let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(SPARE, |(limit, _)| limit);
    let most = usize::try_from(limit.saturating_sub(SPARE)).unwrap_or(usize::MAX);
    most.saturating_sub(open)
}

/// Refuses more files than the process may have open.
fn check_count(count: usize) -> Result<(), Fault> {
    let most = spare_files(0);
    match count <= most {
        true => Ok(()),
        false => Err(Fault::new(
            ErrorKind::Os(libc::EMFILE),
            format!("The image consists of {count} files, and at most {most} may be open at once"),
        )
        .with_hint("To allow more, raise the limit of open files (ulimit -n).".to_string())),
    }
}

/// What an image is told that names a file where none may be named.
pub(super) fn refused_name(noun: &str, name: &str) -> Fault {
    Fault::new(
        ErrorKind::Forbidden,
        format!(
            "The image names the {noun} '{}', and {noun}s are not allowed here",
            printable_name(name)
        ),
    )
}

pub(super) fn cycle(noun: &str, name: &str) -> Fault {
    Fault::new(
        ErrorKind::Damaged,
        format!(
            "The {noun} '{}' is an image of the chain that names it",
            printable_name(name)
        ),
    )
}

//! Which format a file is read as: decided by its name and by the mount's
//! options, never by what a guest may have written into its disk.

use crate::image::{NameRule, format_of_name};
use globset::{Glob, GlobMatcher};
use instar_guest::proto::Format;
use std::path::Path;

/// `-o format=GLOB:FMT`, in the order given.
#[derive(Clone, Debug, Default)]
pub struct FormatRules(Vec<(GlobMatcher, Format)>);

impl FormatRules {
    /// Adds `GLOB:FMT`. A glob with a slash is matched against the path below
    /// SOURCE, any other against the file's name.
    pub fn add(&mut self, rule: &str) -> Result<(), String> {
        let (glob, format) = rule
            .rsplit_once(':')
            .ok_or_else(|| format!("format={rule}: expected GLOB:FORMAT, as in '*.disk:raw'"))?;
        let format = Format::of_name(format).ok_or_else(|| {
            let known = Format::ALL.map(Format::name).join(", ");
            format!("format={rule}: unknown format '{format}'; known are {known}")
        })?;
        let glob = Glob::new(glob).map_err(|error| format!("format={rule}: {error}"))?;
        self.0.push((glob.compile_matcher(), format));
        Ok(())
    }

    /// Whether any of the globs has a slash.
    pub fn has_paths(&self) -> bool {
        self.0.iter().any(|(glob, _)| is_for_paths(glob))
    }

    /// What the name of a file below SOURCE says. The last option that matches
    /// wins over the name itself.
    pub fn rule_for(&self, path: &Path) -> NameRule {
        let name = Path::new(path.file_name().unwrap_or_default());
        let chosen = self.0.iter().rev().find(|(glob, _)| {
            let subject = if is_for_paths(glob) { path } else { name };
            glob.is_match(subject)
        });
        match chosen {
            Some((_, Format::Raw)) => NameRule::Raw,
            Some((_, format)) => NameRule::Must(*format),
            None => format_of_name(name.as_os_str()),
        }
    }
}

fn is_for_paths(glob: &GlobMatcher) -> bool {
    glob.glob().glob().contains('/')
}

/// Whether a file is called like one that is to take the place of another: what
/// an interrupted change has left behind is no image.
pub fn is_replacement(path: &Path) -> bool {
    const MARK: &[u8] = b".instar-new";
    let name = path.file_name().unwrap_or_default().as_encoded_bytes();
    name.ends_with(MARK) || name.starts_with(b".instar-new-")
}

/// Whether a file with a name that says so may be a part of an image that
/// another file describes: its data, or one of the files of an image of many.
pub fn may_be_a_part(rule: NameRule) -> bool {
    matches!(rule, NameRule::Raw | NameRule::Must(Format::Vmdk))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_matching_option_wins_over_the_name() {
        let mut rules = FormatRules::default();
        rules.add("*.disk:raw").unwrap();
        rules.add("vm/*.disk:qcow2").unwrap();
        assert_eq!(rules.rule_for(Path::new("a.disk")), NameRule::Raw);
        assert_eq!(
            rules.rule_for(Path::new("vm/a.disk")),
            NameRule::Must(Format::Qcow2)
        );
        assert_eq!(rules.rule_for(Path::new("vm/a.img")), NameRule::Raw);
    }

    #[test]
    fn a_wrong_rule_says_what_is_expected() {
        let mut rules = FormatRules::default();
        assert_eq!(
            rules.add("disk").unwrap_err(),
            "format=disk: expected GLOB:FORMAT, as in '*.disk:raw'"
        );
        assert_eq!(
            rules.add("*.d:vdi").unwrap_err(),
            "format=*.d:vdi: unknown format 'vdi'; known are raw, qcow2, vmdk, vpc, vhdx"
        );
    }
}

//! Files that images name: which are opened, as what, and under which locks.

use super::{Fixture, Script, facts, told};
use crate::image::{Access, BackingPolicy, ErrorKind, OpenOptions};
use crate::sandbox::Files;
use instar_guest::facts::NamedFile;
use instar_guest::{Facts, Reply, Request};

const SIZE: u64 = 8192;
const UNIT: u64 = 4096;

fn named(name: &str) -> Option<NamedFile> {
    Some(NamedFile {
        name: name.to_string(),
        format: None,
    })
}

/// Facts of an image that names this data file.
fn with_data(name: &str) -> Facts {
    Facts {
        data_file: named(name),
        ..facts(SIZE, UNIT)
    }
}

/// A guest whose image has these facts.
fn guest(
    facts: Facts,
) -> Script<
    impl FnMut(&Request, &mut dyn Files) -> Result<Reply, crate::sandbox::CallError> + Clone + Send,
> {
    Script(move |request: &Request, _: &mut dyn Files| match request {
        Request::Open { .. } => Ok(Reply::Opened(facts.clone())),
        Request::Attach { .. } => Ok(Reply::Done),
        other => panic!("{other:?}"),
    })
}

#[test]
fn where_no_file_may_be_named_a_data_file_is_refused() {
    let fixture = Fixture::new(&[1; SIZE as usize]);
    std::fs::write(fixture.path.with_file_name("data"), [2; SIZE as usize]).unwrap();
    for access in [Access::Info, Access::Read, Access::Write] {
        let mut options = OpenOptions::new(access);
        fixture.open(&options, guest(with_data("data")));
        options.backing = BackingPolicy::Refuse;
        let error = fixture
            .try_open(&options, guest(with_data("data")))
            .unwrap_err();
        let text = "The image names the data file 'data', and data files are not allowed here";
        assert_eq!(told(&error), (ErrorKind::Forbidden, text.to_string()));
    }
}

//! What `info` prints, of facts that a guest may tell.

use super::*;
use instar_guest::Format;
use instar_guest::facts::NamedFile;

fn fact(depth: u8, key: &str, value: FactValue) -> Fact {
    Fact {
        depth,
        key: key.to_owned(),
        value,
    }
}

fn tree(facts: &[Fact]) -> Value {
    Value::Object(members(&mut facts.iter().peekable(), 0))
}

#[test]
fn flattened_facts_become_a_tree_again() {
    let facts = [
        fact(0, "compat", FactValue::Text("1.1".to_owned())),
        fact(0, "bitmaps", FactValue::List),
        fact(1, "", FactValue::Object),
        fact(2, "flags", FactValue::List),
        fact(3, "", FactValue::Text("auto".to_owned())),
        fact(2, "name", FactValue::Text("b0".to_owned())),
        fact(1, "", FactValue::Object),
        fact(2, "granularity", FactValue::Number(512)),
        fact(0, "corrupt", FactValue::Bool(false)),
    ];
    assert_eq!(
        tree(&facts),
        json!({
            "compat": "1.1",
            "bitmaps": [{"flags": ["auto"], "name": "b0"}, {"granularity": 512}],
            "corrupt": false
        })
    );
}

#[test]
fn a_tree_of_any_depth_is_bounded_work() {
    let deepest = |depth| fact(depth, "k", FactValue::Object);
    let mut facts: Vec<Fact> = (0..=u8::MAX).map(deepest).collect();
    facts.extend((0..1000).map(|_| deepest(u8::MAX)));
    let mut levels = 0;
    let mut value = &tree(&facts);
    while let Some(inside) = value.get("k") {
        value = inside;
        levels += 1;
    }
    assert_eq!(levels, 256);
}

#[test]
fn facts_that_belong_nowhere_do_not_get_lost() {
    let facts = [fact(7, "a", FactValue::Bool(true)), deep("b")];
    assert_eq!(tree(&facts), json!({"a": true, "b": false}));
}

fn deep(key: &str) -> Fact {
    fact(3, key, FactValue::Bool(false))
}

#[test]
fn an_image_of_several_files_lists_them_with_their_sizes() {
    let named = |name: &str| NamedFile {
        name: name.to_owned(),
        format: None,
    };
    let facts = Facts {
        format: Format::Vmdk,
        probed: true,
        virtual_size: 1 << 20,
        cluster_size: None,
        write_unit: 1,
        size_unit: 512,
        backing: None,
        identity: None,
        files: vec![named("d-f001.vmdk"), named("/abs/d-f002.vmdk")],
        files_first: true,
        encrypted: false,
        dirty: false,
        corrupt: false,
        unsettled: None,
        no_write: None,
        no_resize: None,
        snapshots: vec![],
        specific: vec![
            fact(0, "extents", FactValue::List),
            fact(1, "", FactValue::Object),
            fact(2, "filename", FactValue::Text("d-f001.vmdk".to_owned())),
            fact(1, "", FactValue::Object),
            fact(2, "filename", FactValue::Text(String::new())),
        ],
    };
    let on_disk = [400, 4096, 8192].map(|len| OnDisk {
        len,
        allocated: 4096,
    });
    let layer = Layer::new("sub/d.vmdk".to_owned(), &facts, &on_disk);
    assert_eq!(
        human(&[layer], QemuVersion::CURRENT),
        "image: sub/d.vmdk\n\
         file format: vmdk\n\
         virtual size: 1 MiB (1048576 bytes)\n\
         disk size: 12 KiB\n\
         Format specific information:\n    \
             extents:\n        \
                 [0]:\n            \
                     filename: sub/d-f001.vmdk\n        \
                 [1]:\n            \
                     filename: sub/d.vmdk\n\
         Child node '/extents.1':\n    \
             filename: /abs/d-f002.vmdk\n    \
             protocol type: file\n    \
             file length: 8 KiB (8192 bytes)\n    \
             disk size: 4 KiB\n\
         Child node '/extents.0':\n    \
             filename: sub/d-f001.vmdk\n    \
             protocol type: file\n    \
             file length: 4 KiB (4096 bytes)\n    \
             disk size: 4 KiB\n\
         Child node '/file':\n    \
             filename: sub/d.vmdk\n    \
             protocol type: file\n    \
             file length: 512 B (512 bytes)\n    \
             disk size: 4 KiB\n"
    );
}

#[test]
fn a_guests_clock_has_hours_as_wide_as_they_are() {
    assert_eq!(clock(61_234_999_999, false), "00:01:01.234");
    assert_eq!(clock(0, true), "0000:00:00.000");
    assert_eq!(clock(61_234_999_999, true), "0000:01:01.234");
    assert_eq!(clock(12_345 * 3_600_000_000_000, true), "12345:00:00.000");
}

#[test]
fn names_are_padded_by_bytes() {
    assert_eq!(padded("äÖ", 6), "äÖ  ");
    assert_eq!(padded("longer", 3), "longer");
}

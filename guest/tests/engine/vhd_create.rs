//! New VHD images against those that qemu-img makes.

use crate::lab::{Check, Lab};
use crate::vhd_lab::{G, M, opened};
use instar_guest::facts::NamedFile;
use instar_guest::plan::Purpose;
use instar_guest::proto::{Create, PlanReply};
use instar_guest::testing::{FRESH, Session};
use instar_guest::{Failure, Format, Reply, Request, Step};

/// All checks by name.
pub fn trials() -> Vec<(String, Check)> {
    let equal = EQUAL.iter().map(|&(size, options)| {
        let name = format!("vhd_creates_the_bytes_of_qemu_img::{size}_{options}");
        (name, Box::new(move || equals_qemu(size, options)) as Check)
    });
    let refused = REFUSED.iter().map(|&(size, options)| {
        let name = format!("vhd_refuses_as_qemu_img_does::{size}_{options}");
        (name, Box::new(move || refuses(size, options)) as Check)
    });
    let backing = (
        "vhd_refuses_a_backing_file".to_string(),
        Box::new(refuses_backing) as Check,
    );
    equal.chain(refused).chain([backing]).collect()
}

/// Images that must be equal to the byte, but for the UUID and the time.
const EQUAL: &[(u64, &str)] = &[
    (0, ""),
    (0, "force_size=on"),
    (512, ""),
    (512, "force_size=on"),
    (M, ""),
    (M, "subformat=dynamic"),
    (M, "subformat=fixed"),
    (M, "force_size=on"),
    (M, "force_size=off"),
    (M, "force_size=yes,subformat=fixed"),
    (M, "subformat=fixed,subformat=dynamic"),
    (5_000_704, "subformat=fixed"),
    (5_000_704, "subformat=fixed,force_size=on"),
    (64 * M, ""),
    (600 * M, ""),
    (3 * G, ""),
    (40 * G, ""),
    (127 * G, ""),
    (136_899_993_088, ""),
    (136_899_993_600, ""),
    (136_899_994_112, ""),
    (1 << 40, ""),
    (1 << 40, "force_size=on"),
    (2040 * G, ""),
];

/// What qemu-img refuses, and with which words.
const REFUSED: &[(u64, &str)] = &[
    (M, "subformat=sparse"),
    (M, "subformat="),
    (M, "force_size=maybe"),
    (M, "cluster_size=4k"),
    (2041 * G, ""),
    (2041 * G, "force_size=on"),
    (2041 * G, "subformat=fixed"),
    (3 << 40, ""),
];

fn request(size: u64, options: &str) -> Create {
    Create {
        format: Format::Vhd,
        size,
        options: options
            .split(',')
            .filter_map(|option| option.split_once('='))
            .map(|(key, value)| (key.to_string(), value.to_string()))
            .collect(),
        backing: None,
        backing_size: None,
        backing_identity: None,
    }
}

fn plan(session: &mut Session, create: Create) -> Result<PlanReply, Failure> {
    let request = Request::Create {
        create,
        name: "disk.vhd".to_string(),
        fresh: FRESH,
    };
    match session.call(request)? {
        Reply::Plan(reply) => Ok(reply),
        other => panic!("not an answer to Create: {other:?}"),
    }
}

fn words(options: &str) -> String {
    match options {
        "" => String::new(),
        options => format!("-o {options}"),
    }
}

/// Makes what differs between any two images the same: time, UUID, checksum.
fn mask(image: &mut [u8]) {
    let len = image.len();
    for footer in [0, len - 512] {
        if image[footer..].starts_with(b"conectix") {
            image[footer + 24..footer + 28].fill(0);
            image[footer + 64..footer + 84].fill(0);
        }
    }
}

fn equals_qemu(size: u64, options: &str) {
    let lab = Lab::new();
    let line = format!("create -f vpc {} disk.vhd {size}", words(options));
    let said = lab.qemu_img(&line);
    let mut session = Session::default();
    let reply = plan(&mut session, request(size, options)).unwrap();
    let printed = reply
        .options
        .iter()
        .map(|(key, value)| format!(" {key}={value}"));
    let printed: String = printed.collect();
    assert_eq!(
        format!("Formatting 'disk.vhd', fmt=vpc{printed}"),
        said.trim_end()
    );
    let (last, earlier) = reply.plan.stages.split_last().unwrap();
    assert_eq!(last.purpose, Purpose::Commit);
    assert!(
        earlier
            .iter()
            .all(|stage| stage.purpose == Purpose::Prepare)
    );
    assert!(matches!(&last.steps[..], [Step::Write { data, .. }] if data.len() == 512));
    session.host.apply(&reply.plan);
    let footer = session.host.image[session.host.image.len() - 512..].to_vec();
    opened(session.host.image.clone());
    assert_eq!(
        footer[24..28],
        (FRESH.time as u32 - 946_684_800).to_be_bytes()
    );
    let (mut ours, mut theirs) = (session.host.image, lab.bytes("disk.vhd"));
    assert_eq!(ours.len(), theirs.len());
    mask(&mut ours);
    mask(&mut theirs);
    let differs = ours.iter().zip(&theirs).position(|(a, b)| a != b);
    assert_eq!(differs, None, "first byte that differs");
}

fn refuses(size: u64, options: &str) {
    let lab = Lab::new();
    let line = format!("create -q -f vpc {} disk.vhd {size}", words(options));
    let said = lab.failing("qemu-img", &line);
    let refusal = plan(&mut Session::default(), request(size, options)).unwrap_err();
    assert_eq!(
        format!("qemu-img: disk.vhd: {}", refusal.message),
        said.trim_end()
    );
}

fn refuses_backing() {
    let mut create = request(M, "");
    create.backing = Some(NamedFile {
        name: "base.raw".to_string(),
        format: Some("raw".to_string()),
    });
    let refusal = plan(&mut Session::default(), create).unwrap_err();
    assert_eq!(
        refusal.message,
        "Backing file not supported for file format 'vpc'"
    );
}

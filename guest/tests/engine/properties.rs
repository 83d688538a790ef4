//! What holds of every image, whatever its tables: growing and shrinking back
//! leaves the content as it was, a plan stays inside its bounds, and the result
//! is what was promised. Sizes, places and lengths of what is written, and the
//! sizes to grow to are random.

use crate::disk::Random;
use crate::lab::Check;
use crate::plans::Bounds;
use instar_guest::facts::Facts;
use instar_guest::findings::{Repair, Report};
use instar_guest::proto::{Content, Create, Place, PlanReply, Preallocation};
use instar_guest::testing::{FRESH, Session};
use instar_guest::{ExtentKind, Failure, FailureKind, FileNo, Format, Reply, Request};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestRunner};

const K: u64 = 1 << 10;
const M: u64 = 1 << 20;
const G: u64 = 1 << 30;

/// Random images per kind.
const CASES: u32 = 12;
/// How much of a range that has to be zero is looked at from each end, in bytes.
const LOOK: u64 = 2 * M;

/// A kind of image.
struct Kind {
    name: &'static str,
    format: Format,
    options: &'static str,
    /// The largest size to begin with, in bytes.
    start: u64,
    /// The largest size to grow to without preallocation, in bytes.
    far: u64,
}

const fn kind(
    name: &'static str,
    format: Format,
    options: &'static str,
    start: u64,
    far: u64,
) -> Kind {
    Kind {
        name,
        format,
        options,
        start,
        far,
    }
}

const KINDS: &[Kind] = &[
    kind("raw", Format::Raw, "", 4 * M, 16 * M),
    kind("qcow2", Format::Qcow2, "", 6 * M, 8 << 40),
    kind(
        "qcow2_small_clusters",
        Format::Qcow2,
        "cluster_size=512",
        M,
        16 * G,
    ),
    kind(
        "qcow2_version_2",
        Format::Qcow2,
        "compat=0.10,cluster_size=4096",
        4 * M,
        64 * G,
    ),
    kind(
        "qcow2_extended",
        Format::Qcow2,
        "extended_l2=on,cluster_size=16384",
        4 * M,
        64 * G,
    ),
    kind(
        "qcow2_wide_refcounts",
        Format::Qcow2,
        "refcount_bits=64,cluster_size=1024",
        2 * M,
        16 * G,
    ),
    kind(
        "qcow2_narrow_refcounts",
        Format::Qcow2,
        "refcount_bits=1,cluster_size=2048",
        2 * M,
        16 * G,
    ),
    kind("vmdk", Format::Vmdk, "", 6 * M, 8 * G),
    kind(
        "vmdk_flat",
        Format::Vmdk,
        "subformat=monolithicFlat",
        4 * M,
        16 * M,
    ),
    kind(
        "vmdk_split",
        Format::Vmdk,
        "subformat=twoGbMaxExtentSparse",
        6 * M,
        6 * G,
    ),
    kind(
        "vmdk_split_flat",
        Format::Vmdk,
        "subformat=twoGbMaxExtentFlat",
        4 * M,
        16 * M,
    ),
    kind("vhd", Format::Vhd, "force_size=on", 10 * M, 2040 * G),
    kind(
        "vhd_fixed",
        Format::Vhd,
        "subformat=fixed,force_size=on",
        4 * M,
        16 * M,
    ),
    kind("vhdx", Format::Vhdx, "block_size=1M", 4 * M, 512 * G),
    kind(
        "vhdx_fixed",
        Format::Vhdx,
        "subformat=fixed,block_size=1M",
        4 * M,
        16 * M,
    ),
];

/// All checks by name.
pub fn trials() -> Vec<(String, Check)> {
    KINDS
        .iter()
        .map(|kind| {
            let check: Check = Box::new(move || check(kind));
            (
                format!("a_grow_and_a_shrink_leave_the_content::{}", kind.name),
                check,
            )
        })
        .collect()
}

fn check(kind: &'static Kind) {
    let mut runner = TestRunner::new(Config {
        cases: CASES,
        failure_persistence: None,
        max_shrink_iters: 64,
        ..Config::default()
    });
    if let Err(error) = runner.run(&history(), |history| run(kind, &history)) {
        panic!("{error}");
    }
}

/// What happens to an image. Places and sizes are shares of what is possible.
#[derive(Clone, Debug)]
struct History {
    size: u16,
    writes: Vec<(u16, u16)>,
    later: Vec<(u16, u16)>,
    grow: u16,
    scale: u32,
    preallocation: usize,
}

fn history() -> impl Strategy<Value = History> {
    let writes = prop::collection::vec((any::<u16>(), any::<u16>()), 0..12);
    let later = prop::collection::vec((any::<u16>(), any::<u16>()), 0..4);
    (
        any::<u16>(),
        writes,
        later,
        any::<u16>(),
        0..20u32,
        0..6usize,
    )
        .prop_map(
            |(size, writes, later, grow, scale, preallocation)| History {
                size,
                writes,
                later,
                grow,
                scale,
                preallocation,
            },
        )
}

/// A part of a whole, a multiple of a sector, never 0.
fn share(of: u64, part: u16) -> u64 {
    ((u128::from(of / 512) * u128::from(part) / 65536) as u64 + 1) * 512
}

fn run(kind: &Kind, history: &History) -> Result<(), TestCaseError> {
    let size = share(kind.start, history.size);
    let mut image = Image::create(kind, size)?;
    image.write(&history.writes)?;
    let content = image.read(0, image.size)?;
    prop_assert!(content == image.model, "what was written is read");
    let (old, far) = (image.size, kind.far >> (history.scale % 20));
    let (preallocation, most) = match history.preallocation {
        3 => (Preallocation::Metadata, 8 * M),
        4 => (Preallocation::Falloc, 4 * M),
        5 => (Preallocation::Full, 4 * M),
        _ => (Preallocation::Off, u64::MAX),
    };
    let larger = old + share(far.saturating_sub(old).clamp(512, most), history.grow);
    let larger = larger.min(kind.far.max(old)) / image.facts.size_unit * image.facts.size_unit;
    image.resize(larger, preallocation, false)?;
    image.is_as_promised(larger, "grown")?;
    image.is_zero_behind(old)?;
    prop_assert_eq!(&image.facts.no_write, &None);
    image.write(&history.later)?;
    image.is_as_promised(larger, "grown and written")?;
    image.resize(old, Preallocation::Off, true)?;
    image.is_as_promised(old, "shrunk")?;
    image.resize(larger, Preallocation::Off, false)?;
    image.is_as_promised(larger, "grown again")?;
    image.is_zero_behind(old)
}

/// An image and what has to be on it.
struct Image {
    kind: &'static str,
    format: Format,
    session: Session,
    facts: Facts,
    model: Vec<u8>,
    size: u64,
    random: Random,
}

fn failed(failure: Failure) -> TestCaseError {
    TestCaseError::fail(format!("{failure:?}"))
}

impl Image {
    fn create(kind: &Kind, size: u64) -> Result<Self, TestCaseError> {
        let options = kind.options.split(',').filter_map(|it| it.split_once('='));
        let create = Create {
            format: kind.format,
            size,
            options: options
                .map(|(key, value)| (key.to_string(), value.to_string()))
                .collect(),
            backing: None,
            backing_size: None,
            backing_identity: None,
        };
        let mut session = Session::default();
        let reply = session.call(Request::Create {
            create,
            name: "disk.img".to_string(),
            fresh: FRESH,
        });
        match reply.map_err(failed)? {
            Reply::Plan(reply) => session.host.apply(&reply.plan),
            other => panic!("not a plan: {other:?}"),
        }
        let facts = session.open(Some(kind.format)).map_err(failed)?;
        let size = facts.virtual_size;
        Ok(Self {
            kind: kind.name,
            format: kind.format,
            session,
            facts,
            model: vec![0; size as usize],
            size,
            random: Random(size | 1),
        })
    }

    /// Writes ranges of the part of the disk that the model has, as the host
    /// does, and flushes now and then.
    fn write(&mut self, ranges: &[(u16, u16)]) -> Result<(), TestCaseError> {
        for (nth, &(at, len)) in ranges.iter().enumerate() {
            let unit = self.facts.write_unit;
            let end = self.model.len() as u64;
            let from = (share(end, at) - 512) / unit * unit;
            let to = (from + share(200 * K, len)).next_multiple_of(unit);
            let to = to.min(self.size);
            self.write_range(from, to)?;
            if nth % 3 == 0 {
                self.flush()?;
            }
        }
        self.flush()
    }

    fn write_range(&mut self, from: u64, to: u64) -> Result<(), TestCaseError> {
        let byte = 1 + self.random.below(255) as u8;
        let end = to.min(self.model.len() as u64);
        self.model[from as usize..end as usize].fill(byte);
        let extents = self.session.map(from, to - from).map_err(failed)?;
        let in_place = extents
            .iter()
            .all(|it| matches!(it.kind, ExtentKind::Data { in_place: true, .. }));
        if in_place {
            for extent in extents {
                if let ExtentKind::Data { file, at, .. } = extent.kind {
                    self.put(extent.offset, extent.len, file, at)?;
                }
            }
            return Ok(());
        }
        let allocate = |session: &mut Session, offset, len| {
            let request = Request::Allocate { offset, len };
            match session.call(request.clone()) {
                Err(failure) if failure.kind == FailureKind::FlushFirst => {
                    let Reply::Plan(reply) = session.call(Request::Flush).map_err(failed)? else {
                        panic!("not an answer to Flush");
                    };
                    session.host.apply(&reply.plan);
                    session.call(request).map_err(failed)
                }
                answer => answer.map_err(failed),
            }
        };
        let mut reply = allocate(&mut self.session, from, to - from)?;
        if let Reply::Wider { offset, len } = reply {
            reply = allocate(&mut self.session, offset, len)?;
        }
        let Reply::Placed(places) = reply else {
            panic!("no places: {reply:?}");
        };
        for place in places {
            self.fill(&place)?;
        }
        Ok(())
    }

    fn fill(&mut self, place: &Place) -> Result<(), TestCaseError> {
        let Place {
            offset,
            len,
            file,
            at,
            ..
        } = *place;
        let held = self.session.host.file(file).map_err(failed)?;
        if place.content == Content::Zero {
            let from = held.len().min(at as usize);
            let to = held.len().min((at + len) as usize);
            let is_zero = held[from..to].iter().all(|&byte| byte == 0);
            prop_assert!(is_zero, "{place:?} is not zero");
        }
        self.put(offset, len, file, at)
    }

    /// Puts what the disk holds to its place in a file.
    fn put(&mut self, offset: u64, len: u64, file: FileNo, at: u64) -> Result<(), TestCaseError> {
        // A place may reach past the part of the disk that the model has.
        let end = (offset + len).min(self.model.len() as u64);
        let data = &self.model[(offset as usize).min(end as usize)..end as usize];
        let held = self.session.host.file(file).map_err(failed)?;
        let (at, len) = (at as usize, len as usize);
        held.resize(held.len().max(at + len), 0);
        held[at..at + data.len()].copy_from_slice(data);
        held[at + data.len()..at + len].fill(0);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), TestCaseError> {
        match self.session.call(Request::Flush).map_err(failed)? {
            Reply::Plan(reply) => self.session.host.apply(&reply.plan),
            other => panic!("not a plan: {other:?}"),
        }
        Ok(())
    }

    /// The content of a range that is not too long.
    fn read(&mut self, offset: u64, len: u64) -> Result<Vec<u8>, TestCaseError> {
        self.session.read(offset, len).map_err(failed)
    }

    /// Changes the size by a plan that stays in its bounds, and opens the result.
    fn resize(
        &mut self,
        size: u64,
        preallocation: Preallocation,
        shrink: bool,
    ) -> Result<(), TestCaseError> {
        let bounds = Bounds::new(&self.session.host, &self.facts, size, preallocation);
        let request = |preallocation| Request::Resize {
            size,
            preallocation,
            shrink,
            backing_size: None,
        };
        let reply = match self.session.call(request(preallocation)) {
            Err(failure)
                if preallocation != Preallocation::Off
                    && matches!(
                        failure.kind,
                        FailureKind::Unsupported | FailureKind::InvalidRequest
                    ) =>
            {
                self.session.call(request(Preallocation::Off))
            }
            reply => reply,
        };
        let plan = match reply {
            Ok(Reply::Plan(PlanReply { plan, .. })) => plan,
            other => {
                let kind = self.kind;
                let from = self.size;
                return Err(TestCaseError::fail(format!(
                    "{kind}: {from} to {size}: {other:?}"
                )));
            }
        };
        bounds
            .apply(&mut self.session.host, &plan)
            .map_err(TestCaseError::fail)?;
        self.session.host.streamed.clear();
        self.session.host.others.retain(Option::is_some);
        self.session.host.names.clear();
        self.facts = self.session.open(Some(self.format)).map_err(failed)?;
        self.size = size;
        Ok(())
    }

    /// The size, a clean check, the content.
    fn is_as_promised(&mut self, size: u64, when: &str) -> Result<(), TestCaseError> {
        prop_assert_eq!(self.facts.virtual_size, size);
        prop_assert_eq!(&self.facts.unsettled, &None);
        prop_assert_eq!(&self.facts.no_resize, &None);
        self.is_sound(when)?;
        let content = self.read(0, self.model.len() as u64)?;
        let differs = content.iter().zip(&self.model).position(|(a, b)| a != b);
        prop_assert_eq!(differs, None, "{}: the first byte that differs", when);
        Ok(())
    }

    /// A check finds nothing but room that is made ahead of new blocks, and room
    /// that a VHDX keeps before a table behind its blocks. The writes of one
    /// session leave the room in a VHD that an earlier one made ahead: a repair has
    /// to find it.
    fn is_sound(&mut self, when: &str) -> Result<(), TestCaseError> {
        if self.format == Format::Raw {
            return Ok(());
        }
        let written = self.format == Format::Vhd && when == "grown and written";
        if written && self.check(None)?.0.leaks > 0 {
            let (_, repair) = self.check(Some(Repair::Leaks))?;
            self.session.host.apply(&repair.plan);
            self.facts = self.session.open(Some(self.format)).map_err(failed)?;
        }
        let (report, _) = self.check(None)?;
        let findings = &self.session.host.findings;
        let clean = report.corruptions + report.leaks + report.check_errors == 0;
        let expected = |text: &str| match self.format {
            Format::Vhd => when != "shrunk" && text.starts_with("there is room for "),
            Format::Vhdx => text.ends_with(" MiB between the blocks are not used"),
            _ => false,
        };
        let other = findings.iter().find(|it| !expected(&it.text));
        prop_assert!(clean && other.is_none(), "{when}: {report:?} {findings:?}");
        Ok(())
    }

    fn check(&mut self, repair: Option<Repair>) -> Result<(Report, PlanReply), TestCaseError> {
        self.session.host.findings.clear();
        match self.session.call(Request::Check { repair }) {
            Ok(Reply::Checked { report, repair }) => Ok((report, repair)),
            other => Err(TestCaseError::fail(format!("not checked: {other:?}"))),
        }
    }

    fn is_zero_behind(&mut self, from: u64) -> Result<(), TestCaseError> {
        let rest = self.size - from;
        let last = self.size - rest.min(LOOK);
        for at in [from, last] {
            let content = self.read(at, rest.min(LOOK))?;
            let other = content.iter().position(|&byte| byte != 0);
            prop_assert_eq!(other, None, "old bytes behind {}", at);
        }
        Ok(())
    }
}

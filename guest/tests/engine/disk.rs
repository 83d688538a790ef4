//! A disk under test: the engine, the files, and what must be on it.

use crate::lab::Lab;
use instar_guest::plan::{Plan, Purpose};
use instar_guest::proto::{Content, Place, PlanReply};
use instar_guest::testing::Session;
use instar_guest::{ExtentKind, Failure, FileNo, Host, Read, Reply, Request};

/// A repeatable sequence of numbers.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % limit
    }
}

/// A disk under test: the engine, the files, and what must be on it.
pub struct Disk {
    pub session: Session,
    content: Vec<u8>,
    unit: u64,
    has_backing: bool,
}

impl Disk {
    pub fn open(lab: &Lab) -> Self {
        let mut session = Session::new(lab.bytes("disk.qcow2"));
        let data = lab.path("disk.data");
        session.host.others = data
            .exists()
            .then(|| Some(lab.bytes("disk.data")))
            .into_iter()
            .collect();
        let facts = session.open(None).expect("the image opens");
        assert_eq!(facts.no_write, None);
        lab.qemu_img("convert -O raw disk.qcow2 model.raw");
        Self {
            session,
            content: lab.bytes("model.raw"),
            unit: facts.write_unit,
            has_backing: facts.backing.is_some(),
        }
    }

    pub fn size(&self) -> u64 {
        self.content.len() as u64
    }

    pub fn allocate(&mut self, offset: u64, len: u64) -> Result<Reply, Failure> {
        self.session.call(Request::Allocate { offset, len })
    }

    /// Writes as the host does: around to whole units, places, data.
    pub fn write(&mut self, at: u64, data: &[u8], undo: bool) -> Result<(), Failure> {
        let end = at + data.len() as u64;
        let mut from = at / self.unit * self.unit;
        let mut to = end.next_multiple_of(self.unit).min(self.size());
        let lens = (
            self.session.host.image.len(),
            self.session.host.data().map(Vec::len),
        );
        let places = match self.allocate(from, to - from)? {
            Reply::Placed(places) => places,
            Reply::Wider { offset, len } => {
                assert!(offset <= from && offset + len >= to && len > to - from);
                (from, to) = (offset, offset + len);
                match self.allocate(from, len)? {
                    Reply::Placed(places) => places,
                    other => panic!("not an answer to a wider Allocate: {other:?}"),
                }
            }
            other => panic!("not an answer to Allocate: {other:?}"),
        };
        let old = self.content[from as usize..to as usize].to_vec();
        self.content[at as usize..end as usize].copy_from_slice(data);
        let mut next = from;
        for place in &places {
            assert_eq!(place.offset, next, "a gap between places");
            next += place.len;
            self.fill(place, undo);
        }
        assert_eq!(next, to, "places for all of the range");
        if undo {
            self.content[from as usize..to as usize].copy_from_slice(&old);
            // What held data goes back to it; new places keep the garbage.
            for place in places.iter().filter(|p| p.content == Content::Current) {
                self.fill(place, false);
            }
            assert_eq!(self.session.call(Request::Undo), Ok(Reply::Done));
            if lens.0.is_multiple_of(3) {
                self.session.host.image.truncate(lens.0);
                if let (Some(data), Some(len)) = (self.session.host.file(FileNo::DATA).ok(), lens.1)
                {
                    data.truncate(len);
                }
            }
        }
        Ok(())
    }

    /// Writes a place's content as lazily as it allows; or garbage.
    fn fill(&mut self, place: &Place, garbage: bool) {
        let range = place.offset as usize..(place.offset + place.len) as usize;
        let wanted = &self.content[range];
        let host = &mut self.session.host;
        let file = match place.file {
            FileNo::DATA => host.file(FileNo::DATA).expect("a data file"),
            _ => &mut host.image,
        };
        let (at, len) = (place.at as usize, place.len as usize);
        file.resize(file.len().max(at + len), 0);
        let target = &mut file[at..at + len];
        match place.content {
            _ if garbage => target.fill(0xee),
            Content::Zero => {
                assert!(
                    target.iter().all(|&byte| byte == 0),
                    "{place:?} is not zero"
                );
                target.copy_from_slice(wanted);
            }
            Content::Stale => {
                target.fill(0xdd);
                target.copy_from_slice(wanted);
            }
            Content::Current => target.copy_from_slice(wanted),
        }
    }

    pub fn flush(&mut self) -> PlanReply {
        let reply = match self.session.call(Request::Flush) {
            Ok(Reply::Plan(reply)) => reply,
            other => panic!("not an answer to Flush: {other:?}"),
        };
        check_order(&reply.plan);
        self.session.host.apply(&reply.plan);
        reply
    }

    /// The engine reads what was written, flushed or not.
    pub fn check_mapping(&mut self, random: &mut Random) {
        let from = random.below(self.size() / 512) * 512;
        let len = (random.below(512) * 512 + 512).min(self.size() - from);
        for extent in self.session.map(from, len).expect("a mapping") {
            let wanted = &self.content[extent.offset as usize..][..extent.len as usize];
            let found = match extent.kind {
                ExtentKind::Data { file, at, .. } => {
                    let mut found = vec![0; extent.len as usize];
                    let read = Read {
                        file,
                        offset: at,
                        buf: &mut found,
                    };
                    self.session.host.read(&mut [read]).unwrap();
                    found
                }
                ExtentKind::Unallocated { .. } if self.has_backing => continue,
                ExtentKind::Compressed => continue,
                ExtentKind::Zero { .. } | ExtentKind::Unallocated { .. } => vec![0; wanted.len()],
            };
            assert!(found == wanted, "{extent:?} reads something else");
        }
    }

    /// qemu-img finds the model's content and nothing wrong.
    pub fn judge(&self, lab: &Lab) {
        lab.write("disk.qcow2", &self.session.host.image);
        if let Some(data) = self.session.host.data() {
            lab.write("disk.data", data);
        }
        lab.qemu_img("check -f qcow2 disk.qcow2");
        lab.write("model.raw", &self.content);
        lab.qemu_img("compare -f qcow2 -F raw disk.qcow2 model.raw");
    }
}

/// Stages in the one order that is safe, none of them a commit.
fn check_order(plan: &Plan) {
    let order = [
        Purpose::Prepare,
        Purpose::Count,
        Purpose::Link,
        Purpose::Release,
    ];
    let found: Vec<usize> = plan
        .stages
        .iter()
        .map(|stage| order.iter().position(|&purpose| purpose == stage.purpose))
        .collect::<Option<_>>()
        .expect("a flush has no commit");
    assert!(found.is_sorted(), "{found:?}");
    assert!(
        found.is_empty() || found[0] == 0,
        "data becomes durable first"
    );
}

//! Between the engine and the doorbell: one image, one request at a time.

use crate::rt::doorbell;
use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use instar_guest::findings::Finding;
use instar_guest::layout;
use instar_guest::plan::Plan;
use instar_guest::proto::{FileNo, MAX_READS, MAX_REQUEST, ReadOp, ToGuest, ToHost};
use instar_guest::{Engine, Failure, FailureKind, Host, Read};

/// Answers requests for ever. The engine's state stays between them.
pub fn serve() -> ! {
    let mut engine = Engine::default();
    let mut out = Vec::new();
    loop {
        let reply = match receive() {
            Ok(ToGuest::Request(request)) => engine.handle(&mut Doorbell, request),
            Ok(ToGuest::Resume(_)) => Err(unexpected()),
            Err(failure) => Err(failure),
        };
        out = send(&ToHost::Reply(reply), out);
    }
}

/// The world as the engine sees it: each call is one exit, but for reads that
/// the bytes in the head and tail areas answer.
struct Doorbell;

impl Host for Doorbell {
    fn read(&mut self, reads: &mut [Read<'_>]) -> Result<(), Failure> {
        let placed = Placed::now();
        let missing = reads.iter_mut().filter_map(|read| {
            if placed.answer(read) {
                None
            } else {
                Some(Target::new(read))
            }
        });
        let mut targets: Vec<Target<'_, '_>> = missing.collect();
        for batch in targets.chunks_mut(MAX_READS) {
            let ops = batch.iter_mut().map(Target::op).collect::<Result<_, _>>()?;
            ask(&ToHost::Read(ops))?;
        }
        targets.into_iter().for_each(Target::deliver);
        Ok(())
    }

    fn stream(&mut self, part: Plan) -> Result<(), Failure> {
        ask(&ToHost::Stream(part))
    }

    fn tell(&mut self, findings: Vec<Finding>) -> Result<(), Failure> {
        ask(&ToHost::Findings(findings))
    }
}

/// A range that only the host can read. It writes nowhere but to the heap, so a
/// buffer that lies elsewhere (on the stack) gets its bytes by way of the heap.
struct Target<'a, 'b> {
    read: &'a mut Read<'b>,
    detour: Option<Vec<u8>>,
}

impl<'a, 'b> Target<'a, 'b> {
    fn new(read: &'a mut Read<'b>) -> Self {
        let shared = read.buf.as_ptr() as u64 >= layout::HEAP;
        let detour = (!shared).then(|| vec![0; read.buf.len()]);
        Self { read, detour }
    }

    fn op(&mut self) -> Result<ReadOp, Failure> {
        let buf: &mut [u8] = match &mut self.detour {
            Some(detour) => detour,
            None => self.read.buf,
        };
        Ok(ReadOp {
            file: self.read.file,
            offset: self.read.offset,
            len: u32::try_from(buf.len()).map_err(|_| too_long(buf.len()))?,
            addr: buf.as_mut_ptr() as u64,
        })
    }

    fn deliver(self) {
        if let Some(detour) = self.detour {
            self.read.buf.copy_from_slice(&detour);
        }
    }
}

/// What the host has placed of the image's start and end before an open.
struct Placed {
    head: &'static [u8],
    tail: &'static [u8],
    file_len: u64,
}

impl Placed {
    fn now() -> Self {
        Self {
            head: doorbell::head(),
            tail: doorbell::tail(),
            file_len: doorbell::mailbox().file_len,
        }
    }

    /// Fills the buffer if all its bytes are here.
    fn answer(&self, read: &mut Read<'_>) -> bool {
        if read.file != FileNo::IMAGE || self.head.is_empty() {
            return false;
        }
        // Bytes past the end of the file are zeroes, so they need no source.
        let inside = self.file_len.saturating_sub(read.offset);
        let len = usize::try_from(inside).map_or(read.buf.len(), |n| n.min(read.buf.len()));
        let tail_start = self.file_len.saturating_sub(self.tail.len() as u64);
        let found = slice(self.head, Some(read.offset), len)
            .or_else(|| slice(self.tail, read.offset.checked_sub(tail_start), len));
        match (found, len) {
            (Some(bytes), _) => fill(read.buf, bytes),
            (None, 0) => fill(read.buf, &[]),
            (None, _) => return false,
        }
        true
    }
}

fn slice(area: &[u8], start: Option<u64>, len: usize) -> Option<&[u8]> {
    let start = usize::try_from(start?).ok()?;
    area.get(start..start.checked_add(len)?)
}

/// Copies `bytes` and zeroes the rest of the buffer.
fn fill(buf: &mut [u8], bytes: &[u8]) {
    let (front, rest) = buf.split_at_mut(bytes.len().min(buf.len()));
    front.copy_from_slice(bytes);
    rest.fill(0);
}

/// Sends a question and waits for the host to have done it.
fn ask(question: &ToHost) -> Result<(), Failure> {
    send(question, Vec::new());
    match receive()? {
        ToGuest::Resume(done) => done,
        ToGuest::Request(_) => Err(unexpected()),
    }
}

/// Encodes into `buf`, whose memory it reuses, rings and returns the buffer.
fn send(message: &ToHost, mut buf: Vec<u8>) -> Vec<u8> {
    buf.clear();
    match postcard::to_extend(message, buf) {
        Ok(buf) => {
            doorbell::send(&buf);
            buf
        }
        Err(error) => panic!("message cannot be encoded: {error}"),
    }
}

fn receive() -> Result<ToGuest, Failure> {
    let bytes = doorbell::request();
    postcard::from_bytes(bytes).map_err(|error| {
        let text = format!(
            "the host's message ({} of at most {MAX_REQUEST} bytes) cannot be decoded: {error}",
            bytes.len()
        );
        internal(text)
    })
}

fn unexpected() -> Failure {
    internal(String::from("the host's message is out of turn"))
}

fn internal(text: String) -> Failure {
    Failure::new(FailureKind::Internal, text)
}

fn too_long(len: usize) -> Failure {
    internal(format!("a read of {len} bytes is too long"))
}

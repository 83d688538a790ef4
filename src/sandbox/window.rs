//! The host's view of the shared memory: where messages go, come from, and what
//! a guest-chosen address may name.

use super::SandboxError;
use instar_guest::layout::{HEAD_AREA, HEAP, MAILBOX, REQUEST, TAIL_AREA, WINDOW, mailbox};
use instar_guest::proto::{MAX_REQUEST, ReadOp};
use vm_memory::{Bytes, VolatileSlice};

/// The shared memory of one guest. Its contents may change at any time.
#[derive(Clone, Copy)]
pub(super) struct Window<'a>(VolatileSlice<'a>);

impl<'a> Window<'a> {
    /// The window over memory that begins at [`WINDOW`] and holds at least the
    /// fixed areas, as every machine's does.
    pub(super) fn new(memory: VolatileSlice<'a>) -> Self {
        assert!(
            memory.len() as u64 > HEAP - WINDOW,
            "the window holds its fixed areas"
        );
        Self(memory)
    }

    /// Where the file's first bytes go. `len` is at most
    /// [`HEAD`](instar_guest::proto::HEAD).
    pub(super) fn head(self, len: usize) -> VolatileSlice<'a> {
        self.fixed(HEAD_AREA, len)
    }

    /// Where the file's last bytes go. `len` is at most
    /// [`TAIL`](instar_guest::proto::TAIL).
    pub(super) fn tail(self, len: usize) -> VolatileSlice<'a> {
        self.fixed(TAIL_AREA, len)
    }

    /// Says what [`head`](Self::head) and [`tail`](Self::tail) hold.
    pub(super) fn set_placed(self, head_len: usize, tail_len: usize, file_len: u64) {
        self.set(mailbox::HEAD_LEN, head_len as u64);
        self.set(mailbox::TAIL_LEN, tail_len as u64);
        self.set(mailbox::FILE_LEN, file_len);
    }

    /// Places a message for the guest.
    pub(super) fn set_request(self, message: &[u8]) {
        assert!(
            message.len() <= MAX_REQUEST,
            "requests are bounded when they are encoded"
        );
        self.fixed(REQUEST, message.len()).copy_from(message);
        self.set(mailbox::REQUEST_LEN, message.len() as u64);
    }

    /// The build that the guest says it comes from.
    pub(super) fn build_id(self) -> u64 {
        self.get(mailbox::BUILD_ID)
    }

    /// Copies the guest's message.
    pub(super) fn message(self, max: usize) -> Result<Vec<u8>, SandboxError> {
        let addr = self.get(mailbox::MESSAGE_ADDR);
        let len = self.get(mailbox::MESSAGE_LEN);
        if len > max as u64 {
            return Err(SandboxError::MessageTooLong {
                len,
                max: max as u64,
            });
        }
        let slice = self
            .slice(addr, len, WINDOW)
            .ok_or(SandboxError::MessageOutside { addr, len })?;
        let mut message = vec![0; slice.len()];
        slice.copy_to(&mut message);
        Ok(message)
    }

    /// The buffer of a read: anywhere in the heap.
    pub(super) fn buffer(self, op: &ReadOp) -> Result<VolatileSlice<'a>, SandboxError> {
        self.slice(op.addr, op.len.into(), HEAP)
            .ok_or(SandboxError::ReadOutside {
                addr: op.addr,
                len: op.len,
            })
    }

    /// A range of guest addresses, if it lies between `lowest` and the end of
    /// the window.
    fn slice(self, addr: u64, len: u64, lowest: u64) -> Option<VolatileSlice<'a>> {
        if addr < lowest {
            return None;
        }
        let offset = usize::try_from(addr - WINDOW).ok()?;
        self.0.subslice(offset, usize::try_from(len).ok()?).ok()
    }

    /// A part of the fixed areas, which [`new`](Self::new) found to be there.
    fn fixed(self, addr: u64, len: usize) -> VolatileSlice<'a> {
        self.slice(addr, len as u64, WINDOW)
            .expect("the fixed areas lie in the window")
    }

    fn get(self, field: usize) -> u64 {
        let bytes: [u8; 8] = self
            .0
            .read_obj((MAILBOX - WINDOW) as usize + field)
            .expect("the mailbox lies in the window");
        u64::from_le_bytes(bytes)
    }

    fn set(self, field: usize, value: u64) {
        self.0
            .write_obj(value.to_le_bytes(), (MAILBOX - WINDOW) as usize + field)
            .expect("the mailbox lies in the window");
    }
}

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

#[cfg(test)]
mod tests {
    use super::*;
    use instar_guest::FileNo;
    use instar_guest::layout::Mailbox;
    use vm_memory::{MmapRegion, VolatileMemory};

    const LEN: u64 = 1 << 20;
    const END: u64 = WINDOW + LEN;

    fn memory() -> MmapRegion {
        MmapRegion::new(LEN as usize).expect("memory for a test")
    }

    fn name(memory: &MmapRegion, addr: u64, len: u64) {
        let window = Window::new(memory.as_volatile_slice());
        window.set(mailbox::MESSAGE_ADDR, addr);
        window.set(mailbox::MESSAGE_LEN, len);
    }

    #[test]
    fn the_mailbox_is_where_the_guest_has_it() {
        let memory = memory();
        let window = Window::new(memory.as_volatile_slice());
        window.set_request(b"abc");
        window.set_placed(1, 2, 3);
        window.set(mailbox::BUILD_ID, 9);
        let fields: [u64; size_of::<Mailbox>() / 8] = std::array::from_fn(|at| window.get(8 * at));
        assert_eq!(fields, [3, 1, 2, 3, 0, 0, 9]);
        assert_eq!(window.build_id(), 9);
    }

    #[test]
    fn a_message_may_lie_anywhere_in_the_window() {
        let memory = memory();
        let window = Window::new(memory.as_volatile_slice());
        window.fixed(REQUEST, 3).copy_from(b"abc");
        for (addr, len, found) in [
            (REQUEST, 3, &b"abc"[..]),
            (END - 2, 2, &[0, 0]),
            (END, 0, &[]),
            (WINDOW, 0, &[]),
        ] {
            name(&memory, addr, len);
            assert_eq!(window.message(100).as_deref(), Ok(found));
        }
    }

    #[test]
    fn a_message_outside_the_window_is_refused() {
        let memory = memory();
        let window = Window::new(memory.as_volatile_slice());
        for (addr, len) in [
            (0, 1),
            (WINDOW - 1, 2),
            (END - 1, 2),
            (END + 1, 0),
            (u64::MAX, 100),
        ] {
            name(&memory, addr, len);
            let refused = SandboxError::MessageOutside { addr, len };
            assert_eq!(window.message(100), Err(refused));
        }
    }

    #[test]
    fn a_message_over_the_cap_is_refused_wherever_it_lies() {
        let memory = memory();
        name(&memory, 0, 101);
        let refused = SandboxError::MessageTooLong { len: 101, max: 100 };
        let window = Window::new(memory.as_volatile_slice());
        assert_eq!(window.message(100), Err(refused));
    }

    #[test]
    fn a_buffer_lies_in_the_heap() {
        let memory = memory();
        let window = Window::new(memory.as_volatile_slice());
        let op = |addr, len| ReadOp {
            file: FileNo::IMAGE,
            offset: 0,
            addr,
            len,
        };
        for (addr, len) in [(HEAP, 1), (HEAP, 0), (END - 5, 5)] {
            let found = window.buffer(&op(addr, len)).map(|buffer| buffer.len());
            assert_eq!(found, Ok(len as usize));
        }
        for (addr, len) in [(HEAP - 1, 1), (END - 5, 6), (0, 1), (u64::MAX, u32::MAX)] {
            let found = window.buffer(&op(addr, len)).map(|buffer| buffer.len());
            assert_eq!(found, Err(SandboxError::ReadOutside { addr, len }));
        }
    }
}

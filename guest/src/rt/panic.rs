//! What remains to be said when the program stops on a defect of its own.

use super::{doorbell, heap};
use core::fmt::Write;
use core::panic::PanicInfo;
use instar_guest::layout::ring;

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    let code = if heap::exhausted() {
        ring::OUT_OF_MEMORY
    } else {
        ring::PANIC
    };
    let mut text = Text::default();
    // A text that does not fit is cut: nothing else can fail here.
    let _ = write!(text, "{}", info.message());
    if let Some(place) = info.location() {
        let _ = write!(text, " ({}:{})", place.file(), place.line());
    }
    doorbell::last_words(code, text.bytes.get(..text.len).unwrap_or_default())
}

/// A text without a heap.
struct Text {
    bytes: [u8; 512],
    len: usize,
}

impl Default for Text {
    fn default() -> Self {
        Self {
            bytes: [0; 512],
            len: 0,
        }
    }
}

impl Write for Text {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        for (to, from) in self.bytes.iter_mut().skip(self.len).zip(text.bytes()) {
            *to = from;
            self.len += 1;
        }
        Ok(())
    }
}

/// Nothing unwinds here, but the standard library comes compiled for programs
/// that do, and its clean-up code refers to this.
#[allow(unsafe_code)]
#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() -> ! {
    doorbell::stop()
}

//! Panics whose place in this file is part of what the host is told.

pub fn plain() -> ! {
    panic!("a panic of the test guest")
}

pub fn with_escapes() -> ! {
    panic!("\x1b[2Jbefore\nafter")
}

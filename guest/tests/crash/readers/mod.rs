//! Readers of disks that were written from the specifications alone. They are
//! stricter than qemu-img, or read another copy, and share nothing with the
//! engine.

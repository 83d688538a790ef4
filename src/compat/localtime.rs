//! Local time of day, for the dates of snapshots. The C library is the one that
//! knows the machine's time zone; this is the only call to it.
#![allow(unsafe_code)]

/// `YYYY-MM-DD hh:mm:ss` in the local time zone, of seconds since the epoch.
pub fn date(seconds: u32) -> String {
    let time = libc::time_t::from(seconds);
    // SAFETY: all-zero bytes are a valid `tm`: integers and a pointer that may be null.
    let mut tm: libc::tm = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers are to live locals of the right types, and the
    // function keeps neither.
    let known = unsafe { libc::localtime_r(&time, &mut tm) };
    if known.is_null() {
        return seconds.to_string();
    }
    format!(
        "{:04}-{:02}-{:02} {:02}:{:02}:{:02}",
        tm.tm_year + 1900,
        tm.tm_mon + 1,
        tm.tm_mday,
        tm.tm_hour,
        tm.tm_min,
        tm.tm_sec
    )
}

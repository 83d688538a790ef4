//! `mount.instar`: the helper that mount(8) runs for `-t instar`.
fn main() {}

//! The `instar` command.
fn main() {}

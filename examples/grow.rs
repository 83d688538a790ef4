//! Grows a disk image with the library:
//! `cargo run --example grow -- disk.qcow2 21474836480`.
//!
//! The plan is printed first: what would be written, in which order, and which
//! write is the commit.

use instar::image::{Access, OpenOptions, ResizeOptions};
use instar::sandbox::{Config, Pool};
use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(path), Some(size)) = (arguments.next(), arguments.next()) else {
        return Err("usage: grow FILE BYTES".into());
    };
    let size = size.parse()?;

    let pool = Pool::new(Config::default())?;
    let image = OpenOptions::new(Access::Write).open(&pool, path.as_ref())?;
    let how = ResizeOptions::default();

    for stage in image.plan_resize(size, &how)?.plan.stages {
        println!("{:?}: {} steps", stage.purpose, stage.steps.len());
    }
    image.resize(size, &how)?;
    println!("{}: {} bytes", image.path().display(), image.virtual_size());
    Ok(())
}

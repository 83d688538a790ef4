//! The engine against qemu: images that qemu-img and qemu-io made are opened,
//! mapped and read, and qemu-img says what the answer has to be.

mod checking;
mod creating;
mod damages;
mod disk;
mod flipping;
mod grow_cases;
mod growing;
mod interrupted;
mod lab;
mod large;
mod placing;
mod plans;
mod properties;
mod reading;
mod repairing;
mod shrink_cases;
mod shrinking;
mod vhd;
mod vhd_create;
mod vhd_flips;
mod vhd_lab;
mod vhd_write;
mod vhdx;
mod vhdx_grow;
mod vhdx_lab;
mod vhdx_shrink;
mod vhdx_write;
mod vmdk;
mod vmdk_check;
mod vmdk_lab;
mod vmdk_resize;
mod writing;

use libtest_mimic::{Arguments, Trial};

fn main() {
    let arguments = Arguments::from_args();
    let missing = lab::missing_tool();
    let trials = reading::trials()
        .into_iter()
        .chain(flipping::trials())
        .chain(creating::trials())
        .chain(growing::trials())
        .chain(shrinking::trials())
        .chain(interrupted::trials())
        .chain(large::trials())
        .chain(writing::trials())
        .chain(placing::trials())
        .chain(properties::trials())
        .chain(checking::trials())
        .chain(repairing::trials())
        .chain(vhd::trials())
        .chain(vhd_create::trials())
        .chain(vhd_flips::trials())
        .chain(vhd_write::trials())
        .chain(vhdx::trials())
        .chain(vhdx_grow::trials())
        .chain(vhdx_shrink::trials())
        .chain(vhdx_write::trials())
        .chain(vmdk::trials())
        .chain(vmdk_resize::trials())
        .chain(vmdk_check::trials())
        .map(|(name, check)| {
            let trial = Trial::test(name, move || {
                check();
                Ok(())
            });
            match missing {
                Some(tool) => trial
                    .with_ignored_flag(true)
                    .with_kind(format!("no {tool}")),
                None => trial,
            }
        })
        .collect();
    libtest_mimic::run(&arguments, trials).exit();
}

//! `instar info`.

use super::look::Look;
use super::{Error, Global, Output, on_disk, say};
use instar::compat::info::{self, Layer};
use instar::compat::version::QemuVersion;
use instar::image::{Access, BackingPolicy, Image, OpenOptions};
use instar_guest::Facts;
use std::sync::Arc;

/// Arguments of `info`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Show the backing files too
    #[arg(short, long)]
    backing_chain: bool,
    #[command(flatten)]
    look: Look,
}

/// Runs `info`.
pub fn run(args: &Args, global: &Global) -> Result<(), Error> {
    let image = args
        .look
        .open(Access::Info, global, |options| OpenOptions {
            backing: match args.backing_chain {
                true => BackingPolicy::Open,
                false => BackingPolicy::Skip,
            },
            ..options
        })?;
    let text = show(&image, &args.look.file(), args, global.qemu_version)?;
    say(&text)
}

/// The text for an image and, as far as it was opened, its backing chain.
fn show(image: &Image, file: &str, args: &Args, version: QemuVersion) -> Result<String, Error> {
    let chain: Vec<(&Image, Arc<Facts>)> =
        std::iter::successors(Some(image), |image| image.backing())
            .map(|image| (image, image.facts()))
            .collect();
    let mut layers: Vec<Layer<'_>> = Vec::with_capacity(chain.len());
    for (image, facts) in &chain {
        let file = layers
            .last()
            .map_or(Some(file.to_owned()), Layer::backing_file);
        let file = file.unwrap_or_default();
        layers.push(Layer::new(file, facts, &on_disk(image)?));
    }
    Ok(match (args.look.output, layers.as_slice()) {
        (Output::Human, layers) => info::human(layers, version),
        (Output::Json, [layer]) if !args.backing_chain => info::to_json(layer, version),
        (Output::Json, layers) => info::chain_to_json(layers, version),
    })
}

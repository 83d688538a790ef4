//! `instar info`.

use super::{Elsewhere, Error, Global, OnDisk, Output, format_to_open, say};
use instar::compat::info::{self, Layer};
use instar::image::{Access, BackingPolicy, Image, OpenOptions};
use instar_guest::Facts;
use std::path::PathBuf;
use std::sync::Arc;

/// Arguments of `info`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Format of the image, instead of probing for it
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// Show the backing files too
    #[arg(short, long)]
    backing_chain: bool,
    /// Read even an image that another process is writing
    #[arg(short = 'U', long)]
    force_share: bool,
    /// How to show it
    #[arg(long, value_enum, default_value_t)]
    output: Output,
    #[command(flatten)]
    elsewhere: Elsewhere,
    /// Image file
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

/// Runs `info`.
pub fn run(args: &Args, global: &Global) -> Result<(), Error> {
    args.elsewhere.refuse()?;
    let file = args.file.to_string_lossy();
    let format = format_to_open(args.format.as_deref(), &file)?;
    let options = OpenOptions {
        force_share: args.force_share,
        backing: match args.backing_chain {
            true => BackingPolicy::Open,
            false => BackingPolicy::Skip,
        },
        ..global.opening(Access::Info, format)
    };
    let image = options
        .open(&global.pool()?, &args.file)
        .map_err(Error::opening(&args.file))?;
    let text = show(&image, &file, args)?;
    say(&text)
}

/// The text for an image and, as far as it was opened, its backing chain.
fn show(image: &Image, file: &str, args: &Args) -> Result<String, Error> {
    let chain: Vec<(&Image, Arc<Facts>)> =
        std::iter::successors(Some(image), |image| image.backing())
            .map(|image| (image, image.facts()))
            .collect();
    let mut layers: Vec<Layer<'_>> = Vec::with_capacity(chain.len());
    for (image, facts) in &chain {
        let file = layers
            .last()
            .map_or(Some(file.to_owned()), Layer::backing_file);
        let on_disk = OnDisk::of(image)?;
        layers.push(Layer {
            file: file.unwrap_or_default(),
            facts,
            file_len: on_disk.len,
            allocated: on_disk.allocated,
        });
    }
    Ok(match (args.output, layers.as_slice()) {
        (Output::Human, layers) => info::human(layers),
        (Output::Json, [layer]) if !args.backing_chain => info::to_json(layer),
        (Output::Json, layers) => info::chain_to_json(layers),
    })
}

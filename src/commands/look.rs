//! Arguments of the commands that look at one image.

use super::{Elsewhere, Error, Global, Output, format_to_open};
use instar::image::{Access, Image, OpenOptions};
use std::borrow::Cow;
use std::path::PathBuf;

/// What `info`, `map` and `check` take.
#[derive(Debug, clap::Args)]
pub struct Look {
    /// Format of the image, instead of probing for it
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// Read even an image that another process is writing
    #[arg(short = 'U', long)]
    force_share: bool,
    /// How to show it
    #[arg(long, value_enum, default_value_t)]
    pub output: Output,
    #[command(flatten)]
    elsewhere: Elsewhere,
    /// Image file
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

impl Look {
    /// The file as the user named it.
    pub fn file(&self) -> Cow<'_, str> {
        self.file.to_string_lossy()
    }

    /// Opens the image; `with` may change how.
    pub fn open(
        &self,
        access: Access,
        global: &Global,
        with: impl FnOnce(OpenOptions) -> OpenOptions,
    ) -> Result<Image, Error> {
        self.elsewhere.refuse()?;
        let format = format_to_open(self.format.as_deref(), &self.file())?;
        let options = OpenOptions {
            force_share: self.force_share,
            ..global.opening(access, format)
        };
        with(options)
            .open(&global.pool()?, &self.file)
            .map_err(Error::opening(&self.file))
    }
}

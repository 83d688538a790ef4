//! Files as bytes, and a change to them as epochs of events.
//!
//! An epoch is what happens between two durability barriers. Its events may
//! reach the disk in any order, all, some or none. Nothing here knows a format.

use instar_guest::plan::SECTOR;
use instar_guest::{FileNo, Plan, Step};

/// The files that a case may change, by number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Files(pub Vec<Vec<u8>>);

/// One effect on one file that reaches the disk whole or not at all, once it
/// has been [split](Event::split).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Bytes at an offset; extends the file where it ends before them.
    Write {
        file: FileNo,
        offset: u64,
        data: Vec<u8>,
    },
    /// The file's length. Journalled by the filesystem, so atomic.
    SetLength { file: FileNo, len: u64 },
}

/// The events between two barriers.
pub type Epoch = Vec<Event>;

impl Files {
    /// A name for this content, to recognise a state that was judged before.
    pub fn digest(&self) -> u64 {
        const ODD: u64 = 0x9e37_79b9_7f4a_7c15;
        let mut digest = ODD;
        let mut mix = |word: u64| digest = (digest ^ word).wrapping_mul(ODD).rotate_left(29);
        for file in &self.0 {
            mix(file.len() as u64);
            let (words, rest) = file.as_chunks::<8>();
            words.iter().for_each(|word| mix(u64::from_le_bytes(*word)));
            rest.iter().for_each(|&byte| mix(u64::from(byte)));
        }
        digest
    }

    /// Performs an event.
    pub fn apply(&mut self, event: &Event) {
        match event {
            Event::Write { file, offset, data } => {
                let bytes = &mut self.0[file.0 as usize];
                let (start, end) = (*offset as usize, *offset as usize + data.len());
                set_len(bytes, bytes.len().max(end));
                bytes[start..end].copy_from_slice(data);
            }
            Event::SetLength { file, len } => set_len(&mut self.0[file.0 as usize], *len as usize),
        }
    }

    /// Performs every event of every epoch.
    pub fn apply_all(&mut self, epochs: &[Epoch]) {
        for event in epochs.iter().flatten() {
            self.apply(event);
        }
    }

    /// `len` bytes from `offset` on; zeroes past the end of the file.
    pub fn read(&self, file: FileNo, offset: u64, len: u64) -> Vec<u8> {
        let mut out = vec![0; len as usize];
        let bytes = &self.0[file.0 as usize];
        let start = (offset as usize).min(bytes.len());
        let end = ((offset + len) as usize).min(bytes.len());
        out[..end - start].copy_from_slice(&bytes[start..end]);
        out
    }
}

/// `Vec::resize` writes byte for byte where nothing is optimised; this is called
/// for every state.
fn set_len(bytes: &mut Vec<u8>, len: usize) {
    match len.checked_sub(bytes.len()) {
        Some(more) => bytes.extend_from_slice(&vec![0; more]),
        None => bytes.truncate(len),
    }
}

impl Event {
    /// The event as pieces that do not cross a sector boundary.
    pub fn split(&self) -> Vec<Event> {
        let Event::Write { file, offset, data } = self else {
            return vec![self.clone()];
        };
        let mut pieces = Vec::new();
        let mut done = 0;
        while done < data.len() {
            let at = offset + done as u64;
            let len = ((SECTOR - at % SECTOR) as usize).min(data.len() - done);
            pieces.push(Event::Write {
                file: *file,
                offset: at,
                data: data[done..done + len].to_vec(),
            });
            done += len;
        }
        pieces
    }
}

/// A plan as epochs, one per stage, against the files it is made for.
///
/// Fails where the plan relies on an order inside a stage: two steps of one
/// stage that touch the same bytes, or a copy from bytes that its stage writes.
pub fn epochs_of(plan: &Plan, start: &Files) -> Result<Vec<Epoch>, String> {
    let mut files = start.clone();
    let mut epochs = Vec::new();
    for (number, stage) in plan.stages.iter().enumerate() {
        check_order_free(&stage.steps).map_err(|clash| format!("stage {number}: {clash}"))?;
        let epoch: Epoch = stage
            .steps
            .iter()
            .filter_map(|step| event_of(step, &files))
            .collect();
        for event in &epoch {
            files.apply(event);
        }
        epochs.push(epoch);
    }
    Ok(epochs)
}

/// What a step does to the content of `files`, if anything.
fn event_of(step: &Step, files: &Files) -> Option<Event> {
    let write = |file, offset, data| Some(Event::Write { file, offset, data });
    match *step {
        Step::Write {
            file,
            offset,
            ref data,
        } => write(file, offset, data.clone()),
        Step::Zero { file, offset, len } | Step::Fill { file, offset, len } => {
            write(file, offset, vec![0; len as usize])
        }
        Step::Copy {
            file,
            from,
            to,
            len,
        } => write(file, to, files.read(file, from, len)),
        Step::Punch { file, offset, len } => {
            let end = (offset + len).min(files.0[file.0 as usize].len() as u64);
            write(file, offset, vec![0; end.saturating_sub(offset) as usize])
        }
        Step::SetLength { file, len } => Some(Event::SetLength { file, len }),
        Step::Reserve { .. } | Step::Create { .. } | Step::Rename { .. } | Step::Unlink { .. } => {
            None
        }
    }
}

/// The bytes that a step writes: file, start, end.
fn target(step: &Step) -> Option<(FileNo, u64, u64)> {
    match *step {
        Step::Write {
            file,
            offset,
            ref data,
        } => Some((file, offset, offset + data.len() as u64)),
        Step::Zero { file, offset, len }
        | Step::Fill { file, offset, len }
        | Step::Punch { file, offset, len } => Some((file, offset, offset + len)),
        Step::Copy { file, to, len, .. } => Some((file, to, to + len)),
        _ => None,
    }
}

fn check_order_free(steps: &[Step]) -> Result<(), String> {
    let overlap =
        |a: (FileNo, u64, u64), b: (FileNo, u64, u64)| a.0 == b.0 && a.1 < b.2 && b.1 < a.2;
    for (i, step) in steps.iter().enumerate() {
        let Some(written) = target(step) else {
            continue;
        };
        for (j, other) in steps.iter().enumerate() {
            if j > i && target(other).is_some_and(|range| overlap(written, range)) {
                return Err(format!("steps {i} and {j} write the same bytes"));
            }
            if let Step::Copy {
                file, from, len, ..
            } = *other
                && overlap(written, (file, from, from + len))
            {
                return Err(format!("step {j} copies what step {i} writes"));
            }
        }
    }
    Ok(())
}

//! The explorer proves itself: it reports orders of effects that are known to
//! be wrong, qemu's own among them.

use crate::explorer::case::{Ask, BASIC, Case, M};
use crate::explorer::disk::{Epoch, Event, Files};
use crate::explorer::judge::{Depth, Judge};
use crate::explorer::report::{Exploration, Row};
use crate::explorer::setup::Setup;
use crate::explorer::tools::{missing_oracle, read, run, scratch};
use crate::explorer::{qcow2, seed, vmdk};
use crate::{orders, with_oracle};
use instar_guest::Format;
use instar_guest::proto::Preallocation::Off;
use libtest_mimic::{Completion, Trial};

/// A full disk, half of which is cut off.
const SHRINK: Case = Case {
    name: "known bad/shrink",
    format: Format::Qcow2,
    options: "cluster_size=4096",
    size: M,
    prepare: &["io write -P 1 0 1M"],
    judges: &qcow2::JUDGES,
    ask: Ask::Shrink(M / 2),
    ..BASIC
};

/// A grow that moves the L1 table.
const GROW: Case = Case {
    name: "known bad/grow",
    options: "cluster_size=512",
    ask: Ask::Grow(4 * M, Off),
    ..SHRINK
};

/// The trials.
pub fn trials() -> Vec<Trial> {
    let traced = || match run(std::path::Path::new("/"), "strace", &["-V"]) {
        Ok(outcome) if outcome.code == 0 => Ok(missing_oracle()),
        _ => Ok::<_, String>(Some("strace is not installed".to_owned())),
    };
    let qemu = Trial::ignorable_test(
        "known bad/qemu-img resize --shrink",
        move || match traced()? {
            Some(reason) => Ok(Completion::ignored_with(reason)),
            None => Ok(shrink_of_qemu().map(|()| Completion::Completed)?),
        },
    );
    vec![
        qemu,
        with_oracle("known bad/header-first shrink".to_owned(), header_first),
        with_oracle("known bad/grow without a barrier".to_owned(), no_barrier),
        with_oracle("known bad/grow, commit first".to_owned(), commit_first),
        with_oracle("known bad/files that stay".to_owned(), files_stay),
        with_oracle(
            "known bad/files that nothing names".to_owned(),
            nothing_names_files,
        ),
    ]
}

fn explore(judge: &Judge<'_>, epochs: &[Epoch], depth: Depth) -> Row {
    exploration(judge, epochs, depth).run()
}

fn exploration<'a>(judge: &'a Judge<'_>, epochs: &'a [Epoch], depth: Depth) -> Exploration<'a> {
    Exploration {
        judge,
        start: &judge.setup.files,
        epochs,
        seed: seed(),
        depth,
    }
}

/// Fails unless a bad state is one for that reason.
fn expect(row: &Row, reason: &str) -> Result<(), String> {
    let found = row.examples.iter().any(|example| example.contains(reason));
    match found {
        true => Ok(()),
        false => Err(format!("{row}\n{:#?}", row.examples)),
    }
}

/// The size first, and then what it unmaps: the disk is old or new, but a crash
/// in between leaves data for the next grow to show.
fn header_first() -> Result<(), String> {
    let setup = Setup::build(&SHRINK)?;
    let judge = Judge::new(&SHRINK, &setup)?;
    let image = setup.files.get(setup.image_name())?;
    let write = |offset, data: Vec<u8>| Event::Write {
        file: 0,
        offset,
        data,
    };
    let l1 = image.big::<8>(40);
    let l2 = image.big::<8>(l1) & 0x00ff_ffff_ffff_fe00;
    let cut = M / 2 / 4096 * 8;
    let epochs = [
        vec![write(24, (M / 2).to_be_bytes().to_vec())],
        vec![write(l2 + cut, vec![0; cut as usize])],
    ];
    let row = explore(&judge, &epochs, Depth::AndFuture);
    expect(
        &row,
        "after a grow by qemu-img: a disk of 1048576 bytes that differs",
    )
}

/// The last barrier before the commit is taken away.
fn no_barrier() -> Result<(), String> {
    let setup = Setup::build(&GROW)?;
    let judge = Judge::new(&GROW, &setup)?;
    let mut epochs = orders::plan(&GROW, &setup)?.epochs;
    let second = epochs.remove(1);
    epochs[0].extend(second);
    expect(&explore(&judge, &epochs, Depth::Present), "epoch 0")
}

/// The commit comes before what it makes visible.
fn commit_first() -> Result<(), String> {
    let setup = Setup::build(&GROW)?;
    let judge = Judge::new(&GROW, &setup)?;
    let mut epochs = orders::plan(&GROW, &setup)?.epochs;
    epochs.swap(0, 1);
    expect(&explore(&judge, &epochs, Depth::Present), "epoch 0")
}

/// The change is complete but for a file that should have gone.
fn files_stay() -> Result<(), String> {
    let case = &vmdk::SPLIT_SHRINKS;
    let setup = Setup::build(case)?;
    let judge = Judge::new(case, &setup)?;
    let mut epochs = orders::plan(case, &setup)?.epochs;
    for epoch in &mut epochs {
        epoch.retain(|event| !matches!(event, Event::Unlink { .. }));
    }
    let row = exploration(&judge, &epochs, Depth::Present).run_to_end();
    expect(&row, "the end: the files are")
}

/// The new descriptor does not name the file that goes after the commit: the same
/// request on a state between the two finds nothing to do.
fn nothing_names_files() -> Result<(), String> {
    let case = &vmdk::SPLIT_SHRINKS;
    let setup = Setup::build(case)?;
    let judge = Judge::new(case, &setup)?;
    let mut epochs = orders::plan(case, &setup)?.epochs;
    let begins = |data: &[u8]| {
        let mark = b"# instar:";
        data.windows(mark.len()).position(|text| text == mark)
    };
    for event in epochs.iter_mut().flatten() {
        if let Event::Write { file, data, .. } = event
            && *file >= setup.files.count()
            && let Some(at) = begins(data)
        {
            data.truncate(at);
        }
    }
    let row = explore(&judge, &epochs, Depth::AndFuture);
    expect(&row, "the same request again: the files are")
}

/// What qemu-img does discards the data first of all, while the old size stands.
fn shrink_of_qemu() -> Result<(), String> {
    let setup = Setup::build(&SHRINK)?;
    let judge = Judge::new(&SHRINK, &setup)?;
    let epochs = traced_shrink(&setup)?;
    let mut finished = setup.files.clone();
    finished.apply_all(&epochs);
    let end = judge.verdict(&finished, Depth::Present)?;
    if !end.faults.is_empty() {
        return Err(format!("the trace is not what happened: {end:?}"));
    }
    let row = explore(&judge, &epochs, Depth::Present);
    expect(&row, "a disk of 1048576 bytes that differs at Some(")
}

/// What qemu-img does to the image, as the kernel sees it.
fn traced_shrink(setup: &Setup) -> Result<Vec<Epoch>, String> {
    let dir = scratch()?;
    setup.store(&setup.files, dir.path())?;
    let calls = "trace=pwrite64,pwritev,pwritev2,ftruncate,fallocate,fdatasync,fsync";
    let trace = ["-f", "-xx", "-s", "4000000", "-o", "trace", "-e", calls];
    let size = (M / 2).to_string();
    let resize = ["qemu-img", "resize", "-q", "--shrink", setup.image_name()];
    let words = [&trace[..], &resize, &[&size]].concat();
    let traced = run(dir.path(), "strace", &words)?;
    if traced.code != 0 {
        return Err(traced.brief());
    }
    let text = read(&dir.path().join("trace"))?;
    epochs_of(&String::from_utf8_lossy(&text), &setup.files)
}

/// The epochs of a trace of one file's calls.
fn epochs_of(trace: &str, files: &Files) -> Result<Vec<Epoch>, String> {
    let mut files = files.clone();
    let mut epochs = Vec::new();
    let mut epoch = Epoch::new();
    for line in trace.lines() {
        let Some((call, arguments)) = line.split_once('(') else {
            continue;
        };
        let name = call.split_whitespace().last().unwrap_or_default();
        let arguments = arguments.split(" <unfinished").next().unwrap_or_default();
        let arguments = arguments.split(')').next().unwrap_or_default();
        let words: Vec<&str> = arguments.split(", ").collect();
        let number = |at: usize| {
            let word = words.get(at).and_then(|word| word.parse::<u64>().ok());
            word.ok_or_else(|| format!("no number {at} in {name}({arguments:.200}"))
        };
        let write = |offset, data| Event::Write {
            file: 0,
            offset,
            data,
        };
        let event = match name {
            "pwrite64" => write(number(3)?, unescaped(words[1])?),
            "ftruncate" => Event::SetLength {
                file: 0,
                len: number(1)?,
            },
            "fallocate" if arguments.contains("PUNCH_HOLE") => {
                let (offset, end) = (number(2)?, number(2)? + number(3)?);
                let end = end.min(files.bytes(0).len());
                write(offset, vec![0; end.saturating_sub(offset) as usize])
            }
            "fdatasync" | "fsync" => {
                epochs.push(std::mem::take(&mut epoch));
                continue;
            }
            other => return Err(format!("an unknown call: {other}")),
        };
        files.apply(&event);
        epoch.push(event);
    }
    epochs.push(epoch);
    epochs.retain(|epoch| !epoch.is_empty());
    Ok(epochs)
}

/// The bytes of `"\x01\x02"`.
fn unescaped(text: &str) -> Result<Vec<u8>, String> {
    let digits = text.trim_matches('"').split("\\x").skip(1);
    let bytes = digits.map(|digits| u8::from_str_radix(digits, 16));
    bytes
        .collect::<Result<_, _>>()
        .map_err(|_| format!("no bytes: {text:.100}"))
}

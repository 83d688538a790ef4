//! Refcount blocks that count nothing any more but themselves and each other:
//! they are taken out of the table, so that the file can end before them.

use super::super::layout::Run;
use super::super::refcount::Refcounts;
use crate::engine::Host;
use crate::error::Failure;
use alloc::collections::BTreeMap;
use alloc::vec::Vec;

/// Most clusters that a block counts that counts only blocks.
const FEW: usize = 64;
/// Most stages in which blocks are taken out.
const MAX_ROUNDS: usize = 4;

/// Blocks that can be taken out.
#[derive(Debug, Default)]
pub struct Empty {
    /// Their numbers, in the order in which they go: a block that counts others
    /// goes after them, or one of them would be in use without a count.
    pub rounds: Vec<Vec<u64>>,
    /// The clusters that they lie in, ascending.
    pub clusters: Vec<u64>,
    /// Those of them that are counted by blocks that stay.
    counted: Vec<u64>,
}

impl Empty {
    /// Whether one of them lies in a cluster.
    pub fn lies_at(&self, cluster: u64) -> bool {
        self.clusters.binary_search(&cluster).is_ok()
    }

    /// Takes back the counts that other blocks hold for them.
    pub fn uncount(
        &self,
        host: &mut dyn Host,
        refcounts: &mut Refcounts<'_>,
    ) -> Result<(), Failure> {
        let mut runs = self.counted.iter().map(|&first| Run { first, count: 1 });
        runs.try_for_each(|run| refcounts.release(host, run))
    }

    fn holds(&self, number: u64) -> bool {
        self.rounds.iter().any(|round| round.contains(&number))
    }
}

struct Block {
    number: u64,
    cluster: u64,
    /// What it counts besides itself.
    others: Vec<u64>,
}

/// Finds blocks to take out among the last of `numbers`, which are those of a
/// window.
pub fn empty(
    host: &mut dyn Host,
    refcounts: &mut Refcounts<'_>,
    numbers: &[u64],
) -> Result<Empty, Failure> {
    let mut blocks = candidates(host, refcounts, numbers)?;
    keep_closed(&mut blocks);
    let places: BTreeMap<u64, u64> = places(&blocks);
    let mut empty = Empty::default();
    while !blocks.is_empty() && empty.rounds.len() < MAX_ROUNDS {
        let waiting: Vec<u64> = blocks.iter().map(|block| block.cluster).collect();
        let (round, rest): (Vec<Block>, Vec<Block>) = blocks
            .into_iter()
            .partition(|block| !block.others.iter().any(|other| waiting.contains(other)));
        blocks = rest;
        if round.is_empty() {
            break;
        }
        let numbers = round.iter().map(|block| block.number);
        empty.rounds.push(numbers.collect());
    }
    let per_block = refcounts.geometry.refcounts_per_block();
    for (&cluster, &number) in &places {
        if !empty.holds(number) {
            continue;
        }
        empty.clusters.push(cluster);
        if !empty.holds(cluster / per_block) {
            empty.counted.push(cluster);
        }
    }
    Ok(empty)
}

/// The cluster behind the last that is counted in blocks that stay.
pub fn end(
    host: &mut dyn Host,
    refcounts: &mut Refcounts<'_>,
    numbers: &[u64],
    empty: &Empty,
) -> Result<u64, Failure> {
    let stay = numbers.iter().copied();
    let stay: Vec<u64> = stay.filter(|&number| !empty.holds(number)).collect();
    refcounts.behind_counted(host, 0, &stay)
}

/// The last blocks, up to the first that counts more than a few clusters. Each
/// is counted once, by a block of the window.
fn candidates(
    host: &mut dyn Host,
    refcounts: &mut Refcounts<'_>,
    numbers: &[u64],
) -> Result<Vec<Block>, Failure> {
    let per_block = refcounts.geometry.refcounts_per_block();
    let mut blocks = Vec::new();
    for &number in numbers.iter().rev() {
        let Some(counted) = refcounts.few_counted(host, number, FEW)? else {
            break;
        };
        let Some(at) = refcounts.block(host, number)? else {
            break;
        };
        let cluster = at.0 / refcounts.geometry.cluster_size();
        let in_window = numbers.binary_search(&(cluster / per_block)).is_ok();
        if !in_window || refcounts.count(host, cluster)? != 1 {
            continue;
        }
        let others = counted.into_iter().filter(|&other| other != cluster);
        blocks.push(Block {
            number,
            cluster,
            others: others.collect(),
        });
    }
    Ok(blocks)
}

/// Keeps those that count each other only.
fn keep_closed(blocks: &mut Vec<Block>) {
    loop {
        let places = places(blocks);
        let before = blocks.len();
        blocks.retain(|block| block.others.iter().all(|other| places.contains_key(other)));
        if blocks.len() == before {
            return;
        }
    }
}

fn places(blocks: &[Block]) -> BTreeMap<u64, u64> {
    let place = |block: &Block| (block.cluster, block.number);
    blocks.iter().map(place).collect()
}

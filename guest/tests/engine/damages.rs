//! Ways to damage a qcow2 image, byte by byte.

/// A qcow2 image to be damaged.
pub struct Image {
    pub bytes: Vec<u8>,
}

/// A damage; `None` where the image has nothing to which it could be done.
pub type Damage = fn(&mut Image) -> Option<()>;

const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

impl Image {
    pub fn new(bytes: Vec<u8>) -> Self {
        Self { bytes }
    }

    pub fn be64(&self, at: u64) -> u64 {
        let at = at as usize;
        u64::from_be_bytes(self.bytes[at..at + 8].try_into().expect("8 bytes"))
    }

    pub fn be32(&self, at: u64) -> u64 {
        self.be64(at) >> 32
    }

    pub fn put(&mut self, at: u64, value: u64) {
        let at = at as usize;
        self.bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
    }

    fn flip(&mut self, at: u64, bits: u64) -> Option<()> {
        self.put(at, self.be64(at) ^ bits);
        Some(())
    }

    pub fn cluster(&self) -> u64 {
        1 << self.be32(20)
    }

    fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn version(&self) -> u64 {
        self.be32(4)
    }

    fn features(&self) -> u64 {
        match self.version() {
            2 => 0,
            _ => self.be64(72),
        }
    }

    fn has_data_file(&self) -> bool {
        self.features() & 4 != 0
    }

    fn refcount_bits(&self) -> u64 {
        match self.version() {
            2 => 16,
            _ => 1 << self.be32(96),
        }
    }

    fn entry_len(&self) -> u64 {
        match self.features() & 16 {
            0 => 8,
            _ => 16,
        }
    }

    /// Places of the active L1 entries that are used.
    fn l1(&self) -> Vec<u64> {
        let entries = (0..self.be32(36)).map(|at| self.be64(40) + at * 8);
        entries.filter(|&at| self.be64(at) != 0).collect()
    }

    /// Places of the L2 entries of the active tree that have `wanted`.
    fn l2(&self, wanted: fn(u64) -> bool) -> Vec<u64> {
        let tables = self.l1().into_iter().map(|at| self.be64(at) & OFFSET);
        let entries = tables.flat_map(|table| {
            let count = self.cluster() / self.entry_len();
            (0..count).map(move |at| table + at * self.entry_len())
        });
        entries.filter(|&at| wanted(self.be64(at))).collect()
    }

    fn data(&self) -> Vec<u64> {
        self.l2(|raw| raw & COMPRESSED == 0 && raw & OFFSET != 0)
    }

    fn compressed(&self) -> Vec<u64> {
        self.l2(|raw| raw & COMPRESSED != 0)
    }

    /// Sets a cluster's count in an existing block.
    pub fn set_count(&mut self, cluster: u64, count: u64) -> Option<()> {
        let bits = self.refcount_bits();
        let per_block = self.cluster() * 8 / bits;
        let block = self.be64(self.be64(48) + cluster / per_block * 8);
        assert_ne!(block, 0, "a refcount block");
        let bit = cluster % per_block * bits;
        let at = (block + bit / 8) as usize;
        if bits < 8 {
            let shift = bit % 8;
            let mask = ((1u32 << bits) - 1) << shift;
            let byte = u32::from(self.bytes[at]);
            self.bytes[at] = (byte & !mask | (count as u32) << shift & mask) as u8;
        } else {
            for (place, byte) in self.bytes[at..at + bits as usize / 8]
                .iter_mut()
                .rev()
                .enumerate()
            {
                *byte = (count >> (8 * place)) as u8;
            }
        }
        Some(())
    }

    fn widest(&self) -> u64 {
        u64::MAX >> (64 - self.refcount_bits())
    }

    fn cluster_of(&self, entry: u64) -> u64 {
        (self.be64(entry) & OFFSET) / self.cluster()
    }
}

/// Every damage by name.
pub const DAMAGES: [(&str, Damage); 34] = [
    ("a leaked cluster at the end", |i| {
        let end = i.len().div_ceil(i.cluster());
        i.bytes
            .resize((end * i.cluster() + i.cluster()) as usize, 0);
        i.set_count(end, 1)
    }),
    ("leaked clusters, one of them twice", |i| {
        let end = i.len().div_ceil(i.cluster());
        i.bytes
            .resize((end * i.cluster() + 3 * i.cluster()) as usize, 0);
        i.set_count(end, 1)?;
        i.set_count(end + 2, 2.min(i.widest()))
    }),
    ("a count of data too high", |i| {
        let at = *i.data().last()?;
        (i.widest() > 3 && !i.has_data_file()).then(|| i.set_count(i.cluster_of(at), 3))?
    }),
    ("a count of data zero", |i| {
        let at = *i.data().last()?;
        (!i.has_data_file()).then(|| i.set_count(i.cluster_of(at), 0))?
    }),
    ("the count of the header zero", |i| i.set_count(0, 0)),
    ("the count of an L2 table zero", |i| {
        i.set_count(i.cluster_of(*i.l1().first()?), 0)
    }),
    ("counts of shared clusters too low", |i| {
        let shared = i.data().into_iter().filter(|&at| i.be64(at) & COPIED == 0);
        let shared: Vec<u64> = shared.map(|at| i.cluster_of(at)).collect();
        shared.first()?;
        shared
            .iter()
            .try_for_each(|&cluster| i.set_count(cluster, 1))
    }),
    ("a copied flag of data wrong", |i| {
        i.flip(*i.data().first()?, COPIED)
    }),
    ("all copied flags of data wrong", |i| {
        i.data().first()?;
        i.data().into_iter().try_for_each(|at| i.flip(at, COPIED))
    }),
    ("a copied flag of an L2 table wrong", |i| {
        i.flip(*i.l1().first()?, COPIED)
    }),
    ("reserved bits in an L1 entry", |i| {
        i.flip(*i.l1().first()?, 0x101)
    }),
    ("reserved bits in an L2 entry", |i| {
        i.flip(*i.data().first()?, 0x7 << 57 | 0x10)
    }),
    ("an L2 entry behind the end", |i| {
        i.put(*i.data().first()?, COPIED | 1 << 40);
        Some(())
    }),
    ("an L2 entry in the cluster behind the end", |i| {
        let end = i.len().next_multiple_of(i.cluster());
        i.put(*i.data().first()?, COPIED | end);
        Some(())
    }),
    ("an L2 entry that is not aligned", |i| {
        i.flip(*i.data().first()?, i.odd()?)
    }),
    ("an L2 entry for zeroes that is not aligned", |i| {
        let at = *i.data().first()?;
        let bits = i.odd()?;
        match i.entry_len() {
            16 => i.put(at + 8, 0xffff_ffff << 32),
            _ => i.flip(at, 1)?,
        }
        i.flip(at, bits)
    }),
    ("an L1 entry that is not aligned", |i| {
        i.flip(*i.l1().first()?, i.odd()?)
    }),
    ("an L1 entry behind the end", |i| {
        i.put(*i.l1().first()?, COPIED | 1 << 41);
        Some(())
    }),
    ("two L2 entries for the same cluster", |i| {
        let data = i.data();
        let &[first, second, ..] = data.as_slice() else {
            return None;
        };
        i.put(first, i.be64(second));
        Some(())
    }),
    ("two L1 entries for the same L2 table", |i| {
        let l1 = i.l1();
        let &[first, second, ..] = l1.as_slice() else {
            return None;
        };
        i.put(first, i.be64(second));
        Some(())
    }),
    ("an L2 entry for its own table", |i| {
        let table = i.be64(*i.l1().first()?);
        i.put(*i.data().first()?, table);
        Some(())
    }),
    ("an L2 entry for the refcount block", |i| {
        let block = i.be64(i.be64(48));
        i.put(*i.data().first()?, COPIED | block);
        Some(())
    }),
    ("an L1 entry for the header", |i| {
        i.put(*i.l1().first()?, COPIED);
        Some(())
    }),
    ("the zero flag in every entry", |i| {
        let plain = i.entry_len() == 8;
        let data = plain.then(|| i.data())?;
        data.first()?;
        data.into_iter().try_for_each(|at| i.flip(at, 1))
    }),
    ("subclusters that are data and zeroes", |i| {
        let at = *i.data().first()?;
        (i.entry_len() == 16).then(|| i.flip(at + 8, 1 << 32))?
    }),
    ("subclusters of no cluster", |i| {
        let at = *i.data().first()?;
        (i.entry_len() == 16).then(|| i.put(at, 0))
    }),
    ("a compressed cluster with a copied flag", |i| {
        i.flip(*i.compressed().first()?, COPIED)
    }),
    ("a compressed cluster behind the end", |i| {
        i.flip(*i.compressed().last()?, 1 << 35)
    }),
    ("a missing refcount block", |i| {
        i.put(i.be64(48), 0);
        Some(())
    }),
    ("a refcount block that is not aligned", |i| {
        i.flip(i.be64(48), i.odd()?)
    }),
    ("a refcount block with reserved bits", |i| {
        i.flip(i.be64(48), 0x21)
    }),
    ("a refcount block twice", |i| {
        let (table, block) = (i.be64(48), i.be64(i.be64(48)));
        i.put(table + 8, block);
        Some(())
    }),
    ("a refcount block behind the end", |i| {
        i.put(i.be64(48) + 8, 1 << 30);
        Some(())
    }),
    ("a bitmap table entry with reserved bits", |i| {
        let extension = (104..600)
            .step_by(8)
            .find(|&at| i.be32(at) == 0x2385_2875)?;
        let directory = i.be64(extension + 8 + 16);
        let table = i.be64(directory);
        i.flip(table, 4)
    }),
];

impl Image {
    /// An offset inside a cluster, in sectors, where clusters have several.
    fn odd(&self) -> Option<u64> {
        (self.cluster() > 512).then_some(512)
    }
}

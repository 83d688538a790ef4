//! New identifiers, from what the host passes in.
//!
//! They have to differ from those of other images; nobody must be unable to
//! guess them.

use crate::proto::Fresh;

/// A sequence of random numbers, and the time.
#[derive(Clone, Debug)]
pub struct Chance {
    state: u64,
    /// Seconds since 1970.
    pub time: u64,
}

impl Chance {
    /// The sequence that a seed stands for.
    pub fn new(fresh: &Fresh) -> Self {
        let (words, _) = fresh.seed.as_chunks::<8>();
        let mut chance = Self {
            state: 0,
            time: fresh.time,
        };
        for word in words {
            chance.state ^= u64::from_le_bytes(*word);
            chance.state = chance.number();
        }
        chance
    }

    /// The next number (the SplitMix64 generator).
    pub fn number(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// The bytes of a random UUID (RFC 9562, version 4), in the order of its text.
    pub fn uuid(&mut self) -> [u8; 16] {
        let number = u128::from(self.number()) << 64 | u128::from(self.number());
        let version = number & !(0xf << 76) | 4 << 76;
        (version & !(3 << 62) | 2 << 62).to_be_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identifiers_differ_within_a_session_and_between_sessions() {
        let mut one = Chance::new(&Fresh {
            seed: [1; 32],
            time: 0,
        });
        let mut other = Chance::new(&Fresh {
            seed: [2; 32],
            time: 0,
        });
        let ids = [one.uuid(), one.uuid(), other.uuid(), other.uuid()];
        for (at, id) in ids.iter().enumerate() {
            assert!(!ids[..at].contains(id));
            assert_eq!((id[6] >> 4, id[8] >> 6), (4, 2));
        }
    }
}

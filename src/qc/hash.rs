//! A 64-bit hash that is the same on every machine and in every version: memory between rows holds hashes, not texts.

/// Hash of bytes: FNV-1a, then the finalizer of MurmurHash3, so that every bit depends on every byte.
#[must_use]
pub fn hash(bytes: &[u8]) -> u64 {
    let fnv = bytes.iter().fold(0xcbf2_9ce4_8422_2325, |h: u64, b| (h ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3));
    mix(fnv)
}

/// Hash of several texts; where one ends counts.
#[must_use]
pub fn hash_parts(parts: &[&str]) -> u64 {
    parts.iter().fold(parts.len() as u64, |h, part| mix(h.rotate_left(23) ^ hash(part.as_bytes())))
}

/// A permutation of all 64-bit numbers.
#[must_use]
pub fn mix(mut h: u64) -> u64 {
    h ^= h >> 33;
    h = h.wrapping_mul(0xff51_afd7_ed55_8ccd);
    h ^= h >> 33;
    h = h.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    h ^ (h >> 33)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn hashes_are_fixed_and_different() {
        assert_eq!(hash(b""), mix(0xcbf2_9ce4_8422_2325));
        let all: HashSet<u64> = (0..100_000u32).map(|i| hash(&i.to_le_bytes())).collect();
        assert_eq!(all.len(), 100_000);
        assert_ne!(hash_parts(&["ab", "c"]), hash_parts(&["a", "bc"]));
        assert_ne!(hash_parts(&["a", ""]), hash_parts(&["a"]));
    }
}

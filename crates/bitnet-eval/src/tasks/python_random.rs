//! Python's `random.Random(seed).sample`: which examples lm-evaluation-harness draws.
//!
//! The generator is the Mersenne Twister with the seed as the key of `init_by_array`; how
//! numbers below a bound and samples are made of it is `random.py` of CPython 3, where
//! neither has changed since 3.2 (`_randbelow_with_getrandbits`, `sample`).

use rand_mt::Mt;

/// A generator that was seeded with a whole number.
#[derive(Debug, Clone)]
pub(super) struct PythonRandom(Mt);

impl PythonRandom {
    /// `random.Random(seed)`.
    pub(super) fn new(seed: u64) -> Self {
        // The digits of the number in base 2^32, the least first, at least one.
        let digits = [seed as u32, (seed >> 32) as u32];
        let len = if digits[1] == 0 { 1 } else { 2 };
        Self(Mt::new_with_key(digits.into_iter().take(len)))
    }

    /// `getrandbits(bits)`, of 1 to 64 bits.
    fn bits(&mut self, bits: u32) -> u64 {
        if bits <= 32 {
            return u64::from(self.0.next_u32() >> (32 - bits));
        }
        let low = u64::from(self.0.next_u32());
        low | u64::from(self.0.next_u32() >> (64 - bits)) << 32
    }

    /// A number below `n`, which is at least 1.
    fn below(&mut self, n: usize) -> usize {
        let bits = usize::BITS - n.leading_zeros();
        loop {
            let drawn = self.bits(bits) as usize;
            if drawn < n {
                return drawn;
            }
        }
    }

    /// `sample(range(n), k)`: `k` different numbers below `n`, in the order drawn.
    /// `k` is at most `n`.
    pub(super) fn sample(&mut self, n: usize, k: usize) -> Vec<usize> {
        // Python takes a list of all or a set of those drawn, whichever is smaller, and
        // the numbers that come out depend on it.
        let mut set_size = 21;
        if k > 5 {
            // `4 ** ceil(log(3k, 4))`; 3k is no power of 4.
            set_size += 4usize.saturating_pow((3 * k).ilog(4) + 1);
        }
        if n <= set_size {
            let mut pool: Vec<usize> = (0..n).collect();
            return (0..k)
                .map(|_| {
                    let at = self.below(pool.len());
                    pool.swap_remove(at)
                })
                .collect();
        }
        let mut drawn = Vec::with_capacity(k);
        while drawn.len() < k {
            let at = self.below(n);
            if !drawn.contains(&at) {
                drawn.push(at);
            }
        }
        drawn
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `scripts/interop/python_random.py` recorded.
    #[test]
    fn numbers_and_samples_are_pythons() {
        let json = include_str!("python_random.json");
        let recorded: serde_json::Value = serde_json::from_str(json).unwrap();
        let mut random = PythonRandom::new(7);
        for pair in recorded["getrandbits_seed_7"].as_array().unwrap() {
            let (bits, drawn) = (pair[0].as_u64().unwrap() as u32, pair[1].as_u64().unwrap());
            assert_eq!(random.bits(bits), drawn, "{bits} bits");
        }
        let cases = recorded["cases"].as_array().unwrap();
        assert!(cases.len() > 20);
        for case in cases {
            let mut random = PythonRandom::new(case["seed"].as_u64().unwrap());
            for draw in case["draws"].as_array().unwrap() {
                let [n, k] = ["n", "k"].map(|key| draw[key].as_u64().unwrap() as usize);
                let expected: Vec<usize> = serde_json::from_value(draw["sample"].clone()).unwrap();
                assert_eq!(random.sample(n, k), expected, "seed {}, {n}, {k}", case["seed"]);
            }
        }
    }
}

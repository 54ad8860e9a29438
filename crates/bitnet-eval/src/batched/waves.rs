//! In which order sequences that begin alike are computed: a tree of their common
//! beginnings, level by level. Everything of one level goes through the model together.

use std::ops::Range;

/// Tokens that sequences must have in common for them to be computed once: fewer are
/// cheaper to compute again than to wait for.
const WORTH_SHARING: usize = 8;

/// What is done together.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Wave {
    /// First, copies of beginnings: from a sequence, to another one, so many tokens.
    pub(super) copies: Vec<(usize, usize, usize)>,
    /// Then, of each sequence once at most, the inputs to run.
    pub(super) pieces: Vec<(usize, Range<usize>)>,
}

/// The waves that run all inputs of every sequence.
///
/// `inputs` are sorted; from `wanted[i]` on, which is below their number, the logits of
/// sequence `i` are wanted, so that it runs them itself. `known[i]` are the tokens that
/// its cache holds already.
pub(super) fn waves(inputs: &[&[u32]], wanted: &[usize], known: &[&[u32]]) -> Vec<Wave> {
    let common = |a: &[u32], b: &[u32]| a.iter().zip(b).take_while(|(a, b)| a == b).count();
    let alike = |i: usize| common(inputs[i], inputs[i + 1]).min(wanted[i]).min(wanted[i + 1]);
    let mut tree = Tree {
        inputs,
        held: (0..inputs.len()).map(|i| common(inputs[i], known[i]).min(wanted[i])).collect(),
        alike: (1..inputs.len()).map(|i| alike(i - 1)).collect(),
        waves: Vec::new(),
    };
    if !inputs.is_empty() {
        tree.split(0..inputs.len(), 0, 0);
    }
    tree.waves
}

struct Tree<'a> {
    inputs: &'a [&'a [u32]],
    /// Inputs of each sequence that its cache holds once what was planned is done.
    held: Vec<usize>,
    /// Inputs that each has in common with the next, and that both may share.
    alike: Vec<usize>,
    waves: Vec<Wave>,
}

impl Tree<'_> {
    fn wave(&mut self, number: usize) -> &mut Wave {
        if self.waves.len() <= number {
            self.waves.resize(number + 1, Wave::default());
        }
        &mut self.waves[number]
    }

    /// Plans neighbours from wave `wave` on, whose first `at` inputs are shared already.
    fn split(&mut self, range: Range<usize>, at: usize, wave: usize) {
        let mut start = range.start;
        for i in range.clone() {
            if i + 1 == range.end || self.alike[i] < at + WORTH_SHARING {
                self.run(start..i + 1, wave);
                start = i + 1;
            }
        }
    }

    /// Plans neighbours that have more in common than what is shared already; or one.
    fn run(&mut self, range: Range<usize>, wave: usize) {
        if range.len() == 1 {
            let i = range.start;
            let piece = (i, self.held[i]..self.inputs[i].len());
            self.wave(wave).pieces.push(piece);
            return;
        }
        let alike = &self.alike[range.start..range.end - 1];
        let shared = alike.iter().copied().min().unwrap_or(0);
        // Who holds most of it computes the rest, and the others copy it.
        let held = |i: &usize| self.held[*i];
        let owner = range.clone().rev().max_by_key(held).unwrap_or(range.start);
        let missing = self.held[owner]..shared;
        let next = wave + usize::from(!missing.is_empty());
        if !missing.is_empty() {
            self.wave(wave).pieces.push((owner, missing));
            self.held[owner] = shared;
        }
        for i in range.clone() {
            if self.held[i] < shared {
                self.wave(next).copies.push((owner, i, shared));
                self.held[i] = shared;
            }
        }
        self.split(range, shared, next);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(inputs: &[&str], wanted: &[usize], known: &[&str]) -> Vec<Wave> {
        let tokens = |texts: &[&str]| -> Vec<Vec<u32>> {
            texts.iter().map(|t| t.bytes().map(u32::from).collect()).collect()
        };
        let (inputs, known) = (tokens(inputs), tokens(known));
        let slices = |v: &'static [Vec<u32>]| v.iter().map(Vec::as_slice).collect::<Vec<_>>();
        waves(&slices(inputs.leak()), wanted, &slices(known.leak()))
    }

    fn wave(copies: &[(usize, usize, usize)], pieces: &[(usize, Range<usize>)]) -> Wave {
        Wave { copies: copies.to_vec(), pieces: pieces.to_vec() }
    }

    #[test]
    fn a_question_is_computed_once_and_copied() {
        // Two questions of two choices; the answers' first letters are wanted.
        let inputs = ["question one: a", "question one: bb", "question two: c", "question two: d"];
        let empty = [""; 4];
        let waves = plan(&inputs, &[13; 4], &empty);
        let expected = [
            wave(&[], &[(0, 0..9)]),
            wave(
                &[(0, 1, 9), (0, 2, 9), (0, 3, 9)],
                &[(0, 9..15), (1, 9..16), (2, 9..15), (3, 9..15)],
            ),
        ];
        // "question " is shared by all, " one: " and " two: " are too short to be.
        assert_eq!(waves, expected);
        let inputs = [
            "the first of two: a",
            "the first of two: b",
            "then, a second: c",
            "then, a second: d",
        ];
        let waves = plan(&inputs, &[17, 17, 15, 15], &empty);
        let expected = [
            wave(&[], &[(0, 0..17), (2, 0..15)]),
            wave(&[(0, 1, 17), (2, 3, 15)], &[(0, 17..19), (1, 17..19), (2, 15..17), (3, 15..17)]),
        ];
        assert_eq!(waves, expected);
    }

    #[test]
    fn what_a_cache_holds_is_not_computed_again() {
        let inputs = ["examples, long. one: a", "examples, long. one: b", "examples, long. two: c"];
        let known = ["", "examples, long. nil: x", "examples, s"];
        let waves = plan(&inputs, &[20; 3], &known);
        // The second one holds "examples, long. " of both; nothing is missing there.
        let pieces = [(0, 16..22), (1, 16..22), (2, 16..22)];
        assert_eq!(waves, [wave(&[(1, 0, 16), (1, 2, 16)], &pieces)]);
    }

    #[test]
    fn inputs_whose_logits_are_wanted_are_run_by_each() {
        let same = ["one and the same text"; 3];
        let waves = plan(&same, &[20, 12, 3], &[""; 3]);
        assert_eq!(
            waves,
            [
                wave(&[], &[(0, 0..12), (2, 0..21)]),
                wave(&[(0, 1, 12)], &[(0, 12..21), (1, 12..21)])
            ]
        );
        // A cache that holds more than that does not help.
        let waves = plan(&same[..1], &[4], &same[..1]);
        assert_eq!(waves, [wave(&[], &[(0, 4..21)])]);
        assert!(plan(&[], &[], &[]).is_empty());
    }

    #[test]
    fn beginnings_within_beginnings_take_a_wave_each() {
        let inputs = ["12345678abcdefghX", "12345678abcdefghY", "12345678zz"];
        let waves = plan(&inputs, &[16, 16, 9], &[""; 3]);
        assert_eq!(
            waves,
            [
                wave(&[], &[(0, 0..8)]),
                wave(&[(0, 1, 8), (0, 2, 8)], &[(0, 8..16), (2, 8..10)]),
                wave(&[(0, 1, 16)], &[(0, 16..17), (1, 16..17)]),
            ]
        );
    }
}

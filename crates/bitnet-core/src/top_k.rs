//! Top-K sparsification of activations (Q-Sparse, arXiv:2407.10969; BitNet a4.8,
//! arXiv:2411.04965): of one token's activations those of greatest magnitude are kept,
//! the others become 0. The greatest one always stays, so that the scale of an absmax
//! quantiser is the same before and after.

/// How many of `cols` activations a share keeps: `round(share · cols)`, half to even, at
/// least 1 and at most all.
#[must_use]
pub fn kept(share: f64, cols: usize) -> usize {
    ((share * cols as f64).round_ties_even() as usize).clamp(1, cols.max(1))
}

/// Sets all but `keep` activations of a token to 0. Those of greatest magnitude stay; of
/// equal magnitudes the first ones do. What is not a number stays and does not count.
///
/// `magnitudes` is working space, of any contents.
pub fn top_k(row: &mut [f32], keep: usize, magnitudes: &mut Vec<f32>) {
    if keep >= row.len() {
        return;
    }
    magnitudes.clear();
    // In the total order NaN is the greatest: it would push a number out.
    magnitudes.extend(row.iter().map(|x| if x.is_nan() { -1.0 } else { x.abs() }));
    let last = keep.saturating_sub(1);
    let (_, &mut least, _) = magnitudes.select_nth_unstable_by(last, |a, b| b.total_cmp(a));
    let above = row.iter().filter(|x| x.abs() > least).count();
    let mut room = keep.saturating_sub(above);
    for x in row {
        let magnitude = x.abs();
        let stays = magnitude > least || magnitude.is_nan() || (magnitude == least && room > 0);
        if magnitude == least && room > 0 {
            room -= 1;
        }
        if !stays {
            *x = 0.0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The definition by a stable sort.
    fn by_sorting(row: &[f32], keep: usize) -> Vec<f32> {
        let mut order: Vec<usize> = (0..row.len()).collect();
        order.sort_by(|&a, &b| row[b].abs().total_cmp(&row[a].abs()));
        let mut out = vec![0.0; row.len()];
        order.into_iter().take(keep).for_each(|i| out[i] = row[i]);
        out
    }

    #[test]
    fn keeps_what_a_stable_sort_puts_first() {
        let mut space = vec![7.0; 3];
        for cols in [1, 2, 7, 64, 301] {
            // Few different magnitudes, of both signs: many ties, also at the threshold.
            let coarse: Vec<f32> = (0..cols).map(|i| ((i * 37 + 11) % 9) as f32 - 4.0).collect();
            let fine: Vec<f32> = (0..cols).map(|i| (i as f32 * 1.7).sin() * 3.0).collect();
            for row in [coarse, fine, vec![-2.5; cols], vec![0.0; cols]] {
                for keep in [1, cols / 3, cols / 2, cols - 1, cols].map(|k| k.max(1)) {
                    let mut got = row.clone();
                    top_k(&mut got, keep, &mut space);
                    assert_eq!(got, by_sorting(&row, keep), "{keep} of {row:?}");
                }
            }
        }
    }

    #[test]
    fn the_greatest_stays_and_nan_is_seen() {
        let mut row = [0.5, f32::NAN, -3.0, 3.0, 1.0];
        top_k(&mut row, 1, &mut Vec::new());
        assert!(row[1].is_nan());
        assert_eq!([row[0], row[2], row[3], row[4]], [0.0, -3.0, 0.0, 0.0]);
    }

    #[test]
    fn shares_become_counts() {
        let cases = [(0.5, 64, 32), (0.5, 7, 4), (0.5, 5, 2), (0.55, 100, 55), (1e-9, 8, 1)];
        for (share, cols, want) in cases.into_iter().chain([(1.0, 9, 9), (0.3, 10, 3)]) {
            assert_eq!(kept(share, cols), want, "{share} of {cols}");
        }
    }
}

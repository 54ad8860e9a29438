//! Means of unequal pieces, and how far they may be off.

/// `Σ a / Σ b` over pieces (windows, documents) that are taken as independent draws
/// of one kind, and its standard error: `√(n/(n-1) · Σ (aᵢ - R·bᵢ)²) / Σ b`, the
/// linearised variance of a ratio (Cochran, Sampling Techniques, section 6.4).
///
/// The error is `None` for fewer than two pieces; both are where `Σ b` is 0.
#[must_use]
pub fn ratio(pieces: &[(f64, f64)]) -> (Option<f64>, Option<f64>) {
    let a: f64 = pieces.iter().map(|p| p.0).sum();
    let b: f64 = pieces.iter().map(|p| p.1).sum();
    if b <= 0.0 {
        return (None, None);
    }
    let r = a / b;
    let n = pieces.len() as f64;
    let squares: f64 = pieces.iter().map(|(a, b)| (a - r * b).powi(2)).sum();
    let error = (pieces.len() > 1).then(|| (n / (n - 1.0) * squares).sqrt() / b);
    (Some(r), error)
}

/// The standard error of a mean of `n` values with these sums, the values taken as
/// independent: `√((Σx²/n - mean²) / (n - 1))`; `None` for fewer than two.
#[must_use]
pub fn mean_error(n: u64, sum: f64, sum_of_squares: f64) -> Option<f64> {
    let count = n as f64;
    let mean = sum / count;
    (n > 1).then(|| ((sum_of_squares / count - mean * mean).max(0.0) / (count - 1.0)).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_pieces_give_the_error_of_a_mean() {
        let values = [1.0, 2.0, 4.0, 9.0];
        let (mean, error) = ratio(&values.map(|v| (v, 1.0)));
        // Standard deviation with n - 1, over the root of n.
        let deviation = ((9.0 + 4.0 + 0.0 + 25.0) / 3.0f64).sqrt();
        assert_eq!(mean, Some(4.0));
        assert!((error.unwrap() - deviation / 2.0).abs() < 1e-12);
        let squares = values.iter().map(|v| v * v).sum();
        let same = mean_error(4, 16.0, squares).unwrap();
        assert!((same - deviation / 2.0).abs() < 1e-12);
    }

    #[test]
    fn pieces_in_proportion_leave_no_error() {
        let (r, error) = ratio(&[(2.0, 1.0), (6.0, 3.0), (20.0, 10.0)]);
        assert_eq!((r, error), (Some(2.0), Some(0.0)));
    }

    #[test]
    fn too_few_pieces_have_no_error() {
        assert_eq!(ratio(&[]), (None, None));
        assert_eq!(ratio(&[(1.0, 0.0)]), (None, None));
        assert_eq!(ratio(&[(3.0, 2.0)]), (Some(1.5), None));
        assert_eq!(mean_error(1, 1.0, 1.0), None);
    }
}

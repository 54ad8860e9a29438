//! The statistics of repeated measurements.

/// The median of some rates and how far they spread.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Spread {
    /// The smallest.
    pub min: f64,
    /// The median; of an even number the mean of the middle two.
    pub median: f64,
    /// The largest.
    pub max: f64,
    /// How many there were.
    pub count: usize,
}

impl Spread {
    /// Of at least one value; zeros of none.
    #[must_use]
    pub fn of(values: &[f64]) -> Self {
        let mut values = values.to_vec();
        values.sort_by(f64::total_cmp);
        let count = values.len();
        let (Some(&min), Some(&max)) = (values.first(), values.last()) else {
            return Self { min: 0.0, median: 0.0, max: 0.0, count };
        };
        let median = f64::midpoint(values[(count - 1) / 2], values[count / 2]);
        Self { min, median, max, count }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_spreads() {
        for (values, min, median, max) in [
            (&[3.0, 1.0, 2.0][..], 1.0, 2.0, 3.0),
            (&[4.0, 1.0, 2.0, 3.0], 1.0, 2.5, 4.0),
            (&[7.0], 7.0, 7.0, 7.0),
            (&[], 0.0, 0.0, 0.0),
        ] {
            assert_eq!(Spread::of(values), Spread { min, median, max, count: values.len() });
        }
    }
}

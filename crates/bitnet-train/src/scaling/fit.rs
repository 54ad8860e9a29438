//! Power laws of loss against size, `L(N) = E + A·N^-α`, and what noise does to them.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StudentT};
use serde::Serialize;

/// Draws of [`resample`].
const DRAWS: usize = 2000;
/// The exponents that are tried.
const EXPONENTS: (f64, f64) = (0.005, 3.0);

/// The mean loss of the runs of one size.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Point {
    /// Parameters, N.
    pub parameters: f64,
    /// Mean over the runs, nats per token.
    pub mean: f64,
    /// How many runs: the weight of the point.
    pub runs: usize,
}

/// `L(N) = floor + scale·N^-exponent`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct PowerLaw {
    /// E, the loss of an endless model, nats per token; 0 where no positive one fits.
    pub floor: f64,
    /// A.
    pub scale: f64,
    /// α.
    pub exponent: f64,
}

impl PowerLaw {
    /// The loss at N parameters.
    #[must_use]
    pub fn at(&self, parameters: f64) -> f64 {
        self.floor + self.scale * parameters.powf(-self.exponent)
    }

    /// The law with the least squares of the means, weighted by their runs; none with
    /// fewer than four sizes, which three unknowns would meet exactly.
    #[must_use]
    pub fn fit(points: &[Point]) -> Option<Self> {
        if points.len() < 4 {
            return None;
        }
        // For a given exponent the rest is a line: least squares by formula. The
        // exponent is searched on a grid of logarithms and then between its neighbours.
        let (low, high) = (EXPONENTS.0.ln(), EXPONENTS.1.ln());
        let step = (high - low) / 200.0;
        let error = |x: f64| line(points, x.exp()).1;
        let best = (0..=200)
            .map(|i| low + step * f64::from(i))
            .min_by(|a, b| error(*a).total_cmp(&error(*b)))?;
        let x = golden(error, (best - step).max(low), (best + step).min(high));
        Some(line(points, x.exp()).0)
    }

    /// Whether the exponent lies inside what was tried: at its ends the points do not
    /// tell one.
    #[must_use]
    pub fn identified(&self) -> bool {
        self.scale > 0.0 && self.exponent > EXPONENTS.0 * 1.05 && self.exponent < EXPONENTS.1 / 1.05
    }
}

/// The best floor and scale for an exponent, neither below 0, and the squares left.
fn line(points: &[Point], exponent: f64) -> (PowerLaw, f64) {
    // Sizes in units of their geometric mean, so that powers stay near 1.
    let logs = points.iter().map(|p| p.parameters.ln());
    let unit = (logs.sum::<f64>() / points.len() as f64).exp();
    let terms =
        || points.iter().map(|p| (p.runs as f64, (p.parameters / unit).powf(-exponent), p.mean));
    let sum = |f: &dyn Fn(f64, f64) -> f64| terms().map(|(w, x, y)| w * f(x, y)).sum::<f64>();
    let n = sum(&|_, _| 1.0);
    let (mx, my) = (sum(&|x, _| x) / n, sum(&|_, y| y) / n);
    let slope = sum(&|x, y| (x - mx) * (y - my)) / sum(&|x, _| (x - mx).powi(2));
    let (floor, scale) = match (my - slope * mx, slope) {
        (_, slope) if slope <= 0.0 => (my, 0.0),
        (floor, _) if floor < 0.0 => (0.0, sum(&|x, y| x * y) / sum(&|x, _| x * x)),
        found => found,
    };
    let left = sum(&|x, y| (y - floor - scale * x).powi(2));
    (PowerLaw { floor, scale: scale * unit.powf(exponent), exponent }, left)
}

/// Where a function with one valley between the ends is least.
fn golden(f: impl Fn(f64) -> f64, mut low: f64, mut high: f64) -> f64 {
    let ratio = (5f64.sqrt() - 1.0) / 2.0;
    while high - low > 1e-7 {
        let (a, b) = (high - ratio * (high - low), low + ratio * (high - low));
        if f(a) < f(b) { high = b } else { low = a }
    }
    f64::midpoint(low, high)
}

/// A straight line over the decades of size: `at 1M + per_decade·log10(N/1M)`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Trend {
    /// The value at one million parameters.
    pub at_1m: f64,
    /// What a tenfold size adds.
    pub per_decade: f64,
}

impl Trend {
    /// The value at N parameters.
    #[must_use]
    pub fn at(&self, parameters: f64) -> f64 {
        self.at_1m + self.per_decade * (parameters / 1e6).log10()
    }

    /// Weighted least squares; none with fewer than three sizes.
    #[must_use]
    pub fn fit(points: &[Point]) -> Option<Self> {
        if points.len() < 3 {
            return None;
        }
        let terms = || points.iter().map(|p| (p.runs as f64, (p.parameters / 1e6).log10(), p.mean));
        let sum = |f: &dyn Fn(f64, f64) -> f64| terms().map(|(w, x, y)| w * f(x, y)).sum::<f64>();
        let n = sum(&|_, _| 1.0);
        let (mx, my) = (sum(&|x, _| x) / n, sum(&|_, y| y) / n);
        let per_decade = sum(&|x, y| (x - mx) * (y - my)) / sum(&|x, _| (x - mx).powi(2));
        Some(Self { at_1m: my - per_decade * mx, per_decade })
    }
}

/// How far runs of one kind that differ in their seed alone lie apart.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Noise {
    /// Standard deviation of one run, nats per token, pooled over the sizes.
    pub sd: f64,
    /// Degrees of freedom: runs less sizes.
    pub freedom: usize,
}

impl Noise {
    /// Of the losses of each size; none where no size has two.
    #[must_use]
    pub fn pooled<'a>(sizes: impl Iterator<Item = &'a [f64]>) -> Option<Self> {
        let (mut squares, mut freedom) = (0.0, 0);
        for losses in sizes.filter(|l| l.len() > 1) {
            let mean = losses.iter().sum::<f64>() / losses.len() as f64;
            squares += losses.iter().map(|l| (l - mean).powi(2)).sum::<f64>();
            freedom += losses.len() - 1;
        }
        (freedom > 0).then(|| Self { sd: (squares / freedom as f64).sqrt(), freedom })
    }

    /// Half of the interval that holds the true mean of `runs` runs in 95 of 100 cases,
    /// by Student's t.
    #[must_use]
    pub fn half(&self, runs: usize) -> f64 {
        let mut draws = self.draws(0);
        let mut all: Vec<f64> = (0..20 * DRAWS).map(|_| draws().abs()).collect();
        all.sort_by(f64::total_cmp);
        all[all.len() * 95 / 100] / (runs as f64).sqrt()
    }

    fn draws(&self, seed: u64) -> impl FnMut() -> f64 {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        // Degrees of freedom are 1 at least.
        let student = StudentT::new(self.freedom.max(1) as f64);
        let sd = self.sd;
        move || student.as_ref().map_or(0.0, |t| sd * t.sample(&mut rng))
    }
}

/// The middle 95 of 100 of a figure when the points move by their noise.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Interval {
    /// The lower end.
    pub low: f64,
    /// The upper end.
    pub high: f64,
}

/// Fits again and again with every point moved by noise (Student's t over the square
/// root of its runs): the parametric bootstrap. One interval for each figure that
/// `figures` returns.
pub fn resample<const F: usize>(
    points: &[Point],
    noise: Noise,
    figures: impl Fn(&[Point]) -> Option<[f64; F]>,
) -> Option<[Interval; F]> {
    let mut draws = noise.draws(1);
    let mut all: Vec<[f64; F]> = Vec::with_capacity(DRAWS);
    for _ in 0..DRAWS {
        let moved: Vec<Point> = points
            .iter()
            .map(|p| Point { mean: p.mean + draws() / (p.runs as f64).sqrt(), ..*p })
            .collect();
        all.push(figures(&moved)?);
    }
    Some(std::array::from_fn(|i| {
        let mut column: Vec<f64> = all.iter().map(|f| f[i]).collect();
        column.sort_by(f64::total_cmp);
        Interval { low: column[DRAWS / 40], high: column[DRAWS - 1 - DRAWS / 40] }
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn points(law: impl Fn(f64) -> f64) -> Vec<Point> {
        [0.5e6, 1e6, 2e6, 4e6, 8e6, 16e6]
            .map(|n| Point { parameters: n, mean: law(n), runs: 3 })
            .to_vec()
    }

    #[test]
    fn finds_the_law_that_made_the_points() {
        for (floor, scale, exponent) in [(1.76, 185.0, 0.26), (3.0, 40.0, 0.4), (0.5, 8.0, 0.05)] {
            let law = PowerLaw { floor, scale, exponent };
            let found = PowerLaw::fit(&points(|n| law.at(n))).unwrap();
            assert!((found.floor - floor).abs() < 1e-3, "{found:?}");
            assert!((found.scale / scale - 1.0).abs() < 1e-3, "{found:?}");
            assert!((found.exponent - exponent).abs() < 1e-4, "{found:?}");
            assert!(found.identified());
        }
    }

    #[test]
    fn no_floor_below_zero_and_no_law_from_what_does_not_fall() {
        // Steeper with every decade, as no power law with a floor is.
        let bent = PowerLaw::fit(&points(|n| 9.0 - n.log10() - 0.2 * (n.log10() - 6.0).powi(2)));
        assert_eq!(bent.unwrap().floor, 0.0);
        let flat = PowerLaw::fit(&points(|_| 4.0)).unwrap();
        assert!(!flat.identified() && (flat.at(1e6) - 4.0).abs() < 1e-9);
        assert_eq!(PowerLaw::fit(&points(|_| 4.0)[..3]), None);
    }

    #[test]
    fn a_trend_is_a_line_over_decades() {
        let found = Trend::fit(&points(|n| 0.4 - 0.1 * (n / 1e6).log10())).unwrap();
        assert!((found.at_1m - 0.4).abs() < 1e-12 && (found.per_decade + 0.1).abs() < 1e-12);
        assert!((found.at(1e7) - 0.3).abs() < 1e-12);
    }

    #[test]
    fn noise_is_pooled_and_widens_the_intervals() {
        let sizes: [&[f64]; 3] = [&[1.0, 1.2], &[3.0], &[2.0, 2.1, 2.2]];
        let noise = Noise::pooled(sizes.into_iter()).unwrap();
        assert_eq!(noise.freedom, 3);
        assert!((noise.sd - (0.04f64 / 3.0).sqrt()).abs() < 1e-12);
        assert_eq!(Noise::pooled([&[1.0][..]].into_iter()), None);
        // Student's t with three degrees of freedom: 3.182.
        assert!((noise.half(1) / noise.sd - 3.182).abs() < 0.1, "{}", noise.half(1));
        let law = PowerLaw { floor: 3.0, scale: 40.0, exponent: 0.4 };
        let figures = |p: &[Point]| PowerLaw::fit(p).map(|f| [f.exponent, f.at(2e6)]);
        let width = |sd: f64| {
            let noise = Noise { sd, freedom: 12 };
            let [exponent, loss] = resample(&points(|n| law.at(n)), noise, figures).unwrap();
            assert!(exponent.low < 0.4 && exponent.high > 0.4, "{exponent:?}");
            assert!(loss.low < law.at(2e6) && loss.high > law.at(2e6));
            loss.high - loss.low
        };
        assert!(width(0.001) < width(0.01) && width(0.01) < 0.03);
    }
}

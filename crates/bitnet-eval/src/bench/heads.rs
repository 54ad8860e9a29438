//! The best token of a hidden state by each scan of the head, alone.

use std::hint::black_box;
use std::time::Instant;

use bitnet_engine::{
    EngineError, HeadCounts, HeadMode, Model, Session, SessionOptions, TracePoint,
};

use super::{pseudo_text, rounds};

/// The cosine of a hidden state with a row in [`Hidden::Near`]. Rows of random heads
/// have at most about `4.5/√D` with one that points nowhere (0.09 for D = 2560);
/// trained heads have winners that stand out.
pub const COSINE: f32 = 0.25;

/// Hidden states that are searched in turn.
const STATES: usize = 8;

/// Which hidden states a head is measured on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hidden {
    /// The model's own, after tokens without a pattern.
    Own,
    /// Those, turned towards a row of the head until their cosine with it is
    /// [`COSINE`].
    Near,
}

impl Hidden {
    /// All kinds.
    pub const ALL: [Self; 2] = [Self::Own, Self::Near];

    /// What the names of tests end with.
    pub(super) fn suffix(self) -> &'static str {
        match self {
            Self::Own => "",
            Self::Near => "_near",
        }
    }
}

/// A session for each mode and kind of hidden states: what a search finds out about
/// one kind decides how the next is made.
pub(super) struct Heads(Vec<Head>);

struct Head {
    mode: HeadMode,
    hidden: Hidden,
    session: Session,
    states: Vec<Vec<f32>>,
    /// Searches in a measurement, once known.
    searches: usize,
}

impl Heads {
    /// On the threads of `session`, with its options.
    pub(super) fn new(
        session: &Session,
        options: &SessionOptions,
        scans: &[(HeadMode, Hidden)],
    ) -> Result<Self, EngineError> {
        let heads = scans.iter().map(|&(head, hidden)| {
            let options = SessionOptions { head, context: Some(STATES), ..options.clone() };
            let workers = session.workers().clone();
            let mut session = Session::with_workers(session.model(), &options, workers)?;
            let states = states(&mut session, hidden)?;
            Ok(Head { mode: head, hidden, session, states, searches: 0 })
        });
        Ok(Self(heads.collect::<Result<_, EngineError>>()?))
    }

    fn position(&self, mode: HeadMode, hidden: Hidden) -> Option<usize> {
        self.0.iter().position(|head| (head.mode, head.hidden) == (mode, hidden))
    }

    /// Searches a second; the first call finds out how many a measurement needs.
    pub(super) fn measure(&mut self, mode: HeadMode, hidden: Hidden) -> Result<f64, EngineError> {
        let Some(at) = self.position(mode, hidden) else { return Ok(0.0) };
        let head = &mut self.0[at];
        if head.searches == 0 {
            let seconds = head.run(STATES)?;
            head.searches = STATES * rounds(seconds);
        }
        Ok(head.searches as f64 / head.run(head.searches)?.max(1e-9))
    }

    /// What the searches so far read.
    pub(super) fn counts(&self, mode: HeadMode, hidden: Hidden) -> Option<HeadCounts> {
        Some(self.0[self.position(mode, hidden)?].session.head_counts())
    }
}

impl Head {
    /// The seconds of some searches.
    fn run(&mut self, searches: usize) -> Result<f64, EngineError> {
        let start = Instant::now();
        for h in self.states.iter().cycle().take(searches) {
            black_box(self.session.top_of_hidden(h, 1)?);
        }
        Ok(start.elapsed().as_secs_f64())
    }
}

/// Some hidden states of the model.
fn states(session: &mut Session, hidden: Hidden) -> Result<Vec<Vec<f32>>, EngineError> {
    let model = session.model().clone();
    let config = model.config();
    let count = STATES.min(session.context());
    let mut all = Vec::new();
    let text = pseudo_text(count, config.vocab_size);
    session.trace(&text, &mut |point| {
        if let TracePoint::Final { x } = point {
            all.extend_from_slice(x);
        }
    })?;
    let states = all.chunks_exact(config.hidden_size).zip(0..);
    Ok(states
        .map(|(h, i)| match hidden {
            Hidden::Own => h.to_vec(),
            Hidden::Near => towards(&model, i * 997 % config.vocab_size, h),
        })
        .collect())
}

/// `h`, turned until its cosine with a row of the head is [`COSINE`].
fn towards(model: &Model, row: usize, h: &[f32]) -> Vec<f32> {
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
    };
    let mut w = vec![0.0; h.len()];
    model.head().read_row(row, &mut w);
    let (square, norm) = (dot(&w, &w).max(1e-30), dot(h, h).sqrt());
    let along = dot(&w, h) / square;
    let across: Vec<f32> =
        h.iter().zip(&w).map(|(&h, &w)| (f64::from(h) - along * f64::from(w)) as f32).collect();
    let cosine = f64::from(COSINE);
    let of_row = cosine * norm / square.sqrt();
    let of_rest = (1.0 - cosine * cosine).sqrt() * norm / dot(&across, &across).sqrt().max(1e-30);
    across
        .iter()
        .zip(&w)
        .map(|(&x, &w)| (of_rest * f64::from(x) + of_row * f64::from(w)) as f32)
        .collect()
}

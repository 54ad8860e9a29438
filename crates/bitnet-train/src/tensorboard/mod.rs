//! TensorBoard event files, `<run>/tensorboard/events.out.tfevents.*`: the numbers
//! of `metrics.jsonl` as curves, the samples as texts.

mod proto;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use bitnet_format::atomic::write_atomic;

use self::proto::{Event, SessionLog, Summary, Value, frame, unframe};
use crate::error::with_path;
use crate::metrics::{Metric, Sample, WeightMetric};

/// How the name of every event file begins; a time follows, so that names sort as
/// the files came about.
const PREFIX: &str = "events.out.tfevents.";

/// The event file of one start of a run.
#[derive(Debug)]
pub struct Events {
    path: PathBuf,
    file: File,
}

impl Events {
    /// Opens a new file in `folder` for a run that goes on after step `after`, or
    /// begins. Events beyond that step, which a run wrote after its last checkpoint,
    /// are removed from the files of earlier starts; TensorBoard, which may have
    /// read them, is told by a restart event.
    ///
    /// # Errors
    /// I/O errors, with the path.
    pub fn open(folder: &Path, after: Option<u64>) -> io::Result<Self> {
        fs::create_dir_all(folder).map_err(with_path(folder))?;
        let old = files(folder)?;
        for path in &old {
            match after {
                Some(step) => cut(path, step)?,
                None => fs::remove_file(path).map_err(with_path(path))?,
            }
        }
        let newest = old.iter().filter_map(|path| seconds(path)).max();
        let now = wall_time() as u64;
        let second = newest.map_or(now, |newest| now.max(newest + 1));
        let name = format!("{PREFIX}{second:010}.bitnet-train.{}", std::process::id());
        let path = folder.join(name);
        let file = OpenOptions::new().append(true).create(true).open(&path);
        let mut events = Self { file: file.map_err(with_path(&path))?, path };
        let version = Some("brain.Event:2".to_owned());
        events.write(&Event { file_version: version, ..event(0) })?;
        if let Some(step) = after {
            events.write(&Event { session_log: Some(SessionLog::start()), ..event(step + 1) })?;
        }
        Ok(events)
    }

    /// Writes the numbers of a metric.
    ///
    /// # Errors
    /// I/O errors, with the path.
    pub fn metric(&mut self, metric: &Metric) -> io::Result<()> {
        let scalar = |tag: &str, value: f64| Value::scalar(tag, value);
        let values = match metric {
            Metric::Train(m) => {
                let mut values = vec![
                    scalar("train/loss", m.loss),
                    scalar("train/lr", m.lr),
                    scalar("train/grad_norm", m.grad_norm),
                    scalar("speed/tokens_per_second", m.tokens_per_second),
                    scalar("speed/data_seconds", m.data_seconds),
                ];
                values.extend(m.rss_bytes.map(|b| scalar("memory/rss_bytes", b as f64)));
                values
            }
            Metric::Eval(m) => vec![scalar("val/loss", m.val_loss)],
            Metric::Weights(m) => weights(m),
        };
        self.summary(metric.step(), values)
    }

    /// Writes a sample.
    ///
    /// # Errors
    /// I/O errors, with the path.
    pub fn sample(&mut self, sample: &Sample) -> io::Result<()> {
        // Indented, so that Markdown leaves the text as it is.
        let text = format!("    {}", sample.text.replace('\n', "\n    "));
        self.summary(sample.step, vec![Value::text(format!("sample/{}", sample.prompt), &text)])
    }

    fn summary(&mut self, step: u64, values: Vec<Value>) -> io::Result<()> {
        self.write(&Event { summary: Some(Summary { values }), ..event(step) })
    }

    /// One write for an event: a kill leaves none but the last one cut off.
    fn write(&mut self, event: &Event) -> io::Result<()> {
        self.file.write_all(&frame(event)).map_err(with_path(&self.path))
    }
}

fn weights(m: &WeightMetric) -> Vec<Value> {
    let whole = [("zero_share", Some(m.zero_share)), ("flip_rate", m.flip_rate)];
    let mut values: Vec<Value> = whole
        .into_iter()
        .filter_map(|(tag, x)| Some(Value::scalar(format!("weights/{tag}"), x?)))
        .collect();
    for layer in &m.layers {
        let name = layer.layer.trim_start_matches("model.layers.");
        values.push(Value::scalar(format!("zero_share/{name}"), layer.share(layer.zero)));
        let rate = layer.flip_rate();
        values.extend(rate.map(|x| Value::scalar(format!("flip_rate/{name}"), x)));
    }
    values
}

fn event(step: u64) -> Event {
    Event { wall_time: wall_time(), step: step as i64, ..Event::default() }
}

/// Seconds since 1970.
fn wall_time() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

/// The event files in a folder, in the order of their names.
fn files(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).map_err(with_path(folder))? {
        let path = entry.map_err(with_path(folder))?.path();
        if name(&path).starts_with(PREFIX) {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

fn name(path: &Path) -> &str {
    path.file_name().and_then(|n| n.to_str()).unwrap_or("")
}

fn seconds(path: &Path) -> Option<u64> {
    name(path).strip_prefix(PREFIX)?.split('.').next()?.parse().ok()
}

/// Removes the events of later steps from a file, and one cut off at its end.
fn cut(path: &Path, step: u64) -> io::Result<()> {
    let bytes = fs::read(path).map_err(with_path(path))?;
    let (mut keep, mut at) = (Vec::new(), 0);
    while let Some((event, length)) = unframe(&bytes[at..]) {
        if event.step <= step as i64 {
            keep.extend_from_slice(&bytes[at..at + length]);
        }
        at += length;
    }
    if keep.len() == bytes.len() {
        return Ok(());
    }
    write_atomic(path, |w| w.write_all(&keep))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::{EvalMetric, LayerWeights};

    fn eval(step: u64) -> Metric {
        Metric::Eval(EvalMetric { step, val_loss: step as f64 / 2.0, tokens: 1, seconds: 1.0 })
    }

    fn read(folder: &Path) -> Vec<Vec<Event>> {
        let all = files(folder).unwrap();
        let read = |path: &PathBuf| {
            let bytes = fs::read(path).unwrap();
            let (mut events, mut at) = (Vec::new(), 0);
            while at < bytes.len() {
                let (event, length) = unframe(&bytes[at..]).unwrap();
                at += length;
                events.push(event);
            }
            events
        };
        all.iter().map(read).collect()
    }

    /// The bytes of tensorboard 2.21's own `RecordWriter`.
    #[test]
    fn frames_are_those_of_tensorboard() {
        let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
        let version = Some("brain.Event:2".to_owned());
        let first = Event { file_version: version, ..Event::default() };
        let values = vec![Value::scalar("a", 0.5)];
        let summary = Some(Summary { values });
        let second = Event { wall_time: 2.0, step: 7, summary, ..Event::default() };
        for (event, expected) in [
            (first, "0f000000000000006d532b091a0d627261696e2e4576656e743a32fc985129"),
            (
                second,
                "1700000000000000e7cef81e09000000000000004010072a0a0a080a0161150000003f0414b791",
            ),
        ] {
            let bytes = frame(&event);
            assert_eq!(hex(&bytes), expected);
            assert_eq!(unframe(&bytes).unwrap(), (event, bytes.len()));
        }
    }

    #[test]
    fn events_after_the_checkpoint_are_removed_and_restarted() {
        let dir = tempfile::tempdir().unwrap();
        let mut events = Events::open(dir.path(), None).unwrap();
        for step in 1..=5 {
            events.metric(&eval(step)).unwrap();
        }
        let torn = [fs::read(&events.path).unwrap(), vec![9, 0, 0]].concat();
        fs::write(&events.path, torn).unwrap();
        let mut events = Events::open(dir.path(), Some(3)).unwrap();
        events.metric(&eval(4)).unwrap();
        let found = read(dir.path());
        let steps: Vec<Vec<i64>> =
            found.iter().map(|f| f.iter().map(|e| e.step).collect()).collect();
        assert_eq!(steps, [vec![0, 1, 2, 3], vec![0, 4, 4]]);
        assert_eq!(found[1][1].session_log, Some(SessionLog::start()));
        let value = &found[1][2].summary.as_ref().unwrap().values[0];
        assert_eq!((value.tag.as_str(), value.simple_value), ("val/loss", Some(2.0)));
        // A run that begins anew in the folder leaves nothing of the old one.
        drop(Events::open(dir.path(), None).unwrap());
        assert_eq!(read(dir.path()).concat().len(), 1);
    }

    #[test]
    fn every_flipped_bit_is_found() {
        let bytes = frame(&Event { summary: None, ..event(7) });
        for bit in 0..bytes.len() * 8 {
            let mut broken = bytes.clone();
            broken[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(unframe(&broken), None, "bit {bit}");
        }
        assert!((0..bytes.len()).all(|n| unframe(&bytes[..n]).is_none()));
    }

    #[test]
    fn layers_have_curves_of_their_own() {
        let layer = "model.layers.0.mlp.up_proj".to_owned();
        let (minus, zero, plus) = (25, 50, 25);
        let mut l = LayerWeights { layer, weights: 100, minus, zero, plus, flips: Some(10) };
        let tags = |l: &LayerWeights| -> Vec<(String, f32)> {
            let m = WeightMetric::new((1, 2, 3.0), None, vec![l.clone()]);
            weights(&m).into_iter().map(|v| (v.tag, v.simple_value.unwrap())).collect()
        };
        let pair = |tag: &str, x| (tag.to_owned(), x);
        assert_eq!(
            tags(&l),
            [
                pair("weights/zero_share", 0.5),
                pair("weights/flip_rate", 0.1),
                pair("zero_share/0.mlp.up_proj", 0.5),
                pair("flip_rate/0.mlp.up_proj", 0.1),
            ]
        );
        l.flips = None;
        assert_eq!(tags(&l).len(), 2);
    }
}

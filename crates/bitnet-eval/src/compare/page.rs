//! The comparison as one HTML page. It loads nothing, from nowhere: style and charts are
//! in it, and there is no script.

use minijinja::{Environment, Value, context};

use super::charts::{bars, color, trade};
use super::table::capitalised;
use super::{Comparison, count, short};
use crate::EvalError;

/// The page as text.
///
/// # Errors
/// What the library for templates says; nothing that a comparison can cause.
pub fn page(comparison: &Comparison) -> Result<String, EvalError> {
    let metrics = comparison.metrics();
    let charts: Vec<Value> = metrics
        .iter()
        .filter(|metric| metric.chart)
        .map(|metric| {
            let better = match metric.less {
                Some(true) => "less is better",
                Some(false) => "more is better",
                None => "",
            };
            let svg = Value::from_safe_string(bars(comparison, metric));
            context! { title => metric.name.clone(), better, svg }
        })
        .collect();
    let rows: Vec<Value> = metrics
        .iter()
        .map(|metric| {
            let cells = metric.values.iter().enumerate().map(|(i, value)| {
                let text = value.map_or("–".to_owned(), metric.text);
                let ratio = metric.ratio(i).map(|r| format!("{}×", short(r)));
                context! { text, ratio, best => value.is_some_and(|v| metric.is_best(v)) }
            });
            let cells: Vec<Value> = cells.collect();
            context! { name => metric.name.clone(), cells }
        })
        .collect();
    let models: Vec<Value> = comparison
        .models
        .iter()
        .enumerate()
        .map(|(i, m)| {
            context! {
                label => m.label.clone(),
                color => color(i),
                form => m.form.clone(),
                model => m.model.clone(),
                parameters => count(m.parameters),
                sentence => (i > 0).then(|| comparison.sentence(i)),
            }
        })
        .collect();
    let mut environment = Environment::new();
    environment
        .add_template("page.html", include_str!("page.html"))
        .and_then(|()| environment.get_template("page.html"))
        .and_then(|template| {
            template.render(context! {
                models,
                summary => comparison.summary(),
                charts,
                rows,
                trade => trade(comparison).map(Value::from_safe_string),
                conditions => comparison.conditions_text(),
                energy => comparison.energy.as_ref().map(|e| capitalised(&e.to_string())),
                text_hash => comparison.conditions.text_hash.clone(),
                version => env!("CARGO_PKG_VERSION"),
            })
        })
        .map_err(|e| EvalError::Page(e.to_string()))
}

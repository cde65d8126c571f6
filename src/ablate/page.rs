//! `ablation.html`: the views with their intervals, and which orderings the data show.

use minijinja::Environment;
use serde::Serialize;

use super::{Ablation, Cell, ViewRow};
use crate::{
    error::Result,
    metric::{Better, Unit},
    stage::report::{
        STYLE,
        chart::{self, Point, Row},
        failed, words,
    },
};

/// Metrics that get a figure, where they occur.
const FIGURES: [&str; 6] = [
    "right_answers",
    "hallucination_rate",
    "over_refusal_rate",
    "accuracy_on_positives",
    "clinical_accuracy",
    "risk_level",
];

#[derive(Serialize)]
struct Page<'a> {
    style: &'static str,
    ablation: &'a Ablation,
    lead: String,
    columns: Vec<Column>,
    rows: Vec<Line>,
    claims: Vec<Test>,
    figures: Vec<(String, String)>,
    plane: Option<String>,
}

#[derive(Serialize)]
struct Column {
    name: String,
    direction: &'static str,
}

#[derive(Serialize)]
struct Line {
    name: String,
    about: String,
    train_rows: usize,
    cells: Vec<(String, String)>,
}

#[derive(Serialize)]
struct Test {
    metric: String,
    better: String,
    worse: String,
    value: String,
    interval: String,
    p: String,
    result: String,
    class: &'static str,
}

/// Renders the page.
///
/// # Errors
/// The template does not fit its data.
pub fn html(ablation: &Ablation) -> Result<String> {
    let mut environment = Environment::new();
    environment
        .add_template("ablation.html", include_str!("ablation.html"))
        .map_err(|e| failed("the template is malformed", e))?;
    let template = environment.get_template("ablation.html").map_err(|e| failed("no template", e))?;
    let keys = keys(ablation);
    let page = Page {
        style: STYLE,
        ablation,
        lead: lead(ablation),
        columns: keys.iter().filter_map(|key| column(ablation, key)).collect(),
        rows: ablation.views.iter().map(|view| line(view, &keys)).collect(),
        claims: ablation.claims.iter().map(test).collect(),
        figures: FIGURES.iter().filter_map(|key| figure(ablation, key)).collect(),
        plane: plane(ablation),
    };
    template.render(minijinja::value::Serde(&page)).map_err(|e| failed("the template does not fit its data", e))
}

/// How many of the predicted orderings are shown.
pub(super) fn lead(ablation: &Ablation) -> String {
    let count = |result: &str| ablation.claims.iter().filter(|c| c.result == result).count();
    let opposite = match count("the opposite is shown") {
        0 => "none is contradicted".to_string(),
        n => format!("{n} the other way round"),
    };
    format!(
        "Of {} orderings that the method predicts, {} are shown by {} held-out questions about {} images; {opposite}.{}",
        ablation.claims.len(),
        count("shown"),
        ablation.rows,
        ablation.images,
        open(ablation),
    )
}

/// The orderings that no metric shows, by name: what a reader would else take for shown.
fn open(ablation: &Ablation) -> String {
    let shown = |better: &str, worse: &str| {
        ablation.claims.iter().any(|c| c.better == better && c.worse == worse && c.result == "shown")
    };
    let mut names: Vec<String> = Vec::new();
    for c in ablation.claims.iter().filter(|c| !shown(&c.better, &c.worse)) {
        let name = format!("{} over {}", c.better, c.worse);
        if !names.contains(&name) {
            names.push(name);
        }
    }
    if names.is_empty() { String::new() } else { format!(" Not shown by any measure: {}.", names.join(", ")) }
}

fn find<'a>(view: &'a ViewRow, key: &str) -> Option<&'a Cell> {
    view.metrics.iter().find(|c| c.key == key)
}

/// Keys of all metrics, in their order.
fn keys(ablation: &Ablation) -> Vec<String> {
    let mut keys: Vec<String> = Vec::new();
    for cell in ablation.views.iter().flat_map(|v| &v.metrics) {
        if !keys.contains(&cell.key) {
            keys.push(cell.key.clone());
        }
    }
    keys
}

fn column(ablation: &Ablation, key: &str) -> Option<Column> {
    let cell = ablation.views.iter().find_map(|v| find(v, key))?;
    let direction = if cell.better == Better::Lower { "lower is better" } else { "higher is better" };
    Some(Column { name: cell.name.clone(), direction })
}

fn line(view: &ViewRow, keys: &[String]) -> Line {
    let cell = |key: &String| match find(view, key) {
        Some(c) => (words::value(c.estimate.value, c.unit), words::interval(c.estimate.interval, c.unit, false)),
        None => ("–".into(), String::new()),
    };
    Line {
        name: view.name.clone(),
        about: view.about.clone(),
        train_rows: view.train_rows,
        cells: keys.iter().map(cell).collect(),
    }
}

fn test(c: &super::Claim) -> Test {
    Test {
        metric: c.metric.clone(),
        better: c.better.clone(),
        worse: c.worse.clone(),
        value: c.difference.value.map_or("–".into(), |v| words::number(v, c.unit, true)),
        interval: words::interval(c.difference.interval, c.unit, true),
        p: words::p_value(c.difference.p_holm),
        result: c.result.clone(),
        class: match c.result.as_str() {
            "shown" => "better",
            "the opposite is shown" => "worse",
            _ => "",
        },
    }
}

fn figure(ablation: &Ablation, key: &str) -> Option<(String, String)> {
    let first = ablation.views.iter().find_map(|v| find(v, key))?;
    let below: Vec<String> = ablation
        .views
        .iter()
        .map(|v| if v.train_rows == 0 { "untrained".into() } else { format!("{} rows", v.train_rows) })
        .collect();
    let rows = ablation.views.iter().zip(&below).filter_map(|(v, below)| {
        let class = if v.train_rows == 0 { "base" } else { "tuned" };
        Some(Row { name: &v.name, below, estimates: vec![(&find(v, key)?.estimate, class)] })
    });
    let title = format!("{} of every view with 95 % intervals", first.name);
    let svg = chart::intervals(&title, first.unit, &rows.collect::<Vec<_>>())?;
    let direction = if first.better == Better::Lower { "lower is better" } else { "higher is better" };
    let scale = if first.unit == Unit::Score { ", from 1 to 10" } else { "" };
    Some((format!("{}, {direction}{scale}.", first.name), svg))
}

fn plane(ablation: &Ablation) -> Option<String> {
    let points = ablation.views.iter().filter_map(|v| {
        let class = if v.train_rows == 0 { "base" } else { "tuned" };
        let (x, y) = (find(v, "over_refusal_rate")?, find(v, "refutation_accuracy")?);
        Some(Point { name: &v.name, class, x: &x.estimate, y: &y.estimate })
    });
    chart::plane(
        "Refutation of false premises against denial of true findings",
        "over-refusal: true findings denied",
        "false premises refuted rightly",
        &points.collect::<Vec<_>>(),
    )
}

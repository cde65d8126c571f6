//! Figures as inline SVG. Colours are classes of the page's style sheet, so that they follow light and dark mode.

use std::fmt::Write;

use super::MetricRow;
use crate::{metric::Unit, statistics::Estimate, train::log::LogLine};

/// One line of a chart.
struct Series<'a> {
    name: &'a str,
    class: &'a str,
    points: Vec<(f64, f64)>,
}

/// Area of a chart: width and height of the picture, and its margins.
const SIZE: (f64, f64) = (560.0, 260.0);
const LEFT: f64 = 58.0;
const RIGHT: f64 = 14.0;
const TOP: f64 = 14.0;
const BOTTOM: f64 = 40.0;
/// Height of the legend of a file of its own.
const LEGEND: f64 = 20.0;

/// Points a line is thinned to at most.
const MOST_POINTS: usize = 600;

/// Training and validation loss by step; none without a logged loss.
pub(super) fn loss(log: &[LogLine]) -> Option<String> {
    let pick = |f: fn(&LogLine) -> Option<f64>| -> Vec<(f64, f64)> {
        log.iter().filter_map(|r| Some((r.step as f64, f(r).filter(|v| v.is_finite())?))).collect()
    };
    let train = pick(|r| r.loss);
    let smooth = smoothed(&train);
    let series = [
        Series { name: "training, each log line", class: "faint", points: train },
        Series { name: "training, running mean", class: "train", points: smooth },
        Series { name: "validation", class: "valid", points: pick(|r| r.eval_loss) },
    ];
    chart("Loss per supervised token by optimizer step", "loss per token", &series, false)
}

/// [`loss`] as a file of its own, with its colours and its legend in it.
pub(crate) fn loss_file(log: &[LogLine]) -> Option<String> {
    const STYLE: &str = "<style>svg{background:#fff;font-family:sans-serif}text{fill:#5d646e;font-size:12px}.end{text-anchor:end}\
                         .middle{text-anchor:middle}.grid{stroke:#ebe8e1}.axis{stroke:#a9adb3}.line{fill:none;stroke-width:2}\
                         .line.faint{stroke:#a9adb3;stroke-width:1}.line.train{stroke:#22252a}.line.valid{stroke:#85499b}\
                         .dot.valid{fill:#85499b}</style>";
    let chart = loss(log)?;
    let (svg, _) = chart.split_once("</svg>")?;
    let (head, body) = svg.split_once("</title>")?;
    let head = head.replacen("<svg ", "<svg xmlns=\"http://www.w3.org/2000/svg\" ", 1);
    // room for the legend above the figure
    let (width, height) = SIZE;
    let taller = format!(r#"viewBox="0 -{LEGEND} {width} {0}" width="{width}" height="{0}""#, height + LEGEND);
    let head =
        head.replacen(&format!(r#"viewBox="0 0 {width} {height}" width="{width}" height="{height}""#), &taller, 1);
    let mut out = format!("{head}</title>{STYLE}{body}");
    let mut x = LEFT;
    for (name, class) in [("training", "faint"), ("running mean", "train"), ("validation", "valid")] {
        if body.contains(&format!("class=\"line {class}\"")) {
            let _ = write!(out, r#"<path class="line {class}" d="M{x:.0} -8h18"/>"#);
            text(&mut out, "", x + 24.0, -4.0, name);
            x += 130.0;
        }
    }
    Some(out + "</svg>\n")
}

/// Learning rate by step; none without one.
pub(super) fn learning_rate(log: &[LogLine]) -> Option<String> {
    let points = log.iter().filter_map(|r| Some((r.step as f64, r.learning_rate?))).collect();
    let series = [Series { name: "learning rate", class: "train", points }];
    chart("Learning rate by optimizer step", "learning rate", &series, true)
}

/// Mean over a window of a twentieth of the curve.
fn smoothed(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let half = points.len() / 40;
    if half == 0 {
        return Vec::new();
    }
    (0..points.len())
        .map(|i| {
            let window = &points[i.saturating_sub(half)..(i + half + 1).min(points.len())];
            (points[i].0, window.iter().map(|p| p.1).sum::<f64>() / window.len() as f64)
        })
        .collect()
}

fn chart(title: &str, label: &str, series: &[Series<'_>], from_zero: bool) -> Option<String> {
    let all = || series.iter().flat_map(|s| &s.points);
    all().next()?;
    let range = |pick: fn(&(f64, f64)) -> f64| {
        all().map(pick).fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), v| (a.min(v), b.max(v)))
    };
    let (x0, x1) = range(|p| p.0);
    let (mut y0, y1) = range(|p| p.1);
    // A curve that comes near zero is shown from zero.
    if from_zero || (y0 >= 0.0 && y0 < 0.4 * y1) {
        y0 = y0.min(0.0);
    }
    let y_ticks = ticks(y0, y1, 5);
    let (y0, y1) = (y0.min(y_ticks[0]), y1.max(*y_ticks.last()?));
    let (x1, y1) = (if x1 > x0 { x1 } else { x0 + 1.0 }, if y1 > y0 { y1 } else { y0 + 1.0 });
    let x = |v: f64| LEFT + (v - x0) / (x1 - x0) * (SIZE.0 - LEFT - RIGHT);
    let y = |v: f64| SIZE.1 - BOTTOM - (v - y0) / (y1 - y0) * (SIZE.1 - TOP - BOTTOM);

    let mut svg = open(title, SIZE.0, SIZE.1);
    for tick in &y_ticks {
        line(&mut svg, "grid", LEFT, y(*tick), SIZE.0 - RIGHT, y(*tick));
        text(&mut svg, "tick end", LEFT - 7.0, y(*tick) + 4.0, &short(*tick, y_ticks[1] - y_ticks[0]));
    }
    for tick in ticks(x0, x1, 6).into_iter().filter(|t| *t >= x0 && *t <= x1 && t.fract() == 0.0) {
        line(&mut svg, "axis", x(tick), SIZE.1 - BOTTOM, x(tick), SIZE.1 - BOTTOM + 4.0);
        text(&mut svg, "tick middle", x(tick), SIZE.1 - BOTTOM + 17.0, &short(tick, 1.0));
    }
    line(&mut svg, "axis", LEFT, SIZE.1 - BOTTOM, SIZE.0 - RIGHT, SIZE.1 - BOTTOM);
    text(&mut svg, "label middle", (LEFT + SIZE.0 - RIGHT) / 2.0, SIZE.1 - 5.0, "optimizer step");
    let middle = (TOP + SIZE.1 - BOTTOM) / 2.0;
    let _ = write!(
        svg,
        r#"<text class="label middle" transform="translate(12 {middle:.1}) rotate(-90)">{}</text>"#,
        escape(label)
    );
    for s in series.iter().filter(|s| !s.points.is_empty()) {
        path(&mut svg, s, x, y);
    }
    svg.push_str("</svg>");
    let shown: Vec<_> = series.iter().filter(|s| !s.points.is_empty()).collect();
    if shown.len() > 1 {
        svg.push_str("<p class=\"legend\">");
        for s in shown {
            let _ = write!(svg, r#"<span><i class="{}"></i>{}</span>"#, s.class, escape(s.name));
        }
        svg.push_str("</p>");
    }
    Some(svg)
}

fn path(svg: &mut String, s: &Series<'_>, x: impl Fn(f64) -> f64, y: impl Fn(f64) -> f64) {
    let step = s.points.len().div_ceil(MOST_POINTS);
    let last = s.points.len() - 1;
    let mut d = String::new();
    for (i, p) in s.points.iter().enumerate().filter(|(i, _)| i % step == 0 || *i == last) {
        let _ = write!(d, "{}{:.1} {:.1}", if i == 0 { "M" } else { "L" }, x(p.0), y(p.1));
    }
    let _ = write!(svg, r#"<path class="line {}" d="{d}"/>"#, s.class);
    if s.class == "valid" && s.points.len() <= 40 {
        for p in &s.points {
            let _ = write!(svg, r#"<circle class="dot {}" cx="{:.1}" cy="{:.1}" r="2.6"/>"#, s.class, x(p.0), y(p.1));
        }
    }
}

/// One row of a chart of intervals: a name, a line below it, and the estimates with their classes.
pub(crate) struct Row<'a> {
    pub(crate) name: &'a str,
    pub(crate) below: &'a str,
    pub(crate) estimates: Vec<(&'a Estimate, &'a str)>,
}

/// Base and tuned with their intervals, one row a metric of `unit`; none if there is none.
pub(super) fn forest(metrics: &[MetricRow], unit: Unit) -> Option<String> {
    let rows = metrics.iter().filter(|m| m.unit == unit).map(|m| {
        let direction = match m.better {
            crate::metric::Better::Lower => "lower is better",
            crate::metric::Better::Higher => "higher is better",
        };
        let (name, rest) = m.name.split_once(", ").unwrap_or((&m.name, direction));
        Row { name, below: rest, estimates: vec![(&m.base, "base"), (&m.tuned, "tuned")] }
    });
    let title = match unit {
        Unit::Share => "Shares of the base and the tuned model with 95 % intervals",
        Unit::Score => "Scores of the base and the tuned model with 95 % intervals",
    };
    intervals(title, unit, &rows.collect::<Vec<_>>())
}

/// Estimates with their intervals, row below row, on the whole range of `unit`; none without rows.
pub(crate) fn intervals(title: &str, unit: Unit, rows: &[Row<'_>]) -> Option<String> {
    const NAME: f64 = 172.0;
    const WIDE: f64 = 520.0;
    let most = rows.iter().map(|r| r.estimates.len()).max()?;
    let height = if most > 1 { 46.0 } else { 38.0 };
    let (low, high, marks): (f64, f64, &[f64]) = match unit {
        Unit::Share => (0.0, 1.0, &[0.0, 0.25, 0.5, 0.75, 1.0]),
        Unit::Score => (1.0, 10.0, &[1.0, 4.0, 7.0, 10.0]),
    };
    let end = height * rows.len() as f64 + 8.0;
    let x = |v: f64| NAME + (v - low) / (high - low) * (WIDE - NAME - 22.0);
    let mut svg = open(title, WIDE, end + 26.0);
    for mark in marks {
        line(&mut svg, "grid", x(*mark), 4.0, x(*mark), end);
        let label = if unit == Unit::Share { format!("{:.0} %", 100.0 * mark) } else { format!("{mark:.0}") };
        text(&mut svg, "tick middle", x(*mark), end + 17.0, &label);
    }
    for (i, row) in rows.iter().enumerate() {
        let top = 8.0 + height * i as f64;
        text(&mut svg, "name end", NAME - 16.0, top + if most > 1 { 19.0 } else { 15.0 }, row.name);
        text(&mut svg, "tick end", NAME - 16.0, top + if most > 1 { 33.0 } else { 29.0 }, row.below);
        for (k, (estimate, class)) in row.estimates.iter().enumerate() {
            let at = top + if most > 1 { 14.0 + 16.0 * k as f64 } else { 17.0 };
            let Some(v) = estimate.value else { continue };
            if let Some([a, b]) = estimate.interval {
                line(&mut svg, &format!("bar {class}"), x(a), at, x(b), at);
            }
            let _ = write!(svg, r#"<circle class="dot {class}" cx="{:.1}" cy="{at:.1}" r="5"/>"#, x(v));
        }
    }
    svg.push_str("</svg>");
    Some(svg)
}

/// A point of [`plane`]: its name, its class, and both estimates.
pub(crate) struct Point<'a> {
    pub(crate) name: &'a str,
    pub(crate) class: &'a str,
    pub(crate) x: &'a Estimate,
    pub(crate) y: &'a Estimate,
}

/// Two shares against each other with both intervals: refusing too much against refusing too little.
pub(crate) fn plane(title: &str, x_label: &str, y_label: &str, points: &[Point<'_>]) -> Option<String> {
    const SIDE: f64 = 352.0;
    const LOW: f64 = 66.0;
    const HIGH: f64 = 354.0;
    let points: Vec<_> = points.iter().filter(|p| p.x.value.is_some() && p.y.value.is_some()).collect();
    points.first()?;
    let (x, y) = (|v: f64| LOW + v * (HIGH - LOW), |v: f64| 14.0 + (1.0 - v) * (HIGH - LOW));
    let mut svg = open(title, HIGH + 130.0, SIDE);
    for mark in [0.0, 0.25, 0.5, 0.75, 1.0] {
        line(&mut svg, "grid", x(mark), y(0.0), x(mark), y(1.0));
        line(&mut svg, "grid", x(0.0), y(mark), x(1.0), y(mark));
        text(&mut svg, "tick middle", x(mark), y(0.0) + 17.0, &format!("{:.0} %", 100.0 * mark));
        text(&mut svg, "tick end", x(0.0) - 7.0, y(mark) + 4.0, &format!("{:.0} %", 100.0 * mark));
    }
    text(&mut svg, "label middle", (LOW + HIGH) / 2.0, SIDE - 4.0, x_label);
    let middle = (y(0.0) + y(1.0)) / 2.0;
    let _ = write!(
        svg,
        r#"<text class="label middle" transform="translate(11 {middle:.1}) rotate(-90)">{}</text>"#,
        escape(y_label)
    );
    // Labels that would cover each other move down.
    let mut labels: Vec<(f64, f64, &str)> = Vec::new();
    for p in &points {
        let (Some(px), Some(py)) = (p.x.value, p.y.value) else { continue };
        if let Some([a, b]) = p.x.interval {
            line(&mut svg, &format!("bar {}", p.class), x(a), y(py), x(b), y(py));
        }
        if let Some([a, b]) = p.y.interval {
            line(&mut svg, &format!("bar {}", p.class), x(px), y(a), x(px), y(b));
        }
        let _ = write!(svg, r#"<circle class="dot {}" cx="{:.1}" cy="{:.1}" r="5"/>"#, p.class, x(px), y(py));
        labels.push((x(px) + 9.0, y(py) - 7.0, p.name));
    }
    labels.sort_by(|a, b| a.1.total_cmp(&b.1));
    let mut placed: Vec<(f64, f64)> = Vec::new();
    for (lx, mut ly, name) in labels {
        while placed.iter().any(|(px, py)| (lx - px).abs() < 90.0 && (ly - py).abs() < 13.0) {
            ly += 2.0;
        }
        placed.push((lx, ly));
        text(&mut svg, "tick", lx, ly, name);
    }
    svg.push_str("</svg>");
    Some(svg)
}

/// Round values that span a range: steps of 1, 2 or 5 times a power of ten.
fn ticks(low: f64, high: f64, about: usize) -> Vec<f64> {
    let span = if high > low { high - low } else { high.abs().max(1.0) };
    let raw = span / about as f64;
    let power = 10f64.powf(raw.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * power).find(|s| *s >= raw * 0.999).unwrap_or(power);
    let first = (low / step).floor() as i64;
    let last = (high.max(low + step * 0.5) / step - 1e-9).ceil() as i64;
    (first..=last).map(|i| i as f64 * step).collect()
}

/// A number with as many digits as its step needs.
fn short(v: f64, step: f64) -> String {
    if v == 0.0 {
        return "0".into();
    }
    if step < 1e-3 {
        let text = format!("{v:.1e}");
        return text.replace(".0e", "e").replace("e-", "e\u{2212}");
    }
    let digits = (-step.log10().floor()).max(0.0) as usize;
    format!("{v:.digits$}")
}

fn open(title: &str, width: f64, height: f64) -> String {
    format!(
        r#"<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" aria-label="{t}"><title>{t}</title>"#,
        t = escape(title)
    )
}

fn line(svg: &mut String, class: &str, x1: f64, y1: f64, x2: f64, y2: f64) {
    let _ = write!(svg, r#"<line class="{class}" x1="{x1:.1}" y1="{y1:.1}" x2="{x2:.1}" y2="{y2:.1}"/>"#);
}

fn text(svg: &mut String, class: &str, x: f64, y: f64, words: &str) {
    let _ = write!(svg, r#"<text class="{class}" x="{x:.1}" y="{y:.1}">{}</text>"#, escape(words));
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_cover_the_range() {
        assert_eq!(ticks(0.0, 1.0, 5), [0.0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0]);
        assert_eq!(ticks(1.0, 240.0, 6), [0.0, 50.0, 100.0, 150.0, 200.0, 250.0]);
        let few = ticks(3.0, 3.0, 5);
        assert!(few.len() >= 2 && few[0] <= 3.0 && few[few.len() - 1] >= 3.0, "{few:?}");
    }

    #[test]
    fn curves_without_points_are_not_drawn_and_odd_values_do_no_harm() {
        assert_eq!(loss(&[]), None);
        assert_eq!(learning_rate(&[LogLine { step: 1, loss: Some(1.0), ..LogLine::default() }]), None);
        let one = [LogLine { step: 1, loss: Some(f64::NAN), eval_loss: Some(2.0), ..LogLine::default() }];
        let svg = loss(&one).unwrap();
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    }
}

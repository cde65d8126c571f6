//! `report.html`: one file without external assets, from the numbers and a template.

use std::{collections::HashMap, io::Cursor, path::Path};

use base64::{Engine, engine::general_purpose::STANDARD};
use image::{ImageFormat, ImageReader, Limits};
use minijinja::Environment;
use serde::Serialize;

use super::{
    BROWSER, CategoryRow, Change, ControlRow, Inputs, MetricRow, Probes, Report, STYLE, TABLES, chart, failed,
    numbers::{Judged, correct, join},
    published::{VQA_COLUMNS, WHY_3, why_2},
    tables, words,
};
use crate::{
    error::Result,
    judge::{Outcome, Scores, Stance, last_answer, last_question},
    metric::{Better, Unit},
    sample::Polarity,
    stage::{controls::Control, eval::Which},
    statistics::{Difference, Estimate},
};

/// Longest side of an image in the page.
const IMAGE_SIDE: u32 = 384;
/// Bytes of images that a page holds at most; cards after that have none.
const MOST_BYTES: usize = 24 << 20;
/// Files up to this size in a format of the web are taken as they are.
const SMALL_FILE: u64 = 48 * 1024;

/// A value with its interval.
#[derive(Serialize)]
struct Cell {
    value: String,
    interval: String,
    n: usize,
    images: usize,
}

/// A row of the headline table or of the table by category.
#[derive(Serialize)]
struct Line {
    name: String,
    about: String,
    group: String,
    rows: String,
    unscored: String,
    base: Cell,
    tuned: Cell,
    difference: Cell,
    p: String,
    raw_p: String,
    detectable: String,
    finding: &'static str,
    judgement: &'static str,
}

/// A model's answer to an example.
#[derive(Serialize)]
struct Said {
    who: &'static str,
    answer: String,
    verdict: &'static str,
    stance: &'static str,
    scores: Option<String>,
    reason: String,
}

/// An example.
#[derive(Serialize)]
struct Card {
    id: String,
    change: &'static str,
    class: Change,
    category: String,
    premise: &'static str,
    images: Vec<Picture>,
    question: String,
    reference: String,
    provenance: String,
    said: [Said; 2],
}

/// A control of one model.
#[derive(Serialize)]
struct ControlLine {
    name: String,
    changed: Cell,
    right: Option<Cell>,
    gain: Option<Cell>,
    p: String,
    finding: &'static str,
    judgement: &'static str,
}

/// What a model does with pairs of premises.
#[derive(Serialize)]
struct ProbeLine {
    name: &'static str,
    pairs: usize,
    cells: Vec<Cell>,
}

/// An image, or why there is none.
#[derive(Clone, Serialize)]
struct Picture {
    uri: Option<String>,
    problem: String,
    small: bool,
}

/// One kind of change in the bar of changes.
#[derive(Serialize)]
struct Part {
    name: &'static str,
    class: &'static str,
    rows: usize,
    percent: f64,
}

/// All that the template uses. Figures are SVG that this program escaped itself; everything else the template escapes.
#[derive(Serialize)]
struct Page<'a> {
    style: &'static str,
    browser: &'static str,
    title: &'static str,
    lead: String,
    report: &'a Report,
    metrics: Vec<Line>,
    categories: Vec<Line>,
    strata: Vec<(String, Vec<Line>)>,
    table_2: Vec<tables::Line>,
    columns_2: Vec<&'static str>,
    why_2: Vec<String>,
    table_3: Vec<tables::VqaLine>,
    columns_3: Vec<&'static str>,
    why_3: &'static [&'static str],
    controls: Vec<ControlLine>,
    probes: Vec<ProbeLine>,
    plane: Option<String>,
    forest_share: Option<String>,
    forest_score: Option<String>,
    loss: Option<String>,
    learning_rate: Option<String>,
    drop: Option<Cell>,
    cards: Vec<Card>,
    changes: Vec<Part>,
    plan: String,
    judge: String,
}

/// Renders the page.
///
/// # Errors
/// The rows do not belong together, or the template does not fit its data.
pub fn html(inputs: &Inputs, report: &Report) -> Result<String> {
    let mut environment = Environment::new();
    environment
        .add_template("report.html", include_str!("report.html"))
        .map_err(|e| failed("the report's template is malformed", e))?;
    environment.add_template("tables.html", TABLES).map_err(|e| failed("the tables' template is malformed", e))?;
    let template = environment.get_template("report.html").map_err(|e| failed("no template", e))?;
    let hallucination = report.metrics.iter().any(|m| m.key == "hallucination_rate");
    let plan = toml::to_string_pretty(&inputs.plan).map_err(|e| failed("the plan has no TOML form", e))?;
    let judge = serde_json::to_string_pretty(&report.judge).map_err(|e| failed("the judge has no JSON form", e))?;
    let page = Page {
        style: STYLE,
        browser: BROWSER,
        title: if hallucination { "Hallucination before and after tuning" } else { "Answers before and after tuning" },
        lead: lead(report),
        report,
        metrics: report.metrics.iter().map(line).collect(),
        categories: categories(&report.categories),
        strata: report.strata.iter().map(|s| (s.title.clone(), categories(&s.rows))).collect(),
        table_2: if report.table_2.is_empty() { Vec::new() } else { tables::table_2(&report.table_2) },
        columns_2: tables::COLUMNS.iter().map(|c| c.1).collect(),
        why_2: why_2(&inputs.plan.data.source),
        table_3: report.table_3.as_ref().map_or_else(Vec::new, |ours| tables::table_3(Some(ours))),
        columns_3: VQA_COLUMNS.iter().map(|c| c.1).collect(),
        why_3: &WHY_3,
        controls: report.controls.iter().map(control).collect(),
        probes: probes(report),
        plane: plane(report),
        forest_share: chart::forest(&report.metrics, Unit::Share),
        forest_score: chart::forest(&report.metrics, Unit::Score),
        loss: chart::loss(&inputs.log),
        learning_rate: chart::learning_rate(&inputs.log),
        drop: report.quality.as_ref().map(|q| cell(&q.drop_rate, Unit::Share)),
        cards: cards(inputs, report)?,
        changes: changes(report),
        plan,
        judge,
    };
    template
        .render(minijinja::value::Serde(&page))
        .map_err(|e| failed("the report's template does not fit its data", e))
}

/// The first sentence: the main metric in words.
fn lead(report: &Report) -> String {
    let main = ["hallucination_rate", "closed_accuracy", "open_recall"];
    let Some(m) = main.iter().find_map(|key| report.metrics.iter().find(|m| m.key == *key)) else {
        return "No row could be scored.".into();
    };
    let change = match words::improvement(m.difference.finding, m.better) {
        Some(true) => "an improvement",
        Some(false) => "a deterioration",
        None => m.difference.finding.words(),
    };
    format!(
        "{} before tuning: {}. After: {}, {change}, on {} questions about {} held-out images.",
        m.name,
        words::value(m.base.value, m.unit),
        words::value(m.tuned.value, m.unit),
        m.tuned.n,
        m.tuned.clusters,
    )
}

fn cell(e: &Estimate, unit: Unit) -> Cell {
    Cell {
        value: words::value(e.value, unit),
        interval: words::interval(e.interval, unit, false),
        n: e.n,
        images: e.clusters,
    }
}

fn difference(d: &Difference, unit: Unit) -> Cell {
    Cell {
        value: d.value.map_or("–".into(), |v| words::number(v, unit, true)),
        interval: words::interval(d.interval, unit, true),
        n: d.n,
        images: d.clusters,
    }
}

fn judgement(d: &Difference, better: Better) -> &'static str {
    match words::improvement(d.finding, better) {
        Some(true) => "better",
        Some(false) => "worse",
        None => "",
    }
}

fn rows(base: &Estimate, tuned: &Estimate) -> String {
    if base.n == tuned.n { tuned.n.to_string() } else { format!("{} / {}", base.n, tuned.n) }
}

fn line(m: &MetricRow) -> Line {
    let [base, tuned] = m.unscored;
    Line {
        name: m.name.clone(),
        about: m.about.clone(),
        group: String::new(),
        rows: rows(&m.base, &m.tuned),
        unscored: if base + tuned == 0 { String::new() } else { format!("{base} / {tuned}") },
        base: cell(&m.base, m.unit),
        tuned: cell(&m.tuned, m.unit),
        difference: difference(&m.difference, m.unit),
        p: words::p_value(m.difference.p_holm.or(m.difference.p)),
        raw_p: words::p_value(m.difference.p),
        detectable: m.difference.detectable.map_or_else(String::new, |d| words::number(d, m.unit, false)),
        finding: m.difference.finding.words(),
        judgement: judgement(&m.difference, m.better),
    }
}

/// Rows of the table by category; the second metric of a category does not repeat its name.
fn categories(rows: &[CategoryRow]) -> Vec<Line> {
    let again =
        |i: usize| i > 0 && (rows[i - 1].polarity, &rows[i - 1].category) == (rows[i].polarity, &rows[i].category);
    rows.iter().enumerate().map(|(i, row)| category(row, again(i))).collect()
}

fn category(c: &CategoryRow, again: bool) -> Line {
    Line {
        name: if again { String::new() } else { words::plain(&c.category) },
        about: c.name.clone(),
        group: match c.polarity {
            Some(Polarity::Hallucination) => "Questions with a false premise".into(),
            Some(Polarity::NonHallucination) => "Ordinary questions".into(),
            None => String::new(),
        },
        rows: rows(&c.base, &c.tuned),
        unscored: String::new(),
        base: cell(&c.base, c.unit),
        tuned: cell(&c.tuned, c.unit),
        difference: difference(&c.difference, c.unit),
        p: words::p_value(c.difference.p_holm.or(c.difference.p)),
        raw_p: words::p_value(c.difference.p),
        detectable: c.difference.detectable.map_or_else(String::new, |d| words::number(d, c.unit, false)),
        finding: c.difference.finding.words(),
        judgement: judgement(&c.difference, c.better),
    }
}

fn control(c: &ControlRow) -> ControlLine {
    let model = if c.model == Which::Base { "Base" } else { "Tuned" };
    let image = if c.control == Control::Blind { "without the image" } else { "with another image" };
    ControlLine {
        name: format!("{model}, {image}"),
        changed: cell(&c.changed, Unit::Share),
        right: c.right.as_ref().map(|r| cell(r, Unit::Share)),
        gain: c.gain.as_ref().map(|g| difference(g, Unit::Share)),
        p: c.gain.as_ref().map_or("–".into(), |g| words::p_value(g.p_holm.or(g.p))),
        finding: c.gain.as_ref().map_or("not judged", |g| g.finding.words()),
        judgement: c.gain.as_ref().map_or("", |g| judgement(g, Better::Higher)),
    }
}

fn probes(report: &Report) -> Vec<ProbeLine> {
    let line = |name, p: &Probes| ProbeLine {
        name,
        pairs: p.pairs,
        cells: [p.tells_apart, p.goes_along, p.denies_both, p.reversed, p.unclear]
            .iter()
            .map(|e| cell(e, Unit::Share))
            .collect(),
    };
    ["Base", "Tuned"].into_iter().zip(&report.probes).filter_map(|(name, p)| Some(line(name, p.as_ref()?))).collect()
}

/// Refusing too much against refusing rightly.
fn plane(report: &Report) -> Option<String> {
    let find = |key: &str| report.metrics.iter().find(|m| m.key == key);
    let (x, y) = (find("over_refusal_rate")?, find("refutation_accuracy")?);
    let point = |name, class, x, y| chart::Point { name, class, x, y };
    chart::plane(
        "Refutation of false premises against denial of true findings",
        "over-refusal: true findings denied",
        "false premises refuted rightly",
        &[point("base", "base", &x.base, &y.base), point("tuned", "tuned", &x.tuned, &y.tuned)],
    )
}

/// The kinds of change that occur.
fn changes(report: &Report) -> Vec<Part> {
    let t = &report.transitions;
    let all = [
        ("right before and after", "both_right", t.both_right),
        ("improved", "improved", t.improved),
        ("worsened", "worsened", t.worsened),
        ("wrong before and after", "both_wrong", t.both_wrong),
        ("not scored", "unscored", t.unscored),
    ];
    let n = all.iter().map(|c| c.2).sum::<usize>().max(1);
    all.into_iter()
        .filter(|c| c.2 > 0)
        .map(|(name, class, rows)| Part { name, class, rows, percent: 100.0 * rows as f64 / n as f64 })
        .collect()
}

fn cards(inputs: &Inputs, report: &Report) -> Result<Vec<Card>> {
    let rows = join(inputs)?;
    let by_id: HashMap<&str, &Judged<'_>> = rows.iter().map(|r| (r.sample.id.as_str(), r)).collect();
    let mut seen = HashMap::new();
    let mut bytes = 0;
    let examples = report.examples.iter().filter_map(|e| Some((e, by_id.get(e.id.as_str())?)));
    Ok(examples
        .map(|(example, row)| {
            let images = row.sample.images.iter();
            let mut embedded = |picture: Picture| {
                bytes += picture.uri.as_ref().map_or(0, String::len);
                if bytes <= MOST_BYTES {
                    return picture;
                }
                Picture { uri: None, problem: "left out: this page holds enough images".into(), small: false }
            };
            let images = images
                .map(|i| embedded(seen.entry(i.path.clone()).or_insert_with(|| picture(&i.path)).clone()))
                .collect::<Vec<_>>();
            let origin = &row.sample.origin;
            let file =
                if origin.file.as_os_str().is_empty() { String::new() } else { format!(", {}", origin.file.display()) };
            Card {
                provenance: format!("{}{file}, row {}; image {}", origin.dataset, origin.row, row.sample.group),
                id: example.id.clone(),
                change: example.change.words(),
                class: example.change,
                category: words::plain(row.sample.category.as_deref().unwrap_or_default()),
                premise: match row.sample.polarity {
                    Some(Polarity::Hallucination) => "false premise",
                    _ => "",
                },
                images,
                question: last_question(row.sample),
                reference: last_answer(row.sample).to_string(),
                said: [said("Base", row, 0), said("Tuned", row, 1)],
            }
        })
        .collect())
}

fn said(who: &'static str, row: &Judged<'_>, index: usize) -> Said {
    let outcome = row.outcomes[index];
    let (stance, scores) = match outcome {
        Outcome::Scored { stance, scores, expected, .. } => {
            let stance = match (stance, expected) {
                (_, Stance::Unclear) => "",
                (Stance::Affirms, _) => "affirms",
                (Stance::Denies, _) => "denies",
                (Stance::Unclear, _) => "takes no stance",
            };
            (stance, scores.map(rated))
        }
        _ => ("", None),
    };
    Said {
        who,
        answer: row.answers[index].trim().to_string(),
        verdict: match correct(outcome) {
            Some(true) => "right",
            Some(false) => "wrong",
            None => "not scored",
        },
        stance,
        scores,
        reason: words::reason(outcome),
    }
}

fn rated(s: Scores) -> String {
    format!("Scores: accuracy {}, relevance {}, detail {}, risk {}", s.accuracy, s.relevance, s.detail, s.risk)
}

fn picture(path: &Path) -> Picture {
    match data_uri(path) {
        Ok((uri, small)) => Picture { uri: Some(uri), problem: String::new(), small },
        Err(problem) => Picture { uri: None, problem: format!("{}: {problem}", path.display()), small: false },
    }
}

/// The image as a data URI, and whether it has few pixels.
fn data_uri(path: &Path) -> std::result::Result<(String, bool), Box<dyn std::error::Error>> {
    let mut reader = ImageReader::open(path)?.with_guessed_format()?;
    let mut limits = Limits::default();
    limits.max_alloc = Some(256 * 1024 * 1024);
    limits.max_image_width = Some(20_000);
    limits.max_image_height = Some(20_000);
    reader.limits(limits);
    let format = reader.format();
    let picture = reader.decode()?;
    let side = picture.width().max(picture.height());
    let mime = match format {
        Some(ImageFormat::Png) => Some("image/png"),
        Some(ImageFormat::Jpeg) => Some("image/jpeg"),
        _ => None,
    };
    let small = side < 160;
    if let Some(mime) = mime.filter(|_| side <= IMAGE_SIDE && path.metadata().is_ok_and(|m| m.len() <= SMALL_FILE)) {
        return Ok((format!("data:{mime};base64,{}", STANDARD.encode(std::fs::read(path)?)), small));
    }
    let picture = if side > IMAGE_SIDE { picture.thumbnail(IMAGE_SIDE, IMAGE_SIDE) } else { picture };
    let mut bytes = Vec::new();
    let (format, mime) = if small { (ImageFormat::Png, "image/png") } else { (ImageFormat::Jpeg, "image/jpeg") };
    picture.to_rgb8().write_to(&mut Cursor::new(&mut bytes), format)?;
    Ok((format!("data:{mime};base64,{}", STANDARD.encode(bytes)), small))
}

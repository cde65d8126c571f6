//! Which `Linear`s of a model get an update: patterns, what they matched, and what they missed.

use std::fmt;

use burn::module::{Module, ParamId};
use globset::{GlobBuilder, GlobMatcher};
use regex::Regex;

use crate::{
    error::{Error, Kind, Result},
    nn::visit::named_params,
    vlm::Tower,
};

/// A `Linear` of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct LinearModule {
    /// Path of the module, as in the checkpoint: `model.layers.0.self_attn.q_proj`.
    pub name: String,
    /// Tower it belongs to.
    pub tower: &'static str,
    /// Width of its input.
    pub d_in: usize,
    /// Width of its output.
    pub d_out: usize,
    /// Its weight.
    pub id: ParamId,
}

/// Name of the tower that a parameter belongs to; `language` if no prefix fits.
#[must_use]
pub fn tower_of(towers: &'static [Tower], parameter: &str) -> &'static str {
    Tower::of(towers, parameter).map_or("language", |t| t.name)
}

/// Lists every `Linear` of a model, in module order.
#[must_use]
pub fn linears<M: Module>(model: &M, towers: &'static [Tower]) -> Vec<LinearModule> {
    let weights = named_params(model).into_iter().filter(|p| p.linear_weight);
    weights
        .map(|p| LinearModule {
            tower: tower_of(towers, &p.name),
            d_in: p.shape[0],
            d_out: p.shape[1],
            id: p.id,
            name: p.name.trim_end_matches(".weight").to_string(),
        })
        .collect()
}

enum Matcher {
    AllLinear,
    Suffix(String),
    Glob(GlobMatcher),
    Regex(Regex),
}

/// One entry of `target_modules`.
struct Pattern {
    text: String,
    tower: Option<String>,
    matcher: Matcher,
}

impl Pattern {
    fn parse(text: &str) -> Result<Self> {
        let bad = |why: String| {
            Error::new(Kind::Config, "target pattern cannot be understood")
                .at(format!("adapter.target_modules = \"{text}\""))
                .found(why)
                .help("use a module name (`q_proj`), a glob (`model.layers.*.mlp.*`), `re:...` or `all-linear`")
        };
        let (tower, rest) = match text.split_once(':') {
            Some((t @ ("vision" | "projector" | "language"), rest)) => (Some(t.to_string()), rest),
            _ => (None, text),
        };
        let matcher = if rest == "all-linear" {
            Matcher::AllLinear
        } else if let Some(expression) = rest.strip_prefix("re:") {
            // The whole name must match, as in PEFT.
            Matcher::Regex(Regex::new(&format!("^(?:{expression})$")).map_err(|e| bad(e.to_string()))?)
        } else if rest.contains(['*', '?', '[', '{']) {
            // Names become paths, so that `*` is one component and `**` any number of them.
            let glob = GlobBuilder::new(&rest.replace('.', "/")).literal_separator(true).build();
            Matcher::Glob(glob.map_err(|e| bad(e.to_string()))?.compile_matcher())
        } else if rest.is_empty() {
            return Err(bad("an empty pattern".into()));
        } else {
            Matcher::Suffix(rest.to_string())
        };
        Ok(Self { text: text.to_string(), tower, matcher })
    }

    fn matches(&self, module: &LinearModule) -> bool {
        if self.tower.as_deref().is_some_and(|t| t != module.tower) {
            return false;
        }
        match &self.matcher {
            Matcher::AllLinear => module.name != "lm_head" && !module.name.ends_with(".lm_head"),
            Matcher::Suffix(s) => {
                module.name.strip_suffix(s.as_str()).is_some_and(|head| head.is_empty() || head.ends_with('.'))
            }
            Matcher::Glob(glob) => glob.is_match(module.name.replace('.', "/")),
            Matcher::Regex(regex) => regex.is_match(&module.name),
        }
    }
}

/// What the patterns matched.
#[derive(Debug, Clone, Default)]
pub struct Coverage {
    /// Modules that get an update, in module order.
    pub modules: Vec<LinearModule>,
    /// Tower, modules that are matched, all its linear modules; in module order.
    pub towers: Vec<(&'static str, usize, usize)>,
}

impl Coverage {
    /// Parameters of updates of rank `r`.
    #[must_use]
    pub fn parameters(&self, r: usize) -> usize {
        self.modules.iter().map(|m| r * (m.d_in + m.d_out)).sum()
    }
}

impl fmt::Display for Coverage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:<12}{:>8}{:>8}", "tower", "adapted", "linear")?;
        for (tower, matched, all) in &self.towers {
            writeln!(f, "{tower:<12}{matched:>8}{all:>8}")?;
        }
        Ok(())
    }
}

/// Applies `patterns` to the linear modules of the towers that `adapted` allows.
///
/// # Errors
/// A pattern cannot be understood, or matches no module.
pub fn select(patterns: &[String], modules: &[LinearModule], adapted: impl Fn(&str) -> bool) -> Result<Coverage> {
    let patterns: Vec<Pattern> = patterns.iter().map(|p| Pattern::parse(p)).collect::<Result<_>>()?;
    let open: Vec<&LinearModule> = modules.iter().filter(|m| adapted(m.tower)).collect();
    for pattern in &patterns {
        if !open.iter().any(|m| pattern.matches(m)) {
            return Err(nothing_matched(pattern, modules, &adapted));
        }
    }
    let mut coverage = Coverage::default();
    for module in modules {
        let hit = adapted(module.tower) && patterns.iter().any(|p| p.matches(module));
        match coverage.towers.iter_mut().find(|(t, ..)| *t == module.tower) {
            Some((_, matched, all)) => {
                *matched += usize::from(hit);
                *all += 1;
            }
            None => coverage.towers.push((module.tower, usize::from(hit), 1)),
        }
        if hit {
            coverage.modules.push(module.clone());
        }
    }
    Ok(coverage)
}

fn nothing_matched(pattern: &Pattern, modules: &[LinearModule], adapted: &impl Fn(&str) -> bool) -> Error {
    let error = Error::new(Kind::Config, "target pattern matches no linear module")
        .at(format!("adapter.target_modules = \"{}\"", pattern.text));
    if let Some(closed) = modules.iter().find(|m| pattern.matches(m)) {
        return error
            .found(format!("{}, whose tower is not adapted", closed.name))
            .help(format!("set train.{} = \"lora\"", closed.tower));
    }
    let near = near_names(&pattern.text, modules.iter().filter(|m| adapted(m.tower)));
    error.help(format!("names of linear modules near it: {}", near.join(", ")))
}

/// Up to five last components of module names, nearest spelling first.
fn near_names<'a>(text: &str, modules: impl Iterator<Item = &'a LinearModule>) -> Vec<String> {
    let last = |s: &str| s.rsplit(['.', '/', ':']).next().unwrap_or(s).to_string();
    let wanted = last(text);
    let mut names: Vec<String> = modules.map(|m| last(&m.name)).collect();
    names.sort();
    names.dedup();
    names.sort_by_key(|n| edit_distance(&wanted, n));
    names.truncate(5);
    names
}

fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn modules() -> Vec<LinearModule> {
        let module =
            |tower, name: &str| LinearModule { name: name.into(), tower, d_in: 4, d_out: 6, id: ParamId::new() };
        vec![
            module("vision", "model.vision_tower.layers.0.self_attn.q_proj"),
            module("projector", "model.mm_projector.0"),
            module("language", "model.layers.0.self_attn.q_proj"),
            module("language", "model.layers.1.self_attn.q_proj"),
            module("language", "model.layers.1.mlp.up_proj"),
            module("language", "lm_head"),
        ]
    }

    fn matched(pattern: &str) -> Result<Vec<String>> {
        let coverage = select(&[pattern.to_string()], &modules(), |_| true)?;
        Ok(coverage.modules.into_iter().map(|m| m.name).collect())
    }

    #[test]
    fn every_kind_of_pattern() {
        assert_eq!(matched("q_proj").unwrap().len(), 3);
        assert_eq!(matched("language:q_proj").unwrap().len(), 2);
        assert_eq!(matched("proj").unwrap_err().kind(), Kind::Config);
        assert_eq!(matched("model.layers.*.self_attn.q_proj").unwrap().len(), 2);
        assert_eq!(matched("**.q_proj").unwrap().len(), 3);
        assert!(matched("model.*.q_proj").is_err());
        assert_eq!(matched(r"re:model\.layers\.1\..*").unwrap().len(), 2);
        assert!(matched(r"re:layers\.1\..*").is_err());
        assert_eq!(matched("all-linear").unwrap().len(), 5);
        assert_eq!(matched("language:all-linear").unwrap().len(), 3);
        assert_eq!(matched("lm_head").unwrap(), ["lm_head"]);
    }

    #[test]
    fn a_pattern_that_matches_nothing_lists_near_names() {
        let error = matched("q_prj").unwrap_err();
        assert!(error.to_string().contains("q_prj"));
        assert!(error.help_line().unwrap().contains("q_proj, "), "{error:?}");
    }

    #[test]
    fn a_pattern_of_a_frozen_tower_says_so() {
        let error = select(&["vision:q_proj".into()], &modules(), |t| t == "language").unwrap_err();
        assert_eq!(error.help_line(), Some("set train.vision = \"lora\""));
    }

    #[test]
    fn coverage_counts_per_tower() {
        let coverage = select(&["q_proj".into()], &modules(), |t| t == "language").unwrap();
        assert_eq!(coverage.towers, [("vision", 0, 1), ("projector", 0, 1), ("language", 2, 4)]);
        assert_eq!(coverage.parameters(3), 2 * 3 * (4 + 6));
        assert!(coverage.to_string().contains("language"));
    }
}

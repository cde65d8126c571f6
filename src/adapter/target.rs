//! Which `Linear`s of a model get an update: patterns, what they matched, and what they missed.

use std::{collections::BTreeSet, fmt};

use burn::module::{Module, ParamId};
use globset::{GlobBuilder, GlobMatcher};
use regex::Regex;

use super::{AdapterConfig, within};
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
    fn parse(key: &str, text: &str) -> Result<Self> {
        let bad = |why: String| {
            Error::new(Kind::Config, "target pattern cannot be understood")
                .at(format!("adapter.{key} = \"{text}\""))
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
    /// The modules for which `hit` holds.
    #[must_use]
    pub fn of(modules: &[LinearModule], hit: impl Fn(&LinearModule) -> bool) -> Self {
        let mut coverage = Self::default();
        for module in modules {
            let hit = hit(module);
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
        coverage
    }

    /// Parameters of the updates that `config` describes.
    ///
    /// # Errors
    /// The patterns of ranks contradict each other.
    pub fn parameters(&self, config: &AdapterConfig) -> Result<usize> {
        let of = |m: &LinearModule| {
            let (r, _) = config.rank_and_scale(&m.name)?;
            Ok(r * (m.d_in + m.d_out) + if config.use_dora { m.d_out } else { 0 })
        };
        self.modules.iter().map(of).sum()
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

/// What keeps modules out although a target matches.
#[derive(Debug, Clone, Copy, Default)]
pub struct Limits<'a> {
    /// `exclude_modules`
    pub exclude_modules: &'a [String],
    /// `layers_to_transform`
    pub layers_to_transform: &'a [usize],
    /// `layers_pattern`
    pub layers_pattern: &'a [String],
    /// `modules_to_save`: what is trained in full needs no update.
    pub modules_to_save: &'a [String],
}

impl<'a> Limits<'a> {
    /// Those of a configuration.
    #[must_use]
    pub fn of(config: &'a AdapterConfig) -> Self {
        Self {
            exclude_modules: &config.exclude_modules,
            layers_to_transform: &config.layers_to_transform,
            layers_pattern: &config.layers_pattern,
            modules_to_save: &config.modules_to_save,
        }
    }

    /// Whether the number of the layer that `module` is in may have updates.
    pub(super) fn allows_layer(&self, module: &str) -> bool {
        self.layers_to_transform.is_empty()
            || layer_number(module, self.layers_pattern).is_some_and(|n| self.layers_to_transform.contains(&n))
    }

    /// Whether `module` is trained in full.
    pub(super) fn saves(&self, module: &str) -> bool {
        self.modules_to_save.iter().any(|m| within(module, m))
    }
}

/// Number of the layer that `module` is in: the first number with two parts in front of it, or the first one behind a
/// part called as in `patterns`.
fn layer_number(module: &str, patterns: &[String]) -> Option<usize> {
    let parts: Vec<&str> = module.split('.').collect();
    // The last part is the module itself.
    let places = 1..parts.len().saturating_sub(1);
    places.filter(|i| patterns.is_empty() && *i > 1 || patterns.iter().any(|p| p == parts[i - 1])).find_map(|i| {
        let digits = !parts[i].is_empty() && parts[i].bytes().all(|b| b.is_ascii_digit());
        if digits { parts[i].parse().ok() } else { None }
    })
}

/// Applies `patterns` to the linear modules of the towers that `adapted` allows.
///
/// # Errors
/// A pattern cannot be understood, or matches no module.
pub fn select(patterns: &[String], modules: &[LinearModule], adapted: impl Fn(&str) -> bool) -> Result<Coverage> {
    select_within(patterns, Limits::default(), modules, adapted)
}

/// Applies `patterns` to the linear modules of the towers that `adapted` allows, and leaves out what `limits` say.
///
/// # Errors
/// A pattern cannot be understood or matches no module, or nothing is left.
pub fn select_within(
    patterns: &[String],
    limits: Limits<'_>,
    modules: &[LinearModule],
    adapted: impl Fn(&str) -> bool,
) -> Result<Coverage> {
    let parse = |key: &str, all: &[String]| all.iter().map(|p| Pattern::parse(key, p)).collect::<Result<Vec<_>>>();
    let patterns = parse("target_modules", patterns)?;
    let excluded = parse("exclude_modules", limits.exclude_modules)?;
    let open: Vec<&LinearModule> = modules.iter().filter(|m| adapted(m.tower)).collect();
    for (key, pattern) in
        patterns.iter().map(|p| ("target_modules", p)).chain(excluded.iter().map(|p| ("exclude_modules", p)))
    {
        if !open.iter().any(|m| pattern.matches(m)) {
            return Err(nothing_matched(key, pattern, modules, &adapted));
        }
    }
    let kept = |m: &LinearModule| {
        patterns.iter().any(|p| p.matches(m))
            && !excluded.iter().any(|p| p.matches(m))
            && !limits.saves(&m.name)
            && limits.allows_layer(&m.name)
    };
    let coverage = Coverage::of(modules, |m| adapted(m.tower) && kept(m));
    if coverage.modules.is_empty() && !patterns.is_empty() {
        return Err(Error::new(Kind::Config, "no linear module is left to adapt")
            .at("adapter.exclude_modules, adapter.layers_to_transform, adapter.modules_to_save")
            .help("leave fewer out"));
    }
    let layers: BTreeSet<usize> =
        coverage.modules.iter().filter_map(|m| layer_number(&m.name, limits.layers_pattern)).collect();
    match limits.layers_to_transform.iter().find(|n| !layers.contains(n)) {
        Some(n) => Err(Error::new(Kind::Config, "a layer to transform has no module to adapt")
            .at("adapter.layers_to_transform")
            .expected(format!("some of {layers:?}"))
            .found(n)),
        None => Ok(coverage),
    }
}

fn nothing_matched(key: &str, pattern: &Pattern, modules: &[LinearModule], adapted: &impl Fn(&str) -> bool) -> Error {
    let error = Error::new(Kind::Config, "target pattern matches no linear module")
        .at(format!("adapter.{key} = \"{}\"", pattern.text));
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
    fn limits_leave_modules_out() {
        let all = ["language:all-linear".to_string()];
        let left = |limits: Limits<'_>| {
            let coverage = select_within(&all, limits, &modules(), |t| t == "language")?;
            Ok::<_, Error>(coverage.modules.into_iter().map(|m| m.name).collect::<Vec<_>>())
        };
        let (mlp, one, two) = (["up_proj".to_string()], [1], [1, 2]);
        assert_eq!(left(Limits { exclude_modules: &mlp, ..Limits::default() }).unwrap().len(), 2);
        assert_eq!(left(Limits { layers_to_transform: &one, ..Limits::default() }).unwrap().len(), 2);
        let named = Limits { layers_to_transform: &one, layers_pattern: &["layers".into()], ..Limits::default() };
        assert_eq!(left(named).unwrap().len(), 2);
        let other = Limits { layers_to_transform: &one, layers_pattern: &["blocks".into()], ..Limits::default() };
        assert!(left(other).is_err());
        assert!(left(Limits { layers_to_transform: &two, ..Limits::default() }).unwrap_err().to_string().contains('2'));
        assert_eq!(left(Limits { modules_to_save: &["mlp".into()], ..Limits::default() }).unwrap().len(), 2);
        let wrong = ["up_prj".to_string()];
        let error = left(Limits { exclude_modules: &wrong, ..Limits::default() }).unwrap_err();
        assert!(error.to_string().contains("exclude_modules"), "{error}");
    }

    #[test]
    fn coverage_counts_per_tower() {
        let coverage = select(&["q_proj".into()], &modules(), |t| t == "language").unwrap();
        assert_eq!(coverage.towers, [("vision", 0, 1), ("projector", 0, 1), ("language", 2, 4)]);
        let config = AdapterConfig { r: 3, ..AdapterConfig::default() };
        assert_eq!(coverage.parameters(&config).unwrap(), 2 * 3 * (4 + 6));
        let config =
            AdapterConfig { use_dora: true, rank_pattern: [(r"layers\.1\..*".to_string(), 5)].into(), ..config };
        assert_eq!(coverage.parameters(&config).unwrap(), (3 + 5) * (4 + 6) + 2 * 6);
        assert!(coverage.to_string().contains("language"));
    }
}

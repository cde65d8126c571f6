//! Strict TOML against a schema: every unknown key, wrong type and value out of range is found in one pass, with its
//! line. Known keys, their documentation and their ranges come from the configuration structs themselves.

use std::{fmt, ops::Range, path::Path};

use schemars::JsonSchema;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Map, Value};
use strsim::damerau_levenshtein as edits;
use toml::de::{DeTable, DeValue};

/// Where a value came from, in order of rising precedence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// The default of the struct.
    Default,
    /// A recipe file.
    File {
        /// Path, or the name of an embedded recipe.
        path: String,
        /// Line, from 1.
        line: usize,
    },
    /// An override on the command line, as typed.
    Set(String),
    /// Chosen so that training fits into the memory that was asked for.
    Fit(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File { path, line } => write!(f, "{path}:{line}"),
            Self::Set(text) => write!(f, "--set {text}"),
            Self::Fit(limit) => write!(f, "--fit {limit}"),
        }
    }
}

/// A key that a configuration knows.
#[derive(Debug, Clone)]
pub struct Key {
    /// Dotted path, for example `train.learning_rate`.
    pub path: String,
    /// Its doc comment.
    pub doc: String,
    /// What it accepts, in words.
    pub accepts: String,
    /// Its default; null where it has none.
    pub default: Value,
    schema: Value,
}

/// A value of a resolved configuration.
#[derive(Debug, Clone)]
pub struct Setting {
    /// Dotted path.
    pub key: String,
    /// Value; null where it is not set.
    pub value: Value,
    /// Where it came from.
    pub origin: Origin,
}

/// A configuration being put together from layers, low to high.
#[derive(Debug)]
pub struct Config {
    keys: Vec<Key>,
    sections: Vec<(String, String)>,
    default: Value,
    settings: Vec<Setting>,
    /// Everything wrong so far, one line each.
    pub problems: Vec<String>,
}

impl Config {
    /// All defaults of `T`.
    #[must_use]
    pub fn new<T: Default + Serialize + JsonSchema>() -> Self {
        let default = serde_json::to_value(T::default()).unwrap_or_default();
        let schema = Value::from(schemars::schema_for!(T));
        let (mut keys, mut sections) = (Vec::new(), Vec::new());
        collect(&schema, &schema, "", &default, &mut keys, &mut sections);
        let settings = keys
            .iter()
            .map(|k| Setting { key: k.path.clone(), value: k.default.clone(), origin: Origin::Default })
            .collect();
        Self { keys, sections, default, settings, problems: Vec::new() }
    }

    /// Known keys, in the order of the structs.
    #[must_use]
    pub fn keys(&self) -> &[Key] {
        &self.keys
    }

    /// Sections with their documentation, in the order of the structs.
    #[must_use]
    pub fn sections(&self) -> &[(String, String)] {
        &self.sections
    }

    /// Every value with where it came from, in the order of [`Config::keys`].
    #[must_use]
    pub fn settings(&self) -> &[Setting] {
        &self.settings
    }

    /// Where the value of `key` came from.
    #[must_use]
    pub fn origin(&self, key: &str) -> Origin {
        self.settings.iter().find(|s| s.key == key).map_or(Origin::Default, |s| s.origin.clone())
    }

    /// Notes a problem with the value of `key`, at the place where it was set.
    pub fn object(&mut self, key: &str, problem: &str) {
        let line = match self.origin(key) {
            Origin::Default => format!("{key}: {problem}"),
            origin => format!("{origin}: {key}: {problem}"),
        };
        self.problems.push(line);
    }

    /// Puts a parsed file on top.
    pub fn layer<T: DeserializeOwned>(&mut self, file: &Document<'_>) {
        for error in &file.errors {
            let line = error.span().map_or(1, |s| file.line(s));
            self.problems.push(format!("{}:{line}: {}", file.name, error.message().trim()));
        }
        if file.errors.is_empty() {
            self.table::<T>("", &file.table, &|span| Origin::File { path: file.name.clone(), line: file.line(span) });
        }
    }

    /// Puts an override `key=value` on top. The value is TOML; a bare word is text.
    pub fn set<T: DeserializeOwned>(&mut self, text: &str) {
        self.set_from::<T>(text, Origin::Set(text.to_string()));
    }

    /// As [`Config::set`], with another origin.
    pub fn set_from<T: DeserializeOwned>(&mut self, text: &str, origin: Origin) {
        let Some((key, raw)) = text.split_once('=').map(|(k, v)| (k.trim(), v.trim())) else {
            self.problems.push(format!("--set {text}: expected key=value, for example --set seed=7"));
            return;
        };
        let source = format!("{key} = {raw}");
        let parsed = DeTable::parse(&source).ok();
        let bare = Value::String(raw.to_string());
        match (self.keys.iter().find(|k| k.path == key), &parsed) {
            (Some(known), Some(table)) => {
                let value = at(to_json(&DeValue::Table(table.get_ref().clone())), key);
                let value = if !self.fits::<T>(known, &value) && self.fits::<T>(known, &bare) { bare } else { value };
                self.value::<T>(key, value, origin);
            }
            (Some(_), None) => self.value::<T>(key, bare, origin),
            (None, Some(table)) => self.table::<T>("", table.get_ref(), &|_| origin.clone()),
            (None, None) => self.unknown(key, &origin),
        }
    }

    /// The configuration, if nothing was wrong.
    #[must_use]
    pub fn finish<T: DeserializeOwned>(&self) -> Option<T> {
        let mut whole = self.default.clone();
        for setting in &self.settings {
            put(&mut whole, &setting.key, setting.value.clone());
        }
        serde_json::from_value(whole).ok()
    }

    fn table<T: DeserializeOwned>(
        &mut self,
        prefix: &str,
        table: &DeTable<'_>,
        origin: &dyn Fn(Range<usize>) -> Origin,
    ) {
        let mut entries: Vec<_> = table.iter().collect();
        entries.sort_by_key(|(name, _)| name.span().start);
        for (name, value) in entries {
            let path = join(prefix, name.get_ref());
            let place = origin(name.span());
            if self.keys.iter().any(|k| k.path == path) {
                self.value::<T>(&path, to_json(value.get_ref()), place);
            } else if self.is_section(&path) {
                match value.get_ref() {
                    DeValue::Table(inner) => self.table::<T>(&path, inner, origin),
                    other => self.problems.push(format!(
                        "{place}: {path}: expected a table of keys ({}), found {}",
                        self.known(&path),
                        other.type_str()
                    )),
                }
            } else {
                self.unknown(&path, &place);
            }
        }
    }

    fn value<T: DeserializeOwned>(&mut self, path: &str, value: Value, origin: Origin) {
        let Some(i) = self.keys.iter().position(|k| k.path == path) else { return };
        let key = &self.keys[i];
        let value = if value == "" && key.default.is_null() { Value::Null } else { value };
        if self.fits::<T>(key, &value) {
            self.settings[i] = Setting { key: path.to_string(), value, origin };
        } else {
            let found = shown(&value);
            self.problems.push(format!("{origin}: {path}: expected {}, found {found}", key.accepts));
        }
    }

    /// Whether the struct takes `value` at `key`: asked of serde itself, with defaults everywhere else.
    fn fits<T: DeserializeOwned>(&self, key: &Key, value: &Value) -> bool {
        let mut trial = self.default.clone();
        put(&mut trial, &key.path, value.clone());
        serde_json::from_value::<T>(trial).is_ok() && in_range(&key.schema, value)
    }

    fn is_section(&self, path: &str) -> bool {
        self.sections.iter().any(|(section, _)| section == path)
    }

    fn unknown(&mut self, path: &str, place: &Origin) {
        let section = path.rsplit_once('.').map_or("", |(s, _)| s);
        let section = if section.is_empty() || self.is_section(section) { section } else { "" };
        let guess = self.nearest(path).map_or(";".to_string(), |k| format!("; did you mean `{k}`?"));
        let whose = if section.is_empty() { "the top level".to_string() } else { format!("[{section}]") };
        let known = self.known(section);
        self.problems.push(format!("{place}: unknown key `{path}`{guess} known keys of {whose}: {known}"));
    }

    /// Names right below a section.
    fn known(&self, section: &str) -> String {
        let mut names: Vec<&str> = Vec::new();
        for key in &self.keys {
            let Some(rest) = key.path.strip_prefix(section) else { continue };
            let name = rest.trim_start_matches('.').split('.').next().unwrap_or_default();
            if (section.is_empty() || rest.starts_with('.')) && !names.contains(&name) {
                names.push(name);
            }
        }
        names.join(", ")
    }

    /// The key or section that `path` most likely means: the same name elsewhere, or few letters away.
    fn nearest(&self, path: &str) -> Option<&str> {
        let last = |path: &'_ str| path.rsplit('.').next().unwrap_or_default().to_string();
        let name = last(path);
        let limit = 1 + name.chars().count() / 4;
        let sections = self.sections.iter().map(|(section, _)| section.as_str());
        let all = self.keys.iter().map(|k| k.path.as_str()).chain(sections);
        all.map(|known| (edits(known, path).min(edits(&last(known), &name)), known))
            .filter(|(distance, _)| *distance <= limit)
            .min_by_key(|(distance, _)| *distance)
            .map(|(_, known)| known)
    }
}

/// A parsed TOML file.
pub struct Document<'a> {
    /// Path or name, for messages.
    pub name: String,
    text: &'a str,
    table: DeTable<'a>,
    errors: Vec<toml::de::Error>,
}

impl<'a> Document<'a> {
    /// Parses as much as can be parsed; syntax errors are kept for [`Config::layer`].
    #[must_use]
    pub fn parse(name: impl Into<String>, text: &'a str) -> Self {
        let (table, mut errors) = DeTable::parse_recoverable(text);
        errors.sort_by_key(|e| e.span().map_or(0, |s| s.start));
        Self { name: name.into(), text, table: table.into_inner(), errors }
    }

    /// Takes a key out of the top level: its value and line. For keys that are about the file and not part of `T`.
    pub fn take(&mut self, key: &str) -> Option<(Value, usize)> {
        let found = self.table.keys().find(|k| k.get_ref() == key)?.clone();
        let value = self.table.remove(&found)?;
        Some((to_json(value.get_ref()), self.line(found.span())))
    }

    fn line(&self, span: Range<usize>) -> usize {
        1 + self.text[..span.start.min(self.text.len())].bytes().filter(|b| *b == b'\n').count()
    }
}

/// Writes settings as a TOML file that can be read again; `comment` is put at the top, origins behind the values.
#[must_use]
pub fn to_toml(settings: &[Setting], comment: &str) -> String {
    let mut text: String = comment.lines().map(|l| format!("# {l}\n")).collect();
    // A section is opened once, also where its keys stand before and behind a section within it.
    let mut sections: Vec<(&str, String)> = Vec::new();
    let by_section = |top: bool| settings.iter().filter(move |s| s.key.contains('.') != top);
    for setting in by_section(true).chain(by_section(false)) {
        let (own, name) = setting.key.rsplit_once('.').unwrap_or(("", &setting.key));
        let line = match inline(&setting.value) {
            Some(value) => format!("{name} = {value}  # {}\n", setting.origin),
            None => format!("# {name} is not set\n"),
        };
        match sections.iter_mut().find(|s| s.0 == own) {
            Some(section) => section.1.push_str(&line),
            None => sections.push((own, line)),
        }
    }
    for (name, lines) in sections {
        if !name.is_empty() {
            text.push_str(&format!("\n[{name}]\n"));
        }
        text.push_str(&lines);
    }
    text
}

/// A value as TOML on one line; none for null.
#[must_use]
pub fn inline(value: &Value) -> Option<String> {
    match value {
        Value::Null => None,
        // Not through TOML's own integers, which end at 2^63.
        Value::Number(n) => Some(n.to_string()),
        other => toml::Value::try_from(other).ok().map(|v| v.to_string()),
    }
}

/// A path as messages show it.
#[must_use]
pub fn name_of(path: &Path) -> String {
    path.display().to_string()
}

fn join(prefix: &str, name: &str) -> String {
    if prefix.is_empty() { name.to_string() } else { format!("{prefix}.{name}") }
}

fn shown(value: &Value) -> String {
    inline(value).unwrap_or_else(|| "nothing".into())
}

fn put(whole: &mut Value, path: &str, value: Value) {
    let mut at = whole;
    for name in path.split('.') {
        if !at.is_object() {
            *at = Value::Object(Map::new());
        }
        let Some(map) = at.as_object_mut() else { return };
        at = map.entry(name).or_insert(Value::Null);
    }
    *at = value;
}

fn to_json(value: &DeValue<'_>) -> Value {
    match value {
        DeValue::String(s) => Value::String(s.to_string()),
        DeValue::Integer(i) => {
            let (text, radix) = (i.as_str(), i.radix());
            i64::from_str_radix(text, radix)
                .map(Value::from)
                .or_else(|_| u64::from_str_radix(text, radix).map(Value::from))
                .unwrap_or_else(|_| Value::String(text.to_string()))
        }
        DeValue::Float(f) => match f.as_str().parse::<f64>() {
            Ok(x) if x.is_finite() => Value::from(x),
            _ => Value::String(f.as_str().to_string()),
        },
        DeValue::Boolean(b) => Value::Bool(*b),
        DeValue::Datetime(d) => Value::String(d.to_string()),
        DeValue::Array(items) => items.iter().map(|v| to_json(v.get_ref())).collect(),
        DeValue::Table(table) => {
            table.iter().map(|(k, v)| (k.get_ref().to_string(), to_json(v.get_ref()))).collect::<Map<_, _>>().into()
        }
    }
}

/// The value at a dotted path.
fn at(mut value: Value, path: &str) -> Value {
    for name in path.split('.') {
        value = value.get_mut(name).map(Value::take).unwrap_or_default();
    }
    value
}

/// Walks a schema: leaves become keys, tables sections.
fn collect(
    root: &Value,
    schema: &Value,
    prefix: &str,
    default: &Value,
    keys: &mut Vec<Key>,
    sections: &mut Vec<(String, String)>,
) {
    for (name, property) in schema["properties"].as_object().into_iter().flatten() {
        let path = join(prefix, name);
        let resolved = resolve(root, property);
        let default = &default[name];
        let doc = property["description"].as_str().or(resolved["description"].as_str()).unwrap_or_default();
        let doc = doc.replace('\n', " ");
        let no_keys = resolved["additionalProperties"] == false && resolved["properties"].is_null();
        if resolved["properties"].is_object() || no_keys {
            sections.push((path.clone(), doc));
            collect(root, &resolved, &path, default, keys, sections);
        } else {
            keys.push(Key { path, doc, accepts: accepts(root, &resolved), default: default.clone(), schema: resolved });
        }
    }
}

fn resolve(root: &Value, schema: &Value) -> Value {
    match schema["$ref"].as_str().and_then(|r| r.strip_prefix('#')).and_then(|r| root.pointer(r)) {
        Some(found) => resolve(root, found),
        None => schema.clone(),
    }
}

/// What a schema accepts, in words.
fn accepts(root: &Value, schema: &Value) -> String {
    let schema = resolve(root, schema);
    let text = |v: &Value| shown(v);
    if let Some(all) = schema["enum"].as_array() {
        return one_of(all.iter().filter(|v| !v.is_null()).map(text));
    }
    if let Some(all) = schema["oneOf"].as_array().or(schema["anyOf"].as_array()) {
        let constants: Vec<String> = all
            .iter()
            .map(|s| resolve(root, s))
            .flat_map(|s| match (&s["const"], s["enum"].as_array()) {
                (Value::Null, Some(many)) => many.iter().map(text).collect(),
                (Value::Null, None) => vec![],
                (c, _) => vec![text(c)],
            })
            .collect();
        if !constants.is_empty() {
            return one_of(constants.into_iter());
        }
        let words: Vec<String> = all.iter().filter(|s| s["type"] != "null").map(|s| accepts(root, s)).collect();
        return words.join(" or ");
    }
    let kind = match &schema["type"] {
        Value::Array(kinds) => kinds.iter().filter_map(Value::as_str).find(|k| *k != "null").unwrap_or("value"),
        other => other.as_str().unwrap_or("value"),
    };
    match kind {
        "integer" => format!("a whole number{}", range_words(&schema)),
        "number" => format!("a number{}", range_words(&schema)),
        "string" => "text".into(),
        "boolean" => "true or false".into(),
        "array" => format!("a list, each item {}", accepts(root, &schema["items"])),
        "object" => "a table".into(),
        other => other.to_string(),
    }
}

fn one_of(all: impl Iterator<Item = String>) -> String {
    format!("one of {}", all.collect::<Vec<_>>().join(", "))
}

fn range_words(schema: &Value) -> String {
    let number = |key: &str| schema[key].as_f64();
    // Limits of the machine type say nothing to a user.
    let high = number("maximum").filter(|m| *m < 4e9);
    match (number("minimum"), number("exclusiveMinimum"), high) {
        (Some(low), _, Some(high)) => format!(" from {low} to {high}"),
        (Some(low), _, None) => format!(", {low} or more"),
        (None, Some(low), Some(high)) => format!(" above {low}, at most {high}"),
        (None, Some(low), None) => format!(" above {low}"),
        (None, None, Some(high)) => format!(", at most {high}"),
        (None, None, None) => String::new(),
    }
}

fn in_range(schema: &Value, value: &Value) -> bool {
    let Some(x) = value.as_f64() else { return true };
    let holds = |key: &str, test: fn(f64, f64) -> bool| schema[key].as_f64().is_none_or(|limit| test(x, limit));
    holds("minimum", |x, l| x >= l)
        && holds("maximum", |x, l| x <= l)
        && holds("exclusiveMinimum", |x, l| x > l)
        && holds("exclusiveMaximum", |x, l| x < l)
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
    #[serde(rename_all = "snake_case")]
    enum Shape {
        /// Round.
        #[default]
        Circle,
        /// Not round.
        Square,
    }

    #[derive(Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
    #[serde(deny_unknown_fields, default)]
    struct Inner {
        /// Peak rate.
        #[schemars(range(min = 0.0, max = 1.0))]
        rate: f64,
        /// Which shape.
        shape: Shape,
        /// Names.
        names: Vec<String>,
        path: Option<std::path::PathBuf>,
    }

    impl Default for Inner {
        fn default() -> Self {
            Self { rate: 0.5, shape: Shape::Circle, names: vec!["all".into()], path: None }
        }
    }

    #[derive(Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
    #[serde(deny_unknown_fields, default)]
    struct Outer {
        /// Seed of
        /// all draws.
        seed: u64,
        label: String,
        inner: Inner,
        later: Empty,
    }

    #[derive(Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
    #[serde(deny_unknown_fields, default)]
    struct Empty {}

    fn layered(text: &str, sets: &[&str]) -> Config {
        let mut config = Config::new::<Outer>();
        config.layer::<Outer>(&Document::parse("r.toml", text));
        for set in sets {
            config.set::<Outer>(set);
        }
        config
    }

    #[test]
    fn keys_come_from_the_structs_with_their_words() {
        let config = Config::new::<Outer>();
        let paths: Vec<_> = config.keys().iter().map(|k| k.path.as_str()).collect();
        assert_eq!(paths, ["seed", "label", "inner.rate", "inner.shape", "inner.names", "inner.path"]);
        assert_eq!(config.keys()[0].doc, "Seed of all draws.");
        assert_eq!(config.keys()[0].accepts, "a whole number, 0 or more");
        assert_eq!(config.keys()[2].accepts, "a number from 0 to 1");
        assert_eq!(config.keys()[3].accepts, "one of \"circle\", \"square\"");
        assert_eq!(config.keys()[4].accepts, "a list, each item text");
        assert_eq!(config.keys()[5].accepts, "text");
        assert_eq!(config.finish::<Outer>(), Some(Outer::default()));
    }

    #[test]
    fn later_layers_win_and_every_value_knows_its_origin() {
        let config = layered("seed = 1\n[inner]\nrate = 1\nshape = \"square\"\n", &["seed=9", "inner.path=a/b c"]);
        assert!(config.problems.is_empty(), "{:?}", config.problems);
        let origins: Vec<_> = config.settings().iter().map(|s| s.origin.to_string()).collect();
        assert_eq!(origins, ["--set seed=9", "default", "r.toml:3", "r.toml:4", "default", "--set inner.path=a/b c"]);
        let value: Outer = config.finish().unwrap();
        assert_eq!((value.seed, value.inner.rate, value.inner.shape), (9, 1.0, Shape::Square));
        assert_eq!(value.inner.path, Some("a/b c".into()));
    }

    #[test]
    fn all_problems_are_found_at_once_with_their_lines() {
        let text = "sede = 1\nlabel = 3\n[inner]\nrate = 1.5\nshape = \"oval\"\nnames = [1]\n[iner]\nrate = 1\n";
        let config = layered(text, &["seed=-1", "rate=0.1", "inner=3", "nonsense", "x y=1"]);
        let expected = [
            "r.toml:1: unknown key `sede`; did you mean `seed`? known keys of the top level: seed, label, inner",
            "r.toml:2: label: expected text, found 3",
            "r.toml:4: inner.rate: expected a number from 0 to 1, found 1.5",
            "r.toml:5: inner.shape: expected one of \"circle\", \"square\", found \"oval\"",
            "r.toml:6: inner.names: expected a list, each item text, found [1]",
            "r.toml:7: unknown key `iner`; did you mean `inner`? known keys of the top level: seed, label, inner",
            "--set seed=-1: seed: expected a whole number, 0 or more, found -1",
            "--set rate=0.1: unknown key `rate`; did you mean `inner.rate`? known keys of the top level: seed, label, inner",
            "--set inner=3: inner: expected a table of keys (rate, shape, names, path), found integer",
            "--set nonsense: expected key=value, for example --set seed=7",
            "--set x y=1: unknown key `x y`; known keys of the top level: seed, label, inner",
        ];
        assert_eq!(config.problems, expected);
    }

    #[test]
    fn syntax_errors_are_all_named() {
        let config = layered("seed = \nlabel = \"a\"\n[inner\n", &[]);
        assert!(config.problems.len() >= 2, "{:?}", config.problems);
        assert!(config.problems[0].starts_with("r.toml:1: "), "{:?}", config.problems);
        assert!(config.problems.iter().any(|p| p.starts_with("r.toml:3: ")), "{:?}", config.problems);
        let config = layered("seed = 1\nseed = 2\n", &[]);
        assert!(config.problems[0].starts_with("r.toml:2: "), "{:?}", config.problems);
    }

    #[test]
    fn an_empty_text_unsets_an_optional_key() {
        let config = layered("[inner]\npath = \"a\"\n", &["inner.path="]);
        assert_eq!(config.finish::<Outer>().unwrap().inner.path, None);
    }

    #[test]
    fn what_is_written_reads_back_the_same() {
        let config = layered("[inner]\nrate = 1e-4\npath = \"a \\\"b\\\"\"\n", &["seed=18446744073709551615"]);
        assert!(config.problems.is_empty(), "{:?}", config.problems);
        let text = to_toml(config.settings(), "resolved");
        let again = layered(&text, &[]);
        assert!(again.problems.is_empty(), "{:?} in {text}", again.problems);
        assert_eq!(again.finish::<Outer>(), config.finish::<Outer>());
        assert!(text.contains("rate = 0.0001  # r.toml:2"), "{text}");
    }

    #[test]
    fn keys_about_the_file_can_be_taken_out() {
        let mut file = Document::parse("r.toml", "seed = 1\nextends = \"base\"\n");
        assert_eq!(file.take("extends"), Some(("base".into(), 2)));
        let mut config = Config::new::<Outer>();
        config.layer::<Outer>(&file);
        assert!(config.problems.is_empty());
    }
}

//! Requests and replies as the OpenAI chat-completions API has them.

use std::{borrow::Cow, path::Path};

use base64::Engine;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::{
    config::{LlmConfig, StructuredOutput},
    endpoint::Endpoint,
    reply::{Failure, Reply, Usage},
    request::{Key, Message, Part, Request, Speaker},
};
use crate::{
    error::{Error, Kind, Result},
    image::{self, resize::Filter},
    run_dir::sha256,
};

/// What servers differ in; learnt from their refusals.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Dialect {
    /// Most exact way to ask for a shape that the server takes.
    pub(super) structured: StructuredOutput,
    /// Whether the limit of the reply is called `max_completion_tokens`.
    pub(super) completion_limit: bool,
}

/// A request with everything that its content address depends on.
#[derive(Debug, Clone)]
pub(super) struct Prepared {
    pub(super) request: Request,
    pub(super) model: String,
    pub(super) key: Key,
    /// Canonical form, images by content: what the key is the hash of.
    pub(super) canonical: Vec<u8>,
}

impl Prepared {
    /// Resolves the model, joins messages if the recipe says so, and computes the address.
    ///
    /// # Errors
    /// No model is named, or an image cannot be read.
    pub(super) fn new(mut request: Request, endpoint: &Endpoint, config: &LlmConfig) -> Result<Self> {
        let model = request.model.clone().or_else(|| endpoint.model.clone()).ok_or_else(|| {
            let section = request.endpoint.name();
            Error::new(Kind::Config, "no model for a language-model server")
                .at(format!("[llm.{section}]"))
                .help(format!("set llm.{section}.model (or llm.generate.model for all three)"))
        })?;
        if config.merge_user_messages {
            request.messages = merge(std::mem::take(&mut request.messages));
        }
        for part in request.messages.iter_mut().flat_map(|m| &mut m.parts) {
            if let Part::Image { path, sha256: hash @ None } = part {
                *hash =
                    Some(sha256(path).map_err(|e| {
                        Error::new(Kind::Image, "an image cannot be read").at(path.display()).source(e)
                    })?);
            }
        }
        let canonical = canonical(&request, &model, endpoint, config)?;
        Ok(Self { key: Key(Sha256::digest(&canonical).into()), request, model, canonical })
    }

    /// Body of the HTTP request.
    ///
    /// # Errors
    /// An image cannot be read or decoded.
    pub(super) fn body(&self, endpoint: &Endpoint, config: &LlmConfig, dialect: Dialect) -> Result<Vec<u8>> {
        let sampling = &self.request.sampling;
        let (old, new) = match dialect.completion_limit {
            true => (None, Some(sampling.max_tokens)),
            false => (Some(sampling.max_tokens), None),
        };
        let body = Body {
            model: &self.model,
            messages: self.request.messages.iter().map(|m| wire_message(m, config)).collect::<Result<_>>()?,
            temperature: sampling.temperature,
            top_p: sampling.top_p,
            max_tokens: old,
            max_completion_tokens: new,
            seed: seed(&self.request),
            response_format: self.response_format(dialect.structured),
            extra: &endpoint.extra,
        };
        serde_json::to_vec(&body).map_err(|e| Error::new(Kind::Run, "request has no JSON form").source(e))
    }

    fn response_format(&self, structured: StructuredOutput) -> Option<Value> {
        let schema = self.request.schema.as_ref()?;
        match structured {
            StructuredOutput::JsonSchema => Some(json!({
                "type": "json_schema",
                "json_schema": { "name": schema.name, "strict": true, "schema": &*schema.schema },
            })),
            StructuredOutput::JsonObject => Some(json!({ "type": "json_object" })),
            StructuredOutput::Prompt => None,
        }
    }

    /// Tokens of prompt and reply: what is likely, and what they cannot exceed.
    pub(super) fn tokens(&self, image_tokens: u32) -> TokenBounds {
        let bytes: usize = self.request.messages.iter().flat_map(|m| &m.parts).map(text_bytes).sum();
        let schema = self.request.schema.as_ref().map_or(0, |s| s.schema.to_string().len());
        let overhead = 8 + 8 * self.request.messages.len() as u64;
        let images = self.request.images() as u64 * u64::from(image_tokens);
        let prompt = |text: usize| text as u64 + overhead + images;
        TokenBounds {
            likely_prompt: prompt((bytes + schema).div_ceil(4)),
            // A token of any byte-level vocabulary stands for at least one byte.
            most_prompt: prompt(bytes + schema),
            most_completion: u64::from(self.request.sampling.max_tokens),
            images: self.request.images() as u64,
        }
    }
}

fn text_bytes(part: &Part) -> usize {
    match part {
        Part::Text { text } => text.len(),
        Part::Image { .. } => 0,
    }
}

/// Tokens that a request may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TokenBounds {
    pub(super) likely_prompt: u64,
    pub(super) most_prompt: u64,
    pub(super) most_completion: u64,
    /// Images, whose tokens every model counts in its own way.
    pub(super) images: u64,
}

/// Tokens that an image cannot exceed on any known model.
const TOKENS_OF_ANY_IMAGE: u64 = 65_536;

impl TokenBounds {
    /// Bounds of a request that is only known by its canonical form.
    pub(super) fn of_canonical(canonical: &str, image_tokens: u32) -> Self {
        let value: Value = serde_json::from_str(canonical).unwrap_or_default();
        let count = canonical.matches("{\"image\":").count() as u64;
        let images = count * u64::from(image_tokens);
        let bytes = canonical.len() as u64;
        let most_completion = value["sampling"]["max_tokens"].as_u64().unwrap_or(u64::from(u32::MAX));
        Self { likely_prompt: bytes / 4 + images, most_prompt: bytes + images, most_completion, images: count }
    }

    /// The server's count where it is possible, an estimate otherwise: a server that lies must not decide how much of
    /// the budget is left.
    pub(super) fn believe(self, claimed: Option<Claimed>, reply_bytes: usize) -> Usage {
        // Even a vocabulary of long words has few tokens above 16 bytes; hidden reasoning counts up to the limit.
        let least = (reply_bytes as u64) / 16;
        let slack = |most: u64| most + most / 8 + 64;
        match claimed {
            Some(Claimed { prompt_tokens: Some(prompt), completion_tokens: Some(completion) })
                if prompt > 0
                    && prompt <= slack(self.most_prompt + self.images * TOKENS_OF_ANY_IMAGE)
                    && completion >= least
                    && completion <= slack(self.most_completion) =>
            {
                Usage { prompt_tokens: prompt, completion_tokens: completion, estimated: false }
            }
            _ => Usage {
                prompt_tokens: self.likely_prompt,
                completion_tokens: (reply_bytes as u64).div_ceil(4).clamp(1, self.most_completion.max(1)),
                estimated: true,
            },
        }
    }
}

/// Tokens as a server claims them.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
pub(super) struct Claimed {
    #[serde(default, deserialize_with = "count")]
    prompt_tokens: Option<u64>,
    #[serde(default, deserialize_with = "count")]
    completion_tokens: Option<u64>,
}

/// A count, whatever JSON a server makes of it.
fn count<'de, D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<Option<u64>, D::Error> {
    Ok(Value::deserialize(deserializer)?.as_u64())
}

#[derive(Serialize)]
struct Body<'a> {
    model: &'a str,
    messages: Vec<WireMessage<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    temperature: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    top_p: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_tokens: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_completion_tokens: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    seed: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    response_format: Option<Value>,
    #[serde(flatten)]
    extra: &'a Map<String, Value>,
}

#[derive(Serialize)]
struct WireMessage<'a> {
    role: Speaker,
    content: WireContent<'a>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum WireContent<'a> {
    // Plain text stays a string: many servers know nothing else.
    Text(Cow<'a, str>),
    Parts(Vec<WirePart<'a>>),
}

#[derive(Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum WirePart<'a> {
    Text { text: &'a str },
    ImageUrl { image_url: WireUrl },
}

#[derive(Serialize)]
struct WireUrl {
    url: String,
}

fn wire_message<'a>(message: &'a Message, config: &LlmConfig) -> Result<WireMessage<'a>> {
    let content = match message.parts.as_slice() {
        [] => WireContent::Text("".into()),
        [Part::Text { text }] => WireContent::Text(text.into()),
        parts => WireContent::Parts(parts.iter().map(|p| wire_part(p, config)).collect::<Result<_>>()?),
    };
    Ok(WireMessage { role: message.role, content })
}

fn wire_part<'a>(part: &'a Part, config: &LlmConfig) -> Result<WirePart<'a>> {
    Ok(match part {
        Part::Text { text } => WirePart::Text { text },
        Part::Image { path, .. } => {
            let bytes = jpeg(path, config.image_max_side, config.image_jpeg_quality)?;
            let url = format!("data:image/jpeg;base64,{}", base64::engine::general_purpose::STANDARD.encode(bytes));
            WirePart::ImageUrl { image_url: WireUrl { url } }
        }
    })
}

/// An image as it is sent: a JPEG file that is small enough goes as it is, everything else is scaled and encoded.
fn jpeg(path: &Path, max_side: usize, quality: u8) -> Result<Vec<u8>> {
    let bytes = std::fs::read(path)
        .map_err(|e| Error::new(Kind::Image, "an image cannot be read").at(path.display()).source(e))?;
    let picture = image::decode(&bytes, &path.display().to_string())?;
    let longest = picture.width.max(picture.height);
    if longest <= max_side && bytes.starts_with(&[0xff, 0xd8]) {
        return Ok(bytes);
    }
    let scaled = if longest > max_side {
        let side = |n: usize| ((n * max_side + longest / 2) / longest).max(1);
        image::resize::resize(&picture, side(picture.width), side(picture.height), Filter::Bicubic)
    } else {
        picture
    };
    let (width, height) = (scaled.width as u32, scaled.height as u32);
    let mut out = Vec::new();
    ::image::codecs::jpeg::JpegEncoder::new_with_quality(&mut out, quality)
        .encode(&scaled.data, width, height, ::image::ExtendedColorType::Rgb8)
        .map_err(|e| Error::new(Kind::Image, "an image cannot be encoded").at(path.display()).source(e))?;
    Ok(out)
}

/// Joins consecutive user messages; text meets text with a blank line between.
fn merge(messages: Vec<Message>) -> Vec<Message> {
    let mut merged: Vec<Message> = Vec::with_capacity(messages.len());
    for message in messages {
        match merged.last_mut() {
            Some(last) if last.role == Speaker::User && message.role == Speaker::User => {
                for part in message.parts {
                    match (last.parts.last_mut(), part) {
                        (Some(Part::Text { text: end }), Part::Text { text }) => {
                            *end = format!("{}\n\n{}", end.trim_end_matches('\n'), text);
                        }
                        (_, part) => last.parts.push(part),
                    }
                }
            }
            _ => merged.push(message),
        }
    }
    merged
}

/// Seed as it is sent: a fresh reply needs another one.
fn seed(request: &Request) -> Option<u64> {
    request.sampling.seed.map(|s| s.wrapping_add(u64::from(request.variant)))
}

fn canonical(request: &Request, model: &str, endpoint: &Endpoint, config: &LlmConfig) -> Result<Vec<u8>> {
    #[derive(Serialize)]
    struct Canonical<'a> {
        endpoint: &'a str,
        model: &'a str,
        messages: Vec<Value>,
        sampling: super::request::Sampling,
        #[serde(skip_serializing_if = "Option::is_none")]
        schema: Option<&'a super::request::ReplySchema>,
        variant: u32,
        #[serde(skip_serializing_if = "Map::is_empty")]
        extra: &'a Map<String, Value>,
    }
    let part = |p: &Part| match p {
        Part::Text { text } => json!({ "text": text }),
        Part::Image { sha256, .. } => json!({
            "image": sha256, "max_side": config.image_max_side, "quality": config.image_jpeg_quality,
        }),
    };
    let message = |m: &Message| json!({ "role": m.role, "parts": m.parts.iter().map(part).collect::<Vec<_>>() });
    let canonical = Canonical {
        endpoint: &endpoint.identity,
        model,
        messages: request.messages.iter().map(message).collect(),
        sampling: request.sampling,
        schema: request.schema.as_ref(),
        variant: request.variant,
        extra: &endpoint.extra,
    };
    serde_json::to_vec(&canonical).map_err(|e| Error::new(Kind::Run, "request has no JSON form").source(e))
}

/// The parts of a completion that are read; everything else stays in the raw reply.
#[derive(Deserialize)]
struct Completion {
    #[serde(default)]
    model: Option<String>,
    choices: Vec<Choice>,
    #[serde(default)]
    usage: Option<Claimed>,
    #[serde(default)]
    system_fingerprint: Option<String>,
}

#[derive(Deserialize)]
struct Choice {
    message: ChoiceMessage,
    #[serde(default)]
    finish_reason: Option<String>,
}

#[derive(Deserialize)]
struct ChoiceMessage {
    #[serde(default)]
    content: Option<Content>,
    #[serde(default)]
    refusal: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Content {
    Text(String),
    Parts(Vec<Value>),
}

/// A completion that was read.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Read {
    pub(super) text: String,
    pub(super) finish_reason: Option<String>,
    pub(super) refusal: Option<String>,
    pub(super) model: Option<String>,
    pub(super) fingerprint: Option<String>,
    pub(super) usage: Usage,
}

impl Read {
    /// Reads the body of a reply.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub(super) fn parse(raw: &str, bounds: TokenBounds) -> std::result::Result<Self, String> {
        let completion: Completion = serde_json::from_str(raw).map_err(|e| {
            let start: String = raw.trim_start().chars().take(60).collect();
            if start.is_empty() { "it is empty".to_string() } else { format!("{e}; it starts with {start:?}") }
        })?;
        let choice = completion.choices.into_iter().next().ok_or("it has no choices")?;
        let text = match choice.message.content {
            None => String::new(),
            Some(Content::Text(text)) => text,
            Some(Content::Parts(parts)) => parts.iter().filter_map(|p| p["text"].as_str()).collect::<Vec<_>>().concat(),
        };
        let refusal = choice.message.refusal.filter(|r| !r.is_empty());
        let bytes = text.len() + refusal.as_ref().map_or(0, String::len);
        Ok(Self {
            usage: bounds.believe(completion.usage, bytes),
            text,
            finish_reason: choice.finish_reason,
            refusal,
            model: completion.model,
            fingerprint: completion.system_fingerprint,
        })
    }

    /// What a stage gets.
    pub(super) fn into_reply(self, key: Key, usd: f64, latency_ms: u64, from_cache: bool) -> Result<Reply, Failure> {
        if self.text.is_empty() && self.finish_reason.as_deref() == Some("content_filter") {
            return Err(Failure::ContentFilter { message: "an empty reply with finish_reason content_filter".into() });
        }
        Ok(Reply {
            key,
            text: self.text,
            finish_reason: self.finish_reason,
            refusal: self.refusal,
            usage: self.usage,
            usd,
            latency_ms,
            model: self.model,
            fingerprint: self.fingerprint,
            from_cache,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::llm::{EndpointRole, ReplySchema};

    fn prepared(change: impl FnOnce(&mut Request, &mut LlmConfig)) -> (Prepared, Endpoint, LlmConfig) {
        let mut config = LlmConfig::default();
        config.generate.base_url = Some("http://127.0.0.1:1/v1".into());
        config.generate.model = Some("m".into());
        let user = |text: &str| Message::text(Speaker::User, text);
        let mut request = Request::new(
            EndpointRole::Generate,
            vec![Message::text(Speaker::System, "rules"), user("one\n"), user("two")],
        );
        change(&mut request, &mut config);
        let endpoint = Endpoint::resolve(EndpointRole::Generate, &config, &|_| None).unwrap();
        (Prepared::new(request, &endpoint, &config).unwrap(), endpoint, config)
    }

    fn body(change: impl FnOnce(&mut Request, &mut LlmConfig), dialect: Dialect) -> Value {
        let (prepared, endpoint, config) = prepared(change);
        serde_json::from_slice(&prepared.body(&endpoint, &config, dialect).unwrap()).unwrap()
    }

    const EXACT: Dialect = Dialect { structured: StructuredOutput::JsonSchema, completion_limit: false };

    #[test]
    fn the_body_says_what_the_dialect_allows() {
        let schema = || Some(ReplySchema { name: "s".into(), schema: json!({ "type": "object" }).into() });
        let exact = body(|r, _| r.schema = schema(), EXACT);
        assert_eq!(exact["response_format"]["json_schema"]["schema"]["type"], "object");
        assert_eq!((&exact["max_tokens"], &exact["max_completion_tokens"]), (&1500.into(), &Value::Null));
        assert_eq!(exact["messages"].as_array().unwrap().len(), 3);
        let simple = Dialect { structured: StructuredOutput::JsonObject, completion_limit: true };
        let simple = body(|r, _| r.schema = schema(), simple);
        assert_eq!(simple["response_format"], json!({ "type": "json_object" }));
        assert_eq!((&simple["max_tokens"], &simple["max_completion_tokens"]), (&Value::Null, &1500.into()));
        let none = body(|_, _| (), EXACT);
        assert_eq!(none.get("response_format"), None);
        let more = body(|_, c| drop(c.generate.extra_body.insert("top_k".into(), 3.into())), EXACT);
        assert_eq!(more["top_k"], 3);
        let seeded = body(|r, _| (r.sampling.seed, r.variant) = (Some(40), 2), EXACT);
        assert_eq!(seeded["seed"], 42);
    }

    #[test]
    fn consecutive_user_messages_are_joined_by_a_blank_line_if_asked() {
        let merged = body(|_, c| c.merge_user_messages = true, EXACT);
        assert_eq!(merged["messages"][1], json!({ "role": "user", "content": "one\n\ntwo" }));
    }

    #[test]
    fn everything_that_changes_a_reply_changes_the_address() {
        let key = |change: fn(&mut Request, &mut LlmConfig)| prepared(change).0.key;
        let base = key(|_, _| ());
        assert_eq!(base, key(|_, _| ()));
        assert_eq!(base, key(|_, c| c.concurrency = 3), "speed changes nothing");
        let changes: [fn(&mut Request, &mut LlmConfig); 8] = [
            |r, _| r.messages[2] = Message::text(Speaker::User, "three"),
            |r, _| r.sampling.temperature = Some(0.5),
            |r, _| r.sampling.max_tokens = 7,
            |r, _| r.model = Some("other".into()),
            |r, _| r.variant = 1,
            |r, _| r.schema = Some(ReplySchema { name: "s".into(), schema: Value::Null.into() }),
            |_, c| c.generate.identity = Some("elsewhere".into()),
            |_, c| c.merge_user_messages = true,
        ];
        let keys: std::collections::BTreeSet<_> = changes.into_iter().map(key).chain([base]).collect();
        assert_eq!(keys.len(), changes.len() + 1);
    }

    #[test]
    fn replies_of_all_servers_are_read_and_others_are_named() {
        let bounds = TokenBounds { likely_prompt: 10, most_prompt: 40, most_completion: 100, images: 0 };
        let read = |raw: &str| Read::parse(raw, bounds);
        let plain = read(r#"{"choices":[{"message":{"content":"hello"},"finish_reason":"stop"}],"usage":{"prompt_tokens":9,"completion_tokens":2}}"#).unwrap();
        assert_eq!(
            (plain.text.as_str(), plain.usage),
            ("hello", Usage { prompt_tokens: 9, completion_tokens: 2, estimated: false })
        );
        let parts =
            read(r#"{"choices":[{"message":{"content":[{"type":"text","text":"a"},{"type":"text","text":"b"}]}}]}"#)
                .unwrap();
        assert_eq!((parts.text.as_str(), parts.usage.estimated), ("ab", true));
        let null = read(r#"{"choices":[{"message":{"content":null,"refusal":"no"}}],"usage":{"prompt_tokens":-5,"completion_tokens":"x"}}"#).unwrap();
        assert_eq!((null.refusal.as_deref(), null.usage.estimated), (Some("no"), true));
        for lie in [r#"{"prompt_tokens":0,"completion_tokens":2}"#, r#"{"prompt_tokens":9,"completion_tokens":5000}"#] {
            let raw = format!(r#"{{"choices":[{{"message":{{"content":"hello"}}}}],"usage":{lie}}}"#);
            assert!(read(&raw).unwrap().usage.estimated, "{lie}");
        }
        for (raw, says) in
            [("", "empty"), ("<html>", "<html>"), (r#"{"choices":[]}"#, "no choices"), (r#"{"error":"x"}"#, "choices")]
        {
            assert!(read(raw).unwrap_err().contains(says), "{raw}");
        }
    }

    #[test]
    fn an_image_is_scaled_to_its_longest_side_and_a_small_jpeg_is_sent_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let (large, small) = (dir.path().join("l.png"), dir.path().join("s.jpg"));
        ::image::RgbImage::from_fn(90, 40, |x, _| ::image::Rgb([x as u8, 1, 2])).save(&large).unwrap();
        ::image::RgbImage::from_fn(20, 10, |x, _| ::image::Rgb([x as u8, 1, 2])).save(&small).unwrap();
        let sent = image::decode(&jpeg(&large, 30, 90).unwrap(), "sent").unwrap();
        assert_eq!((sent.width, sent.height), (30, 13));
        assert_eq!(jpeg(&small, 30, 90).unwrap(), std::fs::read(&small).unwrap());
    }
}

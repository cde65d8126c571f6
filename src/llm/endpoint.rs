//! Servers and models of a recipe, resolved: URL, key, identity. The only place that reads keys.

use std::{fmt, net::IpAddr, path::PathBuf};

use reqwest::Url;
use serde_json::{Map, Value};

use super::{
    config::{Auth, EndpointConfig, LlmConfig, StructuredOutput},
    request::EndpointRole,
};
use crate::error::{Error, Kind, Result};

/// Where OpenAI answers.
const OPENAI: &str = "https://api.openai.com/v1";

/// Part of an Azure URL before the name of a model.
const DEPLOYMENTS: &str = "/deployments/";

/// Prefix of a base URL that means a rehearsal server inside this process.
const MOCK: &str = "mock:";

/// A key; shown nowhere.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Secret(String);

impl Secret {
    /// The key itself, for a request header and for [`Secret::redact`].
    pub(super) fn reveal(&self) -> &str {
        &self.0
    }

    /// `text` without the key. Servers do quote keys in their errors.
    pub(super) fn redact(&self, text: &str) -> Option<String> {
        (!self.0.is_empty() && text.contains(&self.0)).then(|| text.replace(&self.0, "[key]"))
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[key]")
    }
}

/// Where an endpoint is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Place {
    /// A server.
    Url(Url),
    /// A rehearsal server inside this process, with the name of its rules.
    Mock(String),
}

/// A resolved endpoint.
#[derive(Debug, Clone)]
pub(super) struct Endpoint {
    pub(super) place: Place,
    /// Name in content addresses and in the ledger.
    pub(super) identity: String,
    pub(super) model: Option<String>,
    pub(super) auth: Auth,
    pub(super) secret: Option<Secret>,
    /// More authorities for its certificate, PEM.
    pub(super) ca_file: Option<PathBuf>,
    pub(super) structured: StructuredOutput,
    pub(super) extra: Map<String, Value>,
}

impl Endpoint {
    /// Resolves an endpoint; `env` looks up environment variables.
    ///
    /// # Errors
    /// The URL cannot be used, or would send the key in the clear.
    pub(super) fn resolve(
        role: EndpointRole,
        config: &LlmConfig,
        env: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Self> {
        let (own, base) = (role.config(config), &config.generate);
        let pick = |get: fn(&EndpointConfig) -> &Option<String>| get(own).clone().or_else(|| get(base).clone());
        let set = |name: &str| env(name).filter(|v| !v.trim().is_empty());
        let url = pick(|e| &e.base_url)
            .or_else(|| set("OPENAI_BASE_URL"))
            .or_else(|| set("OPENAI_API_BASE"))
            .unwrap_or_else(|| OPENAI.into());
        let at = format!("[llm.{}] base_url", role.name());
        let place = match url.strip_prefix(MOCK) {
            Some(rules) => Place::Mock(rules.to_string()),
            None => Place::Url(parse(&url, pick(|e| &e.api_version), config.allow_plain_http, &at)?),
        };
        let azure = matches!(&place, Place::Url(u) if is_azure(u));
        let auth = match own.auth.or(base.auth) {
            Some(auth) => auth,
            None if azure => Auth::ApiKey,
            None => Auth::Bearer,
        };
        let variable = pick(|e| &e.api_key_env).unwrap_or_else(|| "OPENAI_API_KEY".into());
        let secret = match (&place, auth) {
            (Place::Mock(_), _) | (_, Auth::None) => None,
            (Place::Url(_), _) => set(&variable).map(|key| Secret(key.trim().to_string())),
        };
        if let (Place::Url(u), None, true) = (&place, &secret, auth != Auth::None)
            && !is_loopback(u)
        {
            return Err(Error::new(Kind::Config, "no key for a language-model server")
                .at(&at)
                .expected(format!("the environment variable {variable}"))
                .help(format!(
                    "export {variable}=..., or set llm.{}.auth = \"none\" for a server without keys",
                    role.name()
                )));
        }
        let identity = pick(|e| &e.identity).unwrap_or_else(|| match &place {
            Place::Url(url) => shown(url),
            Place::Mock(_) => url.clone(),
        });
        let structured = own.structured_output.or(base.structured_output).unwrap_or(StructuredOutput::JsonSchema);
        let mut extra = base.extra_body.clone();
        extra.extend(own.extra_body.clone());
        let (model, ca_file) = (pick(|e| &e.model), own.ca_file.clone().or_else(|| base.ca_file.clone()));
        Ok(Self { place, identity, model, auth, secret, ca_file, structured, extra })
    }
}

/// Address of a resource below the base URL; its query (Azure's api-version) is kept.
pub(super) fn below(base: &Url, path: &str) -> Url {
    let mut url = base.clone();
    url.set_path(&format!("{}/{path}", base.path().trim_end_matches('/')));
    url
}

/// Where files and batches of a base URL are, and Azure's name of the model that it leads to: there a deployment is a
/// part of the path of single requests, but not of that of batches.
pub(super) fn batch_desk(base: &Url) -> (Url, Option<String>) {
    let path = base.path().trim_end_matches('/');
    match path.split_once(DEPLOYMENTS) {
        Some((above, name)) if !name.is_empty() && !name.contains('/') => {
            let mut url = base.clone();
            url.set_path(above);
            (url, Some(name.to_string()))
        }
        _ => (base.clone(), None),
    }
}

fn parse(text: &str, api_version: Option<String>, allow_plain: bool, at: &str) -> Result<Url> {
    let wrong = |expected: &str, help: &str| {
        // The URL itself may hold a password, so it is not repeated.
        Error::new(Kind::Config, "base URL of a language-model server cannot be used")
            .at(at)
            .expected(expected)
            .help(help)
    };
    let mut url = Url::parse(text.trim())
        .map_err(|e| wrong("https://HOST/v1", "give the part of the URL before /chat/completions").found(e))?;
    if !url.username().is_empty() || url.password().is_some() {
        return Err(wrong("no user name or password in the URL", "put the key into an environment variable"));
    }
    if !matches!(url.scheme(), "https" | "http") || url.host_str().is_none() {
        return Err(wrong("https://HOST/v1", "give the part of the URL before /chat/completions"));
    }
    if url.scheme() == "http" && !is_loopback(&url) && !allow_plain {
        return Err(wrong("https", "set llm.allow_plain_http = true if this network may read prompts and key")
            .found("plain http to another machine"));
    }
    url.set_fragment(None);
    let path = url.path().trim_end_matches('/').trim_end_matches("/chat/completions").to_string();
    url.set_path(&path);
    if let Some(version) = api_version.filter(|_| !url.query_pairs().any(|(k, _)| k == "api-version")) {
        url.query_pairs_mut().append_pair("api-version", &version);
    }
    Ok(url)
}

/// Whether traffic to `url` stays on this machine.
pub(super) fn is_loopback(url: &Url) -> bool {
    match url.host_str() {
        Some("localhost") => true,
        Some(host) => host.trim_matches(['[', ']']).parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback()),
        None => false,
    }
}

fn is_azure(url: &Url) -> bool {
    url.host_str().is_some_and(|h| h.ends_with(".azure.com")) || url.query_pairs().any(|(k, _)| k == "api-version")
}

/// A URL as the ledger has it: without query values, which may be secrets, except the API version.
fn shown(url: &Url) -> String {
    let mut plain = url.clone();
    plain.set_query(None);
    let mut text = plain.to_string().trim_end_matches('/').to_string();
    for (key, value) in url.query_pairs() {
        let value = if key == "api-version" { value } else { "...".into() };
        text.push_str(&format!("{}{key}={value}", if text.contains('?') { '&' } else { '?' }));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(config: &LlmConfig, env: &[(&str, &str)]) -> Result<Endpoint> {
        let look = |name: &str| env.iter().find(|(k, _)| *k == name).map(|(_, v)| v.to_string());
        Endpoint::resolve(EndpointRole::Qc, config, &look)
    }

    fn with(url: &str) -> LlmConfig {
        let mut config = LlmConfig::default();
        config.generate.base_url = Some(url.into());
        config
    }

    fn url(endpoint: &Endpoint) -> String {
        match &endpoint.place {
            Place::Url(url) => below(url, "chat/completions").to_string(),
            Place::Mock(rules) => panic!("mock {rules}"),
        }
    }

    const KEY: (&str, &str) = ("OPENAI_API_KEY", "sk-planted");

    #[test]
    fn the_environment_names_the_server_unless_the_recipe_does() {
        let config = LlmConfig::default();
        let plain = resolve(&config, &[KEY]).unwrap();
        assert_eq!(url(&plain), "https://api.openai.com/v1/chat/completions");
        let old = ("OPENAI_API_BASE", "https://old.example/v1/");
        assert_eq!(url(&resolve(&config, &[KEY, old]).unwrap()), "https://old.example/v1/chat/completions");
        let new = ("OPENAI_BASE_URL", "https://new.example/v1");
        assert_eq!(url(&resolve(&config, &[KEY, old, new]).unwrap()), "https://new.example/v1/chat/completions");
        let mut config = with("https://recipe.example/v1/chat/completions");
        assert_eq!(url(&resolve(&config, &[KEY, new]).unwrap()), "https://recipe.example/v1/chat/completions");
        config.qc.base_url = Some("https://qc.example/v1".into());
        config.qc.api_key_env = Some("QC_KEY".into());
        let own = resolve(&config, &[KEY, ("QC_KEY", "other")]).unwrap();
        assert_eq!(url(&own), "https://qc.example/v1/chat/completions");
        assert_eq!(own.secret.unwrap().reveal(), "other");
    }

    #[test]
    fn azure_urls_keep_their_version_and_get_their_header() {
        let mut config = with("https://lab.openai.azure.com/openai/deployments/gpt-4o");
        config.generate.api_version = Some("2024-06-01".into());
        let azure = resolve(&config, &[KEY]).unwrap();
        let want = "https://lab.openai.azure.com/openai/deployments/gpt-4o/chat/completions?api-version=2024-06-01";
        assert_eq!(url(&azure), want);
        assert_eq!(azure.auth, Auth::ApiKey);
        let given = resolve(&with("https://proxy.example/dep?api-version=1"), &[KEY]).unwrap();
        assert_eq!(
            (url(&given).as_str(), given.auth),
            ("https://proxy.example/dep/chat/completions?api-version=1", Auth::ApiKey)
        );
    }

    #[test]
    fn batches_are_beside_the_deployments_of_azure() {
        let desk = |text: &str| {
            let (url, deployment) = batch_desk(&text.parse().unwrap());
            (below(&url, "batches").to_string(), deployment)
        };
        let azure = "https://lab.openai.azure.com/openai/deployments/gpt-4o?api-version=1";
        let batches = "https://lab.openai.azure.com/openai/batches?api-version=1";
        assert_eq!(desk(azure), (batches.to_string(), Some("gpt-4o".to_string())));
        for plain in ["https://lab.openai.azure.com/openai/v1", "https://host/deployments/a/b/v1"] {
            assert_eq!(desk(plain), (format!("{plain}/batches"), None));
        }
    }

    #[test]
    fn plain_http_is_for_this_machine_unless_allowed() {
        for here in ["http://127.0.0.1:8000/v1", "http://localhost/v1", "http://[::1]:9/v1"] {
            assert!(resolve(&with(here), &[]).is_ok(), "{here} needs neither TLS nor a key");
        }
        for there in ["http://10.0.0.7:8000/v1", "http://localhost.example/v1", "http://127.0.0.1.example/v1"] {
            let error = resolve(&with(there), &[KEY]).unwrap_err();
            assert!(error.help_line().unwrap().contains("allow_plain_http"), "{there}: {error}");
        }
        let mut allowed = with("http://10.0.0.7:8000/v1");
        allowed.allow_plain_http = true;
        resolve(&allowed, &[KEY]).unwrap();
    }

    #[test]
    fn secrets_show_up_in_no_error_and_no_identity() {
        for bad in ["https://user:sk-planted@host/v1", "ftp://sk-planted/v1", "https://[sk-planted"] {
            let error = resolve(&with(bad), &[KEY]).unwrap_err();
            assert!(!format!("{error} {error:?}").contains("sk-planted"), "{error:?}");
        }
        let endpoint = resolve(&with("https://host/v1?token=sk-planted"), &[KEY]).unwrap();
        assert_eq!(endpoint.identity, "https://host/v1?token=...");
        assert!(!format!("{:?}", endpoint.secret).contains("planted"));
        assert_eq!(endpoint.secret.unwrap().redact("bad key sk-planted!").unwrap(), "bad key [key]!");
        let missing = resolve(&LlmConfig::default(), &[]).unwrap_err();
        assert!(missing.to_string().contains("OPENAI_API_KEY"), "{missing}");
    }
}

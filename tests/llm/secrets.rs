//! A planted key shows up nowhere: not in the ledger, not in errors, not in debug output.

use medtune::llm::{Auth, mock::Fault};

use super::*;

const KEY: &str = "sk-planted-0123456789abcdef";

/// Fails if a file of the directory holds the key.
#[track_caller]
fn no_key_below(dir: &Path) {
    let files = medtune::run_dir::files_below(dir).unwrap();
    assert!(!files.is_empty());
    for file in files {
        let bytes = std::fs::read(&file).unwrap();
        assert!(!bytes.windows(KEY.len()).any(|w| w == KEY.as_bytes()), "the key is in {}", file.display());
    }
}

/// Says the key itself, as servers do that quote headers.
struct Telltale;

impl Rules for Telltale {
    fn name(&self) -> &'static str {
        "telltale"
    }

    fn about(&self) -> &'static str {
        "Quotes the key."
    }

    fn answer(&self, asked: &Asked, _draw: &mut ChaCha8Rng) -> Said {
        Said::text(json!({ "question": format!("{KEY} {}", asked.last()), "length": 1 }).to_string())
    }
}

#[test]
fn the_key_reaches_the_server_and_nothing_else() {
    for auth in [None, Some(Auth::ApiKey)] {
        let (dir, server) = (
            tempfile::tempdir().unwrap(),
            server(|c| {
                c.key = Some(KEY.into());
                c.rules = &Telltale;
                c.faults.rates.insert(Fault::ServerError, 0.2);
            }),
        );
        let mut config = config(&server.base_url());
        config.generate.auth = auth;
        let client = open_with(&config, dir.path(), &[("OPENAI_API_KEY", KEY)]);
        let outcome = job(&client, 20).unwrap();
        assert_eq!(outcome.rows.len(), 20, "{:?}", outcome.failures);
        assert!(outcome.rows.values().all(|row| row["question"].as_str().unwrap().starts_with("[key] ")));
        assert!(!format!("{client:?} {:?}", client.totals()).contains(KEY));
        drop(client);
        no_key_below(dir.path());
    }
}

#[test]
fn a_wrong_key_stops_the_run_with_advice_and_without_the_key() {
    let (dir, server) = (tempfile::tempdir().unwrap(), server(|c| c.key = Some("another".into())));
    let client = open_with(&config(&server.base_url()), dir.path(), &[("OPENAI_API_KEY", KEY)]);
    let error = job(&client, 500).err().unwrap();
    assert!(error.to_string().contains("401") && error.help_line().unwrap().contains("key"), "{error}");
    assert!(!format!("{error} {error:?} {:?}", error.help_line()).contains(KEY));
    let attempts = client.totals().unwrap().attempts;
    assert!(attempts <= 16, "only those that were under way together: {attempts}");
    drop(client);
    no_key_below(dir.path());
}

#[test]
fn plain_http_to_another_machine_is_refused_before_anything_is_sent() {
    let dir = tempfile::tempdir().unwrap();
    let config = config("http://192.0.2.1:8000/v1");
    let look = |_: &str| Some(KEY.to_string());
    let error = Client::open_with(&config, options(dir.path()), &look).err().unwrap();
    assert!(error.help_line().unwrap().contains("allow_plain_http"), "{error}");
}

#[test]
fn a_server_that_does_not_speak_tls_never_sees_the_request() {
    let (dir, server) = (tempfile::tempdir().unwrap(), server(|_| {}));
    let mut config = config(&server.base_url().replace("http://", "https://"));
    config.max_attempts = 2;
    let client = open_with(&config, dir.path(), &[("OPENAI_API_KEY", KEY)]);
    let outcome = job(&client, 3).unwrap();
    assert!(outcome.failures.values().all(|f| f == "connection") && outcome.failures.len() == 3);
    let totals = client.totals().unwrap();
    assert_eq!((server.stats().requests, totals.failed, totals.in_doubt), (0, 6, 0));
}

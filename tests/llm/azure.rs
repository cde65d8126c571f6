//! Azure's way: the model in the path, an API version in the query, the key in a header of its own, batches beside the
//! deployments.

use medtune::{
    Kind,
    llm::{Mode, mock::Said},
};

use super::*;

/// Answers with the name of the model that was asked for.
struct Named;

impl Rules for Named {
    fn name(&self) -> &'static str {
        "named"
    }

    fn about(&self) -> &'static str {
        "Says which model was asked."
    }

    fn answer(&self, asked: &Asked, _draw: &mut ChaCha8Rng) -> Said {
        Said::text(asked.model.clone())
    }
}

const KEY: &str = "azure-planted";

fn azure(mode: Mode, rules: &'static dyn Rules) -> (MockServer, LlmConfig) {
    let server = server(|c| (c.key, c.rules) = (Some(KEY.into()), rules));
    let mut config = config(&server.azure_url("lab-gpt-4o"));
    config.generate.api_version = Some("2024-10-21".into());
    config.mode = mode;
    (config.batch.requests, config.batch.poll) = (30, 0.02);
    (server, config)
}

#[test]
fn single_requests_and_batches_give_the_same_rows() {
    for mode in [Mode::Online, Mode::Batch] {
        let (dir, (server, config)) = (tempfile::tempdir().unwrap(), azure(mode, &Echo));
        let client = open_with(&config, dir.path(), &[("OPENAI_API_KEY", KEY)]);
        assert_eq!(job(&client, 50).unwrap().rows, truth(50), "{mode:?}");
        let stats = server.stats();
        assert_eq!(stats.batches, if mode == Mode::Batch { 2 } else { 0 });
        paid_once(&stats, &client.totals().unwrap());
    }
}

#[test]
fn a_batch_names_the_deployment_and_keeps_the_address_of_the_request() {
    let (dir, (_server, config)) = (tempfile::tempdir().unwrap(), azure(Mode::Batch, &Named));
    let client = open_with(&config, dir.path(), &[("OPENAI_API_KEY", KEY)]);
    let request = Request { schema: None, ..request(0) };
    let mut said = None;
    let note = |(), reply: std::result::Result<Reply, Failure>| {
        said = Some(reply.unwrap().text);
        Ok(())
    };
    client.run([Ok(((), request.clone()))], note).unwrap();
    assert_eq!(said.as_deref(), Some("lab-gpt-4o"));
    assert!(client.cached(&request).unwrap().is_some(), "found again under the recipe's name of the model");
}

#[test]
fn a_bearer_token_and_a_missing_version_are_refused_with_advice() {
    let (dir, (_server, mut config)) = (tempfile::tempdir().unwrap(), azure(Mode::Online, &Echo));
    config.generate.auth = Some(medtune::llm::Auth::Bearer);
    let error = job(&open_with(&config, dir.path(), &[("OPENAI_API_KEY", KEY)]), 3).err().unwrap();
    assert!(error.kind() == Kind::Run && error.to_string().contains("401"), "{error}");
    config.generate.auth = Some(medtune::llm::Auth::ApiKey);
    config.generate.api_version = None;
    let error = job(&open_with(&config, dir.path(), &[("OPENAI_API_KEY", KEY)]), 3).err().unwrap();
    assert!(error.to_string().contains("404") && !error.to_string().contains(KEY), "{error}");
}

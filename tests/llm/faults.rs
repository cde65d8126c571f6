//! The fault matrix: whatever a server does, the rows are those of a faultless run, or failures that are counted; and
//! nothing is paid for twice.

use std::time::Duration;

use medtune::llm::{
    InDoubt, Price,
    mock::{Fault, MockConfig},
};

use super::*;

const ROWS: usize = 80;

fn faulty(fault: Fault, rate: f64) -> impl FnOnce(&mut MockConfig) {
    move |c| {
        c.faults.rates.insert(fault, rate);
        c.faults.retry_after = Duration::from_millis(20);
        c.faults.slow = Duration::from_millis(2000);
    }
}

/// Faults after which the next attempt can succeed.
const PASSING: [Fault; 6] =
    [Fault::RateLimit, Fault::ServerError, Fault::Slow, Fault::Drop, Fault::Cut, Fault::NotJson];

/// Faults of the reply itself.
const FLAWS: [Fault; 4] = [Fault::Truncated, Fault::WrongSchema, Fault::Refusal, Fault::Empty];

#[test]
fn faults_on_the_way_leave_no_trace_in_the_rows() {
    for fault in PASSING {
        let (dir, server) = (tempfile::tempdir().unwrap(), server(faulty(fault, 0.3)));
        let mut config = config(&server.base_url());
        config.timeout = 0.3;
        let client = open(&config, dir.path());
        let outcome = job(&client, ROWS).unwrap();
        let (stats, totals) = (server.stats(), client.totals().unwrap());
        println!("{}: {stats:?}", fault.name());
        assert_eq!(outcome.failures, BTreeMap::new(), "{}", fault.name());
        assert_eq!(outcome.rows, truth(ROWS), "{}", fault.name());
        assert!(stats.faults[fault.name()] as usize > ROWS / 10, "{}: {stats:?}", fault.name());
        assert_eq!(stats.paid, ROWS as u64, "{}", fault.name());
        assert_eq!(totals.attempts, stats.requests, "{}: every attempt is on file", fault.name());
        paid_once(&stats, &totals);
        // Once more from the ledger: the same rows, and the server hears nothing.
        let again = job(&client, ROWS).unwrap();
        assert_eq!((again.rows, server.stats()), (outcome.rows, stats));
        drop(client);
        consistent(&dir.path().join("ledger.sqlite"));
    }
}

#[test]
fn flawed_replies_are_kept_and_asked_for_afresh_or_counted() {
    for fault in FLAWS {
        let (dir, server) = (tempfile::tempdir().unwrap(), server(faulty(fault, 0.4)));
        let client = open(&config(&server.base_url()), dir.path());
        let outcome = job(&client, ROWS).unwrap();
        let (stats, totals) = (server.stats(), client.totals().unwrap());
        println!("{}: {} failures, {stats:?}", fault.name(), outcome.failures.len());
        for (row, value) in &outcome.rows {
            assert_eq!(value, &truth(ROWS)[row], "{}", fault.name());
        }
        let expected = match fault {
            Fault::Truncated => "malformed",
            Fault::WrongSchema => "wrong_shape",
            Fault::Refusal => "refused",
            _ => "content_filter",
        };
        assert!(outcome.failures.values().all(|name| name == expected), "{:?}", outcome.failures);
        // Four flaws in a row have a chance of 0.4^4.
        assert!(outcome.failures.len() < ROWS / 8, "{}: {:?}", fault.name(), outcome.failures);
        assert_eq!(stats.paid, outcome.asked, "each fresh reply is paid for, and only those");
        paid_once(&stats, &totals);
        drop(client);
        let reopened = open(&config(&server.base_url()), dir.path());
        let again = job(&reopened, ROWS).unwrap();
        assert_eq!((again.rows, again.failures), (outcome.rows, outcome.failures), "{}", fault.name());
        assert_eq!(server.stats(), stats, "parsing again costs nothing");
    }
}

#[test]
fn a_server_that_lies_about_tokens_does_not_decide_the_cost() {
    let price = Price { prompt: 10.0, completion: 30.0, image_tokens: 0 };
    let cost = |rate: f64| {
        let (dir, server) = (tempfile::tempdir().unwrap(), server(faulty(Fault::Usage, rate)));
        let mut config = config(&server.base_url());
        config.prices.insert("test-model".into(), price);
        let client = open(&config, dir.path());
        assert_eq!(job(&client, ROWS).unwrap().rows, truth(ROWS));
        (client.totals().unwrap(), server.stats())
    };
    let ((honest, _), (lied, stats)) = (cost(0.0), cost(1.0));
    assert_eq!((honest.usage_estimated, lied.usage_estimated), (0, ROWS as u64));
    assert_eq!(stats.faults["usage"], ROWS as u64);
    let ratio = lied.usd / honest.usd;
    assert!(honest.usd > 0.0 && (0.5..2.0).contains(&ratio), "{} and {}", honest.usd, lied.usd);
}

#[test]
fn a_server_without_json_schemas_is_asked_more_simply_and_that_is_remembered() {
    let (dir, server) = (tempfile::tempdir().unwrap(), server(faulty(Fault::NoJsonSchema, 1.0)));
    let client = open(&config(&server.base_url()), dir.path());
    assert_eq!(job(&client, ROWS).unwrap().rows, truth(ROWS));
    let first = server.stats();
    let rejected = first.faults["no-json-schema"];
    assert!((1..=16).contains(&rejected), "{rejected} of {ROWS}: only those under way together");
    drop(client);
    let client = open(&config(&server.base_url()), dir.path());
    assert_eq!(job(&client, ROWS + 10).unwrap().rows, truth(ROWS + 10));
    let second = server.stats();
    assert_eq!((second.paid, second.faults["no-json-schema"]), (ROWS as u64 + 10, rejected));
}

#[test]
fn filtered_prompts_are_failures_with_a_name() {
    let (dir, server) = (
        tempfile::tempdir().unwrap(),
        server(|c| {
            c.faults.rates.insert(Fault::Filter, 1.0);
        }),
    );
    let client = open(&config(&server.base_url()), dir.path());
    let outcome = job(&client, 10).unwrap();
    assert!(outcome.failures.values().all(|f| f == "content_filter"), "{:?}", outcome.failures);
    assert_eq!((outcome.failures.len(), server.stats().paid), (10, 0));
}

#[test]
fn what_may_have_been_paid_for_is_not_sent_again_where_the_recipe_forbids_it() {
    let (dir, server) = (
        tempfile::tempdir().unwrap(),
        server(|c| {
            faulty(Fault::Cut, 0.3)(c);
            c.idempotent = false;
        }),
    );
    let mut config = config(&server.base_url());
    config.in_doubt = InDoubt::Fail;
    let client = open(&config, dir.path());
    let outcome = job(&client, ROWS).unwrap();
    let stats = server.stats();
    assert_eq!(outcome.failures.len() as u64, stats.faults["cut"]);
    assert!(outcome.failures.values().all(|f| f == "broken_connection"), "{:?}", outcome.failures);
    assert_eq!((stats.paid, stats.paid_twice), (ROWS as u64, 0));
    drop(client);
    let outcome = job(&open(&config, dir.path()), ROWS).unwrap();
    assert!(outcome.failures.values().all(|f| f == "in_doubt"), "{:?}", outcome.failures);
    assert_eq!(server.stats().paid, ROWS as u64);
}

#[test]
fn all_faults_together() {
    let (dir, server) = (
        tempfile::tempdir().unwrap(),
        server(|c| {
            for fault in PASSING.into_iter().chain(FLAWS).chain([Fault::Usage]) {
                faulty(fault, 0.06)(c);
            }
        }),
    );
    let mut config = config(&server.base_url());
    config.timeout = 0.3;
    let client = open(&config, dir.path());
    let outcome = job(&client, 4 * ROWS).unwrap();
    let stats = server.stats();
    println!("{} failures, {stats:?}", outcome.failures.len());
    for (row, value) in &outcome.rows {
        assert_eq!(value, &truth(4 * ROWS)[row]);
    }
    assert!(outcome.failures.len() < ROWS / 8);
    assert_eq!(stats.faults.len(), PASSING.len() + FLAWS.len() + 1, "{stats:?}");
    paid_once(&stats, &client.totals().unwrap());
}

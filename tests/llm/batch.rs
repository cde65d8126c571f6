//! The Batch API: upload, poll, collect, expiry, partial failure, and a kill in the middle.

use std::{sync::atomic::Ordering, time::Duration};

use medtune::{
    Kind,
    llm::{Mode, mock::Fault},
};

use super::*;

const ROWS: usize = 100;

fn batch_config(base_url: &str) -> LlmConfig {
    let mut config = config(base_url);
    config.mode = Mode::Batch;
    (config.batch.requests, config.batch.poll) = (40, 0.02);
    config
}

#[test]
fn a_batch_gives_the_rows_that_single_requests_give() {
    let (dir, server) = (tempfile::tempdir().unwrap(), server(|c| c.latency = Duration::from_millis(60)));
    let mut config = batch_config(&server.base_url());
    let client = open(&config, dir.path());
    assert_eq!(job(&client, ROWS).unwrap().rows, truth(ROWS));
    let stats = server.stats();
    assert_eq!((stats.paid, stats.batches), (ROWS as u64, 3), "{stats:?}");
    paid_once(&stats, &client.totals().unwrap());
    drop(client);
    consistent(&dir.path().join("ledger.sqlite"));
    config.mode = Mode::Online;
    assert_eq!(job(&open(&config, dir.path()), ROWS).unwrap().rows, truth(ROWS));
    assert_eq!(server.stats(), stats, "both ways share the ledger");
}

#[test]
fn expired_batches_and_failed_items_are_completed_by_later_ones() {
    let (dir, server) = (
        tempfile::tempdir().unwrap(),
        server(|c| {
            c.faults.rates.insert(Fault::Expire, 0.5);
            c.faults.rates.insert(Fault::ServerError, 0.2);
            c.faults.rates.insert(Fault::Refusal, 0.2);
        }),
    );
    let mut config = batch_config(&server.base_url());
    config.max_attempts = 20;
    let client = open(&config, dir.path());
    let outcome = job(&client, ROWS).unwrap();
    let stats = server.stats();
    println!("{stats:?}");
    for (row, value) in &outcome.rows {
        assert_eq!(value, &truth(ROWS)[row]);
    }
    assert!(outcome.failures.values().all(|f| f == "refused") && outcome.failures.len() < 5, "{:?}", outcome.failures);
    assert!(stats.faults["expire"] > 0 && stats.faults["500"] > 0 && stats.faults["refusal"] > 0, "{stats:?}");
    paid_once(&stats, &client.totals().unwrap());
}

#[test]
fn a_batch_that_is_under_way_when_the_process_ends_is_collected_by_the_next() {
    let (dir, server) = (tempfile::tempdir().unwrap(), server(|c| c.latency = Duration::from_millis(1500)));
    let mut config = batch_config(&server.base_url());
    config.batch.requests = ROWS;
    let options = options(dir.path());
    let stop = Arc::clone(&options.stop);
    let client = Client::open_with(&config, options, &|_| None).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while server.stats().batches == 0 {
                std::thread::sleep(Duration::from_millis(5));
            }
            stop.store(true, Ordering::Relaxed);
        });
        assert_eq!(job(&client, ROWS).err().unwrap().kind(), Kind::Interrupted);
    });
    let before = client.totals().unwrap();
    assert_eq!((before.replies, before.in_doubt), (0, ROWS as u64), "the batch is at the server");
    drop(client);
    // As if the confirmation of the batch had never arrived: it is found by its tag.
    let connection = rusqlite::Connection::open(dir.path().join("ledger.sqlite")).unwrap();
    connection.execute("UPDATE batches SET batch = NULL, state = 'creating'", []).unwrap();
    drop(connection);
    let client = open(&config, dir.path());
    assert_eq!(job(&client, ROWS).unwrap().rows, truth(ROWS));
    let stats = server.stats();
    assert_eq!((stats.batches, stats.paid, stats.paid_twice), (1, ROWS as u64, 0));
    assert_eq!(client.totals().unwrap().in_doubt, 0);
}

#[test]
fn a_batch_that_never_reached_the_server_is_sent_again() {
    let dir = tempfile::tempdir().unwrap();
    let gone = server(|_| {}).base_url();
    let mut config = batch_config(&gone);
    config.max_attempts = 2;
    config.generate.identity = Some("one server".into());
    let error = job(&open(&config, dir.path()), ROWS).err().unwrap();
    assert!(error.to_string().contains("upload"), "{error}");
    let server = server(|_| {});
    config.generate.base_url = Some(server.base_url());
    let client = open(&config, dir.path());
    assert_eq!(job(&client, ROWS).unwrap().rows, truth(ROWS));
    assert_eq!((server.stats().paid, client.totals().unwrap().in_doubt), (ROWS as u64, 0));
}

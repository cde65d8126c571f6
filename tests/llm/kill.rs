//! `kill -9` at random moments: the ledger stays whole, and what was paid for is not paid for again.

use std::{
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::Duration,
};

use medtune::{
    llm::{Mode, ledger_totals},
    random::stream,
};
use rand::RngExt;

use super::*;

/// Kills of one job.
const KILLS: usize = 22;

/// A job that is killed.
struct Victim {
    batches: bool,
    rows: usize,
    /// Whether the server knows idempotency keys.
    idempotent: bool,
    latency: Duration,
}

/// Requests that go into one batch.
const BATCH: usize = 60;

/// The job as a process of its own; does nothing unless the test below starts it.
#[test]
fn driver() {
    let Ok(base_url) = std::env::var("MEDTUNE_TEST_SERVER") else { return };
    let dir = PathBuf::from(std::env::var("MEDTUNE_TEST_DIR").unwrap());
    let mut config = LlmConfig { concurrency: 32, ..config(&base_url) };
    if std::env::var_os("MEDTUNE_TEST_BATCHES").is_some() {
        config.mode = Mode::Batch;
        (config.batch.requests, config.batch.poll) = (BATCH, 0.01);
    }
    let rows = std::env::var("MEDTUNE_TEST_ROWS").unwrap().parse().unwrap();
    let outcome = job(&open(&config, &dir), rows).unwrap();
    assert_eq!(outcome.failures, BTreeMap::new());
    let text: String = outcome.rows.values().map(|row| format!("{row}\n")).collect();
    medtune::run_dir::write_atomic(&dir.join("rows.jsonl"), text.as_bytes()).unwrap();
}

fn start(victim: &Victim, base_url: &str, dir: &Path) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["llm::kill::driver", "--exact", "--test-threads=1"])
        .env("MEDTUNE_TEST_SERVER", base_url)
        .env("MEDTUNE_TEST_DIR", dir)
        .env("MEDTUNE_TEST_ROWS", victim.rows.to_string())
        .stdout(Stdio::null());
    if victim.batches {
        command.env("MEDTUNE_TEST_BATCHES", "1");
    }
    command.spawn().unwrap()
}

/// Kills the job again and again after a random number of requests, then lets it end.
fn survive(victim: &Victim, seed: u64) -> (Stats, Totals, Vec<u64>) {
    let (dir, server) =
        (tempfile::tempdir().unwrap(), server(|c| (c.idempotent, c.latency) = (victim.idempotent, victim.latency)));
    let ledger = dir.path().join("ledger.sqlite");
    let mut draws = stream(seed, "kills", 0);
    let mut after = Vec::new();
    for _ in 0..KILLS {
        // Batches arrive whole; the time that passes after one decides which step the kill meets.
        let (requests, pause) = match victim.batches {
            true => (draws.random_range(1..BATCH as u64), Duration::from_micros(draws.random_range(0..40_000))),
            false => (draws.random_range(1..(victim.rows / KILLS) as u64), Duration::ZERO),
        };
        let goal = server.stats().requests + requests;
        let mut child = start(victim, &server.base_url(), dir.path());
        while server.stats().requests < goal {
            assert!(child.try_wait().unwrap().is_none(), "the job ended before it was killed {KILLS} times");
            std::thread::sleep(Duration::from_micros(200));
        }
        std::thread::sleep(pause);
        child.kill().unwrap();
        child.wait().unwrap();
        if ledger.exists() {
            consistent(&ledger);
        }
        after.push(requests);
    }
    assert!(!dir.path().join("rows.jsonl").exists());
    assert!(start(victim, &server.base_url(), dir.path()).wait().unwrap().success());
    consistent(&ledger);
    let want: String = truth(victim.rows).values().map(|row| format!("{row}\n")).collect();
    assert!(std::fs::read_to_string(dir.path().join("rows.jsonl")).unwrap() == want, "the rows differ");
    (server.stats(), ledger_totals(&ledger).unwrap(), after)
}

/// Kills a job of single requests and says what became of it.
fn singles(idempotent: bool) -> (Stats, Totals) {
    let seed = u64::from(std::process::id()) + u64::from(idempotent);
    let victim = Victim { batches: false, rows: 4000, idempotent, latency: Duration::from_millis(3) };
    let (stats, totals, after) = survive(&victim, seed);
    println!("seed {seed}, killed after {after:?} requests\n{stats:?}\n{totals:?}");
    assert_eq!(totals.replies, victim.rows as u64);
    (stats, totals)
}

#[test]
fn a_job_that_is_killed_again_and_again_ends_as_if_it_had_not_been() {
    let (stats, totals) = singles(true);
    assert!(totals.in_doubt > 0, "some kills must have met requests under way");
    // The server knows idempotency keys, so that not even an unseen reply is paid for again.
    assert_eq!((stats.paid, stats.paid_twice), (totals.replies, 0));
}

#[test]
fn without_idempotency_keys_only_what_was_under_way_can_be_paid_twice_and_it_is_on_file() {
    let (stats, totals) = singles(false);
    let extra = stats.paid - totals.replies;
    assert!(extra <= totals.in_doubt, "{extra} of {} in doubt", totals.in_doubt);
}

/// A batch is found again by its tag, so that even a server without idempotency keys is paid once.
#[test]
fn batches_of_a_job_that_is_killed_again_and_again_are_paid_once() {
    let seed = std::process::id().into();
    let victim = Victim { batches: true, rows: 120 * BATCH, idempotent: false, latency: Duration::from_millis(15) };
    let (stats, totals, after) = survive(&victim, seed);
    println!("seed {seed}, killed after {after:?} requests\n{stats:?}\n{totals:?}");
    assert_eq!((totals.replies, totals.in_doubt), (victim.rows as u64, 0), "{totals:?}");
    assert_eq!((stats.paid, stats.paid_twice, stats.batches), (victim.rows as u64, 0, 120));
}

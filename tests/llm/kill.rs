//! `kill -9` at random moments: the ledger stays whole, and what was paid for is not paid for again.

use std::{
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::Duration,
};

use medtune::{llm::ledger_totals, random::stream};
use rand::RngExt;

use super::*;

const ROWS: usize = 4000;

/// Kills of one job.
const KILLS: usize = 22;

/// The job as a process of its own; does nothing unless the test below starts it.
#[test]
fn driver() {
    let Ok(base_url) = std::env::var("MEDTUNE_TEST_SERVER") else { return };
    let dir = PathBuf::from(std::env::var("MEDTUNE_TEST_DIR").unwrap());
    let config = LlmConfig { concurrency: 32, ..config(&base_url) };
    let outcome = job(&open(&config, &dir), ROWS).unwrap();
    assert_eq!(outcome.failures, BTreeMap::new());
    let text: String = outcome.rows.values().map(|row| format!("{row}\n")).collect();
    medtune::run_dir::write_atomic(&dir.join("rows.jsonl"), text.as_bytes()).unwrap();
}

fn start(base_url: &str, dir: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["llm::kill::driver", "--exact", "--test-threads=1"])
        .env("MEDTUNE_TEST_SERVER", base_url)
        .env("MEDTUNE_TEST_DIR", dir)
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

/// Kills the job again and again after a random number of requests, then lets it end.
fn survive(idempotent: bool, seed: u64) -> (Stats, Totals, Vec<u64>) {
    let (dir, server) = (
        tempfile::tempdir().unwrap(),
        server(|c| {
            c.idempotent = idempotent;
            c.latency = Duration::from_millis(3);
        }),
    );
    let ledger = dir.path().join("ledger.sqlite");
    let mut draws = stream(seed, "kills", 0);
    let mut after = Vec::new();
    for _ in 0..KILLS {
        let requests: u64 = draws.random_range(1..ROWS as u64 / KILLS as u64);
        let goal = server.stats().requests + requests;
        let mut child = start(&server.base_url(), dir.path());
        while server.stats().requests < goal {
            assert!(child.try_wait().unwrap().is_none(), "the job ended before it was killed {KILLS} times");
            std::thread::sleep(Duration::from_micros(200));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        if ledger.exists() {
            consistent(&ledger);
        }
        after.push(requests);
    }
    assert!(!dir.path().join("rows.jsonl").exists());
    assert!(start(&server.base_url(), dir.path()).wait().unwrap().success());
    consistent(&ledger);
    let want: String = truth(ROWS).values().map(|row| format!("{row}\n")).collect();
    assert!(std::fs::read_to_string(dir.path().join("rows.jsonl")).unwrap() == want, "the rows differ");
    (server.stats(), ledger_totals(&ledger).unwrap(), after)
}

#[test]
fn a_job_that_is_killed_again_and_again_ends_as_if_it_had_not_been() {
    let seed = std::process::id().into();
    println!("seed {seed}");
    let (stats, totals, after) = survive(true, seed);
    println!("killed after {after:?} requests\n{stats:?}\n{totals:?}");
    assert_eq!(totals.replies, ROWS as u64);
    assert!(totals.in_doubt > 0, "some kills must have met requests under way");
    // The server knows idempotency keys, so that not even an unseen reply is paid for again.
    assert_eq!((stats.paid, stats.paid_twice), (ROWS as u64, 0));
}

#[test]
fn without_idempotency_keys_only_what_was_under_way_can_be_paid_twice_and_it_is_on_file() {
    let seed = u64::from(std::process::id()) + 1;
    println!("seed {seed}");
    let (stats, totals, after) = survive(false, seed);
    println!("killed after {after:?} requests\n{stats:?}\n{totals:?}");
    assert_eq!(totals.replies, ROWS as u64);
    let extra = stats.paid - ROWS as u64;
    assert!(extra <= totals.in_doubt, "{extra} of {} in doubt", totals.in_doubt);
}

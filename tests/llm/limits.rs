//! Hard limits, rates, a server that is down, interrupts, dry runs, and what is shared between equal requests.

use std::{
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use medtune::{
    Kind,
    llm::{Part, Price, mock::Fault},
};

use super::*;

#[test]
fn max_requests_is_a_hard_stop_at_a_prefix_of_the_rows() {
    let (dir, server) = (tempfile::tempdir().unwrap(), server(|_| {}));
    let mut config = config(&server.base_url());
    config.max_requests = Some(17);
    let outcome = job(&open(&config, dir.path()), 40).unwrap();
    assert_eq!(outcome.rows.keys().copied().collect::<Vec<_>>(), (0..17).collect::<Vec<_>>());
    assert!(outcome.failures.values().all(|f| f == "over_budget"));
    assert_eq!(server.stats().requests, 17);
    // The limit is one of the ledger, not of the process; raising it continues.
    assert_eq!(job(&open(&config, dir.path()), 40).unwrap().rows.len(), 17);
    config.max_requests = Some(30);
    assert_eq!(job(&open(&config, dir.path()), 40).unwrap().rows.len(), 30);
    assert_eq!(server.stats().requests, 30);
}

#[test]
fn max_usd_is_never_exceeded_and_needs_a_price() {
    let (dir, server) = (tempfile::tempdir().unwrap(), server(|_| {}));
    let mut config = config(&server.base_url());
    config.max_usd = Some(0.05);
    let error = job(&open(&config, dir.path()), 5).err().unwrap();
    assert!(error.help_line().unwrap().contains("llm.prices"), "{error}");
    assert_eq!(server.stats().requests, 0);
    config.prices.insert("test-model".into(), Price { prompt: 10.0, completion: 30.0, image_tokens: 0 });
    let client = open(&config, dir.path());
    let outcome = job(&client, 400).unwrap();
    let totals = client.totals().unwrap();
    let done = outcome.rows.len();
    assert!(done > 2 && done < 400, "{done}");
    assert_eq!(outcome.rows.keys().copied().collect::<Vec<_>>(), (0..done).collect::<Vec<_>>());
    // One more could have cost 1500 tokens at 30 dollars a million.
    assert!(totals.usd <= 0.05 && totals.usd > 0.05 - 0.05 * 0.95, "{}", totals.usd);
    assert_eq!(server.stats().paid, done as u64);
}

#[test]
fn requests_per_minute_hold() {
    let (dir, server) = (tempfile::tempdir().unwrap(), server(|_| {}));
    let mut config = config(&server.base_url());
    // Five seconds' worth may come at once: 100; the other 20 take a second.
    config.requests_per_minute = Some(1200);
    let started = Instant::now();
    assert_eq!(job(&open(&config, dir.path()), 120).unwrap().rows, truth(120));
    let took = started.elapsed();
    assert!(took >= Duration::from_millis(950), "{took:?}");
}

#[test]
fn concurrency_holds_and_equal_requests_are_sent_once() {
    let (dir, server) = (tempfile::tempdir().unwrap(), server(|c| c.latency = Duration::from_millis(3)));
    let mut config = config(&server.base_url());
    config.concurrency = 5;
    let client = open(&config, dir.path());
    let mut replies = Vec::new();
    client
        .run((0..300).map(|i| Ok((i, request(i % 50)))), |i, reply| {
            replies.push((i, reply.unwrap().text));
            Ok(())
        })
        .unwrap();
    let stats = server.stats();
    assert_eq!(stats.most_under_way, 5);
    assert_eq!((stats.paid, replies.len()), (50, 300));
    assert!(replies.iter().enumerate().all(|(i, (row, text))| *row == i && *text == replies[i % 50].1));
}

#[test]
fn a_server_that_is_down_stops_the_run_instead_of_burning_through_it() {
    let dir = tempfile::tempdir().unwrap();
    let gone = server(|_| {}).base_url();
    let mut config = config(&gone);
    (config.circuit_failures, config.circuit_wait, config.circuit_probes) = (6, 0.01, 3);
    config.max_attempts = 50;
    let client = open(&config, dir.path());
    let error = job(&client, 100_000).err().unwrap();
    assert!(error.to_string().contains("is down"), "{error}");
    assert!(client.totals().unwrap().attempts < 60, "{:?}", client.totals().unwrap());
    assert_eq!(client.totals().unwrap().in_doubt, 0, "nothing reached a server");
}

#[test]
fn a_server_that_comes_back_is_found_by_a_probe() {
    let (dir, server) = (
        tempfile::tempdir().unwrap(),
        server(|c| {
            c.faults.rates.insert(Fault::ServerError, 1.0);
            c.faults.repeats = 1;
        }),
    );
    let mut config = config(&server.base_url());
    (config.circuit_failures, config.circuit_wait) = (3, 0.02);
    // Every row fails once, all at the same time; whichever is the probe then succeeds.
    let rows = config.concurrency;
    assert_eq!(job(&open(&config, dir.path()), rows).unwrap().rows, truth(rows));
}

#[test]
fn an_interrupt_lets_requests_under_way_end_and_keeps_their_replies() {
    let (dir, server) = (tempfile::tempdir().unwrap(), server(|c| c.latency = Duration::from_millis(100)));
    let config = config(&server.base_url());
    let options = options(dir.path());
    let stop = Arc::clone(&options.stop);
    let client = Client::open_with(&config, options, &|_| None).unwrap();
    let watched = std::thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            while server.stats().requests < 20 {
                std::thread::sleep(Duration::from_millis(1));
            }
            stop.store(true, Ordering::Relaxed);
            server.stats().requests
        });
        let error = job(&client, 2000).err().unwrap();
        assert_eq!(error.kind(), Kind::Interrupted);
        watcher.join().unwrap()
    });
    let (stats, totals) = (server.stats(), client.totals().unwrap());
    assert!(watched >= 20 && stats.requests < 200, "{stats:?}");
    assert_eq!((totals.replies, totals.in_doubt), (stats.paid, 0), "everything under way was answered and recorded");
    stop.store(false, Ordering::Relaxed);
    assert_eq!(job(&client, 60).unwrap().rows, truth(60));
    assert_eq!(server.stats().paid_twice, 0);
}

#[test]
fn a_dry_run_sends_nothing_and_says_what_it_would_cost() {
    let (dir, server) = (tempfile::tempdir().unwrap(), server(|_| {}));
    let mut config = config(&server.base_url());
    config.prices.insert("test-model".into(), Price { prompt: 2.5, completion: 10.0, image_tokens: 0 });
    job(&open(&config, dir.path()), 10).unwrap();
    let dry = ClientOptions { dry_run: true, ..options(dir.path()) };
    let client = Client::open_with(&config, dry, &|_| None).unwrap();
    let outcome = job(&client, 30).unwrap();
    let estimate = client.estimate().unwrap();
    assert_eq!((outcome.rows.len(), outcome.failures.len()), (10, 20));
    assert_eq!((estimate.requests, estimate.cached), (20, 10));
    assert_eq!(estimate.completion_tokens, 20 * 1500);
    let money = estimate.prompt_tokens as f64 * 2.5e-6 + 20.0 * 1500.0 * 10e-6;
    assert!((estimate.usd - money).abs() < 1e-12, "{} {money}", estimate.usd);
    assert_eq!(estimate.examples[0].messages, request(10).messages);
    assert_eq!(server.stats().requests, 10);
}

#[test]
fn images_travel_as_small_jpegs_and_bad_ones_are_failures() {
    let (dir, server) = (tempfile::tempdir().unwrap(), server(|_| {}));
    let path = dir.path().join("large.png");
    image::RgbImage::from_fn(300, 200, |x, y| image::Rgb([x as u8, y as u8, 9])).save(&path).unwrap();
    let bad = dir.path().join("bad.png");
    std::fs::write(&bad, "no image").unwrap();
    let with = |path: &Path| {
        let mut request = request(0);
        request.messages[0].parts.push(Part::Image { path: path.into(), sha256: None });
        request
    };
    let mut config = config(&server.base_url());
    config.image_max_side = 60;
    let client = open(&config, dir.path());
    let mut found = Vec::new();
    let rows = [path.clone(), bad, dir.path().join("absent.png")];
    client
        .run(rows.iter().map(|p| Ok(((), with(p)))), |(), reply| {
            found.push(reply.map(|r| r.text).map_err(|f| f.name()));
            Ok(())
        })
        .unwrap();
    assert!(found[0].is_ok());
    assert_eq!(found[1..], [Err("image_error"), Err("image_error")]);
    assert_eq!(server.stats().paid, 1);
    let key = client.key(&with(&path)).unwrap();
    image::RgbImage::from_pixel(300, 200, image::Rgb([1, 2, 3])).save(&path).unwrap();
    assert_ne!(client.key(&with(&path)).unwrap(), key, "the address is of the content");
}
